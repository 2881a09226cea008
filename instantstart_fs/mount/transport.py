"""The settings of a mount, the report of what was made, and the protocol of its transports. It mounts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import msgspec

from instantstart_fs.system import mountinfo
from instantstart_fs.vfs import Invalidation


class MountSettings(msgspec.Struct, frozen=True):
    """``path`` is the mountpoint, made where it is absent; ``store`` the store's root: neither may hold the other.

    ``allow_other`` is given up with a note where the kernel does not let this user have it. ``max_tasks`` bounds the
    requests served at once; it must stay above ``max_background``, or stuck faults would take every task and a stat
    would wait behind them, as ``max_background`` is above what one pipeline's waiting reads may take
    (serving/reads.py, MOST_WAITING): when it is reached, readahead and O_DIRECT reads of all pipelines stand in one
    line of the kernel's. A task costs about 10 KiB, only while it is needed.
    """

    path: str
    store: str | None = None
    transport: Literal["auto", "passthrough", "bind", "pyfuse3"] = "auto"
    allow_other: bool = True
    fsname: str = "instantstart"
    subtype: str = "instantstart"
    max_tasks: int = 65_536
    idle_tasks: int = 8
    max_background: int = 32_768
    readahead_kb: int = 1024
    ready_deadline: float = 10.0


class Mounted(msgspec.Struct):
    """The mount that was made. ``notes`` say which tunings were not permitted; ``reason`` why reads are not passed
    through, "" where they are or nobody asked; ``requests``: how often each handler of Operations was called, as it
    goes on. ``transport`` and ``reason`` change when it is found out later that files can be bound."""

    path: str
    mount: mountinfo.Mount
    notes: tuple[str, ...]
    transport: str = "pyfuse3"
    reason: str = ""
    requests: Mapping[str, int] = MappingProxyType({})


class Transport(Protocol):
    """Speaks the kernel's protocol for one mount."""

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> Mapping[str, int]:
        """Return how often each handler of Operations was called. The mapping is live."""
        ...

    def mount(self, path: str, *, fsname: str, subtype: str, allow_other: bool) -> None:
        """Mount the filesystem at ``path``. Raises MountFailed."""
        ...

    async def main(self) -> None:
        """Serve until it is unmounted."""
        ...

    def send(self, invalidation: Invalidation) -> None:
        """Blocking. Raises OSError."""
        ...

    def close(self) -> None:
        """Free the connection: after the mount was taken down, and never while ``send`` runs."""
        ...
