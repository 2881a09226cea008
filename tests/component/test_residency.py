"""What a start reads and what it leaves for the first look: summaries, clean pipelines, unloading. A real library."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from instantstart_fs.catalog import gc_control, residency
from instantstart_fs.catalog.model import CachedFile, Generation, UnloadedGeneration
from instantstart_fs.core.manifest import Manifest
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import PipelineBusy, StoreFull
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.library import Library
from instantstart_fs.mount.fuse_types import Entry, FUSEError
from instantstart_fs.mount.operations import Operations
from instantstart_fs.store import manifest_json
from instantstart_fs.vfs import ROOT
from tests.component.test_full_store import MIB, WEIGHTS, blocks, fills, running
from tests.component.test_library import find, make_source, read_all, spec

pytestmark = pytest.mark.timeout(60)


async def checkpoint(library: Library) -> None:
    """Two looks between which nothing happens."""
    await library.residency.run_once()
    await library.residency.run_once()


def read_whole(library: Library) -> int:
    """How many generations this library has read from their manifests."""
    return library.catalog.reader.read_whole


def summarized(root: Path) -> set[str]:
    """By an index of its own, once the library is closed."""
    with Index.open(str(root / "store" / "index")) as index:
        return index.read(lambda txn: set(txn.summarized()))


def known_summaries(library: Library) -> set[str]:
    return library.index.read(lambda txn: set(txn.summarized()))


def everything(library: Library) -> dict[str, PipelineStatus]:
    return {status.pipeline: status for status in library.pipelines.list()}


async def test_a_start_reads_no_manifest_and_no_file_record_of_a_clean_pipeline(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for number in range(20):
            await library.admin.add(spec(f"cold{number}", source))
        await library.admin.add(spec("warm", source))
        await fills(library, "warm")
        await checkpoint(library)
        before = everything(library)
    assert len(summarized(tmp_path)) == 21

    async with running(tmp_path) as library:
        assert everything(library) == before
        assert [candidate.pipeline for candidate in library.inventory.candidates()] == ["warm"]
        assert library.mounted.filesystem().files == 21
        assert library.pipelines.status("warm").files
        assert library.mounted.list_directory(library.mounted.lookup(ROOT, ".warm").nodeid) == ["warm"]
        for name in before:
            root = library.mounted.lookup(ROOT, name)
            assert root == library.mounted.attributes(root.nodeid)
            library.mounted.xattrs(root.nodeid)
        assert read_whole(library) == 1  # the one whose files were asked for by name, above
        assert find(library, "cold7", WEIGHTS)
        assert read_whole(library) == 2
        assert library.pipelines.status("cold7") == msgspec.structs.replace(
            before["cold7"], files=library.pipelines.status("cold7").files
        )


async def test_what_a_summary_shows_is_what_the_whole_shows(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for name in ("cold", "part", "warm"):
            await library.admin.add(spec(name, source))
        await fills(library, "warm")
        handle = await library.mounted.open(find(library, "part", "pytorch_model.bin"))
        await library.mounted.read_into(handle, 0, memoryview(bytearray(4096)))
        library.mounted.release(handle)
    async with running(tmp_path) as library:  # what was being filled is read whole, and given back what nobody recorded
        assert isinstance(library.catalog.pipelines["part"].head, Generation)
        await checkpoint(library)
    async with running(tmp_path) as library:
        for name, pipeline in library.catalog.pipelines.items():
            unloaded, root = pipeline.head, library.mounted.lookup(ROOT, name)
            assert isinstance(unloaded, UnloadedGeneration)
            shown = (
                library.mounted.xattrs(root.nodeid),
                everything(library)[name],
                library.inventory.candidate(pipeline),
            )
            whole = pipeline.current
            assert isinstance(whole, Generation)
            for attribute in (
                *("number", "base", "nodeid_count", "file_count", "load_bytes", "total_bytes", "revision", "counts"),
                *("resolved_at_ns", "load_set_complete", "own_allocated", "reserved_bytes"),
            ):
                assert getattr(unloaded, attribute) == getattr(whole, attribute), (name, attribute)
            assert shown == (
                library.mounted.xattrs(root.nodeid),
                everything(library)[name],
                library.inventory.candidate(pipeline),
            )
            assert library.mounted.lookup(ROOT, name) == root
            assert pipeline.allocated == blocks(tmp_path, name)


async def test_before_the_first_byte_of_a_fill_the_summary_is_deleted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        assert known_summaries(library) == {"x"}
        seen: list[set[str]] = []
        real = library.store.blob

        def watched(*where: object) -> object:
            seen.append(known_summaries(library))
            return real(*where)  # type: ignore[arg-type]

        library.store.blob = watched  # type: ignore[method-assign, assignment]
        await read_all(library, "x", WEIGHTS)
        assert seen[0] == set()
        await library.residency.run_once()
        assert known_summaries(library) == set()  # once is not enough: something may just have happened


async def test_bytes_that_nobody_recorded_are_given_back_at_the_next_start(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for name in ("x", "quiet"):
            await library.admin.add(spec(name, source))
        await library.catalog.invalidate_summary(
            library.catalog.pipelines["x"]
        )  # a fill begins, and the daemon is killed
        stray = tmp_path / "store" / "slots" / "x" / "1" / "files" / WEIGHTS
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_bytes(bytes(MIB))
    async with running(tmp_path) as library:
        assert read_whole(library) == 1
        assert blocks(tmp_path, "x") == 0
        assert library.pipelines.status("x").cached_bytes == 0
        await checkpoint(library)
        assert known_summaries(library) == {"x", "quiet"}


async def test_a_new_pipeline_of_an_old_name_is_marked_anew(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        await read_all(library, "x", WEIGHTS)
        await library.admin.remove("x")
        await library.admin.add(spec("x", source))
        assert known_summaries(library) == {"x"}
        await read_all(library, "x", WEIGHTS)
        assert known_summaries(library) == set()


async def test_a_pipeline_is_clean_again_only_once_its_evicted_bytes_are_deleted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        await fills(library, "x")
        await checkpoint(library)
        assert known_summaries(library) == {"x"}
        seen: list[set[str]] = []
        real = library.store.empty_generation

        def watched(pipeline: str, generation: int) -> None:
            seen.append(known_summaries(library))
            real(pipeline, generation)

        library.store.empty_generation = watched  # type: ignore[method-assign]
        await library.admin.evict("x")
        assert seen == [set()]
        await checkpoint(library)
        assert known_summaries(library) == {"x"}
    async with running(tmp_path) as library:
        assert library.pipelines.status("x").state == "cold"


def close_readers(library: Library, pipeline: str) -> None:
    for file in library.catalog.pipelines[pipeline].current.files:  # type: ignore[union-attr]
        library.open_files.close_reader(file)


async def test_what_is_looked_into_is_let_go_of_when_there_is_too_much_and_comes_back_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "IDLE_SECONDS", 0.0)
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for name in ("a", "b", "open"):
            await library.admin.add(spec(name, source))
        await fills(library, "a")
        await checkpoint(library)
        before = {name: find(library, name, WEIGHTS) for name in ("a", "b", "open")}
        data = await read_all(library, "a", WEIGHTS)
        close_readers(library, "a")
        handle = await library.mounted.open(before["open"])

        def heads() -> list[str]:
            return [name for name, one in library.catalog.pipelines.items() if isinstance(one.head, UnloadedGeneration)]

        await checkpoint(library)
        assert heads() == []  # little enough
        each = len(library.pipelines.status("b").files or ())
        monkeypatch.setattr(residency, "MOST_FILES", 2 * each)
        find(library, "a", WEIGHTS)
        await checkpoint(library)
        assert heads() == ["b"]  # the one that was not looked at for the longest time
        monkeypatch.setattr(residency, "MOST_FILES", 0)
        memory = weakref.ref(library.catalog.pipelines["a"].current)  # type: ignore[arg-type]
        gc.disable()
        try:
            await checkpoint(library)
            assert memory() is None  # given back at once
        finally:
            gc.enable()
        assert heads() == ["a", "b"]  # and never what is open

        assert {name: find(library, name, WEIGHTS) for name in before} == before
        assert await read_all(library, "a", WEIGHTS) == data
        library.mounted.release(handle)
        # By its nodeid alone, as the kernel asks that remembers the name.
        await checkpoint(library)
        assert "b" in heads()
        await library.pipelines.ensure_loaded("b")
        assert library.mounted.attributes(before["b"]).size == len(data)
        assert await read_all(library, "b", WEIGHTS) == data


async def test_a_file_of_another_incarnation_is_found_by_its_nodeid_after_a_restart(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        await fills(library, "x")
        stored = tmp_path / "store" / "slots" / "x" / "1" / "files" / WEIGHTS
        stored.unlink()
        with pytest.raises(Exception, match="missing from the store"):
            await read_all(library, "x", WEIGHTS)
        await fills(library, "x")
        nodeid = find(library, "x", WEIGHTS)
        with trio.fail_after(10):
            while known_summaries(library) != {"x"}:
                await checkpoint(library)
                await trio.sleep(0.01)
    async with running(tmp_path) as library:
        assert read_whole(library) == 0
        for asked in (nodeid, nodeid + 1):
            await library.pipelines.ensure_loaded("x")
            found = library.catalog.nodes.find(asked)
            assert isinstance(found, CachedFile)
            assert (found.entry.path, found.incarnation) == (WEIGHTS, 1)
        assert read_whole(library) == 1


async def test_a_manifest_that_cannot_be_read_shows_at_the_first_look(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for name in ("bad", "good"):
            await library.admin.add(spec(name, source))
    (tmp_path / "store" / "slots" / "bad" / "1" / "manifest.json").write_text("{")
    async with running(tmp_path) as library:
        assert library.mounted.lookup(ROOT, "bad").kind == "dir"
        assert library.pipelines.status("bad").state == "error"
        assert "cannot be read" in (library.pipelines.status("bad").error or pytest.fail("no error")).message
        assert everything(library)["bad"].state == "error"
        assert library.pipelines.status("good").state == "cold"


def _of_another_encoding(root: Path, index: Index) -> None:
    manifest = root / "store" / "slots" / "bad" / "1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"empty.txt", b"empty.t\xff\xff"))


def _of_an_unknown_state(root: Path, index: Index) -> None:
    index.write_sync(lambda txn: txn.put_file("bad", 1, 0, FileRecord("from-the-future", 0)))


def _of_a_file_that_is_not(root: Path, index: Index) -> None:
    index.write_sync(lambda txn: txn.put_file("bad", 1, 1000, FileRecord("absent", 0)))


def _of_another_size(root: Path, index: Index) -> None:
    index.write_sync(lambda txn: txn.put_file("bad", 1, 0, FileRecord("filling", 0, 0, bytes(9))))


@pytest.mark.parametrize("unloaded", [True, False])
@pytest.mark.parametrize(
    "spoil", [_of_another_encoding, _of_an_unknown_state, _of_a_file_that_is_not, _of_another_size]
)
async def test_whatever_is_wrong_with_what_is_recorded_of_one_pipeline_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path, Index], None], unloaded: bool
) -> None:
    # Files are decoded apart from the rest, as those of a large manifest are.
    monkeypatch.setattr(manifest_json, "SLICE", 1)
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for name in ("bad", "good"):
            await library.admin.add(spec(name, source))
            if not unloaded:
                await library.catalog.invalidate_summary(library.catalog.pipelines[name])
    with Index.open(str(tmp_path / "store" / "index")) as index:
        spoil(tmp_path, index)
    async with running(tmp_path) as library:
        await library.pipelines.ensure_loaded("bad")
        assert library.pipelines.status("bad").state == "error"
        assert (library.pipelines.status("bad").error or pytest.fail("no error")).code == "store-damaged"
        assert await read_all(library, "good", WEIGHTS) == (source / WEIGHTS).read_bytes()


class Gate:
    """Holds whoever reads a manifest, in its thread, until it is opened."""

    def __init__(self, library: Library) -> None:
        self.entered, self._open, self.reads = trio.Event(), threading.Event(), 0
        self._real = library.store.metadata.load_manifest
        self._token = trio.lowlevel.current_trio_token()
        library.store.metadata.load_manifest = self._load  # type: ignore[method-assign]

    def _load(self, pipeline: str, generation: int) -> Manifest:
        self.reads += 1
        self._token.run_sync_soon(self.entered.set)
        assert self._open.wait(20)
        return self._real(pipeline, generation)

    def open(self) -> None:
        self._open.set()


@asynccontextmanager
async def clean_library(root: Path, *names: str) -> AsyncIterator[Library]:
    """A library that has just started and looked into none of these pipelines."""
    source = make_source(root / "source")
    async with running(root) as library:
        for name in names:
            await library.admin.add(spec(name, source))
        await fills(library, "x")
        await checkpoint(library)
    async with running(root) as library:
        yield library


NOBODY = SimpleNamespace(uid=0, gid=0, pid=os.getpid())


def no_reply(token: object, name: bytes, entry: Entry, cursor: int) -> bool:
    return False


async def test_while_one_pipeline_is_looked_into_the_mount_answers_for_others_and_all_share_one_reading(
    tmp_path: Path,
) -> None:
    async with clean_library(tmp_path, "x", "other") as library:
        find(library, "other", WEIGHTS)  # in memory
        operations, gate = Operations(library.mounted, no_reply), Gate(library)
        root, other = library.mounted.lookup(ROOT, "x").nodeid, library.mounted.lookup(ROOT, "other").nodeid
        found: list[int] = []
        statuses: list[PipelineStatus] = []
        interrupted = trio.CancelScope()

        async def look() -> None:
            found.append((await operations.lookup(root, WEIGHTS.encode(), NOBODY)).nodeid)

        async def give_up() -> None:
            with interrupted:
                await look()

        async def status() -> None:
            await library.pipelines.ensure_loaded("x")
            statuses.append(library.pipelines.status("x"))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_up)  # it begins the reading
                await gate.entered.wait()
                for _ in range(3):
                    nursery.start_soon(look)
                nursery.start_soon(status)
                interrupted.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert (await operations.lookup(other, WEIGHTS.encode(), NOBODY)).nodeid
                assert (await operations.getattr(root, NOBODY)).nodeid == root  # the summary says it
                assert library.mounted.pipeline_of(root) == "x"
                await operations.releasedir(await operations.opendir(other, NOBODY))
                assert not found and not statuses
                gate.open()
        assert len(found) >= 3 and set(found) == {find(library, "x", WEIGHTS)}
        assert statuses[0].state == "unverified"
        assert gate.reads == 1
        assert operations.requests["lookup"] == 5


async def test_what_is_removed_or_read_by_another_while_it_is_looked_into_is_not_put_back(tmp_path: Path) -> None:
    async with clean_library(tmp_path, "x", "other") as library:
        gate, before = Gate(library), len(library.catalog.nodes)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.pipelines.ensure_loaded, "x")
                await gate.entered.wait()
                await library.admin.remove("x")
                gate.open()
        assert len(library.catalog.nodes) == before - 3  # its block, its directory, its link
        assert everything(library)["other"].error is None

        gate = Gate(library)
        catalog, other = library.catalog, library.catalog.pipelines["other"]
        found: list[Generation | None] = []

        async def look() -> None:
            found.append(await catalog.ensure_loaded(other))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                await gate.entered.wait()
                gate.open()
                whole = other.current  # by somebody who cannot wait
        assert found == [whole]
        assert len(catalog.nodes) == before - 3


async def test_what_is_hidden_and_removed_at_the_same_time_is_not_read_again(tmp_path: Path) -> None:
    async with clean_library(tmp_path, "x") as library:
        gate, before = Gate(library), len(library.catalog.nodes)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.catalog.set_hidden, library.catalog.pipelines["x"], "no access")
                await gate.entered.wait()
                await library.admin.remove("x")
                gate.open()
        assert gate.reads == 1
        assert len(library.catalog.nodes) == before - 3


async def test_a_manifest_that_proves_unreadable_when_it_is_looked_into_is_an_error_of_its_pipeline_alone(
    tmp_path: Path,
) -> None:
    async with clean_library(tmp_path, "x", "other") as library:
        (tmp_path / "store" / "slots" / "x" / "1" / "manifest.json").write_text("{")
        operations = Operations(library.mounted, no_reply)
        with pytest.raises(FUSEError) as stale:
            await operations.readdir(
                await operations.opendir(library.mounted.lookup(ROOT, "x").nodeid, NOBODY), 0, None
            )
        assert stale.value.errno == errno.ESTALE
        assert library.pipelines.status("x").state == "error"
        assert (await operations.lookup(library.mounted.lookup(ROOT, "other").nodeid, WEIGHTS.encode(), NOBODY)).nodeid


async def test_a_file_that_the_kernel_remembers_by_its_nodeid_is_opened_after_its_pipeline_was_read(
    tmp_path: Path,
) -> None:
    async with clean_library(tmp_path, "x") as library:
        nodeid = find(library, "x", WEIGHTS)
    async with running(tmp_path) as library:
        operations, gate = Operations(library.mounted, no_reply), Gate(library)
        assert operations.open_nowait(nodeid, 0) is None  # it has to wait
        gate.open()
        opened = await operations.open(nodeid, 0)
        assert bytes(await operations.read(opened.fh, 0, 16))
        assert gate.reads == 1
        await operations.release(opened.fh)


async def test_the_collector_walks_over_no_large_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_control, "LARGE", 5)
    async with clean_library(tmp_path, "x") as library:
        enabled: list[bool] = []
        real = library.store.metadata.load_manifest

        def watched(pipeline: str, generation: int) -> Manifest:
            enabled.append(gc.isenabled())
            return real(pipeline, generation)

        library.store.metadata.load_manifest = watched  # type: ignore[method-assign]
        gc.unfreeze()
        await library.pipelines.ensure_loaded("x")
        assert enabled == [False]
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        gc.unfreeze()


class Living:
    """The generations that are in memory, with no help from the collector."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Generation]] = []
        init = Generation.__init__

        def watched(generation: Generation, *how: Any) -> None:
            self.made.append(weakref.ref(generation))
            init(generation, *how)

        monkeypatch.setattr(Generation, "__init__", watched)

    def __len__(self) -> int:
        return sum(made() is not None for made in self.made)

    async def are(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self) != count:
                await trio.sleep(0.001)


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Iterator[Living]:
    gc.disable()
    yield Living(monkeypatch)
    gc.enable()


async def test_a_generation_is_freed_when_it_is_done_with(tmp_path: Path, living: Living) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        await fills(library, "x")
        assert await read_all(library, "x", WEIGHTS)
        await library.admin.evict("x")
        await living.are(1)

        await fills(library, "x")
        handle = await library.mounted.open(find(library, "x", WEIGHTS))
        (source / "config.json").write_bytes(b'{"a": 2}')
        await library.admin.update("x")
        await living.are(2)
        assert await library.mounted.read_into(handle, 0, memoryview(bytearray(4096))) == 4096
        library.mounted.release(handle)
        del handle
        await living.are(1)

        await fills(library, "x")
        handle = await library.mounted.open(find(library, "x", WEIGHTS))
        assert await library.mounted.read_into(handle, 0, memoryview(bytearray(4096))) == 4096
        await library.admin.remove("x")
        assert await library.mounted.read_into(handle, 0, memoryview(bytearray(4096))) == 4096
        assert handle.file.generation.files
        library.mounted.release(handle)
        del handle
        await living.are(0)


async def test_so_is_one_that_is_made_in_vain(tmp_path: Path, living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        await fills(library, "x")

        def refuse(pipeline: object) -> None:
            raise PipelineBusy("not now")

        with pytest.raises(PipelineBusy):
            await library.lifecycle.evict("x", refuse)
        await living.are(1)
        (source / "config.json").write_bytes(b'{"a": 2}')
        for where, name in ((library.catalog, "invalidate_summary"), (library.lifecycle, "_record")):
            with monkeypatch.context() as patch:
                patch.setattr(where, name, _no_room)
                with pytest.raises(StoreFull):
                    await library.admin.update("x")
                await living.are(1)
        monkeypatch.setattr(library.lifecycle, "_record", _no_room)
        with pytest.raises(StoreFull):
            await library.admin.add(spec("y", source))
        await living.are(1)


async def _no_room(*what: object, **how: object) -> None:
    raise StoreFull("no space is left on the disk")


async def test_so_is_one_that_is_read_while_its_pipeline_is_removed(
    tmp_path: Path, living: Living, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clean_library(tmp_path, "x") as library:
        living.made.clear()  # those of the library before
        token, read, go = trio.lowlevel.current_trio_token(), trio.Event(), threading.Event()

        def held(generation: Generation) -> None:
            token.run_sync_soon(read.set)
            assert go.wait(20)

        monkeypatch.setattr(Generation, "count_all", held)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.pipelines.ensure_loaded, "x")
                await read.wait()
                await library.admin.remove("x")
                assert len(living) == 1
                go.set()
        await living.are(0)


async def test_so_is_one_that_proves_unreadable(tmp_path: Path, living: Living) -> None:
    async with clean_library(tmp_path, "x") as library:
        living.made.clear()
        await library.index.write(lambda txn: txn.put_file("x", 1, 0, FileRecord("from-the-future", 0)))
        await library.pipelines.ensure_loaded("x")
        assert library.pipelines.status("x").state == "error"
        assert len(living.made) == 1
        await living.are(0)


async def test_who_keeps_a_generation_keeps_its_files(tmp_path: Path, living: Living) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("x", source))
        generation = library.catalog.pipelines["x"].current
        assert generation is not None
        with generation.retained():
            await library.admin.evict("x")
            assert len(generation.files) == generation.file_count
        assert generation.files == []
        del generation
        await living.are(1)
