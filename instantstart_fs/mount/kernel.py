"""Asks the kernel to mount, unmount, bind and tune, and to tell of opens (mount(2), fanotify(7), fusectl, bdi).

It decides nothing, and touches no mountpoint with stat. All functions are synchronous; those that may block say so.
Constants are from linux/mount.h, linux/fanotify.h and linux/capability.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from typing import Final, NamedTuple

from instantstart_fs.errors import MountFailed
from instantstart_fs.system import mountinfo
from instantstart_fs.system.libc import LIBC, checked
from instantstart_fs.system.mountinfo import Mount

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_REMOUNT: Final = 32
MS_NOATIME: Final = 1024
MS_BIND: Final = 4096
MS_PRIVATE: Final = 1 << 18
MNT_FORCE: Final = 1
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
CAP_SYS_ADMIN_BIT: Final = 21
FUSERMOUNT_DEADLINE: Final = 10.0
"""Seconds."""
SIGKILL_BIT: Final = 1 << 8
"""The bit of SIGKILL in SigPnd of /proc/PID/status."""

FUSECTL: Final = "/sys/fs/fuse/connections"


def mount_fuse(path: str, fd: int, *, fsname: str, subtype: str, allow_other: bool) -> None:
    """Mount the connection ``fd`` of /dev/fuse at ``path`` by mount(2), read-only. Raises OSError."""
    if "," in subtype:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    if allow_other:
        options += ",allow_other"
    kind, flags = f"fuse.{subtype}".encode(), MS_RDONLY | MS_NOSUID | MS_NODEV
    checked(LIBC.mount(fsname.encode(), os.fsencode(path), kind, flags, options.encode()), path)


def bind(source: str, target: str) -> None:
    """Show ``source`` at ``target``, with the flags of the mount that ``source`` lies on. Raises OSError."""
    _mount(source, target, MS_BIND)


def make_bind_readonly(path: str) -> None:
    """Restrict a bind: no writes, no setuid, no devices; private, so that it shows in no other namespace. Raises
    OSError.

    noatime: a read-only bind never writes access times, whatever its flags say."""
    _mount(None, path, MS_PRIVATE)
    _mount(None, path, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME)


def _mount(source: str | None, target: str, flags: int) -> None:
    from_path = None if source is None else os.fsencode(source)
    checked(LIBC.mount(from_path, os.fsencode(target), None, flags, None), target)


def umount(path: str, *, lazily: bool = False) -> None:
    """Unmount what is mounted at ``path``, as root. Raises OSError: EBUSY while somebody uses it, unless ``lazily``."""
    number = _umount2(path, (MNT_DETACH if lazily else 0) | UMOUNT_NOFOLLOW)
    if number:
        raise OSError(number, os.strerror(number), path)


class FanEvent(NamedTuple):
    """The accesses of one process to a marked file since the last read. ``opened``: another process than this one
    opened it; ``closed``: a description of it ended, mappings included. Both may be set, for any number of times.
    ``inode``: (st_dev, st_ino); ``mount_id``: the mount by whose path it was opened, or UNKNOWN_MOUNT."""

    inode: tuple[int, int]
    mount_id: int
    opened: bool
    closed: bool


_FAN_INIT: Final = 0x1 | 0x2 | 0x10 | 0x20
"""CLOEXEC, NONBLOCK, UNLIMITED_QUEUE, UNLIMITED_MARKS"""
_FAN_ADD: Final = 1
_FAN_REMOVE: Final = 2
_FAN_CLOSE: Final = 0x8 | 0x10
_FAN_OPEN: Final = 0x20
_FAN_METADATA: Final = struct.Struct("=IBBHQii")
"""fanotify_event_metadata: event_len, vers, reserved, metadata_len, mask, fd, pid"""
FAN_MOST: Final = 256
"""How many events one look takes at most."""
UNKNOWN_MOUNT: Final = -1
_AT_FDCWD: Final = -100


def fanotify() -> int:
    """Make a fanotify group that does not block; as root. Raises OSError."""
    return checked(LIBC.fanotify_init(_FAN_INIT, os.O_RDONLY | os.O_CLOEXEC))


def fan_mark(fd: int, path: str, *, add: bool) -> None:
    """Tell of opens and closes of the inode at ``path`` (or no longer), through whichever mount. Raises OSError."""
    mask = ctypes.c_uint64(_FAN_OPEN | _FAN_CLOSE)
    checked(LIBC.fanotify_mark(fd, _FAN_ADD if add else _FAN_REMOVE, mask, _AT_FDCWD, os.fsencode(path)))


def fan_events(fd: int) -> list[FanEvent]:
    """Read the events that wait, FAN_MOST at most: each comes with a descriptor. Raises OSError: without descriptors to
    spare the kernel forgets what it could not tell of."""
    try:
        data = os.read(fd, _FAN_METADATA.size * FAN_MOST)
    except BlockingIOError:
        return []
    told = [(mask, file, pid) for _, _, _, _, mask, file, pid in _FAN_METADATA.iter_unpack(data) if file >= 0]
    events = []
    try:
        for mask, file, pid in told:
            found = os.fstat(file)
            try:
                mount = mount_id(file)
            except OSError:  # it takes one more descriptor
                mount = UNKNOWN_MOUNT
            opened = bool(mask & _FAN_OPEN) and pid != os.getpid()
            events.append(FanEvent((found.st_dev, found.st_ino), mount, opened, bool(mask & _FAN_CLOSE)))
    finally:
        for _, file, _ in told:
            os.close(file)
    return events


def mount_id(fd: int) -> int:
    """The id of the mount by whose path ``fd`` was opened."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def umount_lazily(path: str) -> None:
    """Detach what is mounted at ``path``, used or not. As root by umount2, else by fusermount3.

    Nothing mounted there is no error. Raises MountFailed. May block for as long as fusermount3 runs (10 s at most).
    """
    number = _umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)
    if number in (0, errno.EINVAL, errno.ENOENT):
        return
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if number != errno.EPERM or helper is None:
        raise MountFailed(f"cannot unmount {path}: {os.strerror(number)}")
    try:
        done = subprocess.run(
            [helper, "-u", "-z", "--", path], capture_output=True, text=True, timeout=FUSERMOUNT_DEADLINE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountFailed(f"cannot unmount {path}: {error}") from error
    if done.returncode != 0 and mountinfo.find_mount(path) is not None:
        raise MountFailed(f"cannot unmount {path}: {done.stderr.strip() or f'{helper} failed'}")


def abort_mount(path: str) -> None:
    """Abort the connection of the FUSE mount at ``path``, without /sys (which a container has read-only). It stays
    mounted, dead. Nothing mounted there, or not as root: nothing happens."""
    _umount2(path, MNT_FORCE | UMOUNT_NOFOLLOW)


def _umount2(path: str, flags: int) -> int:
    """The errno, 0 when done."""
    return 0 if LIBC.umount2(os.fsencode(path), flags) == 0 else ctypes.get_errno()


def set_readahead(mount: Mount, kilobytes: int) -> None:
    """Raise the mount's readahead (the kernel offers 128 KiB when a FUSE connection begins). Raises OSError."""
    _write(f"/sys/class/bdi/{mount.device}/read_ahead_kb", str(kilobytes))


def set_background_limits(mount: Mount, requests: int) -> None:
    """Set how many background requests (readahead, and so most faults) a FUSE mount may have in flight. Raises OSError.

    With the default of 12, two dozen stuck faults hold up every other file's.
    """
    directory = _connection(mount)
    _write(f"{directory}/max_background", str(requests))
    _write(f"{directory}/congestion_threshold", str(requests))


def abort_connection(mount: Mount) -> None:
    """Fail all requests of a FUSE mount, those in flight too, at once and for good. Raises OSError."""
    _write(f"{_connection(mount)}/abort", "1")


def _connection(mount: Mount) -> str:
    """The fusectl directory of the connection, named by the device number; as root, mounts fusectl where nobody has."""
    if mountinfo.find_mount(FUSECTL) is None:
        checked(LIBC.mount(b"fusectl", FUSECTL.encode(), b"fusectl", 0, None), FUSECTL)
    major, minor = (int(part) for part in mount.device.split(":"))
    return f"{FUSECTL}/{(major << 20) | minor}"


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def kernel_release() -> tuple[int, int]:
    """Return (major, minor) of the running kernel."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def has_sys_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN in effect: mount(2) without fusermount3, bind mounts, passthrough."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN_BIT & 1)
    return False


PASSTHROUGH_RELEASE: Final = (6, 9)


def why_no_passthrough(release: tuple[int, int] | None = None, sys_admin: bool | None = None) -> str | None:
    """The known reason why FUSE passthrough cannot work, None if there is none. Arguments of None mean this machine."""
    major, minor = kernel_release() if release is None else release
    if (major, minor) < PASSTHROUGH_RELEASE:
        return f"Linux {major}.{minor} is older than 6.9"
    if not (has_sys_admin() if sys_admin is None else sys_admin):
        return "it needs CAP_SYS_ADMIN"
    return None


def user_allow_other(text: str | None = None) -> bool:
    """Whether /etc/fuse.conf lets ordinary users share their mounts. ``text``: its content, for tests."""
    if text is None:
        try:
            with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as lines:
                text = lines.read()
        except OSError:
            return False
    return any(line.strip() == "user_allow_other" for line in text.splitlines())


def libfuse_version() -> str | None:
    """The version of libfuse, as "3.14.0"; None when the library cannot be loaded."""
    for name in ("libfuse3.so.3", "libfuse3.so.4", "libfuse3.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.fuse_pkgversion.restype = ctypes.c_char_p
        version = library.fuse_pkgversion()
        return version.decode() if isinstance(version, bytes) else None
    return None


def fuse_descriptors() -> frozenset[int]:
    """Return this process's descriptors of /dev/fuse."""
    found = set()
    names: Sequence[str] = os.listdir("/proc/self/fd")
    for name in names:
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except OSError:
            continue  # closed since it was listed
    return frozenset(found)


def is_dying(pid: int) -> bool:
    """Whether a thread has a SIGKILL to take (every fatal signal ends as one). ``pid`` 0: it lives in a namespace that
    is not seen from here, and nobody can tell."""
    if pid == 0:
        return False
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) & SIGKILL_BIT:
                    return True
    except OSError:
        return True
    return False
