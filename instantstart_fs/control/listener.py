"""Opens the control socket, and accepts connections for it and for the page.

Any user may connect to the control socket: the caller of each request is checked (``callers.py``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

import trio

from instantstart_fs.config import unixsocket
from instantstart_fs.config.descriptors import may_connect
from instantstart_fs.config.directories import PASSABLE, obstacle
from instantstart_fs.config.places import make_run_directory
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.errors import ControlError

log = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections that may wait to be accepted. The kernel takes no more than net.core.somaxconn (4096 since Linux 5.4)."""
ACCEPT_RATE = 500.0
ACCEPT_BURST = 512.0
"""New connections a second. The daemon knows only afterwards who connects, and each costs the loop about 0.2 ms."""
SHORT_PAUSE = 0.1
"""Seconds until the next try when descriptors or memory are short."""


def listen(path: str) -> trio.socket.SocketType:
    """Return a socket that listens at ``path``, made with its directory. A dead daemon's file is replaced; a living
    one's raises ControlError."""
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


async def accept_connections(
    listener: trio.socket.SocketType, serve: Callable[[trio.socket.SocketType], None], *, name: str
) -> None:
    """Accept until cancelled, at a bounded rate, and give each connection to ``serve``, which only starts its task.

    Where descriptors or memory are short, what runs goes on and those who wait are accepted later; the first refusal of
    a row is logged under ``name``.
    """
    accepts = Bucket(ACCEPT_RATE, ACCEPT_BURST, trio.current_time())
    short = False
    while True:
        try:
            connection, _ = await listener.accept()
            if not may_connect(connection.fileno()):
                connection.close()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError as error:
            if not short:
                log.warning("%s: accept: %s; trying on", name, error.strerror or error)
            short = True
            await trio.sleep(SHORT_PAUSE)
            continue
        short = False
        serve(connection)
        await trio.sleep(accepts.take(trio.current_time()))


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
