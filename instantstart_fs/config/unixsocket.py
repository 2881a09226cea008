"""Listens on unix sockets at a path, and tells who is at the other end of a connection.

A dead process's socket file is replaced; a living one's is not. The control socket and the prefetch helper's holds use
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import time
from typing import NamedTuple, Protocol

from instantstart_fs.config.directories import make_directory

SO_PEERGROUPS = 59
"""The socket option's number in asm-generic/socket.h. Python's socket module does not name it."""
MAX_PATH = 107
"""The longest path of a unix socket, in bytes: sun_path with its NUL has one more."""
PROBE_SECONDS = 1.0
_TIMEVAL = struct.Struct("@ll")


class Connection(Protocol):
    """The methods that both socket.socket and trio's socket have."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


class Peer(NamedTuple):
    """The process at the other end of a connection, as the kernel names it."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: Connection) -> Peer:
    """Credentials of the other end at the time it connected."""
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = {gid}
    with contextlib.suppress(OSError):  # a user in more than 256 groups: the primary one has to do
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        groups.update(struct.unpack(f"{len(raw) // 4}I", raw))
    return Peer(pid, uid, frozenset(groups))


def listen(path: str, *, mode: int, directory_mode: int, backlog: int) -> socket.socket:
    """A listening socket at ``path``, which nobody can reach before it has ``mode``; ``directory_mode``: of its
    directory, where that has to be made. A dead one's file is replaced. Blocks for a moment only: everything is local.

    Raises OSError: EADDRINUSE where somebody answers, ENOTSOCK where something else lies, ENAMETOOLONG.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
    make_directory(os.path.dirname(path), directory_mode)
    _remove_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), mode)  # what bind(2) makes has this, less the umask
        listener.bind(path)
        os.chmod(path, mode)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(connection: socket.socket, path: str, deadline: float) -> None:
    """Connect to ``path``; while its backlog is full, wait in the kernel's queue, for ``deadline`` seconds at most.

    A socket with Python's own timeout does not block, and a full backlog then is EAGAIN at once. The socket has no
    timeout afterwards. Raises OSError; TimeoutError for a backlog that stayed full: somebody listens, and is busy.
    """
    connection.settimeout(None)
    end = time.monotonic() + deadline
    try:
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)
            whole = int(left)
            microseconds = max(int((left - whole) * 1e6), 1)  # 0 would be no limit at all
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(whole, microseconds))
            with contextlib.suppress(BlockingIOError):
                connection.connect(path)
            try:
                connection.getpeername()
            except OSError as error:
                # Timed out, or a signal came while it waited: Python takes that for a connection under way.
                if error.errno != errno.ENOTCONN:
                    raise
            else:
                return
    finally:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))


def _remove_dead(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
    except FileNotFoundError:
        return
    if answers(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def answers(path: str) -> bool:
    """Whether somebody listens there. Blocks for PROBE_SECONDS at most."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass  # a full backlog is a living one too
    return True
