"""What a lying origin, a hostile name or an abusive neighbour must not do to the daemon and to everybody else."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest
import trio

from instantstart_fs import daemon, doctor
from instantstart_fs.cli import long_commands, progress
from instantstart_fs.config import Config, MountConfig, StoreConfig
from instantstart_fs.control.lines import encode_response
from instantstart_fs.control.protocol import Done
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.manifest import FileEntry, ManifestFile, ModelSpec, PipelineSpec
from instantstart_fs.core.sight import EVERYTHING, Sight
from instantstart_fs.core.source import HubSource, S3Source
from instantstart_fs.core.status import ErrorStatus
from instantstart_fs.errors import (
    OriginError,
    OriginMisbehaved,
    OriginUnavailable,
    OriginUnsupported,
    PipelineBusy,
    PrefetchError,
    ReadDeadline,
    StoreDamaged,
    StoreFull,
)
from instantstart_fs.filler.sources import LOCATE_THREADS, Locator
from instantstart_fs.filler.target import FileState
from instantstart_fs.index.environment import Index
from instantstart_fs.mount import kernel
from instantstart_fs.origins import common, hubclient
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.hubtree import Answer
from instantstart_fs.origins.huggingface import HuggingFaceOrigin
from instantstart_fs.origins.s3 import S3Origin
from instantstart_fs.prefetch import DirectorySource, feeder, messages, plan
from instantstart_fs.prefetch.holder import Holder
from instantstart_fs.prefetch.stager import Stage, Stager
from instantstart_fs.prefetch.worker import Worker as PrefetchWorker
from instantstart_fs.service import Notifier
from instantstart_fs.serving import fill_events
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.web import app, view_model
from tests.component.byteserver import (
    ByteServer,
    FakeOrigin,
    Handler,
    byte_server,
    content,
    make_target,
    sha256,
)
from tests.component.site import FakeLibrary, pipeline
from tests.component.test_filler import CHUNK, filling, until, wait_state
from tests.component.test_library import make_source, read_all, running, spec
from tests.component.test_library import wait_state as wait_library
from tests.servers.handler import serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def origin_server() -> Iterator[ByteServer]:
    with byte_server() as started:
        yield started


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    with BlobStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def records(blobs: BlobStore) -> Iterator[Index]:
    with Index.open(blobs.root + "/index", map_size=16 << 20) as opened:
        yield opened


# -- what servers say --------------------------------------------------------------------------------------------------


async def test_a_huge_header_ends_a_fetch_and_not_the_daemon(
    origin_server: ByteServer, blobs: BlobStore, records: Index
) -> None:
    """What a worker reports is one packet: an origin must not be able to make it longer than the daemon reads."""
    data = origin_server.files["f"] = content(2 * CHUNK, 1)

    def lie(handler: Handler, path: str, start: int, stop: int) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", "é" * 60_000)
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        return True

    origin_server.fault = lie
    async with filling(blobs, records) as (filler, events):
        target = make_target(blobs, FakeOrigin(origin_server.url), "f", len(data), digest=sha256(data))
        filler.demand(target, ByteRange(0, 1))
        await until(lambda: target.error is not None)
        assert isinstance(target.error, OriginMisbehaved)
        assert len(target.error.message) < 4096
        origin_server.fault = None
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
        assert filler.statistics().worker_deaths == 0
        assert events.of("failed") == []


async def test_an_address_that_is_expired_when_it_comes_is_tried_and_not_asked_for_again_and_again(
    origin_server: ByteServer, blobs: BlobStore, records: Index
) -> None:
    """A clock that is ahead, credentials that end within seconds, or a hub that lies."""
    data = origin_server.files["f"] = content(4 * CHUNK, 2)
    origin = FakeOrigin(origin_server.url)
    origin.on_locate = lambda file: Location(
        f"{origin_server.url}/f", named=("127.0.0.1",), expires_at=time.time() - 3600.0
    )
    async with filling(blobs, records) as (filler, _):
        target = make_target(blobs, origin, "f", len(data), digest=sha256(data))
        filler.fill("p", [target])
        await wait_state([target], FileState.SEALED)
        assert len(origin.located) <= 4


@pytest.mark.parametrize(
    "entry",
    [
        {"size": -1},
        {"size": 1 << 70},
        {"size": "12"},
        {"size": 1.5},
        {"path": 7},
        {"path": None},
        {"oid": 17},
        {"oid": "x" * 100_000},
        {"lfs": {"oid": "../../etc/passwd", "size": 10}},
        {"lfs": "x"},
        {"type": 3},
    ],
)
def test_a_hub_that_lists_nonsense_is_refused(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    origin = HuggingFaceOrigin(
        HubSource("o/r"), ModelSpec("hf://o/r"), endpoint="http://127.0.0.1:9", token_file=None, timeout=1.0
    )
    good = {"type": "file", "path": "model.safetensors", "size": 10, "oid": "ab" * 20}

    def ask(path: str, query: str, *, optional: bool = False) -> Answer:
        said: object = [good | entry] if path.startswith("tree/") else {"sha": "c" * 40}
        return Answer(json.dumps(said).encode(), None)

    monkeypatch.setattr(origin, "_ask", ask)
    monkeypatch.setattr(origin, "locate", lambda file: None)
    with pytest.raises(OriginError):
        origin.resolve()


def test_a_listing_without_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_FILES", 500)
    origin = S3Origin(
        S3Source("bucket", "p"), ModelSpec("s3://b/p"), endpoint_url=None, region_name=None, profile=None, timeout=1.0
    )
    asked = 0

    class Paginator:
        def paginate(self, **_: object) -> Iterator[dict[str, Any]]:
            nonlocal asked
            while asked < 100:
                asked += 1
                yield {"Contents": [{"Key": f"p/{asked}-{number}", "Size": 1} for number in range(100)]}

    monkeypatch.setattr(origin, "_client", lambda: SimpleNamespace(get_paginator=lambda _: Paginator()))
    with pytest.raises(OriginUnsupported, match="500 files"):
        origin.resolve()
    assert asked < 10


async def test_an_origin_that_breaks_in_a_way_nobody_foresaw_is_an_origin_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def resolve(self) -> None:
            raise RuntimeError("signature=secret")

        check = resolve

    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("q", source))
        monkeypatch.setattr(library.catalog, "open_origin", lambda *_: Broken())
        with pytest.raises(OriginMisbehaved) as refused:
            await library.admin.add(spec("p", source))
        assert "secret" not in refused.value.message
        with pytest.raises(OriginMisbehaved):
            await library.admin.check_access("q")


async def test_a_file_of_absurd_size_is_refused_when_it_is_pinned(tmp_path: Path) -> None:
    """Its map of chunks alone would take more memory than there is."""
    source = make_source(tmp_path / "source")
    with open(source / "huge.safetensors", "wb") as file:
        file.truncate(15 << 40)
    async with running(tmp_path) as library:
        library.lifecycle.sources._chunk_size = 64 * 1024
        with pytest.raises(OriginUnsupported, match=r"huge\.safetensors"):
            await library.admin.add(spec("p", source))


@contextlib.contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a server that answers every GET so."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Answering) as url:
        yield url


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    handler.wfile.write(b'{"siblings": [')
    for _ in range(4000):
        handler.wfile.write(b" " * 65536)


BOMB = gzip.compress(b'{"siblings": [' + b" " * (64 << 20))


def _bomb(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(BOMB)))
    handler.end_headers()
    handler.wfile.write(BOMB)


@pytest.mark.parametrize("answer", [_endless, _bomb])
def test_a_listing_that_unfolds_takes_no_memory(
    answer: Callable[[BaseHTTPRequestHandler], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubclient, "MAX_BODY", 4 << 20)
    with answering(answer) as url:
        origin = HuggingFaceOrigin(HubSource("o/r"), ModelSpec("hf://o/r"), endpoint=url, token_file=None, timeout=5.0)
        tracemalloc.start()
        try:
            with pytest.raises(OriginUnavailable):
                origin.resolve()
            assert tracemalloc.get_traced_memory()[1] < 48 << 20
        finally:
            tracemalloc.stop()


async def test_questions_that_nobody_answers_block_no_later_ones() -> None:
    """A name service that says nothing has no time-out here: such threads are never given back."""
    silent = threading.Event()

    class Hub:
        key = OriginKey("hf", "hub", "")
        answers = False

        def locate(self, file: ManifestFile) -> Location:
            if not self.answers:
                silent.wait(30)
            return Location("https://x/")

    hub, locator = Hub(), Locator(0.2)
    entry = FileEntry(0, 0, "f", ManifestFile("f", 1, "f"))
    try:
        async with trio.open_nursery() as nursery:

            async def ask_in_vain() -> None:
                with pytest.raises(OriginUnavailable):
                    await locator.locate(hub, entry, "p")

            for _ in range(2 * LOCATE_THREADS):
                nursery.start_soon(ask_in_vain)
        hub.answers = True
        assert (await locator.locate(hub, entry, "p")).url == "https://x/"
    finally:
        silent.set()


# -- names -------------------------------------------------------------------------------------------------------------


async def test_a_directory_whose_name_is_no_utf8_is_a_source_like_others(tmp_path: Path) -> None:
    source = make_source(tmp_path / os.fsdecode(b"m\xff\x1b[31m"))
    name = "model-2-of-2.safetensors"
    expected = (source / name).read_bytes()
    where = PipelineSpec(id="p", models=(ModelSpec(source="file://" + quote(os.fsencode(source))),))
    async with running(tmp_path) as library:
        await library.admin.add(where)
        assert await read_all(library, "p", name) == expected
        for path in source.glob("model-1*"):
            path.unlink()
        with pytest.raises(OriginError) as gone:
            await read_all(library, "p", "model-1-of-2.safetensors")
        assert "\x1b" not in gone.value.message
        # Whoever asks gets an answer, and the others' pipelines with it.
        status = library.pipelines.status("p")
        assert status.error is not None
        encode_response(Done([status]))
        root = library.mounted.lookup(1, "p").nodeid
        assert b"\x1b" not in library.mounted.xattrs(root)["user.instantstart.error"]


@pytest.mark.parametrize("message", ["[/] and [/red]", "[Errno 5] x", "[link=file:///etc/passwd]"])
def test_a_progress_bar_shows_what_an_origin_says_and_does_not_parse_it(
    message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_size", lambda _: os.terminal_size((120, 24)))
    error = ErrorStatus("origin-unavailable", message, "2026-01-01T00:00:00Z")
    monkeypatch.setattr(long_commands, "fits", lambda _: True)
    with long_commands._reporter("p", quiet=False) as report:
        report(1, 2, pipeline("p", error=error))
    assert message in capfd.readouterr().err


def test_doctor_is_not_upset_by_a_hub_that_has_no_idea_of_the_date() -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", "0 Jan 1 1:1:1 " + "9" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

    skew: list[float] = []
    with serving(Hub) as url:
        assert doctor.check_hub(url, skew).outcome == "ok"
    assert skew == []


# -- neighbours --------------------------------------------------------------------------------------------------------


def test_descriptors_that_a_client_sends_to_a_hold_are_not_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "holds" / "x.sock")
    with Holder(cast(Stage, object()), path), socket.socket(socket.AF_UNIX) as client, open(os.devnull, "rb") as null:
        client.settimeout(10)
        client.connect(path)

        def ask() -> None:
            socket.send_fds(client, [b'{"op": "release"}\n'], [null.fileno()])
            assert b"ok" in client.recv(1000)

        ask()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            ask()
        assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.skipif(not kernel.has_sys_admin(), reason="a file that somebody else owns, and a mount, need root")
async def test_what_is_handed_over_cannot_be_written_by_whoever_owns_it(tmp_path: Path) -> None:
    """Binds give the store's files their tenant as owner, and an owner may fchmod what it has open, then reopen it."""
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_library(library, "p", "unverified")
        async with library.leases.opening("p", {}) as handover:
            handed = await handover.next_files(8, 5.0)
            assert len(handed) == 2
            for path, descriptors in handed:
                assert len(descriptors) == 2
                for descriptor in descriptors:
                    found = os.fstat(descriptor)
                    with pytest.raises(OSError) as refused:
                        os.fchmod(descriptor, 0o666)
                    assert refused.value.errno == errno.EROFS
                    with pytest.raises(OSError):
                        os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
                    with pytest.raises(OSError):
                        os.setxattr(descriptor, "user.instantstart.seal", b"{}")
                    assert found.st_size == (source / path).stat().st_size
                    os.close(descriptor)


async def test_the_evictor_waits_for_no_update(tmp_path: Path) -> None:
    """Whoever needs room waits for the evictor, and a listing may take minutes."""
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        async with library.catalog.pipeline("p").lock:
            with trio.fail_after(5), pytest.raises(PipelineBusy):
                await library.admin.evict_unused("p")


async def test_a_read_for_which_no_space_is_freed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))

        async def forever(*_: object, **__: object) -> bool:
            await trio.sleep_forever()
            raise AssertionError

        for name in ("admit_fill", "admit_chunks"):
            monkeypatch.setattr(library.admissions, name, forever)
        monkeypatch.setattr(library.reads, "_read_deadline", 0.3)
        with trio.fail_after(10), pytest.raises(ReadDeadline):
            await read_all(library, "p", "model-2-of-2.safetensors")


async def test_a_file_that_proves_wrong_needs_no_space_and_no_index_at_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a nodeid that was never used before, in a place that must not raise."""
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        assert await read_all(library, "p", "config.json")
        await wait_library(library, "p", "unverified", "filling", "partial")
        file = next(found for found in library.catalog.pipeline("p").generations()).files[0]
        with trio.fail_after(10):
            while not file.complete:
                await trio.sleep(0.01)

        def full(*_: object) -> None:
            raise StoreFull("no space")

        monkeypatch.setattr(library.index, "write_sync", full)
        await library.reads.replace_damaged(file, StoreDamaged("rotten"), wanted=False, found_by="read")
        assert file.stale_error is not None


async def test_who_holds_wrong_bytes_is_looked_up_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(tmp_path / "source")
    looked = []

    def look(path: str) -> list[str]:
        looked.append((path, threading.current_thread()))
        return ["7 (engine)"]

    monkeypatch.setattr(fill_events, "processes_holding", look)
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        handle = await library.mounted.open(
            library.mounted.lookup(library.mounted.lookup(1, "p").nodeid, "config.json").nodeid
        )
        assert await library.mounted.read_into(handle, 0, memoryview(bytearray(8))) == 8
        file = library.catalog.pipeline("p").current.files[0]  # type: ignore[union-attr]
        with trio.fail_after(10):
            while not file.complete:
                await trio.sleep(0.01)
            await library.reads.replace_damaged(file, StoreDamaged("rotten"), wanted=False, found_by="read")
            while "7 (engine)" not in caplog.text:
                await trio.sleep(0.01)
        library.mounted.release(handle)
    assert [path for path, _ in looked] == ["/p/config.json"]
    assert looked[0][1] is not threading.main_thread()


async def test_a_mount_that_answers_with_an_error_ends_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(path: str) -> None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(daemon, "STATUS_INTERVAL", 0.05)
    monkeypatch.setattr(daemon.os, "statvfs", gone)
    library = SimpleNamespace(pipelines=())
    told = daemon.Daemon(
        Config(mount=MountConfig(path=str(tmp_path)), store=StoreConfig(path=str(tmp_path))),
        cast(Any, library),
        str(tmp_path / "s"),
    )
    with trio.move_on_after(0.5) as scope:
        await told.keep_told(Notifier())
    assert scope.cancelled_caught
    assert os.strerror(errno.ENOTCONN) in caplog.text


async def test_systemd_is_told_no_states_since_it_tells_everybody(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        await library.admin.add(spec("hidden", make_source(tmp_path / "source")))
        config = Config(mount=MountConfig(path="/mnt"), store=StoreConfig(path=str(tmp_path)))
        line = daemon.Daemon(config, library, str(tmp_path / "s"))._status_line()
    assert line == "ready: 1 pipelines at /mnt, transport "


async def test_a_pin_that_cannot_be_written_down_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))

        def full(*_: object) -> None:
            raise StoreFull("no space")

        monkeypatch.setattr(library.store.metadata, "write_pipeline", full)
        with pytest.raises(StoreFull):
            await library.lifecycle.set_pinned("p", True)
        assert not library.pipelines.spec("p").pinned and not library.pipelines.status("p").pinned


def test_a_stage_that_is_closed_while_it_makes_memory_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "closed-meanwhile.bin").write_bytes(b"x" * 4096)
    source = DirectorySource(str(tmp_path / "m"))
    stage = Stage(Stager(source), plan(source.weights, None, ["cpu"]))
    allocate = feeder.allocate

    def allocate_late(name: str, size: int) -> int:
        memory = allocate(name, size)
        stage.close()
        return memory

    monkeypatch.setattr(feeder, "allocate", allocate_late)
    with contextlib.suppress(PrefetchError):
        stage._start()
    for thread in stage._threads:
        thread.join(10)
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _is_open(fd)]
    assert not [link for link in held if "closed-meanwhile" in link]


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_an_export_that_fails_without_a_word_is_answered() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    class Target:
        def untyped_storage(self) -> None:
            raise RuntimeError

    with ours, theirs:
        ours.settimeout(5)
        worker = PrefetchWorker(theirs, messages.Settings("cpu", ("direct",)))
        worker._items[1] = cast(Any, SimpleNamespace(target=Target()))
        worker._export(1, 7)
        answer = messages.from_worker.decode(ours.recv(messages.MAX_PACKET))
        assert isinstance(answer, messages.Exported) and answer.handle is None and answer.token == 7


async def test_a_thousand_different_searches_keep_no_thousand_pages() -> None:
    summaries = app.StoreSummaries(cast(Any, FakeLibrary()), dict, details=False)
    for number in range(1000):
        await summaries.view(view_model.Query(text=str(number)), Sight(uid=number % 200))
    kept = [len(seen.views) for seen in summaries._seen.values()]
    assert len(kept) <= app.MAX_SIGHTS and max(kept) <= app.MAX_VIEWS
    for number in range(1000):
        await summaries.view(view_model.Query(text=str(number)), EVERYTHING)
    assert len(summaries._seen[EVERYTHING].views) <= app.MAX_VIEWS


async def test_half_a_request_byte_by_byte_is_no_reason_to_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instantstart_fs.control import connection, server
    from tests.component.test_control import INFO

    monkeypatch.setattr(connection, "REQUEST_DEADLINE", 0.5)
    place = str(tmp_path / "s")
    async with server.serving(cast(Any, SimpleNamespace(pipelines=None)), lambda: INFO, place):
        stream = await trio.open_unix_socket(place)
        ended = trio.Event()

        async def listen() -> None:
            while await stream.receive_some():
                pass
            ended.set()

        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            with trio.fail_after(10):
                while not ended.is_set():
                    try:
                        await stream.send_all(b"{")
                    except trio.BrokenResourceError:
                        break
                    with trio.move_on_after(0.1):
                        await ended.wait()
            nursery.cancel_scope.cancel()
