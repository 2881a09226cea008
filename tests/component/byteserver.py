"""A small HTTP server of byte ranges with faults on order, and what the filler's tests share."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.manifest import Digest, FileEntry, ManifestFile, ModelManifest
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.target import FileKey, FillTarget
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.store.blobstore import BlobStore

Fault = Callable[["Handler", str, int, int], bool]
"""Answers the request for bytes start ≤ b < stop of a path itself and says True; False = serve as usual."""


class ByteServer(ThreadingHTTPServer):
    """``files``: path → bytes. ``log``: (path, start, stop) of each GET, in order.

    ``bytes_per_second``: shared by all connections.
    """

    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.log: list[tuple[str, int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.fault: Fault | None = None
        self.bytes_per_second: float | None = None
        self.gate = threading.Event()
        self.gate.set()
        self._budget_lock = threading.Lock()
        self._budget_at = 0.0
        self.running = 0
        self.most_running = 0
        self.count_lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def throttle(self, count: int) -> None:
        if self.bytes_per_second is None:
            return
        with self._budget_lock:
            now = time.monotonic()
            self._budget_at = max(self._budget_at, now) + count / self.bytes_per_second
            wait = self._budget_at - now
        time.sleep(max(wait, 0))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ByteServer

    def setup(self) -> None:
        super().setup()
        if self.server.bytes_per_second is not None:
            # The made-up link lies before the kernel's buffers: large ones would hold what a real link does not.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        path = self.path.partition("?")[0].lstrip("/")
        body = server.files.get(path)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, len(body or b""))
        with server.count_lock:
            server.log.append((path, start, stop))
            server.headers.append(dict(self.headers))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            if server.fault is not None and server.fault(self, path, start, stop):
                return
            server.gate.wait(30)
            if body is None:
                self.answer(404)
                return
            self.serve(path, body, start, stop)
        finally:
            with server.count_lock:
                server.running -= 1

    def do_CONNECT(self) -> None:
        """As a proxy: what ``fault`` answers."""
        if self.server.fault is None or not self.server.fault(self, self.path, 0, 0):
            self.answer(502)

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def serve(self, path: str, body: bytes, start: int, stop: int) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.send_header("Content-Length", str(stop - start))
        if path in self.server.etags:
            self.send_header("ETag", self.server.etags[path])
        self.end_headers()
        for offset in range(start, stop, 16 * 1024):
            piece = body[offset : min(offset + 16 * 1024, stop)]
            self.server.throttle(len(piece))
            self.wfile.write(piece)


@contextmanager
def byte_server() -> Iterator[ByteServer]:
    server = ByteServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()


@contextmanager
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def content(size: int, seed: int) -> bytes:
    return Random(seed).randbytes(size)


class FakeOrigin:
    """An Origin whose files lie on a ByteServer."""

    def __init__(self, url: str, credentials: str = "", etag: bool = False) -> None:
        self.url = url
        self.key = OriginKey("test", url, credentials)
        self.located: list[str] = []
        self.etag = etag
        self.on_locate: Callable[[ManifestFile], Location | None] | None = None
        self.trusted = True

    def resolve(self) -> ModelManifest:
        raise NotImplementedError

    def locate(self, file: ManifestFile) -> Location:
        self.located.append(file.path)
        if self.on_locate is not None:
            found = self.on_locate(file)
            if found is not None:
                return found
        etag = file.version if self.etag else None
        return Location(
            f"{self.url}/{file.address}?signature=secret", etag=etag, trusted=self.trusted, named=("127.0.0.1",)
        )

    def check(self) -> None:
        pass


class Recorder:
    """FillEvents that remember."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, object]] = []
        self.on_poisoned: Callable[[FillTarget], None] | None = None

    def chunk_present(self, target: FillTarget, chunk: int) -> None:
        self.events.append(("present", target.entry.path, chunk))

    def target_sealed(self, target: FillTarget) -> None:
        self.events.append(("sealed", target.entry.path, target.state))

    def target_poisoned(self, target: FillTarget, error: InstantStartError) -> None:
        self.events.append(("poisoned", target.entry.path, error))
        if self.on_poisoned is not None:
            self.on_poisoned(target)

    def target_failed(self, target: FillTarget, error: InstantStartError) -> None:
        self.events.append(("failed", target.entry.path, error))

    def failure(self, target: FillTarget, error: InstantStartError | None) -> None:
        self.events.append(("failure", target.entry.path, error))

    def of(self, kind: str) -> list[object]:
        return [value for what, _, value in self.events if what == kind]


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def make_target(
    store: BlobStore,
    origin: FakeOrigin,
    path: str,
    size: int,
    *,
    digest: Digest | None = None,
    pipeline: str = "p",
    index: int = 0,
    chunk_size: int = 64 * 1024,
    incarnation: int = 0,
    bitmap: bytes | None = None,
    version: str = "",
) -> FillTarget:
    file = ManifestFile(path, size, path, version, digest)
    return FillTarget(
        FileKey(pipeline, 1, index),
        FileEntry(index, 0, path, file),
        incarnation,
        ChunkMap(size, chunk_size, bitmap),
        origin,
        lambda: store.blob(pipeline, 1, path, size),
    )
