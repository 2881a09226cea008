"""What is wanting for a moment (descriptors, memory, room, a signal) is not what is wrong with a pipeline's bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.catalog import reader
from instantstart_fs.catalog.model import UnloadedGeneration
from instantstart_fs.core.manifest import Manifest
from instantstart_fs.errors import OutOfMemory, OutOfResources, StoreDamaged, StoreError, StoreFull
from instantstart_fs.index.environment import Index
from instantstart_fs.store import os_errors
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.metadata import SlotMetadata
from instantstart_fs.upkeep.fsck import fsck
from tests.component.test_full_store import WEIGHTS, fills, running
from tests.component.test_library import find, make_source, read_all, spec
from tests.component.test_residency import checkpoint


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EMFILE, OutOfResources),
        (errno.ENFILE, OutOfResources),
        (errno.EINTR, OutOfResources),
        (errno.EAGAIN, OutOfResources),
        (errno.EBUSY, OutOfResources),
        (errno.ENOMEM, OutOfMemory),
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, StoreDamaged),
        (errno.EUCLEAN, StoreDamaged),
        (errno.EACCES, StoreError),
    ],
)
def test_the_one_list_of_what_passes(number: int, kind: type[StoreError]) -> None:
    found = os_errors.translate(OSError(number, os.strerror(number)), "read x")
    assert type(found) is kind
    assert os_errors.passing(number) is (kind in (OutOfResources, OutOfMemory, StoreFull))


@pytest.fixture
def stumbling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The errnos that the next preadv(2) of blocking reads fail with."""
    numbers: list[int] = []
    original = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if numbers:
            number = numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return original(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    yield numbers


async def test_one_io_error_is_read_again_and_two_are_damage(tmp_path: Path, stumbling: list[int]) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await fills(library, "p")
        handle = await library.mounted.open(find(library, "p", WEIGHTS))
        buffer = memoryview(bytearray(4096))
        for numbers in ([errno.EIO], []):
            stumbling[:] = numbers
            assert await library.mounted.read_into(handle, 0, buffer) == 4096
            assert bytes(buffer) == (source / WEIGHTS).read_bytes()[:4096]
        stumbling[:] = [errno.ENOMEM]
        with pytest.raises(OutOfMemory):
            await library.mounted.read_into(handle, 0, buffer)
        assert await library.mounted.read_into(handle, 0, buffer) == 4096, "a want of memory is no damage"
        stumbling[:] = [errno.EIO, errno.EIO]
        with pytest.raises(StoreDamaged):
            await library.mounted.read_into(handle, 0, buffer)
        library.mounted.release(handle)
        await fills(library, "p")
        assert await read_all(library, "p", WEIGHTS) == (source / WEIGHTS).read_bytes()


async def test_what_cannot_be_read_now_is_read_later_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PATIENCE_SECONDS", 0.0)
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await fills(library, "p")
        await checkpoint(library)
    wanting = [100]
    original = SlotMetadata.load_manifest

    def load_manifest(metadata: SlotMetadata, pipeline: str, generation: int) -> Manifest:
        if wanting[0]:
            wanting[0] -= 1
            raise OutOfResources("read manifest.json: no descriptor is left")
        return original(metadata, pipeline, generation)

    monkeypatch.setattr(SlotMetadata, "load_manifest", load_manifest)
    async with running(tmp_path) as library:
        with pytest.raises(OutOfResources):
            await library.pipelines.ensure_loaded("p")
        assert isinstance(library.catalog.pipelines["p"].head, UnloadedGeneration)
        assert library.catalog.pipelines["p"].current is None
        (status,) = library.pipelines.list()
        assert status.state == "unverified" and status.error is not None and status.error.code == "out-of-resources"
        wanting[0] = 3
        await library.pipelines.ensure_loaded("p")
        assert library.pipelines.status("p").error is None
        assert await read_all(library, "p", WEIGHTS) == (source / WEIGHTS).read_bytes()


def test_fsck_removes_nothing_for_want_of_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    with BlobStore.open(str(root)) as store, Index.open(store.layout.index) as index:
        store.metadata.write_pipeline(spec("p", tmp_path))

        def refuse(self: SlotMetadata, pipeline: str) -> None:
            raise OutOfResources("read pipeline.json: no descriptor is left")

        monkeypatch.setattr(SlotMetadata, "load_pipeline", refuse)
        with pytest.raises(OutOfResources):
            fsck(store, index)
    assert (root / "slots/p/pipeline.json").exists()
