"""Checks and clears the directory that is to be mounted on, before anything is mounted there.

All functions block: what lies at the path may be somebody's dead mount.
"""

from __future__ import annotations

import errno
import logging
import os

from instantstart_fs.config.directories import make_directory
from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel
from instantstart_fs.mount.transport import MountSettings
from instantstart_fs.system import mountinfo

log = logging.getLogger(__name__)


def prepare_mountpoint(settings: MountSettings) -> str:
    """The real path of a mountpoint that is free to use; blocking.

    Clears the mount that a killed daemon left. Raises MountFailed.
    """
    path = resolved(settings.path)
    _clear_stale_mounts(path, settings)
    path = os.path.realpath(path)
    _clear_stale_mounts(path, settings)
    if settings.store is not None:
        store = os.path.realpath(settings.store)
        if os.path.commonpath([path, store]) in (path, store):
            raise MountFailed(f"the mountpoint {path} and the store {store} may not lie in one another")
    try:
        make_directory(path)
        names = os.listdir(path)
    except FileExistsError as error:
        raise MountFailed(f"the mountpoint {path} is not a directory") from error
    except OSError as error:
        raise MountFailed(f"the mountpoint {path} cannot be used: {error.strerror}") from error
    if names:
        raise MountFailed(f"the mountpoint {path} is not empty (it holds {sorted(names)[0]!r}); empty it")
    return path


def resolved(path: str) -> str:
    """Absolute, without symlinks above its last component, which is not touched."""
    path = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _clear_stale_mounts(path: str, settings: MountSettings) -> None:
    ours = f"fuse.{settings.subtype}"
    while (mount := mountinfo.find_mount(path)) is not None:
        if mount.filesystem != ours:
            raise MountFailed(f"{path} already has a {mount.filesystem} filesystem mounted on it")
        if not _is_dead(path):
            raise MountFailed(f"{path} is served by another instantstart daemon")
        log.warning("clearing the mount that a killed daemon left at %s", path)
        kernel.umount_lazily(path)


def _is_dead(path: str) -> bool:
    """statvfs always asks the daemon, where stat may be answered from the kernel's cache."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def may_allow_other(settings: MountSettings) -> bool:
    """Whether other users may see the mount; logs a warning where that was wanted and is not permitted."""
    if not settings.allow_other or os.geteuid() == 0 or kernel.user_allow_other():
        return settings.allow_other
    log.warning("only this user will see the mount: /etc/fuse.conf lacks user_allow_other")
    return False
