"""Makes directories that other users must pass, with exact modes whatever the umask.

Several programs may make such a directory first (the daemon, `prefetch --hold`, systemd, a person). os.makedirs applies
the umask to the parents, and a daemon's umask is 077.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

PASSABLE = 0o755


def make_directory(path: str, mode: int = PASSABLE) -> None:
    """``path`` with ``mode``, and passable directories above it, where they are missing. What is there stays as it is.
    Raises OSError."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent != path:
        try:
            make_directory(parent, PASSABLE)
        except FileExistsError as error:  # as os.mkdir says it of what lies below
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return  # another maker was quicker, and sets its modes
    _change(path, lambda _: mode)


def open_up(path: str) -> None:
    """Make a directory passable for all, if it is this user's own and is not."""
    with contextlib.suppress(OSError):
        _change(path, lambda found: found | PASSABLE)


def obstacle(path: str) -> str | None:
    """The first directory on the way to ``path``, or itself, that not everybody may pass; None: all may. Raises
    OSError."""
    path = os.path.realpath(path)
    above = os.path.dirname(path)
    if above != path and (found := obstacle(above)) is not None:
        return found
    return None if os.stat(path).st_mode & 0o001 else path


def _change(path: str, mode: Callable[[int], int]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        wanted = mode(stat.S_IMODE(found.st_mode))
        if found.st_uid == os.geteuid() and wanted != stat.S_IMODE(found.st_mode):
            os.fchmod(descriptor, wanted)
    finally:
        os.close(descriptor)
