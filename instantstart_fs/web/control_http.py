"""HTTP on the control socket: a connection that speaks it is served by the page's HTTP server and the API (api.py).

Their libraries take a good part of a second to import. The first request waits for that, in a thread; a daemon that is
never asked over HTTP does not load them. This module imports none of them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from instantstart_fs.config import HttpConfig
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control.callers import Callers, Place
from instantstart_fs.control.dispatcher import Dispatcher
from instantstart_fs.core.sight import Sight
from instantstart_fs.ipc.sockets import turn_away
from instantstart_fs.library import Library

if TYPE_CHECKING:
    from instantstart_fs.web.api import Api
    from instantstart_fs.web.server import Connections

log = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""Seconds between two requests of a connection, and for the head of one."""
NAMES = ("localhost", "instantstart", "127.0.0.1")
"""Host names that are accepted on the control socket beside those of [http]. curl has to name some host."""
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)


class ControlHttp:
    """A control.connection.HandOver that lives as long as the daemon."""

    def __init__(self, config: HttpConfig, library: Library) -> None:
        self._config = config
        self._library = library
        self._importing = trio.Lock()
        self._connections: Connections | None = None

    async def __call__(
        self, dispatcher: Dispatcher, stream: trio.SocketStream, begun: bytes, peer: Peer, place: Place
    ) -> None:
        """Serve one connection to its end."""
        if place.refusal is not None:
            body = b'{"error":{"code":"pipeline-busy","message":"too many connections are open","retry_after":1.0}}\n'
            await turn_away(stream, BUSY % (len(body), body))
            return
        connections = await self._ready(dispatcher)
        async with trio.open_nursery() as nursery:

            async def cut_off_at_the_end() -> None:
                # Sends are shielded from cancellation: only a closed socket ends one.
                try:
                    await trio.sleep_forever()
                finally:
                    stream.socket.close()

            nursery.start_soon(cut_off_at_the_end)
            await connections.run(_Begun(stream, begun), place.seat, peer=peer)
            nursery.cancel_scope.cancel()

    async def _ready(self, dispatcher: Dispatcher) -> Connections:
        async with self._importing:
            if self._connections is None:
                connections, api = await trio.to_thread.run_sync(_import)
                hosts = (*NAMES, "[::1]", *self._config.hosts)
                made = api(dispatcher, self._library, hosts, lambda peer: sight_of(dispatcher.callers, peer))
                self._connections = connections(made, idle=IDLE_SECONDS)
            return self._connections


def sight_of(callers: Callers, peer: Peer) -> Sight:
    """Return what that caller may see."""
    return callers.sight(peer.uid, peer.groups)


class _Begun:
    """A stream of which some bytes have been read already."""

    def __init__(self, stream: trio.SocketStream, begun: bytes) -> None:
        self._stream = stream
        self._begun = begun
        self.socket = stream.socket
        self.send_all = stream.send_all
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        begun, self._begun = self._begun, b""
        return begun or await self._stream.receive_some(max_bytes)


def _import() -> tuple[type[Connections], type[Api]]:
    from instantstart_fs.web.api import Api
    from instantstart_fs.web.server import Connections

    return Connections, Api
