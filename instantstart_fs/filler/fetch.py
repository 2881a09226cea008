"""Fetches one range of a file over HTTP or from a local directory, into a sink. Blocks: it runs in threads of the fetch
processes. It does not retry and does not decide what a failure means for the file.

A chunk counts as arrived only if the answer is exactly what was asked for: this Content-Range and length (with 206, or
with 200 as some servers send it), or the whole file; the pinned ETag where the origin binds it; no byte more or less.
Bodies are never decoded: a stored encoding belongs to the pinned bytes. A server that ignores ranges sends the whole
file, which the sink may take (``Sink.take_whole``). A few redirects are followed, each to an address that was checked
(origins/guard.py); credentials are not sent to another host. Foreign exceptions become OriginErrors here, and no
message contains a query string, since signatures are there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ReadTimeoutError

from instantstart_fs.core.addresses import permit
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
)
from instantstart_fs.filler.answers import check_answer, unreachable
from instantstart_fs.filler.body import Read, reading
from instantstart_fs.filler.connections import Connections, socket_of
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.origins.base import Location
from instantstart_fs.origins.common import is_trusted, retry_after
from instantstart_fs.origins.guard import MOST_REDIRECTS, check_text, next_address, same_origin

BUFFER_BYTES = 1024 * 1024
"""Size of a fetching thread's buffer. Measured in docs/decisions/http-client.md."""
READ_BYTES = 256 * 1024
"""Size of one read of the socket. Background fetches pause for a demand only between two reads. Each must complete
within WorkerSettings.slow_window: a body that drips would hold a connection, and its chunk, for hours."""
FIRST_PIECE, LEAST_PIECE = 16 * 1024, 4 * 1024
"""Bytes after which a read reports progress: fewer on a slow connection, soon all of READ_BYTES on a fast one."""
END_SECONDS = 3.0
"""Time for the end of a body whose bytes are all here: a server may neither send its length nor close, or send trailers
without end."""
ERROR_BODY_SECONDS = 5.0
"""Time for the body of a refusal, which only explains it."""

_REDIRECTS = (301, 302, 303, 307, 308)
_NO_SECRETS = ("user-agent", "accept-encoding", "range", "if-match")
"""Headers that may be sent to another host."""


class Abandoned(Exception):
    """The file was closed during the fetch: write nothing more, report nothing."""


class Sink(Protocol):
    """Takes the bytes of a chunk."""

    def write(self, data: memoryview, offset: int) -> None:
        """Store all of ``data``. Raises StoreError, or Abandoned when the file was closed."""
        ...

    def before_read(self) -> None:
        """Called before each read from the origin. May wait (a pause), may raise Abandoned."""
        ...

    def progress(self, count: int) -> None:
        """``count`` more bytes were received, which ``write`` has not seen yet."""
        ...

    def take_whole(self) -> Sink | None:
        """Return the sink for the whole file, from its first byte, when the server ignores ranges; None to refuse it.
        May raise Abandoned."""
        ...


def next_piece(piece: int, seconds: float) -> int:
    """Return how many bytes to wait for next if ``piece`` bytes took this long: progress should show every second, with
    as few calls as possible on a fast connection."""
    if seconds > 0.5:
        return max(piece // 4, LEAST_PIECE)
    return min(piece * 4, READ_BYTES) if seconds < 0.1 else piece


class Fetcher:
    """Fetches over the connections of one process. Thread-safe."""

    def __init__(self, settings: WorkerSettings, identity_of: Callable[[os.stat_result], str] | None = None) -> None:
        self._settings = settings
        self._identity_of = identity_of
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.stall_timeout)
        self._connections = Connections(settings.stall_timeout)

    def fetch(self, location: Location, wanted: ByteRange, size: int, buffer: memoryview, sink: Sink) -> float | None:
        """Fetch the bytes ``wanted`` of a file of ``size`` bytes into ``sink``.

        Args:
            location: Where the file is.
            wanted: The range to fetch.
            size: Pinned size of the whole file.
            buffer: This thread's own (``new_buffer``).
            sink: Takes the bytes.

        Returns:
            Seconds from the request to the first byte of the answer; None if no network was involved.

        Raises:
            InstantStartError: The fetch failed.
            Abandoned: The file was closed.
        """
        if location.url.startswith("file:"):
            if location.identity is None:
                # Only a directory's origin names local files, and pins them.
                raise OriginUnsupported("an address of a local file that nobody pinned is not read")
            self._copy(location, wanted, size, buffer, sink)
            return None
        return self._get(location, wanted, size, buffer, sink)

    def interrupt(self, thread: int) -> None:
        """Abort the socket read that this thread is in, if any."""
        self._connections.watchdog.interrupt(thread)

    # -- http ----------------------------------------------------------------------------------------------------

    def _get(self, location: Location, wanted: ByteRange, size: int, buffer: memoryview, sink: Sink) -> float:
        sink.before_read()
        asked = time.monotonic()
        response, where = self._open(location, wanted, sink)
        answered = time.monotonic() - asked
        whole = False
        try:
            if response.status not in (200, 206):
                raise self._refused(response, location, where)
            if check_answer(response, location, wanted, size, where) == wanted:
                whole = self._receive(response, wanted, buffer, sink, where)
            else:
                taker = sink.take_whole()
                if taker is None:
                    raise OriginIncompatible(
                        f"{where}: the server ignores ranges (it answers with the whole file): only a file that is "
                        "kept can be had from it; free space in the store, or use another endpoint",
                        fault=Fault.WHOLE,
                    )
                whole = self._receive(response, ByteRange(0, size), buffer, taker, where)
        finally:
            # Only a connection whose body was read to its end may be reused.
            if whole:
                response.release_conn()
            else:
                with contextlib.suppress(Exception):
                    response.close()
        return answered

    def _open(self, location: Location, wanted: ByteRange, sink: Sink) -> tuple[urllib3.BaseHTTPResponse, str]:
        """Send the GET and follow at most MOST_REDIRECTS redirects; the answer, and its address as messages show it."""
        url, authorization = without_user(location.url)
        headers = {"User-Agent": "instantstart-fs", **dict(location.headers)}
        if authorization is not None:
            headers.setdefault("Authorization", authorization)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={wanted.start}-{wanted.stop - 1}"}
        for _ in range(MOST_REDIRECTS + 1):
            where = shown_url(url)
            try:
                response = self._connections.pool(url, location.named, direct=location.service == "rack").urlopen(
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
                raise unreachable(error, where) from error
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
        """The error for a refusal, from its status, headers and the beginning of its body."""
        body = b""
        with (
            contextlib.suppress(HTTPError, OSError, http.client.HTTPException, ValueError),
            self._connections.watchdog.deadline(socket_of(response), ERROR_BODY_SECONDS),
        ):
            body = response.read(MOST_ERROR_BODY) or b""
        hub = hub_word(response.headers)
        return refusal(
            response.status,
            where,
            service=location.service,
            word=hub if location.service == "hub" or hub.code else s3_word(body),
            retry_after=retry_after(response.headers.get("Retry-After"), time.time()),
        )

    def _receive(
        self, response: urllib3.BaseHTTPResponse, wanted: ByteRange, buffer: memoryview, sink: Sink, where: str
    ) -> bool:
        """Take the body; whether the connection may be used again."""
        connection, window = socket_of(response), self._settings.slow_window
        piece = FIRST_PIECE
        offset = wanted.start
        try:
            with (
                reading(response, connection, self._settings.stall_timeout) as read,
                self._connections.watchdog.deadline(connection, window) as deadline,
            ):
                while offset < wanted.stop:
                    filled = 0
                    limit = min(len(buffer), wanted.stop - offset)
                    while filled < limit:
                        sink.before_read()
                        deadline.start(window)
                        part = buffer[filled : min(filled + READ_BYTES, limit)]
                        count = 0
                        while count < len(part):
                            began = time.monotonic()
                            got = read(part[count : count + piece])
                            if not got:
                                break
                            count += got
                            sink.progress(got)
                            piece = next_piece(piece, time.monotonic() - began)
                        if deadline.expired:
                            raise OriginUnavailable(f"{where}: less than {len(part)} bytes came in {window:g} s")
                        deadline.rest()
                        filled += count
                        if count < len(part):
                            came = f"{offset + filled - wanted.start} of {wanted.length}"
                            raise OriginMisbehaved(f"{where}: the body ended after {came} bytes", fault=Fault.CUT)
                    sink.write(buffer[:filled], offset)
                    offset += filled
                return self._ended(read, buffer, connection, wanted, where)
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise unreachable(error, where) from error

    def _ended(
        self,
        read: Read,
        buffer: memoryview,
        connection: socket.socket | None,
        wanted: ByteRange,
        where: str,
    ) -> bool:
        """Look for the body's end behind its last byte; whether it was found. A body that is not ended (no length, and
        the connection stays open; trailers without end) holds all bytes that were asked for nevertheless.

        Raises:
            OriginMisbehaved: More bytes come.
        """
        more, deadline = 0, None
        try:
            with self._connections.watchdog.deadline(connection, END_SECONDS) as deadline:
                more = read(buffer[:1])
        except (TimeoutError, ReadTimeoutError):  # the connection's own time-out may be shorter
            return False
        except (HTTPError, OSError, http.client.HTTPException):
            if deadline is None or not deadline.expired:
                raise
        if more:
            raise OriginMisbehaved(
                f"{where}: the body is longer than the {wanted.length} bytes asked for", fault=Fault.LONG
            )
        return not deadline.expired

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


def new_buffer() -> memoryview:
    """A buffer for one fetching thread."""
    return memoryview(bytearray(BUFFER_BYTES))
