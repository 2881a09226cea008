"""A tier in a directory that the region's hosts share (NFS, CephFS, Lustre, …)."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from urllib.parse import quote

from instantstart_fs.errors import AccessRefused, OriginMisbehaved, OriginNotFound, OriginUnavailable
from instantstart_fs.regional.store import Address, Stored

_TEMPORARY = ".tmp-"


class DirectoryStore:
    """Objects are files; each is written under a temporary name beside, then renamed, or linked where it must be new:
    both are atomic on a shared filesystem, too."""

    scheme = "file"

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.endpoint = directory

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def address(self, name: str) -> Address:
        return Address("file://" + quote(self._path(name)), (), None)

    def get(self, name: str, most: int) -> bytes:
        with _translated(name), open(self._open(name), "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise OriginMisbehaved(f"{name}: more than {most} bytes")
        return data

    def _open(self, name: str) -> int:
        return os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        with _translated(name):
            temporary = self._write(name, data)
            try:
                os.replace(temporary, self._path(name))
            except OSError:
                _remove(temporary)
                raise

    def put_new(self, name: str, data: bytes) -> bool:
        with _translated(name):
            temporary = self._write(name, data)
            try:
                os.link(temporary, self._path(name))
            except FileExistsError:
                return False
            finally:
                _remove(temporary)
            return True

    def _write(self, name: str, data: bytes | bytearray | memoryview) -> str:
        path = self._path(name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f"{_TEMPORARY}{secrets.token_hex(8)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(data)
        except OSError:
            _remove(temporary)
            raise
        return temporary

    def delete(self, name: str) -> None:
        with _translated(name):
            path = self._path(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            directory = os.path.dirname(path)
            with contextlib.suppress(OSError):  # its directories, where that was the last; never the tier's own
                while directory.startswith(f"{self._directory.rstrip('/')}/"):
                    os.rmdir(directory)
                    directory = os.path.dirname(directory)

    def interrupted(self, most: int) -> Iterator[Stored]:
        found = self._walk(self._directory, "")
        return itertools.islice((one for one in found if os.path.basename(one.name).startswith(_TEMPORARY)), most)

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        with _translated(prefix):
            os.stat(self._directory)
        top, start = self._path(prefix), ""
        if not prefix.endswith("/"):  # it may end within a name
            top, start = os.path.split(top)
        found = self._walk(top, start)
        whole = (one for one in found if not os.path.basename(one.name).startswith(_TEMPORARY))
        yield from itertools.islice(whole, most)

    def _walk(self, top: str, start: str) -> Iterator[Stored]:
        """Every file below; directly in ``top`` only what begins with ``start``."""
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


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise OriginNotFound(f"{name} is not in the tier") from error
    except PermissionError as error:
        raise AccessRefused(f"{name}: {error.strerror}") from error
    except OSError as error:
        raise OriginUnavailable(f"{name}: {error.strerror}") from error
