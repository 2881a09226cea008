"""The region's secret, and what follows from it: names of objects, and digests that only who has it can make.

Every name is a keyed hash, so that a bucket's listing tells nobody which models a region has, and who lacks the key
cannot find what belongs to whom. The key itself signs nothing: each use has a key of its own, derived from it.
"""

from __future__ import annotations

import os
import stat
from typing import Protocol

import blake3
import msgspec

from instantstart_fs.core.manifest import ManifestFile, PipelineSpec
from instantstart_fs.errors import ConfigError

KEY_BYTES = 32
DIGEST_BYTES = 32
NAME_DIGITS = 32
"""Hex digits of a name, which are 128 bits."""
Buffer = bytes | bytearray | memoryview
_STRONG = frozenset({"sha256", "sha1", "git-sha1"})


def read_key(path: str) -> bytes:
    """Read the region's key: 64 hex digits in a file that only its owner can read. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            text = file.read(1024)
    except OSError as error:
        raise ConfigError(f"regional.key_file: {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"regional.key_file: {path} may be read by others; chmod 600 it")
    try:
        key = bytes.fromhex(text.strip().decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"regional.key_file: {path} holds no 64 hex digits; make some: openssl rand -hex 32")
    return key


class RegionKey:
    """The names and keys that derive from the region's key. Cheap to use; thread-safe."""

    def __init__(self, key: bytes) -> None:
        self._names: bytes = blake3.blake3(key, derive_key_context="instantstart regional names v1").digest()
        self._chunks: bytes = blake3.blake3(key, derive_key_context="instantstart regional chunks v1").digest()
        self._records: bytes = blake3.blake3(key, derive_key_context="instantstart regional records v1").digest()
        self.tickets: bytes = blake3.blake3(key, derive_key_context="instantstart regional tickets v1").digest()
        """The key of the tickets by which hosts of a rack ask each other (core/rack.py)."""

    def slot(self, spec: PipelineSpec) -> str:
        """Return the name of a pipeline's slot, from its id and its sources, globs included."""
        models = [(model.source, model.name, model.include, model.exclude) for model in spec.models]
        return self._name("slot", spec.id, msgspec.json.encode(models).decode())

    def pin(self, slot: str, path: str, file: ManifestFile, chunk_size: int) -> str:
        """The name of a file of a slot: of what was pinned, so that hosts that pinned the same bytes meet, and two
        versions of a file never do. Where the digest is no proof, the origin's own version belongs to it."""
        digest = str(file.digest) if file.digest is not None else ""
        strong = file.digest is not None and file.digest.algorithm in _STRONG
        version = "" if strong else f"{file.address}\0{file.version}"
        return self._name("pin", slot, path, str(file.size), str(chunk_size), digest, version)

    def host(self, host: str) -> str:
        """Return the name of a host."""
        return self._name("host", host)

    def rack(self, rack: str) -> str:
        """Return the name of a rack."""
        return self._name("rack", rack)

    def revision(self, slot: str, revision: str) -> str:
        """Return 8 hex digits for what a pipeline is pinned to. Equal pins have equal digits."""
        return self._name("revision", slot, revision)[:8]

    def content(self, record: msgspec.Struct) -> str:
        """Return 16 hex digits for what a record says."""
        return keyed_digest(self._names, msgspec.msgpack.encode(record)).hex()[:16]

    def startup(self, slot: str, identity: str, digest: str = "") -> str:
        """Return the name of a slot's startup caches that depend on ``identity``; with ``digest``, of one cache's
        bytes. "startup 2": their records' names count down (regional/startup.py)."""
        return self._name("startup 2", slot, identity, digest)

    def chunk_key(self, pin: str, chunk: int, length: int) -> bytes:
        """Return the key for one chunk's digest. It is bound to the pin (slot, path and what was pinned), index and
        length."""
        return keyed_digest(self._chunks, f"{pin}\0{chunk}\0{length}".encode())

    def sign(self, kind: str, name: str, body: bytes) -> bytes:
        """Return a record's MAC. It is bound to the record's kind and name."""
        return keyed_digest(self._records, _joined(kind, name) + body)

    def _name(self, *parts: str) -> str:
        return keyed_digest(self._names, _joined(*parts)).hex()[:NAME_DIGITS]


def _joined(*parts: str) -> bytes:
    """Join the parts unambiguously: each part's length goes before it."""
    encoded = [part.encode("utf-8", "surrogateescape") for part in parts]
    return b"".join(len(part).to_bytes(4, "little") + part for part in encoded)


class ChunkHasher(Protocol):
    """A running digest. ``update`` takes any contiguous buffer."""

    def update(self, data: Buffer, /) -> object: ...

    def digest(self) -> bytes: ...


def keyed_digest(key: bytes, data: Buffer) -> bytes:
    """Return BLAKE3 in its keyed mode, over bytes in memory."""
    digest: bytes = blake3.blake3(data, key=key).digest()
    return digest


def new_chunk_hasher(key: bytes) -> ChunkHasher:
    """Return a hasher for the same digest, which is fed piece by piece."""
    hasher: ChunkHasher = blake3.blake3(key=key)
    return hasher
