"""Staging sessions on a fake clock, and the staging process on real files."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from bench.common import evict, resident_bytes
from instantstart_fs.config import Capacity, StagingConfig
from instantstart_fs.config.memory import Memory
from instantstart_fs.core.staging import Shard
from instantstart_fs.errors import StoreDamaged
from instantstart_fs.filler.target import FileKey
from instantstart_fs.mount import readahead
from instantstart_fs.mount.staging import Staging, Statistics
from instantstart_fs.mount.staging_process import StagingProcess
from tests.harness import alive, children

MIB = 1 << 20
pytestmark = pytest.mark.timeout(60)


class FakeHost:
    """Four shards of 100 bytes. ``broken``: indices that cannot be opened."""

    def __init__(self) -> None:
        self.all = [Shard(index, f"m-{index}-of-4.safetensors", 100, True) for index in (1, 2, 3, 4)]
        self.broken: set[int] = set()
        self.told: list[tuple[str, int, bool]] = []

    def ready(self, index: int, ready: bool) -> None:
        self.all = [
            msgspec.structs.replace(shard, ready=ready) if shard.index == index else shard for shard in self.all
        ]

    def shards(self, pipeline: str, generation: int) -> tuple[Shard, ...]:
        return tuple(self.all)

    async def load_order(self, pipeline: str, generation: int) -> tuple[int, ...]:
        return tuple(shard.index for shard in self.all)

    def staged(self, pipeline: str, count: int, *, file_done: bool) -> None:
        self.told.append((pipeline, count, file_done))

    def open_stored(self, key: FileKey) -> int:
        if key.index in self.broken:
            raise StoreDamaged("missing from the store")
        fd = os.open("/dev/null", os.O_RDONLY)
        self.index_of_fd = {**getattr(self, "index_of_fd", {}), fd: key.index}
        return fd


class FakeReader:
    def __init__(self, report: Callable[[int, int, int], None]) -> None:
        self.report = report
        self.queued: dict[int, tuple[int, int]] = {}
        self.log: list[tuple[str, int]] = []
        self.catalogs: FakeHost

    def stage(self, job: int, fd: int, length: int) -> None:
        index = self.catalogs.index_of_fd[fd]
        os.close(fd)
        assert index not in [other for other, _ in self.queued.values()], "staged twice at once"
        self.queued[job] = (index, length)
        self.log.append(("stage", index))

    def drop(self, job: int) -> None:
        index, _ = self.queued.pop(job)
        self.log.append(("drop", index))
        self.report(readahead.DONE, job, 0)

    def finish(self) -> None:
        for job, (_, length) in list(self.queued.items()):
            del self.queued[job]
            self.report(readahead.STAGED, job, length)
            self.report(readahead.DONE, job, 0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def staged(self) -> list[int]:
        return [index for what, index in self.log if what == "stage"]


class World:
    def __init__(self, budget: int) -> None:
        self.catalogs = FakeHost()
        self.reader: FakeReader | None = None
        self.memory = Memory(budget)
        config = StagingConfig(max_memory=Capacity(fraction=1.0))
        self.staging = Staging(self.catalogs, config, read_ahead=self._make, memory=lambda: self.memory)

    def _make(self, report: Callable[[int, int, int], None]) -> FakeReader:
        self.reader = FakeReader(report)
        self.reader.catalogs = self.catalogs
        return self.reader

    def open(self, index: int, generation: int = 1) -> None:
        self.staging.opened(FileKey("p", generation, index))

    def close(self, index: int, generation: int = 1) -> None:
        self.staging.released(FileKey("p", generation, index))

    @property
    def staged(self) -> list[int]:
        assert self.reader is not None
        return self.reader.staged()


@asynccontextmanager
async def running(budget: int = 1000) -> AsyncIterator[World]:
    world = World(budget)
    async with trio.open_nursery() as nursery:
        await nursery.start(world.staging.run)
        yield world
        nursery.cancel_scope.cancel()


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Jumps on by itself when nothing else can happen; threads are waited for."""
    return trio.testing.MockClock(autojump_threshold=0.05)


async def settled() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked(0.01)


async def test_one_file_held_for_a_second_starts_it(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        await trio.sleep(0.9)
        assert world.staged == []
        await trio.sleep(0.2)
        await settled()
        assert world.staged == [1, 2, 3, 4]


async def test_the_second_file_starts_it_at_once(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        world.close(1)
        await trio.sleep(0.5)
        world.open(2)
        await trio.sleep(0.01)
        await settled()
        assert world.staged == [2, 3, 4]


async def test_a_short_look_at_one_file_starts_nothing(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        for _ in range(20):
            world.open(1)
            await trio.sleep(0.5)
            world.close(1)
            await trio.sleep(0.5)
        await trio.sleep(10)
        assert world.staged == []
        assert world.staging.statistics().sessions == 0


async def test_the_window_moves_by_whole_shards_within_the_budget(clock: trio.testing.MockClock) -> None:
    """A checkpoint twice as large as the budget."""
    async with running(budget=250) as world:
        world.open(1)
        await trio.sleep(2)
        assert world.staged == [1, 2]
        assert world.reader is not None
        world.reader.finish()
        await trio.sleep(3)
        assert world.staged == [1, 2], "what was staged and not released counts"
        world.close(1)
        await trio.sleep(0.1)
        assert world.staged == [1, 2, 3]
        world.open(2)
        await trio.sleep(0.1)
        assert world.staged == [1, 2, 3]
        world.close(2)
        world.open(3)
        await trio.sleep(0.1)
        assert world.staged == [1, 2, 3, 4]


async def test_what_is_staged_is_counted(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(4)
        await trio.sleep(2)
        assert world.reader is not None
        assert world.staging.statistics() == Statistics(active=1, sessions=1, bytes=0, files=0)
        world.reader.finish()
        assert world.staging.statistics() == Statistics(active=0, sessions=1, bytes=100, files=1)
        assert world.catalogs.told == [("p", 100, True)]


async def test_it_waits_for_memory(clock: trio.testing.MockClock) -> None:
    async with running(budget=0) as world:
        world.open(1)
        await trio.sleep(5)
        assert world.staged == []
        world.memory = Memory(1000, (150,))
        await trio.sleep(2)
        assert world.staged == [1], "0.8 of what the cgroup has left"


async def test_it_stops_five_seconds_after_the_last_close(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        world.open(2)
        await trio.sleep(1)
        assert world.reader is not None
        assert len(world.reader.queued) == 4
        world.close(1)
        world.close(2)
        await trio.sleep(4.5)
        assert [index for index, _ in world.reader.queued.values()] == [3, 4]
        await trio.sleep(1)
        assert world.reader.queued == {}
        assert world.staging.statistics().active == 0
        world.open(1)  # a new engine: it begins anew, with its own second of waiting
        await trio.sleep(0.5)
        assert world.reader.queued == {}
        await trio.sleep(1)
        assert len(world.reader.queued) == 4


async def test_several_readers_stage_once(clock: trio.testing.MockClock) -> None:
    """FakeReader refuses to stage a file that it is at."""
    async with running() as world:
        for _ in range(8):
            for index in (1, 2, 3, 4):
                world.open(index)
            await trio.sleep(0.2)
        await trio.sleep(3)
        assert world.staged == [1, 2, 3, 4]
        assert world.staging.statistics().sessions == 1


async def test_while_filling_what_is_sealed_is_staged_and_the_rest_when_it_is(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        for index in (2, 4):
            world.catalogs.ready(index, False)
        world.open(1)
        await trio.sleep(2)
        assert world.staged == [1, 3]
        world.catalogs.ready(4, True)
        world.staging.sealed(FileKey("p", 1, 4))
        await trio.sleep(0.1)
        assert world.staged == [1, 3, 4]


async def test_it_rests_while_somebody_reads_past_the_page_cache(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        await trio.sleep(2)
        assert world.reader is not None
        world.staging.rest("p", True)
        assert world.reader.queued == {}
        world.open(2)
        await trio.sleep(3)
        assert world.reader.queued == {}
        world.staging.rest("p", False)
        await trio.sleep(0.1)
        assert len(world.reader.queued) == 4


async def test_a_retired_file_is_let_go(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        await trio.sleep(2)
        assert world.reader is not None
        world.catalogs.ready(3, False)
        world.staging.retired(FileKey("p", 1, 3))
        assert [index for index, _ in world.reader.queued.values()] == [1, 2, 4]
        await trio.sleep(3)
        assert world.staged == [1, 2, 3, 4]


async def test_an_update_ends_the_old_generations_session(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.open(1)
        await trio.sleep(2)
        world.open(1, generation=2)
        assert world.reader is not None
        assert world.reader.queued == {}
        world.close(1)
        await trio.sleep(2)
        assert world.staged == [1, 2, 3, 4, 1, 2, 3, 4]


async def test_a_file_that_cannot_be_opened_keeps_nothing_else_back(clock: trio.testing.MockClock) -> None:
    async with running() as world:
        world.catalogs.broken = {2}
        world.open(1)
        await trio.sleep(2)
        assert world.staged == [1, 3, 4]


# -- the process -------------------------------------------------------------------------------------------------------


def written(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    evict([path])
    return path


class Reports:
    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.done: list[int] = []

    def __call__(self, kind: int, job: int, count: int) -> None:
        if kind == readahead.STAGED:
            self.bytes[job] = self.bytes.get(job, 0) + count
        else:
            self.done.append(job)

    async def wait_done(self, *jobs: int) -> None:
        with trio.fail_after(20):
            while not set(jobs) <= set(self.done):
                await trio.sleep(0.005)


def staging_pids() -> list[int]:
    return [pid for pid in children(os.getpid()) if b"mount.readahead" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def staging_pid() -> int:
    """A child of a thread that has just ended is nobody's for a moment."""
    with trio.fail_after(10):
        while not (found := staging_pids()):
            await trio.sleep(0.01)
    (pid,) = found
    return pid


async def test_the_process_brings_whole_files_and_beginnings_into_the_page_cache(tmp_path: Path) -> None:
    whole, part = written(tmp_path / "whole", 40 * MIB + 17), written(tmp_path / "part", 40 * MIB)
    reports = Reports()
    process = StagingProcess(4, reports)
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        process.stage(1, os.open(whole, os.O_RDONLY), 40 * MIB + 17)
        process.stage(2, os.open(part, os.O_RDONLY), 16 * MIB)
        await reports.wait_done(1, 2)
        pids = staging_pids()
        nursery.cancel_scope.cancel()
    assert resident_bytes(whole) == 40 * MIB + 17
    assert 16 * MIB <= resident_bytes(part) <= 33 * MIB  # the device's own readahead may go a little on
    assert reports.bytes == {1: 40 * MIB + 17, 2: 16 * MIB}
    assert len(pids) == 1
    assert not any(alive(pid) for pid in pids), "it ends with its socket"


async def test_a_killed_process_loses_its_jobs_only_and_another_takes_over(tmp_path: Path) -> None:
    path = written(tmp_path / "file", 8 * MIB)
    reports = Reports()
    process = StagingProcess(2, reports)
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        pid = await staging_pid()
        os.kill(pid, signal.SIGSTOP)
        process.stage(1, os.open(path, os.O_RDONLY), 8 * MIB)
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.kill(pid, signal.SIGKILL)
        await reports.wait_done(1)
        assert resident_bytes(path) == 0
        job = 2
        with trio.fail_after(20):
            while not reports.bytes:
                process.stage(job, os.open(path, os.O_RDONLY), 8 * MIB)
                await reports.wait_done(job)
                job += 1
                await trio.sleep(0.02)
        assert resident_bytes(path) == 8 * MIB
        nursery.cancel_scope.cancel()


async def test_a_dropped_job_is_done_and_its_file_closed(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, 64 * MIB) for name in ("a", "b")]
    reports = Reports()
    process = StagingProcess(1, reports)
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        pid = await staging_pid()
        for job, path in enumerate(paths):
            process.stage(job, os.open(path, os.O_RDONLY), 64 * MIB)
        process.drop(1)
        process.drop(7)
        await reports.wait_done(0, 1)
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not any(str(path) in held for path in paths)
        assert resident_bytes(paths[1]) < 64 * MIB
        nursery.cancel_scope.cancel()
