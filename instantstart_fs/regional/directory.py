"""A tier in a directory that the region's hosts share (NFS, CephFS, Lustre, …)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections.abc import Iterator
from urllib.parse import quote

from instantstart_fs.errors import AccessRefused, OriginMisbehaved, OriginNotFound, OriginUnavailable, OriginUnsupported
from instantstart_fs.regional.store import Address, Stored

_TEMPORARY = ".tmp-"
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What link(2) says on a filesystem that has no hard links: SMB, FAT, many of FUSE."""


RACES = 8
"""Times that a put starts again because another host's delete removed its directory."""


class DirectoryStore:
    """Objects are files; each is written under a temporary name beside, then renamed, or linked where it must be new:
    both are atomic on a shared filesystem, too. The directory itself is never made: where it is not there, its share is
    not mounted, and chunks would fill the disk below."""

    scheme = "file"

    def __init__(self, directory: str) -> None:
        self._directory = directory.rstrip("/")
        self.endpoint = self._directory

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def address(self, name: str) -> Address:
        return Address("file://" + quote(self._path(name)), (), None)

    def get(self, name: str, most: int) -> bytes:
        with self._translated(name), open(self._open(name), "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise OriginMisbehaved(f"{name}: more than {most} bytes")
        return data

    def _open(self, name: str) -> int:
        return os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        with self._translated(name):
            temporary = self._write(name, data)
            try:
                os.replace(temporary, self._path(name))
            except OSError:
                _remove(temporary)
                raise

    def put_new(self, name: str, data: bytes) -> bool:
        with self._translated(name):
            temporary = self._write(name, data)
            try:
                os.link(temporary, self._path(name))
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                said = f"conditional writes (hard links) are not for this filesystem: {error.strerror}"
                raise OriginUnsupported(f"{name}: {said}") from error
            finally:
                _remove(temporary)
            return True

    def _write(self, name: str, data: bytes | bytearray | memoryview) -> str:
        directory = os.path.dirname(self._path(name))
        temporary = os.path.join(directory, f"{_TEMPORARY}{secrets.token_hex(8)}")
        fd = self._create(directory, temporary)
        try:
            with open(fd, "wb") as file:
                file.write(data)
        except OSError:
            _remove(temporary)
            raise
        return temporary

    def _create(self, directory: str, path: str) -> int:
        for left in range(RACES - 1, -1, -1):
            try:
                self._make(directory)
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                if not left or not os.path.isdir(self._directory):
                    raise
        raise AssertionError("the last try returns or raises")

    def _make(self, directory: str) -> None:
        """Make the directory and those above it, up to the tier's own."""
        if os.path.isdir(directory):
            return
        if directory == self._directory:
            raise FileNotFoundError(directory)
        self._make(os.path.dirname(directory))
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)

    def delete(self, name: str) -> None:
        with self._translated(name):
            path = self._path(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            directory = os.path.dirname(path)
            with contextlib.suppress(OSError):  # its directories, where that was the last; never the tier's own
                while directory.startswith(f"{self._directory}/"):
                    os.rmdir(directory)
                    directory = os.path.dirname(directory)

    def interrupted(self, most: int) -> Iterator[Stored]:
        found = self._walk(self._directory, "")
        return itertools.islice((one for one in found if os.path.basename(one.name).startswith(_TEMPORARY)), most)

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        with self._translated(prefix):
            os.stat(self._directory)
        top, start = self._path(prefix), ""
        if not prefix.endswith("/"):  # it may end within a name
            top, start = os.path.split(top)
        found = self._walk(top, start)
        whole = (one for one in found if not os.path.basename(one.name).startswith(_TEMPORARY))
        yield from itertools.islice(whole, most)

    def _walk(self, top: str, start: str) -> Iterator[Stored]:
        """Yield every file below; directly in ``top`` only those whose names begin with ``start``."""
        for parent, directories, files in os.walk(top):
            if start and parent == top:
                directories[:] = [name for name in directories if name.startswith(start)]
                files = [name for name in files if name.startswith(start)]
            directories.sort()
            for file in sorted(files):
                path = os.path.join(parent, file)
                try:
                    status = os.lstat(path)
                except OSError:
                    continue
                yield Stored(os.path.relpath(path, self._directory), status.st_size, status.st_mtime)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if not os.path.isdir(self._directory):
                raise OriginUnavailable(f"{self._directory} is not there: is its share mounted?") from error
            raise OriginNotFound(f"{name} is not in the tier") from error
        except PermissionError as error:
            raise AccessRefused(f"{name}: {error.strerror}") from error
        except OSError as error:
            raise OriginUnavailable(f"{name}: {error.strerror}") from error


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
