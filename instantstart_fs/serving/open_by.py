"""Finds the processes that have a pipeline's files open or mapped, by /proc, as lsof does.

It is for the log when wrong bytes were served, and for refusals of an eviction. Files are found by name and inode
number: a container sees the mount at another path, and a bound file, or one that `prefetch` got, is the store's own.
Processes that may not be looked at, or end meanwhile, are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

_UNHASHED = " (deleted)"
"""The suffix that the kernel adds to the path of an open file whose name has been invalidated."""
SHOWN = 5


class UsingProcess(NamedTuple):
    """A process, as this daemon's /proc shows it. ``uid``: its effective one, -1 if that cannot be seen."""

    pid: int
    uid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}, uid {self.uid})" if self.pid else f"uid {self.uid}, elsewhere"


def known(pid: int, uid: int | None = None) -> UsingProcess:
    """Return the process ``pid``, with what /proc says of it. ``pid``: 0 if this /proc does not show it. ``uid``: the
    owner, if it is known already."""
    return UsingProcess(pid, _uid(str(pid)) if uid is None else uid, _name(str(pid)) if pid else "?")


def listed(processes: Sequence[UsingProcess]) -> str:
    """Return a list for a message: the first ones, and how many more."""
    shown = ", ".join(str(holder) for holder in processes[:SHOWN])
    more = len(processes) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def processes_holding(suffix: str) -> list[str]:
    """Return "pid (name)" of every process that has a file whose path ends in ``suffix`` open or mapped."""
    found = _processes(lambda path, _: path.endswith(suffix))
    return [f"{holder.pid} ({holder.command})" for holder in found]


def processes_using(files: Mapping[str, Collection[int]]) -> list[UsingProcess]:
    """Return the processes, other than this one and its children, that have one of these files open or mapped.

    ``files``: the last component of each name → its inode numbers."""

    def wanted(path: str, inode: Callable[[], int | None]) -> bool:
        inodes = files.get(path.rpartition("/")[2])
        return inodes is not None and inode() in inodes

    return [holder for holder in _processes(wanted) if os.getpid() not in (holder.pid, _parent(str(holder.pid)))]


def _processes(wanted: Callable[[str, Callable[[], int | None]], bool]) -> list[UsingProcess]:
    pids = sorted((entry for entry in os.listdir("/proc") if entry.isdigit()), key=int)
    return [known(int(pid)) for pid in pids if _holds(pid, wanted)]


def _holds(pid: str, wanted: Callable[[str, Callable[[], int | None]], bool]) -> bool:
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                path = os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(_UNHASHED)
            except OSError:
                continue
            if wanted(path, lambda number=descriptor: _inode(pid, number)):  # type: ignore[misc]
                return True
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(None, 5)
                if len(fields) == 6:
                    path = fields[5].removesuffix(_UNHASHED)
                    if wanted(path, lambda inode=fields[4]: int(inode)):  # type: ignore[misc]
                        return True
    except OSError:
        return False
    return False


def _inode(pid: str, descriptor: str) -> int | None:
    """Return the inode number from /proc, without a call to the filesystem, which may be the one that hangs."""
    try:
        with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("ino:"):
                    return int(line[4:])
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_ino  # before Linux 5.14
    except (OSError, ValueError):
        return None


def _uid(pid: str) -> int:
    """The effective one."""
    return next((int(value) for value in _status(pid, "Uid")[1:2]), -1)


def _parent(pid: str) -> int:
    return next((int(value) for value in _status(pid, "PPid")), -1)


def _status(pid: str, key: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
            return next((line.split()[1:] for line in lines if line.startswith(f"{key}:")), [])
    except OSError:
        return []


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return "?"
