"""Mounts and unmounts volumes at the paths that a kubelet names: below its own directory, and through no symbolic link.

``open_directory`` may block for ever where the mount does not answer. All others ask the mount table, not a mount that
may be dead, and block no longer than the kernel does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from instantstart_fs.errors import MountFailed, UsageError
from instantstart_fs.mount import kernel
from instantstart_fs.system import mountinfo
from instantstart_fs.system.mountinfo import Mount

MAX_PATH = 4095
MAX_STACKED = 8
"""The most mounts over one another at one target. Each was made over a dead one below."""


def check_target(path: str, kubelet: str) -> str:
    """Return ``path`` if it lies below ``kubelet`` and has no odd parts. Raises UsageError."""
    parts = path.split("/")
    if not path.startswith("/") or len(path) > MAX_PATH or "\0" in path:
        raise UsageError("target_path must be an absolute path of at most 4095 characters")
    if any(part in ("", ".", "..") for part in parts[1:]):
        raise UsageError("target_path may hold no empty component, '.' or '..'")
    if not path.startswith(kubelet.rstrip("/") + "/"):
        raise UsageError(f"target_path must lie below {kubelet}: see --kubelet-dir")
    return path


@contextlib.contextmanager
def _parent(path: str, kubelet: str) -> Iterator[int]:
    """Return a descriptor of the directory that holds ``path``. No link below ``kubelet`` is followed. Raises
    OSError."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    here = os.open(kubelet, flags)
    try:
        for part in path[len(kubelet.rstrip("/")) :].strip("/").split("/")[:-1]:
            deeper = os.open(part, flags | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = deeper
        yield here
    finally:
        os.close(here)


def mounted(path: str) -> Mount | None:
    return mountinfo.find_mount(path)


def shows(path: str, pipeline: str, daemon_mount: Mount) -> bool:
    """Whether ``path`` shows that pipeline's directory of the mount that lives now."""
    found = mounted(path)
    return found is not None and found.device == daemon_mount.device and found.root == f"/{pipeline}"


def open_directory(path: str) -> int:
    """Return a descriptor of the directory, for ``bind``. Raises OSError."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def bind(shown: int, path: str, kubelet: str) -> None:
    """Mount the directory of the descriptor ``shown`` at ``path``, which is created.

    A dead mount that is there stays below the new one: a container that follows the host's mounts sees the new one.
    Raises MountFailed, OSError.
    """
    name = os.path.basename(path)
    with _parent(path, kubelet) as parent:
        stacked = sum(mount.path == path for mount in mountinfo.mounts())
        for _ in range(stacked if stacked >= MAX_STACKED else 0):
            kernel.umount(f"/proc/self/fd/{parent}/{name}", lazily=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o750, dir_fd=parent)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(name, flags, dir_fd=parent)
        try:
            kernel.bind(f"/proc/self/fd/{shown}", f"/proc/self/fd/{target}")
        finally:
            os.close(target)
        found = mounted(path)
        # A bind has the flags of the mount that it shows, and the daemon's is read-only; a remount would not reach
        # the host's copy of it.
        if found is None or "ro" not in found.options.split(","):
            with contextlib.suppress(OSError):
                kernel.umount(f"/proc/self/fd/{parent}/{name}", lazily=True)
            raise MountFailed(f"{path}: it did not become a read-only mount")


def unbind(path: str, kubelet: str) -> None:
    """Unmount all that is mounted at ``path`` and remove the directory. Neither has to exist. Raises OSError."""
    name = os.path.basename(path)
    try:
        with _parent(path, kubelet) as parent:
            for _ in range(MAX_STACKED + 2):
                try:
                    kernel.umount(f"/proc/self/fd/{parent}/{name}", lazily=True)
                except OSError as error:
                    if error.errno in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there
                        break
                    raise
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
