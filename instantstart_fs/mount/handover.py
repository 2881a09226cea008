"""Keeps a mount alive over a restart: the /dev/fuse descriptor and the table of handles that the next daemon takes
over.

Both lie in a supervisor's descriptor store (systemd's; FdStore). While no daemon runs, the kernel queues requests; the
next daemon verifies that the descriptor is that of the mount it is to serve, restores the handles, asks the kernel to
send again what was in flight (FUSE_NOTIFY_RESEND) and answers. docs/decisions/restart.md has the reasons.

The table is a memory file of fixed rows, one for each handle that the kernel holds: handle, nodeid, the serial of the
OPEN that made it, backing id. A row is complete before its OPEN is answered, and goes after its backing id was closed,
so that a SIGKILL at any instruction leaves a table that is right: the kernel sends an unanswered OPEN or RELEASE again,
which finds its row or finds it gone. Plain stores into shared memory, since they are in the path of every open.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, Protocol, Self

import msgspec

from instantstart_fs import __version__
from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel, wire
from instantstart_fs.system import mountinfo

log = logging.getLogger(__name__)

MOUNT_NAME: Final = "instantstart-mount"
TABLE_NAME: Final = "instantstart-handles"
"""Name of the two descriptors in systemd's descriptor store (FDNAME)."""

FORMAT: Final = 1
"""Version of the table. Another one is refused: the mount is made again, which its readers see as an error."""
MAGIC: Final = b"ISFS-HND"
_HEAD: Final = struct.Struct("=8sIIQ")
"""magic, format, length of the terms, epoch"""
_EPOCH: Final = struct.Struct("=Q")
_EPOCH_AT: Final = 16
_TERMS_AT: Final = _HEAD.size
_HEADER: Final = 8192
"""Bytes before the first row: enough for a mountpoint of 4095 bytes."""
_ROW: Final = struct.Struct("=QQQq")
"""handle (0: a free row), nodeid, serial of the OPEN, backing id (0: none)"""
_BODY: Final = struct.Struct("=QQq")
_FIRST_ROWS: Final = 4096
BACKING: Final = 1 << 63
"""Marks the row of a registered backing id: it takes the place of a handle, beside the nodeid."""
EPOCH_SHIFT: Final = 40
"""Handles of one daemon begin at epoch << 40: none is ever given twice in the life of a mount."""


class FdStore(Protocol):
    """Keeps descriptors while no daemon runs."""

    def store(self, name: str, fd: int) -> None: ...

    def remove(self, name: str) -> None: ...


class HandoverRefused(MountFailed):
    """The live mount cannot be taken over; the message says why."""


class Terms(msgspec.Struct, frozen=True):
    """The agreement with the kernel when the mount was made. ``device``: of the mount, "major:minor"."""

    path: str
    device: str
    minor: int
    flags: int
    version: str = __version__


class Row(NamedTuple):
    fh: int
    nodeid: int
    serial: int
    backing_id: int


class HandleTable:
    """See the module. ``fd`` is the memory file's descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self._places: dict[int, int] = {}
        self._free: list[int] = []

    @classmethod
    def create(cls, terms: Terms) -> Self:
        """Make an empty table. Raises OSError."""
        encoded = msgspec.json.encode(terms)
        fd = os.memfd_create("instantstart-handles", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, _HEADER + _FIRST_ROWS * _ROW.size)
            table = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        table._map[_TERMS_AT : _TERMS_AT + len(encoded)] = encoded
        _HEAD.pack_into(table._map, 0, MAGIC, FORMAT, len(encoded), 1)
        table._free = list(range(_HEADER + (_FIRST_ROWS - 1) * _ROW.size, _HEADER - 1, -_ROW.size))
        return table

    @classmethod
    def open(cls, fd: int) -> Self:
        """The table of the daemon before. Owns ``fd`` from then on. Raises HandoverRefused."""
        try:
            if os.fstat(fd).st_size < _HEADER:
                raise HandoverRefused("its table of open files is cut short")
            table = cls(fd)
        except OSError as error:
            raise HandoverRefused(f"its table of open files cannot be read: {error.strerror}") from error
        magic, form, _, _ = _HEAD.unpack_from(table._map)
        if magic != MAGIC:
            table._map.close()
            raise HandoverRefused("its table of open files is not complete")
        if form != FORMAT:
            table._map.close()
            raise HandoverRefused(f"its table of open files has format {form}, and this version reads format {FORMAT}")
        for row, place in table._rows():
            if row.fh:
                table._places[row.fh] = place
            else:
                table._free.append(place)
        return table

    @property
    def terms(self) -> Terms:
        """Return the terms that the table was made under. Raises HandoverRefused."""
        _, _, length, _ = _HEAD.unpack_from(self._map)
        try:
            return msgspec.json.decode(self._map[_TERMS_AT : _TERMS_AT + length], type=Terms)
        except msgspec.MsgspecError as error:
            raise HandoverRefused(f"its table of open files cannot be read: {error}") from error

    @property
    def epoch(self) -> int:
        return int(_EPOCH.unpack_from(self._map, _EPOCH_AT)[0])

    def begin_epoch(self) -> int:
        """Count one more daemon; its epoch."""
        _EPOCH.pack_into(self._map, _EPOCH_AT, self.epoch + 1)
        return self.epoch

    def handles(self) -> list[Row]:
        """Return a row for each open handle."""
        return [row for row, _ in self._rows() if row.fh and not row.fh & BACKING]

    def backings(self) -> list[Row]:
        """Return a row for each registered backing id. It outlives the last handle of its file."""
        return [row for row, _ in self._rows() if row.fh & BACKING]

    def _rows(self) -> Iterator[tuple[Row, int]]:
        for place in range(_HEADER, len(self._map) - _ROW.size + 1, _ROW.size):
            yield Row(*_ROW.unpack_from(self._map, place)), place

    def add(self, row: Row) -> None:
        if not self._free and not self._grow():
            return
        place = self._free.pop()
        # The handle last: a row counts from then on.
        _BODY.pack_into(self._map, place + 8, row.nodeid, row.serial, row.backing_id)
        _EPOCH.pack_into(self._map, place, row.fh)
        self._places[row.fh] = place

    def remove(self, fh: int) -> None:
        place = self._places.pop(fh, None)
        if place is not None:
            _EPOCH.pack_into(self._map, place, 0)
            self._free.append(place)

    def _grow(self) -> bool:
        size = len(self._map)
        try:
            os.posix_fallocate(self.fd, size, size)
            self._map.resize(2 * size)
        except OSError as error:
            # An incomplete table is worse than none.
            self.spoil()
            log.error("the table of open files cannot grow (%s): the next restart will unmount", error.strerror)
            return False
        end = size + (2 * size - size) // _ROW.size * _ROW.size
        first = _HEADER + -(-(size - _HEADER) // _ROW.size) * _ROW.size
        self._free = [place for place in range(first, end, _ROW.size) if place + _ROW.size <= 2 * size]
        return bool(self._free)

    def spoil(self) -> None:
        """Make the table unusable for the next daemon."""
        self._map[: len(MAGIC)] = bytes(len(MAGIC))

    def close(self) -> None:
        """Close this process's descriptor; the copy in the supervisor's store lives on."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class Inherited:
    """The mount of the daemon before. ``table`` None: it cannot be taken over, ``reason`` says why."""

    def __init__(self, fd: int, table: HandleTable | None, reason: str) -> None:
        self.fd = fd
        self.table = table
        self.reason = reason

    @classmethod
    def receive(cls, descriptors: Mapping[str, int]) -> Inherited | None:
        """The mount among the descriptors that the supervisor handed back, by name; None if there is none. Owns what it
        uses."""
        fd, table_fd = descriptors.get(MOUNT_NAME, -1), descriptors.get(TABLE_NAME, -1)
        if fd < 0:
            if table_fd >= 0:
                os.close(table_fd)
            return None
        if table_fd < 0:
            return cls(fd, None, "its table of open files is not there")
        try:
            return cls(fd, HandleTable.open(table_fd), "")
        except HandoverRefused as error:
            os.close(table_fd)
            return cls(fd, None, error.message)

    @property
    def held(self) -> list[int]:
        """The nodeids that the kernel holds open, one for each handle."""
        return [row.nodeid for row in self.table.handles()] if self.table is not None else []

    def why_not(self, path: str, subtype: str) -> str | None:
        """Return the reason why the inherited connection cannot be served as the mount at ``path``; None if it can.
        Never touches the mount."""
        if self.table is None:
            return self.reason
        try:
            terms = self.table.terms
        except HandoverRefused as error:
            return error.message
        poll = select.poll()
        poll.register(self.fd, 0)
        if poll.poll(0):
            return "it was unmounted or aborted meanwhile"
        if terms.path != path:
            return f"it lies at {terms.path}, and the mountpoint is now {path}"
        mount = mountinfo.find_mount(path)
        if mount is None or mount.filesystem != f"fuse.{subtype}" or mount.device != terms.device:
            return f"what is mounted at {path} is another filesystem"
        if terms.minor > wire.MINOR or terms.flags & ~wire.WANTED:
            return f"instantstart {terms.version} agreed with the kernel on what this version does not know"
        return None

    def discard(self, subtype: str, store: FdStore | None) -> None:
        """End that mount: its readers get an error and not a wait without end. Blocking. Raises MountFailed."""
        for name in (MOUNT_NAME, TABLE_NAME):
            if store is not None:
                store.remove(name)
        if self.table is not None:
            with contextlib.suppress(HandoverRefused):
                terms = self.table.terms
                mount = mountinfo.find_mount(terms.path)
                if mount is not None and mount.device == terms.device and mount.filesystem == f"fuse.{subtype}":
                    kernel.abort_mount(terms.path)
                    kernel.umount_lazily(terms.path)
            self.table.close()
        # Without terms nobody knows whose mount that is; the connection ends with its last descriptor, and leaves a
        # stale mount to be cleared.
        os.close(self.fd)


class Handover:
    """A session's part in a restart: ``store`` keeps things for the next daemon, ``inherited`` came from the one
    before."""

    def __init__(self, store: FdStore | None = None, inherited: Inherited | None = None) -> None:
        self.store = store
        self.inherited = inherited

    def take(self) -> Inherited | None:
        """The inherited mount; None when it was taken already."""
        inherited, self.inherited = self.inherited, None
        return inherited
