from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest
import trio
import trio.testing

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import IndexFull, StoreDamaged, StoreError, StoreFull, StoreUnsupported
from instantstart_fs.index import nodeids, schema
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FIRST_NODEID, FileRecord, GenerationRecord, PipelineRecord, SummaryRecord
from instantstart_fs.index.transactions import WriteTxn


def pipeline_record(pipeline: str) -> PipelineRecord:
    return PipelineRecord(PipelineSpec(pipeline, (ModelSpec("file:///x"),)), 1, 2)


def put_file(index_: int, pipeline: str = "p", bitmap: bytes = b"\x01") -> Callable[[WriteTxn], None]:
    return lambda txn: txn.put_file(pipeline, 1, index_, FileRecord("filling", 0, 0, bitmap))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "index")


@pytest.fixture
def index(path: str) -> Iterator[Index]:
    with Index.open(path) as index:
        yield index


def files(index: Index, pipeline: str = "p") -> list[int]:
    return index.read(lambda txn: [number for number, _ in txn.files(pipeline, 1)])


def test_what_was_written_is_there_after_reopening(path: str) -> None:
    with Index.open(path) as index:

        def op(txn: WriteTxn) -> None:
            txn.put_pipeline(pipeline_record("p"))
            txn.put_generation(GenerationRecord("p", 1, 5000, 3, 1 << 20))
            txn.put_file("p", 1, 2, FileRecord("sealed"))
            txn.put_last_request("p", 17)
            txn.put_last_access("p", 1, 2, 18)

        index.write_sync(op)
    with Index.open(path) as index, index.reading() as txn:
        assert list(txn.pipelines()) == [pipeline_record("p")]
        assert txn.get_pipeline("p") == pipeline_record("p")
        assert list(txn.generations("p")) == [txn.get_generation("p", 1)]
        assert list(txn.files("p", 1)) == [(2, FileRecord("sealed"))]
        assert txn.get_file("p", 1, 3) is None
        assert txn.last_requests() == {"p": 17}
        assert txn.last_access("p", 1, 2) == 18


def test_deleting_takes_what_belongs_to_it_and_nothing_else(index: Index) -> None:
    def fill(txn: WriteTxn) -> None:
        for pipeline in ("a", "a-b", "ab"):
            txn.put_pipeline(pipeline_record(pipeline))
            txn.put_last_request(pipeline, 1)
            for number in (1, 2):
                txn.put_generation(GenerationRecord(pipeline, number, 0, 3, 1))
                for at in range(3):
                    txn.put_file(pipeline, number, at, FileRecord("sealed"))
                    txn.put_last_access(pipeline, number, at, 5)

    index.write_sync(fill)
    index.write_sync(lambda txn: txn.delete_generation("a", 1))
    with index.reading() as txn:
        assert list(txn.files("a", 1)) == list(txn.accesses("a", 1)) == []
        assert [record.number for record in txn.generations("a")] == [2]
        assert len(list(txn.files("a", 2))) == len(list(txn.accesses("a", 2))) == 3
    index.write_sync(lambda txn: txn.delete_pipeline("a"))
    with index.reading() as txn:
        assert [record.spec.id for record in txn.pipelines()] == ["a-b", "ab"]
        assert txn.last_requests() == {"a-b": 1, "ab": 1}
        assert list(txn.files("a", 2)) == list(txn.generations("a")) == []
        for pipeline in ("a-b", "ab"):
            for number in (1, 2):
                assert len(list(txn.files(pipeline, number))) == len(list(txn.accesses(pipeline, number))) == 3


async def test_an_op_that_raises_undoes_itself_alone(index: Index) -> None:
    """All in one group: the first op holds the writer until the others have queued up."""
    queued = threading.Event()
    outcomes: dict[int, object] = {}

    async def one(number: int) -> None:
        def op(txn: WriteTxn) -> int:
            put_file(number)(txn)
            if number % 3 == 0:
                raise LookupError(number)
            return number

        try:
            outcomes[number] = await index.write(op)
        except LookupError as error:
            outcomes[number] = error

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.write, lambda txn: queued.wait(30))
            await trio.testing.wait_all_tasks_blocked()
            for number in range(20):
                nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
            queued.set()
    assert files(index) == [number for number in range(20) if number % 3]
    for number, outcome in outcomes.items():
        assert isinstance(outcome, LookupError) if number % 3 == 0 else outcome == number


async def test_a_cancelled_writer_leaves_the_others_alone(index: Index) -> None:
    hold = threading.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.write, lambda txn: hold.wait(30))
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0) as scope:
                await index.write(put_file(1))
            with trio.CancelScope() as scope:
                nursery.start_soon(index.write, put_file(2))
                scope.cancel()
                await trio.lowlevel.checkpoint()
            hold.set()
        assert scope.cancelled_caught
        await index.write(put_file(3))
    assert {2, 3} <= set(files(index))


async def test_a_write_cancelled_while_it_waits_may_happen_and_harms_nobody(index: Index) -> None:
    hold = threading.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await index.write(put_file(1))

            nursery.start_soon(index.write, lambda txn: hold.wait(30))
            nursery.start_soon(cancelled)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            hold.set()
        assert scope.cancelled_caught
        await index.write(put_file(2))
    assert files(index) == [1, 2]


async def test_a_stopped_writer_raises_and_never_hangs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    index = Index.open(path)

    def broken(group: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(index, "_run_group", broken)
    with trio.fail_after(30):
        with pytest.RaisesGroup(pytest.RaisesExc(StoreError, match="bug"), flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                await nursery.start(index.run)
                with pytest.raises(StoreError, match="stopped"):
                    await index.write(put_file(1))
                await trio.sleep_forever()
        for _ in range(2):
            with pytest.raises(StoreError, match="stopped: bug"):
                await index.write(put_file(1))
            with pytest.raises(StoreError, match="stopped: bug"):
                index.write_sync(put_file(1))
    assert files(index) == []
    index.close()


async def test_closing_finishes_what_is_queued_and_refuses_the_rest(path: str) -> None:
    index = Index.open(path)
    for number in range(100):
        await index.write(put_file(number))
    async with trio.open_nursery() as nursery:
        await nursery.start(index.run)
        index.close()
    index.close()
    with pytest.raises(StoreError, match="closed"):
        await index.write(put_file(1))
    with pytest.raises(StoreError, match="closed"):
        index.read(lambda txn: None)
    with Index.open(path) as again:
        assert files(again) == list(range(100))


def test_a_full_map_refuses_growth_stays_readable_and_can_be_emptied(path: str) -> None:
    tiny = 256 << 10
    bitmap = b"\xff" * 1000
    with Index.open(path, map_size=tiny) as index:
        index.write_sync(lambda txn: txn.put_pipeline(pipeline_record("p")))
        written = 0
        with pytest.raises(IndexFull, match="full"):
            for number in range(10_000):
                index.write_sync(put_file(number, bitmap=bitmap))
                written = number + 1
        assert 100 < written < 1000
        assert files(index) == list(range(written))
        # Same length: still possible. More: not.
        index.write_sync(put_file(0, bitmap=b"\x01" * 1000))
        with pytest.raises(IndexFull):
            index.write_sync(put_file(0, bitmap=b"\x01" * 1001))
        with pytest.raises(IndexFull):
            index.write_sync(lambda txn: [put_file(1000 + n, bitmap=bitmap)(txn) for n in range(10_000)])
        assert files(index) == list(range(written))

        def replace(txn: WriteTxn) -> None:
            txn.delete_file("p", 1, 5)
            put_file(9_999, bitmap=bitmap)(txn)

        index.write_sync(replace)
        index.write_sync(lambda txn: txn.delete_pipeline("p"))
        for number in range(written // 2):
            index.write_sync(put_file(number, "q", bitmap))
    with Index.open(path, map_size=4 * tiny) as index:
        for number in range(2 * written):
            index.write_sync(put_file(number, "r", bitmap))
        assert len(files(index, "q")) == written // 2
        assert len(files(index, "r")) == 2 * written


async def test_one_op_too_large_fails_alone(path: str) -> None:
    with Index.open(path, map_size=256 << 10) as index:
        hold = threading.Event()
        failures: list[StoreError] = []

        async def huge() -> None:
            try:
                await index.write(lambda txn: [put_file(n, bitmap=bytes(1000))(txn) for n in range(100_000)])
            except IndexFull as error:
                failures.append(error)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(index.write, lambda txn: hold.wait(30))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(index.write, put_file(1, "q"))
                nursery.start_soon(huge)
                nursery.start_soon(index.write, put_file(2, "q"))
                await trio.testing.wait_all_tasks_blocked()
                hold.set()
        assert len(failures) == 1
        assert files(index) == []
        assert files(index, "q") == [1, 2]


def test_a_full_disk_refuses_growth_but_not_deletion(small_ext4: Path) -> None:
    with Index.open(str(small_ext4 / "index")) as index:
        index.write_sync(lambda txn: [put_file(n, bitmap=bytes(500))(txn) for n in range(1000)])
        with open(small_ext4 / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(StoreFull):
            for number in range(1000, 200_000, 500):
                index.write_sync(lambda txn, number=number: [
                    put_file(number + n, bitmap=bytes(1000))(txn) for n in range(500)
                ])  # fmt: skip
        assert files(index)[:1000] == list(range(1000))
        index.write_sync(lambda txn: txn.delete_files("p", 1))
        assert files(index) == []
        os.unlink(small_ext4 / "ballast")
        index.write_sync(put_file(0))
        index.write_sync(put_file(1))
        assert files(index) == [0, 1]


def test_nodeids_are_never_given_twice(path: str) -> None:
    seen: set[int] = set()

    def take(index: Index, count: int) -> None:
        first = index.write_sync(lambda txn: txn.reserve_nodeids(count))
        new = set(range(first, first + count))
        assert first >= FIRST_NODEID
        assert not new & seen
        seen.update(new)

    for _ in range(3):
        with Index.open(path) as index:
            for count in (1, 7, 300_000):
                take(index, count)

            def fails(txn: WriteTxn) -> None:
                txn.reserve_nodeids(5)
                raise LookupError

            with pytest.raises(LookupError):
                index.write_sync(fails)
            with pytest.raises(ValueError, match="cannot reserve"):
                index.write_sync(lambda txn: txn.reserve_nodeids(0))
    for name in ("data.mdb", "lock.mdb"):
        os.unlink(os.path.join(path, name))
    with Index.open(path) as index:  # a lost index
        take(index, 10)
        index.write_sync(lambda txn: txn.clear())
        take(index, 10)
    os.unlink(os.path.join(os.path.dirname(path), "nodeids"))
    with Index.open(path) as index:  # a lost high-water mark
        take(index, 10)
    os.unlink(os.path.join(path, "data.mdb"))
    with Index.open(path) as index:
        take(index, 10)
    assert max(seen) < 10 * nodeids.STEP


def test_an_unreadable_high_water_mark_is_only_accepted_if_the_index_knows_better(path: str) -> None:
    with Index.open(path) as index:
        index.write_sync(lambda txn: txn.reserve_nodeids(5))
    mark = Path(path).parent / "nodeids"
    mark.write_bytes(b"garbage")
    with Index.open(path) as index:
        assert index.write_sync(lambda txn: txn.reserve_nodeids(1)) == FIRST_NODEID + 5
    assert int(mark.read_bytes()) > FIRST_NODEID
    mark.write_bytes(b"garbage")
    os.unlink(os.path.join(path, "data.mdb"))
    with pytest.raises(StoreDamaged, match="nodeids"):
        Index.open(path)


SUMMARY = SummaryRecord(1, 2048, 3, 2, 1, 10, 20, "r", 5, {"": 0}, (0,) * 6)


def test_an_older_format_is_taken_over(path: str) -> None:
    Index.open(path).close()
    with lmdb.open(path, max_dbs=16) as raw, raw.begin(write=True) as transaction:
        transaction.put(b"format", (1).to_bytes(8, "big"), db=raw.open_db(b"meta", txn=transaction))
    Index.open(path).close()
    with lmdb.open(path, max_dbs=16) as raw, raw.begin() as transaction:
        found = transaction.get(b"format", db=raw.open_db(b"meta", txn=transaction, create=False))
    assert found == schema.FORMAT.to_bytes(8, "big")


@pytest.mark.parametrize(
    ("what", "stays"),
    [
        (lambda txn: txn.put_file("x", 1, 0, FileRecord("sealed")), False),
        (lambda txn: txn.delete_file("x", 1, 0), False),
        (lambda txn: txn.delete_files("x", 1), False),
        (lambda txn: txn.put_generation(GenerationRecord("x", 2, 4096, 2, 8)), False),
        (lambda txn: txn.delete_generation("x", 1), False),
        (lambda txn: txn.delete_pipeline("x"), False),
        (lambda txn: txn.delete_summary("x"), False),
        (lambda txn: txn.put_file("y", 1, 0, FileRecord("sealed")), True),
        (lambda txn: txn.put_last_request("x", 1), True),
    ],
    ids=lambda value: None,
)
def test_whatever_changes_a_pipelines_files_takes_its_summary_away(
    path: str, what: Callable[[WriteTxn], object], stays: bool
) -> None:
    with Index.open(path) as index:
        index.write_sync(lambda txn: txn.put_summary("x", SUMMARY))
        index.write_sync(what)
        assert index.read(lambda txn: dict(txn.summaries())) == ({"x": SUMMARY} if stays else {})

        def change_and_sum_up(txn: WriteTxn) -> None:
            what(txn)
            txn.put_summary("x", SUMMARY)

        index.write_sync(change_and_sum_up)
        assert index.read(lambda txn: list(txn.summarized())) == ["x"]


def test_a_newer_format_is_refused(path: str) -> None:
    Index.open(path).close()
    with lmdb.open(path, max_dbs=8) as raw, raw.begin(write=True) as transaction:
        transaction.put(b"format", (schema.FORMAT + 1).to_bytes(8, "big"), db=raw.open_db(b"meta", txn=transaction))
    with pytest.raises(StoreUnsupported, match="newer"):
        Index.open(path)


@pytest.mark.parametrize("damage", ["garbage", "short", "cut"])
def test_a_damaged_data_file_is_refused_with_what_to_do(path: str, damage: str) -> None:
    with Index.open(path) as index:
        index.write_sync(lambda txn: [put_file(n, bitmap=bytes(100))(txn) for n in range(5000)])
    data = os.path.join(path, "data.mdb")
    if damage == "garbage":
        with open(data, "r+b") as file:
            file.write(os.urandom(64 << 10))
    else:
        os.truncate(data, 1 if damage == "short" else 64 << 10)
    with pytest.raises(StoreDamaged, match="instantstart fsck"):
        Index.open(path)


def test_a_record_that_cannot_be_decoded_is_damage(index: Index) -> None:
    index.write_sync(lambda txn: txn._put("files", b"p\0\0\0\0\1\0\0\0\0", b"\xc1"))
    with pytest.raises(StoreDamaged, match="instantstart fsck"):
        files(index)


def test_readers_in_other_threads_see_whole_transactions(index: Index) -> None:
    """Each op writes two records that are equal; no reader may ever see them differ."""
    stop = threading.Event()
    wrong: list[object] = []

    def reader() -> None:
        while not stop.is_set():
            pair = index.read(lambda txn: (txn.get_file("p", 1, 0), txn.get_file("p", 1, 1)))
            if pair[0] != pair[1]:
                wrong.append(pair)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            bitmap = number.to_bytes(2, "big")
            index.write_sync(lambda txn, bitmap=bitmap: [put_file(n, bitmap=bitmap)(txn) for n in range(2)])
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert wrong == []


CHILD = """
import sys
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
index = Index.open(sys.argv[1])
number = index.read(lambda txn: len(list(txn.files("p", 1))))
print("ready", flush=True)
while True:
    def op(txn):
        for at in range(3):
            txn.put_file("pqr"[at], 1, number, FileRecord("filling", 0, txn.reserve_nodeids(1), bytes(200)))
    index.write_sync(op)
    print(number, flush=True)
    number += 1
"""


def test_killed_at_any_moment_what_was_acknowledged_is_there(path: str) -> None:
    rng = random.Random(20_262)
    acknowledged = -1
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.001, 0.08))
        finally:
            child.kill()
            lines = child.stdout.read().splitlines(keepends=True)
            child.wait(30)
            child.stdout.close()
        whole = [int(line) for line in lines if line.endswith("\n")]
        acknowledged = max([acknowledged, *whole])
        with Index.open(path) as index:
            present = files(index)
            assert present == files(index, "q") == files(index, "r")
            assert present == list(range(len(present)))
            assert len(present) > acknowledged
            with index.reading() as txn:
                given = [record.nodeid for name in "pqr" for _, record in txn.files(name, 1)]
            assert len(set(given)) == len(given)
    assert acknowledged > 20
    assert child.returncode == -signal.SIGKILL
