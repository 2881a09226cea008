"""The library over a real store, index and filler, with a directory as origin; no mount."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from instantstart_fs.config import (
    Capacity,
    Config,
    EvictionConfig,
    FillConfig,
    MountConfig,
    StoreConfig,
)
from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import (
    InvalidName,
    NoSuchEntry,
    OriginNotFound,
    PipelineBusy,
    PipelineExists,
    PipelineNotFound,
    StoreFull,
    UsageError,
)
from instantstart_fs.filler.quarantine import MISMATCHES
from instantstart_fs.filler.target import FileKey
from instantstart_fs.index.environment import Index
from instantstart_fs.library import Library
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.vfs import ROOT, NotLoaded

MIB = 1024 * 1024
pytestmark = pytest.mark.timeout(60)


def make_source(root: Path, *, salt: bytes = b"") -> Path:
    """A small model: two shards, configuration, and weights in a format that nobody loads."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_bytes(b'{"a": 1}' + salt)
    (root / "model-1-of-2.safetensors").write_bytes(os.urandom(5 * MIB + 17))
    (root / "model-2-of-2.safetensors").write_bytes(os.urandom(3 * MIB))
    (root / "pytorch_model.bin").write_bytes(os.urandom(2 * MIB))
    (root / "empty.txt").write_bytes(b"")
    (root / "sub").mkdir(exist_ok=True)
    (root / "sub" / "ünï code.json").write_bytes(b"{}")
    return root


@asynccontextmanager
async def running(
    root: Path, *, capacity: int = 1 << 40, keep_hot: float = 0.0, regional: RegionalConfig | None = None
) -> AsyncIterator[Library]:
    config = Config(
        mount=MountConfig(path=str(root / "mnt")),
        store=StoreConfig(path=str(root / "store"), capacity=Capacity(bytes=capacity)),
        fill=FillConfig(workers=1, connections=4, chunk_size=MIB, read_deadline=10.0),
        eviction=EvictionConfig(keep_hot=keep_hot),
        regional=regional,
    )
    with BlobStore.open(config.store.path) as store, Index.open(str(root / "store" / "index")) as index:
        library = Library(config, store, index)
        async with library.running():
            yield library


def spec(pipeline: str, source: Path) -> PipelineSpec:
    return PipelineSpec(id=pipeline, models=(ModelSpec(source=f"file://{source}"),))


def find(library: Library, *names: str) -> int:
    nodeid = ROOT
    for name in names:
        try:
            nodeid = library.mounted.lookup(nodeid, name).nodeid
        except NotLoaded as unloaded:
            _ = library.catalog.pipelines[unloaded.pipeline].current
            nodeid = library.mounted.lookup(nodeid, name).nodeid
    return nodeid


async def read_all(library: Library, *names: str) -> bytes:
    handle = await library.mounted.open(find(library, *names))
    try:
        size = library.mounted.attributes(handle.nodeid).size
        found = bytearray()
        while len(found) < size:
            buffer = bytearray(min(MIB, size - len(found)))
            count = await library.mounted.read_into(handle, len(found), memoryview(buffer))
            assert count > 0
            found += buffer[:count]
        assert await library.mounted.read_into(handle, size, memoryview(bytearray(10))) == 0
        return bytes(found)
    finally:
        library.mounted.release(handle)


async def wait_state(library: Library, pipeline: str, *states: str) -> None:
    with trio.fail_after(20):
        while library.pipelines.status(pipeline).state not in states:
            await library.pipelines.wait_changed(pipeline, 1.0)


async def wait_gone(path: Path) -> None:
    with trio.fail_after(10):
        while os.path.exists(path):
            await trio.sleep(0.01)


async def test_reads_through_and_survives_a_restart_without_its_origin(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    expected = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    async with running(tmp_path) as library:
        status = await library.admin.add(spec("p", source))
        assert (status.state, status.cached_bytes, status.generation) == ("cold", 0, 1)
        for name, data in expected.items():
            assert await read_all(library, "p", name) == data
        await wait_state(library, "p", "unverified")
        before = {name: library.mounted.lookup(find(library, "p"), name).nodeid for name in expected}
    for path in source.iterdir():
        if path.is_file():
            path.unlink()
    async with running(tmp_path) as library:
        assert library.pipelines.status("p").state == "unverified"
        for name, data in expected.items():
            assert await read_all(library, "p", name) == data
            assert library.mounted.lookup(find(library, "p"), name).nodeid == before[name]


async def test_looking_is_no_request_and_starts_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        root = find(library, "p")
        for name in library.mounted.list_directory(root):
            nodeid = library.mounted.lookup(root, name).nodeid
            library.mounted.attributes(nodeid)
            library.mounted.xattrs(nodeid)
        assert await read_all(library, "p", "config.json")
        weights = await library.mounted.open(find(library, "p", "model-1-of-2.safetensors"))
        assert await library.mounted.read_into(weights, 0, memoryview(bytearray(4096))) == 4096
        library.mounted.release(weights)
        status = library.pipelines.status("p")
        assert status.last_request is not None  # the open of the weight file
        assert status.state == "partial"
        assert status.fill is None
        cold = library.mounted.lookup(root, "model-2-of-2.safetensors")
        assert cold.blocks == 1
        assert library.mounted.list_directory(find(library, ".cold")) == ["p"]
        assert library.mounted.list_directory(find(library, ".warm")) == []


async def test_reading_beyond_the_header_fills_the_load_set_and_nothing_else(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", "model-1-of-2.safetensors"))
        await library.mounted.read_into(handle, 3 * MIB, memoryview(bytearray(100)))
        library.mounted.release(handle)
        await wait_state(library, "p", "unverified")
        files = {file.path: file.state for file in library.pipelines.status("p").files or ()}
        assert files["pytorch_model.bin"] == "absent"
        assert files["model-2-of-2.safetensors"] == "unverified"
        assert files["sub/ünï code.json"] == "unverified"
        assert library.mounted.list_directory(find(library, ".warm")) == ["p"]


async def test_update_shows_a_new_generation_while_open_files_keep_the_old(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        old = await read_all(library, "p", "config.json")
        held = await library.mounted.open(find(library, "p", "config.json"))
        root = find(library, "p")
        assert (await library.admin.update("p")).generation == 1  # nothing has changed
        os.unlink(source / "config.json")
        (source / "config.json").write_bytes(b"new and different")
        assert (await library.admin.update("p")).generation == 2
        assert find(library, "p") == root
        assert library.mounted.lookup(root, "config.json").nodeid != held.nodeid
        buffer = bytearray(100)
        assert await library.mounted.read_into(held, 0, memoryview(buffer)) == len(old)
        assert bytes(buffer[: len(old)]) == old
        assert await read_all(library, "p", "config.json") == b"new and different"
        library.mounted.release(held)
        await wait_gone(tmp_path / "store/slots/p/1")
        with pytest.raises(NoSuchEntry):
            library.mounted.attributes(held.nodeid)


async def test_evict_refuses_what_is_in_use_and_frees_the_rest(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p", everything=True)
        await wait_state(library, "p", "unverified")
        node = find(library, "p", "model-1-of-2.safetensors")
        held = await library.mounted.open(node)
        with pytest.raises(PipelineBusy):
            await library.admin.evict("p")
        library.mounted.release(held)
        with library.leases.lease("p"), pytest.raises(PipelineBusy):
            await library.admin.evict("p")
        await library.lifecycle.set_pinned("p", True)
        with pytest.raises(PipelineBusy, match="unpin"):
            await library.admin.evict("p")
        await library.lifecycle.set_pinned("p", False)
        await library.admin.evict("p")
        assert library.pipelines.status("p").state == "cold"
        assert not os.path.exists(tmp_path / "store/slots/p/1/files")
        assert find(library, "p", "model-1-of-2.safetensors") != node
        data = (source / "model-1-of-2.safetensors").read_bytes()
        assert await read_all(library, "p", "model-1-of-2.safetensors") == data


async def test_verify_heals_what_rotted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        os.unlink(tmp_path / "store/slots/p/1/files/model-2-of-2.safetensors")
        before = find(library, "p", "model-2-of-2.safetensors")
        seen: list[tuple[int, int]] = []
        report = await library.verifier.verify("p", lambda done, total: seen.append((done, total)))
        assert report.healed == ("model-2-of-2.safetensors",)
        assert seen[-1][0] == seen[-1][1] == report.bytes
        await wait_state(library, "p", "unverified")
        assert find(library, "p", "model-2-of-2.safetensors") != before
        data = (source / "model-2-of-2.safetensors").read_bytes()
        assert await read_all(library, "p", "model-2-of-2.safetensors") == data


async def test_remove_forgets_everything(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        file = FileKey("p", 1, 0)
        for _ in range(MISMATCHES):
            library.filler._quarantine.mismatch(file, trio.current_time())
        await library.admin.remove("p")
        with pytest.raises(PipelineNotFound):
            library.pipelines.status("p")
        with pytest.raises(NoSuchEntry):
            library.mounted.lookup(ROOT, "p")
        assert not os.path.exists(tmp_path / "store/slots/p")
        await library.admin.add(spec("p", source))
        assert library.filler._quarantine.refusal(file, "", trio.current_time()) is None, "its bytes are other ones"
        assert await read_all(library, "p", "config.json") == (source / "config.json").read_bytes()


async def test_bad_requests_change_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        with pytest.raises(PipelineExists):
            await library.admin.add(spec("p", source))
        with pytest.raises(OriginNotFound):
            await library.admin.add(spec("q", tmp_path / "nowhere"))
        with pytest.raises(InvalidName):
            await library.admin.add(PipelineSpec(id="../x", models=(ModelSpec(source=f"file://{source}"),)))
        two = (ModelSpec(source=f"file://{source}"), ModelSpec(source=f"file://{source}", name="a"))
        with pytest.raises(InvalidName):
            await library.admin.add(PipelineSpec(id="q", models=two))
        assert [status.pipeline for status in library.pipelines.list()] == ["p"]


async def test_several_models_under_one_pipeline(tmp_path: Path) -> None:
    one, two = make_source(tmp_path / "one"), make_source(tmp_path / "two")
    async with running(tmp_path) as library:
        models = (ModelSpec(source=f"file://{one}", name="asr"), ModelSpec(source=f"file://{two}", name="llm"))
        await library.admin.add(PipelineSpec(id="agent", models=models))
        assert library.mounted.list_directory(find(library, "agent")) == ["asr", "llm"]
        for name, source in (("asr", one), ("llm", two)):
            data = (source / "model-1-of-2.safetensors").read_bytes()
            assert await read_all(library, "agent", name, "model-1-of-2.safetensors") == data


async def test_least_recently_requested_pipelines_go_when_the_high_watermark_is_passed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=25 * MIB) as library:
        for pipeline in ("oldest", "pinned", "recent"):
            await library.admin.add(spec(pipeline, source))
        await library.lifecycle.set_pinned("pinned", True)
        for pipeline in ("oldest", "pinned"):
            await library.warming.warm(pipeline)
            await wait_state(library, pipeline, "unverified")
        library.admin.touch("pinned")
        await library.warming.warm("recent")
        await wait_state(library, "recent", "unverified")
        await wait_state(library, "oldest", "cold")
        assert library.pipelines.status("pinned").state == "unverified"
        await wait_gone(tmp_path / "store/slots/oldest/1/files")


async def test_hot_pipelines_stay_whatever_the_watermark_says(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path, capacity=10 * MIB, keep_hot=3600.0) as library:
        for pipeline in ("a", "b"):
            await library.admin.add(spec(pipeline, source))
            library.admin.touch(pipeline)
        await library.warming.warm("a")
        await wait_state(library, "a", "unverified")
        with pytest.raises(StoreFull, match=r"store full: needs 8\.5 MB; evictable 0 B; hot: a"):
            await library.warming.warm("b")
        assert await library.evictor.free_space("b") is False
        assert library.pipelines.status("a").state == "unverified"
        assert library.pipelines.status("b").state == "cold"


async def test_a_store_whose_index_was_lost_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
    shutil.rmtree(tmp_path / "store" / "index")
    async with running(tmp_path) as library:
        assert library.pipelines.list() == []
    assert "fsck" in caplog.text


async def test_the_next_open_of_a_complete_file_costs_one_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        library.mounted.use_passthrough(True, lambda nodeid: None)
        await library.admin.add(spec("p", source))
        await library.warming.warm("p", everything=True)
        await wait_state(library, "p", "unverified")
        nodeid = find(library, "p", "pytorch_model.bin")
        library.mounted.release(await library.mounted.open(nodeid))
        asked: list[str] = []
        here = threading.get_ident()  # other threads may have something to finish

        def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def made(*arguments: Any, **keywords: Any) -> Any:
                if threading.get_ident() == here:
                    asked.append(name)
                return call(*arguments, **keywords)

            return made

        with monkeypatch.context() as patch:
            for name in ("stat", "fstat", "lstat", "open", "dup", "readlink", "getxattr"):
                patch.setattr(os, name, watched(name, getattr(os, name)))
            handle = library.mounted.open_nowait(nodeid)
            assert handle is not None
            library.mounted.release(handle)
        assert asked == ["stat"]


async def test_descriptors_of_closed_files_are_kept_for_their_next_open_but_not_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instantstart_fs.serving.open_files.IDLE_READERS", 1)
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        closing: list[int] = []
        library.mounted.use_passthrough(True, closing.append)
        await library.admin.add(spec("p", source))
        await library.warming.warm("p", everything=True)
        await wait_state(library, "p", "unverified")
        names = ["model-1-of-2.safetensors", "pytorch_model.bin"]
        nodeids = [find(library, "p", name) for name in names]
        first = library.mounted.open_nowait(nodeids[0])
        assert first is not None
        backing = first.backing
        library.mounted.release(first)
        again = library.mounted.open_nowait(nodeids[0])
        assert again is not None
        assert (again.backing, closing) == (backing, [])
        library.mounted.release(again)
        other = library.mounted.open_nowait(nodeids[1])
        assert other is not None
        assert closing == []
        library.mounted.release(other)
        assert closing == [nodeids[0]]  # the least recently used
        await library.admin.evict("p")
        assert closing == nodeids


async def test_a_pipeline_that_is_added_again_was_never_requested(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        for _ in range(2):
            await library.admin.add(spec("p", source))
            assert library.pipelines.status("p").last_request is None
            attributes = library.mounted.attributes(find(library, "p", "config.json"))
            assert attributes.atime_ns == attributes.mtime_ns
            library.admin.touch("p")
            assert await read_all(library, "p", "config.json")
            attributes = library.mounted.attributes(find(library, "p", "config.json"))
            assert attributes.atime_ns > attributes.mtime_ns
            await library.admin.remove("p")


@pytest.mark.parametrize(
    "numbers", [{"uid": -1}, {"gid": 2**32 - 1}, {"quota": -1}, {"quota": 2**63}, {"mode": -1}, {"mode": 0o1777}]
)
async def test_numbers_that_no_kernel_can_say_are_refused_whoever_sends_them(
    tmp_path: Path, numbers: dict[str, int]
) -> None:
    async with running(tmp_path) as library:
        with pytest.raises(UsageError):
            await library.admin.add(msgspec.structs.replace(spec("x", make_source(tmp_path / "source")), **numbers))
        assert library.pipelines.list() == []


async def test_how_many_files_there_are_is_told_without_each_of_them(tmp_path: Path) -> None:
    """`add` and `update` say no more; a hundred thousand files would hold up everybody while they are described."""
    source = make_source(tmp_path / "m")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        full, brief = library.pipelines.status("p"), library.pipelines.status("p", with_files=False)
        assert full.files and full.listed is None and brief.files is None and brief.listed is not None
        assert (brief.listed.count, brief.listed.size) == (len(full.files), sum(file.size for file in full.files))
        assert brief.variants == full.variants and brief.brief.listed is None
        assert all(status.listed is None for status in library.pipelines.list())
