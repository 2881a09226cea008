"""Translates OSError into StoreError, where errors of the filesystem enter. Callers decide about retries."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from instantstart_fs.errors import (
    OutOfMemory,
    OutOfResources,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLost,
    StoreReadOnly,
)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EBUSY})


def passing(number: int | None) -> bool:
    """Whether an errno is a passing shortage (space, descriptors, memory, a signal) and says nothing about the file
    that it was met at. The one list of these."""
    return number in _FULL or number in _OUT_OF or number == errno.ENOMEM


def translate(error: OSError, what: str) -> StoreError:
    """The StoreError for ``error``, raised by ``what`` ("write models/a.bin", say)."""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC:
            return StoreFull(f"{what}: no space is left on the store's filesystem")
        case errno.EDQUOT:
            return StoreFull(f"{what}: the disk quota of the store is used up")
        case errno.EFBIG:
            return StoreFull(f"{what}: the file is larger than the store's filesystem or a limit (ulimit -f) allows")
        case errno.EMFILE:
            return OutOfResources(f"{what}: this process has no descriptor left; raise LimitNOFILE= (ulimit -n)")
        case errno.ENFILE:
            return OutOfResources(f"{what}: the machine has no descriptor left; raise fs.file-max")
        case errno.ENOMEM:
            return OutOfMemory(f"{what}: the kernel has no memory for it")
        case number if number in _OUT_OF:
            return OutOfResources(f"{what}: {reason}; try again")
        case errno.EROFS:
            return StoreReadOnly(f"{what}: the store's filesystem is mounted read-only")
        case errno.EIO:
            return StoreDamaged(f"{what}: the disk reported an I/O error; look into the kernel's log")
        case errno.EUCLEAN:
            return StoreDamaged(f"{what}: the store's filesystem is corrupted; check it with its fsck")
        case errno.ELOOP | errno.ENOTDIR | errno.EISDIR | errno.ENXIO | errno.ENODEV:
            return StoreLost(f"{what}: something that the daemon did not put there lies in the store ({reason})")
        case errno.EACCES | errno.EPERM:
            return StoreError(f"{what}: {reason}; the daemon needs to own the store")
        case _:
            return StoreError(f"{what}: {reason}")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise an OSError of the block as a StoreError that names ``what`` was done."""
    try:
        yield
    except OSError as error:
        raise translate(error, what) from error
