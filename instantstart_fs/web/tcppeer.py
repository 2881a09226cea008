"""Finds the uid at the other end of a TCP connection, if that end is on this machine.

The kernel is asked for exactly this connection (NETLINK_SOCK_DIAG, by both addresses and ports). That takes about 10 µs
however many connections there are. The kernel knows the sockets of its own network namespace only: a peer on another
machine, in a container with its own network, or behind a proxy is not found.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import logging
import os
import socket
import struct

log = logging.getLogger(__name__)

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
INET_DIAG_NOCOOKIE = 0xFFFFFFFF
ESTABLISHED, FIN_WAIT1, FIN_WAIT2 = 1, 4, 5
OPEN = frozenset({ESTABLISHED, FIN_WAIT1, FIN_WAIT2})
"""TCP states that count as connected. In the second and third the peer has sent all that it will and still reads."""
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_PORTS = struct.Struct("!HH")
_REST = struct.Struct("=IIIIIIII")
"""The rest of inet_diag_sockid (interface, cookie (2)) and of inet_diag_msg (expires, rqueue, wqueue, uid, inode)."""
_MAPPED = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4 address that is written as IPv6."""

Address = tuple[str, int]


def uid_of_peer(connection: socket.socket) -> int | None:
    """Return the uid of the process at the other end; None if unknown. Raises nothing."""
    try:
        here, there = connection.getsockname()[:2], connection.getpeername()[:2]
    except OSError:
        return None  # it has gone
    try:
        return uid_of(there, here)
    except (OSError, ValueError, struct.error) as error:
        _say_once(error.strerror or str(error) if isinstance(error, OSError) else str(error))
        return None


def uid_of(theirs: Address, ours: Address) -> int | None:
    """Return the uid of the socket at ``theirs`` that is connected to ``ours``. Raises OSError."""
    found = _ask(_plain(theirs), _plain(ours))
    # The kernel calls a user of another user namespace so.
    return None if found is None or found == _overflow_uid() else found


def _plain(address: Address) -> tuple[bytes, int]:
    """Return an IPv4 address in its plain form, also where a dual-stack socket writes it as ::ffff:127.0.0.1."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).packed, address[1]


def _ask(theirs: tuple[bytes, int], ours: tuple[bytes, int]) -> int | None:
    family = socket.AF_INET if len(theirs[0]) == 4 else socket.AF_INET6
    if len(theirs[0]) != len(ours[0]):
        return None
    ends = _PORTS.pack(theirs[1], ours[1]) + theirs[0].ljust(16, b"\0") + ours[0].ljust(16, b"\0")
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
    body += ends + struct.pack("=III", 0, INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE)
    request = _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as netlink:
        netlink.setblocking(False)  # the kernel answers within the call
        netlink.sendto(request, (0, 0))
        answer = netlink.recv(8192)
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind != SOCK_DIAG_BY_FAMILY:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code == errno.ENOENT:
            return None
        raise OSError(code, os.strerror(code))
    of_family, state = answer[_HEADER.size : _HEADER.size + 2]
    uid, inode = _REST.unpack_from(answer, _HEADER.size + 4 + len(ends))[-2:]
    # Where there is no such connection a listener may be found in its stead; what its process has closed belongs to
    # nobody, and would be called root's.
    found = answer[_HEADER.size + 4 :][: len(ends)]
    if family == socket.AF_INET and of_family == socket.AF_INET6:
        # The caller's socket is one of both families, as Java's are.
        ends = ends[: _PORTS.size] + _MAPPED + theirs[0] + _MAPPED + ours[0]
    return int(uid) if found == ends and state in OPEN and inode else None


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("the kernel does not say who connects to the page (%s): it shows what everybody may see", reason)


@functools.cache
def _overflow_uid() -> int:
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        return int(file.read())
    return 65534
