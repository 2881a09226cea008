"""An S3 engine that somebody named, which listens on this machine, for hosts of a Network.

INSTANTSTART_TEST_S3=http://ACCESS_KEY:SECRET_KEY@HOST:PORT; the keys may make buckets. Hosts of a Network reach nothing
of the machine's own, so a gateway among them passes every connection on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import urllib.parse

from tests.servers.netns import Network
from tests.servers.s3_tier import S3, S3Tier

NAMED = urllib.parse.urlsplit(os.environ.get("INSTANTSTART_TEST_S3", ""))


class NamedEngine(S3Tier):
    def __init__(self, network: Network) -> None:
        super().__init__(network.host("gateway"), NAMED.username or "", NAMED.password or "")
        address = self.gateway.address
        self._listener = self.gateway.call(lambda: socket.create_server((address, S3), backlog=256))
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection((NAMED.hostname, NAMED.port), 10)
            except OSError:
                return
            for one in (near, far):
                one.settimeout(None)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.add(one)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            one.close()
