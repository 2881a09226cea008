"""What daemon and fetch workers say to each other, over one AF_UNIX SOCK_SEQPACKET socket per worker.

A packet is a list of messages, each msgpack with a tag: what waits to be sent goes together, since with thousands of
small files the packets cost more than what they say. A file's descriptor travels with OpenFile (SCM_RIGHTS, in the
order of the packet's OpenFiles). Errors cross as
(code, message, retry_after) and become exceptions again by ``errors.from_code``. ``file`` and ``request`` are numbers
that the daemon gives out, never twice in its life.

Beside the socket lies one shared page (``PAUSE``): the CLOCK_MONOTONIC time, a little-endian double, until which
background fetches leave their sockets unread, so that a demanded chunk has the bandwidth to itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from instantstart_fs.core.manifest import Digest
from instantstart_fs.origins.base import Location

MAX_MESSAGE = 4 * 1024 * 1024
"""Room to receive any message: the largest is OpenFile, one bit per chunk."""

PAUSE = struct.Struct("<d")
PAUSE_SIZE = 4096


class OpenFile(msgspec.Struct, frozen=True, tag="open"):
    """A file to fill; its descriptor comes along. ``present``: the ChunkMap's bytes; they are hashed from the store."""

    file: int
    name: str
    size: int
    chunk_size: int
    digest: Digest | None
    present: bytes


class SetLocation(msgspec.Struct, frozen=True, tag="location"):
    """Where to fetch the file from now on."""

    file: int
    location: Location


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """``keep_pages``: somebody reads this pipeline now. Otherwise the file's pages are dropped once they were hashed,
    so that a fill in the background pushes nothing out of the page cache that is in use."""

    request: int
    file: int
    chunk: int
    demand: bool
    keep_pages: bool = True


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Give this fetch up: nothing of it is written any more, and nothing reported. Others wait for its connection.
    Where the chunk has just come, the next order to fetch it is answered at once."""

    request: int
    file: int
    chunk: int


class Urge(msgspec.Struct, frozen=True, tag="urge"):
    """A reader waits for this fetch now, which was begun for nobody in particular."""

    request: int


class CloseFile(msgspec.Struct, frozen=True, tag="close"):
    """Write nothing more into the file, forget it, answer Closed."""

    file: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """The chunk is whole and written. ``answered``: seconds from its request to the first byte of the answer; None
    where nobody was asked over a network."""

    request: int
    answered: float | None = None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes of this request came since it last said so; at most one a second."""

    request: int
    bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """``silent``: seconds without a byte when it was given up."""

    request: int
    code: str
    message: str
    retry_after: float | None = None
    silent: float = 0.0
    fault: str = ""


class Streamed(msgspec.Struct, frozen=True, tag="streamed"):
    """The server ignores ranges, and the request takes the whole file: this chunk of it is whole and written."""

    request: int
    chunk: int


class Waits(msgspec.Struct, frozen=True, tag="waits"):
    """Nothing was fetched: another request of this file takes all of it (Streamed)."""

    request: int


class Hashed(msgspec.Struct, frozen=True, tag="hashed"):
    """The whole file was read back from the store; ``digest`` is the lowercase hex."""

    file: int
    digest: str


class HashFailed(msgspec.Struct, frozen=True, tag="hash-failed"):
    file: int
    code: str
    message: str


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """No thread of this worker writes to the file any more."""

    file: int


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    number: int


Order = OpenFile | SetLocation | Fetch | Stop | Urge | CloseFile | Ping
Report = Ready | Arrived | Progress | Failed | Streamed | Waits | Hashed | HashFailed | Closed | Pong


class WorkerSettings(msgspec.Struct, frozen=True):
    """Given on the worker's command line as JSON. Seconds."""

    connect_timeout: float = 10.0
    stall_timeout: float = 15.0
    pause_limit: float = 2.0
    hash_threads: int = 2
    slow_window: float = 60.0
    """Within which fetch.READ_BYTES have to come, once a body has begun."""


MOST_DESCRIPTORS = 64
"""Of one packet."""
FULL_PACKET = 32 * 1024
"""Bytes of messages in one packet, but for one that is larger by itself. Far below what a receiver has room for."""


def encode(message: Order | Report) -> bytes:
    return msgspec.msgpack.encode(message)


def packet(messages: Sequence[bytes]) -> bytes:
    """Of encoded messages, fewer than 65,536."""
    return b"\xdc" + len(messages).to_bytes(2, "big") + b"".join(messages)


decode_orders = msgspec.msgpack.Decoder(list[Order]).decode
decode_reports = msgspec.msgpack.Decoder(list[Report]).decode
