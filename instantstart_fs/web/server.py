"""The HTTP server in the daemon: hypercorn's connection handling on this trio loop, with limits of our own.

The connections of each caller and of all are bounded; the longest idle one gives way to a new one. A peer that takes
its answer too slowly is disconnected. At the end every connection is closed at once, because sends are shielded from
cancellation. An error in here is logged and never ends the daemon.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol, cast

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework, ASGIReceiveEvent, ASGISendEvent, ConnectionState, Scope
from starlette.types import ASGIApp

from instantstart_fs.control.listener import accept_connections
from instantstart_fs.core.seats import Seat, Seats
from instantstart_fs.ipc.sockets import turn_away
from instantstart_fs.web.visitors import Visitor

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
"""The most connections: of those who administer, and of all others together."""
MAX_EACH = 64
"""The most connections of one user, or of one address where the user is not known."""
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 5\r\n\r\nbusy\n"
STALLED_SECONDS = 20
"""Seconds after which a peer that acknowledges nothing is disconnected."""
IDLE_SECONDS = 5.0


class HttpStream(Protocol):
    """The methods of a trio.SocketStream that a connection needs."""

    @property
    def socket(self) -> trio.socket.SocketType: ...
    async def receive_some(self, max_bytes: int | None = None, /) -> bytes | bytearray: ...
    async def send_all(self, data: bytes | bytearray | memoryview, /) -> None: ...
    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...


class ConnectionLimits:
    """Bounds connections by caller and altogether, with places of their own for administrators. An idle connection
    gives its seat to a new one (core/seats.py)."""

    def __init__(self, identify: Callable[[trio.SocketStream], Visitor]) -> None:
        self._identify = identify
        self._privileged, self._others = Seats(), Seats()
        self._connected: dict[Seat, trio.SocketStream] = {}

    @contextlib.contextmanager
    def admit(self, stream: trio.SocketStream) -> Iterator[tuple[Visitor, Seat] | None]:
        """Admit one connection inside the block. Yields its visitor and seat, or None if no seat is free."""
        visitor = self._identify(stream)
        seats = self._privileged if visitor.sight.everything else self._others
        seat, leaves = seats.enter(visitor.share, trio.current_time(), each=MAX_EACH, total=MAX_CONNECTIONS)
        if leaves is not None:
            self._connected.pop(leaves).socket.close()
        if not isinstance(seat, Seat):
            yield None
            return
        self._connected[seat] = stream
        try:
            yield visitor, seat
        finally:
            self._connected.pop(seat, None)
            seats.leave(seat)

    def close_all(self) -> None:
        """Disconnect everybody."""
        for stream in self._connected.values():
            stream.socket.close()


class _Tasks(TaskGroup):
    """Hypercorn's task group, for applications that may leave a body unread.

    What still arrives for a request that was answered is dropped, so it never waits for a reader.
    """

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        answered = False
        waiting: set[trio.CancelScope] = set()

        async def told(message: ASGISendEvent | None) -> None:
            nonlocal answered
            if message is None or (message["type"] == "http.response.body" and not message.get("more_body", False)):
                answered = True
                for put_scope in waiting:
                    put_scope.cancel()
            await send(message)

        put = await super().spawn_app(app, config, scope, told)

        async def guarded(message: ASGIReceiveEvent) -> None:
            if answered:
                return
            with trio.CancelScope() as put_scope:
                waiting.add(put_scope)
                try:
                    await put(message)
                finally:
                    waiting.discard(put_scope)

        return guarded


class Http1(H11Protocol):
    """HTTP/1.0 and 1.1 only, without upgrades to another protocol.

    HTTP/2 makes a hundred requests of one packet, and another hundred of resetting them; nothing here needs it, nor web
    sockets. An `Upgrade:` is answered as if it were not there (RFC 9110, 7.8), another version with 505.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """Keep hypercorn from changing to HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version not in (b"1.0", b"1.1"):
            await self._send_error_response(505)
            await self.send(Closed())
            return
        # Two lengths: somebody on the way may have believed the other one, and taken a body for a second request.
        framing = {name for name, _ in request.headers} & {b"content-length", b"transfer-encoding"}
        if len(framing) > 1 or (b"transfer-encoding" in framing and request.http_version == b"1.0"):
            await self._send_error_response(400)
            await self.send(Closed())
            return
        self.stream = HTTPStream(
            *(self.app, self.config, self.context, self.task_group, self.ssl, self.client, self.server),
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1
        await self.context.mark_request()


class Connection(TCPServer):
    """One connection without TLS, of the visitor in ``state``. Its ``seat`` is idle between requests."""

    seat: Seat
    _asked_out = False
    """Whether the peer has ended its side."""

    async def run(self) -> None:
        try:
            async with _Tasks() as task_group:
                self._task_group = task_group
                self.protocol = Http1(  # type: ignore[assignment]
                    *(self.app, self.config, self.context, task_group, ConnectionState(self.state)),
                    ssl=False,
                    client=("", 0),
                    server=None,
                    send=self.protocol_send,
                )
                await self.idle_task.restart(task_group, self._idle_timeout)
                await self._read_data()
                # Nothing more is asked here: the connection ends with its last answer, not when the idle time is over.
                self._asked_out = True
                await self.idle_task.stop()
        except OSError:
            pass
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            if isinstance(event, Updated):
                if event.idle:
                    self.seat.idle(trio.current_time())
                    if self._asked_out:
                        return
                else:
                    self.seat.at_work()
            await super().protocol_send(event)
            return
        # A byte now and then is not reading: a peer that is so slow holds a connection for nothing.
        disconnected = False
        async with self.send_lock:
            with trio.move_on_after(STALLED_SECONDS, shield=True) as taking:
                try:
                    await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                    disconnected = True  # busy: another task is sending its end (``_close``)
        if disconnected or taking.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())


class Connections:
    """Serves connections for one application. ``idle`` is the seconds between two requests, and for the head of one."""

    def __init__(self, app: ASGIApp, *, idle: float) -> None:
        self._config = Config()
        self._config.errorlog = logging.getLogger("instantstart_fs.web.http")
        self._config.accesslog = None
        self._config.include_server_header = False
        self._config.keep_alive_timeout = idle
        self._config.h11_max_incomplete_size = 16 * 1024
        self._config.wsgi_max_body_size = 0
        self._app = ASGIWrapper(cast(ASGIFramework, app))
        self._context = WorkerContext(None)

    async def run(self, stream: HttpStream, seat: Seat, **state: object) -> None:
        """Serve one connection until either side ends it. ``state`` is what the application finds in its scope, beside
        ``socket``."""
        shared = ConnectionState({"socket": stream.socket, **state})
        connection = Connection(self._app, self._config, self._context, shared, stream)  # type: ignore[arg-type]
        connection.seat = seat
        await connection.run()


async def serve(
    app: ASGIApp, listeners: Sequence[socket.socket], identify: Callable[[trio.SocketStream], Visitor]
) -> None:
    """Serve ``app`` until cancelled. Owns the listeners. ``identify`` tells who is at the other end of a connection."""
    connections = Connections(app, idle=IDLE_SECONDS)
    limits = ConnectionLimits(identify)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            with limits.admit(stream) as entered:
                if entered is None:
                    await turn_away(stream, BUSY)
                    return
                visitor, seat = entered
                await connections.run(stream, seat, visitor=visitor)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the peer left in the middle
        except* Exception:
            log.exception("a connection to the page failed")
        finally:
            stream.socket.close()

    async def accept(listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        def start(connection: trio.socket.SocketType) -> None:
            if connection.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
                    # A wait or a lease sends nothing for long: whether the peer's machine is there, the kernel asks.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, STALLED_SECONDS)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, STALLED_SECONDS)
            nursery.start_soon(handle, trio.SocketStream(connection))

        with listener:
            await accept_connections(listener, start, name="the page")

    async def cut_off_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            limits.close_all()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut_off_at_the_end)
        for listener in listeners:
            listener.setblocking(False)
            nursery.start_soon(accept, trio.socket.from_stdlib_socket(listener), nursery)
