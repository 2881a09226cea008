"""Binds complete weight files of the store, read-only, over a mount that pyfuse3 serves: the bind transport.

It is for kernels without FUSE passthrough, as root. Names, directories, small files and whatever is not complete still
come through the mount; a bound file is read and mapped from the disk itself. Which files may be bound is decided in
serving/bindings.py; docs/decisions/bind.md has the reasons.

* A ``Binder`` owns every mount below the mountpoint. It runs beside the session that serves the mount and follows
  ``Bindings``, which also tells it to withdraw binds before anything changes.
* All mount(2) and umount2(2) run in threads with a deadline: their paths are looked up in our own mount. While one is
  overdue nothing else is done, so nothing changes under a bind that may still come.
* A bind is made from a read-only, nosuid, nodev bind of ``slots`` and inherits its flags: it is never writable, not
  even for a moment. It shows one file, so that nothing else of the store can be reached through it.
* The daemon sees no reads of a bound file. It sees opens and closes: fanotify on the store's file tells of them, in
  every mount namespace. Those by the store's own path (a backup) and the daemon's own are not an engine's.
* A file is in use while a plain umount answers EBUSY, or while the kernel refuses a write lease, since a detached bind
  or one in another mount namespace may still be held. A close is only the occasion to ask.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import trio

from instantstart_fs.errors import InstantStartError, MountFailed, PipelineBusy, StoreLost
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.mount import kernel
from instantstart_fs.mount.bind_calls import (
    BindLeft,
    BindRefused,
    BindUnknown,
    Bound,
    Shown,
    bind_file,
    check_support,
    mount_table,
    staged_slots,
    unmount_below,
    write_shown,
)
from instantstart_fs.mount.bind_opens import BindEvents
from instantstart_fs.serving.bindings import BindableFile, Bindings

log = logging.getLogger(__name__)

DEADLINE: Final = 10.0
"""Seconds for one batch of mounts or unmounts."""
CHECK_INTERVAL: Final = 5.0
"""Seconds between two looks at the mount table: the kernel drops a bind with the directory entry that it lies on."""
EVENTS_INTERVAL: Final = 0.02
"""Seconds between two looks at the events: a close is told of a moment before the kernel lets go of the file."""
RETRY_INTERVAL: Final = 1.0
"""Seconds until the events are looked at again when the kernel could not tell of them."""
REFRESH_INTERVAL: Final = 1.0
"""Least seconds between two updates of what stat and getfattr show of bound files."""
PROBE_INTERVAL: Final = 10.0
"""Seconds until it is asked again what could not be known."""

_T = TypeVar("_T")


class Plan(NamedTuple):
    """Paths to detach, then files to bind."""

    detach: tuple[str, ...]
    attach: tuple[BindableFile, ...]


def plan(bound: Mapping[str, BindableFile], wanted: Mapping[str, BindableFile]) -> Plan:
    """The changes from ``bound`` to ``wanted`` (one pipeline, by path). A file that became another one is detached and
    attached."""
    return Plan(
        detach=tuple(sorted(path for path, file in bound.items() if wanted.get(path) != file)),
        attach=tuple(file for path, file in sorted(wanted.items()) if bound.get(path) != file),
    )


class Binder:
    """Makes and removes the bind mounts. ``store``: the store's root. Call ``probe`` first, then ``run`` while the
    mount is served."""

    def __init__(self, bindings: Bindings | None, store: str | None) -> None:
        self._bindings = bindings
        self._store = store
        self._mountpoint = ""
        self._bound: dict[str, dict[str, Bound]] = {}
        """pipeline → path → what lies over it."""
        self._events = BindEvents()
        self._shown: dict[str, int | None] = {}
        """pipeline → the last request that its bound files show."""
        self._refused: dict[BindableFile, int] = {}
        """File that could not be bound → number of tries. It is logged once, and tried at growing intervals."""
        self._lost: list[tuple[BindableFile, StoreLost]] = []
        """Files whose store file was missing, or was not the one that was sealed, when it was to be bound."""
        self._checks = 0
        self._overdue: threading.Event | None = None
        """Set when the last batch has ended. Its deadline may have come first."""
        self._uncertain = False
        """Whether a batch was ever given up, or a bind could not be taken back."""
        self._fresh: list[str] = []
        self._lock = trio.Lock()
        self._store_mount = -1
        """The mount by which the store itself opens its files."""
        self._to_show: set[str] = set()
        self._changed = trio.Event()

    def probe(self) -> None:
        """Blocking. Raises BindRefused where it cannot work."""
        if self._bindings is None or self._store is None:
            raise BindRefused("no binds: there is no store to bind from")
        self._store_mount = check_support(self._store)

    async def run_when_known(self, mountpoint: str, decided: Callable[[str | None], None]) -> None:
        """Like ``run``, after ``probe`` raised BindUnknown: probe again until it is known whether files can be bound.

        ``decided`` is called once, with the reason why they cannot, or None."""
        while True:
            await trio.sleep(PROBE_INTERVAL)
            try:
                await self._in_thread(self.probe)
            except BindUnknown:
                continue
            except BindRefused as error:
                decided(error.message)
                return
            except MountFailed:
                continue  # it hangs
            decided(None)
            await self.run(mountpoint)

    async def run(self, mountpoint: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep complete files bound until cancelled. Started when those that are complete already are.

        Leaves the binds when it ends: detaching the mount takes them along. Raises MountFailed.
        """
        assert self._bindings is not None
        self._mountpoint = mountpoint
        try:
            self._events.start()
        except OSError as error:
            raise MountFailed(f"nobody would tell of opens of bound files: {error.strerror}") from error
        self._bindings.attach(self._withdraw)
        try:
            await self._in_thread(unmount_below, f"{mountpoint}/")
            await self._follow(await self._bindings.wait_changed(0))
            for pipeline in list(self._bound):
                await self._bindings.ensure_loaded(pipeline)
                for one in self._bound.get(pipeline, {}).values():
                    if one.used:
                        self._bindings.note_already_open(one.file)
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_opens)
                nursery.start_soon(self._keep_asking)
                nursery.start_soon(self._keep_shown)
                while True:
                    changed = await self._bindings.wait_changed(CHECK_INTERVAL)
                    try:
                        if not changed:
                            changed = await self._check()
                    except MountFailed as error:
                        log.error("binds are not looked after: %s", error.message)
                    await self._follow(changed)
        finally:
            self._bindings.attach(None)
            self._events.close()

    # -- following the library -------------------------------------------------------------------------------------

    async def _follow(self, changed: set[str]) -> None:
        assert self._bindings is not None
        for pipeline in sorted(changed):
            await self._bindings.ensure_loaded(pipeline)
            async with self._lock:
                bound, wanted = self._bound.get(pipeline, {}), self._bindings.files(pipeline)
                for file in [file for file in self._refused if file.pipeline == pipeline]:
                    if wanted.get(file.path) != file:
                        del self._refused[file]
                todo = plan({path: one.file for path, one in bound.items()}, wanted)
                if todo == Plan((), ()):
                    continue
                try:
                    await self._detach(pipeline, todo.detach)
                    await self._attach(pipeline, todo.attach)
                except MountFailed as error:
                    log.error("%s", error.message, extra={"pipeline": pipeline})
            while self._lost:  # without the lock: dropping a file takes all binds of its pipeline away
                file, lost = self._lost.pop()
                try:
                    await self._bindings.lost(file, lost)
                except InstantStartError as error:
                    log.error("%s: is not dropped: %s", file.path, error.message, extra={"pipeline": pipeline})

    async def _withdraw(self, pipeline: str, idle_only: bool) -> None:
        """See bindings.Withdraw."""
        assert self._bindings is not None
        async with self._lock:
            bound = dict(self._bound.get(pipeline, {}))
            if self._uncertain:
                # More may be bound than was told.
                await self._in_thread(unmount_below, f"{self._mountpoint}/{pipeline}/")
            if not bound:
                return
            await self._detach(pipeline, tuple(bound), lazily=not idle_only)
            await self._bindings.ensure_loaded(pipeline)
            if idle_only and any(self._bindings.in_use(one.file) for one in bound.values()):
                raise _busy(pipeline)

    async def _detach(self, pipeline: str, paths: tuple[str, ...], *, lazily: bool = True) -> None:
        """Unmount these binds; every open of them is noted before it returns. Raises PipelineBusy unless ``lazily``,
        MountFailed."""
        bound = self._bound.get(pipeline, {})
        done: list[str] = []

        def work() -> bool:
            for path in paths:
                try:
                    kernel.umount(self._target(pipeline, path), lazily=lazily)
                except OSError as error:
                    if error.errno == errno.EBUSY and not lazily:
                        return False
                    if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTCONN):
                        raise MountFailed(f"{path} cannot be unbound: {error.strerror}") from error
                done.append(path)
            return True

        try:
            idle = await self._in_thread(work)
        finally:
            self._events.read()  # they were opened until now, and nobody knows their inodes from here on
            for path in done:
                removed = bound.pop(path)
                self._events.unwatch(removed.inode, removed.store_path)
            if not bound:
                self._bound.pop(pipeline, None)
        await self._note()
        if not idle:
            raise _busy(pipeline)

    async def _attach(self, pipeline: str, files: tuple[BindableFile, ...]) -> None:
        assert self._bindings is not None
        todo = [(file, shown) for file in files if (shown := self._bindings.attributes(file)) is not None]
        if not todo:
            return
        done: list[Bound] = []
        failed: list[tuple[BindableFile, str]] = []
        late = threading.Event()

        def work() -> None:
            assert self._bindings is not None
            assert self._store is not None
            with staged_slots(self._store) as stage:
                for file, shown in todo:
                    if late.is_set():
                        return
                    target = self._target(pipeline, file.path)
                    try:
                        with self._bindings.descriptor(file) as blob:
                            done.append(bind_file(stage, self._store, target, file, blob.fd, shown, self._events.fd))
                    except StoreLost as error:
                        self._lost.append((file, error))
                        failed.append((file, error.message))
                    except InstantStartError as error:
                        failed.append((file, error.message))
                    except OSError as error:
                        self._uncertain |= isinstance(error, BindLeft)
                        failed.append((file, error.strerror or str(error)))

        try:
            with self._events.keeping_early():
                try:
                    await self._in_thread(work)
                finally:
                    late.set()
                    bound = self._bound.setdefault(pipeline, {})
                    for one in done:
                        bound[one.file.path] = one
                        self._refused.pop(one.file, None)
                        self._events.watch(one.inode, one.file)
                        self._fresh.append(self._target(pipeline, one.file.path))
        except OSError as error:
            raise MountFailed(f"nothing can be bound: {error.strerror}") from error
        finally:
            bound = self._bound[pipeline]
            if not bound:
                del self._bound[pipeline]
            self._shown[pipeline] = self._bindings.last_request(pipeline)
        await self._note()
        for file, reason in failed:
            self._refused[file] = self._refused.get(file, 0) + 1
            if self._refused[file] == 1:
                log.warning("%s: is not bound: %s", file.path, reason, extra={"pipeline": pipeline})
        if done:
            log.debug("%d files bound", len(done), extra={"pipeline": pipeline})

    async def _check(self) -> set[str]:
        """The pipelines with binds that have vanished, or could not be made. Also asks for each new bind's name once
        more: the kernel was told to keep it for a second when the file was not complete yet, and is told a day now, for
        which the name then survives the daemon. Raises MountFailed."""
        async with self._lock:
            fresh, self._fresh = self._fresh, []

            def look() -> frozenset[str]:
                for path in fresh:
                    with contextlib.suppress(OSError):
                        os.stat(path)
                return frozenset(mount.path for mount in mount_table())

            there = await self._in_thread(look)
            self._events.read()  # as in _detach
            lost = set()
            for pipeline, bound in list(self._bound.items()):
                for path, one in list(bound.items()):
                    if self._target(pipeline, path) not in there:
                        del bound[path]
                        self._events.unwatch(one.inode)
                        lost.add(pipeline)
            await self._show({pipeline for pipeline in self._bound if self._stale(pipeline)})
            self._checks += 1
            return lost | {
                file.pipeline for file, tries in self._refused.items() if self._checks % (1 << min(tries, 8)) == 0
            }

    # -- opens -----------------------------------------------------------------------------------------------------

    async def _watch_opens(self) -> None:
        assert self._bindings is not None
        while True:
            await trio.lowlevel.wait_readable(self._events.fd)
            heard = self._events.read()
            closed = await self._note()
            await trio.sleep(EVENTS_INTERVAL if heard else RETRY_INTERVAL)
            self._show_soon({file.pipeline for file in closed if self._bindings.poll_release(file)})

    async def _note(self) -> set[BindableFile]:
        """Tell the library of every open that was seen; return the files that were closed."""
        assert self._bindings is not None
        closed: set[BindableFile] = set()
        while (pipeline := self._events.next_pipeline) is not None:
            await self._bindings.ensure_loaded(pipeline)
            for file, event in self._events.take(pipeline):
                if event.opened and event.mount_id != self._store_mount:
                    self._bindings.opened(file)
                    self._show_soon({pipeline})
                if event.closed:
                    closed.add(file)
        return closed

    async def _keep_asking(self) -> None:
        """Poll what is open: nothing tells of a file whose bind was withdrawn, and a close may be told of too early."""
        assert self._bindings is not None
        while True:
            await trio.sleep(CHECK_INTERVAL)
            await self._note()  # what a batch that failed has seen
            self._show_soon(self._bindings.poll_releases())

    def _show_soon(self, pipelines: set[str]) -> None:
        self._to_show |= pipelines
        if pipelines:
            self._changed.set()

    async def _keep_shown(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            stale, self._to_show = self._to_show, set()
            async with self._lock:
                with contextlib.suppress(MountFailed):  # shown by the next check
                    await self._show(stale)
            await trio.sleep(REFRESH_INTERVAL)

    def _stale(self, pipeline: str) -> bool:
        assert self._bindings is not None
        return self._shown.get(pipeline) != self._bindings.last_request(pipeline)

    async def _show(self, pipelines: set[str]) -> None:
        """Bring times and attributes of their bound files up to date. Under the lock.

        Not of those that somebody has open: it moves st_ctime, by which tar and others see that a file changed while
        they read it."""
        assert self._bindings is not None
        todo: list[tuple[str, Shown, int]] = []
        for pipeline in pipelines:
            if pipeline not in self._bound:
                continue
            await self._bindings.ensure_loaded(pipeline)
            self._shown[pipeline] = self._bindings.last_request(pipeline)
            for one in self._bound.get(pipeline, {}).values():
                shown = self._bindings.attributes(one.file)
                if shown is not None and not self._bindings.is_open(one.file):
                    todo.append((one.store_path, shown, one.file.mtime_ns))
        if todo:
            await self._in_thread(write_shown, todo)

    async def _in_thread(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do ``work`` in a thread. Raises MountFailed at the deadline; then nothing else is done until that thread has
        ended."""
        if self._overdue is not None and not self._overdue.is_set():
            raise MountFailed("the kernel is still busy with mounts that were wanted before")
        ended = self._overdue = threading.Event()

        def run() -> _T:
            try:
                return work(*args)
            finally:
                ended.set()

        with trio.move_on_after(DEADLINE):
            try:
                return await run_abandonable(run)
            finally:
                self._uncertain |= not ended.is_set()
        raise MountFailed(f"the kernel did not mount or unmount within {DEADLINE:.0f} s")

    def _target(self, pipeline: str, path: str) -> str:
        return f"{self._mountpoint}/{pipeline}/{path}"


def _busy(pipeline: str) -> PipelineBusy:
    return PipelineBusy(f"{pipeline}: somebody has files of it open")
