"""Free loopback ports. Somebody else may take one before it is used: who binds it must be ready to try again."""

from __future__ import annotations

import socket


def free_port(*, also: int = 0) -> int:
    """A port of 127.0.0.1 that is free now, with ``port + also`` free too (SeaweedFS' gRPC: 10000 above)."""
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if not also:
                return port
            if port + also > 65535:
                continue
            with socket.socket() as other:
                try:
                    other.bind(("127.0.0.1", port + also))
                except OSError:
                    continue
                return port
    # the kernel's ephemeral range may lie too high for port + also: look below it
    for port in range(20000, 32000):
        try:
            with socket.socket() as probe, socket.socket() as other:
                probe.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + also))
                return port
        except OSError:
            continue
    raise RuntimeError("no free port")


def free_ports(count: int, *, also: int = 0) -> list[int]:
    """``count`` different free ports."""
    found: list[int] = []
    while len(found) < count:
        port = free_port(also=also)
        if port not in found:
            found.append(port)
    return found
