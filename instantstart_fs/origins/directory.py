"""``file:///directory``: a directory of this machine, or a network filesystem mounted on it.

It offers no digest, and hashing a terabyte at `add` would be no pinning but a second download: files are pinned by
identity (device, inode, size, mtime) and end as ``unverified``.

**Links.** The daemon usually runs as root, while the directory's owner need not be root: a link to /etc/shadow in it
must not become a file that everybody reads in the mount. So a link to a file is followed when it belongs to root or to
the owner of the file that it leads to (who could have put the bytes there as well; the kernel's protected_symlinks
reasons alike); that covers a Hugging Face cache, whose snapshots link to ../../blobs. Other links and links to
directories are refused by name, unless excluded: many files may lie behind them. One entry that nobody can be shown (a
link to nothing, a socket, a pipe, a device, a name that is not UTF-8) is left out and told of. Directories are walked
by descriptor, so that none can be exchanged for a link meanwhile, and later reads are held to the pinned identity.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import NoReturn
from urllib.parse import quote

from instantstart_fs.core.manifest import ManifestFile, ModelManifest, ModelSpec, matches
from instantstart_fs.core.source import DirectorySource
from instantstart_fs.errors import (
    AccessRefused,
    OriginChanged,
    OriginNotFound,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.common import Skips, finish_manifest, refuse_endless, selected


def identity_of(status: os.stat_result) -> str:
    """Return the identity of a pinned local file, ``device:inode:size:mtime_ns``, to compare with an open file's."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def file_url(path: str) -> str:
    """``path`` as a Location's URL: percent-encoded, so take ``urllib.parse.unquote`` of what follows ``file://``."""
    return "file://" + quote(os.fsencode(path))


_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory by now",
}


class DirectoryOrigin:
    """One directory. Thread-safe: it holds no state."""

    def __init__(self, source: DirectorySource, model: ModelSpec) -> None:
        self._root = source.path
        self._model = model
        self._key = OriginKey("file", source.path, "")

    @property
    def key(self) -> OriginKey:
        return self._key

    def resolve(self) -> ModelManifest:
        files: list[ManifestFile] = []
        skips = Skips()
        held = 0
        for relative, name, directory in self._walk():
            held += 1
            refuse_endless(self._model.source, len(files), held)
            if selected(relative, self._model):
                found = self._pin(relative, name, directory)
                if isinstance(found, ManifestFile):
                    files.append(found)
                else:
                    skips.add(relative, found)
        return finish_manifest(self._model, "", files, held, skips)

    def locate(self, file: ManifestFile) -> Location:
        path = f"{self._root}/{file.address}"
        try:
            identity = identity_of(os.stat(path))
        except FileNotFoundError:
            raise OriginChanged(f"{path}: the file is gone since it was added; run update") from None
        except OSError as error:
            _refuse(path, error)
        if identity != file.version:
            raise OriginChanged(f"{path}: the file was changed or replaced since it was added; run update")
        return Location(url=file_url(path), identity=identity)

    def check(self) -> None:
        try:
            with os.scandir(self._root) as entries:
                for _ in entries:
                    return
        except OSError as error:
            _refuse(self._root, error)
        raise OriginNotFound(f"{self._root}: the directory is empty")

    def _walk(self) -> Iterator[tuple[str, str, int]]:
        """Yield every name below the root that is no directory: relative path, name, descriptor of its directory."""

        def fail(error: OSError) -> NoReturn:
            _refuse(str(error.filename or self._root), error)

        if not os.path.isdir(self._root):  # fwalk would report neither
            reason = "not a directory" if os.path.lexists(self._root) else "no such directory"
            raise OriginNotFound(f"{self._root}: {reason}")
        top = os.path.realpath(self._root)  # the administrator's own path may be a link; fwalk would skip it
        for parent, directories, names, descriptor in os.fwalk(top, onerror=fail, follow_symlinks=False):
            below = parent[len(top) :].strip("/")
            for name in directories:
                relative = f"{below}/{name}" if below else name
                link = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISLNK(link.st_mode) and self._may_hold_selected(relative):
                    raise OriginUnsupported(
                        f"{parent}/{name}: a link to a directory is not followed; add that directory as a model of "
                        "its own, or exclude the link"
                    )
            for name in names:
                yield (f"{below}/{name}" if below else name), name, descriptor

    def _may_hold_selected(self, directory: str) -> bool:
        names = (directory, directory + "/")
        include, exclude = self._model.include, self._model.exclude
        if any(matches(name, exclude) for name in names):
            return False
        return not include or any(
            matches(name, include) or glob.startswith(names[1]) for name in names for glob in include
        )

    def _pin(self, relative: str, name: str, directory: int) -> ManifestFile | str:
        """The file, or why nobody can be shown it."""
        path = f"{self._root}/{relative}"
        try:
            own = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(own.st_mode):
                followed = self._follow(path, name, directory, own)
                if followed is None:
                    return "a link that leads nowhere"
                status = followed
            else:
                status = own
            if not stat.S_ISREG(status.st_mode):
                return _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            if not os.access(name, os.R_OK, dir_fd=directory, effective_ids=True):
                raise AccessRefused(f"{path}: the daemon may not read it; give it permission, or exclude the file")
        except OSError as error:
            _refuse(path, error)
        return ManifestFile(
            path=relative,
            size=status.st_size,
            address=relative,
            version=identity_of(status),
            mtime_ns=status.st_mtime_ns,
        )

    def _follow(self, path: str, name: str, directory: int, link: os.stat_result) -> os.stat_result | None:
        """Return what the link leads to; None if that is nothing."""
        try:
            status = os.stat(name, dir_fd=directory)  # one call: owner and identity are those of the same file
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                return None
            raise
        if stat.S_ISREG(status.st_mode) and link.st_uid not in (0, status.st_uid):
            raise OriginUnsupported(
                f"{path}: a link to a file of another owner is not followed; copy the file, or exclude the link"
            )
        return status


def _refuse(path: str, error: OSError) -> NoReturn:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise OriginNotFound(f"{path}: no such file or directory") from None
    if isinstance(error, PermissionError):
        raise AccessRefused(f"{path}: the daemon may not read it; give its user permission") from None
    raise OriginUnavailable(f"{path}: {os.strerror(error.errno) if error.errno else error}") from None
