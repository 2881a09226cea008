"""How a body is read from its socket: the bytes that were sent, whatever is read ahead, and no wait without an end."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantstart_fs.filler.body import reading

BYTES = os.urandom(64 * 1024)
STALL = 5.0


class Answered:
    """An answer that has begun to come over a real connection. ``there``: the server's end."""

    def __init__(self, head: str, timeout: float = STALL) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.here = socket.create_connection(server.getsockname())
            self.there, _ = server.accept()
        self.here.settimeout(timeout)
        self.there.sendall(f"HTTP/1.1 206 Partial\r\n{head}\r\n\r\n".encode())

    def begin(self) -> None:
        self.http = http.client.HTTPResponse(self.here, method="GET")
        self.http.begin()
        self.response = SimpleNamespace(_fp=self.http, readinto=self.http.readinto)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.there.close()
        self.http.close()
        self.here.close()


@contextlib.contextmanager
def answered(head: str, first: bytes = b"", timeout: float = STALL) -> Iterator[Answered]:
    """``first``: what comes with the headers."""
    answer = Answered(head, timeout)
    answer.there.sendall(first)
    answer.begin()
    try:
        yield answer
    finally:
        answer.close()


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, len(BYTES)),
    ahead=st.integers(0, 20_000),
    pieces=st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    sent=st.lists(st.integers(1, 30_000), min_size=1, max_size=6),
)
def test_what_is_read_is_what_was_sent(length: int, ahead: int, pieces: list[int], sent: list[int]) -> None:
    body = BYTES[:length]
    ahead = min(ahead, length)
    with answered(f"Content-Length: {length}", body[:ahead]) as answer:

        def send() -> None:
            offset, turn = ahead, 0
            while offset < length:
                part = body[offset : offset + sent[turn % len(sent)]]
                answer.there.sendall(part)
                offset, turn = offset + len(part), turn + 1
            # The next answer on the same connection must be left where it is.
            answer.there.sendall(b"HTTP/1.1 204 None\r\n\r\n")

        thread = threading.Thread(target=send)
        thread.start()
        buffer, found, turn = memoryview(bytearray(9000)), b"", 0
        with reading(answer.response, answer.here, STALL) as read:
            while count := read(buffer[: pieces[turn % len(pieces)]]):
                assert count <= pieces[turn % len(pieces)]
                found, turn = found + bytes(buffer[:count]), turn + 1
        thread.join()
        assert found == body
        assert answer.here.gettimeout() == STALL
        assert answer.http.isclosed()


def test_a_read_takes_all_of_a_piece_though_it_comes_in_parts() -> None:
    with answered("Content-Length: 50000", BYTES[:10]) as answer, reading(answer.response, answer.here, STALL) as read:
        buffer = memoryview(bytearray(40_000))
        assert read(buffer) == 10
        threading.Thread(target=lambda: [answer.there.sendall(BYTES[:1000]) for _ in range(41)]).start()
        assert read(buffer) == 40_000


def test_a_silent_connection_ends_the_read_in_time_and_what_came_before_is_given() -> None:
    with answered("Content-Length: 50000", BYTES[:10]) as answer, reading(answer.response, answer.here, 0.3) as read:
        buffer = memoryview(bytearray(40_000))
        assert read(buffer) == 10
        answer.there.sendall(BYTES[:500])
        assert read(buffer) == 500
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            read(buffer)
        assert 0.25 < time.monotonic() - began < 3.0


def test_a_last_byte_that_is_late_is_waited_for() -> None:
    with answered("Content-Length: 50000", BYTES[:10]) as answer, reading(answer.response, answer.here, STALL) as read:
        buffer = memoryview(bytearray(60_000))
        assert read(buffer) == 10
        answer.there.sendall(BYTES[10:49_999])
        assert read(buffer) == 49_989
        threading.Timer(2.5, lambda: answer.there.sendall(b"x")).start()
        assert read(buffer) == 1
        assert read(buffer) == 0


def test_the_end_of_the_connection_is_the_end_of_the_body() -> None:
    with answered("Content-Length: 50000", BYTES[:10]) as answer, reading(answer.response, answer.here, STALL) as read:
        buffer = memoryview(bytearray(40_000))
        assert read(buffer) == 10
        answer.there.sendall(BYTES[:500])
        answer.there.close()
        assert read(buffer) == 500
        assert read(buffer) == 0


def test_another_thread_that_shuts_the_connection_down_ends_the_read() -> None:
    with answered("Content-Length: 50000", BYTES[:10]) as answer, reading(answer.response, answer.here, STALL) as read:
        buffer = memoryview(bytearray(40_000))
        assert read(buffer) == 10
        timer = threading.Timer(0.1, lambda: answer.here.shutdown(socket.SHUT_RDWR))
        timer.start()
        assert read(buffer) == 0
        timer.join()


@pytest.mark.parametrize("head", ["Transfer-Encoding: chunked", "Connection: close"])
def test_a_body_without_a_length_is_read_by_http_client(head: str) -> None:
    sent = b"5\r\nhello\r\n0\r\n\r\n" if "chunked" in head else b"hello"
    with answered(head, sent) as answer:
        answer.there.shutdown(socket.SHUT_WR)
        with reading(answer.response, answer.here, STALL) as read:
            buffer = memoryview(bytearray(100))
            assert bytes(buffer[: read(buffer)]) == b"hello"
            assert read(buffer) == 0
        assert answer.here.gettimeout() == STALL
