"""Registers the store's files with the kernel for FUSE passthrough, and unregisters them (backing ids).

Which file is passed through is decided in vfs.OpenFile.backing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import tempfile
from typing import IO

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import wire
from instantstart_fs.mount.handover import BACKING, HandleTable, Row
from instantstart_fs.store.layout import Layout
from instantstart_fs.store.os_errors import passing

log = logging.getLogger(__name__)


class PassthroughRefused(MountFailed):
    """This machine cannot pass reads through. The message says why. Nothing was served."""


class BackingIds:
    """The backing ids of the connection ``fd``: one for each nodeid that is open, or was and may soon be again."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ids: dict[int, tuple[int, int]] = {}
        self.table: HandleTable | None = None
        """Has a row for each of them."""

    def acquire(self, nodeid: int, backing: int) -> int:
        """The nodeid's backing id, with one use more. Raises OSError."""
        known = self._ids.get(nodeid)
        if known is None:
            known = self.register(backing), 0
            if self.table is not None:
                self.table.add(Row(BACKING | nodeid, nodeid, 0, known[0]))
        identifier, uses = known
        self._ids[nodeid] = (identifier, uses + 1)
        return identifier

    def release(self, nodeid: int) -> None:
        """Count one use less. The id stays registered until ``forget``."""
        identifier, uses = self._ids[nodeid]
        self._ids[nodeid] = (identifier, uses - 1)

    def forget(self, nodeid: int) -> None:
        """Unregister the id of a nodeid that nobody has open, since its descriptor is about to be closed."""
        known = self._ids.get(nodeid)
        if known is None:
            return
        identifier, uses = known
        if uses:
            log.error("a backing file is being closed that the kernel has open %d times", uses)
            return
        del self._ids[nodeid]
        try:
            self.unregister(identifier)
        except OSError as error:
            log.warning("the kernel did not release a backing file: %s", error)
        if self.table is not None:
            self.table.remove(BACKING | nodeid)

    def restore(self, nodeid: int, identifier: int, *, uses: int) -> None:
        """Take over an id that an earlier daemon registered, with so many uses more."""
        self._ids[nodeid] = (identifier, self._ids.get(nodeid, (0, 0))[1] + uses)

    def uses(self, nodeid: int) -> int:
        return self._ids.get(nodeid, (0, 0))[1]

    def forget_unused(self) -> None:
        """Forget every nodeid that nobody has open."""
        for nodeid in [nodeid for nodeid, (_, uses) in self._ids.items() if not uses]:
            self.forget(nodeid)

    def register(self, backing: int) -> int:
        """The new id of the file behind the descriptor ``backing``. Raises OSError."""
        message = bytearray(wire.BACKING_MAP.pack(backing, 0, 0))
        identifier: int = fcntl.ioctl(self._fd, wire.BACKING_OPEN, message, True)
        return identifier

    def unregister(self, identifier: int) -> None:
        """Give a backing id back to the kernel. Raises OSError."""
        fcntl.ioctl(self._fd, wire.BACKING_CLOSE, struct.pack("=I", identifier))

    def __len__(self) -> int:
        return len(self._ids)

    def probe(self, store: str) -> None:
        """Register and unregister a file of the store. Raises PassthroughRefused where the kernel will not have it."""
        try:
            with _probe_file(store) as file:
                self.unregister(self.register(file.fileno()))
        except OSError as error:
            if passing(error.errno):
                # For life, the slow way, because of a moment's want? The kernel and the rights are there: it is tried.
                log.warning("FUSE passthrough to %s cannot be tried now (%s): it is taken for granted", store, error)
                return
            if error.errno == errno.EPERM:
                reason = "the kernel wants CAP_SYS_ADMIN of the first user namespace for FUSE passthrough"
            elif error.errno in (errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL):
                reason = f"the filesystem of {store} does not take FUSE passthrough (a stacked filesystem?)"
            else:
                reason = f"FUSE passthrough to {store}: {error.strerror}"
            raise PassthroughRefused(reason) from error


def _probe_file(store: str) -> IO[bytes]:
    """Open a file on the store's filesystem: its lock, which exists on a full disk too. Raises OSError."""
    try:
        return open(os.open(Layout(store).lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        return tempfile.TemporaryFile(dir=store)
