"""Fetches a chunk that is an object of its own in a regional tier, and proves it before anybody can see it. Blocks: it
runs in threads of the fetch processes.

The digest is made over what is written, while it comes: a chunk whose digest is wrong was written into the file, but is
not present, and the next source writes over it.
"""

from __future__ import annotations

import hmac
import os
import stat
from typing import Protocol
from urllib.parse import unquote, urlsplit

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.refusals import Service
from instantstart_fs.errors import (
    AccessRefused,
    OriginChanged,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    StoreError,
)
from instantstart_fs.filler.fetch import Fetcher, Sink
from instantstart_fs.filler.messages import Piece
from instantstart_fs.origins.base import Location

HEADER = 32


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> object: ...

    def digest(self) -> bytes: ...


class PieceSink:
    """Takes the object, gives the chunk's bytes on. ``start``: where the chunk lies in its file."""

    def __init__(self, inner: Sink, start: int, piece: Piece) -> None:
        from instantstart_fs.regional.keys import new_chunk_hasher  # late: only a region needs it

        self._inner = inner
        self._start = start
        self._piece = piece
        self._said = b""
        self._hasher: _Hasher = new_chunk_hasher(piece.key)
        self.before_read = inner.before_read
        self.progress = inner.progress

    def write(self, data: memoryview, offset: int) -> None:
        if offset < HEADER:
            head = data[: HEADER - offset]
            self._said += bytes(head)
            data, offset = data[len(head) :], offset + len(head)
        if len(data):
            self._hasher.update(data)
            self._inner.write(data, self._start + offset - HEADER)

    def take_whole(self) -> None:
        return None

    def prove(self, where: str) -> bytes:
        """The digest, once all has come. Raises OriginMisbehaved where it is another than it must be."""
        found = self._hasher.digest()
        wanted = {self._said, self._piece.digest or self._said}
        if self._piece.neighbour and self._piece.digest:
            wanted = {self._piece.digest}
        if not all(hmac.compare_digest(found, digest) for digest in wanted):
            raise OriginMisbehaved(f"{where}: the digest is wrong: not the bytes that were put there by this region")
        return found


def fetch_piece(
    fetcher: Fetcher, piece: Piece, wanted: ByteRange, buffer: memoryview, sink: Sink
) -> tuple[bytes, float | None]:
    """Fetch the chunk ``wanted`` of a file into ``sink``: its proven digest, and the seconds to the first byte.

    Raises:
        InstantStartError: The fetch failed, or what came is not the chunk.
        Abandoned: The file was closed.
    """
    size = wanted.length + HEADER
    inner = PieceSink(sink, wanted.start, piece)
    parts = urlsplit(piece.url)
    if parts.scheme == "file":
        _copy(unquote(parts.path), size, buffer, inner)
        return inner.prove(parts.path), None
    service: Service = "rack" if piece.neighbour else "s3"
    location = Location(piece.url, piece.headers, named=(parts.hostname or "",), service=service)
    try:
        answered = fetcher.fetch(location, ByteRange(0, size), size, buffer, inner)
    except OriginChanged as error:  # of another size: an origin may change, a chunk is then none
        raise OriginMisbehaved(error.message) from error
    return inner.prove(f"{parts.netloc}{parts.path}"), answered


def _copy(path: str, size: int, buffer: memoryview, sink: PieceSink) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise OriginNotFound(f"{path} is not in the tier") from error
    except PermissionError as error:
        raise AccessRefused(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise OriginUnavailable(f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise OriginMisbehaved(f"{path}: not a file of {size} bytes")
        offset = 0
        while offset < size:
            sink.before_read()
            count = os.readv(fd, [buffer[: min(len(buffer), size - offset)]])
            if count == 0:
                raise OriginMisbehaved(f"{path}: it was cut short")
            sink.progress(count)
            sink.write(buffer[:count], offset)
            offset += count
    except StoreError:
        raise
    except OSError as error:
        raise OriginUnavailable(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)
