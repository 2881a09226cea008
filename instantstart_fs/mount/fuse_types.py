"""The types and calls that Operations shares with pyfuse3, with stand-ins where pyfuse3 is not installed.

Without pyfuse3 the passthrough transport still serves: it needs these as plain values only. The stand-ins offer no
more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfuse3 import ENOATTR, EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData
    from pyfuse3 import Operations as BaseOperations
    from pyfuse3 import get_sup_groups as supplementary_groups
    from pyfuse3 import readdir_reply as readdir_reply
else:
    try:
        from pyfuse3 import (
            ENOATTR,
            EntryAttributes,
            FileInfo,
            FUSEError,
            RequestContext,
            StatvfsData,
            readdir_reply,
        )
        from pyfuse3 import Operations as BaseOperations
        from pyfuse3 import get_sup_groups as supplementary_groups
    except ImportError:
        ENOATTR = errno.ENODATA

        class FUSEError(Exception):
            """``errno``: the answer to the request."""

            def __init__(self, number: int) -> None:
                super().__init__(number)
                self.errno = number

        class EntryAttributes:
            st_ino = generation = st_mode = st_nlink = st_uid = st_gid = st_rdev = st_size = st_blksize = st_blocks = 0
            st_atime_ns = st_mtime_ns = st_ctime_ns = 0
            entry_timeout = attr_timeout = 300.0

        class StatvfsData:
            pass

        class RequestContext:
            pass

        class FileInfo:
            def __init__(self, fh: int = 0, **flags: bool) -> None:
                self.fh = fh
                self.__dict__.update(flags)

        class BaseOperations:
            pass

        def readdir_reply(token: Any, name: bytes, attributes: EntryAttributes, next_id: int) -> bool:
            raise NotImplementedError("pyfuse3 is not installed")

        def supplementary_groups(pid: int) -> set[int]:
            """Raises OSError when the process has ended."""
            with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
                groups = (line.split()[1:] for line in lines if line.startswith("Groups:"))
                return {int(group) for group in next(groups, [])}


__all__ = [
    "ENOATTR",
    "BaseOperations",
    "EntryAttributes",
    "FUSEError",
    "FileInfo",
    "RequestContext",
    "StatvfsData",
    "readdir_reply",
    "supplementary_groups",
]
