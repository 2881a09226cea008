"""The FUSE kernel protocol's messages as bytes: layouts, numbers and bounds. No IO.

From the kernel's include/uapi/linux/fuse.h at protocol 7.40, the first with passthrough; fields in its order, in the
machine's byte order. ``parse`` and the ``*_in`` readers raise BadMessage for anything that is too short, so that
whatever a kernel sends ends in an errno and never in an exception of another kind.
"""

from __future__ import annotations

import stat
import struct
from typing import Final, NamedTuple

from instantstart_fs.mount.fuse_types import Entry, Statvfs

MAJOR: Final = 7
MINOR: Final = 40

# Operations

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
CREATE: Final = 35
INTERRUPT: Final = 36
DESTROY: Final = 38
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45

WRITES: Final = frozenset(
    {
        SETATTR,
        SYMLINK,
        MKNOD,
        MKDIR,
        UNLINK,
        RMDIR,
        RENAME,
        LINK,
        WRITE,
        SETXATTR,
        REMOVEXATTR,
        CREATE,
        FALLOCATE,
        RENAME2,
    }
)
SILENT: Final = frozenset({FORGET, BATCH_FORGET, INTERRUPT})
"""These have no reply."""

# Flags

ASYNC_READ: Final = 1 << 0
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
AUTO_INVAL_DATA: Final = 1 << 12
"""Set only for directories. With it the kernel compares a cached listing's mtime with the directory's before it uses
the listing, which catches a reply that crossed an invalidation. Files' mtimes never change under one nodeid."""
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
INIT_EXT: Final = 1 << 30
"""flags2 of both INIT messages counts."""
PASSTHROUGH: Final = 1 << 37
"""Bit 5 of flags2."""
HAS_RESEND: Final = 1 << 39
"""The kernel offers FUSE_NOTIFY_RESEND; nothing to ask for."""
RESENT: Final = 1 << 63
"""A bit of a request's unique: the request was sent before, to a daemon that did not answer."""

WANTED: Final = (
    ASYNC_READ
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | CACHE_SYMLINKS
    | INIT_EXT
    | PASSTHROUGH
)

FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_PASSTHROUGH: Final = 1 << 7

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_RESEND: Final = 7

EXPIRE_ONLY: Final = 1 << 0
"""Flag of NOTIFY_INVAL_ENTRY: ask again at the next lookup, and leave what is mounted or open below."""

# ioctls of /dev/fuse

BACKING_OPEN: Final = 0x4010E501
"""_IOW(229, 1, struct fuse_backing_map)"""
BACKING_CLOSE: Final = 0x4004E502
"""_IOW(229, 2, uint32_t)"""

# Layouts

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
OUT_HEADER: Final = struct.Struct("=IiQ")
"""fuse_out_header: len, error, unique"""
INIT_IN: Final = struct.Struct("=IIII")
"""fuse_init_in: major, minor, max_readahead, flags; flags2 and spare fields follow from 7.36 on"""
INIT_IN_EXT: Final = struct.Struct("=I")
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")
"""fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout, unused[11]"""
ATTR: Final = struct.Struct("=6Q10I")
"""fuse_attr: ino, size, blocks, atime, mtime, ctime; atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev,
blksize, flags"""
ENTRY: Final = struct.Struct("=4Q2I")
"""fuse_entry_out before its attr: nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec"""
ATTR_OUT: Final = struct.Struct("=QII")
"""fuse_attr_out before its attr: attr_valid, attr_valid_nsec, dummy"""
OPEN_IN: Final = struct.Struct("=II")
"""fuse_open_in: flags, open_flags"""
OPEN_OUT: Final = struct.Struct("=QIi")
"""fuse_open_out: fh, open_flags, backing_id"""
RELEASE_IN: Final = struct.Struct("=QIIQ")
"""fuse_release_in: fh, flags, release_flags, lock_owner"""
READ_IN: Final = struct.Struct("=QQIIQII")
"""fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding"""
KSTATFS: Final = struct.Struct("=5Q4I24x")
"""fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare[6]"""
XATTR_SIZE: Final = struct.Struct("=II")
"""fuse_getxattr_in and fuse_getxattr_out: size, padding"""
DIRENT: Final = struct.Struct("=QQII")
"""fuse_dirent before its name: ino, off, namelen, type; padded to 8 bytes"""
INTERRUPT_IN: Final = struct.Struct("=Q")
INVAL_ENTRY: Final = struct.Struct("=QII")
"""fuse_notify_inval_entry_out: parent, namelen, flags; the name with its NUL follows"""
INVAL_INODE: Final = struct.Struct("=Qqq")
"""fuse_notify_inval_inode_out: ino, off (negative: attributes alone), len"""
BACKING_MAP: Final = struct.Struct("=iIQ")
"""fuse_backing_map: fd, flags, padding"""

_U64: Final = (1 << 64) - 1
_NS: Final = 1_000_000_000


class BadMessage(Exception):
    """The kernel, or somebody in its place, sent what the protocol does not allow."""


class Request(NamedTuple):
    """A request's header. ``body`` lies in the receive buffer, which the next read overwrites."""

    opcode: int
    unique: int
    nodeid: int
    pid: int
    body: memoryview
    uid: int = 0
    gid: int = 0


def parse(message: memoryview) -> Request:
    """Parse one message as it was read. Raises BadMessage."""
    if len(message) < IN_HEADER.size:
        raise BadMessage(f"{len(message)} bytes are less than a header")
    length, opcode, unique, nodeid, uid, gid, pid, extensions, _ = IN_HEADER.unpack_from(message)
    if length != len(message):
        raise BadMessage(f"a header says {length} bytes where {len(message)} came")
    end = length - 8 * extensions
    if end < IN_HEADER.size:
        raise BadMessage("extensions longer than the message")
    return Request(opcode, unique, nodeid, pid, message[IN_HEADER.size : end], uid, gid)


def fields(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    """The fixed fields that ``body`` begins with. Raises BadMessage."""
    if len(body) < layout.size:
        raise BadMessage(f"{len(body)} bytes where {layout.size} are due")
    return layout.unpack_from(body)


def name(body: memoryview, offset: int = 0) -> bytes:
    """The NUL-terminated name at ``offset``. Raises BadMessage."""
    text = bytes(body[offset:])
    end = text.find(b"\0")
    if end <= 0:
        raise BadMessage("a name that is empty or does not end")
    return text[:end]


# INIT


class Init(NamedTuple):
    """The kernel's offer at INIT; ``flags`` are 64 bits."""

    major: int
    minor: int
    max_readahead: int
    flags: int


def init_in(body: memoryview) -> Init:
    """Decode the body of FUSE_INIT. Raises BadMessage."""
    major, minor, readahead, flags = fields(INIT_IN, body)
    if flags & INIT_EXT and len(body) >= INIT_IN.size + INIT_IN_EXT.size:
        flags |= INIT_IN_EXT.unpack_from(body, INIT_IN.size)[0] << 32
    return Init(major, minor, readahead, flags)


def init_out(offer: Init, *, readahead: int, background: int, max_pages: int) -> bytes:
    """``readahead`` in bytes. Everything that we want and the kernel offers."""
    flags = offer.flags & WANTED
    return INIT_OUT.pack(
        MAJOR, MINOR, readahead, flags & 0xFFFF_FFFF, background, background, 4096, 1, max_pages, 0,
        flags >> 32, 1, 0,
    )  # fmt: skip


# Replies


def out(unique: int, payload_length: int, error: int = 0) -> bytes:
    """The header of a reply. ``error``: an errno, 0 for none; of a notification: minus its code."""
    return OUT_HEADER.pack(OUT_HEADER.size + payload_length, -error, unique)


def _seconds(value: float) -> tuple[int, int]:
    whole = int(value)
    return whole, int((value - whole) * _NS)


def attr(entry: Entry) -> bytes:
    atime, atime_ns = divmod(entry.st_atime_ns, _NS)
    mtime, mtime_ns = divmod(entry.st_mtime_ns, _NS)
    ctime, ctime_ns = divmod(entry.st_ctime_ns, _NS)
    return ATTR.pack(
        entry.st_ino, entry.st_size, entry.st_blocks, atime & _U64, mtime & _U64, ctime & _U64,
        atime_ns, mtime_ns, ctime_ns, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, 0, entry.st_blksize, 0,
    )  # fmt: skip


def entry_out(nodeid: int, entry: Entry) -> bytes:
    """``nodeid`` 0: the name is not there, which the kernel remembers for entry_timeout."""
    entry_valid, entry_ns = _seconds(entry.entry_timeout)
    attr_valid, attr_ns = _seconds(entry.attr_timeout)
    return ENTRY.pack(nodeid, 0, entry_valid, attr_valid, entry_ns, attr_ns) + attr(entry)


def attr_out(entry: Entry) -> bytes:
    valid, valid_ns = _seconds(entry.attr_timeout)
    return ATTR_OUT.pack(valid, valid_ns, 0) + attr(entry)


def statfs_out(data: Statvfs) -> bytes:
    return KSTATFS.pack(
        data.f_blocks, data.f_bavail, data.f_bavail, data.f_files, 0,
        data.f_bsize, data.f_namemax, data.f_bsize, 0,
    )  # fmt: skip


class Listing:
    """A READDIR or READDIRPLUS reply that is being filled; what readdir gets as its token. ``size``: the kernel's."""

    def __init__(self, size: int, *, plus: bool) -> None:
        self._left = size
        self._plus = plus
        self.parts: list[bytes] = []

    def add(self, name: bytes, nodeid: int, entry: Entry, next_id: int) -> bool:
        """Add an entry. Returns False if it does not fit any more."""
        padding = -len(name) % 8
        record = DIRENT.pack(entry.st_ino, next_id, len(name), stat.S_IFMT(entry.st_mode) >> 12) + name + bytes(padding)
        if self._plus:
            record = entry_out(nodeid, entry) + record
        if len(record) > self._left:
            return False
        self._left -= len(record)
        self.parts.append(record)
        return True


def inval_entry(parent: int, name: bytes, *, expire: bool = False) -> bytes:
    """The whole notification. ``expire``: see EXPIRE_ONLY."""
    return (
        out(0, INVAL_ENTRY.size + len(name) + 1, -NOTIFY_INVAL_ENTRY)
        + INVAL_ENTRY.pack(parent, len(name), EXPIRE_ONLY if expire else 0)
        + name
        + b"\0"
    )


def inval_inode(nodeid: int, *, listing: bool = False) -> bytes:
    """The whole notification: attributes, and a directory's cached ``listing``. Never a file's pages: that would wait
    for its reads in flight."""
    return out(0, INVAL_INODE.size, -NOTIFY_INVAL_INODE) + INVAL_INODE.pack(nodeid, 0 if listing else -1, 0)


def resend() -> bytes:
    """The whole notification: send again what was received and not answered."""
    return out(0, 0, -NOTIFY_RESEND)
