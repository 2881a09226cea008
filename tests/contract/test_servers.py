"""The test servers do what tests rely on: each of the hub's faults is what it says, and is lifted when told."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.contract.worlds import HubWorld
from tests.servers.blackhole import BlackHole
from tests.servers.faulty import FaultyProxy
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.process import answers

CONTENT = os.urandom(100_000)


class Answer:
    """One ranged GET of the model's CDN address, whatever comes."""

    def __init__(self, url: str, timeout: float = 5.0) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        try:
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": "bytes=10-50009"})
            response = connection.getresponse()
            self.status = response.status
            self.range = response.headers.get("Content-Range")
            self.length = int(response.headers["Content-Length"])
            try:
                self.body = response.read()
                self.whole = True
            except http.client.IncompleteRead as error:
                self.body, self.whole = error.partial, False
        finally:
            connection.close()


@pytest.fixture
def url(hub: HubServer, tmp_path: Path) -> str:
    world = HubWorld(hub, tmp_path)
    world.put({"model.bin": CONTENT})
    origin = world.origin()
    return origin.locate(origin.resolve().files[0]).url


def is_right(answer: Answer) -> bool:
    return (answer.status, answer.range, answer.body) == (206, "bytes 10-50009/100000", CONTENT[10:50010])


def test_each_fault_is_what_it_says_and_is_lifted(hub: HubServer, url: str) -> None:
    assert is_right(Answer(url))
    hub.fault("cut", port="cdn", after=700)
    cut = Answer(url)
    assert (cut.whole, cut.body, cut.length) == (False, CONTENT[10:710], 50000)
    hub.clear()
    hub.fault("range", port="cdn")
    assert Answer(url).range == "bytes 11-50009/100000"
    hub.clear()
    hub.fault("whole", port="cdn")
    assert Answer(url).status == 200
    hub.clear()
    hub.fault("corrupt", port="cdn", count=1)
    corrupt = Answer(url)
    assert sum(a != b for a, b in zip(corrupt.body, CONTENT[10:50010], strict=True)) == 1
    assert is_right(Answer(url))  # the one was used up
    hub.fault("bandwidth", port="cdn", rate=10_000_000)
    assert is_right(Answer(url))
    hub.clear()
    for kind in ("blackhole", "stall"):
        hub.fault(kind, port="cdn", after=5)
        with pytest.raises(TimeoutError):
            Answer(url, timeout=0.3)
        hub.clear()
    hub.fault("reset", port="cdn")
    with pytest.raises(ConnectionError):
        Answer(url)
    hub.clear()
    hub.fault("status", port="cdn", status=503, headers={"Retry-After": "1"}, probability=0.5, seed=4)
    assert {Answer(url).status for _ in range(20)} == {206, 503}
    hub.clear()
    assert is_right(Answer(url))
    assert {request.status for request in hub.requests("cdn")} >= {206, 200, 503}


def test_a_killed_hub_is_gone_and_comes_back_with_its_repositories(tmp_path: Path) -> None:
    with HubServer() as hub:
        world = HubWorld(hub, tmp_path)
        world.put({"config.json": b"{}"})
        before = world.origin().resolve()
        hub.kill()
        assert not answers(hub.hub_port)
        hub.restart()
        assert world.origin().resolve() == before
    assert not answers(hub.hub_port)
    assert not answers(hub.cdn_port)


def test_nginx_and_a_corrupting_proxy(nginx: NginxServer, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    assert is_right(Answer(f"{nginx.url}/x"))
    proxied = FaultyProxy(nginx.port, "--delay-down", "5")
    with proxied as proxy, urllib.request.urlopen(f"{proxy.url}/x", timeout=10) as response:
        assert response.read() == CONTENT
    assert not answers(proxy.port)


def test_a_black_hole_accepts_and_says_nothing(black_hole: BlackHole) -> None:
    with pytest.raises(TimeoutError):
        Answer(f"{black_hole.url}/x", timeout=0.2)
    assert black_hole.connections == 1
