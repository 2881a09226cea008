"""The cache policy against a reference: generated histories over the real planner, evictor, library, index and store.

Only two things are not the product's: the wall clock, which the histories move, and the fetch processes, whose orders
are carried out in this one (a spawn for each of thousands of restarts would take the time). After every operation:

- nobody but the operator evicted a pipeline that was pinned, leased, open or requested within ``keep_hot``, nor
  anything while this daemon had seen the clock jump within ``keep_hot``;
- usage did not pass the high watermark by anything that was admitted, nor stays above it while somebody may go;
- reads returned the source's bytes, kept or served through;
- an update keeps what has not changed: such bytes are not fetched again;
- after each restart, clean or not, the accounts equal what the disk says, and every record has its bytes.

`pytest tests/model/test_cache_model.py -m soak` runs 100,000 operations.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import HealthCheck, given, settings

from instantstart_fs.catalog import residency
from instantstart_fs.catalog.model import UnloadedGeneration
from instantstart_fs.config import Capacity, Config, EvictionConfig, FillConfig, MountConfig, StoreConfig
from instantstart_fs.core import eviction
from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import FillCancelled, PipelineBusy, StoreError, StoreFull
from instantstart_fs.filler import committer, delivery
from instantstart_fs.filler.messages import Arrived, Closed, CloseFile, Fetch, OpenFile, SetLocation
from instantstart_fs.index.environment import Index
from instantstart_fs.library import Library
from instantstart_fs.origins.base import Location
from instantstart_fs.serving import admission
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.upkeep import eviction as upkeep_eviction
from tests.component.test_library import find

KIB = 1024
PIPELINES = 6
KEEP_HOT = 3600.0
CHUNK = 16 * KIB
FIRST = "model-1-of-2.safetensors"


class InlineWorker:
    """Carries out the orders for one fetch process at once, in the order in which they come."""

    pid = 0

    def __init__(self, pool: InlinePool) -> None:
        self._pool = pool
        self.files: set[int] = set()
        self.in_flight = 0
        self._open: dict[int, tuple[int, ChunkMap]] = {}
        self._at: dict[int, Location] = {}

    def send(self, order: Any, fd: int | None = None) -> None:
        match order:
            case OpenFile():
                assert fd is not None
                self._open[order.file] = (os.dup(fd), ChunkMap(order.size, order.chunk_size))
            case SetLocation():
                self._at[order.file] = order.location
            case Fetch() if order.file in self._open:
                target, chunks = self._open[order.file]
                wanted = chunks.byte_range(order.chunk)
                with open(unquote(urlsplit(self._at[order.file].url).path), "rb") as source:
                    os.pwrite(target, os.pread(source.fileno(), wanted.length, wanted.start), wanted.start)
                self._pool.tell(self, Arrived(order.request))
            case CloseFile() if order.file in self._open:
                os.close(self._open.pop(order.file)[0])
                self._pool.tell(self, Closed(order.file))

    def close(self) -> None:
        # Orders may still come while the daemon ends.
        while self._open:
            os.close(self._open.popitem()[1][0])


class InlinePool:
    """Stands for filler/pool.WorkerPool."""

    def __init__(self, store: BlobStore, count: int, settings: Any, on_report: Any, on_death: Any) -> None:
        self.deaths = 0
        self._on_report = on_report
        self._on_death = on_death
        self._reports: list[tuple[InlineWorker, Any]] = []
        self._news = trio.Event()
        self.workers = [InlineWorker(self)]

    def tell(self, worker: InlineWorker, report: Any) -> None:
        self._reports.append((worker, report))
        self._news.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        try:
            while True:
                await self._news.wait()
                self._news = trio.Event()
                reports, self._reports = self._reports, []
                for worker, report in reports:
                    self._on_report(worker, report)
        finally:
            self.workers[0].close()
            self._on_death(self.workers[0])

    async def wait_worker(self) -> InlineWorker:
        return self.workers[0]

    def pause_background_until(self, moment: float) -> None: ...


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "WorkerPool", InlinePool)
    monkeypatch.setattr(committer, "SEAL_SECONDS", 0.0)
    monkeypatch.setattr(upkeep_eviction, "INTERVAL", 0.01)
    monkeypatch.setattr(residency, "MOST_FILES", 0)
    monkeypatch.setattr(residency, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(admission, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(admission, "FREE_BYTES_SECONDS", 0.0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model for each pipeline, no two alike, of 40 to 120 KiB."""
    root, generator = tmp_path_factory.mktemp("sources"), random.Random(4)
    for number in range(PIPELINES):
        directory = root / str(number)
        directory.mkdir()
        (directory / FIRST).write_bytes(generator.randbytes((24 + 8 * number) * KIB + 17 * number))
        (directory / "model-2-of-2.safetensors").write_bytes(generator.randbytes(16 * KIB + number))
        (directory / "pytorch_model.bin").write_bytes(generator.randbytes(20 * KIB))
        (directory / "config.json").write_bytes(b'{"n": %d}' % number)
    return root


class World:
    """The system and what the reference knows of it. Operations are its methods whose names begin with ``do_``."""

    def __init__(self, root: Path, sources: Path) -> None:
        self.root, self.sources = root, root / "sources"
        shutil.copytree(sources, self.sources)
        self.ahead = self.boot_ahead = 0.0
        self.capacity = 400 * KIB
        self.free = 1 << 40
        self.requested: dict[int, float] = {}
        self.pinned: set[int] = set()
        self.handles: dict[int, list[Any]] = {}
        self.leases: dict[int, list[contextlib.ExitStack]] = {}
        self.rests_until = -1.0
        self.by_hand: str | None = None
        self.library: Library
        self.unloads = 0
        self.evictions = self.through = self.done = self.updates = 0

    # -- clocks ------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.time() + self.ahead

    def boot(self) -> float:
        return time.monotonic() + self.boot_ahead

    # -- the system's life ---------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        config = Config(
            mount=MountConfig(path=str(self.root / "mnt")),
            store=StoreConfig(path=str(self.root / "store"), capacity=Capacity(bytes=1 << 40)),
            fill=FillConfig(workers=1, connections=4, chunk_size=CHUNK, read_deadline=10.0),
            eviction=EvictionConfig(keep_hot=KEEP_HOT),
        )
        with BlobStore.open(config.store.path) as store, Index.open(str(self.root / "index")) as index:
            library = Library(config, store, index, now_ns=lambda: int(self.now() * 1e9), boot=self.boot)
            library.inventory.budget = self.budget  # type: ignore[method-assign]  # disks that shrink
            switch = library.catalog.switch_generation

            def watched(new: Any, *kept: Any) -> Any:
                # An eviction takes effect here: without an await since it was last asked whether it may.
                pipeline = new.pipeline
                current = pipeline.current
                if current is not None and current.manifest is new.manifest and self.by_hand != pipeline.id:
                    self.may_go(int(pipeline.id))
                    self.evictions += 1
                return switch(new, *kept)

            library.catalog.switch_generation = watched  # type: ignore[method-assign]
            async with library.running():
                self.library = library
                yield

    def budget(self) -> eviction.Budget:
        return eviction.Budget(self.capacity, 0.7, 0.9, floor=0, free=self.free)

    def may_go(self, number: int) -> None:
        """What the reference says about an eviction that nobody asked for."""
        assert number not in self.pinned, "a pinned pipeline was evicted"
        assert not self.handles.get(number), "an open pipeline was evicted"
        assert not self.leases.get(number), "a leased pipeline was evicted"
        last = min(self.requested.get(number, -1e18), self.now())
        assert self.now() - last >= KEEP_HOT - 0.5, "a hot pipeline was evicted"
        assert self.boot() >= self.rests_until - 0.5, "something was evicted although the clock had just been set"

    async def wait_quiet(self) -> None:
        """Until nothing is being fetched or sealed."""
        with trio.fail_after(20):
            while any(self.library.filler.is_filling(name) for name in self.library.catalog.pipelines):
                await trio.sleep(0.0005)
            while self.library.filler.statistics().in_flight:
                await trio.sleep(0.0005)
            # Superseded generations that nobody holds are on their way out.
            while any(not old.handles for found in self.library.catalog.pipelines.values() for old in found.draining):
                await trio.sleep(0.0005)

    def usage(self) -> int:
        return sum(candidate.bytes for candidate in self.library.inventory.candidates())

    def on_disk(self, name: str, generation: int | str = "*") -> int:
        files = (self.root / "store" / "slots" / name).glob(f"{generation}/files/**/*")
        return sum(path.lstat().st_blocks * 512 for path in files if not path.is_dir())

    def check_after_restart(self) -> None:
        assert os.listdir(self.root / "store" / "trash") == []
        for name, pipeline in self.library.catalog.pipelines.items():
            assert pipeline.allocated == self.on_disk(name), f"{name}: the accounts are wrong"
            assert pipeline.current is not None  # reads what its summary stood for
            assert pipeline.allocated == self.on_disk(name), f"{name}: the summary is wrong"
            for file in pipeline.current.files:
                if file.cached_bytes:
                    generation = str(pipeline.current.number)
                    path = self.root / "store" / "slots" / name / generation / "files" / file.entry.path
                    assert path.stat().st_size == file.size, "a record without bytes"

    # -- operations ----------------------------------------------------------------------------------------------------

    def known(self, number: int) -> bool:
        return str(number) in self.library.catalog.pipelines

    async def do_add(self, number: int, amount: int) -> None:
        if self.known(number):
            return
        model = ModelSpec(source=f"file://{self.sources / str(number)}")
        quota = 60 * KIB if amount % 5 == 0 else None
        await self.library.admin.add(PipelineSpec(id=str(number), models=(model,), quota=quota))

    async def do_remove(self, number: int, amount: int) -> None:
        if self.known(number) and not self.leases.get(number) and amount % 4 == 0:
            self.close_all(number)
            await self.library.admin.remove(str(number))
            self.pinned.discard(number)
            self.requested.pop(number, None)

    def node(self, number: int, name: str = FIRST) -> int:
        return find(self.library, str(number), name)

    async def do_open(self, number: int, amount: int) -> None:
        if self.known(number):
            self.handles.setdefault(number, []).append(await self.library.mounted.open(self.node(number)))
            self.requested[number] = self.now()

    async def do_close(self, number: int, amount: int) -> None:
        if self.handles.get(number):
            self.library.mounted.release(self.handles[number].pop())

    def close_all(self, number: int) -> None:
        for handle in self.handles.pop(number, []):
            self.library.mounted.release(handle)

    async def do_read(self, number: int, amount: int) -> None:
        if not self.known(number):
            return
        name = (FIRST, "model-2-of-2.safetensors", "pytorch_model.bin", "config.json")[amount % 4]
        want = (self.sources / str(number) / name).read_bytes()
        handle = await self.library.mounted.open(self.node(number, name))
        self.handles.setdefault(number, []).append(handle)
        if name != "config.json":
            self.requested[number] = self.now()
        served = self.library.filler._uncached.bytes
        got = bytearray(len(want))
        step = 4 * KIB * (1 + amount % 7)
        for offset in range(0, len(want), step):
            count = await self.library.mounted.read_into(handle, offset, memoryview(got)[offset : offset + step])
            assert count == min(step, len(want) - offset)
        assert got == want, "wrong bytes"
        self.through += self.library.filler._uncached.bytes > served
        self.handles[number].remove(handle)
        self.library.mounted.release(handle)

    async def do_touch(self, number: int, amount: int) -> None:
        if self.known(number):
            self.library.admin.touch(str(number))
            self.requested[number] = self.now()

    async def do_lease(self, number: int, amount: int) -> None:
        if self.known(number):
            held = contextlib.ExitStack()
            held.enter_context(self.library.leases.lease(str(number)))
            self.leases.setdefault(number, []).append(held)
            self.requested[number] = self.now()

    async def do_unlease(self, number: int, amount: int) -> None:
        if self.leases.get(number):
            self.leases[number].pop().close()
            self.requested[number] = self.now()

    async def do_pin(self, number: int, amount: int) -> None:
        if self.known(number):
            pinned = amount % 3 == 0
            await self.library.lifecycle.set_pinned(str(number), pinned)
            (self.pinned.add if pinned else self.pinned.discard)(number)

    async def do_warm(self, number: int, amount: int) -> None:
        if self.known(number):
            with contextlib.suppress(StoreFull, FillCancelled):
                await self.library.warming.warm(str(number), everything=amount % 2 == 0)

    async def do_evict(self, number: int, amount: int) -> None:
        if not self.known(number):
            return
        self.by_hand = str(number)
        held = number in self.pinned or self.leases.get(number) or self.handles.get(number)
        try:
            await self.library.admin.evict(str(number))
            assert not held
            current = self.library.catalog.pipelines[str(number)].current
            assert current is not None
            assert self.on_disk(str(number), current.number) == 0, "an eviction that freed nothing"
        except PipelineBusy:
            assert held
        finally:
            self.by_hand = None

    def change(self, number: int, amount: int) -> str:
        """Another configuration, or now and then another shard; its name. Always longer: a new identity for certain."""
        name = FIRST if amount % 5 == 0 else "config.json"
        path = self.sources / str(number) / name
        path.write_bytes(random.Random(self.done).randbytes(path.stat().st_size + 1))
        return name

    async def do_update(self, number: int, amount: int) -> None:
        if not self.known(number):
            return
        # A source that changes under a fill ends it, which is not what is asked here.
        await self.wait_quiet()
        pipeline = self.library.catalog.pipelines[str(number)]
        assert pipeline.current is not None
        complete = {file.entry.path for file in pipeline.current.files if file.complete}
        changed = self.change(number, amount)
        fetched, evictions = self.library.filler.statistics().fetched_bytes, self.evictions
        await self.library.admin.update(str(number))
        if self.evictions == evictions:  # else it, or one whose room others wait for, may have gone meanwhile
            now = {file.entry.path for file in pipeline.current.files if file.complete}
            # (What was fetched for a reader may have been sealed in between.)
            assert now >= complete - {changed}, f"{complete} became {now} when {changed} changed"
            assert changed not in now
            assert self.library.filler.statistics().fetched_bytes == fetched
        self.updates += 1

    async def do_time(self, number: int, amount: int) -> None:
        seconds = (1.0, 60.0, 1000.0, KEEP_HOT + 1)[amount % 4]
        self.ahead += seconds
        self.boot_ahead += seconds

    async def do_jump(self, number: int, amount: int) -> None:
        if amount % 4:
            return
        self.library.evictor.suspended()  # it looks every minute: it has seen the clock before
        self.ahead += 10000.0 if amount % 8 else -10000.0
        self.rests_until = self.boot() + KEEP_HOT
        self.requested = {number: min(at, self.now()) for number, at in self.requested.items()}
        self.library.evictor.suspended()
        # What was seen a moment before kill -9 may be lost; and two jumps may cancel each other out.
        with trio.fail_after(20):
            while self.library.evictor._saved is None:
                await trio.sleep(0.0005)

    async def do_shrink(self, number: int, amount: int) -> None:
        self.capacity = (150 + 50 * (amount % 6)) * KIB

    async def do_disk(self, number: int, amount: int) -> None:
        self.free = 20 * KIB if amount % 3 == 0 else 1 << 40

    async def do_unload(self, number: int, amount: int) -> None:
        """Let go of whatever may be let go of: nobody may notice."""
        for _ in range(2):
            await self.library.residency.run_once()
        self.unloads += sum(isinstance(one.head, UnloadedGeneration) for one in self.library.catalog.pipelines.values())

    async def do_look(self, number: int, amount: int) -> None:
        await self.wait_quiet()
        await self.library.evictor.run_once()
        # What an earlier daemon saw of the clock may have it rest for longer than this reference remembers.
        rests = self.boot() < self.rests_until + 0.5 or self.library.evictor.suspended()
        if not rests and self.usage() > 0.9 * self.capacity:
            left = [candidate for candidate in self.library.inventory.candidates() if candidate.evictable]
            assert not left, f"too full: {self.usage()} of {self.capacity}, and {left} may go"

    # -- histories -----------------------------------------------------------------------------------------------------

    async def play(self, operations: list[tuple[str, int, int]]) -> None:
        position = 0
        while position < len(operations):
            async with self.running():
                self.check_after_restart()
                while position < len(operations):
                    name, number, amount = operations[position]
                    position += 1
                    self.done += 1
                    if name == "restart":
                        await self.wait_quiet()
                        break
                    if name == "crash":
                        await self.crash(number, amount)
                        break
                    before = sum(candidate.frees for candidate in self.library.inventory.candidates())
                    await getattr(self, f"do_{name}")(number, amount)
                    if amount % 3:
                        await self.wait_quiet()
                    # The blocks of a seal's attributes and extents come on top of what was admitted: a few per file.
                    assert self.usage() <= max(before, 0.9 * self.capacity) + 64 * KIB, "more came in than was admitted"
                for number in list(self.handles):
                    self.close_all(number)
                for held in self.leases.values():
                    for lease in held:
                        lease.close()
                self.leases.clear()

    async def crash(self, number: int, amount: int) -> None:
        """What kill -9 leaves: nothing more is committed or flushed; an eviction ends between index and files."""
        library = self.library
        if amount % 2:
            await library.access.flush()
        if self.known(number) and amount % 3 == 0:

            def die(pipeline: str, generation: int) -> None:
                raise StoreError("killed")

            library.store.empty_generation = die  # type: ignore[method-assign]
            self.by_hand = str(number)
            with contextlib.suppress(StoreError, PipelineBusy):
                await library.admin.evict(str(number))
            self.by_hand = None
        if self.known(number) and amount % 3 == 1:

            async def stay(generation: Any) -> None: ...

            await self.wait_quiet()
            library.lifecycle.drop_generation = stay  # type: ignore[method-assign]
            self.change(number, amount)
            await library.admin.update(str(number))
        on_disk = library.index.read(lambda txn: txn.last_requests())

        async def nothing() -> None: ...

        library.filler._completion.committer.commit = nothing  # type: ignore[method-assign]
        library.access.flush = nothing  # type: ignore[method-assign]
        library.evictor._save_clock = nothing  # type: ignore[method-assign]
        # The last few seconds of requests are lost, and no more: what was flushed is what counts from now on.
        for key in list(self.requested):
            stored = on_disk.get(str(key))
            assert stored is not None or not amount % 2, "a flushed request was lost"
            if stored is None:
                del self.requested[key]
            else:
                self.requested[key] = min(stored / 1e9, self.requested[key])


NAMES = [
    *(["read"] * 6 + ["open"] * 3 + ["close"] * 4 + ["add"] * 4 + ["time"] * 5 + ["warm"] * 4 + ["look"] * 2),
    *("touch", "lease", "unlease", "unlease", "pin", "pin", "evict", "remove", "jump", "shrink", "disk", "update"),
    *("restart", "crash", "unload", "unload"),
]
operations = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, PIPELINES - 1), st.integers(0, 23)), min_size=20, max_size=150
)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """In memory where that can be had: thousands of fsyncs are not what is tested here."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="instantstart-model-", dir=where))
    try:
        yield root
    finally:
        shutil.rmtree(root)


def play(sources: Path, history: list[tuple[str, int, int]]) -> World:
    start = [("add", number, 1) for number in range(4)]
    with scratch() as root:
        world = World(root, sources)
        trio.run(world.play, start + history)
    return world


@given(history=operations)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_generated_histories_break_no_rule(sources: Path, history: list[tuple[str, int, int]]) -> None:
    play(sources, history)


def long_history(seed: int, count: int) -> list[tuple[str, int, int]]:
    generator = random.Random(seed)
    return [(generator.choice(NAMES), generator.randrange(PIPELINES), generator.randrange(24)) for _ in range(count)]


def test_a_long_history_evicts_and_serves_through(sources: Path) -> None:
    """One that is known to come to what is to be tested: a history in which nothing is evicted shows nothing."""
    world = play(sources, long_history(7, 1500))
    assert world.evictions > 10
    assert world.unloads > 50
    assert world.through > 10
    assert world.updates > 10


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_100000_operations_break_no_rule(sources: Path) -> None:
    done = evictions = through = 0
    seed = int(os.environ.get("INSTANTSTART_TEST_SEED", str(time.time_ns())))
    while done < 100_000:
        print(f"seed {seed}")
        world = play(sources, long_history(seed, 2000))
        done, evictions, through, seed = (
            done + world.done,
            evictions + world.evictions,
            through + world.through,
            seed + 1,
        )
    print(f"{done} operations, {evictions} evictions, {through} reads served through")
