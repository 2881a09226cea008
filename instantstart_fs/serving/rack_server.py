"""Gives chunks to neighbours in the rack over HTTP/1.1: h11 reads the request, the kernel's sendfile(2) sends the body.

    GET /rack/v1/<slot>/<pin>/<chunk>?wait=<ms>&sealed=<0|1>      Authorization: Rack <expires>.<mac>
    206: 32 bytes (the chunk's keyed digest, zeros where only the seal says it), then the chunk
    403: no ticket of this region for this host and chunk · 404: nothing of it here · 503: busy, or not here yet

It serves an engine's host: connections, sends at once, bytes a second and the time of each step are bounded, and the
loop of the daemon does no more than the heads. Measured in docs/decisions/rack.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections import Counter

import h11
import trio

from instantstart_fs.config.descriptors import may_connect
from instantstart_fs.core import rack
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.errors import StoreError
from instantstart_fs.filler.region_rack import RackLevel
from instantstart_fs.ipc.sockets import listen_tcp, turn_away
from instantstart_fs.serving.rack_chunks import NotYet, Part, RackChunks

log = logging.getLogger(__name__)

MOST_CONNECTIONS, MOST_EACH = 256, 64
"""At once, and of one address."""
SENDS = 8
"""Bodies that are sent at once, each by a thread."""
HEAD_BYTES = 4096
HEAD_SECONDS = 5.0
"""For the head of a request, and between two requests."""
BODY_SECONDS = 20.0
"""For a whole chunk, and for the wait for its turn."""
TURN_SECONDS = 1.0
STALLED_SECONDS = 5.0
"""Without a byte that the neighbour takes."""
SLICE_BYTES = 1 << 20
BIND_SECONDS = 2.0
"""Between two tries to bind: a daemon that is being replaced has the port for a moment more."""
HEADER = 32
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def default_address() -> str | None:
    """This host's address on its default route; None without one. Sends nothing."""
    for family, there in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect((there, 9))
            return str(probe.getsockname()[0])
    return None


class RackServer:
    """On the trio thread. ``address``: where it answers, "" while it does not. ``listen``: ("", port) = at
    ``default_address``; ``rate``: bytes a second of all bodies."""

    def __init__(
        self, listen: tuple[str, int], rate: int, host: str, key: bytes, level: RackLevel, chunks: RackChunks
    ) -> None:
        self._listen = listen
        self._host = host
        self._key = key
        self._level = level
        self._chunks = chunks
        self.address = ""
        self._connected: Counter[str] = Counter()
        self._sends = trio.CapacityLimiter(SENDS)
        self._threads = trio.CapacityLimiter(SENDS)  # apart from those of the daemon's other work
        self._pace = threading.Lock()
        self._bucket = Bucket(rate, rate / 4, time.monotonic())
        self._ending = threading.Event()

    @property
    def connections(self) -> int:
        """How many neighbours' connections there are."""
        return self._connected.total()

    async def run(self) -> None:
        """Serve until cancelled."""
        listener = await self._bind()
        place, port = listener.getsockname()[:2]
        self.address = f"[{place}]:{port}" if ":" in place else f"{place}:{port}"
        log.info("neighbours in the rack get chunks at %s", self.address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_sends)
            await trio.serve_listeners(self._serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])

    async def _end_sends(self) -> None:
        """Let threads that send end at once when ``run`` is cancelled: it waits for them."""
        try:
            await trio.sleep_forever()
        finally:
            self.address = ""
            self._ending.set()

    async def _bind(self) -> socket.socket:
        told = ""
        while True:
            host, port = self._listen
            host = host or default_address() or ""
            try:
                if not host:
                    raise OSError(errno.EADDRNOTAVAIL, "this host has no default route")
                listener = listen_tcp(host, port)
                listener.setblocking(False)
                return listener
            except OSError as error:
                if told != str(error):
                    told = str(error)
                    log.warning(
                        "neighbours in the rack get nothing from this host: %s port %d: %s; set regional.rack_listen",
                        *(host or "no address", port, error.strerror or error),
                    )
            await trio.sleep(BIND_SECONDS)

    # -- a connection ------------------------------------------------------------------------------------------------

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                peer = str(stream.socket.getpeername()[0])
                full = self._connected.total() >= MOST_CONNECTIONS or self._connected[peer] >= MOST_EACH
                if full or not may_connect(stream.socket.fileno()):
                    self._level.refused["busy"] += 1
                    await turn_away(stream, BUSY)
                    return
                self._connected[peer] += 1
                try:
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_SECONDS * 1000))
                    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
                    while await self._one(connection, stream):
                        connection.start_next_cycle()
                finally:
                    self._connected[peer] -= 1
                    self._connected += Counter()  # forgets those with none
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the neighbour left in the middle
        except Exception:
            log.exception("a connection of a neighbour failed")

    async def _one(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        """Answer one request; whether another may follow."""
        try:
            with trio.move_on_after(HEAD_SECONDS) as slow:
                request = await self._request(connection, stream)
            if slow.cancelled_caught or request is None:
                return False
        except h11.RemoteProtocolError as error:
            self._level.refused["malformed"] += 1
            with contextlib.suppress(h11.LocalProtocolError):
                await self._refuse(connection, stream, error.error_status_hint)
            return False
        status, part = await self._answer(request)
        if part is None:
            return await self._refuse(connection, stream, status)
        try:
            return await self._send(connection, stream, part)
        finally:
            os.close(part.fd)

    @staticmethod
    async def _request(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
        """The next request, without a body; None at the end."""
        request = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(HEAD_BYTES))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.Data):
                raise h11.RemoteProtocolError("a request has no body here")
            else:
                return None

    async def _answer(self, request: h11.Request) -> tuple[int, Part | None]:
        """The status, and the chunk with 206."""
        asked = rack.asked_by(request.target.decode("ascii", "replace"))
        tickets = [value.decode("ascii", "replace") for name, value in request.headers if name == b"authorization"]
        if request.method != b"GET" or asked is None:
            return self._refused("malformed", 400)
        now = self._level.clock()
        if now is None:
            return self._refused("busy", 503)
        if len(tickets) != 1 or not rack.is_ticket(self._key, self._host, asked, tickets[0], now):
            return self._refused("ticket", 403)
        try:
            part = await self._chunks.find(asked)
        except NotYet:
            return self._refused("later", 503)
        except StoreError:
            return self._refused("nothing", 404)
        except OSError:
            return self._refused("busy", 503)
        return (206, part) if part is not None else self._refused("nothing", 404)

    def _refused(self, reason: str, status: int) -> tuple[int, None]:
        self._level.refused[reason] += 1
        return status, None

    @staticmethod
    async def _refuse(connection: h11.Connection, stream: trio.SocketStream, status: int) -> bool:
        headers = [("Content-Length", "0"), *([("Retry-After", "1")] if status == 503 else [])]
        head = connection.send(h11.Response(status_code=status, headers=headers)) or b""
        end = connection.send(h11.EndOfMessage()) or b""
        with trio.move_on_after(STALLED_SECONDS) as stalled:
            await stream.send_all(head + end)
        return not stalled.cancelled_caught and connection.our_state is h11.DONE and status not in (400, 431)

    async def _send(self, connection: h11.Connection, stream: trio.SocketStream, part: Part) -> bool:
        turn = object()
        with trio.move_on_after(TURN_SECONDS) as waited:
            await self._sends.acquire_on_behalf_of(turn)
        if waited.cancelled_caught:
            return await self._refuse(connection, stream, self._refused("busy", 503)[0])
        try:
            size = HEADER + part.length
            headers = [("Content-Length", str(size)), ("Content-Range", f"bytes 0-{size - 1}/{size}")]
            head = connection.send(h11.Response(status_code=206, headers=headers)) or b""
            with trio.move_on_after(STALLED_SECONDS) as stalled:
                await stream.send_all(head + (part.digest or bytes(HEADER)))
            if stalled.cancelled_caught:
                return False
            # h11 counts the bytes, and does not look at them: that is how it lets sendfile in.
            connection.send_with_data_passthrough(h11.Data(data=_Sized(size)))  # type: ignore[arg-type]
            connection.send(h11.EndOfMessage())
            sent = await trio.to_thread.run_sync(
                self._sendfile, stream.socket.fileno(), part, abandon_on_cancel=False, limiter=self._threads
            )
            self._level.given_bytes += sent
            return sent == part.length and connection.our_state is h11.DONE
        finally:
            self._sends.release_on_behalf_of(turn)

    def _sendfile(self, peer: int, part: Part) -> int:
        """In a thread: send the chunk; how many bytes the neighbour took. Ends soon after ``run`` was cancelled."""
        end, sent = time.monotonic() + BODY_SECONDS, 0
        poll = select.poll()
        poll.register(peer, select.POLLOUT)
        while sent < part.length and not self._ending.is_set():
            count = min(SLICE_BYTES, part.length - sent)
            with self._pace:
                wait = self._bucket.take(time.monotonic(), count)
            if self._ending.wait(wait) if wait else False:
                break
            upto, moved = sent + count, time.monotonic()
            while sent < upto:
                now = time.monotonic()
                if now >= end or now - moved >= STALLED_SECONDS or self._ending.is_set():
                    return sent
                try:
                    taken = os.sendfile(peer, part.fd, part.offset + sent, upto - sent)
                except BlockingIOError:
                    poll.poll(500)
                    continue
                except OSError:
                    return sent
                if taken == 0:  # the file was cut short
                    return sent
                sent, moved = sent + taken, now
        return sent


class _Sized:
    """Stands for bytes that go another way."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size
