"""The HTTP connections of a fetch process: pools per proxy, addresses judged before each connection, and a watchdog
that shuts down connections that exceed their deadline. It sends no request and judges no answer.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from instantstart_fs.core.addresses import Permit, permit
from instantstart_fs.core.urls import shown_url, without_user
from instantstart_fs.errors import OriginUnsupported, OutOfResources
from instantstart_fs.origins.guard import check_behind_proxy, connect
from instantstart_fs.origins.proxies import Proxies, ca_bundle
from instantstart_fs.system.threads import start_thread

HEADER_TIMEOUTS = 2.0
"""Stall time-outs that status and headers together may take: a socket's own time-out starts again with each byte."""
WATCHDOG_SECONDS = 0.5
"""Seconds between two checks of the deadlines."""
_SOCKET = "instantstart_socket"
"""The attribute of a response that holds the socket it comes over."""


def socket_of(response: urllib3.BaseHTTPResponse) -> socket.socket | None:
    """The socket that ``response`` comes over."""
    return getattr(response, _SOCKET, None)


class Watchdog:
    """Shuts down connections that exceed their deadline. One thread checks while there are any. Thread-safe."""

    class Deadline:
        """``expired``: the connection was shut down. ``interrupted``: it must be. ``thread``: the thread inside the
        block, which alone sets ``at``."""

        __slots__ = ("at", "connection", "expired", "interrupted", "thread")

        def __init__(self, connection: socket.socket | None, at: float) -> None:
            self.connection = connection
            self.at = at
            self.expired = self.interrupted = False
            self.thread = threading.get_ident()

        def start(self, seconds: float) -> None:
            """Let it be ``seconds`` from now: the block goes on with its next part."""
            self.at = time.monotonic() + seconds

        def rest(self) -> None:
            """Let there be none until the next ``start``."""
            self.at = math.inf

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: set[Watchdog.Deadline] = set()
        self._idle = False
        """Whether the thread waits for a first deadline: only then is it woken, not for each read."""
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def deadline(self, connection: socket.socket | None, seconds: float) -> Iterator[Deadline]:
        """Shut ``connection`` down if the block takes longer than ``seconds``, plus at most WATCHDOG_SECONDS; its
        reader then sees the end of the stream.

        Raises:
            OutOfResources: No thread can be started.
        """
        entry = Watchdog.Deadline(connection, time.monotonic() + seconds)
        with self._changed:
            self._pending.add(entry)
            if self._thread is None:
                try:
                    self._thread = start_thread(self._watch, "watchdog")
                except OutOfResources:
                    self._pending.discard(entry)
                    raise
            elif self._idle:
                self._idle = False
                self._changed.notify()
        try:
            yield entry
        finally:
            with self._changed:
                self._pending.discard(entry)

    def interrupt(self, thread: int) -> None:
        """Let every deadline of this thread expire now."""
        with self._changed:
            for entry in self._pending:
                if entry.thread == thread:
                    entry.interrupted = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                self._idle = not self._pending
                self._changed.wait(None if self._idle else WATCHDOG_SECONDS)
                now = time.monotonic()
                for entry in [each for each in self._pending if each.interrupted or each.at <= now]:
                    if entry.expired:
                        continue
                    entry.expired = True
                    if entry.connection is not None:
                        with contextlib.suppress(OSError):
                            # Not SSLSocket.shutdown: it would discard the TLS state that the reader is using.
                            socket.socket.shutdown(entry.connection, socket.SHUT_RDWR)


def _watched_pools(
    watchdog: Watchdog, seconds: float, permit: Permit | None
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """urllib3's pool classes with a deadline of ``seconds`` for status and headers together, of the server and before
    that of a proxy. They connect only to addresses that ``permit`` allows (None: to a proxy, which the administrator
    chose)."""

    def dial(connection: HTTPConnection) -> socket.socket:
        timeout = connection.timeout
        assert permit is not None
        try:
            return connect(
                connection._dns_host,
                connection.port,
                permit,
                timeout if isinstance(timeout, int | float) else None,
                source_address=connection.source_address,
                options=connection.socket_options or (),
            )
        except TimeoutError as error:
            raise ConnectTimeoutError(connection, "no connection within the time-out") from error
        except OSError as error:
            raise NewConnectionError(connection, f"no connection: {error}") from error

    def answer(connection: HTTPConnection, receive: Callable[[], urllib3.BaseHTTPResponse]) -> Any:
        # The connection lets go of its socket when the body ends it.
        raw: socket.socket | None = getattr(connection, "sock", None)
        with watchdog.deadline(raw, seconds) as deadline:
            try:
                response = receive()
            except (OSError, http.client.HTTPException) as error:  # half of a line may look like no HTTP
                if deadline.expired:
                    raise TimeoutError("the headers are overdue") from error
                raise
        if deadline.expired:  # what came may look like complete headers
            response.close()
            raise TimeoutError("the headers are overdue")
        setattr(response, _SOCKET, raw)
        return response

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return super()._new_conn() if permit is None else dial(self)

        def getresponse(self) -> Any:
            return answer(self, super().getresponse)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return super()._new_conn() if permit is None else dial(self)

        def _tunnel(self) -> None:
            # What a proxy answers to CONNECT.
            with watchdog.deadline(self.sock, seconds) as deadline:
                try:
                    super()._tunnel()
                except (OSError, http.client.HTTPException) as error:
                    if deadline.expired:
                        raise TimeoutError("the proxy's answer is overdue") from error
                    raise
            if deadline.expired:  # the end of the stream may look like that of the headers
                raise TimeoutError("the proxy's answer is overdue")

        def getresponse(self) -> Any:
            return answer(self, super().getresponse)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class Connections:
    """The connection pools of one fetch process. Thread-safe."""

    def __init__(self, stall_timeout: float) -> None:
        self._header_seconds = HEADER_TIMEOUTS * stall_timeout
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, tuple[str, ...]], urllib3.PoolManager] = {}
        """By proxy, and by the permitted non-public addresses: a connection is reused only by requests that could have
        made it themselves."""
        self.watchdog = Watchdog()
        self._proxies = Proxies()

    def pool(self, url: str, named: tuple[str, ...], *, direct: bool = False) -> urllib3.PoolManager:
        """The pool to ask for ``url``. ``named``: what else than public addresses it may connect to; ``direct``: never
        over a proxy.

        Raises:
            OriginUnsupported: The address is neither http nor https.
            OriginIncompatible: A proxy would connect where ``named`` does not allow it.
            OriginUnavailable: The environment names a proxy that can be none.
        """
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host:
            raise OriginUnsupported(f"{shown_url(url)} is no http, https or file address")
        proxy = None if direct else self._proxies.of(url)
        if proxy:
            check_behind_proxy(host, permit(named))
        key = (proxy, ()) if proxy else ("", named)
        with self._lock:
            manager = self._managers.get(key)
            if manager is None:
                bundle = ca_bundle()
                if proxy:
                    proxy, authorization = without_user(proxy)
                    manager = urllib3.ProxyManager(
                        proxy,
                        num_pools=64,
                        maxsize=32,
                        ca_certs=bundle,
                        proxy_headers={"Proxy-Authorization": authorization} if authorization else None,
                    )
                else:
                    manager = urllib3.PoolManager(num_pools=64, maxsize=32, ca_certs=bundle)
                manager.pool_classes_by_scheme = _watched_pools(
                    self.watchdog, self._header_seconds, None if proxy else permit(named)
                )
                self._managers[key] = manager
            return manager
