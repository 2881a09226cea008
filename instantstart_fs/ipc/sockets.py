"""What every server of ours does alike with its sockets: listen at an address, turn a connection away."""

from __future__ import annotations

import socket
from typing import Protocol

import trio

BACKLOG = 64
"""Of a server for people or neighbours: each is accepted within a turn of the loop."""
REFUSAL_SECONDS = 1.0
"""Seconds for sending a refusal."""


class Stream(Protocol):
    async def receive_some(self, max_bytes: int | None = None, /) -> bytes | bytearray: ...
    async def send_all(self, data: bytes | bytearray | memoryview, /) -> None: ...
    async def send_eof(self) -> None: ...


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a socket that listens at ``host``, an address of IPv4 or IPv6. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


async def turn_away(stream: Stream, answer: bytes) -> None:
    """Send ``answer`` to a connection that there is no room for; the caller closes it. Raises what a peer's leaving
    raises."""
    with trio.move_on_after(REFUSAL_SECONDS):
        await stream.send_all(answer)
        await stream.send_eof()
        await stream.receive_some(65536)  # what is not read when it is closed takes the answer away
