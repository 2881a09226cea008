"""Runs the daemon: starts the store, the library, the mount and the control socket, and stops them in bounded time.

Owns what belongs to the process: signals, limits, umask, logging, systemd's notifications, and the order of starting
(store, index, library, mount, socket, then the configured pipelines) and stopping (mount and socket, library, index,
store). It decides nothing about bytes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import msgspec
import trio

from instantstart_fs import __version__
from instantstart_fs.config import Config, default_socket, unixsocket
from instantstart_fs.config.descriptors import raise_file_limit
from instantstart_fs.config.directories import PASSABLE, make_directory
from instantstart_fs.config.loader import load_pipelines
from instantstart_fs.config.places import make_run_directory
from instantstart_fs.config.threads import keep_spare_threads
from instantstart_fs.control.dispatcher import Dispatcher
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.control.server import ControlServer
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import ErrorStatus, PipelineStatus
from instantstart_fs.errors import InstantStartError, MountFailed, PipelineExists, PipelineNotFound, StoreLocked
from instantstart_fs.ipc.sockets import BACKLOG
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.library import Library
from instantstart_fs.logs import LogFormat, announce, configure_logging
from instantstart_fs.mount import kernel, session
from instantstart_fs.mount.handover import Handover, Inherited
from instantstart_fs.mount.staging import Staging
from instantstart_fs.mount.transport import Mounted, MountSettings
from instantstart_fs.service import (
    Notifier,
    Stop,
    descriptor_store,
    received_descriptors,
    seconds_since_start,
    watchdog_interval,
)
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.system import mountinfo
from instantstart_fs.upkeep.index_recovery import open_index
from instantstart_fs.web.control_http import ControlHttp
from instantstart_fs.web.health import HealthProbe
from instantstart_fs.web.listener import address, bind

if TYPE_CHECKING:
    from instantstart_fs.web.app import Site
    from instantstart_fs.web.visitors import Visitors

log = logging.getLogger(__name__)

PREDECESSOR_DEADLINE = 5.0
"""Seconds in which the daemon whose mount we inherited has to end."""
REBUILD_PATIENCE = 60_000_000
"""Microseconds by which each sign of life extends systemd's start time-out while the index is rebuilt."""
STATUS_INTERVAL = 30.0
"""Seconds between two updates of the status line. The watchdog may need them more often."""
PAGE_RETRY = 5.0
FIRST_RETRY = 5.0
LAST_RETRY = 300.0
"""Seconds between attempts to add a configured pipeline whose origin is down, doubling."""


def run(
    config: Config, *, socket_path: str | None = None, log_level: str = "info", log_format: LogFormat = "console"
) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread. Raises what kept it from starting, or ended it."""
    configure_logging(log_level, log_format)
    faulthandler.enable()  # the watchdog's SIGABRT: say where every thread was
    raise_file_limit()
    keep_spare_threads()
    with contextlib.suppress(OSError):
        # Before the umask: what lies above the mountpoint is for everybody to pass. Never of a mount itself: one that
        # waits for us to take over would not answer.
        if mountinfo.find_mount(os.path.abspath(config.mount.path)) is None:
            make_directory(config.mount.path)
    os.umask(0o077)
    try:
        trio.run(serve, config, socket_path or default_socket())
    except BaseExceptionGroup as group:
        _raise_first(group)


def _raise_first(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the one error that explains the end if all are ours; else the group itself, which shows a bug."""
    ours, others = group.split(InstantStartError)
    if others is not None or ours is None:
        raise group
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    raise first from group


async def serve(
    config: Config, socket_path: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the whole daemon until a stop signal. It has started (``task_status``) when the mount answers.

    Raises InstantStartError, possibly in a group: what kept it from starting or ended it."""
    with (
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as stops,
        trio.open_signal_receiver(signal.SIGHUP) as hangups,
    ):
        async with trio.open_nursery() as waiting:
            stop = Stop(config.mount.path)
            waiting.start_soon(stop.wait, stops)
            with stop.scope:
                await _serve(config, socket_path, stop, hangups, task_status)
            waiting.cancel_scope.cancel()
    log.info("stopped")


async def _serve(
    config: Config,
    socket_path: str,
    stop: Stop,
    hangups: AsyncIterator[int],
    task_status: trio.TaskStatus[None],
) -> None:
    notifier = Notifier()
    inherited = Inherited.receive(received_descriptors())
    handover = Handover(descriptor_store(), inherited)
    store = await _open_store(config, inherited)
    with contextlib.closing(store):
        for warning in store.warnings:
            log.warning("%s", warning)

        def told(line: str) -> None:
            notifier.send(f"EXTEND_TIMEOUT_USEC={REBUILD_PATIENCE}\nSTATUS={line}")

        opener = functools.partial(open_index, store, rest=config.eviction.keep_hot, told=told)
        index = await trio.to_thread.run_sync(opener)
        with contextlib.closing(index):
            async with trio.open_nursery() as watch:
                await watch.start(index.run)
                library = Library(
                    config,
                    store,
                    index,
                    held=inherited.held if inherited is not None else (),
                    taking_over=inherited is not None,
                )
                async with library.running(), trio.open_nursery() as nursery:
                    daemon = Daemon(config, library, socket_path)
                    # From here on a stop takes down the mount first, and the library when that is gone.
                    stop.scope = nursery.cancel_scope
                    nursery.start_soon(daemon.read_again, hangups)
                    mounted = await nursery.start(daemon.keep_mounted, handover)
                    # At once: from here on a stop has something to unmount.
                    _write_mountpoint(os.path.dirname(socket_path), mounted.path)
                    log.info("the mount answers %.2f s after this process began", seconds_since_start())
                    if config.staging.enabled:
                        # After the mount: a reader waits for that one.
                        daemon.staging = Staging(library.shards, config.staging)
                        await nursery.start(daemon.staging.run)
                        # Tells it of what engines have open since before this daemon, too.
                        library.shards.notify_opens(daemon.staging)
                    daemon.mounted = mounted
                    daemon.requests = mounted.requests
                    server = ControlServer(
                        library,
                        daemon.info,
                        socket_path,
                        group=config.control.group,
                        group_access=config.control.group_access,
                        pending=daemon.pending,
                        http=ControlHttp(config.http, library),
                    )
                    await nursery.start(server.run)
                    nursery.start_soon(daemon.keep_pipelines)
                    if listeners := daemon.bind_page():
                        nursery.start_soon(daemon.keep_page, listeners, server.dispatcher)
                    daemon.ready = True
                    task_status.started()
                    line = f"ready: {len(library.pipelines)} pipelines at {config.mount.path}, socket {socket_path}"
                    line += f", transport {daemon.transport}" + (f", page {daemon.http}" if daemon.http else "")
                    notifier.send(f"READY=1\nSTATUS={line}")
                    announce(line)
                    nursery.start_soon(daemon.keep_told, notifier)
                # The mount is gone and the library has flushed when this is reached.
                watch.cancel_scope.cancel()


def _write_mountpoint(directory: str, path: str) -> None:
    """Write the mountpoint's path for the unit's ExecStopPost, which unmounts what a killed daemon left."""
    if "\n" in path:
        return
    try:
        make_run_directory(directory)
        with open(os.path.join(directory, "mountpoint"), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{path}\n")
    except OSError as error:
        log.warning("the mountpoint is not noted in %s: %s", directory, error.strerror)


async def _open_store(config: Config, inherited: Inherited | None) -> BlobStore:
    """Open the store, and end a predecessor that keeps its lock. Raises StoreError.

    A killed daemon may be unable to die: one of its threads is in the kernel, which waits for a request that only this
    daemon can answer, and this daemon waits for the store's lock. Aborting the mount ends that deadlock; the mount is
    then made anew.
    """
    deadline = trio.current_time() + PREDECESSOR_DEADLINE
    aborted = inherited is None
    while True:
        try:
            return await trio.to_thread.run_sync(BlobStore.open, config.store.path)
        except StoreLocked:
            if trio.current_time() >= deadline:
                if aborted:
                    raise
                log.error("the daemon before does not let go of the store: aborting its mount")
                aborted, deadline = True, trio.current_time() + PREDECESSOR_DEADLINE
                await trio.to_thread.run_sync(kernel.abort_mount, config.mount.path, abandon_on_cancel=True)
            elif inherited is None:
                raise
            await trio.sleep(0.02)


class Daemon:
    """The state that the tasks of one daemon share, and those tasks."""

    def __init__(self, config: Config, library: Library, socket_path: str) -> None:
        self._config = config
        self._library = library
        self._socket = socket_path
        self._started = time.monotonic()
        self._specs: tuple[PipelineSpec, ...] = config.pipelines
        self._reread = trio.Event()
        self._failed: dict[str, tuple[PipelineSpec, ErrorStatus]] = {}
        self.ready = False
        self.staging: Staging | None = None
        self.mounted: Mounted | None = None
        self.http = ""
        """Where the page is."""
        self.requests: Mapping[str, int] = {}
        """How often each handler of the mount was called."""

    @property
    def transport(self) -> str:
        """The transport that serves the mount, and why no faster one does; "" until it is mounted."""
        if self.mounted is None:
            return ""
        return self.mounted.transport + (f" ({self.mounted.reason})" if self.mounted.reason else "")

    def info(self) -> DaemonInfo:
        return DaemonInfo(
            version=__version__,
            pid=os.getpid(),
            mount=self._config.mount.path,
            store=self._config.store.path,
            uptime=round(time.monotonic() - self._started, 3),
            pipelines=len(self._library.pipelines),
            ready=self.ready,
            transport=self.transport,
            requests=dict(self.requests),
            http=self.http,
            tier=self._library.heartbeats.tier if self._library.heartbeats is not None else None,
            staging=msgspec.structs.asdict(self.staging.statistics()) if self.staging is not None else {},
        )

    async def keep_told(self, notifier: Notifier) -> None:
        """Send systemd signs of life and the status line. The watchdog is fed only while the mount answers a statvfs,
        which is a request to this very daemon through the kernel."""
        watchdog = watchdog_interval()
        interval = min(watchdog or STATUS_INTERVAL, STATUS_INTERVAL)
        told, told_at = "", -STATUS_INTERVAL
        asking = trio.CapacityLimiter(1)
        while True:
            problem: str | None = f"did not answer within {interval:g} s"
            with trio.move_on_after(interval):
                # One thread at a time: what hangs in a mount hangs for long.
                problem = await run_abandonable(self._ask_mount, limiter=asking)
            if problem is not None:
                log.error("the mount %s", problem)
            elif watchdog is not None:
                notifier.send("WATCHDOG=1")
            if trio.current_time() >= told_at + STATUS_INTERVAL:
                told_at = trio.current_time()
                line = self._status_line()
                if line != told:
                    told = line
                    notifier.send(f"STATUS={line}")
            await trio.sleep(interval)

    def _ask_mount(self) -> str | None:
        """Return why the mount does not answer; None if it does. Blocks."""
        try:
            os.statvfs(self._config.mount.path)
        except OSError as error:
            return f"answers: {error.strerror}"
        return None

    def _status_line(self) -> str:
        """Return the number of pipelines. Not their states: systemd shows the line to every user."""
        return (
            f"ready: {len(self._library.pipelines)} pipelines at {self._config.mount.path}, transport {self.transport}"
        )

    async def keep_mounted(
        self, handover: Handover, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve the mount until cancelled. Raises MountFailed if it cannot be made, or somebody else unmounts it."""
        mount = self._config.mount
        settings = MountSettings(path=mount.path, store=self._config.store.path, transport=mount.transport)
        await session.serve(
            self._library.mounted, settings, handover, bindings=self._library.bindings, task_status=task_status
        )
        raise MountFailed(
            f"{self._config.mount.path} was unmounted by somebody else; the next start of the daemon mounts it again"
        )

    # -- the page --------------------------------------------------------------------------------------------------

    def bind_page(self) -> list[socket.socket]:
        """Return the page's listening sockets: none if the page is off, or cannot be bound (the log says why)."""
        http = self._config.http
        listeners: list[socket.socket] = []
        if http.port is not None:
            try:
                listeners.append(bind(http.host, http.port))
                self.http = address(listeners[0])
            except OSError as error:
                log.warning("no page and no metrics: %s port %d: %s", http.host, http.port, error.strerror or error)
        if http.socket is not None:
            try:
                # For all: what each sees is what the kernel says that he is.
                listeners.append(unixsocket.listen(http.socket, mode=0o666, directory_mode=PASSABLE, backlog=BACKLOG))
            except OSError as error:
                log.warning("no page and no metrics at %s: %s", http.socket, error.strerror or error)
        return listeners

    async def keep_page(self, listeners: Sequence[socket.socket], dispatcher: Dispatcher) -> None:
        """Serve page, metrics and health. A failure is logged, ends nothing else, and the page starts again."""
        while True:
            await self._serve_page(listeners, dispatcher)
            await trio.sleep(PAGE_RETRY)
            listeners = self.bind_page()

    async def _serve_page(self, listeners: Sequence[socket.socket], dispatcher: Dispatcher) -> None:
        if not listeners:
            return
        try:
            # Its libraries take a good part of a second to import, which the mount must not wait for.
            serve_page, site, make_visitors = await trio.to_thread.run_sync(_import_web)
            health = HealthProbe(
                self._config.mount.path,
                self._library.snapshots.prove_index_writable,
                self._library.filler.statistics,
                store_problem=self._library.snapshots.store_problem,
            )
            visitors = make_visitors(self._config.http, dispatcher.callers.sight)
            made = site(self._library, self.info, self._config.http, health, visitors, pending=self.pending)
            await serve_page(made.app(dispatcher), listeners, visitors.identify)
        except Exception:
            log.exception("the page and the metrics have failed, and are begun again; the mount goes on")
            self.http = ""
            for listener in listeners:
                listener.close()
        finally:
            if self._config.http.socket is not None and len(listeners) > (self._config.http.port is not None):
                with contextlib.suppress(OSError):
                    os.unlink(self._config.http.socket)

    async def read_again(self, hangups: AsyncIterator[int]) -> None:
        """Read the configured pipelines again at each SIGHUP."""
        async for _ in hangups:
            try:
                self._specs = await trio.to_thread.run_sync(load_pipelines, self._config.file)
            except InstantStartError as error:
                log.error("SIGHUP: the configuration stays as it was: %s", error.message)
                continue
            log.info("SIGHUP: %d pipelines configured", len(self._specs))
            self._reread.set()

    # -- the configuration's pipelines -----------------------------------------------------------------------------

    def pending(self) -> dict[str, PipelineStatus]:
        """Return the configured pipelines that could not be added yet, as `status` shows them."""
        return {
            name: PipelineStatus(
                pipeline=name,
                state="error",
                cached_bytes=0,
                total_bytes=0,
                source=tuple(model.source for model in spec.models),
                generation=0,
                revision="",
                last_request=None,
                hot_until=None,
                pinned=spec.pinned,
                leases=0,
                fill=None,
                error=error,
            )
            for name, (spec, error) in self._failed.items()
        }

    async def keep_pipelines(self) -> None:
        """Add the configured pipelines that are missing. One that fails is tried again, with growing pauses."""
        while True:
            self._reread = trio.Event()
            self._failed.clear()
            async with trio.open_nursery() as nursery:
                for spec in self._specs:
                    nursery.start_soon(self._add, spec)
                await self._reread.wait()
                nursery.cancel_scope.cancel()

    async def _add(self, spec: PipelineSpec) -> None:
        delay = FIRST_RETRY
        while True:
            try:
                with contextlib.suppress(PipelineNotFound):
                    self._compare(spec, self._library.pipelines.spec(spec.id))
                    if self._library.pipelines.spec(spec.id).pinned != spec.pinned and spec.pinned:
                        await self._library.lifecycle.set_pinned(spec.id, True)
                    if self._library.pipelines.spec(spec.id).quota != spec.quota:
                        await self._library.lifecycle.set_quota(spec.id, spec.quota)
                        log.info("its quota is now %s", spec.quota or "unlimited", extra={"pipeline": spec.id})
                    return
                await self._library.admin.add(spec)
                self._failed.pop(spec.id, None)
                return
            except PipelineExists:
                return
            except InstantStartError as error:
                before = self._failed.get(spec.id)
                since = before[1].since if before else datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                self._failed[spec.id] = (spec, ErrorStatus(error.code, error.message, since))
                log.error(
                    "it cannot be added, next try in %.0f s: %s",
                    delay,
                    error.message,
                    extra={"pipeline": spec.id},
                )
            except Exception:
                log.exception("cannot be added", extra={"pipeline": spec.id})
                return
            await trio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY)

    @staticmethod
    def _compare(wanted: PipelineSpec, found: PipelineSpec) -> None:
        if msgspec.structs.replace(wanted, pinned=found.pinned, quota=found.quota) != found:
            log.warning(
                "the pipeline differs from its configuration; `instantstart remove %s` and SIGHUP make it anew",
                wanted.id,
                extra={"pipeline": wanted.id},
            )


def _import_web() -> tuple[Callable[..., Awaitable[None]], type[Site], type[Visitors]]:
    from instantstart_fs.web.app import Site
    from instantstart_fs.web.server import serve
    from instantstart_fs.web.visitors import Visitors

    return serve, Site, Visitors
