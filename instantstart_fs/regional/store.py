"""The few things that a tier's storage must be able to do; regional/s3.py and regional/directory.py do them.

All block, each at most some seconds (a put: about ``put_seconds``; a directory: as long as its filesystem does), and
raise only OriginError's family (OriginNotFound where there is nothing). Names are relative to the tier's prefix.
Nothing here is trusted: what is read is checked by who asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

LEAST_PUT_SECONDS, SLOWEST_PUT = 10.0, 1_000_000


def put_seconds(size: int) -> float:
    """Return the seconds for writing ``size`` bytes: at SLOWEST_PUT bytes a second, and some to begin with. A slower
    tier is of no use to a region."""
    return LEAST_PUT_SECONDS + size / SLOWEST_PUT


class Stored(NamedTuple):
    """An object of a listing. ``modified`` is the storage's own wall clock in seconds."""

    name: str
    size: int
    modified: float


class Address(NamedTuple):
    """Where a fetch process gets one object: a URL, the headers to send, and until when (wall clock) they hold."""

    url: str
    headers: tuple[tuple[str, str], ...]
    expires_at: float | None


class TierStore(Protocol):
    """One tier's storage. Thread-safe."""

    @property
    def endpoint(self) -> str:
        """The storage's address for metrics and messages. It holds no secret."""
        ...

    @property
    def scheme(self) -> str: ...

    def address(self, name: str) -> Address:
        """Return where an object's bytes are. Asks nobody."""
        ...

    def get(self, name: str, most: int) -> bytes:
        """Read a small object. One of more than ``most`` bytes is refused."""
        ...

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write the object, or replace it."""
        ...

    def put_new(self, name: str, data: bytes) -> bool:
        """Write the object unless it exists. Returns whether this call did. Raises OriginUnsupported where the storage
        cannot do that."""
        ...

    def delete(self, name: str) -> None:
        """Delete the object. One that does not exist is no error."""
        ...

    def interrupted(self, most: int) -> Iterator[Stored]:
        """List what writers left that died in the middle. ``list`` does not show it."""
        ...

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        """List what lies below ``prefix``, at most about ``most`` objects: a listing may have no end."""
        ...
