"""The request handlers against a fake View: what they translate, and that nothing but FUSEError leaves them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable

import pytest
import trio

from instantstart_fs.mount import operations as module
from instantstart_fs.mount.fuse_types import Entry, FUSEError
from instantstart_fs.mount.operations import (
    CHANGING_TIMEOUT,
    READ_BUFFER,
    STABLE_NEGATIVE_TIMEOUT,
    STABLE_TIMEOUT,
    Operations,
    entry_attributes,
)
from instantstart_fs.vfs import ROOT
from tests.fuse.fake_view import CTX, FakeView, content, errno_of


async def _errno(request: Awaitable[object]) -> int:
    return await errno_of(request, FUSEError)


@pytest.fixture
def view() -> FakeView:
    return FakeView()


@pytest.fixture
def operations(view: FakeView) -> Operations:
    return Operations(view, _Listing.reply)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_APPEND, os.O_RDWR | os.O_CREAT])
async def test_open_for_writing_is_refused_and_opens_nothing(
    view: FakeView, operations: Operations, flags: int
) -> None:
    file = view.add(ROOT, "f", size=1)
    assert await _errno(operations.open(file, flags)) == errno.EROFS
    assert view.open_files == []


async def test_lookup_and_getattr_show_the_same(view: FakeView, operations: Operations) -> None:
    file = view.add(ROOT, "f", size=1234)
    looked_up = await operations.lookup(ROOT, b"f", CTX)
    attributes = await operations.getattr(file, CTX)
    assert looked_up == attributes
    assert looked_up.st_ino == looked_up.nodeid == file
    assert looked_up.st_size == 1234
    assert looked_up.st_blocks == 3
    assert looked_up.st_mtime_ns == 1_600_000_000_123_456_789


@pytest.mark.parametrize(("stable", "timeout"), [(True, STABLE_TIMEOUT), (False, CHANGING_TIMEOUT)])
def test_timeouts_follow_stability(view: FakeView, stable: bool, timeout: float) -> None:
    entry = entry_attributes(view.nodes[view.add(ROOT, "f", stable=stable)])
    assert entry.attr_timeout == entry.entry_timeout == timeout


async def test_absent_names_are_remembered_by_the_kernel(view: FakeView, operations: Operations) -> None:
    directory = view.add(ROOT, "d", "dir", stable=True)
    changing = view.add(ROOT, "e", "dir", stable=False)
    for parent, timeout in ((ROOT, CHANGING_TIMEOUT), (directory, STABLE_NEGATIVE_TIMEOUT), (changing, 1.0)):
        entry = await operations.lookup(parent, b"absent", CTX)
        assert entry.st_ino == 0
        assert entry.entry_timeout == timeout


async def test_lookup_in_a_directory_that_is_gone_is_stale(operations: Operations) -> None:
    assert await _errno(operations.lookup(999_999, b"x", CTX)) == errno.ESTALE


async def test_a_name_too_long_never_reaches_the_library(view: FakeView, operations: Operations) -> None:
    assert await _errno(operations.lookup(ROOT, b"n" * 256, CTX)) == errno.ENAMETOOLONG
    assert view.calls == []


async def test_names_that_are_not_utf8_survive(view: FakeView, operations: Operations) -> None:
    file = view.add(ROOT, b"\xff\xfe".decode("utf-8", "surrogateescape"))
    assert (await operations.lookup(ROOT, b"\xff\xfe", CTX)).st_ino == file


async def test_a_node_that_is_gone_is_stale(operations: Operations) -> None:
    assert await _errno(operations.getattr(999_999, CTX)) == errno.ESTALE
    assert await _errno(operations.open(999_999, os.O_RDONLY)) == errno.ESTALE
    assert await _errno(operations.opendir(999_999, CTX)) == errno.ESTALE


async def test_xattrs(view: FakeView, operations: Operations) -> None:
    file = view.add(ROOT, "f")
    assert await operations.getxattr(file, b"user.instantstart.state") == b"warm"
    assert await operations.getxattr(file, b"user.instantstart.error") == b""
    assert await _errno(operations.getxattr(file, b"user.other")) == errno.ENODATA
    assert await _errno(operations.getxattr(file, b"security.selinux")) == errno.ENOTSUP
    assert list(await operations.listxattr(file, CTX)) == [b"user.instantstart.state", b"user.instantstart.error"]


async def test_statfs_is_the_stores(operations: Operations) -> None:
    data = await operations.statfs()
    assert data.f_blocks * data.f_bsize == 1 << 40
    assert data.f_bavail * data.f_bsize == 1 << 39
    assert data.f_namemax == 255


async def test_readlink(view: FakeView, operations: Operations) -> None:
    link = view.add(ROOT, "l", "symlink", link="../ü")
    assert await operations.readlink(link, CTX) == "../ü".encode()


async def test_opens_keep_the_page_cache(view: FakeView, operations: Operations) -> None:
    info = await operations.open(view.add(ROOT, "f", size=10), os.O_RDONLY | os.O_DIRECT)
    assert info.keep_cache


async def test_reads_are_short_only_at_the_end(view: FakeView, operations: Operations) -> None:
    size = 3 * READ_BUFFER + 5
    handle = (await operations.open(view.add(ROOT, "f", size=size), os.O_RDONLY)).fh
    for offset, length in (
        (0, 4096),
        (1, 1),
        (READ_BUFFER - 1, READ_BUFFER),
        (0, size + 10),
        (size - 3, 4096),
        (size, 9),
    ):
        assert bytes(await operations.read(handle, offset, length)) == content(
            offset, max(0, min(length, size - offset))
        )


async def test_concurrent_reads_do_not_share_a_buffer(view: FakeView, operations: Operations) -> None:
    handle = (await operations.open(view.add(ROOT, "slow", size=1 << 24), os.O_RDONLY)).fh
    wrong = []

    async def check(offset: int) -> None:
        data = await operations.read(handle, offset, 65536)
        # As a session does: looked at before any checkpoint.
        if bytes(data) != content(offset, 65536):
            wrong.append(offset)

    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for i in range(64):
                nursery.start_soon(check, i * 70_001)
    assert wrong == []
    assert len(operations._buffers._idle) == module.IDLE_BUFFERS


async def test_a_cancelled_reads_buffer_is_not_used_again(view: FakeView, operations: Operations) -> None:
    """Whoever was filling it may still be doing so."""
    handle = (await operations.open(view.add(ROOT, "stuck", size=100), os.O_RDONLY)).fh
    with trio.move_on_after(0) as scope:
        await operations.read(handle, 0, 10)
    assert scope.cancelled_caught
    assert not any(view.stuck.values())
    assert operations._buffers._idle == []


@pytest.mark.parametrize(("name", "number"), [("fails-read", errno.EIO), ("fails-base", errno.EIO)])
async def test_errors_of_the_tree_become_their_errno(
    view: FakeView, operations: Operations, name: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    handle = (await operations.open(view.add(ROOT, name, size=1), os.O_RDONLY)).fh
    with caplog.at_level(logging.WARNING):
        assert await _errno(operations.read(handle, 0, 10)) == number
    assert "as asked" in caplog.text
    assert "Traceback" not in caplog.text


async def test_anything_else_is_eio_with_a_traceback(
    view: FakeView, operations: Operations, caplog: pytest.LogCaptureFixture
) -> None:
    assert await _errno(operations.lookup(ROOT, b"bug", CTX)) == errno.EIO
    assert "ZeroDivisionError: a bug in lookup" in caplog.text


async def test_a_handle_of_an_earlier_daemon_whose_file_is_gone(operations: Operations) -> None:
    assert await _errno(operations.read(12345, 0, 10)) == errno.ESTALE
    await operations.release(12345)
    await operations.releasedir(12345)
    assert operations.open_handles == 0


async def test_a_failed_open_leaves_no_handle(view: FakeView, operations: Operations) -> None:
    assert await _errno(operations.open(view.add(ROOT, "fails-open"), os.O_RDONLY)) == errno.EIO
    assert operations.open_handles == 0


async def test_handles_are_given_back(view: FakeView, operations: Operations) -> None:
    for name in ("f", "fails-release"):
        handle = (await operations.open(view.add(ROOT, name), os.O_RDONLY)).fh
        assert operations.open_handles == 1
        if name == "f":
            await operations.release(handle)
        else:
            assert await _errno(operations.release(handle)) == errno.EIO
        assert view.open_files == []
        assert operations.open_handles == 0


class _Listing:
    """Stands for the kernel's side of readdir, and is its token: takes ``room`` entries a call."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.entries: list[tuple[bytes, int, int]] = []
        self.left = 0

    def reply(self, name: bytes, entry: Entry, cursor: int) -> bool:
        if self.left == 0:
            return False
        self.left -= 1
        self.entries.append((name, entry.st_ino, cursor))
        return True

    async def ask(self, operations: Operations, handle: int, cursor: int) -> int:
        self.left = self.room
        await operations.readdir(handle, cursor, self)
        return self.entries[-1][2] if self.entries else 0


async def test_a_listing_survives_changes_made_meanwhile(view: FakeView, operations: Operations) -> None:
    directory = view.add(ROOT, "d", "dir")
    for i in range(10):
        view.add(directory, f"n{i}")
    listing = _Listing(room=4)
    handle = await operations.opendir(directory, CTX)
    cursor = await listing.ask(operations, handle, 0)
    view.remove(directory, "n0")
    view.remove(directory, "n5")
    view.add(directory, "late")
    replaced = view.add(directory, "n7")
    while True:
        before = len(listing.entries)
        cursor = await listing.ask(operations, handle, cursor)
        if len(listing.entries) == before:
            break
    names = [name.decode() for name, _, _ in listing.entries]
    assert names == ["n0", "n1", "n2", "n3", "n4", "n6", "n7", "n8", "n9"]
    # What is sent is what a lookup would say now, for the kernel keeps it.
    assert {name: node for name, node, _ in listing.entries}[b"n7"] == replaced
    listing.entries.clear()
    await listing.ask(operations, handle, 0)
    listing.room = 100
    await listing.ask(operations, handle, listing.entries[-1][2])
    assert [name for name, _, _ in listing.entries][-1] == b"late"
    await operations.releasedir(handle)
    assert operations.open_handles == 0
