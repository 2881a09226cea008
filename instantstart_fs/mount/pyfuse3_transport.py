"""Serves a mount by pyfuse3: the transport for machines without FUSE passthrough.

It also takes pyfuse3's own edges off (``_steadied_loop``): a request that is withdrawn between poll and read must not
block the whole event loop, and no exception from inside pyfuse3 may end the mount. pyfuse3 keeps its session in module
globals, so a process can serve one such mount at a time.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel
from instantstart_fs.mount.fuse_types import Entry, FUSEError
from instantstart_fs.mount.operations import Operations
from instantstart_fs.mount.transport import MountSettings
from instantstart_fs.vfs import Invalidation, Vfs

log = logging.getLogger(__name__)


_P = ParamSpec("_P")
_T = TypeVar("_T")
_Handler = Callable[Concatenate["Handlers", _P], Coroutine[Any, Any, _T]]


def _with_its_error(handler: _Handler[_P, _T]) -> _Handler[_P, _T]:
    """Raise pyfuse3's FUSEError for ours. It answers no request that ends in another exception: that one is EIO."""

    @functools.wraps(handler)
    async def translated(self: Handlers, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception as error:
            log.exception("%s: its answer is none that pyfuse3 takes; its caller sees EIO", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return translated


def _attributes(entry: Entry) -> pyfuse3.EntryAttributes:
    made = pyfuse3.EntryAttributes()
    made.st_ino = pyfuse3.InodeT(entry.st_ino)
    made.generation = 0
    made.entry_timeout = entry.entry_timeout
    made.attr_timeout = entry.attr_timeout
    made.st_mode = pyfuse3.ModeT(entry.st_mode)
    made.st_nlink = entry.st_nlink
    made.st_uid = entry.st_uid
    made.st_gid = entry.st_gid
    made.st_size = entry.st_size
    made.st_blksize = entry.st_blksize
    made.st_blocks = entry.st_blocks
    made.st_atime_ns = entry.st_atime_ns
    made.st_mtime_ns = entry.st_mtime_ns
    made.st_ctime_ns = entry.st_ctime_ns
    return made


def _reply_directory(token: pyfuse3.ReaddirToken, name: bytes, entry: Entry, next_id: int) -> bool:
    return pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), _attributes(entry), next_id)


class Handlers(pyfuse3.Operations):
    """``Operations`` as pyfuse3 calls them, and answers in its objects. Nothing else is done here.

    flush, fsync, access and poll stay pyfuse3's ENOSYS: the kernel remembers it and never asks again.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @_with_its_error
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _attributes(await self._operations.lookup(parent_inode, name, ctx))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing: there is nothing to free. Nothing here may fail, since pyfuse3 catches no error of it, not even
        FUSEError."""

    @_with_its_error
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _attributes(await self._operations.getattr(inode, ctx))

    @_with_its_error
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._operations.readlink(inode, ctx)

    @_with_its_error
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = await self._operations.statfs()
        made = pyfuse3.StatvfsData()
        made.f_bsize = made.f_frsize = found.f_bsize
        made.f_blocks = found.f_blocks
        made.f_bfree = made.f_bavail = found.f_bavail
        made.f_files = found.f_files
        made.f_ffree = made.f_favail = 0
        made.f_namemax = found.f_namemax
        return made

    @_with_its_error
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._operations.getxattr(inode, name)

    @_with_its_error
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return await self._operations.listxattr(inode, ctx)

    @_with_its_error
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return await self._operations.opendir(inode, ctx)

    @_with_its_error
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self._operations.readdir(fh, start_id, token)

    @_with_its_error
    async def releasedir(self, fh: int) -> None:
        await self._operations.releasedir(fh)

    @_with_its_error
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        opened = await self._operations.open(inode, flags)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(opened.fh), keep_cache=opened.keep_cache)

    @_with_its_error
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._operations.read(fh, off, size)  # type: ignore[return-value]  # any buffer; its stub says bytes

    @_with_its_error
    async def release(self, fh: int) -> None:
        await self._operations.release(fh)

    async def _refuse(self, /, *args: object, **kwargs: object) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    setattr = _refuse
    mknod = _refuse
    mkdir = _refuse
    unlink = _refuse
    rmdir = _refuse
    symlink = _refuse
    rename = _refuse
    link = _refuse
    create = _refuse
    write = _refuse
    setxattr = _refuse
    removexattr = _refuse


class Pyfuse3Transport:
    """A ``Transport``. See the module."""

    name = "pyfuse3"

    def __init__(self, view: Vfs, settings: MountSettings) -> None:
        self._operations = Operations(view, _reply_directory)
        self._settings = settings
        self._open = False

    @property
    def requests(self) -> Mapping[str, int]:
        return self._operations.requests

    def mount(self, path: str, *, fsname: str, subtype: str, allow_other: bool) -> None:
        options = {"ro", "nosuid", "nodev", "default_permissions", f"fsname={fsname}", f"subtype={subtype}"}
        if allow_other:
            options.add("allow_other")
        before = kernel.fuse_descriptors()
        try:
            pyfuse3.init(Handlers(self._operations), path, options)
        except RuntimeError as error:
            if "fuse_session_mount" in str(error):
                pyfuse3.close(unmount=False)  # libfuse holds a session; there is no mount
            raise MountFailed(f"cannot mount at {path}: {error} ({why_not_mounted()})") from error
        self._open = True
        for descriptor in kernel.fuse_descriptors() - before:
            # See _steadied_loop.
            os.set_blocking(descriptor, False)

    async def main(self) -> None:
        _steady_pyfuse3()
        await pyfuse3.main(min_tasks=self._settings.idle_tasks, max_tasks=self._settings.max_tasks)

    def send(self, invalidation: Invalidation) -> None:
        if invalidation.name is not None:
            pyfuse3.invalidate_entry(invalidation.parent, invalidation.name.encode("utf-8", "surrogateescape"))
        if invalidation.nodeid is not None:
            pyfuse3.invalidate_inode(invalidation.nodeid, attr_only=not invalidation.listing)

    def close(self) -> None:
        if self._open:
            self._open = False
            # It was unmounted before; libfuse would unmount by its path what somebody else may have mounted there.
            pyfuse3.close(unmount=False)


_session_loop = pyfuse3._session_loop  # type: ignore[attr-defined]  # private: see _steadied_loop


async def _steadied_loop(nursery: trio.Nursery, min_tasks: int, max_tasks: int) -> None:
    """pyfuse3's loop of one task, so that nothing but the end of the mount ends it.

    pyfuse3 polls /dev/fuse, then reads it. When the reader that made the request is killed in between, the request is
    gone and a blocking read would stop the whole event loop until the next one comes. So the descriptor does not block,
    and the EAGAIN that pyfuse3 would die of sends the task back to its poll. Such a turn loses libfuse's receive buffer
    (1 MiB of address space, of which one request's pages were touched); it is rarer than a killed process.
    """
    while True:
        try:
            await _session_loop(nursery, min_tasks, max_tasks)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            log.debug("a request was withdrawn before it was read")
        except trio.Cancelled:
            raise
        except Exception:
            log.exception("a request ended in an exception outside its handler")
        await trio.lowlevel.checkpoint()


def _steady_pyfuse3() -> None:
    pyfuse3._session_loop = _steadied_loop  # type: ignore[attr-defined]  # main() and the loop itself look it up here


class _Interrupted(logging.Filter):
    """Drops pyfuse3's error line for each reply to a reader that was killed meanwhile: that is no error."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not ("fuse_reply_" in str(record.msg) and os.strerror(errno.ENOENT) in record.getMessage())


logging.getLogger("pyfuse3").addFilter(_Interrupted())


def why_not_mounted() -> str:
    """Return what keeps this user from mounting, and what to do about it, as far as that shows."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse: modprobe fuse; a container needs --device /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not open /dev/fuse: as root, chmod 666 /dev/fuse, as udev has it"
    return "may this user mount? `instantstart doctor` looks"
