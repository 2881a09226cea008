"""When to kill: a process is watched through /proc (what its threads are inside of), with no hook in the product.

``wait_stage`` returns at a moment of that stage:

    transfer    bytes arrive: so many seconds after the first chunk is in the store
    datasync    a thread is inside fdatasync of a blob: the bytes of a group commit
    index       a thread is inside LMDB's own sync: the transaction of a group commit
    seal        a thread is inside fsync of a blob or of its directory: a file is being sealed
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FDATASYNC, FSYNC, MSYNC = 75, 74, 26
"""x86-64 system call numbers; tests/crash skips elsewhere."""
SYNCS = {str(number).encode(): number for number in (FDATASYNC, FSYNC, MSYNC)}

PAUSE = 0.0001
"""Seconds between two looks. A sync may take a few of these on a quick disk; without a pause a look takes a whole core
from the daemon."""
LOOKS = 100
"""After so many looks the process's threads are listed anew."""

STAGES = ("transfer", "datasync", "index", "seal")


class Threads:
    """What each thread of a process is inside of. Its descriptors stay open: to open each file of /proc for each look
    takes longer than a sync of the index on a quick disk, which then is never seen."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._open: dict[str, int] = {}
        self._looks = 0

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def calls(self) -> Iterator[tuple[int, int]]:
        """The system call that each waiting thread is inside of, and its first argument."""
        if self._looks % LOOKS == 0:
            self._list()
        self._looks += 1
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):  # a thread that has ended
                words = os.pread(descriptor, 200, 0).split()
                if words and words[0] in SYNCS:
                    yield SYNCS[words[0]], int(words[1], 16)

    def _list(self) -> None:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{self._pid}/task"):
                if task not in self._open:
                    with contextlib.suppress(OSError):
                        self._open[task] = os.open(f"/proc/{self._pid}/task/{task}/syscall", os.O_RDONLY)


def stage_of(pid: int, threads: Threads, slots: str, index: str) -> str | None:
    """Which commit stage one of the process's threads is inside of, at this instant."""
    for number, argument in threads.calls():
        if number == MSYNC:
            return "index"
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{argument}")
            if target.startswith(index):
                return "index"
            if target.startswith(slots):
                return "datasync" if number == FDATASYNC else "seal"
    return None


def wait_stage(pid: int, store: Path, stage: str, over: Callable[[], bool], deadline: float) -> bool:
    """Return True at an instant of ``stage``; False once ``over()`` (asked each second) or after ``deadline``
    seconds."""
    slots, index = str(store / "slots"), str(store / "index")
    begun = asked = time.monotonic()
    with Threads(pid) as threads:
        while (now := time.monotonic()) - begun < deadline:
            if stage_of(pid, threads, slots, index) == stage:
                return True
            if now - asked >= 1:
                if over():
                    return False
                asked = time.monotonic()
            time.sleep(PAUSE)
    return False
