"""Which processes have a bound file open: the write lease that tells, and what the library makes of it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instantstart_fs.catalog.model import CachedFile
from instantstart_fs.filler.target import FileKey
from instantstart_fs.library import Library
from instantstart_fs.serving.bindings import BindableFile
from instantstart_fs.serving.open_notifications import NullListener
from instantstart_fs.store.locks import used_elsewhere
from instantstart_fs.store.os_errors import translate
from tests.component.test_full_store import WEIGHTS, fills, running
from tests.component.test_library import find, make_source, spec

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    return path


@contextlib.contextmanager
def descriptor(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_an_open_and_a_mapping_are_seen_and_a_duplicate_is_not(file: Path) -> None:
    with descriptor(file) as own:
        assert not used_elsewhere(own)
        holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[own])
        try:
            assert not used_elsewhere(own), "the same description in another process"
        finally:
            holder.communicate(timeout=10)
        with descriptor(file) as other:
            assert used_elsewhere(own)
            mapped = mmap.mmap(other, 0, access=mmap.ACCESS_READ)
        assert used_elsewhere(own), "closed, and mapped"
        mapped.close()
        assert not used_elsewhere(own)


ASK = """
import os, sys
from instantstart_fs.store.locks import used_elsewhere
own = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
answers = [used_elsewhere(own) for _ in range(30_000)]
print(sum(answers), len(answers))
"""


def test_an_open_that_meets_the_question_is_let_through_and_ends_nobody(file: Path) -> None:
    """Each grant of the lease may be met by an open, which the kernel tells the asker by a signal."""
    asker = subprocess.Popen([sys.executable, "-c", ASK, str(file)], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    assert asker.stdout.readline() == "ready\n"
    opens = 0
    while asker.poll() is None:
        os.close(os.open(file, os.O_RDONLY))
        opens += 1
    assert asker.returncode == 0
    used, asked = map(int, asker.stdout.read().split())
    asker.stdout.close()
    assert opens > 1000
    assert 0 < used < asked, "they did not meet"


class Told(NullListener):
    def __init__(self) -> None:
        self.open: list[FileKey] = []

    def opened(self, key: FileKey) -> None:
        self.open.append(key)

    def released(self, key: FileKey) -> None:
        self.open.remove(key)


async def withdraw(pipeline: str, idle_only: bool) -> None:
    pass


def stored(root: Path, bound: BindableFile) -> Path:
    return root / "store" / "slots" / bound.pipeline / str(bound.generation) / "files" / bound.path


async def test_an_open_keeps_the_pipeline_in_use_until_the_file_is_closed_and_is_told_to_the_listener(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as library:
        bound, told = await bound_file(library, make_source(tmp_path / "source")), Told()
        library.shards.notify_opens(told)
        key = FileKey(bound.pipeline, bound.generation, bound.key)
        in_use = use_of(library, bound.pipeline)
        with descriptor(stored(tmp_path, bound)):
            library.bindings.opened(bound)
            library.bindings.opened(bound)  # ranks of one engine
            assert (told.open, in_use()) == ([key], True)
            library.bindings.poll_release(bound)
            assert (told.open, in_use()) == ([key], True)
            later = Told()
            library.shards.notify_opens(later)
            assert later.open == [key], "what was open before somebody watched"
        library.bindings.poll_releases("another")
        assert in_use()
        library.bindings.poll_releases(bound.pipeline)
        assert (later.open, in_use()) == ([], False)


async def test_what_was_open_before_it_was_bound_is_no_request(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        bound = await bound_file(library, make_source(tmp_path / "source"))
        in_use, before = use_of(library, bound.pipeline), library.pipelines.status(bound.pipeline).last_request
        with descriptor(stored(tmp_path, bound)):
            library.bindings.note_already_open(bound)
            assert in_use()
            assert library.pipelines.status(bound.pipeline).last_request == before
            library.bindings.opened(bound)
            assert library.pipelines.status(bound.pipeline).last_request != before
        library.bindings.attach(None)
        assert not in_use(), "nobody would ask any more"


async def test_an_open_is_counted_once_and_to_its_end_while_there_is_no_descriptor_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as library:
        bound, told = await bound_file(library, make_source(tmp_path / "source")), Told()
        library.shards.notify_opens(told)
        in_use = use_of(library, bound.pipeline)
        with descriptor(stored(tmp_path, bound)):
            with monkeypatch.context() as without:
                without.setattr(library.catalog.store, "existing_blob", no_descriptor)
                library.bindings.opened(bound)
                library.bindings.opened(bound)
                assert library.bindings.poll_releases() == set(), "nobody knows"
                assert (len(told.open), in_use()) == (1, True)
            library.bindings.poll_releases()
            assert in_use()
        with monkeypatch.context() as without:
            without.setattr(library.catalog.store, "existing_blob", no_descriptor)
            assert library.bindings.poll_releases() == {"p"}, "each look opened the file, and told of that"
        assert (told.open, in_use()) == ([], False)
        await library.admin.evict("p")


def no_descriptor(*place: object) -> None:
    raise translate(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "open p/1/file")


async def test_a_descriptor_for_staging_holds_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        bound = await bound_file(library, make_source(tmp_path / "source"))
        fd = library.shards.open_stored(FileKey(bound.pipeline, bound.generation, bound.key))
        try:
            assert not library.bindings.in_use(bound)
            with descriptor(stored(tmp_path, bound)):
                assert library.bindings.in_use(bound)
        finally:
            os.close(fd)


class Unwalked(list[CachedFile]):
    """The files of a generation too large to be walked over at an open."""

    def __iter__(self) -> Iterator[CachedFile]:
        raise AssertionError("all files are looked at")


async def test_what_two_generations_share_is_open_once_and_found_without_a_walk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await bound_file(library, source)
        held = await library.mounted.open(find(library, "p", WEIGHTS))
        await library.mounted.read_into(held, 0, memoryview(bytearray(16)))
        (source / "config.json").write_bytes(b"another")
        (source / "new.safetensors").write_bytes(b"of this generation only")
        assert (await library.admin.update("p")).generation == 2
        await fills(library, "p")
        pipeline = library.catalog.pipeline("p")
        (draining,) = pipeline.draining
        draining.files = Unwalked(draining.files)
        for name in (WEIGHTS, "new.safetensors"):
            bound = library.bindings.files("p")[name]
            assert bound.generation == 2
            handle = await library.mounted.open(find(library, "p", name))
            await library.mounted.read_into(handle, 0, memoryview(bytearray(16)))
            assert not library.bindings.in_use(bound), "by two descriptions of this daemon"
            library.mounted.release(handle)
        draining.files = list(list.__iter__(draining.files))
        library.mounted.release(held)


async def bound_file(library: Library, source: Path) -> BindableFile:
    library.bindings.attach(withdraw)
    await library.admin.add(spec("p", source))
    await fills(library, "p")
    return library.bindings.files("p")[WEIGHTS]


def use_of(library: Library, pipeline: str) -> Callable[[], bool]:
    return lambda: library.catalog.pipeline(pipeline).in_use
