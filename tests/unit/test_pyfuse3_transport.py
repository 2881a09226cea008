"""What pyfuse3 gets of the request handlers: its own objects, its own error, and an answer to every request."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from collections.abc import Awaitable

import pyfuse3
import pytest

from instantstart_fs.mount.operations import STABLE_TIMEOUT, Operations
from instantstart_fs.mount.pyfuse3_transport import Handlers, _reply_directory
from instantstart_fs.vfs import ROOT
from tests.fuse.fake_view import CTX, FakeView, content, errno_of


async def _errno(request: Awaitable[object]) -> int:
    return await errno_of(request, pyfuse3.FUSEError)


@pytest.fixture
def view() -> FakeView:
    return FakeView()


@pytest.fixture
def handlers(view: FakeView) -> Handlers:
    return Handlers(Operations(view, _reply_directory))


WRITES = [
    "create", "link", "mkdir", "mknod", "removexattr", "rename", "rmdir", "setattr", "setxattr", "symlink", "unlink",
    "write",
]  # fmt: skip
SILENT = ["access", "flush", "fsync", "fsyncdir", "poll"]


def test_every_handler_of_pyfuse3_is_accounted_for() -> None:
    """A handler that a new pyfuse3 brings must be decided upon, not inherited."""
    handlers = {n for n, f in inspect.getmembers(pyfuse3.Operations, inspect.iscoroutinefunction)}
    answered = {n for n in handlers if n in vars(Handlers)}
    assert handlers - answered == set(SILENT)
    assert set(WRITES) < answered


@pytest.mark.parametrize("name", WRITES)
async def test_writes_are_refused(handlers: Handlers, name: str) -> None:
    count = len(inspect.signature(getattr(pyfuse3.Operations, name)).parameters) - 1
    assert await _errno(getattr(handlers, name)(*[None] * count)) == errno.EROFS


@pytest.mark.parametrize("name", SILENT)
async def test_what_needs_no_daemon_is_enosys_so_that_the_kernel_stops_asking(handlers: Handlers, name: str) -> None:
    count = len(inspect.signature(getattr(pyfuse3.Operations, name)).parameters) - 1
    assert await _errno(getattr(handlers, name)(*[None] * count)) == errno.ENOSYS


async def test_attributes_arrive_field_by_field(view: FakeView, handlers: Handlers) -> None:
    file = view.add(ROOT, "f", size=1234, stable=True)
    looked_up = await handlers.lookup(ROOT, b"f", CTX)
    ours = await handlers._operations.getattr(file, CTX)
    assert looked_up.__getstate__() == (await handlers.getattr(file, CTX)).__getstate__()
    names = [name for name in ours.__struct_fields__ if name.startswith("st_")]
    assert {name: getattr(looked_up, name) for name in names} == {name: getattr(ours, name) for name in names}
    assert (looked_up.st_ino, looked_up.st_size, looked_up.st_mtime_ns) == (file, 1234, 1_600_000_000_123_456_789)
    assert (looked_up.generation, looked_up.entry_timeout, looked_up.attr_timeout) == (
        0,
        STABLE_TIMEOUT,
        STABLE_TIMEOUT,
    )


async def test_an_absent_name_has_no_inode_and_is_remembered(handlers: Handlers) -> None:
    absent = await handlers.lookup(ROOT, b"absent", CTX)
    assert absent.st_ino == 0
    assert absent.entry_timeout == 1.0


async def test_statfs_is_the_stores(handlers: Handlers) -> None:
    data = await handlers.statfs(CTX)
    assert (data.f_blocks * data.f_frsize, data.f_bavail * data.f_bsize, data.f_namemax) == (1 << 40, 1 << 39, 255)


async def test_a_file_is_opened_read_and_released(view: FakeView, handlers: Handlers) -> None:
    info = await handlers.open(view.add(ROOT, "f", size=10), os.O_RDONLY, CTX)
    assert (info.keep_cache, info.direct_io, info.nonseekable) == (True, False, False)
    assert bytes(await handlers.read(info.fh, 0, 20)) == content(0, 10)
    await handlers.release(info.fh)
    assert view.open_files == []
    await handlers.forget([(1, 1), (999_999, 5)])


async def test_names_and_xattrs(view: FakeView, handlers: Handlers) -> None:
    file, link = view.add(ROOT, "f"), view.add(ROOT, "l", "symlink", link="../\u00fc")
    assert await handlers.readlink(link, CTX) == "../\u00fc".encode()
    assert await handlers.getxattr(file, b"user.instantstart.state", CTX) == b"warm"
    assert b"user.instantstart.state" in await handlers.listxattr(file, CTX)
    directory = await handlers.opendir(ROOT, CTX)
    await handlers.releasedir(directory)
    assert handlers._operations.open_handles == 0


async def test_an_errno_is_pyfuse3s(handlers: Handlers) -> None:
    assert await _errno(handlers.getattr(999_999, CTX)) == errno.ESTALE
    assert await _errno(handlers.open(999_999, os.O_RDONLY, CTX)) == errno.ESTALE
    assert await _errno(handlers.read(12345, 0, 10)) == errno.ESTALE


async def test_attributes_that_pyfuse3_does_not_take_are_eio(
    view: FakeView, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """pyfuse3 would leave the request without an answer."""
    file = view.add(ROOT, "f", size=1 << 80)
    assert await _errno(handlers.getattr(file, CTX)) == errno.EIO
    assert "OverflowError" in caplog.text


def test_passthrough_needs_no_pyfuse3() -> None:
    program = "import sys; from instantstart_fs.mount import session, devfuse; print('pyfuse3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
