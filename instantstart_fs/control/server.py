"""The daemon's end of the control socket: owns the socket file, accepts connections, and gives each a task.

Runs on the trio thread. Connections are counted by caller (``callers.py``), so that none can shut others out.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from instantstart_fs.config.unixsocket import Peer, peer_of
from instantstart_fs.control.callers import Callers
from instantstart_fs.control.connection import Connection, HandOver
from instantstart_fs.control.dispatcher import Dispatcher
from instantstart_fs.control.listener import accept_connections, listen
from instantstart_fs.control.parts import Parts
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.status import PipelineStatus

log = logging.getLogger(__name__)


class ControlServer:
    """Serves ``library`` on the socket at ``path``. ``info`` is asked at each ping; members of ``group`` administer.

    ``pending``: pipelines that are configured and could not be added yet, shown beside those of the library. ``http``:
    who answers the connections that speak it. ``dispatcher``: from the start on.
    """

    dispatcher: Dispatcher

    def __init__(
        self,
        library: Parts,
        info: Callable[[], DaemonInfo],
        path: str,
        *,
        group: int | None = None,
        group_access: bool = False,
        pending: Callable[[], Mapping[str, PipelineStatus]] = dict,
        peer: Callable[[trio.socket.SocketType], Peer] = peer_of,
        http: HandOver | None = None,
    ) -> None:
        self._http = http
        self.path = path
        self._library = library
        self._info = info
        self._peer = peer
        self._pending = pending
        self.callers = Callers(library.pipelines, group=group, group_access=group_access)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled. Raises ControlError when the socket cannot be made, or a daemon answers on it."""
        listener = listen(self.path)
        try:
            async with trio.open_nursery() as nursery:
                self.dispatcher = Dispatcher(self._library, self.callers, self._info, self._pending, nursery)
                task_status.started()

                def serve(connection: trio.socket.SocketType) -> None:
                    nursery.start_soon(self._serve, trio.SocketStream(connection))

                await accept_connections(listener, serve, name="control socket")
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                peer = self._peer(stream.socket)
                await self.callers.wait_for_seat(peer)
                with self.callers.connected(peer) as place:
                    await Connection(self.dispatcher, stream, peer, place, self._http).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            log.exception("control connection failed")


@asynccontextmanager
async def serving(
    library: Parts, info: Callable[[], DaemonInfo], path: str, **options: Any
) -> AsyncIterator[ControlServer]:
    """The server running inside the ``async with``."""
    server = ControlServer(library, info, path, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
