"""The memory of a file that is staged to the CPU: a memfd, so that it can be handed to another process uncopied."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from instantstart_fs.errors import PrefetchError

HUGE = 2 * 1024 * 1024
SHARE = 0.9
"""Of what the machine, or the tightest enclosing cgroup, has left: the most that weights may take unless told."""


def allocate(name: str, size: int) -> int:
    """A memfd of ``size`` bytes, rounded up so that a reader may write whole blocks; its length is sealed. It takes
    memory only as it is written. The caller closes it."""
    fd = os.memfd_create(f"instantstart:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(rounded(size), HUGE))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise PrefetchError(f"{name}: no memory for {size} bytes: {error.strerror}") from error
    return fd


def rounded(size: int) -> int:
    return -(-size // HUGE) * HUGE


def mapped(fd: int) -> mmap.mmap:
    """The whole of a memfd, shared and writable."""
    memory = mmap.mmap(fd, os.fstat(fd).st_size)
    with contextlib.suppress(OSError):  # only where shmem_enabled allows it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def available() -> int:
    """Bytes that may be taken: SHARE of MemAvailable and of what every enclosing cgroup v2 has left."""
    found = _meminfo("MemAvailable")
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            own = next((line.strip().partition("::")[2] for line in file if line.startswith("0::")), "")
        while own:
            found = min(found, _left(f"/sys/fs/cgroup{own}"))
            own = own.rpartition("/")[0]
    return int(found * SHARE)


def _left(group: str) -> int:
    """What this cgroup may still take; the page cache that it holds can be given up."""
    try:
        with open(f"{group}/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit == "max":
            return 1 << 62
        with open(f"{group}/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open(f"{group}/memory.stat", encoding="ascii") as file:
            cache = sum(int(line.split()[1]) for line in file if line.startswith(("inactive_file ", "active_file ")))
        return max(0, int(limit) - used + cache)
    except (OSError, ValueError):
        return 1 << 62


def _meminfo(name: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
