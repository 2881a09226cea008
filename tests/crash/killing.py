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
from pathlib import Path

FDATASYNC, FSYNC, MSYNC = 75, 74, 26
"""x86-64 system call numbers; tests/crash skips elsewhere."""

PAUSE = 0.0005
"""Seconds between two looks: a sync takes longer, and to look without a pause takes a whole core from the daemon."""

STAGES = ("transfer", "datasync", "index", "seal")


def stage_of(pid: int, slots: str, index: str) -> str | None:
    """Which commit stage one of the process's threads is inside of, at this instant."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()
                if words[0] not in ("75", "74", "26"):
                    continue
                number = int(words[0])
                target = "" if number == MSYNC else os.readlink(f"/proc/{pid}/fd/{int(words[1], 16)}")
                if number == MSYNC or target.startswith(index):
                    return "index"
                if target.startswith(slots):
                    return "datasync" if number == FDATASYNC else "seal"
    return None


def wait_stage(pid: int, store: Path, stage: str, deadline: float) -> bool:
    """Return True at an instant of ``stage``; False after ``deadline`` seconds."""
    slots, index = str(store / "slots"), str(store / "index")
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        if stage_of(pid, slots, index) == stage:
            return True
        time.sleep(PAUSE)
    return False
