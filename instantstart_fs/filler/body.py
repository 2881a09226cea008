"""Reads the body of an answer into a buffer, with as few calls as the connection allows. It judges nothing: lengths,
deadlines and what a body's end means are the caller's (filler/fetch.py).

Over an open connection a body of known length is read from the socket itself, once what http.client has read ahead is
taken: one recv that waits for all bytes of a piece (MSG_WAITALL) stands for some six, each with a poll before it.
Measured in docs/decisions/http-client.md.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

_TURN_SECONDS = 1.0
"""A recv returns after this with what it has, so that progress shows and a silent connection is noticed."""
_TIMEVAL = struct.Struct("@ll")

Read = Callable[[memoryview], int]
"""Reads at least one byte into the buffer and returns how many; 0 at the end. Raises OSError, HTTPException."""


@contextlib.contextmanager
def reading(response: Any, connection: socket.socket | None, stall_timeout: float) -> Iterator[Read]:
    """Give what reads the body of ``response``, which comes over ``connection``.

    Args:
        response: urllib3's. Its own readinto reads into a fresh bytes object and copies, so http.client's below it is
            asked, which is no public name: where it is not there, the reading is slower, not wrong.
        connection: The response's, None if unknown.
        stall_timeout: Seconds without a byte after which a read raises TimeoutError.
    """
    body = getattr(response, "_fp", None)
    if not isinstance(body, http.client.HTTPResponse):
        yield response.readinto
        return
    ahead = body.fp
    # Exactly a socket: a TLS connection has bytes of its own between the socket and us.
    if (
        type(connection) is not socket.socket
        or body.chunked
        or not body.length
        or not isinstance(ahead, io.BufferedReader)
    ):
        yield body.readinto
        return
    direct = _Direct(body, ahead, connection, stall_timeout)
    try:
        yield direct.read
    finally:
        direct.close()


class _Direct:
    """Reads from the socket of ``body``, all but the last byte: that one http.client reads, and so knows of the end.

    Wrong bytes would come where http.client has read ahead and the socket is read: ``_taken`` says that it has nothing,
    and only a read of exactly what it held makes it so.
    """

    def __init__(
        self, body: http.client.HTTPResponse, ahead: io.BufferedReader, connection: socket.socket, stall_timeout: float
    ) -> None:
        self._body = body
        self._ahead = ahead
        self._connection = connection
        self._stall_timeout = stall_timeout
        self._timeout = connection.gettimeout()
        self._mine = False
        """Whether the connection waits as ``_receive`` wants it."""
        self._taken = False
        """Whether http.client holds nothing that it has read ahead."""

    def read(self, buffer: memoryview) -> int:
        body, left = self._body, self._body.length
        if self._taken and left is not None and left > 1:
            count = self._receive(buffer[: left - 1])
            body.length = left - count
            return count
        self._give_back()
        held = len(self._ahead.peek()) if left else 0
        self._taken = 0 < held <= len(buffer)
        return body.readinto(buffer[:held] if self._taken else buffer)

    def _receive(self, buffer: memoryview) -> int:
        if not self._mine:
            turn = min(_TURN_SECONDS, self._stall_timeout)
            timeval = _TIMEVAL.pack(int(turn), int(turn % 1 * 1e6))
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._connection.settimeout(None)
            self._mine = True
        until = time.monotonic() + self._stall_timeout
        while True:
            try:
                return self._connection.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TimeoutError("no byte came within the time-out") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed
            self._give_back()

    def _give_back(self) -> None:
        """Let the connection have the time-out again with which http.client reads."""
        if self._mine:
            self._connection.settimeout(self._timeout)
            self._mine = False
