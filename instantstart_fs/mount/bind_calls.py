"""The system calls of the bind transport: mount, check, unmount, write attributes. All block, none keeps any state.

Paths are looked up in our own mount, so callers run these in threads that they abandon at a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel
from instantstart_fs.serving.bindings import BindableFile
from instantstart_fs.store.layout import BIND
from instantstart_fs.store.locks import used_elsewhere
from instantstart_fs.store.os_errors import passing
from instantstart_fs.system import mountinfo

log = logging.getLogger(__name__)

PREFIX: Final = "user.instantstart."

Shown = tuple[int, dict[str, str]]
"""The facts that a bound file is to show: its access time in nanoseconds, and its extended attributes without
PREFIX."""


class BindRefused(MountFailed):
    """This machine or process cannot bind. The message says why."""


class BindUnknown(BindRefused):
    """The call could not be tried, for want of a resource; it may be tried again."""


class BindLeft(OSError):
    """A bind could not be taken away again: the next one would lie over it."""


class Bound(NamedTuple):
    """A file that is bound. ``inode``: (st_dev, st_ino); ``used``: whether somebody had it open already."""

    file: BindableFile
    store_path: str
    inode: tuple[int, int]
    used: bool


def check_support(store: str) -> int:
    """The id of the mount by which the store opens its files. Raises BindRefused where files cannot be bound."""
    if not kernel.has_sys_admin():
        raise BindRefused("no binds: they need CAP_SYS_ADMIN")
    try:
        with staged_slots(store):
            pass
        slots = os.open(f"{store}/slots", os.O_PATH | os.O_CLOEXEC)
        try:
            store_mount = kernel.mount_id(slots)
        finally:
            os.close(slots)
        if not tells_of_use():
            raise BindRefused("no binds: nobody tells whether a file is in use (that needs Linux 5.3 and CAP_LEASE)")
    except OSError as error:
        kind = BindUnknown if passing(error.errno) else BindRefused
        raise kind(f"no binds from {store}: {error.strerror}") from error
    return store_mount


@contextlib.contextmanager
def staged_slots(store: str) -> Iterator[str]:
    """The slots, read-only, at a place of the store's that nobody else can reach. Raises OSError."""
    store = os.path.realpath(store)
    stage = f"{store}/{BIND}"
    os.makedirs(stage, 0o700, exist_ok=True)
    while mountinfo.find_mount(stage) is not None:
        kernel.umount(stage, lazily=True)  # a killed daemon's
    kernel.bind(f"{store}/slots", stage)
    try:
        kernel.make_bind_readonly(stage)
        yield stage
    finally:
        kernel.umount(stage, lazily=True)


def bind_file(stage: str, store: str, target: str, file: BindableFile, blob: int, shown: Shown, fanotify: int) -> Bound:
    """Bind the store's file over ``target``, marked for ``fanotify`` before anybody can open it there.

    Args:
        stage: from ``staged_slots``.
        store: the store's root.
        blob: a descriptor of the store's file.
        shown: what stat and getfattr are to show.

    Raises:
        BindLeft: it was bound, and could not be taken away again after an error.
        OSError: it is not bound.
    """
    within = f"{file.pipeline}/{file.generation}/files/{file.path}"
    here = os.fstat(blob)
    if (here.st_uid, here.st_gid, stat.S_IMODE(here.st_mode)) != (file.uid, file.gid, file.mode):
        os.fchown(blob, file.uid, file.gid)
        os.fchmod(blob, file.mode)
    _write_one(blob, *shown, file.mtime_ns)
    # The mark comes first: what is open through a bind must have been seen.
    own = f"/proc/self/fd/{blob}"
    kernel.fan_mark(fanotify, own, add=True)
    try:
        kernel.bind(f"{stage}/{within}", target)
        try:
            if not os.path.samestat(os.stat(target), here):
                raise OSError(errno.ESTALE, "the store's file was exchanged while it was bound")
            used = used_elsewhere(blob)
        except OSError as error:
            try:
                kernel.umount(target, lazily=True)
            except OSError:
                raise BindLeft(error.errno, error.strerror) from error
            raise
    except OSError:
        kernel.fan_mark(fanotify, own, add=False)
        raise
    return Bound(file, f"{os.path.realpath(store)}/slots/{within}", (here.st_dev, here.st_ino), used)


def unmount_below(below: str) -> None:
    """Detach whatever is mounted below. Raises MountFailed."""
    for mount in reversed(mount_table()):
        if mount.path.startswith(below):
            try:
                kernel.umount(mount.path, lazily=True)
            except OSError as error:
                raise MountFailed(f"{mount.path} cannot be unbound: {error.strerror}") from error


def mount_table() -> tuple[mountinfo.Mount, ...]:
    """Return the mounts of this namespace. Raises MountFailed if there is no descriptor to read them with."""
    try:
        return mountinfo.mounts()
    except OSError as error:
        raise MountFailed(f"the mount table cannot be read: {error.strerror}") from error


def tells_of_use() -> bool:
    """Whether a write lease is refused on a file that somebody else has open, and granted when nobody has. In old
    kernels a mark counts as an open. Of a file in memory: that is the kernel's, whatever the filesystem, and a full
    disk is no answer. Raises OSError."""
    with contextlib.ExitStack() as stack:
        fan = kernel.fanotify()
        stack.callback(os.close, fan)
        file = os.memfd_create("instantstart-lease", os.MFD_CLOEXEC)
        stack.callback(os.close, file)
        os.fchown(file, 1, 1)
        own = f"/proc/self/fd/{file}"
        kernel.fan_mark(fan, own, add=True)
        fd = os.open(own, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        other = os.open(own, os.O_RDONLY | os.O_CLOEXEC)  # the one that made it counts as nobody's open
        try:
            refused = used_elsewhere(fd)
        finally:
            os.close(other)
        return refused and not used_elsewhere(fd)


def write_shown(todo: list[tuple[str, Shown, int]]) -> None:
    for path, shown, mtime_ns in todo:
        try:
            _write_one(path, *shown, mtime_ns)
        except OSError as error:
            log.debug("%s: times and attributes stay as they are: %s", path, error)


def _write_one(file: int | str, atime_ns: int, values: Mapping[str, str], mtime_ns: int) -> None:
    """Set times and attributes of the store's own inode where they differ. Raises OSError."""
    found = os.stat(file)
    if (found.st_atime_ns, found.st_mtime_ns) != (atime_ns, mtime_ns):
        os.utime(file, ns=(atime_ns, mtime_ns))
    for name, value in values.items():
        encoded = value.encode()
        try:
            if os.getxattr(file, PREFIX + name) == encoded:
                continue
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        os.setxattr(file, PREFIX + name, encoded)
