"""The form in which a startup cache is kept and travels: one file, so that it has one digest, is written once and read
in one piece.

    the files' bytes, one after the other (those of ALIGN_FROM bytes and more begin at a multiple of ALIGN, so that a
    filesystem that shares extents can share them)
    the index: a JSON array of [path, offset, size, mode, mtime in ns]
    its length (16 hexadecimal digits), MAGIC

Only regular files: a path, what it may be, when it was changed. No links, no owners, nothing that leads out of the
directory that it is unpacked into. Pure, and quick to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAGIC = b"instantstart-pack-1\n"
TAIL = 16 + len(MAGIC)
ALIGN = 4096
ALIGN_FROM = 65536
MAX_FILES = 200_000
MAX_INDEX = 64 * 1024 * 1024
"""Bytes."""
MAX_BYTES = 16 * 1024**3
"""Of a whole pack: the largest seen is 2 GB."""


class Entry:
    """One file. ``path``: relative, its first component the layout's name."""

    __slots__ = ("mode", "mtime_ns", "offset", "path", "size")

    def __init__(self, path: str, offset: int, size: int, mode: int, mtime_ns: int) -> None:
        self.path = path
        self.offset = offset
        self.size = size
        self.mode = mode
        self.mtime_ns = mtime_ns


class BadPack(ValueError):
    """It is not what a pack is; nothing of it may be used."""


def start_of(offset: int, size: int) -> int:
    """Where a file of ``size`` bytes begins, if what is before it ends at ``offset``."""
    return offset if size < ALIGN_FROM else -(-offset // ALIGN) * ALIGN


def encode_index(entries: Sequence[Entry]) -> bytes:
    """With the tail: the last bytes of a pack."""
    import json  # late: no start of the daemon needs it

    body = json.dumps(
        [[entry.path, entry.offset, entry.size, entry.mode, entry.mtime_ns] for entry in entries],
        ensure_ascii=True,
        separators=(",", ":"),
    ).encode("ascii")
    return body + f"{len(body):016x}".encode("ascii") + MAGIC


def index_length(tail: bytes) -> int:
    """From the last TAIL bytes. Raises BadPack."""
    if len(tail) != TAIL or tail[16:] != MAGIC:
        raise BadPack("it does not end as a pack does")
    try:
        length = int(tail[:16], 16)
    except ValueError:
        raise BadPack("its index has no length") from None
    if not 0 < length <= MAX_INDEX:
        raise BadPack(f"its index has {length} bytes")
    return length


def decode_index(body: bytes, size: int) -> list[Entry]:
    """Of a pack of ``size`` bytes. Raises BadPack."""
    import json

    try:
        rows = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadPack(f"its index cannot be read: {error}") from None
    if not isinstance(rows, list) or len(rows) > MAX_FILES:
        raise BadPack("its index is none")
    found: list[Entry] = []
    seen: set[str] = set()
    directories: set[str] = set()
    end, limit = 0, size - TAIL - len(body)
    for row in rows:
        if not (isinstance(row, list) and len(row) == 5 and isinstance(row[0], str)):
            raise BadPack("an entry of its index is none")
        path, *numbers = row
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise BadPack(f"{path!r}: a number of its index is none")
        offset, length, mode, mtime_ns = numbers
        if not is_safe(path) or path in seen:
            raise BadPack(f"{path!r} is no path within it")
        if offset < end or offset + length > limit:
            raise BadPack(f"{path!r} lies outside of it")
        seen.add(path)
        while (path := path.rpartition("/")[0]) and path not in directories:
            directories.add(path)
        end = offset + length
        found.append(Entry(row[0], offset, length, mode & 0o777, mtime_ns))
    if clash := seen & directories:
        raise BadPack(f"{min(clash)!r} is a file, and a directory as well")
    return found


def mtime_of(mtime_ns: int) -> int:
    """What an index says of a file that was changed then: nothing is older than 1970."""
    return min(max(mtime_ns, 0), 2**63 - 1)


def read_index(read: Callable[[int, int], bytes], size: int) -> list[Entry]:
    """Of the pack of ``size`` bytes, of which ``read`` gives (count, offset). Raises BadPack, and as ``read``."""
    length = index_length(read(TAIL, max(size - TAIL, 0)))
    body = read(length, max(size - TAIL - length, 0))
    if len(body) != length:
        raise BadPack("it is cut short")
    return decode_index(body, size)


def is_safe(path: str) -> bool:
    """Whether it stays below the directory that it is joined to."""
    try:
        raw = path.encode("utf-8")
    except UnicodeEncodeError:  # a surrogate that stands alone names no file
        return False
    return (
        0 < len(path) <= 3000
        and b"\0" not in raw
        and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in raw.split(b"/"))
    )
