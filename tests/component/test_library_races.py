"""What happens to a pipeline in the middle of something else: at each await the world may have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs.catalog.model import Generation
from instantstart_fs.catalog.residency import is_clean
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.errors import FillCancelled, NoSuchEntry, PipelineBusy, StoreError
from instantstart_fs.index.schema import FileRecord
from instantstart_fs.library import Library
from instantstart_fs.origins.base import Origin
from instantstart_fs.store.blobstore import BlobStore
from tests.component.test_full_store import blocks
from tests.component.test_library import MIB, find, make_source, read_all, running, spec, wait_state

pytestmark = pytest.mark.timeout(60)


class Gate:
    """Holds a blocking call until it is let go. ``once``: the first one alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, once: bool = False) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        original: Callable[..., Any] = getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            if not (once and self.entered.is_set()):
                self.entered.set()
                assert self.go.wait(20)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)

    async def reached(self) -> None:
        with trio.fail_after(10):
            while not self.entered.is_set():
                await trio.sleep(0.002)


async def test_reading_another_file_does_not_stop_the_load_set(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        handle = await library.mounted.open(find(library, "p", "pytorch_model.bin"))
        assert await library.mounted.read_into(handle, MIB, memoryview(bytearray(4096))) == 4096
        library.mounted.release(handle)
        await wait_state(library, "p", "unverified")


async def test_a_warm_that_an_eviction_overtakes_fills_nothing_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        gate = Gate(monkeypatch, Generation, "origin")

        async def warm() -> None:
            with pytest.raises(FillCancelled):
                await library.warming.warm("p")

        nursery.start_soon(warm)
        await gate.reached()
        await library.admin.evict("p")
        gate.go.set()
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert library.pipelines.status("p").fill is None
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")


async def test_what_is_being_verified_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        gate = Gate(monkeypatch, BlobStore, "existing_blob")
        healed: list[tuple[str, ...]] = []

        async def verify() -> None:
            healed.append((await library.verifier.verify("p", lambda done, total: None)).healed)

        nursery.start_soon(verify)
        await gate.reached()
        with pytest.raises(PipelineBusy):
            await library.admin.evict("p")
        gate.go.set()
        with trio.fail_after(10):
            while not healed:
                await trio.sleep(0.01)
        assert healed == [()]
        await library.admin.evict("p")


async def test_an_update_during_verify_drops_the_old_generation_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        gate = Gate(monkeypatch, BlobStore, "existing_blob", once=True)
        nursery.start_soon(library.verifier.verify, "p", lambda done, total: None)
        await gate.reached()
        (source / "config.json").write_bytes(b'{"a": 2}')
        assert (await library.admin.update("p")).generation == 2
        assert (tmp_path / "store/slots/p/1").exists()
        gate.go.set()
        with trio.fail_after(10):
            while (tmp_path / "store/slots/p/1").exists():
                await trio.sleep(0.01)


async def test_many_readers_of_a_lost_file_have_it_dropped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    name = "model-2-of-2.safetensors"
    deleted: list[str] = []
    original = BlobStore.delete_blob

    def counted(store: BlobStore, pipeline: str, generation: int, path: str) -> None:
        deleted.append(path)
        original(store, pipeline, generation, path)

    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        (tmp_path / "store/slots/p/1/files" / name).unlink()
        monkeypatch.setattr(BlobStore, "delete_blob", counted)
        node = find(library, "p", name)

        async def read() -> None:
            with pytest.raises(NoSuchEntry):  # the kernel looks the name up again, and finds another file
                await library.mounted.open(node)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
        assert deleted == [name]
        await wait_state(library, "p", "unverified")
        assert await read_all(library, "p", name) == (source / name).read_bytes()


async def test_a_complete_file_without_its_seal_is_not_believed(tmp_path: Path) -> None:
    """An index that says sealed over a file that was not: a sparse file in its place would read as zeros."""
    source = make_source(tmp_path / "source")
    name = "model-2-of-2.safetensors"
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
    stored = tmp_path / "store/slots/p/1/files" / name
    stored.unlink()
    with stored.open("wb") as file:
        file.truncate(3 * MIB)
    async with running(tmp_path) as library:
        with pytest.raises(NoSuchEntry):
            await read_all(library, "p", name)
        await wait_state(library, "p", "unverified")
        assert await read_all(library, "p", name) == (source / name).read_bytes()


async def test_an_old_generation_that_cannot_be_deleted_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")

    def refuse(store: BlobStore, pipeline: str, generation: int) -> None:
        raise StoreError("the disk does not let go")

    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", "config.json"))
        (source / "config.json").write_bytes(b'{"a": 2}')
        await library.admin.update("p")
        monkeypatch.setattr(BlobStore, "delete_generation", refuse)
        library.mounted.release(handle)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert await read_all(library, "p", "config.json") == b'{"a": 2}'
        await library.admin.update("p")
        (source / "config.json").write_bytes(b'{"a": 3}')
        assert (await library.admin.update("p")).generation == 3
    async with running(tmp_path) as library:  # nor does it keep the daemon from starting
        assert await read_all(library, "p", "config.json") == b'{"a": 3}'


async def test_origins_that_hang_hold_up_no_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    name = "model-2-of-2.safetensors"
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        expected = await read_all(library, "p", name)
        release = threading.Event()

        class Hanging:
            def resolve(self) -> None:
                release.wait(20)

        def hang(spec: object, model: ModelSpec) -> Origin:
            return Hanging()  # type: ignore[return-value]

        monkeypatch.setattr(library.catalog, "open_origin", hang)
        monkeypatch.setattr(type(library.open_files), "read_cached", lambda *_: 0)  # the page cache is empty
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(_add_in_vain, library, f"q{number}", source)
            await trio.testing.wait_all_tasks_blocked(0.2)
            try:
                with trio.fail_after(5):
                    assert await read_all(library, "p", name) == expected
            finally:
                release.set()
                nursery.cancel_scope.cancel()


async def _add_in_vain(library: Library, pipeline: str, source: Path) -> None:
    with trio.move_on_after(15):
        await library.admin.add(spec(pipeline, source))


async def test_a_partly_filled_file_that_vanished_is_forgotten_before_another_takes_its_place(tmp_path: Path) -> None:
    """Killed before the first commit of the new file, the old record would vouch for chunks that are holes in it."""
    source = make_source(tmp_path / "source")
    name = "pytorch_model.bin"
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", name))
        await library.mounted.read_into(handle, 0, memoryview(bytearray(4096)))
        library.mounted.release(handle)
    stored = tmp_path / "store/slots/p/1/files" / name
    stored.unlink()
    async with running(tmp_path) as library:
        index = library.index
        (file,) = [file for file in library.pipelines.status("p").files or () if file.path == name]
        assert 0 < file.cached_bytes < file.size, "it is partly filled, as far as the index knows"
        records: list[dict[int, FileRecord]] = []
        real = library.store.blob

        def watched(*where: object) -> object:
            assert not stored.exists()
            records.append(index.read(lambda txn: dict(txn.files("p", 1))))
            return real(*where)  # type: ignore[arg-type]

        library.store.blob = watched  # type: ignore[method-assign, assignment]
        assert await read_all(library, "p", name) == (source / name).read_bytes()
        assert [record.bitmap for record in records[0].values()] == [b""]
        assert await fills_to_the_end(library, name) == os.stat(source / name).st_size
    async with running(tmp_path) as library:
        assert library.catalog.pipelines["p"].allocated == blocks(tmp_path, "p")


async def test_a_read_of_what_was_removed_changes_nothing_of_what_has_its_name_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", "pytorch_model.bin"))
        await library.admin.remove("p")
        await library.admin.add(spec("p", source))
        with pytest.raises(FillCancelled, match="was removed"):
            await library.mounted.read_into(handle, MIB, memoryview(bytearray(4096)))
        assert library.index.read(lambda txn: set(txn.summarized())) == {"p"}
        library.mounted.release(handle)


async def test_while_a_fill_is_prepared_nothing_is_summarized_nor_written_for_what_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    name = "pytorch_model.bin"
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(find(library, "p", name))
        await library.mounted.read_into(handle, 0, memoryview(bytearray(4096)))
        library.mounted.release(handle)
    (tmp_path / "store/slots/p/1/files" / name).unlink()
    async with running(tmp_path) as library, trio.open_nursery() as nursery:
        handle = await library.mounted.open(find(library, "p", name))
        assert handle.file.bitmap
        gate = Gate(monkeypatch, BlobStore, "existing_blob")
        forgotten: list[object] = []
        monkeypatch.setattr("instantstart_fs.catalog.slots._forget_bitmap", lambda *what: forgotten.append(what))

        async def read() -> None:
            with pytest.raises(FillCancelled, match="was removed"):
                await library.mounted.read_into(handle, MIB, memoryview(bytearray(4096)))

        nursery.start_soon(read)
        await gate.reached()
        assert not is_clean(library.catalog.pipelines["p"])
        await library.admin.remove("p")
        await library.admin.add(spec("p", source))
        gate.go.set()
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not forgotten
        library.mounted.release(handle)


async def fills_to_the_end(library: Library, name: str) -> int:
    """Bytes that are cached of it, once it is complete."""
    with trio.fail_after(20):
        while True:
            (file,) = [file for file in library.pipelines.status("p").files or () if file.path == name]
            if file.state in ("sealed", "unverified"):
                return file.cached_bytes
            await trio.sleep(0.005)
