"""Large listings are made by a process of their own, which ends: neither time nor memory of the daemon is spent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from instantstart_fs.admin import sources
from instantstart_fs.config import HuggingFaceConfig
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import OriginHidden, OriginUnavailable
from instantstart_fs.origins.bounds import IN_THE_DAEMON, Bounds
from instantstart_fs.origins.common import MAX_FILES
from instantstart_fs.origins.lister import Lister, Order
from instantstart_fs.origins.registry import open_origin
from instantstart_fs.origins.settings import OriginSettings as Settings
from tests.component.test_update import from_hub
from tests.servers.handler import serving
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(120)

REPO = "org/large"
SOURCE = f"hf://{REPO}"


def order(hub: HubServer, *, seconds: float = 60.0, source: str = SOURCE) -> Order:
    model = ModelSpec(source)
    settings = Settings(huggingface=HuggingFaceConfig(endpoint=hub.endpoint), timeout=10.0)
    return Order("resolve", PipelineSpec("p", (model,)), model, settings, seconds)


@pytest.fixture
def names(hub: HubServer, tmp_path: Path) -> Iterator[list[str]]:
    real = tmp_path / "payload"
    real.write_bytes(b"x")
    names = [f"part-{number:05}.json" for number in range(2500)]
    hub.publish_names(REPO, [*names, "odd//name"], real)
    yield names
    hub.reset()


def test_the_process_finds_what_the_daemon_would(hub: HubServer, names: list[str]) -> None:
    given = order(hub)
    found = Lister(given).run()
    assert found == open_origin(given.spec, given.model, given.settings).resolve()
    assert found is not None and [file.path for file in found.files] == names
    assert found.skipped is not None and found.skipped.count == 1


def test_its_errors_and_its_log_are_the_daemons(
    hub: HubServer, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OriginHidden, match="--token-file"):
        Lister(order(hub, source="hf://org/not-there")).run()
    Lister(order(hub)).run()
    assert "1 file(s) cannot be shown" in caplog.text


async def test_a_large_source_is_listed_outside(
    tmp_path: Path, hub: HubServer, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    class Watched(Lister):
        def run(self):  # type: ignore[no-untyped-def]
            runs.append(self._order.what)
            return super().run()

    monkeypatch.setattr(sources, "Lister", Watched)
    monkeypatch.setattr("instantstart_fs.library.IN_THE_DAEMON", Bounds(body=1 << 20, files=1000, final=False))
    async with from_hub(tmp_path, hub) as library:
        status = await library.admin.add(PipelineSpec("p", (ModelSpec(SOURCE),)))
        assert runs == ["resolve"]
        assert status.skipped is not None and status.skipped.count == 1
        assert len(library.pipelines.status("p").files or ()) == len(names)
        small = PipelineSpec("small", (ModelSpec(SOURCE, include=("part-0000*",)),))
        hub.publish_names(REPO, names[:20], tmp_path / "payload")
        await library.admin.add(small)
        assert runs == ["resolve"], "what is small is listed here"


async def test_who_gives_up_ends_the_process(
    tmp_path: Path, hub: HubServer, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listers: list[Lister] = []

    class Watched(Lister):
        def run(self):  # type: ignore[no-untyped-def]
            listers.append(self)
            hub.fault("blackhole", port="hub", path="/tree/")
            return super().run()

    monkeypatch.setattr(sources, "Lister", Watched)
    monkeypatch.setattr("instantstart_fs.library.IN_THE_DAEMON", Bounds(files=1000, final=False))
    async with from_hub(tmp_path, hub) as library:
        with trio.move_on_after(60) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(library.admin.add, PipelineSpec("p", (ModelSpec(SOURCE),)))
                while not any(lister._process for lister in listers):
                    await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
        process = listers[0]._process
        assert process is not None
        with trio.fail_after(20):
            while process.poll() is None:
                await trio.sleep(0.02)
        hub.clear()


@pytest.mark.parametrize("how", ["killed", "late", "alone"])
def test_a_process_that_ends_early_is_told_of(hub: HubServer, names: list[str], how: str) -> None:
    hub.fault("blackhole", port="hub", path="/tree/")
    lister = Lister(order(hub, seconds=1.5 if how == "late" else 60.0))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            lister.run()
        except OriginUnavailable as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if how != "late":
            end = time.monotonic() + 30
            while not any("/tree/" in request.path for request in hub.requests()):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert lister._process is not None and lister._process.stdin is not None
            if how == "killed":
                os.kill(lister._process.pid, signal.SIGKILL)
            else:  # as when the daemon dies
                with contextlib.suppress(OSError):
                    lister._process.stdin.close()
        thread.join(30)
        assert not thread.is_alive()
    finally:
        lister.end()
        hub.clear()
    (error,) = failures
    assert ("not whole after 1.5 s" if how == "late" else "ended (status") in str(error)


class Vast(BaseHTTPRequestHandler):
    """A hub with more files than one model may have, in pages of 50,000."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "/revision/" in url.path:
            return self.answer(json.dumps({"sha": "a" * 40}).encode())
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        entry = '{"type":"file","oid":"%s","size":1,"path":"%08d.json"}'
        page = ",".join(entry % ("b" * 40, number) for number in range(start, start + 50_000))
        return self.answer(f"[{page}]".encode(), f'<http://hub{url.path}?cursor={start + 50_000}>; rel="next"')

    def answer(self, body: bytes, link: str = "") -> None:
        self.send_response(200)
        if link:
            self.send_header("Link", link)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


DAEMON = """
import resource, sys
from instantstart_fs.admin import sources
from instantstart_fs.config import HuggingFaceConfig
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import OriginUnsupported
from instantstart_fs.origins.lister import Lister, Order
from instantstart_fs.origins.settings import OriginSettings

model = ModelSpec(sys.argv[1])
settings = OriginSettings(huggingface=HuggingFaceConfig(endpoint=sys.argv[2]), timeout=20.0)
lister = Lister(Order("resolve", PipelineSpec("p", (model,)), model, settings, 100.0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    lister.run()
except OriginUnsupported as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
"""It stands for the daemon, in a process of its own: this one holds the server, and whatever tests left behind."""


def test_more_files_than_are_allowed_cost_the_daemon_nothing() -> None:
    with serving(Vast) as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", DAEMON, SOURCE, endpoint], capture_output=True, text=True, timeout=110
        )
    grown, _, refusal = done.stdout.partition(" ")
    assert f"more than {MAX_FILES} files, which is the limit" in refusal, done.stderr
    assert int(grown) < 64 << 10  # KiB
    assert IN_THE_DAEMON.body < 50_000 * 90, "a page of it is too large for the daemon"
