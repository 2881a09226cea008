"""The fetch process by itself: a real process on a socket pair, no scheduler."""

from __future__ import annotations

import array
import base64
import contextlib
import gzip
import hashlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from instantstart_fs.core.addresses import LOOPBACK
from instantstart_fs.core.manifest import Algorithm, Digest
from instantstart_fs.core.refusals import Service
from instantstart_fs.core.urls import shown_url
from instantstart_fs.filler.fetch import BUFFER_BYTES
from instantstart_fs.filler.messages import (
    PAUSE,
    PAUSE_SIZE,
    Arrived,
    Closed,
    CloseFile,
    Failed,
    Fetch,
    Hashed,
    OpenFile,
    Order,
    Ping,
    Pong,
    Progress,
    Ready,
    Report,
    SetLocation,
    Stop,
    Streamed,
    Waits,
    WorkerSettings,
    decode_reports,
    encode,
    packet,
)
from instantstart_fs.origins.base import Location
from instantstart_fs.origins.guard import MOST_REDIRECTS
from tests.component.byteserver import ByteServer, Handler, black_hole, byte_server, content

CHUNK = 64 * 1024
ROOT = Path(__file__).parents[2]


class RunningWorker:
    def __init__(self, settings: WorkerSettings, environment: dict[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.heard: list[Report] = []
        self.pause_fd = os.memfd_create("pause")
        os.ftruncate(self.pause_fd, PAUSE_SIZE)
        self.pause = mmap.mmap(self.pause_fd, PAUSE_SIZE)
        self.lock = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``close``)
        fds = (theirs.fileno(), self.lock.fileno(), self.pause_fd)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "instantstart_fs.filler.worker",
                *map(str, fds),
                msgspec.json.encode(settings).decode(),
            ],
            pass_fds=fds,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        theirs.close()
        assert isinstance(self.hear(), Ready)

    def tell(self, order: Order, fd: int | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        self.socket.sendmsg([packet([encode(order)])], rights)

    def hear(self) -> Report:
        while not self.heard:
            received = self.socket.recv(1 << 20)
            assert received, "the worker is gone"
            self.heard += decode_reports(received)
        report = self.heard.pop(0)
        # How long the answer took is nothing to compare by.
        return msgspec.structs.replace(report, answered=None) if isinstance(report, Arrived) else report

    def hear_all(self, count: int) -> list[Report]:
        return [self.hear() for _ in range(count)]

    def close(self) -> None:
        self.socket.close()
        try:
            assert self.process.wait(5) == 0
        finally:
            self.process.kill()
            self.process.wait(5)
            self.lock.close()
            self.pause.close()
            os.close(self.pause_fd)


@pytest.fixture
def worker() -> Iterator[RunningWorker]:
    running = RunningWorker(WorkerSettings(connect_timeout=2, stall_timeout=0.5), {})
    yield running
    running.close()


@pytest.fixture
def server() -> Iterator[ByteServer]:
    with byte_server() as running:
        yield running


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "blob", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def open_order(data: bytes, digest: Digest | None, present: int = 0) -> OpenFile:
    chunks = -(-len(data) // CHUNK)
    return OpenFile(1, "blob", len(data), CHUNK, digest, present.to_bytes(-(-chunks // 8), "little"))


def answer_of(worker: RunningWorker, url: str, data: bytes, blob: int, **location: object) -> Report:
    os.ftruncate(blob, len(data))
    worker.tell(open_order(data, None), blob)
    worker.tell(SetLocation(1, Location(url, named=LOOPBACK, **location)))  # type: ignore[arg-type]
    worker.tell(Fetch(7, 1, 0, True))
    return worker.hear()


def test_an_answer_of_another_commit_than_expected_is_refused(
    worker: RunningWorker, server: ByteServer, blob: int
) -> None:
    data = server.files["a"] = content(1000, 1)
    report = answer_of(worker, server.url + "/a", data, blob, commit="c" * 40)  # it names none
    assert isinstance(report, Failed) and report.code == "origin-changed" and "c" * 40 in report.message


def test_a_fetch_that_is_stopped_lets_go_of_its_connection_and_writes_nothing(
    worker: RunningWorker, server: ByteServer, blob: int
) -> None:
    data = server.files["a"] = content(2 * CHUNK, 1)
    released, asked = threading.Event(), threading.Event()

    def hang(handler: Handler, path: str, start: int, stop: int) -> bool:
        if asked.is_set():
            return False
        asked.set()
        handler.request.settimeout(20)
        if handler.request.recv(1) == b"":
            released.set()
        handler.close_connection = True
        return True

    server.fault = hang
    os.ftruncate(blob, len(data))
    worker.tell(open_order(data, None), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    worker.tell(Fetch(7, 1, 0, True))
    assert asked.wait(10)
    worker.tell(Stop(7, 1, 0))
    assert released.wait(5), "not only when its time is up"
    worker.tell(Fetch(8, 1, 0, True))
    report = worker.hear()
    assert isinstance(report, Arrived) and report.request == 8, "and nothing was said of the first"
    # One that has just come when it is stopped is not fetched again: it may be hashed.
    fetched = len(server.log)
    worker.tell(Stop(8, 1, 0))
    worker.tell(Fetch(9, 1, 0, True))
    report = worker.hear()
    assert isinstance(report, Arrived) and report.request == 9
    assert len(server.log) == fetched
    assert os.pread(blob, CHUNK, 0) == data[:CHUNK]


@pytest.mark.parametrize("algorithm", ["sha256", "sha1", "md5", "git-sha1", "crc32", "crc32c"])
def test_chunks_in_any_order_are_written_and_hashed(
    worker: RunningWorker, server: ByteServer, blob: int, algorithm: Algorithm
) -> None:
    data = server.files["a"] = content(5 * CHUNK + 77, 1)
    os.ftruncate(blob, len(data))
    worker.tell(open_order(data, Digest(algorithm, "00")), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    for number, chunk in enumerate((5, 0, 3, 1, 4, 2)):
        worker.tell(Fetch(number, 1, chunk, False))
    reports = worker.hear_all(7)
    assert sorted(report.request for report in reports if isinstance(report, Arrived)) == list(range(6))
    (hashed,) = [report for report in reports if isinstance(report, Hashed)]
    expected = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "sha1": hashlib.sha1(data).hexdigest(),
        "md5": hashlib.md5(data).hexdigest(),
        "git-sha1": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        "crc32": f"{zlib.crc32(data):08x}",
    }
    if algorithm == "crc32c":
        from awscrt import checksums

        expected["crc32c"] = f"{checksums.crc32c(data):08x}"
    assert hashed.digest == expected[algorithm]
    assert os.pread(blob, len(data), 0) == data


def test_what_is_present_already_is_hashed_from_the_store(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = server.files["a"] = content(3 * CHUNK, 2)
    os.pwrite(blob, data[: 2 * CHUNK], 0)
    os.ftruncate(blob, len(data))
    worker.tell(open_order(data, Digest("sha256", ""), present=0b011), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    worker.tell(Fetch(1, 1, 2, False))
    reports = worker.hear_all(2)
    assert Hashed(1, hashlib.sha256(data).hexdigest()) in reports
    assert server.log == [("a", 2 * CHUNK, 3 * CHUNK)]


def test_an_empty_file_is_hashed_at_once(worker: RunningWorker, blob: int) -> None:
    worker.tell(open_order(b"", Digest("sha256", "")), blob)
    assert worker.hear() == Hashed(1, hashlib.sha256(b"").hexdigest())


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (401, {}, "location-expired"),
        (403, {}, "location-expired"),
        (404, {}, "location-expired"),
        (412, {}, "origin-changed"),
        (416, {}, "origin-changed"),
        (429, {"Retry_After": "3"}, "origin-throttled"),
        (503, {}, "origin-throttled"),
        (500, {}, "origin-unavailable"),
        (302, {}, "origin-misbehaved"),
        (418, {}, "origin-misbehaved"),
    ],
)
def test_statuses(
    worker: RunningWorker, server: ByteServer, blob: int, status: int, headers: dict[str, str], code: str
) -> None:
    def refuse(handler: object, path: str, start: int, stop: int) -> bool:
        handler.answer(status, **headers)  # type: ignore[attr-defined]
        return True

    server.fault = refuse
    report = answer_of(worker, server.url + "/a?X-Signature=secret", b"x" * CHUNK, blob)
    assert isinstance(report, Failed)
    assert (report.request, report.code) == (7, code)
    assert report.retry_after == (3.0 if headers.get("Retry_After") else None)
    assert "secret" not in report.message and str(status) in report.message


def test_the_etag_must_be_the_pinned_one(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = server.files["a"] = content(CHUNK, 3)
    server.etags["a"] = '"two"'
    report = answer_of(worker, server.url + "/a", data, blob, etag='"one"', headers=(("If-Match", '"one"'),))
    assert isinstance(report, Failed) and report.code == "origin-changed"
    assert server.headers[0]["If-Match"] == '"one"'
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_another_size_at_the_origin_is_a_change(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    server.files["a"] = content(2 * CHUNK, 4)
    report = answer_of(worker, server.url + "/a", content(CHUNK, 4), blob)
    assert isinstance(report, Failed) and report.code == "origin-changed"


@pytest.mark.parametrize("etag", [None, '"one"'])
def test_a_page_in_place_of_an_object_is_no_change_of_it(
    worker: RunningWorker, server: ByteServer, blob: int, etag: str | None
) -> None:
    """A store's answers have the object's ETag: with none, or with the pinned one, somebody else speaks."""
    server.fault = _plain(b"please log in", **({"ETag": etag} if etag else {}))
    report = answer_of(worker, server.url + "/a", content(CHUNK, 4), blob, etag='"one"')
    assert isinstance(report, Failed) and report.code == "origin-misbehaved"


def test_a_whole_file_may_come_as_200(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = content(CHUNK, 5)
    server.fault = _plain(data)
    assert answer_of(worker, server.url + "/small", data, blob) == Arrived(7)
    assert os.pread(blob, CHUNK, 0) == data


def _plain(data: bytes, **headers: str) -> Callable[[Handler, str, int, int], bool]:
    """A server that knows no ranges."""

    def whole(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(200)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)
        return True

    return whole


def test_a_server_that_ignores_ranges_is_read_by_one_stream(
    worker: RunningWorker, server: ByteServer, blob: int
) -> None:
    data = content(20 * CHUNK + 99, 5)
    gate = threading.Event()

    def slowly(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:BUFFER_BYTES])
        gate.wait(10)
        handler.wfile.write(data[BUFFER_BYTES:])
        return True

    server.fault = slowly
    os.ftruncate(blob, len(data))
    os.pwrite(blob, data[CHUNK : 2 * CHUNK], CHUNK)
    digest = Digest("sha256", hashlib.sha256(data).hexdigest())
    worker.tell(open_order(data, digest, present=0b10), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    worker.tell(Fetch(7, 1, 3, True))
    came = [chunk for chunk in range(BUFFER_BYTES // CHUNK) if chunk != 1]
    assert worker.hear_all(len(came)) == [Streamed(7, chunk) for chunk in came]
    for request, chunk in ((8, 19), (9, 2)):  # asked for meanwhile: they wait for the stream, and cost no connection
        worker.tell(Fetch(request, 1, chunk, True))
        assert worker.hear() == Waits(request)
    assert len(server.log) == 1
    gate.set()
    heard = worker.hear_all(7)
    assert [report for report in heard if isinstance(report, Streamed)] == [Streamed(7, at) for at in range(16, 21)]
    assert Arrived(7) in heard and Hashed(1, digest.value) in heard
    assert os.pread(blob, len(data), 0) == data


@pytest.mark.parametrize("fault", ["short", "long", "other"])
def test_a_stream_of_another_length_is_not_the_file(
    worker: RunningWorker, server: ByteServer, blob: int, fault: str
) -> None:
    data = content(3 * CHUNK, 6)
    match fault:
        case "short":
            server.fault = _plain(data[:-5], Content_Length=str(len(data)), Connection="close")
        case "long":
            server.fault = _plain(data + b"x", Content_Length="", Connection="close")
        case _:
            server.fault = _plain(data + b"x")

    def close(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.close_connection = True
        assert fault_of is not None
        return fault_of(handler, path, start, stop)

    fault_of, server.fault = server.fault, close
    reports = [answer_of(worker, server.url + "/a", data, blob)]
    while isinstance(reports[-1], Streamed):
        reports.append(worker.hear())
    failed = reports[-1]
    assert isinstance(failed, Failed)
    expected = {
        "short": ("origin-misbehaved", "cut"),
        "long": ("origin-misbehaved", "long"),
        "other": ("origin-changed", ""),
    }
    assert (failed.code, failed.fault) == expected[fault]


def test_200_with_the_right_content_range_is_the_range(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    """As `rclone serve s3` answers."""
    data = content(3 * CHUNK, 7)

    def odd(handler: Handler, path: str, start: int, stop: int) -> bool:
        shift = 1 if path == "wrong" else 0
        handler.send_response(200)
        handler.send_header("Content-Range", f"bytes {start + shift}-{stop - 1 + shift}/{len(data)}")
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        handler.wfile.write(data[start:stop])
        return True

    server.fault = odd
    assert answer_of(worker, server.url + "/right", data, blob) == Arrived(7)
    assert os.pread(blob, CHUNK, 0) == data[:CHUNK]
    worker.tell(CloseFile(1))
    assert worker.hear() == Closed(1)
    report = answer_of(worker, server.url + "/wrong", data, blob)
    assert isinstance(report, Failed) and (report.code, report.fault) == ("origin-misbehaved", "range")


@pytest.mark.parametrize(
    ("stored", "headers", "code"),
    [
        (True, {}, ""),
        (True, {"ETag": '"one"'}, ""),
        # What an intermediary made of the bytes is not what was pinned.
        (False, {"ETag": 'W/"one"'}, "origin-misbehaved"),
        (False, {}, "origin-misbehaved"),
    ],
)
def test_a_stored_encoding_belongs_to_the_bytes(
    worker: RunningWorker, server: ByteServer, blob: int, stored: bool, headers: dict[str, str], code: str
) -> None:
    data = gzip.compress(content(2 * CHUNK, 8))

    def encoded(handler: Handler, path: str, start: int, stop: int) -> bool:
        body = data[start:stop] if stored else gzip.compress(data[start:stop])
        handler.send_response(206 if stored else 200)
        if stored:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Encoding", "gzip")
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    server.fault = encoded
    report = answer_of(worker, server.url + "/a", data, blob, etag='"one"' if headers else None)
    if code:
        assert isinstance(report, Failed) and (report.code, report.fault) == (code, "encoded")
    else:
        assert report == Arrived(7)
        assert os.pread(blob, CHUNK, 0) == data[:CHUNK]


def test_a_few_redirects_are_followed_without_credentials(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = server.files["end"] = content(2 * CHUNK, 9)
    seen: list[tuple[str, str | None, str | None]] = []
    with byte_server() as other:
        other.files["end"] = data

        def hop(handler: Handler, path: str, start: int, stop: int) -> bool:
            seen.append((path, handler.headers.get("Authorization"), handler.headers.get("If-Match")))
            match path:
                case "one":
                    handler.answer(307, Location="/two")
                case "two":
                    handler.answer(302, Location=f"{other.url}/end?signature=secret#x")
                case "loop":
                    handler.answer(301, Location="/loop")
                case "file":
                    handler.answer(302, Location="file:///etc/hostname")
                case _:
                    return False
            return True

        server.fault = other.fault = hop
        headers = (("Authorization", "Bearer hf_x"), ("If-Match", '"e"'))
        assert answer_of(worker, server.url + "/one", data, blob, headers=headers) == Arrived(7)
        assert os.pread(blob, CHUNK, 0) == data[:CHUNK]
        assert seen == [("one", "Bearer hf_x", '"e"'), ("two", "Bearer hf_x", '"e"'), ("end", None, '"e"')]
        for path, code, fault in (("loop", "origin-misbehaved", "redirects"), ("file", "origin-incompatible", "")):
            worker.tell(CloseFile(1))
            assert worker.hear() == Closed(1)
            seen.clear()
            report = answer_of(worker, f"{server.url}/{path}", data, blob)
            assert isinstance(report, Failed) and (report.code, report.fault) == (code, fault)
            assert len(seen) <= MOST_REDIRECTS + 1


def test_a_protected_address_does_not_lead_to_an_open_one(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    server.fault = lambda handler, path, start, stop: (
        bool(handler.answer(302, Location="http://93.184.216.34/x")) or True
    )
    report = answer_of(worker, server.url + "/a", content(CHUNK, 1), blob)
    assert isinstance(report, Failed) and report.code == "origin-incompatible" and "open one" in report.message


def test_a_password_in_an_address_is_used_and_not_shown(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = server.files["a"] = content(CHUNK, 1)
    address = server.url.replace("//", "//me:sec%40ret@")
    assert answer_of(worker, address + "/a", data, blob) == Arrived(7)
    assert server.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"me:sec@ret").decode()
    worker.tell(CloseFile(1))
    assert worker.hear() == Closed(1)
    report = answer_of(worker, address + "/gone", data, blob)
    assert isinstance(report, Failed) and "ret" not in report.message and "127.0.0.1" in report.message


def test_a_refused_connection_and_a_black_hole(worker: RunningWorker, blob: int) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        report = answer_of(worker, f"http://127.0.0.1:{unused.getsockname()[1]}/a?s=secret", b"x", blob)
    assert isinstance(report, Failed) and report.code == "origin-unavailable"
    assert "refused" in report.message and "secret" not in report.message
    with black_hole() as url:
        worker.tell(SetLocation(1, Location(url + "/a", named=LOOPBACK)))
        worker.tell(Fetch(8, 1, 0, True))
        report = worker.hear()
    assert isinstance(report, Failed) and report.code == "origin-unavailable"
    assert report.silent >= 0.45, "the silence is told, so that a breaker knows a black hole"


def test_a_file_origin_checks_who_it_reads(worker: RunningWorker, blob: int, tmp_path: Path) -> None:
    from instantstart_fs.origins.directory import file_url, identity_of

    data = content(CHUNK, 6)
    source = tmp_path / "ünï code%20?#.bin"
    source.write_bytes(data)
    url = file_url(str(source))
    assert answer_of(worker, url, data, blob, identity=identity_of(source.stat())) == Arrived(7)
    assert os.pread(blob, CHUNK, 0) == data
    identity = identity_of(source.stat())
    os.utime(source, ns=(1, 1))
    worker.tell(SetLocation(1, Location(url, identity=identity)))
    worker.tell(Fetch(8, 1, 0, True))
    report = worker.hear()
    assert isinstance(report, Failed) and report.code == "origin-changed"
    source.unlink()
    worker.tell(Fetch(9, 1, 0, True))
    report = worker.hear()
    assert isinstance(report, Failed) and report.code == "origin-not-found"


@pytest.mark.alone
def test_background_leaves_its_sockets_unread_while_a_demand_has_the_line(
    worker: RunningWorker, server: ByteServer, blob: int
) -> None:
    data = server.files["a"] = content(2 * CHUNK, 7)
    os.ftruncate(blob, len(data))
    worker.tell(open_order(data, None), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    PAUSE.pack_into(worker.pause, 0, time.monotonic() + 60)
    begun = time.monotonic()
    worker.tell(Fetch(1, 1, 0, False))
    worker.tell(Fetch(2, 1, 1, True))
    assert worker.hear() == Arrived(2)
    assert time.monotonic() - begun < 1.0
    PAUSE.pack_into(worker.pause, 0, 0.0)
    assert worker.hear() == Arrived(1)
    assert time.monotonic() - begun < 1.9, "it ends with the demand, before its own limit"


def test_after_closed_nothing_is_written(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    data = server.files["a"] = content(CHUNK, 8)
    os.ftruncate(blob, len(data))
    server.gate.clear()
    worker.tell(open_order(data, None), blob)
    worker.tell(SetLocation(1, Location(server.url + "/a", named=LOOPBACK)))
    worker.tell(Fetch(1, 1, 0, False))
    worker.tell(CloseFile(1))
    assert worker.hear() == Closed(1)
    server.gate.set()
    worker.tell(Ping(5))
    assert worker.hear() == Pong(5)
    assert os.pread(blob, CHUNK, 0) == bytes(CHUNK)


def test_progress_of_a_slow_body_is_told(server: ByteServer, blob: int) -> None:
    data = server.files["a"] = content(CHUNK, 9)
    server.bytes_per_second = 32 * 1024
    running = RunningWorker(WorkerSettings(stall_timeout=5), {})
    try:
        report = answer_of(running, server.url + "/a", data, blob)
        told = 0
        while isinstance(report, Progress):
            told += report.bytes
            report = running.hear()
        assert report == Arrived(7)
        assert 0 < told <= CHUNK
    finally:
        running.close()


@pytest.mark.alone
def test_it_ends_with_its_parent_whatever_its_threads_do(blob: int) -> None:
    running = RunningWorker(WorkerSettings(stall_timeout=60), {})
    with black_hole() as url:
        os.ftruncate(blob, CHUNK)
        running.tell(open_order(b"x" * CHUNK, None), blob)
        running.tell(SetLocation(1, Location(url, named=LOOPBACK)))
        running.tell(Fetch(1, 1, 0, True))
        running.tell(Ping(1))
        assert running.hear() == Pong(1)
        begun = time.monotonic()
        running.close()
        assert time.monotonic() - begun < 1.0


def test_sigint_is_the_daemons_affair(worker: RunningWorker) -> None:
    os.kill(worker.process.pid, signal.SIGINT)
    worker.tell(Ping(1))
    assert worker.hear() == Pong(1)


def test_a_proxy_of_the_environment_is_used(server: ByteServer, blob: int) -> None:
    data = content(CHUNK, 10)
    # Seen from the proxy, a request names the whole address.
    server.files["/origin.invalid/a".removeprefix("/")] = data
    seen: list[str] = []

    def proxy(handler: object, path: str, start: int, stop: int) -> bool:
        seen.append(handler.path)  # type: ignore[attr-defined]
        handler.serve("a", data, start, stop)  # type: ignore[attr-defined]
        return True

    server.fault = proxy
    running = RunningWorker(WorkerSettings(), {"http_proxy": server.url, "no_proxy": "127.0.0.1"})
    try:
        assert answer_of(running, "http://origin.invalid/a", data, blob) == Arrived(7)
        assert seen == ["http://origin.invalid/a"]
    finally:
        running.close()


def test_shown_addresses_hold_no_secret() -> None:
    assert shown_url("https://user:pass@host.example:8443/a/b?X-Amz-Signature=s#f") == "https://host.example:8443/a/b"


DRIP = 0.05


def _drip(handler: Handler, head: bytes) -> bool:
    """A byte now and then: no time-out of a socket ever meets that."""
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.wfile.write(head)
        for _ in range(400):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(DRIP)
    return True


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_server_that_drips_is_given_up(part: str, tmp_path: Path) -> None:
    heads = {
        "status": b"",
        "headers": b"HTTP/1.1 206 Partial Content\r\nX-Long: ",
        "body": b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-%d/%d\r\nContent-Length: %d\r\n\r\n"
        % (CHUNK - 1, CHUNK, CHUNK),
    }
    with byte_server() as server, open(tmp_path / "f", "wb+") as file:
        file.truncate(CHUNK)
        server.fault = lambda handler, path, start, stop: _drip(handler, heads[part])
        worker = RunningWorker(WorkerSettings(stall_timeout=0.5, slow_window=1.0), {})
        try:
            worker.tell(OpenFile(1, "f", CHUNK, CHUNK, None, b"\0"), file.fileno())
            worker.tell(SetLocation(1, Location(f"{server.url}/f", named=LOOPBACK)))
            worker.tell(Fetch(1, 1, 0, True))
            began = time.monotonic()
            while not isinstance(report := worker.hear(), Failed):
                assert isinstance(report, Progress)
            assert time.monotonic() - began < 10
            assert report.code == "origin-unavailable"
        finally:
            worker.close()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Long: "], ids=["status", "headers"])
def test_a_proxy_that_drips_is_given_up(head: bytes, server: ByteServer, blob: int) -> None:
    server.fault = lambda handler, path, start, stop: _drip(handler, head)
    named = {"https_proxy": server.url, "no_proxy": "127.0.0.1"}
    running = RunningWorker(WorkerSettings(stall_timeout=0.5, slow_window=1.0), named)
    try:
        began = time.monotonic()
        report = answer_of(running, "https://origin.invalid/a", b"x" * CHUNK, blob)
        assert isinstance(report, Failed) and report.code == "origin-unavailable" and "time-out" in report.message
        assert time.monotonic() - began < 10  # the drip takes 20
    finally:
        running.close()


@pytest.mark.parametrize(
    "proxy", ["http://me:sec/ret@127.0.0.1:9", "//me:secret@127.0.0.1:9", "socks5://me:secret@127.0.0.1:9"]
)
def test_a_proxy_that_can_be_none_is_said_without_its_password(proxy: str, blob: int) -> None:
    running = RunningWorker(WorkerSettings(), {"http_proxy": proxy, "no_proxy": "127.0.0.1"})
    try:
        report = answer_of(running, "http://origin.invalid/a", b"x" * CHUNK, blob)
        assert isinstance(report, Failed) and report.code == "origin-unavailable"
        assert "origin.invalid is asked through the proxy of HTTP_PROXY, which is not an http://" in report.message
        assert "sec" not in report.message and "me:" not in report.message
    finally:
        running.close()


def test_a_local_file_that_no_directory_source_pinned_is_never_read(tmp_path: Path) -> None:
    """A hub whose redirects lead to file:///etc/shadow, say."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * CHUNK)
    with open(tmp_path / "f", "wb+") as file:
        file.truncate(CHUNK)
        worker = RunningWorker(WorkerSettings(), {})
        try:
            worker.tell(OpenFile(1, "f", CHUNK, CHUNK, None, b"\0"), file.fileno())
            worker.tell(SetLocation(1, Location(f"file://anybody{secret}")))
            worker.tell(Fetch(1, 1, 0, True))
            report = worker.hear()
            assert isinstance(report, Failed) and report.code == "origin-unsupported"
        finally:
            worker.close()
        assert os.pread(file.fileno(), CHUNK, 0) == bytes(CHUNK)


def _s3_error(code: str, message: str = "", status: int = 403) -> Callable[[Handler, str, int, int], bool]:
    def refuse(handler: Handler, path: str, start: int, stop: int) -> bool:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return refuse


@pytest.mark.parametrize(
    ("word", "service", "code"),
    [
        ("InvalidObjectState", "s3", "origin-unsupported"),
        ("AccessDenied", "s3", "access-refused"),
        ("AccessDenied", "", "location-expired"),
    ],
)
def test_the_reason_that_a_service_gives_is_read_and_told(
    worker: RunningWorker, server: ByteServer, blob: int, word: str, service: Service, code: str
) -> None:
    server.fault = _s3_error(word)
    report = answer_of(worker, server.url + "/a", b"x" * CHUNK, blob, service=service)
    assert isinstance(report, Failed) and report.code == code and word in report.message


def test_a_reason_without_end_is_read_in_part(worker: RunningWorker, server: ByteServer, blob: int) -> None:
    def endless(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(403)
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"<Error><Code>AccessDenied</Code>" + b" " * 65536)
        return True

    server.fault = endless
    report = answer_of(worker, server.url + "/a", b"x" * CHUNK, blob, service="s3")
    assert isinstance(report, Failed) and report.code == "access-refused"
