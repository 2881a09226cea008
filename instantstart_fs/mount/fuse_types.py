"""What the request handlers answer with: plain values and one error, for either transport.

mount/wire.py packs them for the kernel; mount/pyfuse3_transport.py makes pyfuse3's own objects of them. pyfuse3 is
imported there alone: loading it and libfuse takes longer than all modules of mount/, and passthrough needs neither.
"""

from __future__ import annotations

import msgspec


class FUSEError(Exception):
    """``errno``: the answer to the request."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.errno = number


class Entry(msgspec.Struct):
    """A node's attributes, and for how many seconds the kernel may keep them. Without values: a name that is absent.

    ``nodeid`` is the kernel's handle of the node, ``st_ino`` what stat(2) shows. pyfuse3 has one field for both, and is
    given only nodes where they are the same.
    """

    nodeid: int = 0
    st_ino: int = 0
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0
    st_mode: int = 0
    st_nlink: int = 0
    st_uid: int = 0
    st_gid: int = 0
    st_size: int = 0
    st_blksize: int = 0
    st_blocks: int = 0
    st_atime_ns: int = 0
    st_mtime_ns: int = 0
    st_ctime_ns: int = 0


class Statvfs(msgspec.Struct):
    """What statvfs(2) shows. Blocks are of ``f_bsize`` bytes."""

    f_bsize: int
    f_blocks: int
    f_bavail: int
    f_files: int
    f_namemax: int


class Opened(msgspec.Struct):
    """``fh``: the handle of the open file. ``keep_cache``: whether the pages of earlier opens stay."""

    fh: int
    keep_cache: bool
