"""Servers and proxies that do not do what HTTP says: what is made of them, and where asking ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import trio

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import OriginIncompatible
from instantstart_fs.filler.fetch import BUFFER_BYTES
from instantstart_fs.filler.target import FileState
from instantstart_fs.index.environment import Index
from instantstart_fs.store.blobstore import BlobStore
from tests.component.byteserver import ByteServer, FakeOrigin, Handler, content, make_target, sha256
from tests.component.test_filler import CHUNK, filling, server, stored, until, wait_state

__all__ = ["server"]


def _whole(data: bytes, pause: Callable[[Handler, int], None] = lambda handler, sent: None) -> Callable[..., bool]:
    """The whole file whatever is asked for; ``pause`` is called after each buffer of it."""

    def answer(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for offset in range(0, len(data), BUFFER_BYTES):
                handler.wfile.write(data[offset : offset + BUFFER_BYTES])
                pause(handler, offset + BUFFER_BYTES)
        return True

    return answer


async def test_a_file_comes_by_one_stream_where_ranges_are_ignored(
    server: ByteServer, store: BlobStore, index: Index
) -> None:
    data = content(3 * BUFFER_BYTES + 4321, 1)
    begun, gate = threading.Event(), threading.Event()

    def wait(handler: Handler, sent: int) -> None:
        begun.set()
        gate.wait(20)

    server.fault = _whole(data, wait)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.fill("p", [target])
        await trio.to_thread.run_sync(begun.wait, 20)
        await target.wait_readable(ByteRange(0, BUFFER_BYTES), 10)
        last = ByteRange(len(data) - 10, len(data))
        filler.demand(target, last)  # behind what the stream has brought so far: it waits
        assert not target.readable(last)
        gate.set()
        await target.wait_readable(last, 10)
        await wait_state([target], FileState.SEALED)
        assert len(set(server.log)) == len(server.log), "what was asked for at once with the stream is not asked again"
        assert filler.statistics().fetched_bytes == len(data)
        assert filler.statistics().in_flight == 0
    assert stored(target) == data
    assert not [error for error in events.of("failure") if error is not None]


@pytest.mark.parametrize("loss", ["connection", "worker"])
async def test_a_stream_that_breaks_begins_again(server: ByteServer, store: BlobStore, index: Index, loss: str) -> None:
    data = content(3 * BUFFER_BYTES, 2)
    broken: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def once(handler: Handler, sent: int) -> None:
        if sent == 2 * BUFFER_BYTES and not gate.is_set():
            broken.append(sent)
            begun.set()
            gate.wait(20)
            if loss == "connection":
                handler.close_connection = True
                raise BrokenPipeError

    server.fault = _whole(data, once)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await trio.to_thread.run_sync(begun.wait, 20)
        if loss == "worker":
            os.kill(filler.worker_pids()[0], signal.SIGKILL)
        gate.set()
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data and broken


def _answer(status: int, body: bytes, **headers: str) -> Callable[[Handler, str, int, int], bool]:
    def answer(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(status)
        given = {"Content_Length": str(len(body)), "Content_Range": f"bytes {start}-{stop - 1}/{3 * CHUNK}"} | headers
        for name, value in given.items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return answer


def _said(words: bytes) -> Callable[[Handler, str, int, int], bool]:
    def answer(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.close_connection = True
        handler.wfile.write(words)
        return True

    return answer


FAULTS = {
    "encoded on the way": _answer(200, b"x" * 77, Content_Encoding="gzip", Content_Range=""),
    "the wrong range": _answer(206, b"x" * CHUNK, Content_Range=f"bytes 1-{CHUNK}/{3 * CHUNK}"),
    "no range": _answer(206, b"x" * CHUNK, Content_Range=""),
    "too few bytes": _answer(206, b"x" * 9),
    "a loop": _answer(302, b"", Location="/a"),
    "inside": _answer(302, b"", Location="http://127.0.0.2:1/"),
    "a local file": _answer(302, b"", Location="file:///etc/shadow"),
    "no place to go": _answer(302, b""),
    "a status of its own": _answer(299, b""),
    "a login page": _answer(418, b"who are you?"),
    "nothing, and content with it": _answer(204, b"", Content_Length="", Content_Range=""),
    "not modified": _answer(304, b"", Content_Length="", Content_Range=""),
    "an empty file": _answer(200, b"", Content_Range="", ETag='"pinned"'),
    "parts": _answer(
        206, b"--x\r\n\r\nabc\r\n--x--", Content_Range="", Content_Type="multipart/byteranges; boundary=x"
    ),
    "a range of another length": _answer(206, b"x" * 9, Content_Range="bytes 0-8/9"),
    "another protocol": _said(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "headers without end": _said(b"HTTP/1.1 206 Partial Content\r\n" + b"X: y\r\n" * 200),
    "the same place again": _answer(307, b"", Location=""),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_never_mends_is_not_asked_for_ever(
    server: ByteServer, store: BlobStore, index: Index, fault: str
) -> None:
    data = server.files["a"] = content(3 * CHUNK, 3)
    server.fault = FAULTS[fault]
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.fill("p", [target])
        with pytest.raises(OriginIncompatible) as caught:
            await target.wait_readable(ByteRange(0, 1), 20)
        assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)
        assert not filler.is_filling("p")
        assert len(events.of("failed")) == 1
        await filler.wait_quiet("p")
        await until(lambda: server.running == 0)
        await trio.sleep(0.05)  # a request that was just being sent
        asked = len(server.log)
        assert asked <= 10 * 4
        # A reader that comes later is told at once, however much later.
        target.failed_at -= 3600.0
        filler.demand(target, ByteRange(0, 1))
        with pytest.raises(OriginIncompatible):
            await target.wait_readable(ByteRange(0, 1), 20)
        again = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data), incarnation=1)
        filler.demand(again, ByteRange(0, 1))
        with pytest.raises(OriginIncompatible):
            await again.wait_readable(ByteRange(0, 1), 20)
        assert len(server.log) == asked
        # Somebody mended it, and asks on purpose.
        server.fault = None
        filler.reset_failures("p")
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data


def _raw(head: bytes, more: bytes = b"") -> Callable[[Handler, str, int, int], bool]:
    """An answer with these lines in its head, the right bytes, and ``more`` behind them. ``%d``: its length."""

    def answer(handler: Handler, path: str, start: int, stop: int) -> bool:
        body = handler.server.files[path]
        said = b"Content-Range: bytes %d-%d/%d\r\n" % (start, stop - 1, len(body))
        handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\n" + said + head.replace(b"%d", b"%d" % (stop - start)))
        handler.wfile.write(b"\r\n" + body[start:stop] + more)
        return True

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        _raw(b"Content-Length: %d\r\n", b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nbad"),
        _raw(b"Content-Length: %d\r\n", b"\r\n\0\0\0"),
        _raw(b'content-length: %d\r\nX: y\r\nETag: W/"a"\r\nETag: b\r\n'),
    ],
    ids=["another answer that nobody asked for", "bytes behind its end", "two etags, and none is pinned"],
)
async def test_what_comes_behind_an_answer_is_no_part_of_the_next(
    server: ByteServer, store: BlobStore, index: Index, answer: Callable[[Handler, str, int, int], bool]
) -> None:
    data = server.files["a"] = content(6 * CHUNK, 6)
    server.fault = answer
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\nContent-Length: 7\r\n",
        b"Content-Length: 7\r\nContent-Length: %d\r\n",
        b"Content-Length: -%d\r\n",
        b"Content-Length: 0x%d\r\n",
        b"Content-Length: %d\r\nContent-Encoding: gzip\r\nContent-Range: bytes 0-6/7\r\n",
    ],
)
async def test_lengths_that_contradict_each_other_are_no_answer(
    server: ByteServer, store: BlobStore, index: Index, head: bytes
) -> None:
    data = server.files["a"] = content(2 * CHUNK, 7)
    server.fault = _raw(head)
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        with pytest.raises(OriginIncompatible):
            await target.wait_readable(ByteRange(0, 1), 20)
        assert not target.readable(ByteRange(0, 1))


async def test_a_misbehaviour_that_passes_ends_nothing(server: ByteServer, store: BlobStore, index: Index) -> None:
    """Every chunk meets each fault once: never the same one often enough in a row."""
    data = server.files["a"] = content(3 * CHUNK, 4)
    kinds = ["encoded on the way", "the wrong range", "no place to go", "too few bytes"]
    met: dict[int, int] = {}

    def some(handler: Handler, path: str, start: int, stop: int) -> bool:
        count = met[start] = met.get(start, -1) + 1
        return FAULTS[kinds[count]](handler, path, start, stop) if count < len(kinds) else False

    server.fault = some
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, _):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
    assert stored(target) == data


def _endless(handler: Handler, body: bytes, start: int, stop: int, how: str) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
    if how != "no length":
        handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    part = body[start:stop]
    handler.wfile.write(part if how == "no length" else b"%x\r\n%b\r\n" % (len(part), part))
    for byte in {"no length": b"", "trailers": b"0\r\n" + b"X-A: b\r\n" * 1000, "half an end": b"0"}[how]:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)
    handler.rfile.read(1)  # until the client hangs up
    handler.close_connection = True


@pytest.mark.parametrize("how", ["no length", "trailers", "half an end"])
async def test_a_body_without_an_end_is_whole_when_its_bytes_are_there(
    server: ByteServer, store: BlobStore, index: Index, how: str
) -> None:
    """Else it holds its connection, and with it a thread of the fetch process, for as long as the server likes."""
    data = server.files["a"] = content(2 * CHUNK, 5)

    def answer(handler: Handler, path: str, start: int, stop: int) -> bool:
        with contextlib.suppress(OSError):
            _endless(handler, data, start, stop, how)
        return True

    server.fault = answer
    target = make_target(store, FakeOrigin(server.url), "a", len(data), digest=sha256(data))
    async with filling(store, index) as (filler, events):
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED, 50)
        assert not [error for error in events.of("failure") if error is not None]
    assert stored(target) == data
    assert len(server.log) == 2, "each chunk was asked for once"
