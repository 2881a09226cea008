"""Fetching one chunk: ranged GET → reused buffer → pwrite. Runs in threads of the fetch workers; blocks.

A chunk counts as arrived only if the answer was exactly what was asked for: this Content-Range and length (with 206, or
with 200 as some servers say it), or the whole file; the pinned ETag where the origin binds it; no byte more or less.
Bodies are never decoded: a stored encoding belongs to the pinned bytes. A server that ignores ranges sends the whole
file, which the sink may take instead (``Sink.take_whole``). A few redirects are followed, each to an address that was
judged (origins/guard.py), and credentials do not go along to another host. Foreign exceptions become OriginErrors here,
and no message holds a query string, since signatures live there.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationParseError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from instantstart_fs.core.addresses import Permit, permit
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.refusals import MOST_ERROR_BODY, hub_word, refusal, s3_word
from instantstart_fs.core.urls import shown_url, without_user
from instantstart_fs.errors import (
    AccessRefused,
    OriginChanged,
    OriginError,
    OriginIncompatible,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    OriginUnsupported,
    OutOfResources,
)
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.origins.base import Location
from instantstart_fs.origins.common import is_trusted
from instantstart_fs.origins.guard import (
    MOST_REDIRECTS,
    check_behind_proxy,
    check_text,
    connect,
    next_address,
    same_origin,
)

BUFFER_BYTES = 1024 * 1024
"""One per fetching thread. Measured in docs/decisions/http-client.md."""
READ_BYTES = 256 * 1024
"""One read of the socket: it returns when full, and only between reads can a demand have the line for itself. It has
WorkerSettings.slow_window to come: a body that drips would hold a connection, and its chunk, for hours."""
FIRST_PIECE, LEAST_PIECE = 16 * 1024, 4 * 1024
"""Of READ_BYTES so much is waited for at a time, and told of: on a slow line less, on a fast one soon all of it."""
HEADER_TIMEOUTS = 2.0
"""Status and headers have so many stall time-outs to come in whole: a time-out of the socket begins anew with each
byte."""

ERROR_BODY_SECONDS = 5.0
"""A refusal's body has so long: it only tells why."""

_REDIRECTS = (301, 302, 303, 307, 308)
_NO_SECRETS = ("user-agent", "accept-encoding", "range", "if-match")
"""What goes along to another host."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")
_SOCKET = "instantstart_socket"
"""Where a response keeps the socket that it comes over."""
OVERDUE_LOOK = 0.5
"""Seconds between two looks at what is overdue."""
_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class Abandoned(Exception):
    """The file was closed meanwhile: write nothing more, report nothing."""


class Sink(Protocol):
    """Where a chunk's bytes go."""

    def write(self, data: memoryview, offset: int) -> None:
        """All of it. Raises StoreError, and Abandoned when the file was closed."""
        ...

    def before_read(self) -> None:
        """Called before each piece is read from the origin: may wait (a pause), may raise Abandoned."""
        ...

    def progress(self, count: int) -> None: ...

    def take_whole(self) -> Sink | None:
        """The server ignores ranges, and begins to send the whole file: who takes it, from its first byte; None where
        nobody does. May raise Abandoned."""
        ...


def next_piece(piece: int, seconds: float) -> int:
    """How much to wait for next, when ``piece`` bytes took so long: progress is to be seen every second, and a fast
    line is not to be asked more often than it must."""
    if seconds > 0.5:
        return max(piece // 4, LEAST_PIECE)
    return min(piece * 4, READ_BYTES) if seconds < 0.1 else piece


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds from a Retry-After (seconds or an HTTP date; ``now``: the wall clock); None if absent or unreadable."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(moment - now, 0.0)


class Overdue:
    """Cuts connections off when their time is up. A thread looks after them while there are any. Thread-safe."""

    class Cut:
        """``off``: it happened. ``thread``: who is inside."""

        __slots__ = ("at", "connection", "off", "thread")

        def __init__(self, connection: socket.socket | None, at: float) -> None:
            self.connection = connection
            self.at = at
            self.off = False
            self.thread = threading.get_ident()

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: set[Overdue.Cut] = set()
        self._asleep = False
        """Whether the thread waits for something to look after: it is woken then only, not for each read."""
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def cut(self, connection: socket.socket | None, seconds: float) -> Iterator[Cut]:
        """Inside for longer than ``seconds``, plus OVERDUE_LOOK at most, ``connection`` ends, and who reads it sees
        that."""
        found = Overdue.Cut(connection, time.monotonic() + seconds)
        with self._changed:
            self._pending.add(found)
            if self._thread is None:
                thread = threading.Thread(target=self._look, name="overdue", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    self._pending.discard(found)
                    raise OutOfResources(f"{error}; raise TasksMax= (pids.max)") from error
                self._thread = thread
            elif self._asleep:
                self._asleep = False
                self._changed.notify()
        try:
            yield found
        finally:
            with self._changed:
                self._pending.discard(found)

    def interrupt(self, thread: int) -> None:
        """What this thread is inside of is overdue now."""
        with self._changed:
            for found in self._pending:
                if found.thread == thread:
                    found.at = 0.0
            self._changed.notify()

    def _look(self) -> None:
        with self._changed:
            while True:
                self._asleep = not self._pending
                self._changed.wait(None if self._asleep else OVERDUE_LOOK)
                now = time.monotonic()
                for found in [found for found in self._pending if found.at <= now and not found.off]:
                    found.off = True
                    if found.connection is not None:
                        with contextlib.suppress(OSError):
                            # Not SSLSocket's own: it takes away what the reader is inside of.
                            socket.socket.shutdown(found.connection, socket.SHUT_RDWR)


def _watched_pools(
    overdue: Overdue, seconds: float, permit: Permit | None
) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """urllib3's pools, whose connections have ``seconds`` for status and headers together, and are made to addresses
    that ``permit`` allows (None: to a proxy, which the administrator chose)."""

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
        with overdue.cut(raw, seconds) as cut:
            response = receive()
        if cut.off:  # what came may look like headers that have ended
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

        def getresponse(self) -> Any:
            return answer(self, super().getresponse)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class Fetcher:
    """The connections of one worker. Thread-safe."""

    def __init__(self, settings: WorkerSettings, identity_of: Callable[[os.stat_result], str] | None = None) -> None:
        self._settings = settings
        self._identity_of = identity_of
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, tuple[str, ...]], urllib3.PoolManager] = {}
        """By proxy, and by what else than public addresses may be connected to: a connection is used again only by
        those who could have made it."""
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.stall_timeout)
        self._overdue = Overdue()
        # Kept off the class: reading the environment once is what requests does per session as well.
        self._proxies = urllib.request.getproxies()

    def fetch(self, location: Location, wanted: ByteRange, size: int, buffer: memoryview, sink: Sink) -> float | None:
        """Bring ``wanted`` of a file of ``size`` bytes into ``sink``. How many seconds after the request the answer
        began; None: nobody was asked over a network. Raises InstantStartError, Abandoned."""
        if location.url.startswith("file:"):
            if location.identity is None:
                # Only a directory's origin names local files, and pins them.
                raise OriginUnsupported("an address of a local file that nobody pinned is not read")
            self._copy(location, wanted, size, buffer, sink)
            return None
        return self._get(location, wanted, size, buffer, sink)

    def interrupt(self, thread: int) -> None:
        """End the read of the socket that this thread of execution is inside of, if it is inside of any."""
        self._overdue.interrupt(thread)

    # -- http ----------------------------------------------------------------------------------------------------

    def _manager(self, url: str, named: tuple[str, ...]) -> urllib3.PoolManager:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host:
            raise OriginUnsupported(f"{shown_url(url)} is no http, https or file address")
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        if proxy and urllib.request.proxy_bypass(host):
            proxy = None
        if proxy:
            check_behind_proxy(host, permit(named))
        key = (proxy, ()) if proxy else ("", named)
        with self._lock:
            manager = self._managers.get(key)
            if manager is None:
                bundle = next((os.environ[name] for name in _CA_VARIABLES if os.environ.get(name)), None)
                if proxy:
                    proxy, authorization = without_user(proxy if "//" in proxy else f"http://{proxy}")
                    manager = urllib3.ProxyManager(
                        proxy,
                        num_pools=64,
                        maxsize=32,
                        ca_certs=bundle,
                        proxy_headers={"Proxy-Authorization": authorization} if authorization else None,
                    )
                else:
                    manager = urllib3.PoolManager(num_pools=64, maxsize=32, ca_certs=bundle)
                seconds = HEADER_TIMEOUTS * self._settings.stall_timeout
                manager.pool_classes_by_scheme = _watched_pools(
                    self._overdue, seconds, None if proxy else permit(named)
                )
                self._managers[key] = manager
            return manager

    def _get(self, location: Location, wanted: ByteRange, size: int, buffer: memoryview, sink: Sink) -> float:
        sink.before_read()
        asked = time.monotonic()
        response, where = self._open(location, wanted, sink)
        answered = time.monotonic() - asked
        whole = False
        try:
            if response.status not in (200, 206):
                raise self._refused(response, location, where)
            if _check_answer(response, location, wanted, size, where) == wanted:
                self._receive(response, wanted, buffer, sink, where)
            else:
                taker = sink.take_whole()
                if taker is None:
                    raise OriginIncompatible(
                        f"{where}: the server ignores ranges (it answers with the whole file): only a file that is "
                        "kept can be had from it; make room in the store, or use another endpoint",
                        fault=Fault.WHOLE,
                    )
                self._receive(response, ByteRange(0, size), buffer, taker, where)
            whole = True
        finally:
            # Only a connection that was read to its body's end may be used again.
            if whole:
                response.release_conn()
            else:
                with contextlib.suppress(Exception):
                    response.close()
        return answered

    def _open(self, location: Location, wanted: ByteRange, sink: Sink) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer to the GET, and where it came from as messages may show it. Follows MOST_REDIRECTS redirects."""
        url, authorization = without_user(location.url)
        headers = {"User-Agent": "instantstart-fs", **dict(location.headers)}
        if authorization is not None:
            headers.setdefault("Authorization", authorization)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={wanted.start}-{wanted.stop - 1}"}
        for _ in range(MOST_REDIRECTS + 1):
            where = shown_url(url)
            try:
                response = self._manager(url, location.named).urlopen(
                    "GET",
                    url,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=self._timeout,
                )
            except LocationParseError as error:
                raise OriginUnsupported(f"{where} cannot be parsed as an address") from error
            except (HTTPError, OSError, http.client.HTTPException) as error:
                raise _unreachable(error, where) from error
            except (OriginMisbehaved, OriginIncompatible) as error:
                first = shown_url(location.url)
                sent = where if where == first else f"{first} sends us to {where}"
                raise type(error)(f"{sent}: {error.message}", fault=error.fault) from None
            if response.status not in _REDIRECTS:
                return response, where
            there = response.headers.get("Location")
            with contextlib.suppress(Exception):
                response.close()
            if not there:
                raise OriginMisbehaved(f"{where} answers {response.status} without a Location", fault=Fault.ANSWER)
            try:
                there, authorization = without_user(next_address(url, there))
                check_text(there, permit(location.named))
            except OriginIncompatible as error:
                raise OriginIncompatible(f"{where}: {error.message}") from None
            if location.trusted and not is_trusted(there):
                raise OriginIncompatible(
                    f"{where} sends us from a protected address to an open one, {shown_url(there)}"
                )
            if not same_origin(url, there):
                headers = {name: value for name, value in headers.items() if name.lower() in _NO_SECRETS}
                if authorization is not None:  # its own, for that host
                    headers["Authorization"] = authorization
            url = there
            sink.before_read()
        raise OriginMisbehaved(
            f"{shown_url(location.url)}: more than {MOST_REDIRECTS} redirects, the last to {shown_url(url)}",
            fault=Fault.REDIRECTS,
        )

    def _refused(self, response: urllib3.BaseHTTPResponse, location: Location, where: str) -> OriginError:
        """What a refusal says: status, headers, and the beginning of its body, which has ERROR_BODY_SECONDS to come."""
        body = b""
        with (
            contextlib.suppress(HTTPError, OSError, http.client.HTTPException, ValueError),
            self._overdue.cut(getattr(response, _SOCKET, None), ERROR_BODY_SECONDS),
        ):
            body = response.read(MOST_ERROR_BODY) or b""
        hub = hub_word(response.headers)
        return refusal(
            response.status,
            where,
            service=location.service,
            word=hub if location.service == "hub" or hub.code else s3_word(body),
            retry_after=parse_retry_after(response.headers.get("Retry-After"), time.time()),
        )

    def _receive(
        self, response: urllib3.BaseHTTPResponse, wanted: ByteRange, buffer: memoryview, sink: Sink, where: str
    ) -> None:
        # urllib3's own readinto reads into a fresh bytes object and copies; http.client's reads into the buffer.
        body = getattr(response, "_fp", None)
        source = body if isinstance(body, http.client.HTTPResponse) else response
        readinto = getattr(source, "readinto")  # noqa: B009 (typed by neither)
        connection = getattr(response, _SOCKET, None)
        window = self._settings.slow_window
        piece = FIRST_PIECE
        offset = wanted.start
        try:
            while offset < wanted.stop:
                filled = 0
                limit = min(len(buffer), wanted.stop - offset)
                while filled < limit:
                    sink.before_read()
                    part = buffer[filled : min(filled + READ_BYTES, limit)]
                    count = 0
                    with self._overdue.cut(connection, window) as cut:
                        while count < len(part):
                            began = time.monotonic()
                            got = readinto(part[count : count + piece])
                            if not got:
                                break
                            count += got
                            sink.progress(got)
                            piece = next_piece(piece, time.monotonic() - began)
                    if cut.off:
                        raise OriginUnavailable(f"{where}: less than {len(part)} bytes came in {window:g} s")
                    filled += count
                    if count < len(part):
                        raise OriginMisbehaved(
                            f"{where}: the body ended after {offset + filled - wanted.start} of {wanted.length} bytes",
                            fault=Fault.CUT,
                        )
                sink.write(buffer[:filled], offset)
                offset += filled
            if readinto(buffer[:1]):
                raise OriginMisbehaved(
                    f"{where}: the body is longer than the {wanted.length} bytes asked for", fault=Fault.LONG
                )
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise _unreachable(error, where) from error

    # -- files ---------------------------------------------------------------------------------------------------

    def _copy(self, location: Location, wanted: ByteRange, size: int, buffer: memoryview, sink: Sink) -> None:
        path = unquote(urlsplit(location.url).path, errors="surrogateescape")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise OriginNotFound(f"{path} is not there any more") from error
        except PermissionError as error:
            raise AccessRefused(f"{path} may not be read: {error.strerror}") from error
        except OSError as error:
            raise OriginUnavailable(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._check_identity(fd, location, size, path)
            offset = wanted.start
            while offset < wanted.stop:
                sink.before_read()
                limit = min(len(buffer), wanted.stop - offset)
                try:
                    count = os.preadv(fd, [buffer[:limit]], offset)
                except OSError as error:
                    raise OriginUnavailable(f"{path} cannot be read: {error.strerror}") from error
                if count == 0:
                    raise OriginChanged(f"{path} was cut to {offset} bytes; `update` pins what is there now")
                sink.progress(count)
                sink.write(buffer[:count], offset)
                offset += count
            self._check_identity(fd, location, size, path)
        finally:
            os.close(fd)

    def _check_identity(self, fd: int, location: Location, size: int, path: str) -> None:
        status = os.fstat(fd)
        same = status.st_size == size
        if same and location.identity is not None:
            if self._identity_of is None:
                from instantstart_fs.origins.directory import identity_of

                self._identity_of = identity_of
            same = self._identity_of(status) == location.identity
        if not same:
            raise OriginChanged(f"{path} is not the file that was pinned; `update` pins what is there now")


def _check_answer(
    response: urllib3.BaseHTTPResponse, location: Location, wanted: ByteRange, size: int, where: str
) -> ByteRange:
    """Which bytes the body holds: ``wanted``, or the whole file. Raises OriginError for anything else."""
    status = response.status
    length = (response.headers.get("Content-Length") or "").strip() or None
    given = (response.headers.get("Content-Range") or "").strip()
    match = _CONTENT_RANGE.match(given)
    pinned = location.etag
    etag = response.headers.get("ETag")
    body = wanted
    if match is not None and (int(match[1]), int(match[2])) == (wanted.start, wanted.stop - 1):
        # Also with 200, as `rclone serve s3` says it.
        if match[3] != "*" and int(match[3]) != size:
            raise OriginChanged(f"{where}: the object now has {match[3]} bytes, {size} are pinned")
        if length not in (None, str(wanted.length)):
            raise OriginMisbehaved(
                f"{where}: {length} bytes came where {wanted.length} were asked for", fault=Fault.RANGE
            )
    elif status == 206 or given:
        raise OriginMisbehaved(
            f"{where}: Content-Range is {given!r}, asked was {wanted.start}-{wanted.stop - 1}", fault=Fault.RANGE
        )
    elif length not in (None, str(size)) and not _encoded(response):
        if length == "0" or (pinned is not None and (etag is None or _bare(etag) == _bare(pinned))):
            # Not another object: somebody on the way answers in its place.
            raise OriginMisbehaved(
                f"{where}: an answer of {length} bytes that is not the file of {size}", fault=Fault.ANSWER
            )
        raise OriginChanged(f"{where}: the object now has {length} bytes, {size} are pinned")
    else:
        body = ByteRange(0, size)
    encoding = _encoded(response)
    if encoding:
        # Stored so, then range and length speak of the pinned bytes; encoded on the way, then of something else.
        exact = match is not None and match[3] != "*"
        strong = pinned is not None and etag is not None and etag.strip() == pinned.strip() and length == str(size)
        if not exact and not strong:
            raise OriginMisbehaved(
                f"{where}: the body is encoded ({encoding}) on the way, though nobody asked for that",
                fault=Fault.ENCODED,
            )
    if pinned is not None and (etag is None or _bare(etag) != _bare(pinned)):
        raise OriginChanged(f"{where}: the ETag is {etag}, {pinned} is pinned; `update` pins what is there now")
    if location.commit is not None and (commit := response.headers.get("X-Repo-Commit")) != location.commit:
        raise OriginChanged(f"{where}: the answer is of commit {commit}, pinned was {location.commit}")
    return body


def _encoded(response: urllib3.BaseHTTPResponse) -> str:
    """The encoding of the body, "" for none."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()[:40]
    return "" if encoding in ("identity", "aws-chunked") else encoding


def _bare(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')


def _unreachable(error: BaseException, where: str) -> OriginError:
    cause: BaseException | None = error
    for _ in range(6):
        inner = getattr(cause, "reason", None)
        if not isinstance(inner, BaseException):
            inner = getattr(cause, "__cause__", None)
        if isinstance(cause, ConnectTimeoutError) and not isinstance(cause, NewConnectionError):
            return OriginUnavailable(f"{where}: no connection within the time-out")
        if isinstance(cause, ReadTimeoutError | TimeoutError):
            return OriginUnavailable(f"{where}: no byte came within the time-out")
        if isinstance(cause, ssl.SSLError):
            return OriginUnavailable(f"{where}: TLS failed ({cause.reason or type(cause).__name__})")
        if isinstance(cause, NewConnectionError | SSLError | HTTPError) and isinstance(inner, BaseException):
            cause = inner
            continue
        break
    if isinstance(cause, http.client.IncompleteRead):
        return OriginMisbehaved(f"{where}: the body was cut short", fault=Fault.CUT)
    if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause):
        return OriginUnavailable(f"{where}: connection refused")
    if isinstance(cause, OSError) and cause.strerror:
        return OriginUnavailable(f"{where}: {cause.strerror}")
    return OriginUnavailable(f"{where}: {type(cause).__name__}")


def new_buffer() -> memoryview:
    """A thread's buffer."""
    return memoryview(bytearray(BUFFER_BYTES))
