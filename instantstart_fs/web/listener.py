"""Binds the page's address, or a free port. The daemon imports this before it needs the HTTP server."""

from __future__ import annotations

import errno
import logging
import socket

from instantstart_fs.ipc.sockets import listen_tcp

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address, or at a free port where that one is taken. Raises OSError."""
    for wanted in (port, 0):
        try:
            listener = listen_tcp(host, wanted)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or wanted == 0:
                raise
        else:
            if wanted != port:
                log.warning("port %d of %s is taken: the page is at %s", port, host, address(listener))
            return listener
    raise AssertionError("the kernel has no free port, and said so")


def address(listener: socket.socket) -> str:
    """Return the address as a URL, such as http://127.0.0.1:9847/."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
