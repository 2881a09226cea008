"""The FUSE request handlers: they translate between the kernel's requests and the Vfs, and decide nothing.

Any transport that speaks the kernel's protocol may drive this class (pyfuse3's, or our own), under these rules:

* all handlers run on one trio thread;
* what ``read`` returns is a view of a buffer that the next ``read`` may take: the session copies it out before its next
  checkpoint. pyfuse3 does: between the handler's return and fuse_reply_buf there is no await;
* one guard stands around every handler: FUSEError and cancellation pass, an InstantStartError becomes its errno,
  anything else EIO and a logged traceback. The mount never dies of one request.

The kernel's lookup counts are not kept: the library's nodeids are durable and never reused, so FORGET has nothing to
free. The transports answer what is no handler here: a write with EROFS (also where the ``ro`` mount option has not
refused it before), anything else with ENOSYS, which the kernel remembers and never asks again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import math
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from instantstart_fs.core.weights import may_read
from instantstart_fs.errors import InstantStartError, NoSuchEntry, OutOfResources
from instantstart_fs.mount.errno_map import errno_of
from instantstart_fs.mount.fuse_types import Entry, FUSEError, Opened, Statvfs
from instantstart_fs.vfs import ROOT, Attributes, NotLoaded, OpenFile, Vfs

log = logging.getLogger(__name__)

STABLE_TIMEOUT: Final = 86_400.0
"""Seconds for which the kernel may keep what is pinned and complete; changes are sent as invalidations."""
CHANGING_TIMEOUT: Final = 1.0
"""Seconds for what may change by itself: a filling file's blocks, the names at the root."""
STABLE_NEGATIVE_TIMEOUT: Final = 10.0
"""Seconds for an absent name in a pinned directory: engines probe for optional files many times in one start."""

WANT_SECONDS: Final = 10.0
"""Seconds between two lines in the log about a want of descriptors."""
NAME_MAX: Final = 255
BLOCK_SIZE: Final = 4096
PREFERRED_IO: Final = 128 * 1024
"""st_blksize. Python's open() takes it as its buffer's size, coreutils as their least."""

READ_BUFFER: Final = 1024 * 1024
"""The largest READ of a kernel that was offered 256 pages; larger ones get a buffer of their own."""
IDLE_BUFFERS: Final = 32
"""Kept between reads, 32 MiB when all were used. More live only while as many reads wait; those cost page faults
(0.75 ms of CPU for 1 MiB, against 0.05 for a buffer that was used before)."""

_UNREADABLE_FLAGS: Final = os.O_TRUNC | os.O_APPEND | os.O_CREAT

ReaddirReply = Callable[[Any, bytes, Entry, int], bool]
"""(token, name, entry, cursor behind it) → whether the entry fitted."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Handler = Callable[Concatenate["Operations", _P], Coroutine[Any, Any, _T]]


def _guarded(handler: _Handler[_P, _T]) -> _Handler[_P, _T]:
    """The one place where exceptions become errnos: nothing but a FUSEError leaves a handler."""

    name = handler.__name__

    @functools.wraps(handler)
    async def guard(self: Operations, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        self.requests[name] += 1
        try:
            while True:
                try:
                    return await handler(self, *args, **kwargs)
                except NotLoaded as unloaded:
                    if self._only_at_once:
                        self.requests[name] -= 1
                        raise
                    await self._view.ensure_loaded(unloaded.pipeline)
        except (FUSEError, NotLoaded):
            raise
        except Exception as error:
            raise _as_fuse_error(name, error, self.pipeline_of(name, args)) from error

    return guard


_told_at = -math.inf


def _tell_want(handler: str, error: OutOfResources, about: dict[str, str | None]) -> None:
    """An engine that opens a thousand shards too many meets the same want a thousand times."""
    global _told_at
    now = time.monotonic()
    if now >= _told_at + WANT_SECONDS:
        _told_at = now
        log.warning("%s: %s: %s", handler, error.code, error.message, extra=about)


def _as_fuse_error(handler: str, error: Exception, pipeline: str | None) -> FUSEError:
    about = {"pipeline": pipeline}
    if isinstance(error, InstantStartError):
        if isinstance(error, OutOfResources):
            _tell_want(handler, error, about)
        elif not isinstance(error, NoSuchEntry):
            log.warning("%s: %s: %s", handler, error.code, error.message, extra=about)
        return FUSEError(errno_of(error, missing=errno.ESTALE))
    log.error("%s failed in a way nobody foresaw; its caller sees EIO", handler, exc_info=error, extra=about)
    return FUSEError(errno.EIO)


class Caller(Protocol):
    """The process that made a request: pyfuse3's RequestContext, or the header of a request."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...


def _supplementary_groups(pid: int) -> set[int]:
    """Raises OSError when the process has ended."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
        groups = (line.split()[1:] for line in lines if line.startswith("Groups:"))
        return {int(group) for group in next(groups, [])}


def _may_find(caller: Caller, owner: int, group: int, mode: int) -> bool:
    """Whether the kernel would let the caller read what has this owner and mode. It asks nobody about LISTXATTR, and
    knows nothing of who may see a symlink."""
    if may_read(caller.uid, (caller.gid,), owner=owner, group=group, mode=mode):
        return True
    try:
        groups = _supplementary_groups(caller.pid)
    except (OSError, ValueError):  # gone, or in a pid namespace that this one does not see
        return False
    return may_read(caller.uid, (caller.gid, *groups), owner=owner, group=group, mode=mode)


def _hidden(attributes: Attributes, caller: Caller) -> bool:
    private = attributes.private
    return private is not None and not _may_find(caller, private.uid, private.gid, private.mode)


def entry_attributes(attributes: Attributes) -> Entry:
    """The attributes as lookup, getattr and readdir all show them."""
    timeout = STABLE_TIMEOUT if attributes.stable else CHANGING_TIMEOUT
    if attributes.private is not None:
        timeout = 0.0  # the kernel would show it to the next caller, too
    return Entry(
        nodeid=attributes.nodeid,
        st_ino=attributes.shown_inode or attributes.nodeid,
        entry_timeout=timeout,
        attr_timeout=timeout,
        st_mode=attributes.mode,
        st_nlink=attributes.nlink,
        st_uid=attributes.uid,
        st_gid=attributes.gid,
        st_size=attributes.size,
        st_blksize=PREFERRED_IO,
        st_blocks=attributes.blocks,
        st_atime_ns=attributes.atime_ns,
        st_mtime_ns=attributes.mtime_ns,
        st_ctime_ns=attributes.ctime_ns,
    )


class _Buffers:
    """Reused read buffers. Anonymous maps and not bytearrays: those are zeroed when made, and a thousand reads waiting
    for a dead origin would cost a gigabyte; an untouched map costs nothing."""

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    def acquire(self, size: int) -> mmap.mmap:
        if size <= READ_BUFFER and self._idle:
            return self._idle.pop()
        return mmap.mmap(-1, max(size, READ_BUFFER), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def release(self, buffer: mmap.mmap) -> None:
        if len(buffer) == READ_BUFFER and len(self._idle) < IDLE_BUFFERS:
            self._idle.append(buffer)


class _Kept(NamedTuple):
    """A Caller that outlives its request."""

    uid: int
    gid: int
    pid: int


_NOBODY: Final = _Kept(uid=2**32 - 2, gid=2**32 - 2, pid=0)
"""The caller of an opendir that an earlier daemon answered: nothing private is listed to it."""


class _Directory:
    """An open directory: the names as they were when its listing began."""

    __slots__ = ("caller", "kept", "names", "nodeid")

    def __init__(self, nodeid: int, caller: Caller, *, kept: bool) -> None:
        self.nodeid = nodeid
        self.caller = _Kept(caller.uid, caller.gid, caller.pid)
        self.kept = kept
        self.names: list[str] | None = None


class Operations:
    """The handlers of one mount. It owns the file handles' numbers, the read buffers and the counters, nothing else."""

    def __init__(self, view: Vfs, reply: ReaddirReply) -> None:
        """``reply`` takes what readdir lists, for the token that readdir was given."""
        self._view = view
        self._reply = reply
        self._files: dict[int, OpenFile] = {}
        self._directories: dict[int, _Directory] = {}
        self._handles = itertools.count(1)  # see adopt_handles
        self._buffers = _Buffers()
        self.requests: Counter[str] = Counter()
        """Handler → number of calls since the mount."""
        self._only_at_once = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, handlers that would have to wait for the store raise NotLoaded. Call them again outside of
        it, in a task that delays no other request. Not for ``open`` and ``read``."""
        self._only_at_once = True
        try:
            yield
        finally:
            self._only_at_once = False

    @property
    def open_handles(self) -> int:
        """Files and directories that the kernel holds open."""
        return len(self._files) + len(self._directories)

    def pipeline_of(self, handler: str, arguments: Sequence[object]) -> str | None:
        """The pipeline of the node or open file that a handler was called with, for the log."""
        first = arguments[0] if arguments else None
        if handler in ("read", "release"):
            file = self._files.get(first) if isinstance(first, int) else None
            return file.pipeline if file is not None else None
        with contextlib.suppress(Exception):
            return self._view.pipeline_of(first) if isinstance(first, int) else None
        return None

    # Names and attributes

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: Caller) -> Entry:
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        try:
            found = self._view.lookup(parent_inode, _text(name))
        except NoSuchEntry:
            return self._absent(parent_inode)
        if _hidden(found, ctx):
            return Entry()
        return entry_attributes(found)

    def _absent(self, parent: int) -> Entry:
        """An entry with no inode, which makes the kernel remember that the name is not there."""
        stable = parent != ROOT and self._view.attributes(parent).stable
        return Entry(entry_timeout=STABLE_NEGATIVE_TIMEOUT if stable else CHANGING_TIMEOUT)

    @_guarded
    async def getattr(self, inode: int, ctx: Caller) -> Entry:
        return entry_attributes(self._view.attributes(inode))

    @_guarded
    async def readlink(self, inode: int, ctx: Caller) -> bytes:
        return _bytes(self._view.readlink(inode))

    @_guarded
    async def statfs(self) -> Statvfs:
        filesystem = self._view.filesystem()
        return Statvfs(
            f_bsize=BLOCK_SIZE,
            f_blocks=filesystem.total_bytes // BLOCK_SIZE,
            f_bavail=filesystem.available_bytes // BLOCK_SIZE,
            f_files=filesystem.files,
            f_namemax=NAME_MAX,
        )

    @_guarded
    async def getxattr(self, inode: int, name: bytes) -> bytes:
        if not name.startswith(b"user."):
            # Not ENODATA: ls asks for security and ACL attributes of every file, and stops on a device that has none.
            raise FUSEError(errno.ENOTSUP)
        value = self._view.xattrs(inode).get(_text(name))
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @_guarded
    async def listxattr(self, inode: int, ctx: Caller) -> Sequence[bytes]:
        # getxattr(2) needs permission to read, which the kernel checks; nobody checks listxattr(2).
        found = self._view.attributes(inode)
        readable = found.mode | 0o111 if found.kind == "file" else found.mode
        if found.kind != "symlink" and not _may_find(ctx, found.uid, found.gid, readable):
            raise FUSEError(errno.EACCES)
        return [_bytes(name) for name in self._view.xattrs(inode)]

    # Directories

    @_guarded
    async def opendir(self, inode: int, ctx: Caller) -> int:
        self._view.attributes(inode)
        handle = next(self._handles)
        self._directories[handle] = _Directory(inode, ctx, kept=self._view.keeps_listing(inode))
        return handle

    def keeps_listing(self, fh: int) -> bool:
        """Whether the kernel may keep what an open directory lists (view.Vfs.keeps_listing). No handler."""
        return self._directories[fh].kept

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """The names are those of the moment the listing began (rewinddir begins anew), so a cursor is an index and
        nothing is shown twice or skipped. The attributes are looked up as they are sent: the kernel keeps them for
        long, and those of an older moment would outlive their own invalidation."""
        directory = self._directories[fh]
        if start_id == 0 or directory.names is None:
            directory.names = list(self._view.list_directory(directory.nodeid))
        for position in range(start_id, len(directory.names)):
            name = directory.names[position]
            try:
                attributes = self._view.lookup(directory.nodeid, name)
            except NoSuchEntry:
                continue
            if attributes.private is not None and _hidden(attributes, directory.caller):
                continue
            if not self._reply(token, _bytes(name), entry_attributes(attributes), position + 1):
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        self._directories.pop(fh, None)

    # Files

    @_guarded
    async def open(self, inode: int, flags: int) -> Opened:
        _refuse_writing(flags)
        file = await self._view.open(inode)
        handle = next(self._handles)
        self._files[handle] = file
        # The bytes under one nodeid never change, so the page cache of earlier opens stays good. What the kernel reads
        # itself has no page cache here, and may not be asked to keep one.
        return Opened(handle, keep_cache=file.backing is None and file.keep_cache)

    def open_nowait(self, inode: int, flags: int) -> int | None:
        """``open`` without a task of its own: the handle, or None where it has to wait and ``open`` is to be called.
        Raises FUSEError."""
        try:
            _refuse_writing(flags)
            file = self._view.open_nowait(inode)
        except NotLoaded:
            return None
        except FUSEError:
            self.requests["open"] += 1
            raise
        except Exception as error:
            self.requests["open"] += 1
            raise _as_fuse_error("open", error, self.pipeline_of("open", (inode,))) from error
        if file is None:
            return None
        self.requests["open"] += 1
        handle = next(self._handles)
        self._files[handle] = file
        return handle

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> memoryview:
        file = self._files.get(fh)
        if file is None:
            raise FUSEError(errno.ESTALE)  # opened under an earlier daemon, and removed since
        buffer = self._buffers.acquire(size)
        # On an error or a cancellation the buffer is dropped: a thread may still be writing into it.
        view = memoryview(buffer)[:size]
        count = await self._view.read_into(file, off, view)
        # Back into the pool before it is used: nobody can take it until the session's next checkpoint.
        self._buffers.release(buffer)
        return view[:count]

    @_guarded
    async def release(self, fh: int) -> None:
        file = self._files.pop(fh, None)
        if file is not None:
            self._view.release(file)

    def adopt_handles(self, first: int, files: Iterable[tuple[int, int]]) -> frozenset[int]:
        """Go on with (handle, nodeid) pairs of an earlier daemon; new handles from ``first`` on. Returns the nodeids
        that no longer exist. No handler."""
        lost = set()
        self._handles = itertools.count(first)
        for handle, nodeid in files:
            try:
                self._files[handle] = self._view.reopen(nodeid)
            except NoSuchEntry as error:
                log.warning("an open file of the earlier daemon no longer exists: %s", error.message)
                lost.add(nodeid)
        return frozenset(lost)

    def is_open(self, fh: int) -> bool:
        return fh in self._files

    def adopt_directory(self, fh: int, nodeid: int) -> None:
        """Go on with an open directory of an earlier daemon, if it is not known: its cursors are positions in a list
        that is built again."""
        if fh not in self._directories:
            self._directories[fh] = _Directory(nodeid, _NOBODY, kept=False)

    def keeps_cache(self, fh: int) -> bool:
        """Whether the pages of earlier opens stay. No handler."""
        return self._files[fh].keep_cache

    def backing(self, fh: int) -> tuple[int, int] | None:
        """Return (nodeid, descriptor of the store's file) if the kernel is to read an open file itself. This is no
        handler."""
        file = self._files[fh]
        return None if file.backing is None else (file.nodeid, file.backing)


def _refuse_writing(flags: int) -> None:
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & _UNREADABLE_FLAGS:
        raise FUSEError(errno.EROFS)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
