"""The trio side of a child process: packets with descriptors to it, and its end. It restarts nothing."""

from __future__ import annotations

import array
import logging
import socket as stdlib_socket
import subprocess
from collections.abc import Sequence

import trio

log = logging.getLogger(__name__)


async def send_packet(connection: trio.socket.SocketType, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet of a SOCK_SEQPACKET socket, with descriptors beside it (SCM_RIGHTS). Raises OSError."""
    if fds:
        rights = array.array("i", fds).tobytes()
        await connection.sendmsg([packet], [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, rights)])
    else:
        await connection.send(packet)


async def reap(process: subprocess.Popen[bytes], name: str, patience: float) -> None:
    """Wait for a child that was told to end; kill it after ``patience`` seconds, and leave it after as many more.

    Call it shielded from cancellation. ``name``: for the log.
    """
    for last in (False, True):
        try:
            await trio.to_thread.run_sync(process.wait, patience)
        except subprocess.TimeoutExpired:
            if last:
                log.error("the %s %d cannot be killed (a stuck disk?)", name, process.pid)
            process.kill()
        else:
            return
