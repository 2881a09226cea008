"""Hashers for the digests that a manifest can name. They do not compare: the caller does. Feed the bytes in order,
once.

``new_hasher(digest, size)`` gives the object that computes what ``digest.value`` should be. All values are lowercase
hex; checksums (crc32, crc32c, crc64nvme) are the big-endian number, as S3 writes it in base64. Composite digests
(``part_size`` > 0) are the digest of the concatenated raw digests of the parts, S3's way for multipart uploads.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Protocol, cast

from instantstart_fs.core.manifest import Algorithm, Digest

Buffer = bytes | bytearray | memoryview
Checksum = Callable[[Buffer, int], int]


class Hasher(Protocol):
    """``update`` takes any contiguous buffer of bytes; ``hexdigest`` may be called at any time, and again."""

    def update(self, data: Buffer, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Raw(Protocol):
    def update(self, data: Buffer, /) -> None: ...

    def digest(self) -> bytes: ...


class _Checksum:
    """A CRC with hashlib's face. ``function(data, previous)`` continues from the previous value."""

    __slots__ = ("_bytes", "_function", "_value")

    def __init__(self, function: Checksum, bits: int) -> None:
        self._function = function
        self._bytes = bits // 8
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._bytes, "big")


class _Whole:
    __slots__ = ("_raw",)

    def __init__(self, raw: _Raw) -> None:
        self._raw = raw

    def update(self, data: Buffer, /) -> None:
        self._raw.update(data)

    def hexdigest(self) -> str:
        return self._raw.digest().hex()


class _Composite:
    """The digest of the parts' digests. An empty file is one empty part, as S3 counts it."""

    __slots__ = ("_left", "_new", "_outer", "_part", "_part_size")

    def __init__(self, new: Callable[[], _Raw], part_size: int) -> None:
        self._new = new
        self._part_size = part_size
        self._left = part_size
        self._part = new()
        self._outer = b""

    def update(self, data: Buffer, /) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            if self._left == 0:  # closed late, so that a file that ends on a boundary has no empty last part
                self._outer += self._part.digest()
                self._part = self._new()
                self._left = self._part_size
            taken = view[: self._left]
            self._part.update(taken)
            self._left -= taken.nbytes
            view = view[taken.nbytes :]

    def hexdigest(self) -> str:
        whole = self._new()
        whole.update(self._outer + self._part.digest())
        return whole.digest().hex()


class _Nothing:
    """A hasher for files without a digest: costs nothing, equals no digest."""

    __slots__ = ()

    def update(self, data: Buffer, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _raw(algorithm: Algorithm, size: int) -> _Raw:
    match algorithm:
        case "sha256":
            return hashlib.sha256()
        case "sha1":
            return hashlib.sha1(usedforsecurity=False)
        case "md5":
            return hashlib.md5(usedforsecurity=False)
        case "git-sha1":
            return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        case "crc32":
            return _Checksum(zlib.crc32, 32)
        case "crc32c" | "crc64nvme":
            from awscrt import checksums  # late: 10 MB of library that only these two need

            if algorithm == "crc32c":
                return _Checksum(cast(Checksum, checksums.crc32c), 32)
            return _Checksum(cast(Checksum, checksums.crc64nvme), 64)  # (both take any buffer; annotated bytes)


def new_hasher(digest: Digest | None, size: int) -> Hasher:
    """A hasher of ``digest``'s algorithm for a file of ``size`` bytes; for None, one whose result is always ""."""
    if digest is None:
        return _Nothing()
    algorithm = digest.algorithm
    if digest.part_size > 0:
        return _Composite(lambda: _raw(algorithm, size), digest.part_size)
    return _Whole(_raw(algorithm, size))
