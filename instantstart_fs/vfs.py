"""What the mount sees of the library: the one seam between them.

All plain methods answer from memory, at once, whatever the origins do (design rule 3). Where a pipeline's metadata
is not in memory they raise NotLoaded, and ``ensure_loaded`` reads it from the store, while others are served. Only a
read of an absent chunk waits for the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec
import trio

ROOT = 1
"""The nodeid of the mountpoint itself, fixed by the FUSE protocol."""


class NotLoaded(Exception):
    """What was asked for must be read from the store first: ``await ensure_loaded(pipeline)``, then ask again."""

    def __init__(self, pipeline: str) -> None:
        super().__init__(f"{pipeline} is not in memory")
        self.pipeline = pipeline


class Private(msgspec.Struct, frozen=True):
    """Whose: the owner, group and permission bits that the kernel's rules are applied to."""

    uid: int
    gid: int
    mode: int


class Attributes(msgspec.Struct, frozen=True):
    """What stat shows. ``mode`` is the full st_mode; ``blocks`` counts 512-byte units that are cached.

    ``stable``: pinned and complete, so that the kernel may keep it long; False while it can change by itself.
    ``private``: only those may find it who may read a directory of that owner and mode; None: everybody.
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
    """Something that the kernel may have cached has changed: the entry ``name`` in ``parent``, or, with ``name`` None,
    the attributes of ``nodeid``; ``listing``: it is a directory, and what it lists has changed too."""

    parent: int
    name: str | None
    nodeid: int | None = None
    listing: bool = False
    expire: bool = False
    """To be asked again at the next lookup; what is mounted or open below stays as it is."""


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
        """For the log: whose it is, also when it is gone from the mount."""
        ...

    @property
    def sealed(self) -> bool:
        """Whether its bytes are all there and proven, so that no read of it can wait."""
        ...

    @property
    def keep_cache(self) -> bool:
        """Whether pages that an earlier open left are as good as those of this one."""
        ...

    @property
    def backing(self) -> int | None:
        """The store's file, to be read by the kernel itself: a descriptor that lives until ``release``. None: reads
        come to ``read_into``. It depends on the nodeid alone, since the kernel allows a nodeid one I/O mode."""
        ...


class Vfs(Protocol):
    """Raises NoSuchEntry for names and nodeids that are not there; other InstantStartErrors as each method says."""

    @property
    def invalidations(self) -> trio.MemoryReceiveChannel[Invalidation]: ...

    def use_passthrough(self, on: bool, closing: Callable[[int], None] | None = None) -> None:
        """Whether complete files are shown under the nodeid whose opens have a ``backing``; off at first.

        The Vfs may keep a backing descriptor after the last release; it calls ``closing`` with the nodeid before it
        closes one, and never while the nodeid is open."""
        ...

    async def ensure_loaded(self, pipeline: str) -> None:
        """After NotLoaded: return once it is in memory, or is shown as unreadable, or is gone."""
        ...

    def lookup(self, parent: int, name: str) -> Attributes: ...

    def attributes(self, nodeid: int) -> Attributes: ...

    def list_directory(self, nodeid: int) -> Sequence[str]:
        """The names."""
        ...

    def keeps_listing(self, nodeid: int) -> bool:
        """Whether the kernel may keep what the directory lists until an Invalidation with ``listing`` says otherwise:
        its names are pinned, and few of its entries are not ``stable`` (of a kept listing, it asks for each of those
        singly)."""
        ...

    def readlink(self, nodeid: int) -> str: ...

    def xattrs(self, nodeid: int) -> dict[str, bytes]: ...

    def filesystem(self) -> FilesystemStats: ...

    def pipeline_of(self, nodeid: int) -> str | None:
        """For the log: whose file or directory that is. None for the mount's own and for what is gone."""
        ...

    def open_nowait(self, nodeid: int) -> OpenFile | None:
        """``open`` where it need not wait for anything; None: it must. Raises what ``open`` raises."""
        ...

    async def open(self, nodeid: int) -> OpenFile:
        """Counts as a request when the file is a weight file. Raises OriginBroken for an unsealed weight file while
        its origin's breaker is open, and what made a file fail for good."""
        ...

    async def read_into(self, file: OpenFile, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; the number of bytes, short only at the end of the file.

        Waits for absent chunks, at most ``read_deadline`` without progress. Raises InstantStartError.
        """
        ...

    def reopen(self, nodeid: int) -> OpenFile:
        """A file that the kernel holds open since an earlier daemon; no request. Raises NoSuchEntry if it is gone."""
        ...

    def on_mounted(self, *, resumed: bool) -> None:
        """The mount stands; every ``reopen`` is done. ``resumed``: the kernel knows names from an earlier daemon."""
        ...

    def release(self, file: OpenFile) -> None: ...
