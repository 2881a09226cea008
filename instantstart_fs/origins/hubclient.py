"""The HTTP client that huggingface_hub is given: it connects only where it may, and bounds every body.

Importing this module installs the client for the whole process. What is asked of the hub, and what its answers mean,
is in ``huggingface.py``.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import httpcore2
import httpx2
from httpcore2._backends.sync import SyncStream
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import hf_request_event_hook

from instantstart_fs.core.addresses import Permit, permit
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.urls import shown_url, without_user
from instantstart_fs.errors import OriginMisbehaved
from instantstart_fs.origins.guard import MOST_REDIRECTS, check_behind_proxy, connect, same_origin
from instantstart_fs.origins.proxies import Proxies

MAX_BODY = 1 << 30
"""The most bytes of one answer: the list of a repository with a million files has 300 MB."""
BODY_SECONDS = 240.0
HEADER_TIMEOUTS = 2.0
"""Time-outs of a request that connecting, status and headers together may take."""
HEADER_SECONDS = 30.0
"""The time-out of a request without one."""
CONNECTIONS = 100
KEEP_SECONDS = 5.0
"""httpx2's own limits."""
_NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_CREDENTIALS = ("Authorization", "Cookie")


class BoundedBody(httpx2.SyncByteStream):
    """A body of at most MAX_BODY bytes that arrives within BODY_SECONDS. Raises httpx2's errors."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        count, end = 0, time.monotonic() + BODY_SECONDS
        for part in self._stream:
            count += len(part)
            if count > MAX_BODY:
                raise httpx2.RemoteProtocolError(f"an answer of more than {MAX_BODY} bytes")
            if time.monotonic() > end:
                raise httpx2.ReadTimeout(f"an answer that is not whole after {BODY_SECONDS:g} s")
            yield part

    def close(self) -> None:
        self._stream.close()


class Asking(NamedTuple):
    """The party on whose behalf the client asks. ``endpoint``: the one that credentials may go to; ``authorization``:
    what it wants beside a token."""

    endpoint: str
    named: tuple[str, ...]
    authorization: str | None


_asking: ContextVar[Asking] = ContextVar("_asking", default=Asking("", (), None))  # noqa: B039 (immutable)


@contextlib.contextmanager
def on_behalf_of(endpoint: str, named: tuple[str, ...], authorization: str | None) -> Iterator[None]:
    """Set whose requests are made inside the block; the fields are those of ``Asking``."""
    before = _asking.get()
    _asking.set(Asking(endpoint, named, authorization))
    try:
        yield
    finally:
        _asking.set(before)


_headers_due: ContextVar[float | None] = ContextVar("_headers_due", default=None)
"""When the headers of the answer under way are overdue, by time.monotonic(); None where nobody waits for any."""


def _left(timeout: float | None) -> float | None:
    """Return the seconds for one operation on a socket. Raises httpcore2's ReadTimeout once the headers are overdue."""
    due = _headers_due.get()
    if due is None:
        return timeout
    left = due - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the headers are overdue")
    return left if timeout is None else min(timeout, left)


class TimedStream(httpcore2.NetworkStream):
    """A connection that keeps the deadline of its answer's headers: a socket's own time-out starts again with each
    byte, and an answer of a proxy to CONNECT, or interim answers without end, may come before any header."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return TimedStream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class GuardedBackend(httpcore2.SyncBackend):
    """Connects only to addresses that ``origins/guard.py`` permits; None: to a proxy, which the administrator chose."""

    def __init__(self, allowed: Permit | None) -> None:
        self._allowed = allowed

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.NetworkStream:
        timeout = _left(timeout)
        if self._allowed is None:
            return TimedStream(super().connect_tcp(host, port, timeout, local_address, socket_options))
        try:
            found = connect(host, port, self._allowed, timeout, options=[*(socket_options or ()), _NODELAY])
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        return TimedStream(SyncStream(found))


class DirectTransport(httpx2.HTTPTransport):
    """The connections to one set of permitted hosts, or through one proxy."""

    def __init__(self, named: tuple[str, ...], proxy: str | None) -> None:
        super().__init__()
        self._pool.close()
        settings: dict[str, Any] = {
            "ssl_context": httpx2.create_ssl_context(),
            "max_connections": CONNECTIONS,
            "max_keepalive_connections": CONNECTIONS,
            "keepalive_expiry": KEEP_SECONDS,
        }
        if proxy is None:
            self._pool = httpcore2.ConnectionPool(network_backend=GuardedBackend(permit(named)), **settings)
        else:
            address, authorization = without_user(proxy)
            self._pool = httpcore2.HTTPProxy(
                address,
                proxy_headers={"Proxy-Authorization": authorization} if authorization else None,
                network_backend=GuardedBackend(None),
                **settings,
            )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        seconds = request.extensions.get("timeout", {}).get("read")
        before = _headers_due.set(time.monotonic() + HEADER_TIMEOUTS * (HEADER_SECONDS if seconds is None else seconds))
        try:
            return super().handle_request(request)
        finally:
            _headers_due.reset(before)


class GuardedTransport(httpx2.BaseTransport):
    """The transport of every request of the hub's client, also of those that follow a redirect. It judges the address
    that is connected to, sends credentials to the endpoint alone, and bounds bodies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transports: dict[tuple[str, tuple[str, ...]], DirectTransport] = {}
        self._proxies = Proxies()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        current = _asking.get()
        if not same_origin(str(request.url), current.endpoint):
            for name in _CREDENTIALS:
                request.headers.pop(name, None)
        elif current.authorization is not None:
            request.headers["Authorization"] = current.authorization
        request.headers["Accept-Encoding"] = "identity"
        response = self._transport(request.url, current.named).handle_request(request)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            # A few kilobytes of it may be gigabytes.
            response.close()
            raise OriginMisbehaved(
                f"{shown_url(str(request.url))}: an answer in {encoding[:20]!r}, which nobody asked for",
                fault=Fault.ENCODED,
            )
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = BoundedBody(response.stream)
        return response

    def _transport(self, url: httpx2.URL, named: tuple[str, ...]) -> DirectTransport:
        proxy = self._proxies.of(str(url))
        if proxy:
            check_behind_proxy(url.host, permit(named))
        key = (proxy, ()) if proxy else ("", named)
        with self._lock:
            known = self._transports.get(key)
            if known is None:
                known = self._transports[key] = DirectTransport(named, proxy)
            return known

    def close(self) -> None:
        with self._lock:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()


def new_client() -> httpx2.Client:
    """The client for huggingface_hub, whose own reads bodies without a bound and follows every redirect."""
    return httpx2.Client(
        event_hooks={"request": [hf_request_event_hook]},
        transport=GuardedTransport(),
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        timeout=None,
    )


set_client_factory(new_client)
