"""A directory → a pack, and back. Blocks. What is unpacked was proven first: a pack whose digest is another's never
writes a byte."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping

from instantstart_fs.core.enginetable import SKIPPED_SUFFIXES
from instantstart_fs.core.startuppack import (
    MAX_BYTES,
    MAX_FILES,
    MAX_INDEX,
    TAIL,
    BadPack,
    Entry,
    encode_index,
    is_safe,
    mtime_of,
    read_index,
    start_of,
)

BLOCK = 1024 * 1024
_NO_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)
"""The errors of copy_file_range where it cannot copy."""

Seen = dict[str, tuple[int, int, int]]
"""Path → (size, mtime in ns, mode): what tells whether a file is still the same."""


class TooMuch(Exception):
    """There is more than a pack may hold."""


def scan(root: str, skip: Mapping[str, tuple[str, ...]]) -> Seen:
    """The files below ``root``/<layout> that are worth keeping. ``skip``: layout → names in its directory that are not.
    What cannot be read is left out. Raises TooMuch."""
    found: Seen = {}
    total = 0
    for layout, left_out in skip.items():
        # A link in place of a layout's directory is none of ours, as one in it is not.
        pending = [layout] if not os.path.islink(os.path.join(root, layout)) else []
        while pending:
            directory = pending.pop()
            try:
                entries = list(os.scandir(os.path.join(root, directory)))
            except OSError:
                continue
            for entry in entries:
                path = f"{directory}/{entry.name}"
                if (directory == layout and entry.name in left_out) or entry.name.endswith(SKIPPED_SUFFIXES):
                    continue
                with contextlib.suppress(OSError, UnicodeEncodeError):
                    path.encode("utf-8")
                    if not is_safe(path):
                        continue  # too long a path: a pack with it could not be restored
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != "__pycache__":
                            pending.append(path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found[path] = (status.st_size, mtime_of(status.st_mtime_ns), status.st_mode & 0o777)
                        total += status.st_size
            if len(found) > MAX_FILES or total > MAX_BYTES:
                raise TooMuch(f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
    return found


def pack(root: str, seen: Seen, out: int) -> tuple[int, str, int]:
    """Write these files of ``root`` to the descriptor ``out``, from its beginning: (bytes, SHA-256, files). A file that
    changes meanwhile is left out: the engine still works on it. Raises OSError of ``out``, TooMuch."""
    hasher = hashlib.sha256()
    entries: list[Entry] = []
    at = 0

    def put(data: bytes) -> None:
        nonlocal at
        view = memoryview(data)
        hasher.update(view)
        at += len(view)
        while view:
            view = view[os.write(out, view) :]

    for path in sorted(seen):
        size, mtime_ns, mode = seen[path]
        try:
            fd = os.open(os.path.join(root, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if not _is_still(fd, size, mtime_ns):
                continue
            offset = start_of(at, size)
            if offset > at:
                put(bytes(offset - at))
            left = size
            while left and (data := os.read(fd, min(BLOCK, left))):
                put(data)
                left -= len(data)
            # What was written of one that changed lies in the pack, unnamed.
            if not left and _is_still(fd, size, mtime_ns):
                entries.append(Entry(path, offset, size, mode, mtime_ns))
        finally:
            os.close(fd)
    index = encode_index(entries)
    if len(index) - TAIL > MAX_INDEX:
        raise TooMuch(f"an index of more than {MAX_INDEX} bytes")
    put(index)
    return at, hasher.hexdigest(), len(entries)


def _is_still(fd: int, size: int, mtime_ns: int) -> bool:
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and (status.st_size, mtime_of(status.st_mtime_ns)) == (size, mtime_ns)


def digest_of(fd: int, size: int) -> str:
    """SHA-256 of the first ``size`` bytes; of fewer where it is shorter. Raises OSError."""
    hasher = hashlib.sha256()
    at = 0
    while at < size and (data := os.pread(fd, min(BLOCK, size - at), at)):
        hasher.update(data)
        at += len(data)
    return hasher.hexdigest()


def unpack(fd: int, size: int, digest: str, root: str, wanted: Callable[[str], bool]) -> Seen:
    """Into ``root``, which is there and empty, the files of the layouts that are ``wanted``; what was written. Raises
    BadPack for one that is not what its digest says, OSError of the disk."""
    if os.fstat(fd).st_size != size or digest_of(fd, size) != digest:
        raise BadPack("its bytes are not those that were saved")
    made: set[str] = set()
    found: Seen = {}
    for entry in read_index(lambda count, at: os.pread(fd, count, at), size):
        layout, _, rest = entry.path.partition("/")
        if not rest or not wanted(layout):
            continue
        path = f"{root}/{entry.path}"
        directory = path.rpartition("/")[0]
        if directory not in made:
            os.makedirs(directory, 0o700, exist_ok=True)
            made.add(directory)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, entry.mode)
        try:
            _copy(fd, target, entry.offset, entry.size)
            os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))
            if os.fstat(target).st_mode & 0o777 != entry.mode:
                os.fchmod(target, entry.mode)
        finally:
            os.close(target)
        found[entry.path] = (entry.size, entry.mtime_ns, entry.mode)
    return found


def _copy(source: int, target: int, offset: int, size: int) -> None:
    """Copy by the kernel, which shares the bytes if the filesystem can, else by reading and writing."""
    done = 0
    try:
        while done < size and size > BLOCK // 16:
            count = os.copy_file_range(source, target, size - done, offset + done)
            if not count:
                break
            done += count
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    while done < size:
        data = os.pread(source, min(BLOCK, size - done), offset + done)
        if not data:
            raise BadPack("it is cut short")
        view = memoryview(data)
        done += len(view)
        while view:
            view = view[os.write(target, view) :]
