"""The interface between the mount and the library: the protocol Vfs, and its values. Nothing is implemented here.

All plain methods answer at once from memory, whatever the origins do (design rule 3). If a pipeline's metadata is not
in memory they raise NotLoaded; ``ensure_loaded`` then reads it from the store while others are served. Only a read of
an absent chunk waits for the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec
import trio

ROOT = 1
"""The nodeid of the mountpoint itself, fixed by the FUSE protocol."""


class NotLoaded(Exception):
    """The metadata must be read from the store first: ``await ensure_loaded(pipeline)``, then ask again."""

    def __init__(self, pipeline: str) -> None:
        super().__init__(f"{pipeline} is not in memory")
        self.pipeline = pipeline


class Private(msgspec.Struct, frozen=True):
    """Owner, group and permission bits, by which the kernel decides who may pass."""

    uid: int
    gid: int
    mode: int


class Attributes(msgspec.Struct, frozen=True):
    """What stat shows. ``mode`` is the full st_mode; ``blocks`` counts 512-byte units that are cached.

    ``stable``: pinned and complete, so that the kernel may keep it long; False while it can change by itself.
    ``private``: only users who may read a directory of that owner and mode may find it; None: all users.
    ``shown_inode``: st_ino where it is not the nodeid: a file has a nodeid for each I/O mode and shows one number.
    """

    nodeid: int
    kind: Literal["dir", "file", "symlink"]
    mode: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    nlink: int
    stable: bool
    shown_inode: int = 0
    private: Private | None = None


class Invalidation(msgspec.Struct, frozen=True):
    """A change of something that the kernel may have cached: the entry ``name`` in ``parent``, or, with ``name`` None,
    the attributes of ``nodeid``. ``listing``: it is a directory, and its listing has changed too."""

    parent: int
    name: str | None
    nodeid: int | None = None
    listing: bool = False
    expire: bool = False
    """The kernel is to look it up again next time. What is mounted or open below stays as it is."""


class FilesystemStats(msgspec.Struct, frozen=True):
    """Capacity of the store, for statfs. Bytes; ``files`` is how many pipelines there are."""

    total_bytes: int
    available_bytes: int
    files: int


class OpenFile(Protocol):
    """An open file, owned by the library."""

    @property
    def nodeid(self) -> int: ...

    @property
    def pipeline(self) -> str:
        """The pipeline's id, for the log, also after it was removed."""
        ...

    @property
    def sealed(self) -> bool:
        """Whether the file is complete and proven, so that no read of it waits."""
        ...

    @property
    def keep_cache(self) -> bool:
        """Whether the kernel may keep the pages of earlier opens."""
        ...

    @property
    def backing(self) -> int | None:
        """The store's file, to be read by the kernel itself: a descriptor that lives until ``release``. None: reads
        come to ``read_into``. It depends on the nodeid alone, since the kernel allows a nodeid one I/O mode."""
        ...


class Vfs(Protocol):
    """The filesystem as the mount sees it. Every method raises NoSuchEntry for names and nodeids that are not there,
    and other InstantStartErrors as it says."""

    @property
    def invalidations(self) -> trio.MemoryReceiveChannel[Invalidation]: ...

    def use_passthrough(self, on: bool, closing: Callable[[int], None] | None = None) -> None:
        """Whether complete files are shown under the nodeid whose opens have a ``backing``; off at first.

        The Vfs may keep a backing descriptor after the last release; it calls ``closing`` with the nodeid before it
        closes one, and never while the nodeid is open."""
        ...

    async def ensure_loaded(self, pipeline: str) -> None:
        """Return once the pipeline is in memory, is shown as unreadable, or was removed. Call it after NotLoaded."""
        ...

    def lookup(self, parent: int, name: str) -> Attributes: ...

    def attributes(self, nodeid: int) -> Attributes: ...

    def list_directory(self, nodeid: int) -> Sequence[str]:
        """The names."""
        ...

    def keeps_listing(self, nodeid: int) -> bool:
        """Whether the kernel may keep the directory's listing until an Invalidation with ``listing``. It may if the
        names are pinned and few entries are not ``stable``: it asks for each of those singly."""
        ...

    def readlink(self, nodeid: int) -> str: ...

    def xattrs(self, nodeid: int) -> dict[str, bytes]: ...

    def filesystem(self) -> FilesystemStats: ...

    def pipeline_of(self, nodeid: int) -> str | None:
        """The id of the pipeline that a nodeid belongs to, for the log. None for the mount's own and for unknown
        nodeids."""
        ...

    def open_nowait(self, nodeid: int) -> OpenFile | None:
        """Open the file if that needs no wait; None if it does. Raises what ``open`` raises."""
        ...

    async def open(self, nodeid: int) -> OpenFile:
        """Open a file. It counts as a request if it is a weight file. Raises OriginBroken for an unsealed weight file
        while its origin's breaker is open, and the error of a file that failed for good."""
        ...

    async def read_into(self, file: OpenFile, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` and return the number of bytes, which is short only at the end of the file.

        Waits for absent chunks, at most ``read_deadline`` without progress. Raises InstantStartError.
        """
        ...

    def reopen(self, nodeid: int) -> OpenFile:
        """Return a file that the kernel holds open since an earlier daemon. No request. Raises NoSuchEntry if it was
        replaced."""
        ...

    def on_mounted(self, *, resumed: bool) -> None:
        """Note that the mount answers and every ``reopen`` is done. ``resumed``: the kernel knows names from an earlier
        daemon."""
        ...

    def release(self, file: OpenFile) -> None: ...
