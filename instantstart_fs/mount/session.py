"""The life of one mount: made, tuned, ready, kept up to date, taken down or left to the next daemon.

``serve`` chooses the transport, owns the mountpoint while it runs, and leaves no mount behind. It speaks no FUSE
itself, and never stats the mountpoint on the trio thread, which would wait for itself: probes run in threads that are
abandoned at a deadline.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
import trio

from instantstart_fs.errors import MountFailed
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.mount import kernel
from instantstart_fs.mount.backing_ids import PassthroughRefused
from instantstart_fs.mount.bind_calls import BindRefused, BindUnknown
from instantstart_fs.mount.bind_mounts import Binder
from instantstart_fs.mount.devfuse import DevFuse
from instantstart_fs.mount.handover import Handover, HandoverRefused, Inherited
from instantstart_fs.mount.invalidator import Invalidator
from instantstart_fs.mount.mountpoint import may_allow_other, prepare_mountpoint, resolved
from instantstart_fs.mount.transport import Mounted, MountSettings, Transport
from instantstart_fs.serving.bindings import Bindings
from instantstart_fs.system import mountinfo
from instantstart_fs.vfs import Vfs

_T = TypeVar("_T")

log = logging.getLogger(__name__)

PROBE_DEADLINE: Final = 5.0
"""Seconds that somebody else's mount gets to prove that it is alive."""
TEARDOWN_DEADLINE: Final = 10.0
WATCH_RETRY: Final = 5.0

_mounted = False


async def serve(
    view: Vfs,
    settings: MountSettings,
    handover: Handover | None = None,
    *,
    bindings: Bindings | None = None,
    task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount ``view`` and answer for it until cancelled, or until somebody unmounts it, which is logged. ``bindings``:
    which files may be bind-mounted from the store; None where there is no store.

    With ``handover`` it goes on with the live mount of the daemon before, and leaves it to the next one when cancelled.

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
            binder = Binder(bindings, settings.store)
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
        transport = _pyfuse3(view, settings, reason)
        await _serve_on(transport, view, path, settings, reason, task_status, binder, known=known)
    finally:
        _mounted = False


def _pyfuse3(view: Vfs, settings: MountSettings, reason: str) -> Transport:
    """Return the transport of pyfuse3. ``reason``: why passthrough does not serve instead. Raises MountFailed if
    pyfuse3 cannot be loaded."""
    try:
        from instantstart_fs.mount.pyfuse3_transport import Pyfuse3Transport
    except ImportError as error:
        because = f", and {reason}" if reason else ""
        raise MountFailed(f"pyfuse3 cannot be loaded ({error}){because}") from error
    return Pyfuse3Transport(view, settings)


async def _took_over(
    view: Vfs, settings: MountSettings, handover: Handover, task_status: trio.TaskStatus[Mounted]
) -> bool:
    """Serve the inherited mount to its end; False if there is none that can be, any more."""
    inherited = handover.take()
    if inherited is None:
        return False
    path = resolved(settings.path)
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
    invalidator = Invalidator(view, transport)
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
                # Readers that wait go on waiting: for the next daemon, or for the supervisor to say that none comes.
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


async def _in_thread(work: Callable[..., _T], *args: Any, deadline: float, what: str) -> _T:
    """Do ``work`` in a thread. Raises MountFailed if it has not returned after ``deadline`` seconds: it may hang in a
    dead mount."""
    try:
        return await run_abandonable(work, *args, deadline=deadline)
    except trio.TooSlowError:
        raise MountFailed(f"{what} did not answer within {deadline:.0f} s") from None


async def _main(transport: Transport, unmounted: trio.Event, serving: trio.CancelScope) -> None:
    with serving:
        await transport.main()
    if not serving.cancelled_caught:
        unmounted.set()


async def _watch_table(mount: mountinfo.Mount, unmounted: trio.Event) -> None:
    """Set ``unmounted`` when the mount leaves the table. A lazy unmount leaves the connection to those who have files
    open: requests still come, and nobody new can open anything. What is mounted over it, or done to a mount above it,
    is no unmount."""
    while True:
        end, other_end = os.pipe2(os.O_CLOEXEC)
        try:
            ended = await run_abandonable(mountinfo.wait_unmounted, mount, end)
        except OSError as error:
            log.warning("the mount table cannot be watched, trying on: %s", error.strerror)
            await trio.sleep(WATCH_RETRY)
            continue
        finally:
            os.close(other_end)
        if ended:
            unmounted.set()
            return


async def _end_when_unmounted(settings: MountSettings, unmounted: trio.Event, outside: trio.CancelScope) -> None:
    await unmounted.wait()
    log.warning("%s was unmounted by somebody else", settings.path)
    outside.cancel()


async def _end_serving(serving: trio.CancelScope, invalidator: Invalidator) -> None:
    """Requests are answered until the last invalidation is with the kernel: it may wait for a directory whose request
    is in flight, and a thread that waits there keeps the process from ending."""
    try:
        await trio.sleep_forever()
    finally:
        with trio.move_on_after(TEARDOWN_DEADLINE, shield=True):
            await invalidator.wait_idle()
        serving.cancel()


async def _wait_ready(path: str, settings: MountSettings) -> Mounted:
    """Wait until the mount answers, then tune it: the kernel sets its own figures when the connection begins."""
    await _in_thread(os.statvfs, path, deadline=settings.ready_deadline, what=f"the new mount at {path}")
    mount = mountinfo.find_mount(path)
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


async def _take_down(
    path: str,
    ours: mountinfo.Mount | None,
    settings: MountSettings,
    transport: Transport,
    invalidator: Invalidator,
) -> None:
    """Abort, detach, free. Aborting comes first: it ends every wait in the mount, so that nothing after it can hang,
    and the connection is known by a device number that is surely ours only while the mount is there.

    What somebody else mounted over it, or in its place, is left alone. ``ours`` None: it was not looked for yet."""
    found = mountinfo.find_mount(path)
    if found is not None and found.filesystem != f"fuse.{settings.subtype}":
        found = None
    if ours is None:
        ours = found
    if ours is not None and mountinfo.is_mounted(ours):
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
