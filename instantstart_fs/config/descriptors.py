"""Limits the file descriptors that others may hold, so that the daemon keeps some for its own work.

The kernel hands out the lowest free number, so a new descriptor's number tells at no cost how many are taken. The last
``reserve()`` numbers are kept. A file that a reader has open or that is being filled may not have one of them, and a
client's connection may not have one of their second half. So the daemon can read a manifest, start a worker and answer
a connection however many shards an engine holds open. A refusal comes at open, with a message. Reading ahead
(``spare``) only makes things faster; it leaves half of what may be held to readers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

NO_MORE = "this process may not open more files (ulimit -n)"
MOST_RESERVED = 512


def raise_file_limit() -> None:
    """The soft limit to the hard one: the usual 1024 is too few for a descriptor of each file and chunk in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """Return how many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def reserve() -> int:
    """Return how many descriptors are kept for the daemon's own work: a quarter, of a large limit MOST_RESERVED."""
    return min(limit() // 4, MOST_RESERVED)


def may_be_held(fd: int, *, spare: bool = False) -> bool:
    """Whether a new descriptor may be held for somebody else."""
    return fd < (limit() - reserve()) // (2 if spare else 1)


def may_hold_another(*, spare: bool = False) -> bool:
    """Whether one more descriptor may be held for somebody else."""
    try:
        fd = os.dup(0)
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    os.close(fd)
    return may_be_held(fd, spare=spare)


def may_connect(fd: int) -> bool:
    """Whether a new descriptor may be a client's connection."""
    return fd < limit() - reserve() // 2


def held(fd: int, *, spare: bool = False) -> int:
    """Return ``fd`` if it may be held. Otherwise close it and raise OSError (EMFILE)."""
    if may_be_held(fd, spare=spare):
        return fd
    os.close(fd)
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
