"""The filler with real workers, a real store and index, and a server with faults on order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from instantstart_fs.core.addresses import LOOPBACK
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.core.retry import Backoff
from instantstart_fs.errors import (
    AccessRefused,
    DigestMismatch,
    FillCancelled,
    IndexFull,
    OriginBroken,
    OriginChanged,
    OriginNotFound,
    ReadDeadline,
    StoreDamaged,
    StoreFull,
)
from instantstart_fs.filler import committer, delivery, pool
from instantstart_fs.filler.scheduler import Filler, FillSettings
from instantstart_fs.filler.space import FreeSpace
from instantstart_fs.filler.target import FileKey, FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.origins.base import Location
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore
from tests.component.byteserver import (
    ByteServer,
    FakeOrigin,
    Handler,
    Recorder,
    black_hole,
    byte_server,
    content,
    make_target,
    sha256,
)
from tests.harness import loop_ext4

CHUNK = 64 * 1024
QUICK = FillSettings(
    workers=1,
    connections=4,
    commit_seconds=0.05,
    stall_timeout=1.0,
    connect_timeout=1.0,
    locate_timeout=2.0,
    backoff=Backoff(base=0.02, cap=0.2),
)


@pytest.fixture
def server() -> Iterator[ByteServer]:
    with byte_server() as running:
        yield running


@asynccontextmanager
async def filling(
    store: BlobStore, index: Index, settings: FillSettings = QUICK, *, free_space: FreeSpace | None = None
) -> AsyncIterator[tuple[Filler, Recorder]]:
    events = Recorder()
    filler = Filler(store, index, settings, events, free_space=free_space)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(filler.run)
            yield filler, events
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """What workers bring about has no event of its own for a test to wait for."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.002)


async def wait_state(targets: Sequence[FillTarget], state: FileState, seconds: float = 20) -> None:
    def reached() -> bool:
        for target in targets:
            assert target.state is state or not target.failed, target.error
        return all(target.state is state for target in targets)

    await until(reached, seconds)


def record_of(index: Index, key: FileKey) -> FileRecord | None:
    return index.read(lambda txn: txn.get_file(key.pipeline, key.generation, key.index))


def blocks(target: FillTarget) -> int:
    """Bytes that the store's file takes on the disk."""
    assert target.blob is not None
    return os.fstat(target.blob.fd).st_blocks * 512


def stored(target: FillTarget) -> bytes:
    assert target.blob is not None
    return target.blob.pread(0, target.entry.file.size)


async def test_a_daemon_that_took_over_goes_on_without_fetch_workers(
    store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its readers have the mount, and what is cached. One whose workers start later fetches then."""
    monkeypatch.setattr(pool, "START_DEATHS", 2)
    monkeypatch.setattr(pool, "WORKER", "instantstart_fs.none")
    filler = Filler(store, index, QUICK, Recorder())
    filler.hold_workers()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(filler.run)
            filler.start_workers()
            await until(lambda: "no fetch worker starts: 2 have ended" in caplog.text)
            monkeypatch.undo()
            await until(lambda: filler.statistics().workers == 1)
            nursery.cancel_scope.cancel()


async def test_held_workers_start_when_they_are_told_to(store: BlobStore, index: Index) -> None:
    filler = Filler(store, index, QUICK, Recorder())
    filler.hold_workers()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(filler.run)
            await trio.testing.wait_all_tasks_blocked()
            assert filler.statistics().workers == 0
            filler.start_workers()
            filler.start_workers()
            await until(lambda: filler.statistics().workers > 0)
            nursery.cancel_scope.cancel()


async def test_a_file_is_fetched_sealed_and_recorded(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a/model.safetensors"] = content(10 * CHUNK + 123, 1)
    target = make_target(store, FakeOrigin(server.url), "a/model.safetensors", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.fill("p", [target])
        assert filler.is_filling("p")
        await wait_state([target], FileState.SEALED)
        assert not filler.is_filling("p")
        assert filler.rate("p") > 0
    assert stored(target) == data
    assert target.blob is not None
    seal = target.blob.seal_record()
    assert seal is not None and seal.state == "sealed" and seal.digest == str(target.entry.file.digest)
    assert record_of(index, target.key) == FileRecord("sealed", 0, 0, b"", allocated=blocks(target))
    assert sorted(server.log) == sorted(set(server.log)), "no chunk was asked for twice"
    assert len(server.log) == 11
    assert events.of("sealed") == [FileState.SEALED]
    assert sorted(events.of("present")) == list(range(11))


async def test_tiny_and_empty_files(server: ByteServer, store: BlobStore, index: Index) -> None:
    origin = FakeOrigin(server.url)
    targets = []
    for number in range(300):
        data = server.files[f"f{number}"] = content(number % 7 * 11, number)
        targets.append(make_target(store, origin, f"f{number}", len(data), digest=sha256(data), index=number))
    async with filling(store, index) as (filler, _):
        filler.fill("p", targets)
        await wait_state(targets, FileState.SEALED)
        assert filler.statistics().commits < 200, "seals share commits"
    for target in targets:
        assert stored(target) == server.files[target.entry.path]


async def test_without_a_digest_a_file_ends_unverified(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(3 * CHUNK, 2)
    target = make_target(store, FakeOrigin(server.url), "a", len(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.UNVERIFIED)
    record = record_of(index, target.key)
    assert record is not None and record.state == "unverified"
    assert stored(target) == data


async def test_a_demand_fetches_only_its_chunk(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(10 * CHUNK, 3)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        wanted = ByteRange(5 * CHUNK - 10, 5 * CHUNK + 10)
        for _ in range(3):
            filler.demand(target, wanted)
        await target.wait_readable(wanted, 10)
        assert target.blob is not None
        assert target.blob.pread(wanted.start, wanted.length) == data[wanted.start : wanted.stop]
        assert not filler.is_filling("p")
    assert sorted(server.log) == [("a", 4 * CHUNK, 5 * CHUNK), ("a", 5 * CHUNK, 6 * CHUNK)]
    assert target.durable == target.present, "the stop committed it"
    record = record_of(index, target.key)
    assert record == FileRecord("filling", 0, 0, target.present.to_bytes())


async def test_demand_goes_ahead_of_a_background_fill(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(400 * CHUNK, 4)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    server.bytes_per_second = 8 << 20
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await until(lambda: target.present.count >= 10)
        wanted = ByteRange(len(data) - 1, len(data))
        before = target.present.count
        filler.demand(target, wanted)
        await target.wait_readable(wanted, 10)
        assert target.present.count - before <= 2 * QUICK.connections, "it waits for about one chunk, not for the file"
        filler.cancel_pipeline("p", FillCancelled("removed"))


async def test_filling_in_order_never_exceeds_the_connections(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    origin = FakeOrigin(server.url)
    targets = []
    for number in range(4):
        data = server.files[f"f{number}"] = content(8 * CHUNK, number)
        targets.append(make_target(store, origin, f"f{number}", len(data), digest=sha256(data), index=number))
    server.bytes_per_second = 16 << 20
    async with filling(store, index, msgspec.structs.replace(QUICK, workers=2)) as (filler, events):
        filler.fill("p", [targets[2], targets[0], targets[3], targets[1]])
        await wait_state(targets, FileState.SEALED)
    assert server.most_running <= QUICK.connections
    assert [path for kind, path, _ in events.events if kind == "sealed"] == ["f2", "f0", "f3", "f1"]


async def test_corrupted_bytes_are_never_sealed_and_fetched_again(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = server.files["a"] = content(6 * CHUNK, 5)
    corrupted: list[int] = []

    def corrupt_once(handler: Handler, path: str, start: int, stop: int) -> bool:
        if start == 2 * CHUNK and not corrupted:
            corrupted.append(start)
            wrong = bytearray(data)
            wrong[start + 5] ^= 1
            handler.serve(path, bytes(wrong), start, stop)
            return True
        return False

    server.fault = corrupt_once
    origin = FakeOrigin(server.url)
    target = make_target(store, origin, "a", len(data), digest=sha256(data))
    fresh: list[FillTarget] = []
    async with filling(store, index) as (filler, events):

        def again(poisoned: FillTarget) -> None:
            assert store.existing_blob("p", 1, "a") is None
            record = record_of(index, poisoned.key)
            assert record == FileRecord("absent", 1, 0, b"")
            fresh.append(make_target(store, origin, "a", len(data), digest=sha256(data), incarnation=1))
            filler.fill("p", fresh)

        events.on_poisoned = again
        filler.fill("p", [target])
        await until(lambda: bool(fresh))
        assert target.state is FileState.POISONED
        with pytest.raises(DigestMismatch):
            await target.wait_readable(ByteRange(0, 1), 10)
        await wait_state(fresh, FileState.SEALED)
    assert stored(fresh[0]) == data
    assert record_of(index, target.key) == FileRecord("sealed", 1, 0, b"", allocated=blocks(fresh[0]))


async def test_three_mismatches_in_a_row_end_in_quarantine(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(CHUNK, 6)
    origin = FakeOrigin(server.url)
    current = make_target(store, origin, "a", len(data), digest=sha256(b"something else"))
    async with filling(store, index) as (filler, events):

        def again(poisoned: FillTarget) -> None:
            nonlocal current
            current = make_target(
                store, origin, "a", len(data), digest=poisoned.entry.file.digest, incarnation=poisoned.incarnation + 1
            )
            filler.fill("p", [current])

        events.on_poisoned = again
        filler.fill("p", [current])
        await until(lambda: bool(events.of("failed")))
        assert isinstance(current.error, DigestMismatch) and current.incarnation == 3
        assert len(server.log) == 3, "no endless refetching"
        filler.reset_failures("p")
        current = make_target(store, origin, "a", len(data), digest=sha256(data), incarnation=3)
        filler.fill("p", [current])
        await wait_state([current], FileState.SEALED)


async def test_throttling_holds_the_origin_as_long_as_it_says(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = server.files["a"] = content(4 * CHUNK, 7)
    refused: list[int] = []

    def throttle(handler: Handler, path: str, start: int, stop: int) -> bool:
        if len(refused) < 2:
            refused.append(start)
            handler.answer(429, Retry_After="1")
            return True
        return False

    server.fault = throttle
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index, msgspec.structs.replace(QUICK, connections=1, demand_headroom=0)) as (filler, _):
        begun = trio.current_time()
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
        assert trio.current_time() - begun >= 2.0
    assert len(server.log) == 6


@pytest.mark.parametrize("fault", ["short", "range", "length", "500", "503", "reset", "encoding"])
async def test_passing_faults_are_retried_and_nothing_wrong_is_kept(
    server: ByteServer, store: BlobStore, index: Index, fault: str
) -> None:
    data = server.files["a"] = content(6 * CHUNK, 8)
    faults: set[int] = set()

    def once(handler: Handler, path: str, start: int, stop: int) -> bool:
        if start in faults or start == CHUNK:
            return False
        faults.add(start)
        match fault:
            case "short":
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                handler.send_header("Content-Length", str(stop - start))
                handler.end_headers()
                handler.wfile.write(b"x" * (stop - start - 7))
                handler.close_connection = True
            case "range":
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {start + 1}-{stop}/{len(data)}")
                handler.send_header("Content-Length", str(stop - start))
                handler.end_headers()
                handler.wfile.write(b"x" * (stop - start))
            case "length":
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                handler.send_header("Content-Length", str(stop - start + 1))
                handler.end_headers()
                handler.wfile.write(b"x" * (stop - start + 1))
            case "encoding":  # on the way
                handler.send_response(200)
                handler.send_header("Content-Length", str(stop - start))
                handler.send_header("Content-Encoding", "gzip")
                handler.end_headers()
                handler.wfile.write(b"x" * (stop - start))
            case "reset":
                handler.connection.close()
                handler.close_connection = True
            case status:
                handler.answer(int(status))
        return True

    server.fault = once
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
        assert filler.statistics().poisoned == 0
    assert stored(target) == data
    failures = [error for error in events.of("failure") if error is not None]
    assert failures and all("secret" not in str(error) for error in failures)


async def test_the_replaced_object_ends_the_fill(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(8 * CHUNK, 9)
    server.etags["a"] = '"one"'
    target = make_target(store, FakeOrigin(server.url, etag=True), "a", len(data), version='"one"')

    def replaced(handler: Handler, path: str, start: int, stop: int) -> bool:
        if start >= 4 * CHUNK:
            server.etags["a"] = '"two"'
        return False

    server.fault = replaced
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        with pytest.raises(OriginChanged):
            await target.wait_readable(ByteRange(7 * CHUNK, 8 * CHUNK), 10)
        assert not filler.is_filling("p")


@pytest.mark.parametrize(("status", "error"), [(403, AccessRefused), (404, OriginNotFound), (412, OriginChanged)])
async def test_what_is_refused_twice_fails_for_good(
    server: ByteServer, store: BlobStore, index: Index, status: int, error: type[Exception]
) -> None:
    def refuse(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.answer(status)
        return True

    server.fault = refuse
    origin = FakeOrigin(server.url)
    origin.on_locate = lambda file: Location(f"{server.url}/a?signature=secret", service="hub", named=LOOPBACK)
    target = make_target(store, origin, "a", 3 * CHUNK)
    async with filling(store, index) as (filler, events):
        filler.demand(target, ByteRange(0, 1))
        with pytest.raises(error) as caught:
            await target.wait_readable(ByteRange(0, 1), 10)
        assert "secret" not in str(caught.value)
        assert len(events.of("failed")) == 1
    assert len(origin.located) == (1 if status == 412 else 2)


@pytest.mark.parametrize("through", [False, True])
async def test_what_somebody_on_the_way_refuses_is_asked_for_anew_until_the_deadline(
    server: ByteServer, store: BlobStore, index: Index, through: bool
) -> None:
    data = server.files["a"] = content(3 * CHUNK, 34)
    refused: list[int] = []
    patience = 6

    def refuse(handler: Handler, path: str, start: int, stop: int) -> bool:
        refused.append(start)
        if len(refused) <= patience:
            handler.answer(403)
        return len(refused) <= patience

    server.fault = refuse
    origin = FakeOrigin(server.url)
    target = make_target(store, origin, "a", len(data), digest=sha256(data))

    async def read(filler: Filler, seconds: float) -> None:
        if through:
            await filler.read_through(target.key, target.entry, origin, 0, memoryview(bytearray(10)))
        else:
            filler.demand(target, ByteRange(0, 10))
            await target.wait_readable(ByteRange(0, 10), seconds)

    async with filling(store, index, msgspec.structs.replace(QUICK, read_deadline=3.0)) as (filler, events):
        await read(filler, 3.0)
        assert len(origin.located) == patience + 1, "with a fresh signature each time"
        patience = 10**9
        target = make_target(store, origin, "a", len(data), digest=sha256(data), index=1)
        with pytest.raises(ReadDeadline, match="answers 403"):
            await read(filler, 3.0)
        assert not events.of("failed") and len(refused) < 60, "at a pace, and never called a refusal"


async def test_an_expired_address_is_located_again(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(20 * CHUNK, 10)
    origin = FakeOrigin(server.url)
    expired: set[str] = set()

    def check(handler: Handler, path: str, start: int, stop: int) -> bool:
        if start == 9 * CHUNK and "s=1" in handler.path:
            expired.add("s=1")
        if any(mark in handler.path for mark in expired):
            handler.answer(403)
            return True
        return False

    origin.on_locate = lambda file: Location(f"{server.url}/a?s={len(origin.located)}", named=LOOPBACK)
    server.fault = check
    target = make_target(store, origin, "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert len(origin.located) == 2, "once per signature, shared by all chunks"


async def test_a_killed_worker_costs_its_chunks_only(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(60 * CHUNK, 11)
    server.bytes_per_second = 8 << 20
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        for arrived in (10, 30, 50):
            await until(lambda enough=arrived: target.present.count >= enough and bool(filler.worker_pids()))
            os.kill(filler.worker_pids()[0], signal.SIGKILL)
        await wait_state([target], FileState.SEALED)
        assert filler.statistics().worker_deaths == 3
    assert stored(target) == data
    assert len(server.log) <= 60 + 3 * (QUICK.connections + QUICK.demand_headroom)


async def test_durable_chunks_are_not_fetched_again(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(8 * CHUNK, 12)
    origin = FakeOrigin(server.url)
    target = make_target(store, origin, "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        for chunk in (1, 2, 6):
            filler.demand(target, target.present.byte_range(chunk))
            await target.wait_readable(target.present.byte_range(chunk), 10)
        await until(lambda: target.durable.count >= 3)
    record = record_of(index, target.key)
    assert record is not None
    server.log.clear()
    again = make_target(store, origin, "a", len(data), digest=sha256(data), bitmap=record.bitmap)
    async with filling(store, index) as (filler, _):
        filler.fill("p", [again])
        await wait_state([again], FileState.SEALED)
    assert sorted(start // CHUNK for _, start, _ in server.log) == [0, 3, 4, 5, 7]
    assert stored(again) == data


async def test_a_complete_bitmap_is_only_hashed(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = content(5 * CHUNK, 13)
    with store.blob("p", 1, "a", len(data)) as blob:
        blob.pwrite(0, data)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data), bitmap=b"\x1f")
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert server.log == []


async def test_a_blob_that_is_gone_counts_as_absent(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(5 * CHUNK, 14)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data), bitmap=b"\x0f")
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data


async def test_a_dead_origin_opens_its_breaker_and_starves_nobody(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = server.files["b"] = content(40 * CHUNK, 15)
    with black_hole() as url:
        dead = FakeOrigin(url)
        stuck = [make_target(store, dead, f"d{number}", CHUNK, pipeline="dead", index=number) for number in range(64)]
        well = make_target(store, FakeOrigin(server.url), "b", len(data), digest=sha256(data), pipeline="well")
        async with filling(store, index) as (filler, _):
            outcomes: list[type[BaseException]] = []

            async def read(target: FillTarget) -> None:
                try:
                    await target.wait_readable(ByteRange(0, 1), 30)
                except OriginBroken as error:
                    outcomes.append(type(error))

            async with trio.open_nursery() as readers:
                for target in stuck:
                    filler.demand(target, ByteRange(0, 1))
                    readers.start_soon(read, target)
                await trio.sleep(0.2)
                begun = trio.current_time()
                filler.demand(well, ByteRange(0, 1))
                await well.wait_readable(ByteRange(0, 1), 5)
                assert trio.current_time() - begun < 1.0, "another pipeline's cold fault"
                filler.fill("well", [well])
                await wait_state([well], FileState.SEALED)
            assert len(outcomes) == 64
            assert isinstance(filler.breaker_open(dead.key), OriginBroken)
            assert filler.breaker_open(well.origin.key) is None
            late = make_target(store, dead, "late", CHUNK, pipeline="dead", index=99)
            begun = trio.current_time()
            filler.demand(late, ByteRange(0, 1))
            with pytest.raises(OriginBroken):
                await late.wait_readable(ByteRange(0, 1), 30)
            assert trio.current_time() - begun < 1.0
            assert not late.failed, "a later read tries again"
            filler.cancel_pipeline("dead", FillCancelled("removed"))
            await filler.wait_quiet("dead")


async def test_one_pipelines_failures_open_no_other_pipelines_breaker(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    """Of one origin with one set of credentials; and one file's failures open no other file's."""

    def fail(handler: Handler, path: str, start: int, stop: int) -> bool:
        if path.startswith("sick"):
            handler.answer(500)
        return path.startswith("sick")

    server.fault = fail
    origin = FakeOrigin(server.url)
    for name in ("sick0", "sick1", "well"):
        server.files[name] = content(2 * CHUNK, 16)
    sick = [make_target(store, origin, f"sick{number}", 2 * CHUNK, pipeline="p", index=number) for number in (0, 1)]
    beside = make_target(store, origin, "well", 2 * CHUNK, pipeline="p", index=2)
    other = make_target(store, origin, "well", 2 * CHUNK, pipeline="q")
    async with filling(store, index) as (filler, _):

        async def broken(target: FillTarget) -> None:
            filler.demand(target, ByteRange(0, 1))
            with pytest.raises(OriginBroken):
                await target.wait_readable(ByteRange(0, 1), 30)

        await broken(sick[0])
        assert isinstance(filler.breaker_open(origin.key, sick[0].key), OriginBroken)
        filler.demand(beside, ByteRange(0, 1))
        await beside.wait_readable(ByteRange(0, 1), 5)
        assert filler.breaker_open(origin.key, beside.key) is None
        async with trio.open_nursery() as nursery:
            for target in sick:
                nursery.start_soon(broken, target)
        await until(lambda: filler.breaker_open(origin.key, sick[1].key) is not None)
        begun = trio.current_time()
        filler.demand(other, ByteRange(0, 2 * CHUNK))
        await other.wait_readable(ByteRange(0, 2 * CHUNK), 5)
        assert trio.current_time() - begun < 2
        assert filler.breaker_open(origin.key, other.key) is None


async def test_a_read_succeeds_after_the_breaker_closes(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(2 * CHUNK, 16)
    down = True

    def fail(handler: Handler, path: str, start: int, stop: int) -> bool:
        if down:
            handler.answer(500)
        return down

    server.fault = fail
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.demand(target, ByteRange(0, 1))
        with pytest.raises(OriginBroken):
            await target.wait_readable(ByteRange(0, 1), 30)
        down = False
        await until(lambda: filler.breaker_open(target.origin.key) is None)
        filler.demand(target, ByteRange(0, 1))
        await target.wait_readable(ByteRange(0, 1), 5)
        assert target.error is None


async def test_a_stuck_locate_ends_in_an_error_and_blocks_nobody(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    release = threading.Event()
    stuck_origin = FakeOrigin("http://stuck.invalid")

    def stick(file: ManifestFile) -> Location | None:
        release.wait(30)
        return None

    stuck_origin.on_locate = stick
    data = server.files["b"] = content(CHUNK, 17)
    stuck = make_target(store, stuck_origin, "a", CHUNK, pipeline="stuck")
    well = make_target(store, FakeOrigin(server.url), "b", len(data), digest=sha256(data), pipeline="well")
    try:
        async with filling(store, index, msgspec.structs.replace(QUICK, locate_timeout=0.3)) as (filler, _):
            filler.demand(stuck, ByteRange(0, 1))
            filler.fill("well", [well])
            await wait_state([well], FileState.SEALED)
            with pytest.raises(ReadDeadline, match="no answer within"):
                await stuck.wait_readable(ByteRange(0, 1), 1.0)
    finally:
        release.set()


async def test_cancelling_stops_the_writing(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(100 * CHUNK, 18)
    server.bytes_per_second = 4 << 20
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await until(lambda: target.present.count >= 5)
        filler.cancel_pipeline("p", FillCancelled("p was removed"))
        with pytest.raises(FillCancelled):
            await target.wait_readable(ByteRange(99 * CHUNK, 100 * CHUNK), 5)
        await filler.wait_quiet("p")
        assert target.blob is not None
        before = target.blob.pread(0, len(data))
        await trio.sleep(0.2)
        assert target.blob.pread(0, len(data)) == before
        assert not filler.is_filling("p") and filler.statistics().in_flight == 0
        filler.demand(target, ByteRange(0, 1))
        assert filler.statistics().files == 0, "cancelled for good"


async def test_cancelled_while_it_is_located(server: ByteServer, store: BlobStore, index: Index) -> None:
    """Its address comes when nobody wants it any more; nor does anybody wait for that."""
    data = server.files["b"] = content(CHUNK, 17)
    release = threading.Event()
    origin = FakeOrigin(server.url)

    def stick(file: ManifestFile) -> Location | None:
        if file.path == "a":
            release.wait(30)
        return None

    origin.on_locate = stick
    late = make_target(store, origin, "a", CHUNK)
    other = make_target(store, origin, "b", len(data), digest=sha256(data), index=1)
    settings = msgspec.structs.replace(QUICK, serve_unsealed="never", locate_timeout=20.0)
    try:
        async with filling(store, index, settings) as (filler, _):
            filler.demand(late, ByteRange(0, 1))
            await until(lambda: "a" in origin.located)
            filler.cancel_target(late, FillCancelled("evicted"))
            with trio.fail_after(2):
                await filler.wait_quiet("p")
            release.set()
            filler.fill("p", [other])
            await wait_state([other], FileState.SEALED)
    finally:
        release.set()


async def test_quiet_waits_for_what_is_cancelled_and_kills_nobody_else(
    server: ByteServer, store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other files of the pipeline may be opened and closed without a pause meanwhile."""
    monkeypatch.setattr(delivery, "QUIET_SECONDS", 0.2)
    origin = FakeOrigin(server.url)

    def slow(file: ManifestFile) -> Location | None:
        time.sleep(0.02)
        return None

    origin.on_locate = slow
    targets = []
    for number in range(100):
        data = server.files[f"f{number}"] = content(100, number)
        targets.append(make_target(store, origin, f"f{number}", len(data), digest=sha256(data), index=number))
    async with filling(store, index) as (filler, _):
        filler.fill("p", targets)
        await until(lambda: bool(origin.located))
        cancelled = targets.pop()
        filler.cancel_target(cancelled, FillCancelled("a newer generation"))
        await filler.wait_quiet("p")
        assert any(target.state is not FileState.SEALED for target in targets), "it waited for the whole fill"
        await wait_state(targets, FileState.SEALED)
        assert filler.statistics().worker_deaths == 0


async def test_one_more_file_is_filled_beside_the_others(server: ByteServer, store: BlobStore, index: Index) -> None:
    targets = []
    for number in range(3):
        data = server.files[f"f{number}"] = content(4 * CHUNK, number)
        targets.append(
            make_target(store, FakeOrigin(server.url), f"f{number}", len(data), digest=sha256(data), index=number)
        )
    async with filling(store, index) as (filler, _):
        filler.fill("p", targets[:2])
        filler.fill_also(targets[2])
        assert filler.in_background(targets[2])
        await wait_state(targets, FileState.SEALED)
        assert not filler.is_filling("p")


@pytest.mark.parametrize(("setting", "trusted"), [("never", True), ("auto", False)])
async def test_unsealed_bytes_are_held_back(
    server: ByteServer, store: BlobStore, index: Index, setting: str, trusted: bool
) -> None:
    data = server.files["a"] = content(8 * CHUNK, 19)
    origin = FakeOrigin(server.url)
    origin.trusted = trusted
    target = make_target(store, origin, "a", len(data), digest=sha256(data))
    settings = msgspec.structs.replace(QUICK, serve_unsealed=setting)
    async with filling(store, index, settings) as (filler, _):
        filler.demand(target, ByteRange(0, 1))
        await target.wait_readable(ByteRange(0, 1), 10)
        assert target.state is FileState.SEALED, "served only once it was proven"
    assert stored(target) == data


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    with loop_ext4(tmp_path, 24 << 20) as mountpoint:
        yield mountpoint


async def test_a_reader_that_waits_for_the_seal_outlives_the_order(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = server.files["a"] = content(6 * CHUNK, 31)
    server.gate.clear()
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    other = make_target(store, FakeOrigin(server.url), "b", CHUNK, index=1)
    server.files["b"] = content(CHUNK, 32)
    async with filling(store, index, msgspec.structs.replace(QUICK, serve_unsealed="never")) as (filler, _):
        filler.fill("p", [target])
        async with trio.open_nursery() as nursery:
            filler.demand(target, ByteRange(0, 1))
            nursery.start_soon(target.wait_readable, ByteRange(0, 1), 10)
            await until(lambda: len(server.log) >= QUICK.connections)
            filler.fill("p", [other])
            server.gate.set()
        assert target.state is FileState.SEALED


async def test_what_its_readers_have_left_is_not_fetched_for_nobody(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    def refuse(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.answer(500)
        return True

    server.fault = refuse
    server.files["a"] = content(4 * CHUNK, 33)
    target = make_target(store, FakeOrigin(server.url), "a", 4 * CHUNK)
    async with filling(store, index) as (filler, _):
        filler.demand(target, ByteRange(0, 4 * CHUNK))
        with pytest.raises(ReadDeadline):
            await target.wait_readable(ByteRange(0, 4 * CHUNK), 0.3)
        await until(lambda: filler.statistics().in_flight == 0 and filler.statistics().queued == 0)
        asked = len(server.log)
        await trio.sleep(0.5)
        assert len(server.log) == asked


async def test_a_read_through_that_is_stuck_ends_with_its_deadline_once(store: BlobStore, index: Index) -> None:
    with black_hole() as url:
        origin = FakeOrigin(url)
        target = make_target(store, origin, "a", 4 * CHUNK)
        async with filling(store, index, msgspec.structs.replace(QUICK, read_deadline=0.5, stall_timeout=20)) as (
            filler,
            _,
        ):
            begun = trio.current_time()
            for _ in range(2):  # the kernel asks again
                with pytest.raises(ReadDeadline):
                    await filler.read_through(target.key, target.entry, origin, 0, memoryview(bytearray(10)), begun)
            assert trio.current_time() - begun < 0.9


async def test_a_full_store_fails_that_pipeline_or_waits_for_space(
    server: ByteServer, tmp_path: Path, small_filesystem: Path
) -> None:
    data = server.files["a"] = content(40 << 20, 20)
    small = server.files["b"] = content(4 << 20, 21)
    with (
        BlobStore.open(str(small_filesystem / "store")) as store,
        Index.open(str(tmp_path / "index"), map_size=16 << 20) as index,
    ):
        origin = FakeOrigin(server.url)
        target = make_target(store, origin, "a", len(data), digest=sha256(data), chunk_size=1 << 20)
        asked: list[str] = []

        async def free_space(pipeline: str) -> bool:
            if pipeline == "p":
                return False
            asked.append(pipeline)
            filler.cancel_pipeline("p", FillCancelled("evicted"))
            await filler.wait_quiet("p")
            assert target.blob is not None
            target.blob.close()
            await trio.to_thread.run_sync(store.delete_blob, "p", 1, "a")
            return True

        async with filling(store, index, free_space=free_space) as (filler, _):
            filler.fill("p", [target])
            with pytest.raises(StoreFull):
                await target.wait_readable(ByteRange(39 << 20, 40 << 20), 20)
            other = make_target(store, origin, "b", len(small), digest=sha256(small), pipeline="q", chunk_size=1 << 20)
            filler.fill("q", [other])
            await wait_state([other], FileState.SEALED)
            assert asked == ["q"]
        assert other.blob is not None
        other.blob.close()


async def test_a_full_index_loses_nothing(
    server: ByteServer, store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "RETRY_SECONDS", 0.1)
    real = index.write
    full = True

    async def write(op: Callable[[WriteTxn], object], **how: Any) -> object:
        if full:
            raise IndexFull("the index is full")
        return await real(op, **how)

    monkeypatch.setattr(index, "write", write)
    data = server.files["a"] = content(8 * CHUNK, 22)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.demand(target, ByteRange(0, 1))
        await target.wait_readable(ByteRange(0, 1), 10)
        filler.fill("p", [target])
        await until(lambda: filler.statistics().index_stuck)
        assert any(isinstance(error, IndexFull) for error in events.of("failure"))
        assert target.durable.count == 0
        full = False
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data


async def test_a_failed_fdatasync_is_never_called_durable(
    server: ByteServer, store: BlobStore, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = server.files["a"] = content(8 * CHUNK, 23)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    failures: list[int] = []
    real = BlobFile.datasync

    def datasync(blob: BlobFile) -> None:
        if not failures:
            failures.append(1)
            raise StoreDamaged("sync a: input/output error")
        real(blob)

    monkeypatch.setattr(BlobFile, "datasync", datasync)
    async with filling(store, index) as (filler, _):
        filler.demand(target, ByteRange(0, 2 * CHUNK))
        await target.wait_readable(ByteRange(0, 2 * CHUNK), 10)
        await until(lambda: target.present.count == 0)
        assert target.durable.count == 0
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert len(server.log) == 10, "two chunks were fetched again"
    assert stored(target) == data


async def test_a_tier_is_asked_first_and_the_origin_when_it_fails(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = server.files["a"] = content(8 * CHUNK, 24)
    with byte_server() as tier_server:
        tier_server.files["a"] = data
        tier_server.fault = lambda handler, path, start, stop: start >= 4 * CHUNK and (handler.answer(500) or True)
        tier = FakeOrigin(tier_server.url)
        target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
        events = Recorder()
        filler = Filler(store, index, QUICK, events, tiers=[lambda target: tier])
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(filler.run)
                filler.fill("p", [target])
                await wait_state([target], FileState.SEALED)
                nursery.cancel_scope.cancel()
        assert tier_server.log and server.log
    assert stored(target) == data


def sends_zeros(handler: Handler, start: int, stop: int, size: int) -> bool:
    """Answer the range with zeros, and say that the file has ``size`` bytes."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
    handler.send_header("Content-Length", str(stop - start))
    handler.end_headers()
    handler.wfile.write(bytes(stop - start))
    return True


def lies_about_length(handler: Handler, path: str, start: int, stop: int) -> bool:
    return sends_zeros(handler, start, stop, stop - start + 7)


def has_other_bytes(handler: Handler, path: str, start: int, stop: int) -> bool:
    return sends_zeros(handler, start, stop, len(handler.server.files[path]))


def hangs(handler: Handler, path: str, start: int, stop: int) -> bool:
    handler.server.gate.wait(20)
    return True


@pytest.mark.parametrize("fault", [lies_about_length, has_other_bytes, hangs])
async def test_a_tier_that_lies_or_hangs_is_passed_over_and_no_wrong_byte_is_sealed(
    server: ByteServer, store: BlobStore, index: Index, fault: Callable[[Handler, str, int, int], bool]
) -> None:
    data = server.files["a"] = content(8 * CHUNK, 51)
    with byte_server() as tier_server:
        tier_server.files["a"] = data
        tier_server.fault = fault
        tier_server.gate.clear()
        tier = FakeOrigin(tier_server.url)
        origin = FakeOrigin(server.url)
        target = make_target(store, origin, "a", len(data), digest=sha256(data))
        events = Recorder()
        filler = Filler(store, index, QUICK, events, tiers=[lambda target: tier])
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(filler.run)
                filler.fill("p", [target])
                if fault is has_other_bytes:
                    await until(lambda: bool(events.of("poisoned")))
                    assert not server.log, "nobody had a reason to doubt the tier"
                    target = make_target(store, origin, "a", len(data), digest=sha256(data), incarnation=1)
                    filler.fill("p", [target])
                await wait_state([target], FileState.SEALED)
                nursery.cancel_scope.cancel()
        assert tier_server.log and server.log
        tier_server.gate.set()
    assert stored(target) == data
    assert events.of("sealed") == [FileState.SEALED]


async def test_workers_end_with_the_filler(server: ByteServer, store: BlobStore, index: Index) -> None:
    with black_hole() as url:
        target = make_target(store, FakeOrigin(url), "a", CHUNK)
        async with filling(store, index, msgspec.structs.replace(QUICK, workers=2, stall_timeout=60)) as (filler, _):
            filler.demand(target, ByteRange(0, 1))
            await until(lambda: filler.statistics().in_flight == 1 and len(filler.worker_pids()) == 2)
            pids = filler.worker_pids()
            begun = trio.current_time()
        assert trio.current_time() - begun < 2.0, "also with a thread stuck in recv"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_cancelled_file_is_not_made_afterwards(server: ByteServer, store: BlobStore, index: Index) -> None:
    data = server.files["a"] = content(3 * CHUNK, 25)
    async with filling(store, index) as (filler, _):
        for number in range(20):
            target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data), index=number)
            filler.fill("p", [target])
            for _ in range(number % 5):
                await trio.lowlevel.checkpoint()
            filler.cancel_pipeline("p", FillCancelled("removed"))
            await filler.wait_quiet("p")
            await trio.to_thread.run_sync(store.delete_generation, "p", 1)
            await trio.sleep(0.01)
            assert store.existing_blob("p", 1, "a") is None
            if target.blob is not None:
                target.blob.close()
