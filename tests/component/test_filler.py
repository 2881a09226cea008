"""The filler with real workers, a real store and index, and a server with faults on order."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import Digest
from instantstart_fs.core.retry import Backoff
from instantstart_fs.errors import (
    AccessRefused,
    DigestMismatch,
    FillCancelled,
    OriginBroken,
    OriginChanged,
    OriginNotFound,
    ReadDeadline,
)
from instantstart_fs.filler.scheduler import Filler, FillSettings
from instantstart_fs.filler.target import FileKey, FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.origins.base import Location
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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    with BlobStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def index(store: BlobStore) -> Iterator[Index]:
    with Index.open(store.root + "/index", map_size=16 << 20) as opened:
        yield opened


@asynccontextmanager
async def filling(
    store: BlobStore, index: Index, settings: FillSettings = QUICK
) -> AsyncIterator[tuple[Filler, Recorder]]:
    events = Recorder()
    filler = Filler(store, index, settings, events)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(filler.run)
            yield filler, events
            nursery.cancel_scope.cancel()


async def wait_state(targets: Sequence[FillTarget], state: FileState, seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        for target in targets:
            while target.state is not state:
                assert not target.failed, target.error
                await trio.sleep(0.01)


def record_of(index: Index, key: FileKey) -> FileRecord | None:
    return index.read(lambda txn: txn.get_file(key.pipeline, key.generation, key.index))


def stored(target: FillTarget) -> bytes:
    assert target.blob is not None
    return target.blob.pread(0, target.entry.file.size)


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
    assert record_of(index, target.key) == FileRecord("sealed", 0, 0, b"")
    assert sorted(server.log) == sorted(set(server.log)), "no chunk was asked for twice"
    assert len(server.log) == 11
    assert events.of("sealed") == [FileState.SEALED]
    assert sorted(events.of("present")) == list(range(11))
