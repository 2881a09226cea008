"""The daemon's side of the control socket: accepts, asks callers.py who may what, and calls the library. Lives on the
trio thread.

Owns the socket file. One task per connection; what a connection waits for ends with it, but an operation that changes
something (remove, evict, update, …) runs to its end in the server's own nursery, since half of one helps nobody.
Nothing that a client sends, or does not send, may hurt another: messages are bounded, connections are counted, and an
exception of any kind becomes an answer and a logged traceback.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from instantstart_fs.catalog.model import Lessee
from instantstart_fs.config.descriptors import may_connect
from instantstart_fs.control.administration import Administration, Report
from instantstart_fs.control.callers import Callers, Place
from instantstart_fs.control.listening import Peer, listen, peer_of
from instantstart_fs.control.protocol import (
    MAX_HANDED_FILES,
    MAX_NAMES,
    MAX_REQUEST,
    Access,
    Add,
    CheckOrigins,
    ColdStarts,
    DaemonInfo,
    Done,
    Evict,
    Failed,
    Handed,
    HandedFile,
    Include,
    Lease,
    LineBuffer,
    Ls,
    Mark,
    Names,
    Open,
    Opening,
    Pin,
    Ping,
    Progress,
    Remove,
    Request,
    Response,
    Specs,
    Status,
    Touch,
    Update,
    Verify,
    VerifyResult,
    Warm,
    decode_request,
    encode_response,
)
from instantstart_fs.core.eviction import without_others
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import (
    ControlProtocolError,
    InstantStartError,
    PipelineBusy,
    PipelineNotFound,
    StoreFull,
    VariantNotChosen,
    from_code,
)

log = logging.getLogger(__name__)

ACCEPT_RATE = 500.0
ACCEPT_BURST = 512.0
"""New connections a second: who connects is only known afterwards, and each costs the loop about 0.2 ms."""
REQUEST_DEADLINE = 30.0
"""Seconds for a whole request to arrive once it has begun, and for an answer to be taken."""
CHANGE_DEADLINE = 600.0
"""Seconds that a client is kept waiting for a change; the change itself goes on."""
PROGRESS_INTERVAL = 0.25
"""Seconds between two progress messages, at least; about twice that at most."""
IDLE_LIMIT = 15.0
"""Seconds without any filling after which a wait is given up: nothing would ever end it."""
WAIT_PATIENCE = 900.0
"""Seconds without a byte, though it is being filled, after which a wait is given up. Longer than a Retry-After that is
believed (core/retry.py)."""


class ControlServer:
    """Serves ``library`` on the socket at ``path``. ``info`` is asked at each ping; members of ``group`` administer.

    ``pending``: pipelines that are configured and could not be added yet, shown beside those of the library.
    """

    def __init__(
        self,
        library: Administration,
        info: Callable[[], DaemonInfo],
        path: str,
        *,
        group: int | None = None,
        group_access: bool = False,
        pending: Callable[[], Mapping[str, PipelineStatus]] = dict,
        peer: Callable[[trio.socket.SocketType], Peer] = peer_of,
    ) -> None:
        self.path = path
        self._library = library
        self._info = info
        self._peer = peer
        self._pending = pending
        self._nursery: trio.Nursery | None = None
        self._leases: dict[str, dict[trio.CancelScope, None]] = {}
        self.callers = Callers(library, group=group, group_access=group_access)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled. Raises ControlError when the socket cannot be made, or a daemon answers on it."""
        listener = listen(self.path)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                accepts = Bucket(ACCEPT_RATE, ACCEPT_BURST, trio.current_time())
                task_status.started()
                short = False
                while True:
                    try:
                        connection, _ = await listener.accept()
                        if not may_connect(connection.fileno()):
                            connection.close()
                            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                    except OSError as error:
                        # Out of descriptors or memory: what runs goes on, and those who wait are accepted later.
                        if not short:
                            log.warning("control socket: accept: %s; trying on", error.strerror or error)
                        short = True
                        await trio.sleep(0.1)
                        continue
                    short = False
                    nursery.start_soon(self._serve, trio.SocketStream(connection))
                    await trio.sleep(accepts.take(trio.current_time()))
        finally:
            self._nursery = None
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    # -- one connection --------------------------------------------------------------------------------------------

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                peer = self._peer(stream.socket)
                await self.callers.wait_room(peer)
                with self.callers.connected(peer) as place:
                    await _Connection(self, stream, peer, place).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            log.exception("control connection failed")

    def visible(self, peer: Peer) -> list[PipelineStatus]:
        """What ``ls`` shows this peer: all, or what it owns."""
        if self.callers.administers(peer):
            found = self._library.list()
            known = {status.pipeline for status in found}
            waiting = [status for name, status in self._pending().items() if name not in known]
            return sorted([*found, *waiting], key=lambda status: status.pipeline)
        owned = self._library.list_where(lambda spec: self.callers.owns(peer, spec))
        return [_without_others(status) for status in owned]

    def names(self, peer: Peer, prefix: str) -> list[str]:
        """The first ids that begin with ``prefix``, of those that this peer may ask for."""
        if self.callers.administers(peer):
            found = {*self._library.names_where(prefix, lambda spec: True)}
            found.update(name for name in self._pending() if name.startswith(prefix))
        else:
            sight = self.callers.sight(peer.uid, peer.groups)
            named = self._library.names_where(prefix, sight.sees)
            found = {name for name in named if self._library.shown_to(name, sight)}
        return sorted(found)[:MAX_NAMES]

    # -- requests --------------------------------------------------------------------------------------------------

    def start_change(self, operation: Callable[[], Awaitable[Any]]) -> _Change:
        """Run it to its end whatever becomes of the connection."""
        assert self._nursery is not None
        change = _Change(operation)
        self._nursery.start_soon(change.run)
        return change

    async def change(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """The same, and wait for it at most CHANGE_DEADLINE; raises what it raised, else PipelineBusy."""
        change = self.start_change(operation)
        with trio.move_on_after(CHANGE_DEADLINE):
            await change.finished.wait()
            return change.result()
        raise PipelineBusy(
            f"still under way after {CHANGE_DEADLINE:g} s: the change goes on, `instantstart status` shows it"
        )

    async def withdraw(
        self, operation: Callable[..., Awaitable[list[str]]], pipeline: str, force: bool
    ) -> list[str] | None:
        """Remove or evict it; by ``force`` no lease is in the way, and all of them end with it."""
        held = await operation(pipeline, force=force)
        if force:
            for scope in list(self._leases.get(pipeline, ())):
                scope.cancel()
        return held or None

    @contextlib.contextmanager
    def leased(self, pipeline: str) -> Iterator[trio.CancelScope]:
        """Around a lease: what ``withdraw`` ends."""
        scopes = self._leases.setdefault(pipeline, {})
        with trio.CancelScope() as scope:
            scopes[scope] = None
            try:
                yield scope
            finally:
                del scopes[scope]
                if not scopes and self._leases.get(pipeline) is scopes:
                    del self._leases[pipeline]

    async def status(self, pipeline: str, *, with_files: bool) -> PipelineStatus:
        try:
            await self._library.ensure_loaded(pipeline)
            return self._library.status(pipeline, with_files=with_files)
        except PipelineNotFound:
            waiting = self._pending().get(pipeline)
            if waiting is None:
                raise
            return waiting

    @property
    def library(self) -> Administration:
        return self._library

    def info(self, peer: Peer) -> DaemonInfo:
        """To those who do not administer: that there is a daemon, and where its mount is."""
        info = self._info()
        if self.callers.administers(peer):
            return info
        return DaemonInfo(info.version, info.pid, info.mount, "", info.uptime, 0, info.ready, info.transport)


class _Change:
    """An operation that no client's departure stops."""

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
        """What it returned, or raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


class _Connection:
    """One client: its requests in turn, each ended when the client goes."""

    def __init__(self, server: ControlServer, stream: trio.SocketStream, peer: Peer, place: Place) -> None:
        self._server = server
        self._place = place
        self._library = server.library
        self._stream = stream
        self._peer = peer
        self._lessee = Lessee(peer.pid, peer.uid)
        self._buffer = LineBuffer(MAX_REQUEST)

    async def run(self) -> None:
        if self._place.refusal is not None:
            await self._send(_failed(self._place.refusal))
            return
        while True:
            try:
                line = await self._read_line()
                if line is None:
                    return
                with self._place.at_work():
                    await self._server.callers.wait_turn(self._peer)
                    if not await self._answer(decode_request(line)):
                        return
            except ControlProtocolError as error:
                await self._send(_failed(error))
                return

    async def _read_line(self) -> bytes | None:
        """The next request; None at the end. A client may be silent between requests for as long as its place has
        patience, and not within one."""
        silent_until = trio.current_time() + self._place.patience
        begun: float | None = None
        while True:
            for line in self._buffer.lines():
                return line
            # From its first byte on, however many come: one now and then would hold a connection for ever.
            begun = (begun or trio.current_time()) if len(self._buffer) else None
            with trio.move_on_at(silent_until if begun is None else begun + REQUEST_DEADLINE) as scope:
                data = await self._stream.receive_some(65536)
            if scope.cancelled_caught:
                if begun is None:
                    return None
                raise ControlProtocolError(f"half a request came, and the rest did not within {REQUEST_DEADLINE:g} s")
            if not data:
                return None
            self._buffer.feed(data)

    async def _answer(self, request: Request) -> bool:
        """False when the connection is over."""
        gone = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                # Only an end or a broken line is of interest while a request runs; what else comes is for afterwards.
                nonlocal gone
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while len(self._buffer) <= MAX_REQUEST:
                        data = await self._stream.receive_some(65536)
                        if not data:
                            break
                        self._buffer.feed(data)
                gone = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await self._send(await self._response(request))
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                gone = True
            nursery.cancel_scope.cancel()
        return not gone

    async def _response(self, request: Request) -> Response:
        """What is to be answered; a lease never returns, it is ended by the connection's end."""
        try:
            self._server.callers.authorize(self._peer, request)
            if isinstance(request, Lease | Open):
                await self._hold(request)
            return Done(await self._perform(request))
        except StoreFull as error:
            # Which others are hot or pinned is theirs to know.
            knows = self._server.callers.administers(self._peer)
            return Failed(error.code, error.message if knows else without_others(error.message), error.retry_after)
        except InstantStartError as error:
            return _failed(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as error:
            log.exception("control request %s failed", type(request).__name__.lower())
            return Failed(InstantStartError.code, f"{type(error).__name__} in the daemon; its log has the traceback")

    async def _perform(self, request: Request) -> Any:
        library, change = self._library, self._server.change
        match request:
            case Ping():
                return self._server.info(self._peer)
            case Ls():
                return self._server.visible(self._peer)
            case Names(prefix):
                return self._server.names(self._peer, prefix)
            case Specs():
                return [library.spec(status.pipeline) for status in library.list()]
            case Status(pipeline, brief):
                return self._shown(await self._server.status(pipeline, with_files=not brief))
            case Touch(pipeline):
                return library.touch(pipeline)
            case Mark(pipeline, moment, at_ns):
                return library.mark(pipeline, moment, at_ns)
            case ColdStarts(pipeline):
                return library.cold_starts(pipeline)
            case Add(spec, warm):
                return await change(lambda: self._add(spec, warm))
            case Update(pipeline):
                return await change(lambda: library.update(pipeline))
            case Remove(pipeline, force):
                return await change(lambda: self._server.withdraw(library.remove, pipeline, force))
            case Evict(pipeline, force):
                return await change(lambda: self._server.withdraw(library.evict, pipeline, force))
            case Pin(pipeline, pinned):
                return await change(lambda: library.set_pinned(pipeline, pinned))
            case Warm(pipeline, everything, wait):
                await change(lambda: library.warm(pipeline, everything=everything))
                if wait:
                    return await self._wait_warm(pipeline, everything)
                return self._shown(library.status(pipeline))
            case Include(pipeline, globs):
                return await change(lambda: library.include(pipeline, globs))
            case Verify(pipeline, rate):
                return await self._verify(pipeline, rate)
            case CheckOrigins():
                return await library.check_origins(lambda spec: self._server.callers.oversees(self._peer, spec))
            case Access(pipeline):
                return await change(lambda: library.check_access(pipeline))
            case Lease() | Open():
                raise AssertionError("handled by the caller")

    async def _hold(self, request: Lease | Open) -> None:
        """Returns only by an exception: the lease lasts as long as the connection, and is ended with it."""
        with self._server.leased(request.pipeline) as scope:
            await (self._hand_over(request) if isinstance(request, Open) else self._lease(request))
        if scope.cancelled_caught:
            await self._send(_failed(PipelineBusy(f"{request.pipeline}: an administrator took it away by force")))
        raise trio.BrokenResourceError("the lease has ended")

    async def _lease(self, request: Lease) -> None:
        with self._library.lease(request.pipeline, self._lessee):
            await self._send(Done())
            await trio.sleep_forever()

    async def _hand_over(self, request: Open) -> None:
        async with self._library.opening(request.pipeline, request.deadlines, self._lessee) as handover:
            await self._send(Opening(handover.weights))
            while not handover.finished:
                handed = await handover.next_files(MAX_HANDED_FILES, 1.0)
                try:
                    if handed:
                        message = Handed(tuple(HandedFile(path, len(fds)) for path, fds in handed))
                        await self._send(message, [fd for _, fds in handed for fd in fds])
                    else:
                        await self._send(Progress(status=self._brief(request.pipeline)))
                finally:
                    for _, fds in handed:
                        for fd in fds:
                            os.close(fd)
            await self._send(Done())
            await trio.sleep_forever()

    def _shown(self, status: PipelineStatus) -> PipelineStatus:
        return status if self._server.callers.administers(self._peer) else _without_others(status)

    def _brief(self, pipeline: str) -> PipelineStatus:
        return self._shown(self._library.status(pipeline, with_files=False))

    async def _add(self, spec: PipelineSpec, warm: bool) -> PipelineStatus:
        status = await self._library.add(spec)
        if warm:
            try:
                await self._library.warm(spec.id)
            except VariantNotChosen as error:
                raise VariantNotChosen(f"{spec.id} was added, and is not filled: {error.message}") from error
            status = self._library.status(spec.id)
        return status

    async def _wait_warm(self, pipeline: str, everything: bool) -> PipelineStatus:
        """Until the wanted files are all there. Raises what made the fill stop."""
        busy_at = moved_at = trio.current_time()
        cached = -1
        told_at = -PROGRESS_INTERVAL
        while True:
            began = time.perf_counter()
            status = self._library.status(pipeline, with_files=everything)
            brief = self._shown(status.brief if everything else status)
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
                await self._send(Progress(status=brief))
            await self._library.wait_changed(pipeline, PROGRESS_INTERVAL)
            await trio.sleep(pause)

    async def _verify(self, pipeline: str, rate: float | None) -> VerifyResult:
        latest = (0, 0)

        def progress(done: int, total: int) -> None:
            nonlocal latest
            latest = (done, total)

        change = self._server.start_change(lambda: self._library.verify(pipeline, progress, rate))
        while not change.finished.is_set():
            with trio.move_on_after(1.0) as waiting:
                await change.finished.wait()
            if waiting.cancelled_caught and latest[1]:
                await self._send(Progress(done_bytes=latest[0], total_bytes=latest[1]))
        found: Report = change.result()
        return VerifyResult(found.files, found.bytes, tuple(found.healed), tuple(found.unproven))

    async def _send(self, response: Response, descriptors: Sequence[int] = ()) -> None:
        """``descriptors`` go with its first byte. Raises BrokenResourceError when the client does not take it in
        time."""
        try:
            line = encode_response(response)
        except ControlProtocolError as error:
            line = encode_response(_failed(error))
        with trio.move_on_after(REQUEST_DEADLINE) as scope:
            if descriptors:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                try:
                    sent = await self._stream.socket.sendmsg([line], [rights])
                except OSError as error:
                    raise trio.BrokenResourceError(str(error)) from error
                line = line[sent:]
            if line:
                await self._stream.send_all(line)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read its answers")


def _without_others(status: PipelineStatus) -> PipelineStatus:
    """As its owner may see it, who may not know which others are hot."""
    if status.uncached is None:
        return status
    return msgspec.structs.replace(status, uncached=without_others(status.uncached))


def _is_warm(status: PipelineStatus, everything: bool) -> bool:
    if everything and status.files is not None:
        return all(file.state in ("sealed", "unverified") for file in status.files)
    return status.state in ("warm", "unverified")


def _failed(error: InstantStartError) -> Failed:
    return Failed(error.code, error.message, error.retry_after)


@asynccontextmanager
async def serving(
    library: Administration, info: Callable[[], DaemonInfo], path: str, **options: Any
) -> AsyncIterator[ControlServer]:
    """The server running inside the ``async with``."""
    server = ControlServer(library, info, path, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
