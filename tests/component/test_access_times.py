from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import IndexFull
from instantstart_fs.index.access_times import AccessTimes, clamp
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import GenerationRecord, PipelineRecord
from instantstart_fs.index.transactions import WriteTxn


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.open(str(tmp_path / "index")) as index:

        def op(txn: WriteTxn) -> None:
            for pipeline in ("p", "q"):
                txn.put_pipeline(PipelineRecord(PipelineSpec(pipeline, (ModelSpec("file:///x"),)), 1, 2))
                txn.put_generation(GenerationRecord(pipeline, 1, 5000, 3, 1 << 20))

        index.write_sync(op)
        yield index


def log_of(index: Index, now_ns: int = 1000, interval: float = 0.05) -> AccessTimes:
    return AccessTimes(index, interval, clock=lambda: now_ns)


def stored(index: Index) -> tuple[dict[str, int], list[tuple[int, int]]]:
    return index.read(lambda txn: (txn.last_requests(), list(txn.accesses("p", 1))))


def test_a_time_in_the_future_counts_as_now() -> None:
    assert clamp(5, 10) == 5
    assert clamp(15, 10) == 10


async def test_times_are_there_at_once_and_durable_after_a_flush(index: Index) -> None:
    log = log_of(index)
    assert log.last_request("p") is None
    assert log.last_access("p", 1, 2) is None
    log.record_request("p", 10)
    log.record_read("p", 1, 2, 11)
    log.record_read("p", 1, 2, 12)
    assert log.last_request("p") == 10
    assert log.last_access("p", 1, 2) == 12
    assert stored(index) == ({}, [])
    await log.flush()
    assert stored(index) == ({"p": 10}, [(2, 12)])
    assert log.last_access("p", 1, 2) == 12
    again = log_of(index)
    assert again.last_request("p") == 10
    assert again.last_access("p", 1, 2) == 12
    assert log_of(index, now_ns=7).last_request("p") == 7
    assert log_of(index, now_ns=7).last_access("p", 1, 2) == 7


async def test_a_clock_set_back_replaces_the_time_from_the_future(index: Index) -> None:
    log = log_of(index, now_ns=500)
    log.record_request("p", 900)
    await log.flush()
    log.record_request("p", 400)
    await log.flush()
    assert stored(index)[0] == {"p": 400}


async def test_it_writes_by_itself_and_once_more_at_the_end(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    written = trio.Event()
    real_write = index.write

    async def write(op: object) -> object:
        result = await real_write(op)  # type: ignore[arg-type]
        written.set()
        return result

    monkeypatch.setattr(index, "write", write)
    log = log_of(index)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run)
            log.record_request("p", 10)
            await written.wait()
            assert stored(index)[0] == {"p": 10}
            log.record_request("q", 20)
            nursery.cancel_scope.cancel()
    assert stored(index)[0] == {"p": 10, "q": 20}


async def test_many_records_make_one_transaction(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = 0
    real_write = index.write

    async def write(op: object) -> object:
        nonlocal writes
        writes += 1
        return await real_write(op)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "write", write)
    log = log_of(index)
    for number in range(10_000):
        log.record_read("p", 1, number % 100, number)
    await log.flush()
    await log.flush()
    assert writes == 1
    assert len(stored(index)[1]) == 100


async def test_what_is_removed_is_not_brought_back(index: Index) -> None:
    log = log_of(index)
    log.record_request("p", 10)
    log.record_read("p", 1, 0, 10)
    log.record_read("p", 2, 0, 10)  # a generation that the index does not know
    log.record_read("q", 1, 0, 10)
    log.record_request("q", 10)
    log.forget("q")
    assert log.last_request("q") is None
    await index.write(lambda txn: txn.delete_pipeline("p"))
    await log.flush()
    dump = index.read(lambda txn: txn.dump())
    assert dump["requests"] == dump["atimes"] == {}


async def test_a_failed_write_is_told_once_and_made_good_later(
    index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "instantstart_fs.index.access_times")
    attempts = 0
    broken = trio.Event()
    real_write = index.write

    async def write(op: object) -> object:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            raise IndexFull("full")
        broken.set()
        return await real_write(op)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "write", write)
    log = log_of(index, interval=0.01)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run)
            log.record_request("p", 10)
            log.record_read("p", 1, 1, 11)
            await broken.wait()
            nursery.cancel_scope.cancel()
    assert stored(index) == ({"p": 10}, [(1, 11)])
    assert len(caplog.records) == 1
