"""Makes and removes the symbolic links of `mount`: DIR → a pipeline's directory under the daemon's one mount.

Why a link and not a mount of its own: docs/decisions/mount-command.md. A link is recognised by where it points to, so
nothing has to be remembered, and `unmount` works while no daemon runs.
"""

from __future__ import annotations

import contextlib
import os
import time

from instantstart_fs.config.places import default_mount, spare_mount
from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError, UsageError, printable
from instantstart_fs.system import mountinfo

SHOWN_DEADLINE = 20.0
OURS = "fuse.instantstart"


def check_free(directory: str) -> None:
    """Raises UsageError unless DIR may become a link: it is absent, an empty directory, or a link of `mount`."""
    shown = printable(directory)
    if os.path.islink(directory):
        if not _is_ours(directory, None):
            raise UsageError(f"{shown} is a link to somewhere else; name another directory, or remove it first")
    elif os.path.lexists(directory):
        if not os.path.isdir(directory):
            raise UsageError(f"{shown} is a file; name a directory that is empty or not there yet")
        if os.path.ismount(directory):
            raise UsageError(f"something is mounted at {shown}; name a directory that is empty or not there yet")
        try:
            names = os.listdir(directory)
        except OSError as error:
            raise UsageError(f"{shown}: {error.strerror or error}") from error
        if names:
            raise UsageError(f"{shown} is not empty; name a directory that is empty or not there yet")
    elif not os.path.isdir(os.path.dirname(directory)):
        raise UsageError(f"there is no directory {printable(os.path.dirname(directory))}; make it first (mkdir -p)")
    if not os.access(os.path.dirname(directory), os.W_OK | os.X_OK):
        raise UsageError(f"this user may not make {shown}; name a directory below one of yours")


def _is_ours(directory: str, mount: str | None) -> bool:
    """Whether DIR is a link of `mount`; ``mount``: where the daemon's mount is, None asks it if nothing else tells."""
    target = os.path.dirname(os.readlink(directory))
    if target in (mount, default_mount(), spare_mount()):
        return True
    if any(found.path == target and found.filesystem == OURS for found in mountinfo.mounts()):
        return True
    with contextlib.suppress(InstantStartError), Client() as client:
        return client.ping().mount == target
    return False


def link(directory: str, target: str) -> None:
    """Make DIR a link to ``target``, once that is shown. Raises InstantStartError."""
    deadline = time.monotonic() + SHOWN_DEADLINE
    while not os.path.isdir(target):
        if time.monotonic() > deadline:
            raise InstantStartError(f"{target} is not shown after {SHOWN_DEADLINE:g} s: `instantstart doctor`")
        time.sleep(0.05)
    beside = f"{directory}.instantstart-{os.getpid()}"
    try:
        if os.path.isdir(directory) and not os.path.islink(directory):
            os.rmdir(directory)
        with contextlib.suppress(FileNotFoundError):  # of a command that was killed, and had this number
            os.unlink(beside)
        os.symlink(target, beside)
        os.rename(beside, directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise InstantStartError(f"{printable(directory)}: {error.strerror or error}") from error


def unlink(directory: str, mount: str | None = None) -> str:
    """Take DIR's link away; the pipeline's id. Raises UsageError where it is none of `mount`'s."""
    shown = printable(directory)
    if not os.path.islink(directory):
        what = "is no link" if os.path.lexists(directory) else "is not there"
        raise UsageError(f"{shown} {what}: `instantstart mount` did not make it")
    if not _is_ours(directory, mount):
        raise UsageError(
            f"{shown} points to {printable(os.readlink(directory))}, where no daemon of yours has its mount; if it is "
            "an old one, `rm` removes the link"
        )
    pipeline = os.path.basename(os.readlink(directory))
    try:
        os.unlink(directory)
    except OSError as error:
        raise InstantStartError(f"{shown}: {error.strerror or error}") from error
    return pipeline
