"""When there is no room: admission, serving through, quotas, recovery, and what a crash leaves. A real library; see
test_library.py for its helpers."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from instantstart_fs.catalog.model import Generation
from instantstart_fs.config import Capacity, Config, EvictionConfig, FillConfig, MountConfig, StoreConfig
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.manifest import Digest, FileEntry, ManifestFile
from instantstart_fs.errors import DigestMismatch, OriginChanged, StoreFull
from instantstart_fs.filler.breakers import Breakers
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.sources import Locator
from instantstart_fs.filler.tally import Tally
from instantstart_fs.filler.target import FileKey
from instantstart_fs.filler.uncached import BLOCK, CACHE_BLOCKS, UncachedReader
from instantstart_fs.index.environment import Index
from instantstart_fs.library import Library
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.directory import identity_of
from instantstart_fs.store.blobstore import BlobStore
from tests.component.test_library import find, make_source, read_all, spec, wait_gone, wait_state

MIB = 1024 * 1024
WEIGHTS = "model-1-of-2.safetensors"
pytestmark = pytest.mark.timeout(60)


class Clock:
    """A wall clock that tests set, beside one that only goes on."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.boot_ahead = 0.0

    def now_ns(self) -> int:
        return time.time_ns() + int(self.ahead * 1e9)

    def boot(self) -> float:
        return time.monotonic() + self.boot_ahead

    def passes(self, seconds: float) -> None:
        self.ahead += seconds
        self.boot_ahead += seconds


@asynccontextmanager
async def running(
    root: Path,
    *,
    capacity: int = 1 << 40,
    keep_hot: float = 0.0,
    max_idle: float | None = None,
    min_free: int = 0,
    clock: Clock | None = None,
    serve_unsealed: Any = "auto",
    low: float = 0.85,
) -> AsyncIterator[Library]:
    clock = clock or Clock()
    config = Config(
        mount=MountConfig(path=str(root / "mnt")),
        store=StoreConfig(
            path=str(root / "store"),
            capacity=Capacity(bytes=capacity),
            low_watermark=low,
            min_free=Capacity(bytes=min_free),
        ),
        fill=FillConfig(workers=1, connections=4, chunk_size=MIB, read_deadline=10.0, serve_unsealed=serve_unsealed),
        eviction=EvictionConfig(keep_hot=keep_hot, max_idle=max_idle),
    )
    with BlobStore.open(config.store.path) as store, Index.open(str(root / "store" / "index")) as index:
        library = Library(config, store, index, now_ns=clock.now_ns, boot=clock.boot)
        async with library.running():
            yield library


def blocks(root: Path, pipeline: str) -> int:
    """Bytes of disk that the pipeline's files take, by asking the filesystem."""
    files = (root / "store" / "slots" / pipeline).glob("*/files/**/*")
    return sum(path.lstat().st_blocks * 512 for path in files if not path.is_dir())


def blocks_of(size: int, block: int = 4096) -> int:
    return -(-size // block) * block


def find_index(generation: Generation, path: str) -> int:
    return next(file.entry.index for file in generation.files if file.entry.path == path)


async def fills(library: Library, pipeline: str) -> None:
    await library.warming.warm(pipeline)
    await wait_state(library, pipeline, "unverified")


async def test_what_has_no_space_is_served_through_and_recovers_when_space_appears(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    data = (source / WEIGHTS).read_bytes()
    async with running(tmp_path, capacity=9 * MIB) as library:
        for pipeline in ("a", "b"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "a")
        await library.lifecycle.set_pinned("a", True)
        assert await read_all(library, "b", WEIGHTS) == data
        status = library.pipelines.status("b")
        assert status.uncached == "store full: needs 8.5 MB; evictable 0 B; pinned: a"
        assert (status.state, status.error) == ("cold", None)
        assert blocks(tmp_path, "b") == 0
        assert library.mounted.xattrs(find(library, "b"))["user.instantstart.uncached"].startswith(b"store full")
        handle = await library.mounted.open(find(library, "b", WEIGHTS))
        assert not handle.keep_cache  # what was never proven does not stay in the page cache
        library.mounted.release(handle)
        assert library.pipelines.status("a").state == "unverified"

        await library.lifecycle.set_pinned("a", False)
        with trio.fail_after(20):
            while library.pipelines.status("b").state != "unverified":
                assert await read_all(library, "b", WEIGHTS) == data
                await trio.sleep(0.05)
        assert library.pipelines.status("b").uncached is None
        assert library.pipelines.status("a").state == "cold"


async def test_a_refused_admission_evicts_nobody(tmp_path: Path) -> None:
    small, large = make_source(tmp_path / "small"), make_source(tmp_path / "large")
    (large / "model-3-of-3.safetensors").write_bytes(os.urandom(14 * MIB))
    async with running(tmp_path, capacity=20 * MIB) as library:
        await library.admin.add(spec("small", small))
        await library.admin.add(spec("large", large))
        await fills(library, "small")
        with pytest.raises(StoreFull, match=r"needs 23\.[12] MB; evictable 8.4 MB of a budget of 19\.9 MB"):
            await library.warming.warm("large")
        assert library.pipelines.status("small").state == "unverified"


async def test_beyond_its_quota_a_pipeline_is_served_through_and_evicts_nobody(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=10 * MIB) as library:
        await library.admin.add(spec("other", source))
        await library.admin.add(msgspec.structs.replace(spec("tenant", source), quota=6 * MIB))
        await fills(library, "other")
        assert await read_all(library, "tenant", WEIGHTS) == (source / WEIGHTS).read_bytes()
        assert library.pipelines.status("tenant").uncached == "quota: needs 8.5 MB, and its quota is 6.3 MB"
        assert library.pipelines.status("other").state == "unverified"
        assert await read_all(library, "tenant", "config.json") == (source / "config.json").read_bytes()
        assert blocks(tmp_path, "tenant") <= 6 * MIB


async def test_another_quota_holds_from_the_next_admission_on_and_after_a_restart(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    data = (source / WEIGHTS).read_bytes()
    async with running(tmp_path) as library:
        await library.admin.add(msgspec.structs.replace(spec("tenant", source), quota=6 * MIB))
        with pytest.raises(StoreFull, match="quota"):
            await library.warming.warm("tenant")
        await library.lifecycle.set_quota("tenant", None)
        assert library.pipelines.status("tenant").uncached is None
        await fills(library, "tenant")
        await library.lifecycle.set_quota("tenant", 6 * MIB)
        assert library.pipelines.status("tenant").state == "unverified"  # what is there stays
        assert await read_all(library, "tenant", WEIGHTS) == data
        await library.admin.evict("tenant")
        with pytest.raises(StoreFull, match=r"quota: needs 8.5 MB, and its quota is 6.3 MB"):
            await library.warming.warm("tenant")
    async with running(tmp_path) as library:
        with pytest.raises(StoreFull, match="quota"):
            await library.warming.warm("tenant")
        assert await read_all(library, "tenant", WEIGHTS) == data


async def test_what_single_reads_were_admitted_for_is_promised_until_it_comes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=9 * MIB) as library:
        await library.admin.add(spec("read", source))
        generation = library.catalog.pipeline("read").current
        assert generation is not None
        file = generation.files[find_index(generation, "pytorch_model.bin")]
        present, before = file.chunk_map(), library.evictor.free_bytes()
        assert await library.admissions.admit_chunks(file, present, range(present.chunks))
        assert generation.reserved_bytes == blocks_of(file.size)
        assert await library.admissions.admit_chunks(file, present, range(present.chunks)), (
            "the same once more costs nothing"
        )
        assert generation.reserved_bytes == blocks_of(file.size)
        assert library.evictor.free_bytes() == before - blocks_of(file.size), (
            "before the first byte of that read is there"
        )
        assert len(await read_all(library, "read", "pytorch_model.bin")) == file.size
        await wait_state(library, "read", "partial")
        assert generation.reserved_bytes == 0


async def test_bytes_that_are_being_deleted_are_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=12 * MIB) as library:
        for pipeline in ("old", "new"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "old")
        store, go, begun = library.store, threading.Event(), threading.Event()
        real = store.empty_generation

        def held(pipeline: str, generation: int) -> None:
            begun.set()
            assert go.wait(20)
            real(pipeline, generation)

        monkeypatch.setattr(store, "empty_generation", held)
        before = sum(candidate.bytes for candidate in library.inventory.candidates())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library.admin.evict, "old")
            await trio.to_thread.run_sync(begun.wait, 20)
            assert sum(candidate.bytes for candidate in library.inventory.candidates()) >= before > 8 * MIB
            with pytest.raises(StoreFull):
                await library.warming.warm("new")
            go.set()
        assert library.inventory.candidates() == []


async def test_remains_of_cold_pipelines_go_before_complete_ones(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=18 * MIB, low=0.95) as library:
        for pipeline in ("complete", "remains", "new"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "complete")
        assert await read_all(library, "remains", "pytorch_model.bin")
        await wait_state(library, "remains", "partial")
        with trio.fail_after(20):  # its file is sealed, and nobody has it open
            while not any(
                one.pipeline == "remains" and one.partial and not one.open for one in library.inventory.candidates()
            ):
                await trio.sleep(0.005)
        await fills(library, "new")
        assert library.pipelines.status("complete").state == "unverified"
        assert library.pipelines.status("remains").state == "cold"
        await wait_gone(tmp_path / "store/slots/remains/1/files")


async def test_free_space_is_left_to_other_users_of_the_disk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, min_free=1 << 60) as library:
        await library.admin.add(spec("p", source))
        with pytest.raises(StoreFull, match=r"free, and min_free keeps 1153 PB"):
            await library.warming.warm("p")
        assert await read_all(library, "p", WEIGHTS) == (source / WEIGHTS).read_bytes()
        assert blocks(tmp_path, "p") == 0


async def test_what_nobody_asks_for_in_max_idle_goes_without_pressure(tmp_path: Path) -> None:
    source, clock = make_source(tmp_path / "source"), Clock()
    async with running(tmp_path, keep_hot=600.0, max_idle=3000.0, clock=clock) as library:
        for pipeline in ("idle", "used"):
            await library.admin.add(spec(pipeline, source))
            library.admin.touch(pipeline)
            await fills(library, pipeline)
        clock.passes(2990.0)
        library.admin.touch("used")
        await library.evictor.run_once()
        assert library.pipelines.status("idle").state == "unverified"
        clock.passes(20.0)
        await library.evictor.run_once()
        assert library.pipelines.status("idle").state == "cold"
        assert library.pipelines.status("used").state == "unverified"


async def test_a_clock_that_was_set_and_set_back_is_remembered_over_a_restart(tmp_path: Path) -> None:
    source, clock = make_source(tmp_path / "source"), Clock()
    async with running(tmp_path, keep_hot=3600.0, clock=clock) as library:
        await library.admin.add(spec("a", source))
        with trio.fail_after(10):
            while library.evictor._saved is None:
                await trio.sleep(0.001)
        for jump in (7200.0, -7200.0):  # the clocks say the same as before
            clock.ahead += jump
            assert library.evictor.suspended()
    clock.passes(3500.0)
    async with running(tmp_path, keep_hot=3600.0, clock=clock) as library:
        assert library.evictor.suspended()
        clock.passes(200.0)
        assert not library.evictor.suspended()


@pytest.mark.parametrize("jump", [30 * 86400.0, -30 * 86400.0])
async def test_a_clock_that_is_set_suspends_eviction_for_keep_hot(tmp_path: Path, jump: float) -> None:
    source, clock = make_source(tmp_path / "source"), Clock()
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        for pipeline in ("a", "b"):
            await library.admin.add(spec(pipeline, source))
        library.admin.touch("a")
        await fills(library, "a")
        clock.ahead += jump
        with pytest.raises(StoreFull, match="hot: a"):
            await library.warming.warm("b")
        clock.passes(3500.0)
        await trio.sleep(1.1)  # a refusal is not asked again within a second
        with pytest.raises(StoreFull, match="hot: a"):
            await library.warming.warm("b")
        clock.passes(3700.0)
        await trio.sleep(1.1)
        await fills(library, "b")
        assert library.pipelines.status("a").state == "cold"


async def test_the_suspension_outlives_the_daemon(tmp_path: Path) -> None:
    source, clock = make_source(tmp_path / "source"), Clock()
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        for pipeline in ("a", "b"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "a")  # never requested, so not hot: only the clock keeps it
        clock.ahead += 7200.0
        await library.evictor.run_once()
        await library.evictor._save_clock()
    clock.passes(3500.0)
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        with pytest.raises(StoreFull, match="hot: a"):
            await library.warming.warm("b")
    clock.passes(200.0)
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        await fills(library, "b")
        assert library.pipelines.status("a").state == "cold"


@pytest.mark.parametrize("jump", [7200.0, -7200.0])
async def test_a_clock_that_is_set_while_no_daemon_runs_is_noticed(tmp_path: Path, jump: float) -> None:
    source, clock = make_source(tmp_path / "source"), Clock()
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        for pipeline in ("a", "b"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "a")
        await library.evictor._save_clock()
    clock.ahead += jump
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0, clock=clock) as library:
        with pytest.raises(StoreFull, match="hot: a"):
            await library.warming.warm("b")


async def test_a_fill_that_nobody_waits_for_gives_way(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=10 * MIB) as library:
        for pipeline in ("warming", "read"):
            await library.admin.add(spec(pipeline, source))
        await library.warming.warm("warming")
        with trio.fail_after(10):
            while not library.pipelines.status("warming").cached_bytes:
                await library.pipelines.wait_changed("warming", 1.0)
        held = await library.mounted.open(find(library, "read", WEIGHTS))
        await library.mounted.read_into(held, 4 * MIB, memoryview(bytearray(MIB)))
        await wait_state(library, "read", "unverified")
        assert library.pipelines.status("warming").state == "cold"
        library.mounted.release(held)


async def test_after_a_restart_the_accounts_are_what_the_disk_says(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for pipeline in ("whole", "part"):
            await library.admin.add(spec(pipeline, source))
        await fills(library, "whole")
        handle = await library.mounted.open(find(library, "part", "pytorch_model.bin"))
        await library.mounted.read_into(handle, 0, memoryview(bytearray(4096)))
        library.mounted.release(handle)
    # What a kill leaves: blocks that were never committed, and a file that no record speaks of.
    files = tmp_path / "store/slots/part/1/files"
    with open(files / "pytorch_model.bin", "r+b") as partial:
        os.pwrite(partial.fileno(), b"x" * MIB, MIB)
    (files / WEIGHTS).write_bytes(b"y" * MIB)
    async with running(tmp_path) as library:
        for pipeline in ("whole", "part"):
            assert library.catalog.pipeline(pipeline).allocated == blocks(tmp_path, pipeline) > 0
        assert not (files / WEIGHTS).exists()
        assert await read_all(library, "part", "pytorch_model.bin") == (source / "pytorch_model.bin").read_bytes()


# -- filler/uncached.py alone ------------------------------------------------------------------------------------------


class Source:
    key = OriginKey("file", "", "")

    def __init__(self, path: Path, *, trusted: bool = True) -> None:
        self.location = Location(url=path.as_uri(), trusted=trusted, identity=identity_of(os.stat(path)))
        self.located = 0

    def locate(self, file: ManifestFile) -> Location:
        self.located += 1
        return self.location


def entry_of(path: Path, *, wrong: bool = False) -> FileEntry:
    data = path.read_bytes()
    digest = Digest("sha256", hashlib.sha256(b"other" if wrong else data).hexdigest())
    return FileEntry(0, 0, path.name, ManifestFile(path.name, len(data), path.name, digest=digest))


def uncached(**settings: Any) -> UncachedReader:
    chosen = FillSettings(**settings)
    breakers = Breakers()
    return UncachedReader(Locator(5.0), chosen, breakers, OriginBackoff(FillPlan(4), {}, breakers, chosen), Tally())


async def read(served: UncachedReader, source: Source, entry: FileEntry, wanted: ByteRange) -> bytes:
    buffer = bytearray(wanted.length)
    await served.read(FileKey("p", 1, 0), entry, 1 << 20, source, wanted.start, memoryview(buffer))
    return bytes(buffer)


async def test_reads_across_blocks_share_fetches_and_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom((CACHE_BLOCKS + 2) * BLOCK + 4321))
    data, source, served = path.read_bytes(), Source(path), uncached()
    entry = entry_of(path)
    assert await read(served, source, entry, ByteRange(BLOCK - 10, BLOCK + 10)) == data[BLOCK - 10 : BLOCK + 10]
    results: list[bytes] = []

    async def reader() -> None:
        results.append(await read(served, source, entry, ByteRange(3 * BLOCK, 3 * BLOCK + 100)))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(reader)
    assert results == [data[3 * BLOCK : 3 * BLOCK + 100]] * 20
    assert await read(served, source, entry, ByteRange(0, len(data))) == data
    assert len(served._blocks) == CACHE_BLOCKS
    assert source.located == 1


@pytest.mark.parametrize(("setting", "trusted", "served"), [
    ("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)
])  # fmt: skip
async def test_unproven_bytes_are_served_through_as_the_rule_for_unsealed_ones_says(
    tmp_path: Path, setting: str, trusted: bool, served: bool
) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(os.urandom(BLOCK + 1))
    small.write_bytes(os.urandom(1000))
    instance = uncached(serve_unsealed=setting)
    if served:
        found = await read(instance, Source(large, trusted=trusted), entry_of(large), ByteRange(0, 10))
        assert found == large.read_bytes()[:10]
    else:
        with pytest.raises(StoreFull, match="serve_unsealed"):
            await read(instance, Source(large, trusted=trusted), entry_of(large), ByteRange(0, 10))
    # A file that fits into one block is proven by its digest, whatever the way.
    other = uncached(serve_unsealed=setting)
    proven = await read(other, Source(small, trusted=trusted), entry_of(small), ByteRange(0, 1000))
    assert proven == small.read_bytes()


async def test_a_small_file_with_wrong_bytes_is_never_served_through(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    with pytest.raises(DigestMismatch):
        await read(uncached(), Source(path), entry_of(path, wrong=True), ByteRange(0, 2))


async def test_a_replaced_object_is_not_served_through(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1000))
    entry = entry_of(path)
    path.write_bytes(os.urandom(999))
    with pytest.raises(OriginChanged):
        await read(uncached(), Source(path), entry, ByteRange(0, 10))


async def test_reads_that_are_not_kept_give_no_byte_of_an_earlier_pipeline_of_that_name(tmp_path: Path) -> None:
    """Its generations begin at 1 again, and a reader of the earlier one may still be at work."""
    sources: list[Source] = []
    for name in ("old", "new"):
        path = tmp_path / name / "weights"
        path.parent.mkdir()
        path.write_bytes(os.urandom(BLOCK + 10))
        sources.append(Source(path))
    old, new = ((tmp_path / name / "weights").read_bytes() for name in ("old", "new"))
    entry, whole, served = entry_of(tmp_path / "old/weights"), ByteRange(0, BLOCK + 10), uncached()
    assert await read(served, sources[0], entry, ByteRange(0, 10)) == old[:10]
    served.forget("p")
    assert await read(served, sources[0], entry, whole) == old
    assert await read(served, sources[1], entry_of(tmp_path / "new/weights"), whole) == new
    served.forget("p")
    assert not served._blocks and not served._locations
