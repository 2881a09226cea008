"""Group commit and sealing against a real store and index."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs.errors import IndexFull, InstantStartError, StoreDamaged
from instantstart_fs.filler import committer as committer_module
from instantstart_fs.filler.committer import Committer
from instantstart_fs.filler.target import FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore
from tests.component.byteserver import FakeOrigin, content, make_target, sha256

CHUNK = 4096


class Told:
    def __init__(self) -> None:
        self.sealed: list[FillTarget] = []
        self.poisoned: list[FillTarget] = []
        self.lost: list[tuple[FillTarget, InstantStartError]] = []
        self.stuck: list[InstantStartError | None] = []

    def on_sealed(self, target: FillTarget) -> None:
        self.sealed.append(target)

    def on_poisoned(self, target: FillTarget) -> None:
        self.poisoned.append(target)

    def on_lost(self, target: FillTarget, error: InstantStartError) -> None:
        self.lost.append((target, error))

    def on_stuck(self, targets: list[FillTarget], error: InstantStartError | None) -> None:
        self.stuck.append(error)


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.05)  # not while a thread syncs


def written(store: BlobStore, name: str, chunks: int = 3, pipeline: str = "p", number: int = 0) -> FillTarget:
    """A target whose blob holds all its bytes, of which nothing is present yet."""
    data = content(chunks * CHUNK, number)
    origin = FakeOrigin("http://unused.invalid")
    target = make_target(
        store, origin, name, len(data), digest=sha256(data), pipeline=pipeline, index=number, chunk_size=CHUNK
    )
    target.blob = target.open_blob()
    target.blob.pwrite(0, data)
    return target


def arrive(committer: Committer, target: FillTarget, *chunks: int) -> None:
    for chunk in chunks:
        target.present.add(chunk)
        committer.dirty(target, chunk)


def record(index: Index, target: FillTarget) -> FileRecord | None:
    key = target.key
    return index.read(lambda txn: txn.get_file(key.pipeline, key.generation, key.index))


@asynccontextmanager
async def running(
    store: BlobStore, index: Index, *, size: int = 1 << 30, seconds: float = 1.0
) -> AsyncIterator[tuple[Committer, Told]]:
    told = Told()
    committer = Committer(store, index, size, seconds, told)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            await trio.testing.wait_all_tasks_blocked()
            yield committer, told
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.002)


async def test_one_commit_for_many_files_by_age(store: BlobStore, index: Index) -> None:
    targets = [written(store, f"f{number}", number=number) for number in range(20)]
    async with running(store, index, seconds=0.1) as (committer, _):
        for target in targets:
            arrive(committer, target, 0, 2)
        await until(lambda: all(target.durable.count == 2 for target in targets))
        assert committer.commits == 1
    for target in targets:
        assert record(index, target) == FileRecord("filling", 0, 0, b"\x05")


async def test_a_large_group_does_not_wait_for_its_age(store: BlobStore, index: Index) -> None:
    target = written(store, "f")
    async with running(store, index, size=2 * CHUNK, seconds=3600) as (committer, _):
        arrive(committer, target, 0)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert committer.commits == 0
        arrive(committer, target, 1)
        await until(lambda: target.durable.count == 2)


def held_syncs(monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, trio.Event]:
    """Make syncs wait. Returns the event of the first that has begun, and the one that lets them all go on."""
    syncing, go_on = trio.Event(), trio.Event()
    real = BlobFile.datasync

    def datasync(blob: BlobFile) -> None:
        trio.from_thread.run_sync(syncing.set)
        trio.from_thread.run(go_on.wait)
        real(blob)

    monkeypatch.setattr(BlobFile, "datasync", datasync)
    return syncing, go_on


async def test_what_arrives_during_a_sync_waits_for_the_next(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = written(store, "f")
    syncing, go_on = held_syncs(monkeypatch)
    async with running(store, index, seconds=0.05) as (committer, _):
        arrive(committer, target, 0)
        await syncing.wait()
        arrive(committer, target, 1)
        go_on.set()
        await until(lambda: target.durable.count > 0)
        assert 1 not in target.durable, "its bytes may have come after the fdatasync"
        await until(lambda: target.durable.count == 2)


async def test_a_stop_commits_what_is_present(store: BlobStore, index: Index) -> None:
    target = written(store, "f")
    async with running(store, index, seconds=3600) as (committer, _):
        arrive(committer, target, 1)
    assert record(index, target) == FileRecord("filling", 0, 0, b"\x02")


async def test_sealing(store: BlobStore, index: Index) -> None:
    target = written(store, "f")
    async with running(store, index, seconds=3600) as (committer, told):
        arrive(committer, target, 0, 1, 2)
        committer.seal(target, "sealed")
        await until(lambda: told.sealed == [target])
        assert target.state is FileState.SEALED
        assert target.blob is not None
        seal = target.blob.seal_record()
        assert seal is not None and (seal.state, seal.digest) == ("sealed", str(target.entry.file.digest))
        assert record(index, target) == FileRecord("sealed", allocated=target.blob.allocated_bytes())


async def test_small_files_wait_to_be_sealed_together_and_a_large_one_does_not(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "SEAL_SECONDS", 3600)
    monkeypatch.setattr(committer_module, "SMALL_FILE", 2 * CHUNK)
    small, large = written(store, "small", 1), written(store, "large", 3, number=1)
    async with running(store, index, seconds=3600) as (committer, told):
        arrive(committer, small, 0)
        committer.seal(small, "sealed")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert told.sealed == []
        arrive(committer, large, 0, 1, 2)
        committer.seal(large, "sealed")
        await until(lambda: len(told.sealed) == 2)
        assert committer.commits == 1


async def test_a_failed_sync_is_told_and_not_recorded(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = written(store, "good"), written(store, "bad", number=1)
    real = BlobFile.datasync

    def datasync(blob: BlobFile) -> None:
        if blob is bad.blob:
            raise StoreDamaged("sync bad: input/output error")
        real(blob)

    monkeypatch.setattr(BlobFile, "datasync", datasync)
    async with running(store, index, seconds=0.01) as (committer, told):
        arrive(committer, good, 0)
        arrive(committer, bad, 0)
        await until(lambda: good.durable.count == 1)
        await until(lambda: len(told.lost) == 1)
        assert told.lost[0][0] is bad
        assert bad.durable.count == 0
    assert record(index, bad) is None


async def test_a_failed_seal_is_told_and_not_recorded(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = written(store, "f")

    other = written(store, "other", number=1)
    assert target.blob is not None
    broken, real_fsync = target.blob.fd, os.fsync

    def fsync(fd: int) -> None:
        if fd == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    async with running(store, index) as (committer, told):
        for each in (target, other):
            arrive(committer, each, 0, 1, 2)
            committer.seal(each, "sealed")
        await until(lambda: len(told.lost) == 1 and len(told.sealed) == 1)
        assert told.lost[0][0] is target and told.sealed == [other], "each by itself, though one call sealed both"
        assert target.state is not FileState.SEALED and target.blob.seal_record() is None
    assert record(index, target) is None
    assert record(index, other) == FileRecord("sealed", allocated=other.allocated)


async def test_many_small_files_are_sealed_step_by_step(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's bytes before its record, every record before the directory, the directory once: no journal's commit
    for each file, and the order for each that makes its record true."""
    targets = [written(store, f"f{number}", number=number) for number in range(20)]
    files = {target.blob.fd: target.entry.path for target in targets if target.blob is not None}
    steps: list[tuple[str, str]] = []
    real_fsync, real_setxattr = os.fsync, os.setxattr

    def fsync(fd: int) -> None:
        steps.append(("fsync", files.get(fd, "the directory")))
        real_fsync(fd)

    def setxattr(fd: int, name: str, value: bytes) -> None:
        steps.append(("record", files[fd]))
        real_setxattr(fd, name, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "setxattr", setxattr)
    async with running(store, index, seconds=3600) as (committer, told):
        for target in targets:
            arrive(committer, target, 0, 1, 2)
            committer.seal(target, "sealed")
        await until(lambda: len(told.sealed) == len(targets))
        assert committer.commits == 1
    names = [target.entry.path for target in targets]
    assert steps == [
        *(("fsync", name) for name in names),
        *(("record", name) for name in names),
        *(("fsync", name) for name in names),
        ("fsync", "the directory"),
    ]


async def test_a_full_index_is_tried_again_with_nothing_lost(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "RETRY_SECONDS", 0.02)
    real = index.write
    full = True

    async def write(op: Callable[[WriteTxn], object], **how: Any) -> object:
        if full:
            raise IndexFull("the index is full")
        return await real(op, **how)

    monkeypatch.setattr(index, "write", write)
    partial, whole = written(store, "partial"), written(store, "whole", number=1)
    wrong = written(store, "wrong", number=2)
    async with running(store, index, seconds=0.01) as (committer, told):
        arrive(committer, partial, 0)
        arrive(committer, whole, 0, 1, 2)
        committer.seal(whole, "sealed")
        arrive(committer, wrong, 0, 1, 2)
        committer.poison(wrong)
        await until(lambda: len(told.stuck) > 2)
        assert committer.stuck is not None and partial.durable.count == 0 and not told.sealed
        assert store.existing_blob("p", 1, "wrong") is not None, "the index still speaks of it"
        full = False
        await until(lambda: committer.stuck is None and bool(told.poisoned))
        assert told.stuck[-1] is None
    assert record(index, partial) == FileRecord("filling", 0, 0, b"\x01")
    assert record(index, whole) == FileRecord("sealed", allocated=whole.allocated)
    assert record(index, wrong) == FileRecord("absent", 1, 0, b"")


async def test_wrong_bytes_are_dropped_whatever_the_index_and_the_disk_refused_before(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "RETRY_SECONDS", 0.02)
    real, writes = index.write, 0
    target = written(store, "f")

    async def write(op: Callable[[WriteTxn], object], **how: Any) -> object:
        nonlocal writes
        writes += 1
        if writes > 1:
            return await real(op, **how)
        committer.poison(target)  # while its chunks are being committed
        raise IndexFull("the index is full")

    monkeypatch.setattr(index, "write", write)
    async with running(store, index, seconds=0.01) as (committer, told):
        arrive(committer, target, 0)
        await until(lambda: writes == 1)

        def lost(blob: BlobFile) -> None:
            raise StoreDamaged("the disk lost it")

        monkeypatch.setattr(BlobFile, "datasync", lost)
        await until(lambda: told.poisoned == [target])
    assert record(index, target) == FileRecord("absent", 1, 0, b"")


async def test_when_what_could_not_be_committed_is_forgotten_filling_goes_on(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch, clock: trio.testing.MockClock
) -> None:
    async def refuse(op: Callable[[WriteTxn], object], **how: Any) -> object:
        raise IndexFull("the index is full")

    monkeypatch.setattr(index, "write", refuse)
    target = written(store, "f")
    async with running(store, index) as (committer, told):
        arrive(committer, target, 0)
        while committer.stuck is None:
            await trio.sleep(0.1)
        committer.forget_pipeline("p")
        await trio.sleep(committer_module.RETRY_SECONDS + 2.0)
        assert committer.stuck is None
        assert told.stuck[-1] is None
        tried = len(told.stuck)
        arrive(committer, written(store, "g", number=1), 0)
        while len(told.stuck) == tried:
            await trio.sleep(0.1)
        assert committer.stuck is not None, "the next commit decides anew"


async def test_poison_drops_the_record_before_the_bytes(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = written(store, "f")
    seen: list[FileRecord | None] = []
    real = store.delete_blob

    def delete_blob(*arguments: str | int) -> None:
        seen.append(record(index, target))
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "delete_blob", delete_blob)
    async with running(store, index, seconds=0.01) as (committer, told):
        arrive(committer, target, 0)
        await until(lambda: target.durable.count == 1)
        committer.poison(target)
        await until(lambda: told.poisoned == [target])
    assert seen == [FileRecord("absent", 1, 0, b"")]
    assert store.existing_blob("p", 1, "f") is None


async def test_another_incarnation_is_never_overwritten(store: BlobStore, index: Index) -> None:
    target = written(store, "f")
    newer = FileRecord("absent", 5, 4242, b"")
    await index.write(lambda txn: txn.put_file("p", 1, 0, newer))
    async with running(store, index, seconds=0.01) as (committer, _):
        arrive(committer, target, 0)
        await until(lambda: committer.commits == 1)
    assert record(index, target) == newer


async def test_a_forgotten_pipeline_is_not_recorded_and_quiet_says_when(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, other = written(store, "f"), written(store, "f", pipeline="q", number=1)
    later = written(store, "g", number=2)
    syncing, go_on = held_syncs(monkeypatch)
    async with running(store, index, seconds=0.01) as (committer, _):
        arrive(committer, target, 0)
        arrive(committer, other, 0)
        await syncing.wait()
        arrive(committer, later, 0)
        committer.forget_pipeline("p")
        with trio.move_on_after(0.05) as scope:
            await committer.wait_quiet("p")
        assert scope.cancelled_caught, "a commit is inside its files"
        go_on.set()
        await committer.wait_quiet("p")
        await until(lambda: other.durable.count == 1)
    assert record(index, target) is None and record(index, later) is None
    assert record(index, other) == FileRecord("filling", 0, 0, b"\x01")
