"""The life of one mount: made, tuned, ready, invalidating, taken down. Served by pyfuse3, or by devfuse with
passthrough where the machine allows it.

``serve`` owns the mountpoint while it runs, and leaves no mount behind. It never stats its own mountpoint on the trio
thread, which would wait for itself: probes run in threads that are given up at a deadline.

pyfuse3 keeps its session in module globals: one mount per process at a time.

It also takes pyfuse3's own edges off (``_steadied_loop``): a request that is withdrawn between poll and read must not
block the whole event loop, and no exception from inside pyfuse3 may end the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import msgspec
import pyfuse3
import trio

from instantstart_fs.config.directories import make_directory
from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel
from instantstart_fs.mount.bind import Binder, BindRefused, BindUnknown
from instantstart_fs.mount.devfuse import DevFuse, PassthroughRefused
from instantstart_fs.mount.handover import Handover, HandoverRefused, Inherited
from instantstart_fs.mount.operations import Operations
from instantstart_fs.vfs import Invalidation, Vfs

log = logging.getLogger(__name__)

PROBE_DEADLINE: Final = 5.0
"""Seconds that somebody else's mount gets to prove that it is alive."""
TEARDOWN_DEADLINE: Final = 10.0
WATCH_RETRY: Final = 5.0
INVALIDATIONS_AT_ONCE: Final = 1000

_mounted = False


class MountSettings(msgspec.Struct, frozen=True):
    """``path`` is the mountpoint, made where it is absent; ``store`` the store's root: neither may hold the other.

    ``allow_other`` is given up with a note where the kernel does not let this user have it. ``max_tasks`` bounds the
    requests served at once; it must stay above ``max_background``, or stuck faults would take every task and a stat
    would wait behind them, as ``max_background`` is above what one pipeline's waiting reads may take
    (serving/reads.py, MOST_WAITING): when it is reached, readahead and O_DIRECT reads of all pipelines stand in one
    line of the kernel's. A task costs about 10 KiB, only while it is needed.
    """

    path: str
    store: str | None = None
    transport: Literal["auto", "passthrough", "bind", "pyfuse3"] = "auto"
    allow_other: bool = True
    fsname: str = "instantstart"
    subtype: str = "instantstart"
    max_tasks: int = 65_536
    idle_tasks: int = 8
    max_background: int = 32_768
    readahead_kb: int = 1024
    ready_deadline: float = 10.0


class Mounted(msgspec.Struct):
    """What was made. ``notes`` say which tunings were not permitted; ``reason`` why reads are not passed through, ""
    where they are or nobody asked; ``requests``: how often each handler of Operations was called, as it goes on.
    ``transport`` and ``reason`` change when it is found out later that files can be bound."""

    path: str
    mount: kernel.Mount
    notes: tuple[str, ...]
    transport: str = "pyfuse3"
    reason: str = ""
    requests: Mapping[str, int] = MappingProxyType({})


class Transport(Protocol):
    """Who speaks the kernel's protocol."""

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> Mapping[str, int]:
        """How often each handler of Operations was called; it goes on counting."""
        ...

    def mount(self, path: str, *, fsname: str, subtype: str, allow_other: bool) -> None:
        """Raises MountFailed."""
        ...

    async def main(self) -> None:
        """Serve until the mount is gone."""
        ...

    def send(self, invalidation: Invalidation) -> None:
        """Blocking. Raises OSError."""
        ...

    def close(self) -> None:
        """After the mount was taken down, and never while ``send`` runs."""
        ...


async def serve(
    view: Vfs,
    settings: MountSettings,
    handover: Handover | None = None,
    *,
    task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount ``view`` and answer for it until cancelled, or until somebody unmounts it, which is logged.

    With ``handover`` a live mount of the daemon before is gone on with, and left to the next one when cancelled.

    Started when the mount answers. Raises MountFailed when the mountpoint is held by a live daemon or by something
    else, is no empty directory, or cannot be mounted.
    """
    global _mounted
    if _mounted:
        raise MountFailed("this process serves a mount already")
    _mounted = True
    try:
        handover = handover or Handover()
        if await _took_over(view, settings, handover, task_status):
            return
        path = await _in_thread(
            prepare_mountpoint, settings, deadline=PROBE_DEADLINE, what=f"the mountpoint {settings.path}"
        )
        reason = ""
        if settings.transport in ("auto", "passthrough"):
            try:
                await _serve_passthrough(view, path, settings, handover, None, task_status)
                return
            except PassthroughRefused as error:
                if settings.transport == "passthrough":
                    raise
                reason = error.message
                log.info("reads are not passed through: %s", reason)
        binder: Binder | None = None
        known = True
        if settings.transport in ("auto", "bind"):
            binder = Binder(view.bindings, settings.store)
            try:
                await _in_thread(binder.probe, deadline=PROBE_DEADLINE, what="a bind within the store")
            except BindUnknown as error:
                known = False
                reason = f"{reason}; {error.message}, tried again" if reason else f"{error.message}, tried again"
                log.warning("whether files can be bound cannot be known now, and is tried again: %s", error.message)
            except BindRefused as error:
                if settings.transport == "bind":
                    raise
                log.info("files are not bound: %s", error.message)
                reason, binder = f"{reason}; {error.message}", None
        await _serve_on(_Pyfuse3(view, settings), view, path, settings, reason, task_status, binder, known=known)
    finally:
        _mounted = False


async def _took_over(
    view: Vfs, settings: MountSettings, handover: Handover, task_status: trio.TaskStatus[Mounted]
) -> bool:
    """Serve the inherited mount to its end; False if there is none that can be, any more."""
    inherited = handover.take()
    if inherited is None:
        return False
    path = _resolved(settings.path)
    reason = kernel.why_no_passthrough()
    if settings.transport not in ("auto", "passthrough"):
        reason = f"the transport is now {settings.transport}"
    reason = reason or inherited.why_not(path, settings.subtype)
    if reason is None:
        try:
            await _serve_passthrough(view, path, settings, handover, inherited, task_status)
            return True
        except HandoverRefused as error:
            log.warning("the mount of the daemon before was unmounted: %s; its open files fail", error.message)
            return False
    log.warning("the mount of the daemon before cannot go on and is unmounted: %s; its open files fail", reason)
    await _in_thread(
        inherited.discard, settings.subtype, handover.store, deadline=PROBE_DEADLINE, what="the earlier mount"
    )
    return False


async def _serve_passthrough(
    view: Vfs,
    path: str,
    settings: MountSettings,
    handover: Handover,
    inherited: Inherited | None,
    task_status: trio.TaskStatus[Mounted],
) -> None:
    reason = kernel.why_no_passthrough()
    if reason is not None:
        raise PassthroughRefused(f"no FUSE passthrough: {reason}")
    transport = DevFuse(
        view,
        store=settings.store,
        max_tasks=settings.max_tasks,
        max_background=settings.max_background,
        readahead=settings.readahead_kb * 1024,
        keep=handover.store,
    )
    try:
        await _serve_on(transport, view, path, settings, "", task_status, inherited=inherited)
    finally:
        view.use_passthrough(False)


async def _serve_on(
    transport: Transport,
    view: Vfs,
    path: str,
    settings: MountSettings,
    reason: str,
    task_status: trio.TaskStatus[Mounted],
    binder: Binder | None = None,
    inherited: Inherited | None = None,
    *,
    known: bool = True,
) -> None:
    """``known``: whether ``binder`` is sure to work."""
    invalidator = _Invalidator(view, transport)
    mounted: Mounted | None = None
    unmounted = trio.Event()
    allow_other = may_allow_other(settings)
    serving = trio.CancelScope(shield=True)
    leave = False
    try:
        if inherited is not None and isinstance(transport, DevFuse):
            transport.adopt(inherited)
        else:
            transport.mount(path, fsname=settings.fsname, subtype=settings.subtype, allow_other=allow_other)
    except MountFailed:
        transport.close()
        raise
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_main, transport, unmounted, serving)
            nursery.start_soon(_end_when_unmounted, settings, unmounted, nursery.cancel_scope)
            nursery.start_soon(_end_serving, serving, invalidator)
            mounted = await _wait_ready(path, settings)
            mounted = msgspec.structs.replace(
                mounted,
                transport=transport.name if binder is None or not known else "bind",
                reason=reason,
                requests=transport.requests,
            )
            for note in mounted.notes:
                log.warning("%s", note)
            nursery.start_soon(_watch_table, mounted.mount, unmounted)
            view.on_mounted(resumed=inherited is not None)
            nursery.start_soon(invalidator.run)
            if binder is not None and known:
                await nursery.start(binder.run, path)
            elif binder is not None:
                nursery.start_soon(binder.run_when_known, path, functools.partial(_decided, mounted))
            log.info("mounted at %s by %s", path, mounted.transport)
            task_status.started(mounted)
            leave = True
    except BaseExceptionGroup as group:
        failed, others = group.split(MountFailed)
        if failed is None or others is not None:
            raise
        raise _first(failed) from None
    finally:
        with trio.CancelScope(shield=True):
            if unmounted.is_set():
                leave = False
            if leave and serving.cancelled_caught and isinstance(transport, DevFuse) and transport.kept:
                # Whoever waits goes on waiting, for the next daemon or for the supervisor to say that none comes.
                log.info("the mount stays for the next daemon")
                transport.leave()
            else:
                await _take_down(path, mounted.mount if mounted else None, settings, transport, invalidator)


def _decided(mounted: Mounted, problem: str | None) -> None:
    mounted.reason = mounted.reason.rpartition("; ")[0]
    if problem is None:
        mounted.transport = "bind"
        log.info("complete files are bound from now on")
    else:
        mounted.reason = f"{mounted.reason}; {problem}" if mounted.reason else problem
        log.warning("files are not bound: %s", problem)


def _first(group: BaseExceptionGroup[MountFailed]) -> MountFailed:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, MountFailed)
    return inner


async def _in_thread(work: Any, *args: Any, deadline: float, what: str) -> Any:
    """Run ``work`` in a thread of its own and give it up at the deadline: it may hang in somebody's dead mount."""
    with trio.move_on_after(deadline):
        return await trio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    raise MountFailed(f"{what} did not answer within {deadline:.0f} s")


# The mountpoint


def prepare_mountpoint(settings: MountSettings) -> str:
    """The real path of a mountpoint that is free to use; blocking.

    Clears the mount that a killed daemon left. Raises MountFailed.
    """
    path = _resolved(settings.path)
    _clear_stale_mounts(path, settings)
    path = os.path.realpath(path)
    _clear_stale_mounts(path, settings)
    if settings.store is not None:
        store = os.path.realpath(settings.store)
        if os.path.commonpath([path, store]) in (path, store):
            raise MountFailed(f"the mountpoint {path} and the store {store} may not lie in one another")
    try:
        make_directory(path)
        names = os.listdir(path)
    except FileExistsError as error:
        raise MountFailed(f"the mountpoint {path} is not a directory") from error
    except OSError as error:
        raise MountFailed(f"the mountpoint {path} cannot be used: {error.strerror}") from error
    if names:
        raise MountFailed(f"the mountpoint {path} is not empty (it holds {sorted(names)[0]!r}); empty it")
    return path


def _resolved(path: str) -> str:
    """Absolute, without symlinks above its last component, which is not touched."""
    path = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _clear_stale_mounts(path: str, settings: MountSettings) -> None:
    ours = f"fuse.{settings.subtype}"
    while (mount := kernel.find_mount(path)) is not None:
        if mount.filesystem != ours:
            raise MountFailed(f"{path} already has a {mount.filesystem} filesystem mounted on it")
        if not _is_dead(path):
            raise MountFailed(f"{path} is served by another instantstart daemon")
        log.warning("clearing the mount that a killed daemon left at %s", path)
        kernel.umount_lazily(path)


def _is_dead(path: str) -> bool:
    """statvfs always asks the daemon, where stat may be answered from the kernel's cache."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


# Mounting


def may_allow_other(settings: MountSettings) -> bool:
    """With a line in the log where it has to be given up."""
    if not settings.allow_other or os.geteuid() == 0 or kernel.user_allow_other():
        return settings.allow_other
    log.warning("only this user will see the mount: /etc/fuse.conf lacks user_allow_other")
    return False


async def _main(transport: Transport, unmounted: trio.Event, serving: trio.CancelScope) -> None:
    with serving:
        await transport.main()
    if not serving.cancelled_caught:
        unmounted.set()


async def _watch_table(mount: kernel.Mount, unmounted: trio.Event) -> None:
    """A lazy unmount leaves the connection to those who have files open: requests still come, and nobody new can open
    anything. What is mounted over it, or done to a mount above it, is no unmount."""
    while True:
        end, other_end = os.pipe2(os.O_CLOEXEC)
        try:
            gone = await trio.to_thread.run_sync(
                kernel.wait_unmounted, mount, end, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        except OSError as error:
            log.warning("the mount table cannot be watched, trying on: %s", error.strerror)
            await trio.sleep(WATCH_RETRY)
            continue
        finally:
            os.close(other_end)
        if gone:
            unmounted.set()
            return


async def _end_when_unmounted(settings: MountSettings, unmounted: trio.Event, outside: trio.CancelScope) -> None:
    await unmounted.wait()
    log.warning("%s was unmounted by somebody else", settings.path)
    outside.cancel()


async def _end_serving(serving: trio.CancelScope, invalidator: _Invalidator) -> None:
    """Requests are answered until the last invalidation is with the kernel: it may wait for a directory whose request
    is in flight, and a thread that waits there keeps the process from ending."""
    try:
        await trio.sleep_forever()
    finally:
        with trio.move_on_after(TEARDOWN_DEADLINE, shield=True):
            await invalidator.wait_idle()
        serving.cancel()


class _Pyfuse3:
    name = "pyfuse3"

    def __init__(self, view: Vfs, settings: MountSettings) -> None:
        self._operations = Operations(view)
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
            pyfuse3.init(self._operations, path, options)
        except RuntimeError as error:
            if "fuse_session_mount" in str(error):
                pyfuse3.close(unmount=False)  # libfuse holds a session; there is no mount
            reason = "is /dev/fuse there, and may this user mount?"
            raise MountFailed(f"cannot mount at {path}: {error} ({reason})") from error
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


async def _wait_ready(path: str, settings: MountSettings) -> Mounted:
    """Until the mount answers; then tune it, since the kernel sets its own figures when the connection begins."""
    await _in_thread(os.statvfs, path, deadline=settings.ready_deadline, what=f"the new mount at {path}")
    mount = kernel.find_mount(path)
    if mount is None:
        raise MountFailed(f"{path} was unmounted while it was being mounted")
    notes: list[str] = []
    for what, tune, value in (
        ("readahead", kernel.set_readahead, settings.readahead_kb),
        ("the background queue", kernel.set_background_limits, settings.max_background),
    ):
        try:
            tune(mount, value)
        except OSError as error:
            notes.append(f"{what} of the mount stays at the kernel's default: {error.strerror} (it needs root)")
    return Mounted(path=path, mount=mount, notes=tuple(notes))


# Invalidation


class _Invalidator:
    """Sends what the library says has changed to the kernel, in order, from a thread: the kernel may make it wait for a
    directory that has a request in flight. Never a file's pages: only entries, attributes and listings."""

    def __init__(self, view: Vfs, transport: Transport) -> None:
        self._channel = view.invalidations
        self._transport = transport
        self._idle = trio.Event()
        self._idle.set()

    async def run(self) -> None:
        async for first in self._channel:
            batch = [first]
            while len(batch) < INVALIDATIONS_AT_ONCE:
                try:
                    batch.append(self._channel.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            self._idle = trio.Event()
            # The thread tells when it is done even after it was abandoned: until then the session may not be freed.
            token = trio.lowlevel.current_trio_token()
            await trio.to_thread.run_sync(self._send, tuple(dict.fromkeys(batch)), token, abandon_on_cancel=True)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def _send(self, batch: tuple[Invalidation, ...], token: trio.lowlevel.TrioToken) -> None:
        try:
            for invalidation in batch:
                _send_invalidation(self._transport, invalidation)
        finally:
            token.run_sync_soon(self._idle.set)


def _send_invalidation(transport: Transport, invalidation: Invalidation) -> None:
    """Blocking. What the kernel does not hold (ENOENT) needs no forgetting."""
    try:
        transport.send(invalidation)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the kernel refused an invalidation (%s): %s", invalidation, error)


# The end


async def _take_down(
    path: str,
    ours: kernel.Mount | None,
    settings: MountSettings,
    transport: Transport,
    invalidator: _Invalidator,
) -> None:
    """Abort, detach, free. Aborting comes first: it ends every wait in the mount, so that nothing after it can hang,
    and the connection is known by a device number that is surely ours only while the mount is there.

    What somebody else mounted over it, or in its place, is left alone. ``ours`` None: it was not looked for yet."""
    found = kernel.find_mount(path)
    if found is not None and found.filesystem != f"fuse.{settings.subtype}":
        found = None
    if ours is None:
        ours = found
    if ours is not None and kernel.is_mounted(ours):
        try:
            kernel.abort_connection(ours)
        except OSError as error:
            log.debug("the connection was not aborted: %s; closing its descriptor will end it", error)
        if found is None or found.mount_id != ours.mount_id:
            log.warning("%s: something else is mounted over it; unmount both", path)
        else:
            try:
                await _in_thread(kernel.umount_lazily, path, deadline=TEARDOWN_DEADLINE, what="unmounting")
            except MountFailed as error:
                log.error("%s", error)
    with trio.move_on_after(TEARDOWN_DEADLINE) as waiting:
        await invalidator.wait_idle()
    if waiting.cancelled_caught:
        log.error("an invalidation is still with the kernel; the session is left to the end of the process")
        return
    transport.close()
