"""Byte ranges and presence: a chunk is the unit of filling, a ChunkMap says which chunks of a file are present. Pure
values.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

DEFAULT_CHUNK_SIZE = 8 * 1024 * 1024
MAX_CHUNKS = 1 << 24
"""The most chunks of one file: 128 TiB in chunks of 8 MiB. The file's map then takes 2 MiB, and travels to a worker in
one packet."""


class ByteRange(msgspec.Struct, frozen=True, order=True):
    """The bytes ``start`` ≤ b < ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class ChunkMap:
    """The chunks of one file that are present. Mutable, cheap, serializable (``to_bytes``).

    A file of ``size`` bytes has ceil(size / chunk_size) chunks; an empty file has none and is complete.
    """

    __slots__ = ("_bits", "_count", "_prefix", "chunk_size", "chunks", "size")

    def __init__(self, size: int, chunk_size: int, bitmap: bytes | None = None) -> None:
        self.size = size
        self.chunk_size = chunk_size
        self.chunks = -(-size // chunk_size)
        length = -(-self.chunks // 8)
        if bitmap is None:
            self._bits = bytearray(length)
            self._count = 0
        else:
            if len(bitmap) != length:
                raise ValueError(f"a bitmap of {len(bitmap)} bytes cannot describe {self.chunks} chunks")
            self._bits = bytearray(bitmap)
            if self.chunks % 8:
                self._bits[-1] &= (1 << self.chunks % 8) - 1
            self._count = sum(byte.bit_count() for byte in self._bits)
        self._prefix = 0

    def __contains__(self, chunk: int) -> bool:
        return bool(self._bits[chunk >> 3] & (1 << (chunk & 7)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChunkMap):
            return NotImplemented
        return (self.size, self.chunk_size, self._bits) == (other.size, other.chunk_size, other._bits)

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """Number of present chunks."""
        return self._count

    @property
    def complete(self) -> bool:
        return self._count == self.chunks

    @property
    def present_bytes(self) -> int:
        if self._count == 0:
            return 0
        last = self.chunks - 1
        short = self.chunks * self.chunk_size - self.size if last in self else 0
        return self._count * self.chunk_size - short

    @property
    def prefix_bytes(self) -> int:
        """The bytes from the beginning that are present without a gap. Amortized O(1) while chunks only arrive."""
        while self._prefix < self.chunks and self._prefix in self:
            self._prefix += 1
        return min(self._prefix * self.chunk_size, self.size)

    def add(self, chunk: int) -> bool:
        """Mark present; True if it was not."""
        if not 0 <= chunk < self.chunks:
            raise IndexError(f"chunk {chunk} of {self.chunks}")
        if chunk in self:
            return False
        self._bits[chunk >> 3] |= 1 << (chunk & 7)
        self._count += 1
        return True

    def discard(self, chunk: int) -> None:
        if chunk in self:
            self._bits[chunk >> 3] &= ~(1 << (chunk & 7))
            self._count -= 1
            self._prefix = min(self._prefix, chunk)

    def byte_range(self, chunk: int) -> ByteRange:
        start = chunk * self.chunk_size
        return ByteRange(start, min(start + self.chunk_size, self.size))

    def chunks_of(self, wanted: ByteRange) -> range:
        """The chunks that hold any byte of ``wanted`` (clipped to the file)."""
        start, stop = max(wanted.start, 0), min(wanted.stop, self.size)
        if stop <= start:
            return range(0)
        return range(start // self.chunk_size, (stop - 1) // self.chunk_size + 1)

    def holds(self, wanted: ByteRange) -> bool:
        """Whether every byte of ``wanted`` that lies in the file is present."""
        return self._count == self.chunks or all(chunk in self for chunk in self.chunks_of(wanted))

    def missing(self, wanted: ByteRange | None = None) -> Iterator[int]:
        """The absent chunks of ``wanted`` (default: of the file), ascending."""
        chunks = range(self.chunks) if wanted is None else self.chunks_of(wanted)
        return (chunk for chunk in chunks if chunk not in self)

    def to_bytes(self) -> bytes:
        return bytes(self._bits)
