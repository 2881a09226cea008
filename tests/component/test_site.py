"""The page over a made-up library: what it escapes, bounds and keeps from others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from instantstart_fs.config import HttpConfig
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.placement import HostHolding, Placement
from instantstart_fs.core.sight import ANYBODY, EVERYTHING, Sight
from instantstart_fs.core.status import ErrorStatus, FillStatus, TierStatus
from instantstart_fs.errors import InstantStartError, OriginUnavailable, StoreFull
from instantstart_fs.filler.events import FillStatistics, RegionStatistics
from instantstart_fs.views.store_summary import RegionSummary
from instantstart_fs.web import app, server
from instantstart_fs.web import problems as error_advice
from instantstart_fs.web.health import KEEP_SECONDS, PROBE_DEADLINE, HealthProbe
from tests.component.site import GB, FakeLibrary, Served, fill_with_examples, pipeline, serving

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def get(served: Served, path: str = "") -> str:
    with urllib.request.urlopen(served.url + path, timeout=20) as answer:
        return str(answer.read().decode())


def test_hostile_names_are_text() -> None:
    with serving(HttpConfig(port=0, details=True)) as served:
        error = ErrorStatus(HOSTILE, HOSTILE, "2026-01-01T00:00:00Z")
        served.library.pipelines["x"] = pipeline(HOSTILE, "error", source=(HOSTILE,), error=error)
        served.library.telemetry.records = [ColdStart(pipeline=HOSTILE, started_ns=1, state="cold", opened_after=1.0)]
        quoted = urllib.parse.quote(HOSTILE, safe="")
        image = "<img src=x onerror=alert(2)>"
        served.library.pipelines[image] = pipeline(image, "error", source=(HOSTILE,), error=error)
        detail = get(served, f"pipelines/{urllib.parse.quote(image)}")
        assert "&lt;script&gt;" in detail and "<script>alert" not in detail and "<img src=x" not in detail
        events = []
        with urllib.request.urlopen(served.url + f"api/events?q={quoted}", timeout=20) as stream:
            while not events or events[-1].strip():
                events.append(stream.readline().decode())
                if events[-1].startswith("retry"):
                    events.append(stream.readline().decode())
                    events[-1] = "-"
        for text in (get(served), get(served, f"?q={quoted}"), "".join(events)):
            assert "&lt;script&gt;" in text
            assert "<script>alert" not in text and "<img src=x" not in text
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(served, f"badge/{quoted}.svg")
        with missing.value as refused:
            assert b"<script>" not in refused.read()


def test_sources_and_messages_need_details() -> None:
    for details in (False, True):
        with serving(HttpConfig(port=0, details=details)) as served:
            fill_with_examples(served.library)
            served.library.pipelines["big"] = pipeline("big", uncached="store full: needs 1 GB; hot: other")
            for text in (get(served), get(served, "api/pipelines")):
                assert ("hf://org/" in text) is details
                assert ("401 for org/gated" in text) is details
                assert "access-refused" in text
                assert "store full" in text and ("hot: other" in text) is details


def test_ten_thousand_pipelines_are_paged_and_hold_nobody_up() -> None:
    with serving() as served:
        for number in range(10_000):
            name = f"pipeline-{number:05}"
            served.library.pipelines[name] = pipeline(name, "warm" if number % 2 else "cold", cached_bytes=GB)
        get(served)  # the templates are compiled now
        served.longest_gap = 0.0
        first = get(served)
        assert first.count("<tr data-key=") == app.view_model.PAGE_SIZE
        assert "1 to 50 of 10000" in first and 'rel="next"' in first
        page = json.loads(get(served, "api/pipelines?state=cold&offset=100&limit=7"))
        assert (page["matching"], len(page["rows"])) == (5000, 7)
        assert len(json.loads(get(served, "api/pipelines?limit=999999"))["rows"]) == app.view_model.MAX_PAGE_SIZE
        # Far beyond the end, or nonsense: the last page, the first page.
        assert json.loads(get(served, "api/pipelines?offset=999999"))["rows"]
        assert json.loads(get(served, "api/pipelines?offset=-5&limit=x&state=nonsense"))["matching"] == 10_000
        assert json.loads(get(served, "api/pipelines?q=E-00042"))["rows"][0]["pipeline"] == "pipeline-00042"
        time.sleep(1.1)
        get(served, "metrics")
        # A walk over all of them in one piece takes several times as long even here.
        assert served.longest_gap < 0.25


def test_nobody_asking_costs_nothing_and_many_asking_cost_one_look() -> None:
    with serving() as served:
        fill_with_examples(served.library)
        time.sleep(0.3)
        assert served.library.looks == 0
        threads = [threading.Thread(target=get, args=(served,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert served.library.looks <= 3


def test_streams_are_bounded_and_who_sits_there_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_STREAMS", 3)
    monkeypatch.setattr(server, "MAX_EACH", 8)
    with serving() as served, contextlib.ExitStack() as stack:
        for _ in range(3):
            stream = stack.enter_context(urllib.request.urlopen(served.url + "api/events", timeout=20))
            assert stream.readline()
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(served, "api/events")
        with refused.value as answer:
            assert answer.code == 503
        # However many say nothing, or half of something: they give way to whoever does, and the streams do not.
        port = urllib.parse.urlparse(served.url).port
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(20)]
        for connection in silent[10:]:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: local")
        assert get(served, "healthz")
        assert stream.readline()


def test_who_is_at_work_keeps_its_place_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_EACH", 2)
    with serving() as served, contextlib.ExitStack() as stack:
        for _ in range(2):
            stream = stack.enter_context(urllib.request.urlopen(served.url + "api/events", timeout=20))
            assert stream.readline()
        assert said_to(served, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 503 ")
        assert stream.readline()


def test_a_client_that_does_not_read_does_not_keep_the_server_from_ending() -> None:
    with serving() as served:
        fill_with_examples(served.library)
        for number in range(200):
            served.library.pipelines[f"p{number}"] = pipeline(f"p{number}-{'x' * 100}")
        port = urllib.parse.urlparse(served.url).port
        clients = []
        for _ in range(4):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /?limit=200 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
            clients.append(client)
        time.sleep(0.5)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    for client in clients:
        client.close()


def said_to(served: Served, request: bytes, enough: bytes = b"") -> bytes:
    """All that the server says to those bytes, until it closes, or has said ``enough``."""
    port = urllib.parse.urlparse(served.url).port
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        answer = b""
        while not enough or enough not in answer:
            with contextlib.suppress(ConnectionResetError):
                if data := connection.recv(65536):
                    answer += data
                    continue
            break
        return answer


HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def test_http2_is_refused_and_an_upgrade_is_not_heard() -> None:
    """By prior knowledge: 505. By `Upgrade`, to HTTP/2 or a web socket: an answer, as if it were not said."""
    with serving() as served:
        refused = said_to(served, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS)
        assert refused.startswith(b"HTTP/1.1 505 ") and HTTP2_SETTINGS[3:] not in refused
        upgrades = (
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n",
        )
        for upgrade in upgrades:
            answer = said_to(served, b"GET /badge/x.svg HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 404 ") and b"101" not in answer.partition(b"\r\n")[0]
        assert get(served)


def test_an_event_says_what_has_changed_and_silence_that_nothing_has() -> None:
    with serving() as served:
        served.library.pipelines["m"] = pipeline("m", "filling", cached_bytes=GB, fill=FillStatus(1, 1))
        with urllib.request.urlopen(served.url + "api/events", timeout=20) as stream:
            text = ""
            while "filling 6 %" not in text:
                text = stream.readline().decode()
            served.library.pipelines["m"] = pipeline("m", "warm", cached_bytes=16 * GB)
            while ">warm<" not in text:
                text = stream.readline().decode()


# -- health ------------------------------------------------------------------------------------------------------------


def statistics(*, workers: int = 1, stuck: bool = False) -> FillStatistics:
    return FillStatistics(workers, 0, 0, 0, 0, 0, 0, 0, 0, stuck, (), ())


async def fine() -> None:
    pass


async def full() -> None:
    raise StoreFull("/secret/path is full")


async def for_ever() -> None:
    await trio.sleep_forever()


def problems(found: object) -> dict[str, str | None]:
    return {check.name: check.problem for check in found.checks}  # type: ignore[attr-defined]


async def test_health_names_what_is_wrong_and_no_paths() -> None:
    assert problems(await HealthProbe("/", fine, statistics).ask()) == {"mount": None, "index": None, "workers": None}
    found = await HealthProbe("/usr/bin", full, lambda: statistics(workers=0)).ask()
    assert not found.ok
    assert problems(found) == {
        "mount": "nothing is mounted there",
        "index": "store-full",
        "workers": "no fetch worker is ready",
    }
    assert problems(await HealthProbe("/", fine, lambda: statistics(stuck=True)).ask())["index"] == "takes no commits"


async def test_a_mount_or_an_index_that_hangs_is_said_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """The clock that jumps knows nothing of threads: the probe's own is waited for, and is out before the test ends."""
    asked, release, left = threading.Semaphore(0), threading.Event(), threading.Event()

    def hang(_: str) -> str | None:
        asked.release()
        release.wait(30)
        left.set()
        return None

    probe = HealthProbe("/hangs", for_ever, statistics, look=hang)
    began = trio.current_time()
    found = problems(await probe.ask())
    assert found["mount"] == f"does not answer within {PROBE_DEADLINE:g} s"
    assert re.match("does not take a write", found["index"] or "")
    assert trio.current_time() - began == 2 * PROBE_DEADLINE
    assert asked.acquire(timeout=20), "nobody looked"
    await trio.sleep(KEEP_SECONDS)
    assert problems(await probe.ask())["mount"] == "does not answer"
    assert not asked.acquire(timeout=0), "a second thread hangs"
    release.set()
    assert left.wait(20)


async def test_the_answer_is_kept_for_a_moment(autojump_clock: trio.testing.MockClock) -> None:
    writes: list[None] = []

    async def write() -> None:
        writes.append(None)

    probe = HealthProbe("/", write, statistics, look=lambda _: None)
    for _ in range(10):
        await probe.ask()
    assert len(writes) == 1
    await trio.sleep(KEEP_SECONDS)
    await probe.ask()
    assert len(writes) == 2


# -- a browser ---------------------------------------------------------------------------------------------------------


def chromium() -> str | None:
    import shutil

    names = ("chromium-headless-shell", "chromium", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_in_a_browser(width: int, height: int, scheme: str) -> None:
    program = chromium()
    if program is None:
        pytest.skip("no chromium (Debian: chromium-headless-shell)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with serving() as served, playwright.sync_playwright() as play:
        fill_with_examples(served.library)
        served.library.pipelines["x"] = pipeline(HOSTILE)
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append("a dialog opened"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.url)
        page.wait_for_selector("#live-state[data-state=on]")
        assert page.locator("tr[data-key='p-voice-agent'] .chip").inner_text() == "filling 62 %"
        assert page.locator(".starts li").count() == 3
        # Wide things scroll or wrap: the page itself never scrolls sideways.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Live, without a reload, and what somebody types stays.
        page.fill("input[type=search]", "half-typed")
        page.evaluate("window.same = true")
        served.library.pipelines["voice-agent"] = pipeline("voice-agent", "warm", cached_bytes=16 * GB)
        page.wait_for_selector("tr[data-key='p-voice-agent'] .chip.warm", timeout=10_000)
        assert page.evaluate("window.same") is True
        assert page.input_value("input[type=search]") == "half-typed"
        # The error is the first thing on the page, with what to run.
        assert page.evaluate("document.querySelector('main').firstElementChild.className") == "alarm"
        assert page.locator(".alarm code").inner_text() == "instantstart verify gated-model --access"
        assert page.locator(".tick-label").all_text_contents() == ["85 %", "95 %"]
        page.fill("input[type=search]", "qwen")
        page.press("input[type=search]", "Enter")
        page.wait_for_selector("tr[data-key='p-qwen3-30b-a3b']")
        assert page.locator("tbody tr").count() == 1
        # Every picture has words, every control a name, and text can be read on its ground.
        unnamed = page.evaluate(
            "[...document.querySelectorAll('svg:not([aria-hidden]), input:not([type=hidden])')]"
            ".filter(e => !e.getAttribute('aria-label')).length"
        )
        assert unnamed == 0
        assert page.locator("h1").count() == 1 and page.get_attribute("html", "lang") == "en"
        assert contrast(page, ".quiet") >= 4.5 and contrast(page, "tbody .id") >= 7
        page.click("tr[data-key='p-qwen3-30b-a3b'] a")
        page.wait_for_selector(".facts")
        assert "pid 7 (vllm, uid 1000)" in page.inner_text(".facts") and page.locator("tbody tr").count() == 3
        assert page.locator(".starts li").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert said == []
        assert all(address.startswith(served.url) for address in asked)
        browser.close()


def contrast(page: object, selector: str) -> float:
    """WCAG contrast of an element's text on the page's ground."""
    colours = page.evaluate(  # type: ignore[attr-defined]
        "s => [getComputedStyle(document.querySelector(s)).color, getComputedStyle(document.body).backgroundColor]",
        selector,
    )

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(colour) for colour in colours), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_page_of_a_pipeline_tells_each_caller_what_is_his() -> None:
    with serving(sight=Sight(False, 1000, frozenset(), False)) as served:
        fill_with_examples(served.library)
        served.library.pipelines.hidden.add("flux-dev")
        found = json.loads(get(served, "api/pipelines/gated-model"))
        assert found["used_by"] is None and found["revision"] == "" and found["row"]["sources"] == []
        assert found["problem"]["text"] == "access-refused", "messages name sources"
        assert [file["percent"] for file in found["files"]] == [100, 60, 0]
        assert "access-refused" in get(served, "pipelines/gated-model")
        for path in ("pipelines/flux-dev", "pipelines/none", "api/pipelines/flux-dev", "api/pipelines/none"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(served, path)
            with refused.value as answer:
                assert answer.code == 404
        assert f"<b>{os.uname().nodename}</b>" not in get(served)


def test_what_to_run_is_told_for_each_error_and_the_rest_is_counted() -> None:
    error = ErrorStatus("digest-mismatch", "m", "2026-01-01T00:00:00Z")
    failed = [pipeline(f"p{number}", "error", error=error) for number in range(7)]
    shown, count = error_advice.problems([pipeline("good", "warm"), *failed], details=True)
    assert count == 7 and [one.pipeline for one in shown] == [f"p{number}" for number in range(error_advice.SHOWN)]
    assert shown[0].command == "instantstart verify p0" and shown[0].text == "digest-mismatch: m"
    known = {kind.code for kind in subclasses(InstantStartError)}
    assert set(error_advice.COMMANDS) <= known, "a code that no error has"


def subclasses(kind: type[InstantStartError]) -> Iterator[type[InstantStartError]]:
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


def test_the_fake_is_what_the_site_asks_of_a_library() -> None:
    from instantstart_fs.admin.administration import Administration
    from instantstart_fs.filler.scheduler import Filler
    from instantstart_fs.upkeep.snapshot import Snapshots
    from instantstart_fs.views.pipelines import Pipelines

    fake = FakeLibrary()
    for part, real, name in (
        (fake.snapshots, Snapshots, "store_summary"),
        (fake.snapshots, Snapshots, "prove_index_writable"),
        (fake.filler, Filler, "statistics"),
        (fake.pipelines, Pipelines, "shown_to"),
        (fake.pipelines, Pipelines, "status"),
        (fake.pipelines, Pipelines, "ensure_loaded"),
        (fake.admin, Administration, "used_by"),
    ):
        assert callable(getattr(real, name)) and callable(getattr(part, name))


def test_placement_follows_the_pages_rules() -> None:
    """Who may not see a pipeline gets the answer for one that is not there; no region, and a tier that is silent, are
    told apart from an empty region."""

    def ask(served: Served, pipeline: str) -> tuple[int, dict[str, object]]:
        try:
            with urllib.request.urlopen(f"{served.url}v1/placement/{pipeline}", timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    class Heartbeats:
        async def placement(self, pipeline: str) -> Placement:
            if pipeline == "silent":
                raise OriginUnavailable("no answer from http://10.0.0.1")
            host = HostHolding("gpu-1", "warm", 100, 10, 10, True, "2026-01-01T00:00:00Z", 3.0)
            return Placement(pipeline, (host,), 2, 0, "2026-01-01T00:00:03Z")

    with serving(sight=ANYBODY) as served:
        library = served.library
        for name in ("p", "silent", "secret"):
            library.pipelines[name] = pipeline(name)
        library.pipelines.hidden.add("secret")
        no_region = {"code": "no-region", "message": "there is no [regional] in the configuration"}
        assert ask(served, "p") == (404, {"error": no_region})
        library.heartbeats = Heartbeats()
        for name in ("unknown", "secret"):
            missing = {"code": "pipeline-not-found", "message": f"there is no pipeline {name}"}
            assert ask(served, name) == (404, {"error": missing})
        assert ask(served, "silent") == (503, {"error": {"code": "tier-unavailable", "message": ""}})
        status, found = ask(served, "p")
        assert (status, found["live_hosts"], found["unread"]) == (200, 2, 0)
        assert found["hosts"] == [
            {
                "host": "gpu-1", "state": "warm", "percent": 100, "cached_bytes": 10, "total_bytes": 10,
                "current": True, "last_seen": "2026-01-01T00:00:00Z", "age": 3.0,
            }
        ]  # fmt: skip


def test_the_page_shows_the_region_to_who_sees_everything() -> None:
    statistics = RegionStatistics(taken_bytes=3 * GB, missed_bytes=GB, claims_lost=7, fallbacks=(("wrong", 2),))
    region = RegionSummary("s3://weights", TierStatus("down", "2026-01-01T00:00:00Z", HOSTILE), 12, statistics)
    for sight, shown in ((EVERYTHING, True), (ANYBODY, False)):
        with serving(sight=sight) as served:
            served.library.region = region
            text = get(served)
            assert ("12 hosts" in text) is ("75 % hit" in text) is ("7 lost" in text) is ("2 wrong" in text) is shown
            assert HOSTILE not in text


def test_a_body_that_nobody_reads_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for its turn, with more behind it than is kept for the application."""
    monkeypatch.setattr(app, "REQUEST_BURST_EACH", 1.0)
    monkeypatch.setattr(app, "REQUEST_RATE_EACH", 5.0)
    with serving(sight=ANYBODY) as served:
        host, _, port = served.url.removeprefix("http://").strip("/").rpartition(":")
        head = b"GET /badge/x.svg HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n"
        for _ in range(4):
            # It may be closed before all of it was taken.
            with socket.create_connection((host, int(port)), 20) as client, contextlib.suppress(ConnectionError):
                client.sendall(head + b" " * 3_000_000)
                while client.recv(65536):
                    pass
