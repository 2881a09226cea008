"""Serves a mount over /dev/fuse with FUSE passthrough: it speaks the kernel's protocol and decides nothing.

It is the transport for the same ``Operations`` that pyfuse3 serves: pyfuse3 cannot negotiate FUSE_PASSTHROUGH. The day
it can, this module, ``wire`` and ``backing_ids`` may go.

* Handlers that answer from memory are awaited where requests are received; a READ gets a task, and so does an OPEN that
  has to wait.
* The I/O mode follows from the nodeid (vfs.OpenFile.backing), since the kernel refuses to mix modes on one; all opens
  of a nodeid share one backing id, which is kept as long as the Vfs keeps the descriptor.
* A reader's signal cancels its READ only where the signal kills it: EINTR in a page fault would be a SIGBUS.
* A supervisor's descriptor store, where there is one, gets the connection and the table of handles; ``adopt`` goes on
  with those of the daemon before (see handover).
* FORGET needs no bookkeeping: nodeids are durable (see operations).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import trio

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel, wire
from instantstart_fs.mount.backing_ids import BackingIds, PassthroughRefused
from instantstart_fs.mount.fuse_types import Entry, FUSEError
from instantstart_fs.mount.handover import (
    EPOCH_SHIFT,
    MOUNT_NAME,
    TABLE_NAME,
    FdStore,
    HandleTable,
    HandoverRefused,
    Inherited,
    Row,
    Terms,
)
from instantstart_fs.mount.operations import Operations
from instantstart_fs.store.os_errors import passing
from instantstart_fs.system import mountinfo
from instantstart_fs.vfs import Invalidation, NotLoaded, Vfs

log = logging.getLogger(__name__)

RECEIVE_BUFFER: Final = 128 * 1024
"""The kernel sends no write to a read-only mount, so nothing is longer than a BATCH_FORGET, which it cuts to fit."""
AT_ONCE: Final = 64
"""Requests received in a row before other tasks have a turn."""
MAX_PAGES: Final = 256
LARGEST_READ: Final = 16 * 1024 * 1024
DYING_POLL: Final = 0.2

_Answer = Callable[["DevFuse", wire.Request], Coroutine[Any, Any, "tuple[bytes, ...]"]]
"""Makes the payload of a reply, from memory."""
_Handler = Callable[["DevFuse", wire.Request, trio.Nursery], Coroutine[Any, Any, None]]
"""Replies, or starts the task that will."""


class DevFuse:
    """One connection to the kernel. ``store``: a directory of the filesystem whose files are to be passed through, for
    the probe."""

    name = "passthrough"

    def __init__(
        self,
        view: Vfs,
        *,
        store: str | None,
        max_tasks: int,
        max_background: int,
        readahead: int,
        keep: FdStore | None = None,
    ) -> None:
        """``readahead`` in bytes. ``keep``: who holds the connection while no daemon does."""
        self._keep = keep
        self._table: HandleTable | None = None
        self._path = ""
        self._adopted = False
        self._orphans: frozenset[int] = frozenset()
        """Nodeids that the kernel holds open and the Vfs does not know any more. Nobody will say when they close."""
        self._answered: dict[int, Row] = {}
        """Serial → the row of an OPEN that an earlier daemon recorded, and may not have answered."""
        self._view = view
        self._store = store
        self._max_tasks = max_tasks
        self._max_background = max_background
        self._readahead = readahead
        self._operations = Operations(view, _reply_directory)
        self._buffer = memoryview(bytearray(RECEIVE_BUFFER))
        self._in_flight: dict[int, tuple[trio.CancelScope, int]] = {}
        """unique → its task's scope, and the thread that waits for it."""
        self._task_ended = trio.Event()
        self._passthrough_handles: dict[int, int] = {}
        """fh → nodeid, of the open files that the kernel reads itself."""
        self._fd = -1
        self._backings = BackingIds(-1)

    @property
    def requests(self) -> Mapping[str, int]:
        return self._operations.requests

    # -- its life --------------------------------------------------------------------------------------------------

    def mount(self, path: str, *, fsname: str, subtype: str, allow_other: bool) -> None:
        """Mount the filesystem at ``path``. Raises MountFailed."""
        try:
            self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            self._backings = BackingIds(self._fd)
            self._path = path
            kernel.mount_fuse(path, self._fd, fsname=fsname, subtype=subtype, allow_other=allow_other)
        except OSError as error:
            raise MountFailed(f"cannot mount at {path}: {error.strerror}") from error

    def adopt(self, inherited: Inherited) -> None:
        """Go on with a live mount (``Inherited.why_not`` said that it may be), in the place of ``mount``."""
        assert inherited.table is not None
        self._fd, self._table, self._adopted = inherited.fd, inherited.table, True
        os.set_blocking(self._fd, False)
        self._backings = BackingIds(self._fd)
        self._backings.table = self._table
        self._view.use_passthrough(True, self._backings.forget)
        for row in self._table.backings():
            self._backings.restore(row.nodeid, row.backing_id, uses=0)
        rows = self._table.handles()
        for row in rows:
            self._answered[row.serial] = row
            if row.backing_id:
                self._backings.restore(row.nodeid, row.backing_id, uses=1)
                self._passthrough_handles[row.fh] = row.nodeid
        self._backings.forget_unused()
        first = self._table.begin_epoch() << EPOCH_SHIFT
        self._orphans = self._operations.adopt_handles(first, [(row.fh, row.nodeid) for row in rows])
        log.info("the mount of the daemon before goes on, with %d open files", len(rows))

    @property
    def kept(self) -> bool:
        """Whether the next daemon can go on with this connection."""
        return self._table is not None

    def leave(self) -> None:
        """Close what is this process's, in the place of ``close``; the connection lives on in the store."""
        self._keep = None
        self.close()

    async def main(self) -> None:
        """Serve until it is unmounted. Raises PassthroughRefused before anything was served, HandoverRefused when the
        kernel will not send again what the daemon before left unanswered."""
        if self._adopted:
            try:
                os.write(self._fd, wire.resend())
            except OSError as error:
                raise HandoverRefused(f"the kernel does not send requests again: {error.strerror}") from error
        async with trio.open_nursery() as nursery:
            while await self._receive(nursery):
                if len(self._in_flight) >= self._max_tasks:
                    self._task_ended = trio.Event()
                    await self._task_ended.wait()
            nursery.cancel_scope.cancel()

    def send(self, invalidation: Invalidation) -> None:
        """Blocking: the kernel may wait for a directory that has a request in flight. Raises OSError."""
        if invalidation.name is not None:
            name = invalidation.name.encode("utf-8", "surrogateescape")
            os.write(self._fd, wire.inval_entry(invalidation.parent, name, expire=invalidation.expire))
        if invalidation.nodeid is not None:
            os.write(self._fd, wire.inval_inode(invalidation.nodeid, listing=invalidation.listing))

    def close(self) -> None:
        if self._table is not None:
            if self._keep is not None:
                for name in (MOUNT_NAME, TABLE_NAME):
                    self._keep.remove(name)
            self._table.close()
            self._table = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    # -- receiving -------------------------------------------------------------------------------------------------

    async def _receive(self, nursery: trio.Nursery) -> bool:
        """Wait for requests and take up what is there; False when the connection has ended."""
        await trio.lowlevel.wait_readable(self._fd)
        for _ in range(AT_ONCE):
            try:
                count = os.readv(self._fd, [self._buffer])
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                    return False
                if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):
                    break  # withdrawn before it was read, or no more of them
                log.error("/dev/fuse cannot be read: %s", error)
                await trio.sleep(0.01)
                break
            try:
                request = wire.parse(self._buffer[:count])
            except wire.BadMessage as error:
                log.error("a message that is no request: %s", error)
                continue
            await self.handle(request, nursery)
            if len(self._in_flight) >= self._max_tasks:
                break
        return True

    async def handle(self, request: wire.Request, nursery: trio.Nursery) -> None:
        """Answer it, or start the task that will. Raises PassthroughRefused for an INIT, nothing else."""
        try:
            handler = HANDLERS.get(request.opcode)
            if handler is None:
                raise FUSEError(errno.EROFS if request.opcode in wire.WRITES else errno.ENOSYS)
            await handler(self, request, nursery)
        except PassthroughRefused:
            raise
        except Exception as error:
            self._fail(request, error)

    def _start(
        self, nursery: trio.Nursery, request: wire.Request, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        # The body is not kept: the next message overwrites it.
        request = request._replace(body=memoryview(b""))
        scope = trio.CancelScope()
        self._in_flight[request.unique] = scope, request.pid
        nursery.start_soon(self._run, request, scope, work)

    async def _run(
        self, request: wire.Request, scope: trio.CancelScope, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            with scope:
                try:
                    await work()
                except Exception as error:
                    self._fail(request, error)
            if scope.cancelled_caught:
                self._reply(request.unique, error=errno.EINTR)
        finally:
            del self._in_flight[request.unique]
            self._task_ended.set()

    async def _on_interrupt(self, request: wire.Request, nursery: trio.Nursery) -> None:
        (interrupted,) = wire.fields(wire.INTERRUPT_IN, request.body)
        if interrupted in self._in_flight:
            nursery.start_soon(self._end_if_dying, interrupted)

    async def _ignore(self, request: wire.Request, nursery: trio.Nursery) -> None:
        """FORGET: see the module."""

    async def _end_if_dying(self, unique: int) -> None:
        """The kernel tells of a reader's first signal only; a later one may be the one that kills it."""
        waiting = self._in_flight[unique]
        scope, pid = waiting
        while self._in_flight.get(unique) is waiting:
            if kernel.is_dying(pid):
                scope.cancel()
                return
            await trio.sleep(DYING_POLL)

    # -- replying --------------------------------------------------------------------------------------------------

    def _reply(self, unique: int, *parts: bytes | memoryview, error: int = 0) -> bool:
        """Send an answer. Returns False if nobody waits for it any more."""
        try:
            os.writev(self._fd, [wire.out(unique, sum(map(len, parts)), error), *parts])
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                log.error("the kernel refused a reply: %s", problem)
                if not error:
                    return self._reply(unique, error=errno.EIO) and False
            return False
        return True

    def _fail(self, request: wire.Request, error: Exception) -> None:
        if isinstance(error, FUSEError):
            number = error.errno
        elif isinstance(error, wire.BadMessage):
            log.error("request %d of the kernel: %s", request.opcode, error)
            number = errno.EINVAL
        else:
            log.error("request %d failed in a way nobody foresaw; its caller sees EIO", request.opcode, exc_info=error)
            number = errno.EIO
        if request.opcode not in wire.SILENT:
            self._reply(request.unique, error=number)

    # -- the connection --------------------------------------------------------------------------------------------

    async def _on_init(self, request: wire.Request, nursery: trio.Nursery) -> None:
        unique, offer = request.unique, wire.init_in(request.body)
        if (offer.major, offer.minor) < (wire.MAJOR, wire.MINOR) or not offer.flags & wire.PASSTHROUGH:
            self._reply(unique, error=errno.EPROTO)
            raise PassthroughRefused("this kernel was built without FUSE passthrough (CONFIG_FUSE_PASSTHROUGH)")
        reply = wire.init_out(
            offer, readahead=self._readahead, background=self._max_background, max_pages=MAX_PAGES
        )  # fmt: skip
        if not self._reply(unique, reply):
            raise PassthroughRefused("the kernel took no answer to INIT")
        if self._store is not None:
            self._backings.probe(self._store)
        self._view.use_passthrough(True, self._backings.forget)
        if self._keep is not None:
            self._hand_in(self._keep, offer.flags)

    def _hand_in(self, keep: FdStore, offered: int) -> None:
        """Give the next daemon the connection and the table of open files, before the first OPEN is entered in it."""
        mount = mountinfo.find_mount(self._path)
        if mount is None or not offered & wire.HAS_RESEND:
            log.info("a restart will unmount: this kernel does not send requests again")
            return
        terms = Terms(path=self._path, device=mount.device, minor=wire.MINOR, flags=offered & wire.WANTED)
        try:
            self._table = self._backings.table = HandleTable.create(terms)
        except OSError as error:
            log.warning("a restart will unmount: no table of open files: %s", error.strerror)
            return
        # The table first: a connection without it would be a mount that nobody can take over.
        keep.store(TABLE_NAME, self._table.fd)
        keep.store(MOUNT_NAME, self._fd)

    # -- files -----------------------------------------------------------------------------------------------------

    async def _on_open(self, request: wire.Request, nursery: trio.Nursery) -> None:
        unique = request.unique
        flags, _ = wire.fields(wire.OPEN_IN, request.body)
        if unique & wire.RESENT and await self._answer_again(unique):
            return
        handle = self._operations.open_nowait(request.nodeid, flags)
        if handle is not None:
            await self._opened(unique, request.nodeid, handle)
        else:
            self._start(nursery, request, lambda: self._open(unique, request.nodeid, flags))

    async def _open(self, unique: int, nodeid: int, flags: int) -> None:
        info = await self._operations.open(nodeid, flags)
        await self._opened(unique, nodeid, info.fh)

    async def _answer_again(self, unique: int) -> bool:
        """Answer an OPEN as an earlier daemon recorded it before it died; False if it recorded nothing."""
        row = self._answered.pop(unique & ~wire.RESENT, None)
        if row is None:
            return False
        if not self._operations.is_open(row.fh):
            await self._close(row.fh)
            return False
        mode = wire.FOPEN_PASSTHROUGH if row.backing_id else wire.FOPEN_KEEP_CACHE
        if not self._reply(unique, wire.OPEN_OUT.pack(row.fh, mode, row.backing_id)):
            await self._close(row.fh)
        return True

    async def _opened(self, unique: int, nodeid: int, fh: int) -> None:
        """Does not wait."""
        open_flags, identifier = wire.FOPEN_KEEP_CACHE if self._operations.keeps_cache(fh) else 0, 0
        backing = self._operations.backing(fh)
        if backing is not None:
            try:
                identifier = self._backings.acquire(*backing)
            except OSError as error:
                # Never another mode instead: somebody may hold this nodeid in the one it has.
                log.error("the kernel refused to pass a file through: %s", error)
                await self._operations.release(fh)
                raise FUSEError(error.errno if passing(error.errno) and error.errno else errno.EIO) from error
            self._passthrough_handles[fh] = backing[0]
            open_flags = wire.FOPEN_PASSTHROUGH
        if self._table is not None:
            self._table.add(Row(fh, nodeid, unique & ~wire.RESENT, identifier))
        if not self._reply(unique, wire.OPEN_OUT.pack(fh, open_flags, identifier)):
            await self._close(fh)

    async def _close(self, fh: int) -> None:
        nodeid = self._passthrough_handles.pop(fh, None)
        if nodeid is not None:
            self._backings.release(nodeid)
        await self._operations.release(fh)
        if nodeid in self._orphans and not self._backings.uses(nodeid):
            self._backings.forget(nodeid)
        if self._table is not None:
            self._table.remove(fh)

    async def _on_read(self, request: wire.Request, nursery: trio.Nursery) -> None:
        fh, offset, size, *_ = wire.fields(wire.READ_IN, request.body)
        if size > LARGEST_READ or offset >= 1 << 63:
            raise wire.BadMessage(f"a read of {size} bytes at {offset}")
        self._start(nursery, request, lambda: self._read(request.unique, fh, offset, size))

    async def _read(self, unique: int, fh: int, offset: int, size: int) -> None:
        self._reply(unique, await self._operations.read(fh, offset, size))

    async def _release(self, request: wire.Request) -> tuple[bytes, ...]:
        fh, *_ = wire.fields(wire.RELEASE_IN, request.body)
        await self._close(fh)
        return ()

    async def _statfs(self, request: wire.Request) -> tuple[bytes, ...]:
        return (wire.statfs_out(await self._operations.statfs()),)

    # -- names and attributes --------------------------------------------------------------------------------------

    async def _lookup(self, request: wire.Request) -> tuple[bytes, ...]:
        entry = await self._operations.lookup(request.nodeid, wire.name(request.body), request)
        return (wire.entry_out(entry.nodeid, entry),)

    async def _getattr(self, request: wire.Request) -> tuple[bytes, ...]:
        return (wire.attr_out(await self._operations.getattr(request.nodeid, request)),)

    async def _readlink(self, request: wire.Request) -> tuple[bytes, ...]:
        return (await self._operations.readlink(request.nodeid, request),)

    async def _getxattr(self, request: wire.Request) -> tuple[bytes, ...]:
        size, _ = wire.fields(wire.XATTR_SIZE, request.body)
        name = wire.name(request.body, wire.XATTR_SIZE.size)
        return _sized(await self._operations.getxattr(request.nodeid, name), size)

    async def _listxattr(self, request: wire.Request) -> tuple[bytes, ...]:
        size, _ = wire.fields(wire.XATTR_SIZE, request.body)
        names = await self._operations.listxattr(request.nodeid, request)
        return _sized(b"".join(name + b"\0" for name in names), size)

    # -- directories -----------------------------------------------------------------------------------------------

    async def _opendir(self, request: wire.Request) -> tuple[bytes, ...]:
        fh = await self._operations.opendir(request.nodeid, request)
        flags = wire.FOPEN_CACHE_DIR | wire.FOPEN_KEEP_CACHE if self._operations.keeps_listing(fh) else 0
        return (wire.OPEN_OUT.pack(fh, flags, 0),)

    async def _readdir(self, request: wire.Request) -> tuple[bytes, ...]:
        fh, offset, size, *_ = wire.fields(wire.READ_IN, request.body)
        self._operations.adopt_directory(fh, request.nodeid)
        listing = wire.Listing(min(size, LARGEST_READ), plus=request.opcode == wire.READDIRPLUS)
        await self._operations.readdir(fh, offset, listing)
        return (b"".join(listing.parts),)

    async def _releasedir(self, request: wire.Request) -> tuple[bytes, ...]:
        fh, *_ = wire.fields(wire.RELEASE_IN, request.body)
        await self._operations.releasedir(fh)
        return ()

    async def _destroy(self, request: wire.Request) -> tuple[bytes, ...]:
        return ()


def _at_once(answer: _Answer) -> _Handler:
    """Handle a request where it was received; in a task of its own if the store has to be read for it first."""

    async def handler(served: DevFuse, request: wire.Request, nursery: trio.Nursery) -> None:
        try:
            with served._operations.at_once():
                served._reply(request.unique, *await answer(served, request))
        except NotLoaded:
            kept = request._replace(body=memoryview(bytes(request.body)))  # the next message overwrites it

            async def reply() -> None:
                served._reply(kept.unique, *await answer(served, kept))

            served._start(nursery, kept, reply)

    return handler


HANDLERS: Final[dict[int, _Handler]] = {
    wire.INIT: DevFuse._on_init,
    wire.OPEN: DevFuse._on_open,
    wire.READ: DevFuse._on_read,
    wire.INTERRUPT: DevFuse._on_interrupt,
    wire.FORGET: DevFuse._ignore,
    wire.BATCH_FORGET: DevFuse._ignore,
    wire.LOOKUP: _at_once(DevFuse._lookup),
    wire.GETATTR: _at_once(DevFuse._getattr),
    wire.READLINK: _at_once(DevFuse._readlink),
    wire.STATFS: _at_once(DevFuse._statfs),
    wire.RELEASE: _at_once(DevFuse._release),
    wire.GETXATTR: _at_once(DevFuse._getxattr),
    wire.LISTXATTR: _at_once(DevFuse._listxattr),
    wire.OPENDIR: _at_once(DevFuse._opendir),
    wire.READDIR: _at_once(DevFuse._readdir),
    wire.READDIRPLUS: _at_once(DevFuse._readdir),
    wire.RELEASEDIR: _at_once(DevFuse._releasedir),
    wire.DESTROY: _at_once(DevFuse._destroy),
}
"""Opcode → its handler. Any other is answered with EROFS if it would write, else with ENOSYS."""


def _reply_directory(listing: wire.Listing, name: bytes, entry: Entry, next_id: int) -> bool:
    return listing.add(name, entry.nodeid, entry, next_id)


def _sized(value: bytes, size: int) -> tuple[bytes, ...]:
    """Size 0 asks how much there is. Raises FUSEError."""
    if size == 0:
        return (wire.XATTR_SIZE.pack(len(value), 0),)
    if len(value) > size:
        raise FUSEError(errno.ERANGE)
    return (value,)
