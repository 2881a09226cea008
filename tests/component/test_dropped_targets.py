"""A file's target is dropped, or its generation goes, between the moment at which somebody takes it and its use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs.catalog.accounting import Uncached
from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import InstantStartError, NoSuchEntry, OriginNotFound
from instantstart_fs.filler.committer import Committer
from instantstart_fs.library import Library
from instantstart_fs.serving.reads import Reads
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.upkeep.eviction import Evictor
from tests.component.hub_library import hub_library
from tests.component.test_library import find, make_source, read_all, running, spec, wait_state
from tests.component.test_library_races import Gate
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(60)

SHARD, OTHER = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


class Held:
    """Holds the first call of an async method for which ``when`` holds until it is let go."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        self.entered, self.go = trio.Event(), trio.Event()
        original: Callable[..., Any] = getattr(owner, name)

        async def held(*args: Any, **kwargs: Any) -> Any:
            if not self.entered.is_set() and when(*args, **kwargs):
                self.entered.set()
                await self.go.wait()
            return await original(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)

    async def reached(self) -> None:
        with trio.fail_after(10):
            await self.entered.wait()


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not holds():
            await trio.sleep(0.01)


def with_quota(source: Path) -> PipelineSpec:
    """Where there is one, each chunk that a reader waits for is asked of the evictor."""
    return PipelineSpec(id="p", models=(ModelSpec(source=f"file://{source}"),), quota=1 << 30)


async def read_beginning(library: Library, found: list[bytes | InstantStartError]) -> None:
    handle = await library.mounted.open(find(library, "p", SHARD))
    data = bytearray(4096)
    try:
        count = await library.mounted.read_into(handle, 0, memoryview(data))
        found.append(bytes(data[:count]))
    except InstantStartError as error:
        found.append(error)
    finally:
        library.mounted.release(handle)


def head(library: Library) -> Generation:
    generation = library.catalog.pipelines["p"].current
    assert generation is not None
    return generation


async def test_a_warm_while_wrong_bytes_wait_to_be_deleted_loses_nothing(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    hub.publish("org/late", source)
    hub.fault("corrupt", port="cdn")
    gate = Held(monkeypatch, Committer, "commit")
    async with hub_library(tmp_path, hub) as library:
        await library.admin.add(PipelineSpec(id="p", models=(ModelSpec(source="hf://org/late"),)))
        await library.warming.warm("p")
        await until(lambda: library.filler.statistics().poisoned >= 2)
        hub.clear()
        await library.warming.warm("p")
        await trio.testing.wait_all_tasks_blocked(0.1)
        gate.go.set()
        await wait_state(library, "p", "warm")
        assert (tmp_path / "store/slots/p/1/files" / SHARD).read_bytes() == (source / SHARD).read_bytes()
        assert await read_all(library, "p", SHARD) == (source / SHARD).read_bytes()
    async with hub_library(tmp_path, hub) as library:
        assert library.pipelines.status("p").state == "warm"


async def test_a_warm_while_a_reader_waits_for_room_leaves_both_what_they_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    found: list[bytes | InstantStartError] = []
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.admin.add(with_quota(source))
        file = next(file for file in head(library).files if file.entry.path == SHARD)
        target = await library.reads.target(file)
        assert target is not None
        target.fail(OriginNotFound("it is not there"))
        target.failed_at -= 60.0
        gate = Held(monkeypatch, Evictor, "admit")
        nursery.start_soon(read_beginning, library, found)
        await gate.reached()
        await library.warming.warm("p")
        gate.go.set()
        await wait_state(library, "p", "unverified")
        await until(lambda: found)
        assert found == [(source / SHARD).read_bytes()[:4096]]
        assert await read_all(library, "p", SHARD) == (source / SHARD).read_bytes()


async def test_a_reader_that_waits_for_room_fills_nothing_of_a_removed_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    found: list[bytes | InstantStartError] = []
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.admin.add(with_quota(source))
        gate = Held(monkeypatch, Evictor, "admit")
        nursery.start_soon(read_beginning, library, found)
        await gate.reached()
        await library.admin.remove("p")
        gate.go.set()
        await until(lambda: found)
        assert isinstance(found[0], InstantStartError)
        await trio.sleep(0.2)
        assert not (tmp_path / "store/slots/p").exists()


async def test_what_waits_to_be_fetched_again_is_forgotten_with_an_eviction(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    hub.publish("org/again", source)
    hub.fault("corrupt", port="cdn")
    gate = Held(monkeypatch, Reads, "start_fill", lambda *_, first=None, **__: first is not None)
    async with hub_library(tmp_path, hub) as library:
        await library.admin.add(PipelineSpec(id="p", models=(ModelSpec(source="hf://org/again"),)))
        await library.warming.warm("p")
        await gate.reached()
        # Both are replaced; the second waits behind the first.
        await until(lambda: sum(file.incarnation for file in head(library).files) >= 2)
        await library.admin.evict("p")
        hub.clear()
        gate.go.set()
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert library.pipelines.status("p").error is None
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
    async with hub_library(tmp_path, hub) as library:
        await library.catalog.ensure_loaded(library.catalog.pipelines["p"])
        states = {file.entry.path: str(file.state) for file in head(library).files}
        assert (states[SHARD], states[OTHER]) == ("sealed", "sealed"), "the index says so, too"


async def test_files_that_are_looked_for_while_their_pipeline_is_evicted_keep_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        gate = Gate(monkeypatch, BlobStore, "survey", once=True)
        (tmp_path / "store/slots/p/1/files" / SHARD).unlink()

        async def look() -> None:
            with pytest.raises(NoSuchEntry):
                await library.mounted.open(find(library, "p", SHARD))

        nursery.start_soon(look)
        await gate.reached()
        await library.admin.evict("p", force=True)
        gate.go.set()
        await trio.testing.wait_all_tasks_blocked(0.1)
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
    async with running(tmp_path) as library:
        await library.catalog.ensure_loaded(library.catalog.pipelines["p"])
        assert all(file.complete for file in head(library).files if file.entry.path in (SHARD, OTHER))


async def test_a_fill_that_an_update_overtakes_takes_no_place_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.catalog.ensure_loaded(library.catalog.pipelines["p"])
        old = head(library)
        gate = Gate(monkeypatch, Generation, "origin", once=True)
        with library.reads.using(old):
            nursery.start_soon(library.warming.warm, "p")
            await gate.reached()
            (source / "config.json").write_bytes(b'{"a": 2}')
            assert (await library.admin.update("p")).generation == 2
            gate.go.set()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert not library.filler.is_filling("p") and not old.filling_load_set
            await library.warming.warm("p")
            await wait_state(library, "p", "unverified")
            assert sum(file.cached_bytes for file in old.files) == 0


async def test_what_an_earlier_daemon_left_unproven_is_held_back(tmp_path: Path, hub: HubServer) -> None:
    source = make_source(tmp_path / "source")
    hub.publish("org/unproven", source)
    found: list[bytes | InstantStartError] = []
    async with hub_library(tmp_path, hub) as library:
        await library.admin.add(PipelineSpec(id="p", models=(ModelSpec(source="hf://org/unproven"),)))
        await read_beginning(library, found)
    assert found == [(source / SHARD).read_bytes()[:4096]]
    hub.fault("blackhole", port="any")
    async with hub_library(tmp_path, hub, fill={"serve_unsealed": "never"}) as library:
        await library.catalog.ensure_loaded(library.catalog.pipelines["p"])
        file = next(file for file in head(library).files if file.entry.path == SHARD)
        assert 0 < file.cached_bytes < file.size
        with trio.move_on_after(0.5) as waiting:
            await read_beginning(library, found)
        assert waiting.cancelled_caught and len(found) == 1
        hub.clear()


async def test_a_file_that_has_no_room_when_it_is_to_come_again_is_not_called_on_its_way(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/no-room", make_source(tmp_path / "source"))
    hub.fault("corrupt", port="cdn")
    gate = Held(monkeypatch, Committer, "commit")
    async with hub_library(tmp_path, hub) as library:
        await library.admin.add(PipelineSpec(id="p", models=(ModelSpec(source="hf://org/no-room"),)))
        await library.warming.warm("p")
        await until(lambda: library.filler.statistics().poisoned >= 2)
        library.catalog.pipelines["p"].uncached = Uncached("store full", retry_at=float("inf"))
        gate.go.set()
        await until(lambda: sum(file.incarnation for file in head(library).files) >= 2)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not head(library).filling_load_set, "the next read begins it again"
