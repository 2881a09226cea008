"""HighWater: the file beside the index that keeps nodeids from being reused when the index is lost. It does not
allocate them: the index does.

It contains one number: every nodeid ever used is below it. It is raised in steps, before the first nodeid of a step is
used (tmp, fsync, rename, fsync directory), so that a reservation rarely writes it and a lost index wastes at most one
step.
"""

from __future__ import annotations

import contextlib
import errno
import os

from instantstart_fs.errors import StoreDamaged, StoreError, StoreFull, StoreReadOnly
from instantstart_fs.index.schema import FIRST_NODEID

STEP = 1 << 20


def os_error(error: OSError, what: str) -> StoreError:
    """The StoreError for an OSError of the index, which does not import the store."""
    reason = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(reason)
    if error.errno == errno.EROFS:
        return StoreReadOnly(reason)
    if error.errno == errno.EIO:
        return StoreDamaged(reason)
    return StoreError(reason)


class HighWater:
    """The number in the file. After ``load`` only the writer thread uses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._value = 0

    def load(self, *, index_is_new: bool) -> None:
        """Read the file. Raises StoreDamaged if it is unreadable and the index is new."""
        try:
            with open(self.path, "rb") as file:
                self._value = int(file.read(32))
        except FileNotFoundError:
            return
        except ValueError:
            if index_is_new:
                raise StoreDamaged(
                    f"{self.path} cannot be read and the index is new, so nodeids could be given twice; "
                    "write a number into it that is larger than any nodeid seen (2000000000000, say)"
                ) from None
            self._value = 0
        except OSError as error:
            raise os_error(error, f"read {self.path}") from error

    def set(self, value: int) -> None:
        """Count nodeids below ``value`` as used from now on. Raises StoreError."""
        self._raise_to(value)

    def take(self, counter: int | None, count: int) -> int:
        """Take ``count`` nodeids; the first one. ``counter``: the index's next free one; None in a new index."""
        first = max(self._value, FIRST_NODEID) if counter is None else counter
        if first + count > self._value:
            self._raise_to(first + count + STEP)
        return first

    def _raise_to(self, value: int) -> None:
        temporary = self.path + ".tmp"
        directory = os.path.dirname(self.path)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(b"%d\n" % value)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self.path)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise os_error(error, f"write {self.path}") from error
        self._value = value
