"""Which processes hold a file of the mount open or mapped: for the log, when wrong bytes were served."""

from __future__ import annotations

import os

_UNHASHED = " (deleted)"
"""What the kernel adds to the path of an open file whose name has been invalidated."""


def processes_holding(suffix: str) -> list[str]:
    """ "pid (name)" of every process that has a file whose path ends in ``suffix`` open or mapped.

    Reads /proc; what may not be read, or ends meanwhile, is left out.
    """
    return [f"{pid} ({_name(pid)})" for pid in os.listdir("/proc") if pid.isdigit() and _holds(pid, suffix)]


def _holds(pid: str, suffix: str) -> bool:
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(_UNHASHED).endswith(suffix):
                    return True
            except OSError:
                continue
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            return any(line.rstrip("\n").removesuffix(_UNHASHED).endswith(suffix) for line in maps)
    except OSError:
        return False


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return "?"
