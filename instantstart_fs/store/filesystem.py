"""The filesystem below the store: which kinds are fit for it, and what a directory of it can do. It measures no
space."""

from __future__ import annotations

import ctypes
import errno
import os

from instantstart_fs.errors import StoreUnsupported
from instantstart_fs.store.os_errors import translate
from instantstart_fs.system.libc import LIBC, checked, last_error

_ADVICE = "give the store a directory on ext4 or xfs (in a container: a volume, not the image's own filesystem)"

# f_type of statfs(2), from linux/magic.h and the filesystems' own headers.
_REFUSED = {
    0x794C7630: ("overlayfs", "it copies whole files up and keeps no stable inodes"),
    0x65735546: ("a FUSE filesystem", "a page fault could wait for itself, and user xattrs and fallocate are not sure"),
    0x6969: ("NFS", "LMDB and file locks are not safe on it"),
    0xFE534D42: ("SMB", "LMDB and file locks are not safe on it"),
    0xFF534D42: ("CIFS", "LMDB and file locks are not safe on it"),
    0x00C36400: ("CephFS", "it is shared between hosts, and one store belongs to one daemon"),
    0x01021997: ("9p", "LMDB needs coherent memory maps"),
    0x9FA0: ("proc", "it holds no files"),
    0x62656572: ("sysfs", "it holds no files"),
    0x858458F6: ("ramfs", "it has no size and no user xattrs"),
    0x4D44: ("FAT", "it has neither sparse files nor xattrs"),
    0x2011BAB0: ("exFAT", "it has neither sparse files nor xattrs"),
}
_WARNED = {
    0x9123683E: "btrfs: copy-on-write makes filling slower, and space set aside by fallocate may still run out",
    0x2FC12FC1: "ZFS: it cannot set space aside, and its ARC keeps a second copy of every page",
    0x01021994: "tmpfs: the store takes memory and is gone at the next boot",
    0xCA451A4E: "bcachefs: not tested",
}
_FIT = {0xEF53, 0x58465342, 0xF2F52010}
"""ext2/3/4, xfs, f2fs."""

# One number on all architectures, being newer than their tables' differences.
_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_OPEN_TREE_CLONE, _AT_EMPTY_PATH = 1, 0x1000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_PROBE_XATTR = "user.instantstart.probe"


def filesystem_type(fd: int) -> int:
    """f_type of the filesystem that ``fd`` lies on."""
    buffer = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; f_type comes first
    if LIBC.fstatfs(fd, buffer) != 0:
        raise translate(last_error(), "look at the store's filesystem")
    return buffer[0] & 0xFFFFFFFF


def readonly_view(directory: int) -> int:
    """A descriptor of the same directory in a mount of its own, read-only and nowhere attached: what is opened through
    it cannot be made writable again, not even by its owner and chmod. It needs CAP_SYS_ADMIN and Linux 5.12. Raises
    OSError."""
    empty = ctypes.c_char_p(b"")
    view = checked(LIBC.syscall(_OPEN_TREE, directory, empty, _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC))
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    wanted = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0)
    if LIBC.syscall(_MOUNT_SETATTR, view, empty, _AT_EMPTY_PATH, ctypes.byref(wanted), ctypes.sizeof(wanted)) != 0:
        error = last_error()
        os.close(view)
        raise error
    return view


def judge(f_type: int, root: str) -> str | None:
    """Return None for a fit filesystem, a warning for a doubtful one. Raises StoreUnsupported for one that cannot be
    used."""
    if f_type in _FIT:
        return None
    if f_type in _REFUSED:
        name, why = _REFUSED[f_type]
        raise StoreUnsupported(f"the store {root} lies on {name}: {why}; {_ADVICE}")
    return f"the store {root} lies on " + _WARNED.get(f_type, f"a filesystem not known here ({f_type:#x}): not tested")


def probe_xattrs(fd: int, root: str) -> None:
    """Prove on ``fd`` that user xattrs can be written. Raises StoreUnsupported."""
    try:
        os.setxattr(fd, _PROBE_XATTR, b"1")
        os.removexattr(fd, _PROBE_XATTR)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
            raise StoreUnsupported(
                f"the filesystem of the store {root} takes no user xattrs (tmpfs does from Linux 6.6 on); {_ADVICE}"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # it can, and has no space for it now: what is there is served all the same
        raise translate(error, f"write an xattr in {root}") from error
