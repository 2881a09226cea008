"""Makes and removes the symbolic links of `mount`: DIR → a pipeline's directory under the daemon's one mount.

Why a link and not a mount of its own: docs/decisions/mount-command.md. A link is recognised by where it points to, so
nothing has to be remembered, and `unmount` works while no daemon runs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Self

from instantstart_fs.config.places import default_mount, spare_mount
from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError, UsageError, printable
from instantstart_fs.system import mountinfo

SHOWN_DEADLINE = 20.0
OURS = "fuse.instantstart"


class Place:
    """DIR, by a descriptor of the directory that holds it: minutes lie between ``check_free`` and ``link``, and a
    directory that is moved meanwhile does not lead the link elsewhere. A context manager."""

    def __init__(self, directory: str) -> None:
        """``directory``: an absolute path. Raises UsageError."""
        self.path = directory
        self._shown = printable(directory)
        parent, self._name = os.path.split(directory)
        if not self._name:
            raise UsageError(f"something is mounted at {self._shown}; name a directory that is empty or not there yet")
        try:
            self._parent = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"there is no directory {printable(parent)}; make it first (mkdir -p)") from None
        except OSError as error:
            raise UsageError(f"{printable(parent)}: {error.strerror or error}") from error
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._open:
            self._open = False
            os.close(self._parent)

    def _lstat(self) -> os.stat_result | None:
        try:
            return os.stat(self._name, dir_fd=self._parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def check_free(self) -> None:
        """Check that DIR may become a link: it is absent, an empty directory, or a link of `mount`. Raises
        UsageError."""
        shown = self._shown
        try:
            found = self._lstat()
            if found is None:
                pass
            elif stat.S_ISLNK(found.st_mode):
                if not _is_ours(os.readlink(self._name, dir_fd=self._parent), None):
                    raise UsageError(f"{shown} is a link to somewhere else; name another directory, or remove it first")
            elif not stat.S_ISDIR(found.st_mode):
                raise UsageError(f"{shown} is a file; name a directory that is empty or not there yet")
            elif found.st_dev != os.fstat(self._parent).st_dev:
                raise UsageError(f"something is mounted at {shown}; name a directory that is empty or not there yet")
            elif self._names():
                raise UsageError(f"{shown} is not empty; name a directory that is empty or not there yet")
            if not os.access(f"/proc/self/fd/{self._parent}", os.W_OK | os.X_OK):
                raise UsageError(f"this user may not make {shown}; name a directory below one of yours")
        except OSError as error:
            raise UsageError(f"{shown}: {error.strerror or error}") from error

    def _names(self) -> list[str]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._name, flags, dir_fd=self._parent)
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)

    def link(self, target: str) -> None:
        """Make DIR a link to ``target``, once that is shown. Nothing but an empty directory and a link of `mount` is
        replaced, also of what came meanwhile. Raises InstantStartError."""
        deadline = time.monotonic() + SHOWN_DEADLINE
        while not os.path.isdir(target):
            if time.monotonic() > deadline:
                raise InstantStartError(f"{target} is not shown after {SHOWN_DEADLINE:g} s: `instantstart doctor`")
            time.sleep(0.05)
        self.check_free()
        try:
            found = self._lstat()
            if found is not None and stat.S_ISLNK(found.st_mode):
                self._replace(target)
                return
            if found is not None:
                os.rmdir(self._name, dir_fd=self._parent)
            os.symlink(target, self._name, dir_fd=self._parent)
        except OSError as error:
            raise InstantStartError(f"{self._shown}: {error.strerror or error}") from error

    def _replace(self, target: str) -> None:
        beside = f"{self._name}.instantstart-{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):  # of a command that was killed, and had this number
                os.unlink(beside, dir_fd=self._parent)
            os.symlink(target, beside, dir_fd=self._parent)
            os.rename(beside, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside, dir_fd=self._parent)
            raise

    def pipeline(self, mount: str | None = None, *, only: bool = False) -> str:
        """The id of the pipeline that DIR links to. ``mount``: where the daemon's mount is. ``only``: the link must
        lead there; elsewhere the same id is another daemon's. Raises UsageError where it is no such link."""
        shown = self._shown
        try:
            found = os.readlink(self._name, dir_fd=self._parent)
        except OSError:
            what = "is no link" if self._lstat() is not None else "is not there"
            raise UsageError(f"{shown} {what}: `instantstart mount` did not make it") from None
        if not _is_ours(found, mount):
            raise UsageError(
                f"{shown} points to {printable(found)}, where no daemon of yours has its mount; if it is "
                "an old one, `rm` removes the link"
            )
        if only and os.path.dirname(found) != mount:
            raise UsageError(
                f"{shown} points to {printable(found)}, and the daemon that answers has its mount at "
                f"{printable(str(mount))}: it is not the one that shows this; name its socket with --socket"
            )
        return os.path.basename(found)

    def unlink(self, mount: str | None = None) -> str:
        """Take DIR's link away; the pipeline's id. Raises UsageError where it is none of `mount`'s."""
        pipeline = self.pipeline(mount)
        try:
            os.unlink(self._name, dir_fd=self._parent)
        except OSError as error:
            raise InstantStartError(f"{self._shown}: {error.strerror or error}") from error
        return pipeline


def _is_ours(link: str, mount: str | None) -> bool:
    """Whether a link to there is one of `mount`; ``mount``: where the daemon's mount is, None asks it if nothing else
    tells."""
    target = os.path.dirname(link)
    if target in (mount, default_mount(), spare_mount()):
        return True
    if any(found.path == target and found.filesystem == OURS for found in mountinfo.mounts()):
        return True
    with contextlib.suppress(InstantStartError), Client() as client:
        return client.ping().mount == target
    return False
