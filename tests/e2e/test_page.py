"""Page, metrics, health and cold starts of a real daemon, over HTTP."""

from __future__ import annotations

import contextlib
import html.parser
import http.client
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import MIB, Daemon, model_directory, must, run, wait_for
from tests.servers.hub import HubServer

PORT_0 = {"http": {"listen": "127.0.0.1:0"}}
LIMIT = 20.0


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: str


def base(daemon: Daemon) -> str:
    found = re.findall(r"page (http://\S+)", daemon.text())
    assert found, daemon.text()
    return str(found[-1])


def get(daemon: Daemon, path: str, **headers: str) -> Answer:
    request = urllib.request.Request(base(daemon) + path.lstrip("/"), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return Answer(answer.status, answer.headers, answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read().decode())


def values(daemon: Daemon) -> dict[str, float]:
    text = get(daemon, "/metrics").text
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "source", weights=(6 * MIB, 4 * MIB))


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon(config={**PORT_0, "fill": {"chunk_size": "1MiB"}})


def test_page_metrics_and_health_follow_a_cold_start(daemon: Daemon, source: Path) -> None:
    daemon.ok("add", "my-llm", f"file://{source}")
    daemon.ok("mark", "my-llm", "requested")
    health = json.loads(get(daemon, "/healthz").text)
    assert health == {"ok": True, "checks": {"mount": "ok", "index": "ok", "workers": "ok", "store": "ok"}}
    page = get(daemon, "/")
    assert page.status == 200 and "my-llm" in page.text and '<span class="chip cold">cold</span>' in page.text
    assert "file://" not in page.text, "sources are not for everybody"

    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        must("cksum", str(daemon.path("my-llm", name)))
    wait_for(lambda: daemon.status("my-llm")["state"] == "unverified", "the fill")
    daemon.ok("mark", "my-llm", "ready")

    found = wait_for(lambda: (it := values(daemon))["instantstart_pipelines|unverified"] == 1 and it, "the metrics")
    assert found["instantstart_fetched_bytes_total|file"] >= 10 * MIB
    assert found["instantstart_opens_total|daemon"] + found.get("instantstart_opens_total|passthrough", 0) >= 2
    assert found["instantstart_fills_total"] == 1
    assert found["instantstart_cold_starts_total|cold"] == 1
    assert found["instantstart_healthy"] == 1
    assert found["instantstart_store_used_bytes"] >= 10 * MIB
    assert found["instantstart_read_bytes_total"] >= 6 * MIB
    assert found["instantstart_pipeline_state|my-llm|unverified"] == 1

    (record,) = json.loads(daemon.ok("explain", "my-llm", "--json"))
    assert record["state"] == "cold" and record["opened_files"] == record["weight_files"] == 2
    assert record["fetched_bytes"] >= 10 * MIB and record["waits"] >= 1 and record["slowest_wait"] > 0
    assert record["sealed_after"] > 0 and record["requested"] < record["started"] < record["ready"]
    assert [phase["name"] for phase in record["phases"]][:2] == ["scheduling", "fetching"]
    drawn = daemon.ok("explain", "my-llm")
    assert "fetching" in drawn and "2 of 2 weight files opened" in drawn and "\x1b" not in drawn
    assert "my-llm" in get(daemon, "/").text
    detail = json.loads(get(daemon, "/api/pipelines/my-llm").text)
    assert {file["state"] for file in detail["files"]} >= {"unverified"} and len(detail["cold_starts"]) == 1
    assert detail["file_count"] == len(detail["files"]) and "my-llm" in get(daemon, "/pipelines/my-llm").text
    (shown,) = json.loads(get(daemon, "/api/cold-starts/my-llm").text)
    assert shown["fetched_bytes"] == record["fetched_bytes"] and "slowest_file" not in shown


def test_cold_starts_survive_a_restart_and_go_with_their_pipeline(daemon: Daemon, source: Path) -> None:
    daemon.ok("add", "m", f"file://{source}")
    must("cksum", str(daemon.path("m", "model-00002-of-00002.safetensors")))
    (before,) = json.loads(daemon.ok("explain", "m", "--json"))
    daemon.restart()
    (after,) = json.loads(daemon.ok("explain", "m", "--json"))
    assert after["started"] == before["started"] and after["fetched_bytes"] >= before["fetched_bytes"] > 0
    assert after["interrupted"]
    # The mark of an engine that became ready while the daemon was away.
    moment = (datetime.fromisoformat(after["started"]) + timedelta(seconds=5)).isoformat(timespec="milliseconds")
    daemon.ok("mark", "m", "first-token", "--at", moment)
    assert json.loads(daemon.ok("explain", "m", "--json"))[0]["first_token"] == moment
    daemon.ok("remove", "m")
    daemon.ok("add", "m", f"file://{source}")
    assert json.loads(daemon.ok("explain", "m", "--json")) == []
    assert "no cold start seen yet" in daemon.ok("explain", "m")
    assert "no cold start began" in daemon.refused(1, "mark", "m", "ready")
    assert "none of requested" in daemon.refused(2, "mark", "m", "finished")
    daemon.refused(1, "mark", "nobody", "ready")


class Assets(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[name]) for name in ("src", "href", "action", "data-events") if given.get(name)]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "script":
            assert given.get("src"), "an inline script"


def test_nothing_comes_from_outside_and_nothing_is_inline(daemon: Daemon) -> None:
    page = get(daemon, "/")
    assets = Assets()
    assets.feed(page.text)
    assert assets.addresses and all(address.startswith("/") for address in assets.addresses)
    assert not assets.inline
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for address in assets.addresses:
        if address.startswith("/static/"):
            asset = get(daemon, address)
            assert asset.status == 200 and "immutable" in asset.headers["Cache-Control"]
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", asset.text)


def test_read_only_and_for_known_names_alone(daemon: Daemon) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        request = urllib.request.Request(base(daemon), data=b"x" * 1000 if method != "OPTIONS" else None, method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=LIMIT)
        assert refused.value.code == 405
        refused.value.close()
    # DNS rebinding: a page of evil.example that resolves to 127.0.0.1.
    assert get(daemon, "/api/pipelines", Host="evil.example").status == 400
    assert get(daemon, "/static/../app.py").status == 404
    assert get(daemon, "/static/%2e%2e%2fapp.py").status == 404
    assert get(daemon, "/nothing").status == 404


def test_badges(daemon: Daemon, source: Path) -> None:
    daemon.ok("add", "m", f"file://{source}")
    daemon.warm("m")

    def badge() -> str | None:
        found = get(daemon, "/badge/m.svg")
        assert found.status == 200 and found.headers["Content-Type"].startswith("image/svg+xml")
        return found.text if "cache: unverified" in found.text else None

    wait_for(badge, "the badge")
    unknown = get(daemon, "/badge/%3Cscript%3Ealert(1).svg")
    assert unknown.status == 404 and "cache: unknown" in unknown.text and "<script" not in unknown.text


@contextlib.contextmanager
def following(daemon: Daemon, query: str = "") -> Iterator[Callable[[], str]]:
    """``next()`` is the next event's text."""
    with urllib.request.urlopen(base(daemon) + "api/events" + query, timeout=LIMIT) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")

        def read() -> str:
            lines: list[str] = []
            while True:
                line = stream.readline().decode().rstrip("\n")
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                elif not line and lines:
                    return "\n".join(lines)

        yield read


def test_a_live_event_arrives(daemon: Daemon, source: Path) -> None:
    with following(daemon) as next_event, following(daemon, "?q=zzz") as other:
        assert "No pipelines yet" in next_event()
        assert "No pipelines yet" in other()
        daemon.ok("add", "live-one", f"file://{source}")
        assert "live-one" in next_event()
        assert "No pipeline matches" in other()
    # And the daemon stops at once although somebody listens (the fixture's end checks its time).
    daemon.keep = following(daemon)  # type: ignore[attr-defined]
    daemon.keep.__enter__()  # type: ignore[attr-defined]
    daemon.stop()


def test_hostile_clients_hold_nobody_up(daemon: Daemon) -> None:
    port = int(base(daemon).rstrip("/").rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(40)]
        for position, client in enumerate(sockets):
            client.sendall(
                [
                    b"GET / HT",
                    b"\x00\xff\x16\x03garbage\r\n\r\n",
                    b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n",
                ][position % 3]
            )
        assert get(daemon, "/healthz").status == 200
        too_long = socket.create_connection(("127.0.0.1", port), 5)
        with too_long:
            too_long.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 64 * 1024)
            with contextlib.suppress(ConnectionError):
                assert b" 200 " not in too_long.recv(100)
    assert get(daemon, "/").status == 200


def test_details_are_shown_where_asked_for(make_daemon: Callable[..., Daemon], source: Path) -> None:
    daemon = make_daemon(config={"http": {"listen": "127.0.0.1:0", "details": True}})
    daemon.ok("add", "m", f"file://{source}")
    assert f"file://{source}" in get(daemon, "/").text


def test_a_taken_port_is_no_reason_not_to_start(make_daemon: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = make_daemon(config={"http": {"listen": f"127.0.0.1:{port}"}})
        assert f"port {port} of 127.0.0.1 is taken" in daemon.text()
        assert get(daemon, "/healthz").status == 200


def test_json_logs_name_the_pipeline(make_daemon: Callable[..., Daemon], source: Path, tmp_path: Path) -> None:
    daemon = make_daemon(env={"INSTANTSTART_LOG_FORMAT": "json"}, config={"fill": {"read_deadline": "3s"}})
    daemon.ok("add", "unique-name", f"file://{source}")
    (source / "model-00001-of-00002.safetensors").write_bytes(b"another file")
    path = daemon.path("unique-name", "model-00001-of-00002.safetensors")
    assert run("cat", str(path), timeout=30).returncode != 0
    daemon.ok("remove", "unique-name")
    lines: list[dict[str, Any]] = [json.loads(line) for line in daemon.text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert any(line["message"].startswith("ready: ") for line in lines)
    about = [line for line in lines if line.get("pipeline") == "unique-name"]
    assert any(line["message"].startswith("added: ") for line in about)
    assert any(line["message"].startswith("read: origin-changed") for line in about)
    for line in lines:
        if "unique-name" in line["message"] or "model-00001" in line["message"]:
            assert line.get("pipeline") == "unique-name", line


def test_what_an_origin_refuses_and_how_long_it_takes_is_counted_by_origin(
    make_daemon: Callable[..., Daemon], hub: HubServer, source: Path
) -> None:
    """429 is visible as such; what was here when it was asked for, and what was not."""
    hub.publish("org/model", source)
    daemon = make_daemon(
        config={**PORT_0, "fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}},
        allow=["."],
    )
    daemon.ok("add", "m", "hf://org/model")
    hub.fault("status", port="cdn", status=429, count=2)
    weights = daemon.path("m", "model-00001-of-00002.safetensors")
    must("cksum", str(weights))
    hub.clear()
    daemon.warm("m")
    must("cksum", str(weights))
    found = values(daemon)
    (origin,) = {name.partition("|")[2] for name in found if name.startswith("instantstart_fetched_bytes_total|")}
    assert origin.startswith("hf://")
    assert found[f"instantstart_fetch_retries_total|origin-throttled|{origin}"] >= 2
    assert found[f"instantstart_origin_answer_seconds_count|{origin}"] >= 6
    assert 0 < found[f"instantstart_origin_answer_seconds_sum|{origin}"] < 60
    assert found["instantstart_weight_opens_total|miss"] >= 1 and found["instantstart_weight_opens_total|hit"] >= 1
    assert found["instantstart_served_bytes_total|fetched"] > 0
    assert found["process_open_fds"] > 10 and found["process_resident_memory_bytes"] > 10 * MIB


def test_a_scrape_by_the_nodes_name_needs_it_in_hosts(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(config={"http": {**PORT_0["http"], "hosts": ["node7.example"]}})
    assert get(daemon, "/metrics", Host="node7.example:9847").status == 200
    refused = get(daemon, "/metrics", Host="node8.example")
    assert refused.status == 400 and "Invalid host header" in refused.text
