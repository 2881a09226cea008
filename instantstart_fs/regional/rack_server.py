"""The rack's serving process: ``python -m instantstart_fs.regional.rack_server CONTROL_FD LISTEN_FD``.

Gives neighbours in the rack byte ranges of files that this host has, by sendfile(2), to whoever shows a ticket
(core/rack.py). It opens nothing and knows no key but the rack's: the daemon hands it a descriptor for each file that it
may serve, and takes it back. A process of its own, at the lowest priorities of processor and disk, without root's
rights, bounded in connections, in streams and in rate: an engine on this host must not notice it, and whatever it does
wrong the neighbour finds out by the chunk's digest and takes the tier. It ends with its control socket.

    GET /v1/clock                                 {"epoch", "clock"}: what a ticket is made with
    GET /v1/SLOT/GENERATION/FILE, Range, ticket   206; 401 no good ticket, 404 not here, 503 too many at once

Packets on the SOCK_SEQPACKET control socket are JSON objects:

    → {"key": hex, "connections": n, "streams": n, "rate": bytes a second or 0}        first of all, once
    ← {"ask": n, "path": "SLOT/GENERATION/FILE", "first": a, "stop": b}                may these bytes be served?
    → {"answer": n, "path", "size", "whole"} with a descriptor: yes; whole = all of the file's bytes from now on
    → {"answer": n}                                                                    no
    → {"drop": path}                                                                   its descriptor is to be closed
    ← {"sent": bytes, "streams": n, "refused": n}                                      since the last such packet
"""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import http
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

from instantstart_fs.core.rack import check_ticket, parse_range
from instantstart_fs.core.ratelimit import Bucket

MOST_RANGE = 512 * 1024 * 1024
"""Of one request."""
BLOCK = 1024 * 1024
"""Between two of them the rate is looked at."""
MOST_HEADER = 8 * 1024
HEADER_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""Without a request, a connection ends."""
SEND_SECONDS = 10
"""Without a byte taken, a neighbour is gone."""
ANSWER_SECONDS = 2.0
"""The daemon has so long to say whether something may be served."""
MOST_FILES = 64
"""Descriptors kept open."""
NOBODY = 65534
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_IDLE = 3 << 13


class Refused(Exception):
    """The request is answered so; ``close``: and is the last of its connection."""

    def __init__(self, status: http.HTTPStatus, *, close: bool = False) -> None:
        self.status, self.close = status, close


class _File:
    """``users``: streams that send from it now; closed when it is dropped and has none."""

    def __init__(self, descriptor: int, size: int, whole: bool) -> None:
        self.descriptor, self.size, self.whole = descriptor, size, whole
        self.users = 0
        self.dropped = False


class Catalog:
    """The files that may be served, as the daemon says. Thread-safe."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._changed = threading.Condition()
        self._files: collections.OrderedDict[str, _File] = collections.OrderedDict()
        self._answers: dict[int, _File | None] = {}
        self._number = 0

    def take(self, path: str, first: int, stop: int) -> _File:
        """Raises Refused: not here. ``give_back`` it."""
        with self._changed:
            file = self._files.get(path)
            if file is None or not file.whole:
                file = self._ask(path, first, stop)
            if file is None or stop > file.size:
                raise Refused(http.HTTPStatus.NOT_FOUND)
            file.users += 1
            return file

    def give_back(self, file: _File) -> None:
        with self._changed:
            file.users -= 1
            self._close_unused(file)

    def _ask(self, path: str, first: int, stop: int) -> _File | None:
        self._number += 1
        number = self._number
        question = {"ask": number, "path": path, "first": first, "stop": stop}
        self._control.send(json.dumps(question).encode())
        self._changed.wait_for(lambda: number in self._answers, ANSWER_SECONDS)
        return self._answers.pop(number, None)

    def answered(self, number: int, path: str, file: _File | None) -> None:
        with self._changed:
            if file is not None:
                self._drop(path)
                self._files[path] = file
                while len(self._files) > MOST_FILES:
                    self._drop(next(iter(self._files)))
            self._answers[number] = file
            while len(self._answers) > 4 * MOST_FILES:  # of those that waited no longer
                del self._answers[next(iter(self._answers))]
            self._changed.notify_all()

    def drop(self, path: str) -> None:
        with self._changed:
            self._drop(path)

    def _drop(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            file.dropped = True
            self._close_unused(file)

    def _close_unused(self, file: _File) -> None:
        if file.dropped and not file.users:
            os.close(file.descriptor)


class Server:
    """``streams`` at once of ``connections``, together at ``rate`` bytes a second (0: without limit)."""

    def __init__(self, catalog: Catalog, key: bytes, connections: int, streams: int, rate: float) -> None:
        self.epoch = secrets.token_hex(16)
        self._started = time.monotonic()
        self._catalog, self._key = catalog, key
        self._connections = threading.BoundedSemaphore(connections)
        self._streams = threading.BoundedSemaphore(streams)
        self._rate = Bucket(rate, max(rate / 10, BLOCK), time.monotonic()) if rate else None
        self._counting = threading.Lock()
        self.counted = collections.Counter[str]()

    def clock(self) -> float:
        return time.monotonic() - self._started

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.1)
                continue
            if not self._connections.acquire(blocking=False):
                self._count("refused")
                with contextlib.suppress(OSError):
                    connection.send(_head(http.HTTPStatus.SERVICE_UNAVAILABLE, 0, close=True))
                connection.close()
                continue
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _count(self, what: str, by: int = 1) -> None:
        with self._counting:
            self.counted[what] += by

    def taken(self) -> dict[str, int]:
        """What was counted since the last time."""
        with self._counting:
            counted, self.counted = self.counted, collections.Counter()
        return dict(counted)

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                limit = struct.pack("ll", SEND_SECONDS, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                rest = b""
                while True:
                    request, rest = _receive(connection, rest)
                    if request is None:
                        return
                    try:
                        self._answer(connection, request)
                    except Refused as refused:
                        self._count("refused")
                        connection.sendall(_head(refused.status, 0, close=refused.close))
                        if refused.close:
                            return
        except OSError:
            pass  # the neighbour has gone, or takes nothing: its business
        finally:
            self._connections.release()

    def _answer(self, connection: socket.socket, request: bytes) -> None:
        line, *lines = request.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or words[0] != "GET" or not words[2].startswith("HTTP/1."):
            raise Refused(http.HTTPStatus.BAD_REQUEST, close=True)
        path = words[1]
        if path == "/v1/clock":
            body = json.dumps({"epoch": self.epoch, "clock": self.clock()}).encode()
            connection.sendall(_head(http.HTTPStatus.OK, len(body)) + body)
            return
        headers = {name.strip().lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        shown = headers.get("authorization", "").removeprefix("Ticket ")
        if check_ticket(self._key, path, self.epoch, self.clock(), shown) is not None:
            raise Refused(http.HTTPStatus.UNAUTHORIZED)
        wanted = parse_range(headers.get("range"), MOST_RANGE)
        if wanted is None or not path.startswith("/v1/"):
            raise Refused(http.HTTPStatus.BAD_REQUEST, close=True)
        if not self._streams.acquire(blocking=False):
            raise Refused(http.HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            file = self._catalog.take(path.removeprefix("/v1/"), *wanted)
            try:
                self._count("streams")
                self._send(connection, file, *wanted)
            finally:
                self._catalog.give_back(file)
        finally:
            self._streams.release()

    def _send(self, connection: socket.socket, file: _File, first: int, stop: int) -> None:
        span = f"Content-Range: bytes {first}-{stop - 1}/{file.size}\r\n"
        connection.sendall(_head(http.HTTPStatus.PARTIAL_CONTENT, stop - first, span), socket.MSG_MORE)
        while first < stop:
            count = min(BLOCK, stop - first)
            if self._rate is not None:
                with self._counting:
                    wait = self._rate.take(time.monotonic(), count)
                time.sleep(wait)
            sent = os.sendfile(connection.fileno(), file.descriptor, first, count)
            if sent == 0:
                raise OSError(errno.EIO, "the file is shorter than it was")
            first += sent
            self._count("sent", sent)


def _head(status: http.HTTPStatus, length: int, more: str = "", *, close: bool = False) -> bytes:
    closing = "Connection: close\r\n" if close else ""
    text = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {length}\r\n{more}{closing}\r\n"
    return text.encode()


def _receive(connection: socket.socket, rest: bytes) -> tuple[bytes | None, bytes]:
    """(one request's lines without the last empty one, what came behind it). None: there is no more, or it is none."""
    deadline = time.monotonic() + IDLE_SECONDS
    begun = False
    while b"\r\n\r\n" not in rest:
        if rest and not begun:
            begun = True
            deadline = time.monotonic() + HEADER_SECONDS
        left = deadline - time.monotonic()
        if left <= 0 or len(rest) > MOST_HEADER:
            return None, b""
        seconds, fraction = divmod(left, 1)
        limit = struct.pack("ll", int(seconds), max(1000, int(fraction * 1e6)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        more = connection.recv(MOST_HEADER)
        if not more:
            return None, b""
        rest += more
    request, _, rest = rest.partition(b"\r\n\r\n")
    return request, rest


def _behave() -> None:
    """Last in every queue, and nobody's rights: what is served was opened by somebody else."""
    os.nice(19)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).syscall(_IOPRIO_SET[os.uname().machine], 1, 0, _IOPRIO_IDLE)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _receive_packet(control: socket.socket) -> tuple[dict[str, Any], int] | None:
    """(the packet, its descriptor or -1); None at the end."""
    data, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_SPACE(4))
    if not data:
        return None
    descriptor = -1
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            (descriptor,) = array.array("i", content)
    return json.loads(data), descriptor


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    first = _receive_packet(control)
    if first is None:
        return
    settings, _ = first
    # A daemon that is stuck holds nobody up for longer than its answer may take.
    control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(ANSWER_SECONDS), 0))
    _behave()
    catalog = Catalog(control)
    key = bytes.fromhex(settings["key"])
    server = Server(catalog, key, settings["connections"], settings["streams"], settings["rate"])

    def report() -> None:
        while True:
            time.sleep(1.0)
            if counted := server.taken():
                control.send(json.dumps(counted).encode())

    for work in (report, lambda: server.serve(listener)):
        threading.Thread(target=work, daemon=True).start()
    while (packet := _receive_packet(control)) is not None:
        message, descriptor = packet
        if "drop" in message:
            catalog.drop(message["drop"])
        elif descriptor >= 0:
            file = _File(descriptor, message["size"], message["whole"])
            catalog.answered(message["answer"], message["path"], file)
        else:
            catalog.answered(message["answer"], "", None)


if __name__ == "__main__":
    main()
    os._exit(0)  # threads wait for neighbours, who are not told good-bye
