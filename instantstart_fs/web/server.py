"""The HTTP server in the daemon: hypercorn's connection handling on this trio loop, behind a door of our own.

The door is what keeps the daemon safe from its page: a bounded number of connections (further ones wait in the kernel's
backlog), a peer that takes nothing for a while is cut off (TCP_USER_TIMEOUT), and at the end every connection is closed
at once, because hypercorn shields its sends from cancellation. What fails in here is logged and never ends the daemon.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import cast

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from starlette.types import ASGIApp

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
STALLED_SECONDS = 20
"""A peer that acknowledges nothing for so long is gone."""
IDLE_SECONDS = 5.0


class Door(trio.abc.Listener[trio.SocketStream]):
    """Accepts while there is room."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._room = trio.Semaphore(MAX_CONNECTIONS)
        self._inside: set[trio.SocketStream] = set()

    async def accept(self) -> trio.SocketStream:
        await self._room.acquire()
        try:
            stream = await self._listener.accept()
        except BaseException:
            self._room.release()
            raise
        self._inside.add(stream)
        with contextlib.suppress(OSError):
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
        return stream

    def leave(self, stream: trio.SocketStream) -> None:
        stream.socket.close()
        self._inside.discard(stream)
        self._room.release()

    def close_all(self) -> None:
        """Everybody inside is cut off."""
        for stream in self._inside:
            stream.socket.close()

    async def aclose(self) -> None:
        await self._listener.aclose()


class Http1(H11Protocol):
    """HTTP/1.0 and 1.1, and nothing that a connection could be turned into.

    HTTP/2 makes a hundred requests of one packet, and of resetting them another hundred; nothing here needs it, nor
    web sockets. An `Upgrade:` is answered as if it were not there (RFC 9110, 7.8), another version with 505.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """Where hypercorn would change to HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version not in (b"1.0", b"1.1"):
            await self._send_error_response(505)
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
    """One of them, without TLS."""

    async def run(self) -> None:
        try:
            async with TaskGroup() as task_group:
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
        except OSError:
            pass
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        # A byte now and then is not reading: whoever takes an answer so slowly holds a connection for nothing.
        gone = False
        async with self.send_lock:
            with trio.move_on_after(STALLED_SECONDS, shield=True) as taking:
                try:
                    await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    gone = True
        if gone or taking.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Until cancelled. Owns the listener."""
    config = Config()
    config.errorlog = logging.getLogger("instantstart_fs.web.http")
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_SECONDS
    config.h11_max_incomplete_size = 16 * 1024
    config.wsgi_max_body_size = 0
    door = Door(listener)
    wrapped = ASGIWrapper(cast(ASGIFramework, app))
    context = WorkerContext(None)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await Connection(wrapped, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the peer left in the middle
        except* Exception:
            log.exception("a connection to the page failed")
        finally:
            door.leave(stream)

    async def cut_off_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            door.close_all()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut_off_at_the_end)
        await trio.serve_listeners(handle, [door], handler_nursery=nursery)
