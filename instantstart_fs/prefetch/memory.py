"""Makes and maps the memory of a file that is staged to the CPU: a memfd, which another process can take uncopied."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import sys

from instantstart_fs.config.descriptors import NO_MORE
from instantstart_fs.config.memory import read_memory
from instantstart_fs.errors import InstantStartError, OutOfBudget, PrefetchError

HUGE = 2 * 1024 * 1024
SHARE = 0.9
"""The share of the memory that the machine, or the tightest enclosing cgroup, has left: the most that weights may take
unless the user says otherwise."""


def allocate(name: str, size: int) -> int:
    """Make a memfd of ``size`` bytes, rounded up so that a reader may write whole blocks; its length is sealed. It
    takes memory only as it is written. The caller closes it. Raises OutOfBudget, PrefetchError."""
    try:
        fd = os.memfd_create(f"instantstart:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _refusal(error, f"{name}: no memory for {size} bytes") from error
    try:
        os.ftruncate(fd, max(rounded(size), HUGE))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise OutOfBudget(f"{name}: no memory for {size} bytes: {error.strerror}") from error
    return fd


def rounded(size: int) -> int:
    return -(-size // HUGE) * HUGE


class Memfd:
    """A memfd that is closed with its last reference: a reader may be inside a call when its file is released."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def fill(self, start: int, end: int) -> None:
        """Give that part its pages before something is read into it: in one call, for a fifth less of processor time
        than by a fault for each page, and what cannot be had is said, not signalled. Raises OutOfBudget."""
        try:
            os.posix_fallocate(self._fd, start, end - start)
        except OSError as error:
            raise OutOfBudget(f"no memory for {end - start} bytes more: {error.strerror}") from error


def mapped(fd: int) -> mmap.mmap:
    """The whole of a memfd, shared and writable. Raises OutOfBudget, PrefetchError."""
    size = os.fstat(fd).st_size
    try:
        if sys.version_info >= (3, 13):
            memory = mmap.mmap(fd, size, trackfd=False)  # otherwise a descriptor more for as long as it is mapped
        else:
            memory = mmap.mmap(fd, size)
    except OSError as error:
        raise _refusal(error, f"no space for {size} bytes in this process") from error
    with contextlib.suppress(OSError):  # only where shmem_enabled allows it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _refusal(error: OSError, what: str) -> InstantStartError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return PrefetchError(NO_MORE)
    return OutOfBudget(f"{what}: {error.strerror}")


def available(root: str = "/") -> int:
    """Bytes that may be taken: SHARE of MemAvailable, and of what every enclosing memory cgroup has left. All of the
    page cache counts as free there, as it does in MemAvailable: the kernel gives it up for what is written to."""
    found = read_memory(root, active=True)
    return int(min((found.available, *found.cgroups_left)) * SHARE)
