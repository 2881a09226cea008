"""Bytes that change under their seal on the disk: who finds them, what is served from then on, what is fetched. And the
scrub itself: it rests, gives way, goes on where it was. A real library with a hub that has digests; see
tests/unit/test_scrub_plan.py for what is decided."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.scrub import Activity, IdleDetector
from instantstart_fs.core.status import ScrubStatus
from instantstart_fs.errors import DigestMismatch, InstantStartError, NoSuchEntry, StoreError
from instantstart_fs.library import Library
from instantstart_fs.upkeep import scrub
from instantstart_fs.upkeep.scrub import Scrubber
from tests.component.hub_library import hub_library
from tests.component.test_full_store import Clock
from tests.component.test_library import MIB, find, make_source, read_all, wait_state
from tests.component.test_update import bodies
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(90)

SHARD, OTHER = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
DAY = 86400.0


class World:
    def __init__(self, root: Path, hub: HubServer) -> None:
        self.root, self.hub, self.clock = root, hub, Clock()
        self.source = make_source(root / "source")
        hub.publish("org/scrub", self.source)

    @asynccontextmanager
    async def running(
        self, *, period: float = 30 * DAY, rate: int = 1 << 30, passthrough: bool = False
    ) -> AsyncIterator[Library]:
        def prepare(library: Library) -> None:
            library.mounted.use_passthrough(passthrough)
            scrubber(library)._quiet = IdleDetector(0.0)

        settings = {"scrub": period, "scrub_rate": rate}
        clock = {"now_ns": self.clock.now_ns, "boot": self.clock.boot}
        async with hub_library(self.root, self.hub, store=settings, prepare=prepare, **clock) as library:
            yield library

    async def warm(self, library: Library, pipeline: str = "p") -> None:
        await library.admin.add(PipelineSpec(id=pipeline, models=(ModelSpec(source="hf://org/scrub"),)))
        await library.warming.warm(pipeline)
        await wait_state(library, pipeline, "warm")
        self.hub.forget_requests()

    def blob(self, name: str, pipeline: str = "p") -> Path:
        return self.root / "store/slots" / pipeline / "1/files" / name

    def want(self, name: str) -> bytes:
        return (self.source / name).read_bytes()

    def once(self, name: str) -> dict[str, int]:
        """What ``bodies`` says when that weight file was sent once: the CDN knows it by its digest."""
        data = self.want(name)
        return {hashlib.sha256(data).hexdigest(): len(data)}


@pytest.fixture
def world(tmp_path: Path, hub: HubServer) -> World:
    return World(tmp_path, hub)


def scrubber(library: Library) -> Scrubber:
    assert library.scrubber is not None
    return library.scrubber


def rot(path: Path) -> None:
    """One bit, in place: inode, length, times, attributes and so the seal stay as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2 * MIB + 77)
        byte = file.read(1)
        file.seek(2 * MIB + 77)
        file.write(bytes([byte[0] ^ 4]))
        os.fsync(file.fileno())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def swap(path: Path) -> None:
    """Another file of the same length, with the old one's times and attributes, the seal among them."""
    other = path.with_name("swapped-in")
    other.write_bytes(os.urandom(path.stat().st_size))
    shutil.copystat(path, other)
    assert os.listxattr(other) == os.listxattr(path) != []
    os.rename(other, path)


def replace_without_seal(path: Path) -> None:
    """What somebody copies there who knows nothing of seals."""
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(os.urandom(size))


@pytest.mark.parametrize("passthrough", [False, True], ids=["daemon", "passthrough"])
@pytest.mark.parametrize("held", [False, True], ids=["closed", "held open"])
@pytest.mark.parametrize("damage", [rot, swap])
async def test_what_changed_under_its_seal_is_found_by_the_scrub_and_fetched_again(
    world: World, damage: Callable[[Path], None], held: bool, passthrough: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing but reading tells. From the moment that it is found nobody is given those bytes again."""
    async with world.running(passthrough=passthrough) as library:
        await world.warm(library)
        before = find(library, "p", SHARD)
        handle = await library.mounted.open(before) if held else None
        damage(world.blob(SHARD))
        world.clock.passes(31 * DAY)
        with caplog.at_level(logging.INFO):
            await scrubber(library).run_once()
        assert library.telemetry.totals.damaged == {"scrub": 1}
        dropped = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert any(
            SHARD in record.getMessage() and "not those that were sealed" in record.message for record in dropped
        )
        assert all(getattr(record, "pipeline", "") == "p" for record in dropped)
        # A new incarnation: the name leads to another nodeid, the old one opens nothing and reads nothing.
        assert find(library, "p", SHARD) != before
        if handle is None:
            with pytest.raises(NoSuchEntry):
                await library.mounted.open(before)
        else:
            with pytest.raises(DigestMismatch):
                await library.mounted.read_into(handle, 0, memoryview(bytearray(10)))
            library.mounted.release(handle)
        await wait_state(library, "p", "warm")
        assert await read_all(library, "p", SHARD) == world.want(SHARD)
        assert world.blob(SHARD).read_bytes() == world.want(SHARD)
        assert library.pipelines.status("p").error is None
        assert bodies(world.hub) == world.once(SHARD), "the bad file is fetched again, whole, and no other"
        world.clock.passes(31 * DAY)
        await scrubber(library).run_once()
        assert library.telemetry.totals.damaged == {"scrub": 1}


@pytest.mark.parametrize("passthrough", [False, True], ids=["daemon", "passthrough"])
@pytest.mark.parametrize("opened_before", [False, True], ids=["never opened", "idle descriptor"])
async def test_a_file_in_the_place_of_a_sealed_one_is_found_when_it_is_opened(
    world: World, opened_before: bool, passthrough: bool
) -> None:
    """Also where the daemon still has the descriptor of the file that was there."""
    async with world.running(passthrough=passthrough) as library:
        await world.warm(library)
        if opened_before:
            assert await read_all(library, "p", SHARD) == world.want(SHARD)
        replace_without_seal(world.blob(SHARD))
        found = b""
        for _ in range(3):
            try:
                found = await read_all(library, "p", SHARD)
                break
            except InstantStartError:
                continue  # the kernel looks the name up again
        assert found == world.want(SHARD)
        damaged = library.telemetry.totals.damaged
        # Without passthrough a descriptor that is kept reads the bytes that were sealed; the next open of the store's
        # file (after a restart, or by the scrub) finds the other ones.
        if passthrough or not opened_before:
            assert damaged.total() == 1 and damaged.keys() <= {"open", "read"}
            await wait_state(library, "p", "warm")
            assert bodies(world.hub) == world.once(SHARD)
        world.clock.passes(31 * DAY)
        await scrubber(library).run_once()
        assert damaged.total() == 1
        await wait_state(library, "p", "warm")
        assert world.blob(SHARD).read_bytes() == world.want(SHARD)


async def test_a_bad_file_that_cannot_be_fetched_is_not_served(world: World) -> None:
    """The origin is down when it is found: no bytes are better than wrong ones; it heals when the origin is back."""
    async with world.running() as library:
        await world.warm(library)
        rot(world.blob(SHARD))
        world.hub.kill()
        try:
            world.clock.passes(31 * DAY)
            await scrubber(library).run_once()
            assert library.pipelines.status("p").state != "warm"
            assert not world.blob(SHARD).exists() or world.blob(SHARD).stat().st_blocks == 0
        finally:
            world.hub.restart()
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        assert await read_all(library, "p", SHARD) == world.want(SHARD)


async def test_it_is_no_request_and_leaves_last_access_alone(world: World) -> None:
    async with world.running() as library:
        await world.warm(library)
        node = find(library, "p", SHARD)
        before = library.mounted.attributes(node), library.pipelines.status("p").last_request
        assert library.pipelines.status("p").scrub == ScrubStatus(proven=None, state="waiting")
        world.clock.passes(31 * DAY)
        began = world.clock.now_ns() // 10**9
        await scrubber(library).run_once()
        assert (library.mounted.attributes(node), library.pipelines.status("p").last_request) == before
        scrub = library.pipelines.status("p").scrub
        assert scrub is not None and scrub.proven is not None and scrub.state == "waiting"
        files = [file for file in library.pipelines.status("p").files or () if file.state == "sealed"]
        assert library.telemetry.totals.scrubbed_bytes == sum(file.size for file in files)
        store_summary = await library.snapshots.store_summary()
        assert store_summary.scrub is not None and store_summary.scrub.overdue == 0
        assert began <= (library.catalog.pipelines["p"].scrubbed.proven_at_ns + 10**9) // 10**9


async def test_nothing_is_read_before_it_is_due(world: World) -> None:
    async with world.running() as library:
        await world.warm(library)
        world.clock.passes(29 * DAY)
        assert await scrubber(library).run_once() == scrub.LOOK_SECONDS
        assert library.telemetry.totals.scrubbed_bytes == 0
        world.clock.passes(3 * DAY)
        assert scrubber(library).overdue() == pytest.approx(2 * DAY, abs=60)
        await scrubber(library).run_once()
        assert library.telemetry.totals.scrubbed_bytes > 8 * MIB


async def test_the_rate_is_kept(world: World) -> None:
    async with world.running(rate=16 * MIB) as library:
        await world.warm(library)
        world.clock.passes(31 * DAY)
        began = trio.current_time()
        await scrubber(library).run_once()
        assert trio.current_time() - began >= library.telemetry.totals.scrubbed_bytes / (16 * MIB) > 0.4


async def test_it_rests_while_there_is_demand_and_gives_way_to_an_eviction(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a file. What is evicted meanwhile is let go of: its space would stay taken."""
    async with world.running() as library, trio.open_nursery() as nursery:
        await world.warm(library)
        demand = False
        monkeypatch.setattr(scrubber(library), "_activity", lambda: Activity(0, demand))
        monkeypatch.setattr(scrub, "REST_SECONDS", 0.01)
        world.clock.passes(31 * DAY)
        scrubbed = library.telemetry.scrubbed

        def read(count: int) -> None:
            nonlocal demand
            scrubbed(count)
            demand = demand or count == 4 * MIB  # within the larger shard

        monkeypatch.setattr(library.telemetry, "scrubbed", read)
        scrubber(library)._quiet = IdleDetector(0.05)
        returned = trio.Event()

        async def look() -> None:
            assert await scrubber(library).run_once() == 0.0
            returned.set()

        nursery.start_soon(look)
        with trio.fail_after(10):
            while not scrubber(library).resting:
                await trio.sleep(0.005)
        so_far = library.telemetry.totals.scrubbed_bytes
        status = library.pipelines.status("p").scrub
        assert status is not None and status.state == "resting"
        await trio.sleep(0.2)
        assert library.telemetry.totals.scrubbed_bytes == so_far and not returned.is_set()
        await library.admin.evict("p")
        with trio.fail_after(10):
            await returned.wait()
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
        assert not [path for path in held if path.startswith(f"{world.root}/store/slots/")], "evicted and still open"
        demand = False
        assert await scrubber(library).run_once() == scrub.LOOK_SECONDS, "nothing of it is left to read"
        assert library.telemetry.totals.damaged == {}


def _is_link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


async def test_when_demand_ends_it_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.running() as library, trio.open_nursery() as nursery:
        await world.warm(library)
        demand = True
        monkeypatch.setattr(scrubber(library), "_activity", lambda: Activity(0, demand))
        monkeypatch.setattr(scrub, "REST_SECONDS", 0.01)
        scrubber(library)._quiet = IdleDetector(0.02)
        world.clock.passes(31 * DAY)
        nursery.start_soon(scrubber(library).run_once)
        with trio.fail_after(10):
            while not scrubber(library).resting:
                await trio.sleep(0.005)
            store_summary = await library.snapshots.store_summary()
            assert store_summary.scrub is not None and store_summary.scrub.resting
            demand = False
            while library.catalog.pipelines["p"].scrubbed.under_way:
                await trio.sleep(0.005)
        assert library.telemetry.totals.scrubbed_bytes > 8 * MIB


async def test_a_restart_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "SAVE_SECONDS", 0.0)
    async with world.running() as library:
        await world.warm(library)
        world.clock.passes(31 * DAY)
        file = Scrubber._file
        read: list[str] = []

        async def until_the_second_shard(self: Scrubber, found: object, pace: object) -> bool:
            read.append(found.entry.path)  # type: ignore[attr-defined]
            if read[-1] == OTHER:
                raise StoreError("the daemon ends here")
            return await file(self, found, pace)  # type: ignore[arg-type]

        monkeypatch.setattr(Scrubber, "_file", until_the_second_shard)
        assert await scrubber(library).run_once() == scrub.RETRY_SECONDS
        assert SHARD in read
        monkeypatch.setattr(Scrubber, "_file", file)
    async with world.running() as library:
        total = sum(found.size for found in library.pipelines.status("p").files or () if found.state == "sealed")
        with trio.fail_after(20):  # the daemon's own loop looks at once
            while library.catalog.pipelines["p"].scrubbed.under_way:
                await trio.sleep(0.01)
        assert 0 < library.telemetry.totals.scrubbed_bytes <= total - len(world.want(SHARD))
        proven = library.catalog.pipelines["p"].scrubbed.proven_at_ns
        assert proven > 0
    async with world.running() as library:
        assert library.catalog.pipelines["p"].scrubbed.proven_at_ns == proven


async def test_the_daemons_own_loop_heals_by_itself(world: World) -> None:
    async with world.running(period=0.2) as library:
        await world.warm(library)
        await world.warm(library, "q")
        swap(world.blob(OTHER, "q"))
        scrubber(library)._quiet = IdleDetector(0.0)
    async with world.running(period=0.2) as library:
        with trio.fail_after(30):
            while not library.telemetry.totals.damaged:
                await trio.sleep(0.01)
        await wait_state(library, "q", "warm")
        assert await read_all(library, "q", OTHER) == world.want(OTHER)
