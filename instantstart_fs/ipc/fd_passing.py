"""Receives file descriptors that come beside a message on a unix socket (SCM_RIGHTS). Standard library only.

``socket.recv_fds`` ignores its flags (Python 3.11): its descriptors are inheritable, and leak into a child that
is started at that moment.
"""

from __future__ import annotations

import array
import socket


def receive(connection: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """Receive one packet, or what a stream has.

    Args:
        connection: A blocking AF_UNIX socket.
        size: Bytes at most.
        most: Descriptors at most; the kernel closes what comes beyond them.

    Returns:
        The bytes (none at the end of the connection), the descriptors, which are close-on-exec and the caller's to
        close, and the flags of recvmsg(2), such as MSG_CTRUNC.

    Raises:
        OSError: As recvmsg(2) does; TimeoutError if the socket has a timeout.
    """
    found = array.array("i")
    space = socket.CMSG_SPACE(most * found.itemsize) if most else 0
    data, ancillary, flags, _ = connection.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
    return data, found.tolist(), flags
