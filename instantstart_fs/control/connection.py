"""One connection of the control socket: reads requests, sends answers, and ends a wait when its client leaves.

A message is bounded and has a deadline. What a request does is in ``dispatcher.py``. A connection whose first byte is a
letter speaks HTTP (a message of ours begins with a brace), and is handed to the HTTP server.
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections.abc import Sequence
from typing import Protocol

import trio

from instantstart_fs.catalog.model import Lessee
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control import lines, protocol
from instantstart_fs.control.callers import Place
from instantstart_fs.control.dispatcher import Caller, Dispatcher
from instantstart_fs.errors import ControlProtocolError, PipelineBusy

REQUEST_DEADLINE = 30.0
"""Seconds for a whole request to arrive once it has begun, and for an answer to be taken."""
REFUSAL_SECONDS = 0.5
"""Seconds in which a connection without a place shows which protocol it speaks, so that the refusal is sent in that."""


class HandOver(Protocol):
    """Takes over a connection that speaks HTTP, until it ends. ``begun`` is what was read of it. The caller holds
    ``place``, which may be refused."""

    async def __call__(
        self, dispatcher: Dispatcher, stream: trio.SocketStream, begun: bytes, peer: Peer, place: Place
    ) -> None: ...


class Connection:
    """One client's connection. It answers the requests in turn, and ends the current one when the client disconnects.
    ``http`` is None where no HTTP is spoken."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        stream: trio.SocketStream,
        peer: Peer,
        place: Place,
        http: HandOver | None = None,
    ) -> None:
        self._http = http
        self._dispatcher = dispatcher
        self._place = place
        self._stream = stream
        self._peer = peer
        self._caller = Caller(peer, Lessee(peer.pid, peer.uid), self._send, [])
        self._buffer = lines.LineBuffer(lines.MAX_REQUEST)

    async def run(self) -> None:
        """Answer requests until either side ends the connection."""
        try:
            await self._run()
        finally:
            self._dispatcher.disconnected(self._caller)

    async def _run(self) -> None:
        if self._place.refusal is not None:
            await self._refuse(self._place.refusal)
            return
        first = True
        while True:
            try:
                line = await self._read_line(first)
                if line is None:
                    return
                first = False
                with self._place.at_work():
                    await self._dispatcher.callers.wait_turn(self._peer)
                    if not await self._answer(lines.decode_request(line)):
                        return
            except ControlProtocolError as error:
                await self._send(protocol.failed(error))
                return

    async def _refuse(self, refusal: PipelineBusy) -> None:
        begun = b""
        if self._http is not None:
            with trio.move_on_after(REFUSAL_SECONDS):
                begun = await self._stream.receive_some(65536)
        if _is_http(begun):
            await self._hand_over(begun)
        else:
            await self._send(protocol.failed(refusal))

    async def _hand_over(self, begun: bytes) -> None:
        assert self._http is not None
        await self._http(self._dispatcher, self._stream, begun, self._peer, self._place)

    async def _read_line(self, first: bool) -> bytes | None:
        """Read the next request; None at the end.

        A client may be silent between requests for as long as its place has patience, but not within one. ``first``: no
        message has come yet; a connection that speaks HTTP is handed over, to its end.
        """
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
            if first and self._http is not None and not len(self._buffer) and _is_http(data):
                await self._hand_over(data)
                return None
            self._buffer.feed(data)

    async def _answer(self, request: protocol.Request) -> bool:
        """Answer a request. Returns False when the connection is over."""
        disconnected = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                # Only an end or a broken line is of interest while a request runs; what else comes is for afterwards.
                nonlocal disconnected
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while len(self._buffer) <= lines.MAX_REQUEST:
                        data = await self._stream.receive_some(65536)
                        if not data:
                            break
                        self._buffer.feed(data)
                disconnected = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await self._send(await self._dispatcher.respond(request, self._caller))
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                disconnected = True
            nursery.cancel_scope.cancel()
        return not disconnected

    async def _send(self, response: protocol.Response, descriptors: Sequence[int] = ()) -> None:
        """Send a message; ``descriptors`` go with its first byte. Raises BrokenResourceError when the client does not
        take it in time."""
        try:
            line = lines.encode_response(response)
        except ControlProtocolError as error:
            line = lines.encode_response(protocol.failed(error))
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


def _is_http(begun: bytes) -> bool:
    return begun[:1].isalpha()
