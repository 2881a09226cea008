"""The control socket itself: made with its directory, taken over from the dead, never from the living; and who is at
the other end of a connection, as the kernel says."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
from typing import NamedTuple

import trio

from instantstart_fs.errors import ControlError

log = logging.getLogger(__name__)

SO_PEERGROUPS = 59
"""From asm-generic/socket.h; Python's socket module does not name it."""


class Peer(NamedTuple):
    """Who connected, as the kernel says."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: socket.socket | trio.socket.SocketType) -> Peer:
    """Credentials of the other end at the time it connected."""
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = {gid}
    with contextlib.suppress(OSError):  # a user in more than 256 groups: the primary one has to do
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        groups.update(struct.unpack(f"{len(raw) // 4}I", raw))
    return Peer(pid, uid, frozenset(groups))


def listen(path: str) -> trio.socket.SocketType:
    """A listening socket at ``path``, made with its directory. A dead daemon's file is replaced; of a living one
    ControlError is raised. Blocks for a moment only: everything is local."""
    encoded = os.fsencode(path)
    if len(encoded) > 107:
        raise ControlError(f"{path}: a socket's path may have 107 bytes at most; choose a shorter one with --socket")
    try:
        _make_directory(os.path.dirname(path))
        _remove_dead(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(path)
            # Everybody may connect: who asks is checked per request by what the kernel says about the peer.
            os.chmod(path, 0o666)
            listener.listen(128)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ControlError(f"{path}: cannot listen there: {error.strerror or error}") from error
    return trio.socket.from_stdlib_socket(listener)


def _make_directory(directory: str) -> None:
    if not os.path.isdir(directory):
        os.makedirs(directory, 0o755)
        os.chmod(directory, 0o755)  # the daemon's umask is 077, and owners of pipelines must get through


def _remove_dead(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"{path}: there is something that is no socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as error:  # a full backlog is a living daemon too
            log.debug("probing %s: %s", path, error)
    raise ControlError(f"{path}: another daemon answers there; stop it, or choose another socket with --socket")
