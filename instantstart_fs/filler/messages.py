"""The messages between the daemon and its fetch processes, over one AF_UNIX SOCK_SEQPACKET socket per process. Values
and their encoding; nothing is sent here.

A packet is a list of messages, each msgpack with a tag: messages are batched, since with thousands of small files the
packets cost more than their content. A file's descriptor travels with OpenFile (SCM_RIGHTS, in the order of the
packet's OpenFiles). Errors are sent as (code, message, retry_after) and become exceptions again by
``errors.from_code``. ``file`` and ``request`` are numbers that the daemon never reuses.

Beside the socket there is one shared page (``PAUSE``): the CLOCK_MONOTONIC time, a little-endian double, until which
background fetches leave their sockets unread, so that a demanded chunk has the bandwidth to itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from instantstart_fs.core.manifest import Digest
from instantstart_fs.origins.base import Location

MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes that hold any message. The largest is OpenFile, with one bit per chunk."""

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
    """Fetch the file from this location from now on."""

    file: int
    location: Location


class Piece(msgspec.Struct, frozen=True):
    """A chunk as an object of its own, in a regional tier: its keyed digest, then its bytes.

    ``key``: of the digest, bound to this very chunk. ``digest``: what it must be where a seal says so, b"" = what the
    object says, which counts since only who has the region's key can have made it. ``neighbour``: a host of the rack
    is asked, who may say no digest where this one has a seal's.
    """

    url: str
    key: bytes
    digest: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    neighbour: bool = False


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Fetch a chunk. ``keep_pages``: the pipeline is being read. Otherwise the file's pages are dropped after hashing,
    so that a background fill evicts nothing from the page cache that is in use."""

    request: int
    file: int
    chunk: int
    demand: bool
    keep_pages: bool = True
    piece: Piece | None = None


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Give up a fetch, to free its connection: nothing of it is written or reported any more. If the chunk has just
    arrived, the next order to fetch it is answered at once."""

    request: int
    file: int
    chunk: int


class Urge(msgspec.Struct, frozen=True, tag="urge"):
    """Treat a background fetch as a demand: a reader waits for it now."""

    request: int


class CloseFile(msgspec.Struct, frozen=True, tag="close"):
    """Write nothing more into the file, forget it, answer Closed."""

    file: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """The chunk is whole and written. ``answered``: seconds from the request to the first byte of the answer; None
    without a network."""

    request: int
    answered: float | None = None
    digest: bytes = b""
    """Of a ``Piece``: proven over what was written."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes of this request since its last report; at most one report a second."""

    request: int
    bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The fetch failed. ``silent``: seconds without a byte when it was given up."""

    request: int
    code: str
    message: str
    retry_after: float | None = None
    silent: float = 0.0
    fault: str = ""


class Streamed(msgspec.Struct, frozen=True, tag="streamed"):
    """A chunk is whole and written, of a request that takes the whole file, since the server ignores ranges."""

    request: int
    chunk: int


class Waits(msgspec.Struct, frozen=True, tag="waits"):
    """The request fetched nothing: another request takes the whole file (Streamed)."""

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
    """Seconds in which fetch.READ_BYTES must come, once a body has begun."""
    region: bool = False
    """Whether chunks may come from a regional tier."""


MOST_DESCRIPTORS = 64
"""Descriptors in one packet."""
FULL_PACKET = 32 * 1024
"""Bytes of messages in one packet, unless a single one is larger. It is far below what a receiver can take."""


def encode(message: Order | Report) -> bytes:
    """Encode one message, for ``packet``."""
    return msgspec.msgpack.encode(message)


def packet(messages: Sequence[bytes]) -> bytes:
    """A packet of encoded messages, fewer than 65,536."""
    return b"\xdc" + len(messages).to_bytes(2, "big") + b"".join(messages)


decode_orders = msgspec.msgpack.Decoder(list[Order]).decode
decode_reports = msgspec.msgpack.Decoder(list[Report]).decode
