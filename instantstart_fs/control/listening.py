"""The control socket itself: everybody may connect, since who asks is checked per request."""

from __future__ import annotations

import errno
import logging
import os

import trio

from instantstart_fs.config import unixsocket
from instantstart_fs.config.directories import PASSABLE, obstacle
from instantstart_fs.config.places import make_run_directory
from instantstart_fs.config.unixsocket import Peer, peer_of
from instantstart_fs.errors import ControlError

__all__ = ["Peer", "listen", "peer_of"]

log = logging.getLogger(__name__)

BACKLOG = 4096
"""The kernel takes no more than net.core.somaxconn of it (4096 since Linux 5.4)."""


def listen(path: str) -> trio.socket.SocketType:
    """A listening socket at ``path``, made with its directory. A dead daemon's file is replaced; of a living one
    ControlError is raised."""
    directory = os.path.dirname(path)
    try:
        make_run_directory(directory)
        if os.geteuid() == 0 and (closed := obstacle(directory)) is not None:
            log.warning(
                "not everybody may pass %s: owners of pipelines who may not cannot ask for theirs; chmod o+x, or "
                "choose another --socket",
                closed,
            )
        listener = unixsocket.listen(path, mode=0o666, directory_mode=PASSABLE, backlog=BACKLOG)
    except OSError as error:
        raise ControlError(f"{path}: {_reason(error)}") from error
    listener.setblocking(False)
    return trio.socket.from_stdlib_socket(listener)


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENAMETOOLONG:
            return f"a socket's path may have {unixsocket.MAX_PATH} bytes at most; choose a shorter one with --socket"
        case errno.ENOTSOCK:
            return "there is something that is no socket; it is left alone"
        case errno.EADDRINUSE:
            return "another daemon answers there; stop it, or choose another socket with --socket"
        case _:
            return f"cannot listen there: {error.strerror or error}"
