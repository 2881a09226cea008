"""Carries out the requests of the control protocol on the library, for a caller that may make them.

Who may make a request is decided in ``callers.py``; how requests and answers travel is ``connection.py``. A change that
has begun (remove, evict, update, …) runs to its end in the server's nursery though its client leaves: half a change
helps nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import trio

from instantstart_fs.catalog.model import Lessee
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control import protocol, startup
from instantstart_fs.control.callers import Callers
from instantstart_fs.control.parts import Parts, Report
from instantstart_fs.core.eviction import without_others
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import (
    InstantStartError,
    PipelineBusy,
    PipelineNotFound,
    StoreFull,
    UsageError,
    from_code,
)

log = logging.getLogger(__name__)

CHANGE_DEADLINE = 600.0
"""Seconds that a client is kept waiting for a change; the change itself goes on."""
PROGRESS_INTERVAL = 0.25
"""The fewest seconds between two progress messages; the most are about twice that."""
IDLE_LIMIT = 15.0
"""Seconds without any filling after which a wait ends, because nothing else would end it."""
WAIT_PATIENCE = 900.0
"""Seconds without a byte of a running fill after which a wait ends. Longer than any Retry-After that is believed
(core/retry.py)."""


class Send(Protocol):
    """Sends one message to a caller, with descriptors beside its first byte. Raises BrokenResourceError."""

    async def __call__(self, response: protocol.Response, descriptors: Sequence[int] = ()) -> None: ...


class Caller(NamedTuple):
    """A client that asks: its process, what its leases are recorded under, the way back to it, and the starts
    (pipeline, id) that `run` has begun on its connection."""

    peer: Peer
    lessee: Lessee
    send: Send
    starts: list[tuple[str, str]]


class Dispatcher:
    """The daemon's answers to requests. ``changes`` runs operations that must complete without their client. ``info``
    is asked at each ping; ``pending`` gives pipelines that are configured but not added yet."""

    def __init__(
        self,
        library: Parts,
        callers: Callers,
        info: Callable[[], protocol.DaemonInfo],
        pending: Callable[[], Mapping[str, PipelineStatus]],
        changes: trio.Nursery,
    ) -> None:
        self._library = library
        self.callers = callers
        self._info = info
        self._pending = pending
        self._changes = changes
        self._leases: dict[str, dict[trio.CancelScope, None]] = {}

    async def respond(self, request: protocol.Request, caller: Caller) -> protocol.Done | protocol.Failed:
        """Return the last message for a request, whether it succeeds or fails. Raises BrokenResourceError when the
        caller no longer reads, and at the end of a lease, which ends with its connection."""
        try:
            self.callers.authorize(caller.peer, request)
            if isinstance(request, protocol.Lease | protocol.Open):
                await self.hold(request, caller)
            return protocol.Done(await self.perform(request, caller))
        except StoreFull as error:
            # Which others are hot or pinned is theirs to know.
            knows = self.callers.administers(caller.peer)
            message = error.message if knows else without_others(error.message)
            return protocol.Failed(error.code, message, error.retry_after)
        except InstantStartError as error:
            return protocol.failed(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as error:
            log.exception("control request %s failed", type(request).__name__.lower())
            message = f"{type(error).__name__} in the daemon; its log has the traceback"
            return protocol.Failed(InstantStartError.code, message)

    async def perform(self, request: protocol.Request, caller: Caller) -> Any:
        """Return the result of ``request``, as ``protocol`` documents it. Raises InstantStartError, and
        BrokenResourceError when the caller no longer reads."""
        library, change = self._library, self._change
        match request:
            case protocol.Ping():
                return self._info_for(caller.peer)
            case protocol.Ls():
                return self._visible(caller.peer)
            case protocol.Names(prefix):
                return self._names(caller.peer, prefix)
            case protocol.Specs():
                return [library.pipelines.spec(status.pipeline) for status in library.pipelines.list()]
            case protocol.Status(pipeline, brief):
                return self._shown(caller, await self._status(pipeline, with_files=not brief))
            case protocol.Touch(pipeline):
                return library.admin.touch(pipeline)
            case protocol.Mark(pipeline, moment, at_ns, start):
                return library.cold_starts.mark(pipeline, moment, at_ns, start)
            case protocol.StartupBegin():
                return await self._begin_start(request, caller)
            case protocol.StartupSave():
                return await startup.save(library.startup, request, caller.peer.uid, caller.send)
            case protocol.StartupReport():
                return self._report_start(request)
            case protocol.StartupCaches(pipeline):
                return await library.startup.records(pipeline)
            case protocol.StartupVerify(pipeline):
                return await startup.verify(library.startup, pipeline)
            case protocol.StartupRemove(pipeline, numbers):
                return await change(lambda: library.startup.remove(pipeline, numbers))
            case protocol.ColdStarts(pipeline):
                return library.cold_starts.of(pipeline)
            case protocol.Add(spec, warm):
                return await change(lambda: self._add(spec, warm))
            case protocol.Update(pipeline):
                return await change(lambda: library.admin.update(pipeline))
            case protocol.Remove(pipeline, force):
                return await change(lambda: self._withdraw(library.admin.remove, pipeline, force))
            case protocol.Evict(pipeline, force):
                return await change(lambda: self._withdraw(library.admin.evict, pipeline, force))
            case protocol.Pin(pipeline, pinned):
                return await change(lambda: library.lifecycle.set_pinned(pipeline, pinned))
            case protocol.Warm(pipeline, everything, wait):
                await change(lambda: library.warming.warm(pipeline, everything=everything))
                if wait:
                    return await self._wait_warm(caller, pipeline, everything)
                return self._shown(caller, library.pipelines.status(pipeline))
            case protocol.Include(pipeline, globs):
                return await change(lambda: library.warming.include(pipeline, globs))
            case protocol.Verify(pipeline, rate):
                return await self._verify(caller, pipeline, rate)
            case protocol.CheckOrigins():
                return await library.origin_checks.run(lambda spec: self.callers.oversees(caller.peer, spec))
            case protocol.AskRegion(pipeline, check):
                return await self._ask_region(pipeline, check)
            case protocol.Access(pipeline, token_file):
                return await change(lambda: library.admin.check_access(pipeline, token_file))
            case protocol.Lease() | protocol.Open():
                raise AssertionError("a lease is held, see hold()")

    async def _begin_start(self, request: protocol.StartupBegin, caller: Caller) -> protocol.StartupBegun:
        pipeline = request.pipeline
        start = await self._library.cold_starts.begin(pipeline, request.start, request.requested_ns)
        caller.starts.append((pipeline, start))
        fill = None if request.start else self._start_change(lambda: self._library.warming.warm(pipeline))
        mount = self._info_for(caller.peer).mount
        return await startup.begin(self._library.startup, request, caller.peer.uid, start, mount, fill, caller.send)

    async def _ask_region(self, pipeline: str, check: bool) -> protocol.RegionState:
        heartbeats = self._library.heartbeats
        if heartbeats is None:
            raise UsageError("this daemon has no [regional] in its configuration")
        found = await heartbeats.written(pipeline, check=check)
        return protocol.RegionState(found.owed_bytes, found.unsealed, found.files, heartbeats.tier, found.sealed)

    def _report_start(self, report: protocol.StartupReport) -> None:
        self._library.startup.suspects.reported(report.start, report.pipeline, failed=report.failed)
        self._library.cold_starts.report(
            report.pipeline,
            report.start,
            restore_seconds=report.restore_seconds,
            restored=report.outcome,
            command_after=report.command_after,
            engine_phases=report.phases,
            exit_status=report.status,
            ended=report.ended,
        )

    def disconnected(self, caller: Caller) -> None:
        """End the starts that `run` began on this connection, which has ended."""
        for pipeline, start in caller.starts:
            self._library.cold_starts.end(pipeline, start)

    async def hold(self, request: protocol.Lease | protocol.Open, caller: Caller) -> None:
        """Hold a lease until the connection ends or the lease is ended. Never returns; raises."""
        with self._leased(request.pipeline) as scope:
            if isinstance(request, protocol.Open):
                await self._hand_over(request, caller)
            else:
                await self._lease(request, caller)
        if scope.cancelled_caught:
            error = PipelineBusy(f"{request.pipeline}: an administrator took it away by force")
            await caller.send(protocol.failed(error))
        raise trio.BrokenResourceError("the lease has ended")

    async def _lease(self, request: protocol.Lease, caller: Caller) -> None:
        with self._library.leases.lease(request.pipeline, caller.lessee):
            await caller.send(protocol.Done())
            await trio.sleep_forever()

    async def _hand_over(self, request: protocol.Open, caller: Caller) -> None:
        async with self._library.leases.opening(request.pipeline, request.deadlines, caller.lessee) as handover:
            await caller.send(protocol.Opening(handover.weights))
            while request.stream and not handover.finished:
                parts = await handover.next_parts(protocol.MAX_HANDED_FILES, 1.0)
                try:
                    if parts:
                        news = (
                            protocol.Part(part.path, len(part.descriptors), part.ranges, part.complete, part.again)
                            for part in parts
                        )
                        await caller.send(
                            protocol.Parts(tuple(news)), [fd for part in parts for fd in part.descriptors]
                        )
                    else:
                        await caller.send(protocol.Progress(status=self._brief(caller, request.pipeline)))
                finally:
                    for part in parts:
                        for fd in part.descriptors:
                            os.close(fd)
            while not handover.finished:
                handed = await handover.next_files(protocol.MAX_HANDED_FILES, 1.0)
                try:
                    if handed:
                        message = protocol.Handed(tuple(protocol.HandedFile(path, len(fds)) for path, fds in handed))
                        await caller.send(message, [fd for _, fds in handed for fd in fds])
                    else:
                        await caller.send(protocol.Progress(status=self._brief(caller, request.pipeline)))
                finally:
                    for _, fds in handed:
                        for fd in fds:
                            os.close(fd)
            await caller.send(protocol.Done())
            await trio.sleep_forever()

    def _shown(self, caller: Caller, status: PipelineStatus) -> PipelineStatus:
        return status if self.callers.administers(caller.peer) else _without_others(status)

    def _brief(self, caller: Caller, pipeline: str) -> PipelineStatus:
        return self._shown(caller, self._library.pipelines.status(pipeline, with_files=False))

    async def _add(self, spec: PipelineSpec, warm: bool) -> PipelineStatus:
        status = await self._library.admin.add(spec)
        if warm:
            try:
                await self._library.warming.warm(spec.id)
            except InstantStartError as error:
                raise from_code(error.code, f"{spec.id} was added, and is not filled: {error.message}") from error
            status = self._library.pipelines.status(spec.id)
        return status

    async def _wait_warm(self, caller: Caller, pipeline: str, everything: bool) -> PipelineStatus:
        """Wait until the wanted files are all there. Raises what made the fill stop."""
        busy_at = moved_at = trio.current_time()
        cached = -1
        told_at = -PROGRESS_INTERVAL
        while True:
            began = time.perf_counter()
            status = self._library.pipelines.status(pipeline, with_files=everything)
            brief = self._shown(caller, status.brief if everything else status)
            if _is_warm(status, everything):
                return brief
            if status.state == "error":
                error = status.error
                raise from_code(
                    error.code if error else InstantStartError.code,
                    f"{pipeline}: {error.message}" if error else f"{pipeline}: the fill failed",
                )
            if status.cached_bytes != cached or (status.fill is not None and status.fill.bytes_per_second):
                cached, moved_at = status.cached_bytes, trio.current_time()
            elif trio.current_time() > moved_at + WAIT_PATIENCE:
                reason = status.error.message if status.error else "nobody says why"
                raise InstantStartError(f"{pipeline}: nothing came for {WAIT_PATIENCE / 60:g} min: {reason}")
            if status.fill is not None:
                busy_at = trio.current_time()
            elif status.uncached:
                raise StoreFull(f"{pipeline}: {status.uncached}")
            elif trio.current_time() > busy_at + IDLE_LIMIT:
                reason = status.error.message if status.error else "`instantstart status` shows what is missing"
                raise InstantStartError(f"{pipeline}: the fill has stopped: {reason}")
            # 10,000 files take a while to describe: no more than a tenth of the daemon's time goes there.
            pause = min(1.0, max(0.01, 10 * (time.perf_counter() - began)))
            if trio.current_time() >= told_at + PROGRESS_INTERVAL:
                told_at = trio.current_time()
                await caller.send(protocol.Progress(status=brief))
            await self._library.pipelines.wait_changed(pipeline, PROGRESS_INTERVAL)
            await trio.sleep(pause)

    async def _verify(self, caller: Caller, pipeline: str, rate: float | None) -> protocol.VerifyResult:
        latest = (0, 0)

        def progress(done: int, total: int) -> None:
            nonlocal latest
            latest = (done, total)

        change = self._start_change(lambda: self._library.verifier.verify(pipeline, progress, rate))
        while not change.finished.is_set():
            with trio.move_on_after(1.0) as waiting:
                await change.finished.wait()
            if waiting.cancelled_caught and latest[1]:
                await caller.send(protocol.Progress(done_bytes=latest[0], total_bytes=latest[1]))
        found: Report = change.result()
        return protocol.VerifyResult(found.files, found.bytes, tuple(found.healed), tuple(found.unproven))

    def _visible(self, peer: Peer) -> list[PipelineStatus]:
        """Return the pipelines that ``ls`` shows this peer: all, or those that it owns."""
        if self.callers.administers(peer):
            found = self._library.pipelines.list()
            known = {status.pipeline for status in found}
            waiting = [status for name, status in self._pending().items() if name not in known]
            return sorted([*found, *waiting], key=lambda status: status.pipeline)
        owned = self._library.pipelines.list_where(lambda spec: self.callers.owns(peer, spec))
        return [_without_others(status) for status in owned]

    def _names(self, peer: Peer, prefix: str) -> list[str]:
        """Return the first ids that begin with ``prefix``, of those that this peer may ask for."""
        if self.callers.administers(peer):
            found = {*self._library.pipelines.names_where(prefix, lambda spec: True)}
            found.update(name for name in self._pending() if name.startswith(prefix))
        else:
            sight = self.callers.sight(peer.uid, peer.groups)
            named = self._library.pipelines.names_where(prefix, sight.sees)
            found = {name for name in named if self._library.pipelines.shown_to(name, sight)}
        return sorted(found)[: protocol.MAX_NAMES]

    def _start_change(self, operation: Callable[[], Awaitable[Any]]) -> Change:
        """Run the operation to its end, whatever happens to the connection."""
        change = Change(operation)
        self._changes.start_soon(change.run)
        return change

    async def _change(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Start a change and wait for its result, at most CHANGE_DEADLINE. Raises its exception, or PipelineBusy."""
        change = self._start_change(operation)
        with trio.move_on_after(CHANGE_DEADLINE):
            await change.finished.wait()
            return change.result()
        raise PipelineBusy(
            f"still under way after {CHANGE_DEADLINE:g} s: the change goes on, `instantstart status` shows it"
        )

    async def _withdraw(
        self, operation: Callable[..., Awaitable[list[str]]], pipeline: str, force: bool
    ) -> list[str] | None:
        """Remove or evict a pipeline by ``operation``. With ``force``, leases do not prevent it and end with it."""
        held = await operation(pipeline, force=force)
        if force:
            for scope in list(self._leases.get(pipeline, ())):
                scope.cancel()
        return held or None

    @contextlib.contextmanager
    def _leased(self, pipeline: str) -> Iterator[trio.CancelScope]:
        """Hold a lease inside the block; ``_withdraw`` may end it."""
        scopes = self._leases.setdefault(pipeline, {})
        with trio.CancelScope() as scope:
            scopes[scope] = None
            try:
                yield scope
            finally:
                del scopes[scope]
                if not scopes and self._leases.get(pipeline) is scopes:
                    del self._leases[pipeline]

    async def _status(self, pipeline: str, *, with_files: bool) -> PipelineStatus:
        try:
            await self._library.pipelines.ensure_loaded(pipeline)
            return self._library.pipelines.status(pipeline, with_files=with_files)
        except PipelineNotFound:
            waiting = self._pending().get(pipeline)
            if waiting is None:
                raise
            return waiting

    def _info_for(self, peer: Peer) -> protocol.DaemonInfo:
        """Return what users who do not administer may know: that there is a daemon, and where its mount is."""
        info = self._info()
        if self.callers.administers(peer):
            return info
        return protocol.DaemonInfo(info.version, info.pid, info.mount, "", info.uptime, 0, info.ready, info.transport)


class Change:
    """An operation that goes on when its client leaves."""

    def __init__(self, operation: Callable[[], Awaitable[Any]]) -> None:
        self._operation = operation
        self._value: Any = None
        self._error: Exception | None = None
        self.finished = trio.Event()

    async def run(self) -> None:
        try:
            self._value = await self._operation()
        except Exception as error:
            self._error = error
        finally:
            self.finished.set()

    def result(self) -> Any:
        """Return its result, or raise its exception."""
        if self._error is not None:
            raise self._error
        return self._value


def _without_others(status: PipelineStatus) -> PipelineStatus:
    """Return the message for the pipeline's owner, without the names of other pipelines."""
    if status.uncached is None:
        return status
    return msgspec.structs.replace(status, uncached=without_others(status.uncached))


def _is_warm(status: PipelineStatus, everything: bool) -> bool:
    if everything and status.files is not None:
        return all(file.state in ("sealed", "unverified") for file in status.files)
    return status.state in ("warm", "unverified")
