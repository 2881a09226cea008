"""The handle table: what a SIGKILL at any instruction leaves is what the next daemon reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.mount.handover import (
    BACKING,
    MOUNT_NAME,
    TABLE_NAME,
    HandleTable,
    HandoverRefused,
    Inherited,
    Row,
    Terms,
)

TERMS = Terms(path="/models", device="0:45", minor=40, flags=1 << 37)


@pytest.fixture
def table() -> Iterator[HandleTable]:
    table = HandleTable.create(TERMS)
    yield table
    table.close()


def reread(table: HandleTable) -> HandleTable:
    return HandleTable.open(os.dup(table.fd))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60))
def test_a_successor_reads_what_is_open(steps: list[tuple[bool, int]]) -> None:
    table, expected = HandleTable.create(TERMS), dict[int, Row]()
    try:
        for add, fh in steps:
            if add and fh not in expected:
                expected[fh] = Row(fh, fh + 1000, 2 * fh, fh % 3)
                table.add(expected[fh])
            elif not add:
                expected.pop(fh, None)
                table.remove(fh)
        after = reread(table)
        assert sorted(after.handles()) == sorted(expected.values())
        assert after.terms == TERMS
        after.close()
    finally:
        table.close()


def test_it_grows(table: HandleTable) -> None:
    rows = [Row(fh, fh, fh, 0) for fh in range(1, 20_001)]
    for row in rows:
        table.add(row)
    after = reread(table)
    assert sorted(after.handles()) == rows
    for row in rows:
        after.remove(row.fh)
    after.close()
    assert reread(table).handles() == []


def test_backing_ids_have_rows_of_their_own(table: HandleTable) -> None:
    table.add(Row(BACKING | 7, 7, 0, 3))
    table.add(Row(1, 7, 2, 3))
    after = reread(table)
    assert [row.backing_id for row in after.backings()] == [3]
    assert [row.fh for row in after.handles()] == [1]
    after.remove(BACKING | 7)
    assert after.backings() == []
    after.close()


def test_epochs_count_up(table: HandleTable) -> None:
    after = reread(table)
    assert (after.begin_epoch(), after.begin_epoch()) == (2, 3)
    after.close()


@pytest.mark.parametrize(
    ("offset", "data", "reason"), [(8, b"\x63", "format 99"), (0, b"x", "not complete"), (24, b"x", "cannot be read")]
)
def test_what_cannot_be_read_is_refused(table: HandleTable, offset: int, data: bytes, reason: str) -> None:
    os.pwrite(table.fd, data, offset)
    with pytest.raises(HandoverRefused, match=reason):
        _ = reread(table).terms


def test_a_spoilt_table_is_refused(table: HandleTable) -> None:
    table.spoil()
    with pytest.raises(HandoverRefused, match="not complete"):
        reread(table)


def test_what_is_inherited_is_told_by_name(table: HandleTable) -> None:
    assert Inherited.receive({}) is None
    table.add(Row(1, 1025, 2, 3))
    reader, writer = os.pipe()
    inherited = Inherited.receive({MOUNT_NAME: reader, TABLE_NAME: os.dup(table.fd)})
    assert inherited is not None
    assert inherited.held == [1025]
    assert "another filesystem" in str(inherited.why_not("/models", "instantstart"))
    assert "is now /elsewhere" in str(inherited.why_not("/elsewhere", "instantstart"))
    os.close(writer)
    assert "unmounted or aborted" in str(inherited.why_not("/models", "instantstart"))
    assert inherited.table is not None
    inherited.table.close()
    os.close(reader)
