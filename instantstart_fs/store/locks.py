"""The locks of a store: one daemon (``lock``), and the fetch workers that may outlive it for a moment
(``workers.lock``); and whether another process uses one of its files.

They are flock(2) locks: they end with the last descriptor of their open file, so a killed process never leaves one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import time

from instantstart_fs.errors import StoreLocked
from instantstart_fs.store.layout import FILE_MODE
from instantstart_fs.store.os_errors import translated

_LIBC = ctypes.PyDLL(None, use_errno=True)
"""Keeps the interpreter lock."""
_POLL = 0.02
"""Seconds between two tries: flock has no time-out."""


def _open(path: str) -> int:
    with translated(f"open {path}"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_store(path: str, root: str) -> int:
    """Lock the store for this process; the descriptor that holds the lock. Raises StoreLocked at once if it is
    taken."""
    fd = _open(path)
    try:
        with translated(f"lock {path}"):
            if not _try(fd, fcntl.LOCK_EX):
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                who = f"pid {holder}" if holder.isdigit() else "another process"
                raise StoreLocked(
                    f"the store {root} is in use by {who}: one daemon per store; "
                    "stop that one, or give this one another store"
                )
            note = f"{os.getpid()}\n".encode()
            # Over the old one, in its block: on a full disk there is no other, and the note is a courtesy.
            with contextlib.suppress(OSError):
                os.pwrite(fd, note, 0)
                os.ftruncate(fd, len(note))
    except BaseException:
        os.close(fd)
        raise
    return fd


def wait_for_workers(path: str, root: str, deadline: float) -> None:
    """Wait until no worker of an earlier daemon is left. Raises StoreLocked after ``deadline`` seconds."""
    fd = _open(path)
    try:
        limit = time.monotonic() + deadline
        with translated(f"lock {path}"):
            while not _try(fd, fcntl.LOCK_EX):
                if time.monotonic() >= limit:
                    raise StoreLocked(
                        f"fetch workers of an earlier daemon still hold the store {root} after {deadline:g} s; "
                        f"see who they are with `fuser -v {path}` and kill them"
                    )
                time.sleep(_POLL)
    finally:
        os.close(fd)


def share_with_worker(path: str) -> int:
    """A fresh descriptor that holds ``workers.lock`` shared, for one worker to inherit."""
    fd = _open(path)
    try:
        with translated(f"lock {path}"):
            fcntl.flock(fd, fcntl.LOCK_SH)
    except BaseException:
        os.close(fd)
        raise
    return fd


def used_elsewhere(fd: int) -> bool:
    """Whether the file is open or mapped through another open file description than that of ``fd`` (duplicates share
    it), in any mount: the kernel then grants no write lease. False where the filesystem or our rights (CAP_LEASE for
    others' files) allow no lease."""
    # An open that meets the lease raises a signal: SIGIO, the default, would end this process.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    # That open waits, or fails with O_NONBLOCK (tar): so the two calls follow each other at once. fcntl.fcntl would let
    # other threads run in between, for milliseconds.
    if _LIBC.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK) != 0:
        return ctypes.get_errno() == errno.EAGAIN
    _LIBC.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
