"""A disk under the index that hangs: whoever waits for a commit gives up in time, what was begun is finished when the
disk answers again, and what needs no commit goes on."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from instantstart_fs.catalog.model import Generation
from instantstart_fs.config import Config, MountConfig, StoreConfig
from instantstart_fs.errors import IndexStuck, StoreDamaged, StoreFull
from instantstart_fs.index.environment import COMMIT_DEADLINE, Index, _Job
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.library import GIVE_UP_SECONDS, Library
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.vfs import ROOT
from instantstart_fs.web.health import HealthProbe
from tests.component.test_full_store import MIB, WEIGHTS, blocks, fills, running
from tests.component.test_library import find, make_source, read_all, spec

pytestmark = pytest.mark.timeout(60)

DEADLINE = 0.05


class Disk:
    """Under the index: from ``hang`` on no commit ends, until ``release``."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._answers = threading.Event()
        self._token = trio.lowlevel.current_trio_token()
        self.hangs = trio.Event()

    def hang(self) -> None:
        self._index._submit(_Job(self._op))

    def _op(self, txn: WriteTxn) -> None:
        self._token.run_sync_soon(self.hangs.set)
        assert self._answers.wait(30)

    def release(self) -> None:
        self._answers.set()


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(rate=1.0)


@asynccontextmanager
async def hanging(index: Index) -> AsyncIterator[Disk]:
    disk = Disk(index)
    disk.hang()
    await disk.hangs.wait()
    index.commit_deadline = DEADLINE
    try:
        yield disk
    finally:
        index.commit_deadline = COMMIT_DEADLINE
        disk.release()


async def test_who_waits_gives_up_and_what_was_asked_for_happens_in_its_order(tmp_path: Path) -> None:
    with Index.open(str(tmp_path / "index")) as index:
        first = await index.write(lambda txn: txn.reserve_nodeids(2))
        late: list[str] = []
        async with hanging(index) as disk:
            with pytest.raises(IndexStuck, match="may still be"):
                await index.write(lambda txn: txn.reserve_nodeids(2), patience=DEADLINE)
            with pytest.raises(IndexStuck):
                await trio.to_thread.run_sync(lambda: index.write_sync(lambda txn: None, patience=DEADLINE))
            async with trio.open_nursery() as nursery:

                def told(error: IndexStuck) -> None:
                    late.append(error.code)
                    disk.release()

                async def patient() -> None:
                    # It is told, and goes on waiting; the one that was given up came before it.
                    assert await index.write(lambda txn: txn.reserve_nodeids(2), late=told) == first + 4

                nursery.start_soon(patient)
        assert late == ["index-stuck"]


async def test_an_index_that_outlives_the_library_takes_commits(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    config = Config(mount=MountConfig(path=str(tmp_path / "mnt")), store=StoreConfig(path=str(tmp_path / "store")))
    with BlobStore.open(config.store.path) as store, Index.open(str(tmp_path / "index")) as index:
        for _ in range(2):
            async with Library(config, store, index).running():
                pass
            clock.jump(GIVE_UP_SECONDS + 1.0)
            await trio.testing.wait_all_tasks_blocked()
            await index.write(lambda txn: None)


async def test_at_the_end_nobody_waits_for_a_commit(tmp_path: Path) -> None:
    with Index.open(str(tmp_path / "index")) as index:
        async with hanging(index):
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:

                    async def stubborn() -> None:
                        with trio.CancelScope(shield=True), pytest.raises(IndexStuck):
                            await index.write(lambda txn: None)

                    nursery.start_soon(stubborn)
                    await trio.testing.wait_all_tasks_blocked()
                    index.give_up()
            with pytest.raises(IndexStuck):
                await index.write(lambda txn: None)


@asynccontextmanager
async def warm_and_cold(root: Path) -> AsyncIterator[Library]:
    source = make_source(root / "source")
    async with running(root, capacity=64 * MIB) as library:
        for name in ("warm", "cold"):
            await library.admin.add(spec(name, source))
        await fills(library, "warm")
        yield library


async def test_warm_reads_go_on_cold_ones_fail_in_time_and_health_says_index(tmp_path: Path) -> None:
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        probe = HealthProbe("/", library.snapshots.prove_index_writable, library.filler.statistics, lambda mount: None)
        async with hanging(library.index) as disk:
            with trio.fail_after(20):

                async def fails() -> None:
                    with pytest.raises(IndexStuck):
                        await read_all(library, "cold", WEIGHTS)

                async with trio.open_nursery() as nursery:
                    for _ in range(100):  # more than there are threads
                        nursery.start_soon(fails)
                assert await read_all(library, "warm", WEIGHTS) == data
                assert library.mounted.lookup(ROOT, "cold").kind == "dir"
                assert library.pipelines.status("warm").state == "unverified"
                problems = {check.name: check.problem for check in (await probe.ask()).checks}
                assert problems["index"] is not None
                assert problems["mount"] is None
            disk.release()
        assert await read_all(library, "cold", WEIGHTS) == data


async def test_a_commit_that_hangs_pauses_filling_and_is_not_taken_for_one_that_failed(tmp_path: Path) -> None:
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        committer = library.filler._completion.committer
        await library.catalog.invalidate_summary(library.catalog.pipelines["cold"])
        async with hanging(library.index) as disk:
            with trio.fail_after(20):
                # What arrives is served, though it is not durable.
                assert await read_all(library, "cold", WEIGHTS) == data
                while committer.stuck is None:
                    await trio.sleep(0.001)
                assert committer._busy, "what may still happen is not let go of"
                assert library.filler.statistics().index_stuck
                disk.release()
                while committer.stuck is not None or library.filler.is_filling("cold"):
                    await trio.sleep(0.001)
        assert not library.filler.statistics().index_stuck
    async with running(tmp_path, capacity=64 * MIB) as library:
        assert library.catalog.pipelines["cold"].allocated == blocks(tmp_path, "cold")
        assert await read_all(library, "cold", WEIGHTS) == data


async def test_a_damaged_file_is_dropped_once_the_index_answers_though_nobody_waited(tmp_path: Path) -> None:
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        pipeline = library.catalog.pipelines["warm"]
        assert pipeline.current is not None
        for file in pipeline.current.files:
            library.open_files.close_reader(file)
        stored = tmp_path / "store" / "slots" / "warm" / "1" / "files" / WEIGHTS
        stored.unlink()
        nodeid = find(library, "warm", WEIGHTS)
        async with hanging(library.index) as disk:
            with trio.fail_after(20):
                with pytest.raises(IndexStuck, match="is to be dropped"):
                    await read_all(library, "warm", WEIGHTS)
                assert find(library, "warm", WEIGHTS) == nodeid
                assert pipeline.in_use, "nothing else may happen to it meanwhile"
                disk.release()
                while find(library, "warm", WEIGHTS) == nodeid or pipeline.in_use:
                    await trio.sleep(0.001)
        assert await read_all(library, "warm", WEIGHTS) == data


async def test_so_it_is_in_every_generation_that_shares_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await fills(library, "p")
        held = await library.mounted.open(find(library, "p", WEIGHTS))
        (source / "config.json").write_bytes(b'{"a": 2}')
        await library.admin.update("p")
        current = library.catalog.pipelines["p"].current
        assert current is not None
        (file,) = [file for file in current.files if file.entry.path == WEIGHTS]
        assert file.complete and held.file.complete and file is not held.file
        async with hanging(library.index) as disk:
            with trio.fail_after(20):
                with pytest.raises(IndexStuck):
                    await library.reads.replace_damaged(file, StoreDamaged("rotten"), wanted=False, found_by="verify")
                disk.release()
                while held.file.stale_error is None:
                    await trio.sleep(0.001)
        assert file.stale_error is not None
        library.mounted.release(held)


async def test_an_eviction_goes_on_when_the_read_that_needed_the_space_was_cancelled(tmp_path: Path) -> None:
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        async with hanging(library.index) as disk:
            with trio.fail_after(20):
                with trio.move_on_after(DEADLINE) as reader:
                    await library.admin.evict_unused("warm")
                assert reader.cancelled_caught
                assert library.catalog.pipelines["warm"].lock.locked()
                disk.release()
                while library.pipelines.status("warm").state != "cold":
                    await trio.sleep(0.001)
        async with library.catalog.pipelines["warm"].lock:
            assert blocks(tmp_path, "warm") == 0
        assert await read_all(library, "warm", WEIGHTS) == data


async def test_while_the_bytes_of_one_are_going_no_other_is_evicted_for_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=21 * MIB, low=0.95) as library:
        for name in ("x", "y", "new"):
            await library.admin.add(spec(name, source))
        for name in ("x", "y"):
            await fills(library, name)
        store, going, go = library.store, trio.Event(), threading.Event()
        token, real = trio.lowlevel.current_trio_token(), library.store.empty_generation

        def empty(pipeline: str, generation: int) -> None:
            token.run_sync_soon(going.set)
            assert go.wait(20)
            real(pipeline, generation)

        monkeypatch.setattr(store, "empty_generation", empty)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.warming.warm, "new")
                await going.wait()
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.warming.warm, "new")
                await trio.testing.wait_all_tasks_blocked(0.05)
                go.set()
            while library.pipelines.status("new").state != "unverified":
                await library.pipelines.wait_changed("new", 1.0)
        assert library.pipelines.status("y").state == "unverified"
        assert library.pipelines.status("x").state == "cold"
        assert library.telemetry.totals.evictions == 1


async def test_an_eviction_that_the_end_cuts_short_leaves_nothing_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instantstart_fs.library.GIVE_UP_SECONDS", DEADLINE)
    monkeypatch.setattr("instantstart_fs.library.FLUSH_SECONDS", DEADLINE)
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        disk, emptied = Disk(library.index), trio.Event()
        token = trio.lowlevel.current_trio_token()
        switch, real = library.catalog.switch_generation, library.store.empty_generation

        def switched(new: Generation) -> Generation | None:
            disk.hang()
            return switch(new)

        def empty(pipeline: str, generation: int) -> None:
            real(pipeline, generation)
            disk.release()  # else the index could not be closed
            token.run_sync_soon(emptied.set)

        library.catalog.switch_generation = switched  # type: ignore[method-assign, assignment]
        library.store.empty_generation = empty  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library.admin.evict_unused, "warm")
            await disk.hangs.wait()
            nursery.cancel_scope.cancel()
    assert emptied.is_set()
    async with running(tmp_path, capacity=64 * MIB) as library:
        assert library.catalog.pipelines["warm"].allocated == blocks(tmp_path, "warm") == 0
        assert await read_all(library, "warm", WEIGHTS) == data


async def test_after_an_eviction_that_the_index_does_not_know_of_nothing_is_filled_before_it_does(
    tmp_path: Path,
) -> None:
    async with warm_and_cold(tmp_path) as library:
        data = await read_all(library, "warm", WEIGHTS)
        index, real, refusing = library.index, library.index.write, True

        async def write(op: object, **how: object) -> object:
            if refusing:
                raise StoreFull("no space is left on the disk")
            return await real(op, **how)  # type: ignore[arg-type]

        generation = library.catalog.pipelines["warm"].current
        assert generation is not None
        base = generation.base
        await library.catalog.invalidate_summary(library.catalog.pipelines["warm"])
        reserved = await library.catalog.new_generation(library.catalog.pipelines["warm"], generation.manifest)
        made = library.catalog.new_generation

        async def prepared(*args: object) -> object:
            return reserved

        library.catalog.new_generation = prepared  # type: ignore[method-assign, assignment]
        index.write = write  # type: ignore[method-assign, assignment]
        with pytest.raises(StoreFull):
            await library.admin.evict("warm")
        library.catalog.new_generation = made  # type: ignore[method-assign]
        assert blocks(tmp_path, "warm") == 0
        assert index.read(lambda txn: dict(txn.files("warm", 1))), "the index speaks of what is gone"
        with pytest.raises(StoreFull):
            await read_all(library, "warm", WEIGHTS)
        assert blocks(tmp_path, "warm") == 0

        refusing = False
        seen: list[object] = []
        blob = library.store.blob

        def watched(*where: object) -> object:
            seen.append(index.read(lambda txn: (dict(txn.files("warm", 1)), txn.get_generation("warm", 1))))
            return blob(*where)  # type: ignore[arg-type]

        library.store.blob = watched  # type: ignore[method-assign, assignment]
        assert await read_all(library, "warm", WEIGHTS) == data
        files, record = seen[0]  # type: ignore[misc]
        assert files == {}
        assert record.nodeid_base == reserved.base != base
