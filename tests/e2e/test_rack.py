"""The rack level between real daemons, a real hub, a real SeaweedFS: neighbours give each other what the tier holds."""

from __future__ import annotations

import http.server
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.racks import RackRecord, object_of
from tests.e2e.test_page import base
from tests.e2e.test_regional import MIB, Site, model, right
from tests.harness import Daemon, wait_for
from tests.servers.hub import HubServer
from tests.servers.ports import free_ports
from tests.servers.seaweed import SeaweedServer


@pytest.fixture
def site(tmp_path: Path, seaweed: SeaweedServer) -> Iterator[Site]:
    with HubServer() as hub:
        made = Site(tmp_path, hub, seaweed)
        try:
            yield made
        finally:
            for daemon in made.daemons:
                daemon.close(check=False)


def metrics(daemon: Daemon) -> dict[str, float]:
    """Value by name with labels."""
    with urllib.request.urlopen(base(daemon) + "metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.M)}


def at_once(site: Site, daemons: list[Daemon]) -> None:
    threads = [threading.Thread(target=site.warm, args=(daemon,)) for daemon in daemons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)


def rack(site: Site, names: str, **more: object) -> list[Daemon]:
    """Hosts of one rack that know each other; the first has the pipeline, and so has the tier."""
    ports = free_ports(len(names))
    hosts: list[Daemon] = []
    for name, port in zip(names, ports, strict=True):
        hosts.append(site.host(name, rack="r17", rack_listen=f"127.0.0.1:{port}", **more))
    site.warm(hosts[0])
    site.wait_seals(3, 60)
    wait_for(
        lambda: all(metrics(host)["instantstart_rack_neighbours"] == len(names) - 1 for host in hosts), "the rack", 60
    )
    return hosts


FILES = {"config.json": 700, "model-1.safetensors": 40 * MIB + 13, "model-2.safetensors": 20 * MIB}


@pytest.mark.timeout(180)
def test_hosts_of_a_rack_take_a_chunk_over_the_uplink_once(site: Site, tmp_path: Path) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    hosts = rack(site, "abc")
    size = sum(FILES.values())
    site.hub.forget_requests()
    at_once(site, hosts[1:])
    assert site.sent() == 0
    told = [metrics(host) for host in hosts]
    taken = [one["instantstart_rack_taken_bytes_total"] for one in told]
    given = [one["instantstart_rack_given_bytes_total"] for one in told]
    from_rack = [one['instantstart_fetched_bytes_total{origin="rack://r17"}'] for one in told[1:]]
    assert from_rack == taken[1:]
    # Each took about two thirds from its neighbours. A busy machine makes some neighbours late.
    assert all(one > size / 4 for one in taken[1:]), (taken, told)
    assert given[0] > 0 and sum(given) >= sum(taken)
    for host in hosts[1:]:
        right(host, made)


class Liar(http.server.BaseHTTPRequestHandler):
    """A neighbour that gives bytes of its own; with ``silent`` set, none."""

    asked = 0
    silent = threading.Event()

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.silent.is_set():
            self.rfile.read(1)  # until whoever asks has had enough
            return
        size = int(self.headers["Range"].rpartition("-")[2]) + 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{size - 1}/{size}")
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(os.urandom(size))

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("silent", [False, True])
def test_a_neighbour_that_lies_or_is_silent_costs_a_bounded_delay(site: Site, tmp_path: Path, silent: bool) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    (first,) = rack(site, "a")
    liar = type("OneLiar", (Liar,), {"silent": threading.Event()})
    if silent:
        liar.silent.set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        key = RegionKey(bytes.fromhex(site.key.read_text()))
        name, data = object_of(key, RackRecord("liar", "r17", f"127.0.0.1:{server.server_port}"))
        site.seaweed.client().put_object(Bucket=site.bucket, Key=f"t/{name}", Body=data)
        fresh = site.host("b", rack="r17", rack_listen=f"127.0.0.1:{free_ports(1)[0]}")
        wait_for(lambda: metrics(fresh)["instantstart_rack_neighbours"] == 2, "the rack", 60)
        site.hub.forget_requests()
        site.warm(fresh)
        server.shutdown()
    told = metrics(fresh)
    reason = "failed" if silent else "wrong"
    assert liar.asked and told[f'instantstart_rack_fallbacks_total{{reason="{reason}"}}'] >= 1
    assert site.sent() == 0, "the tier is the way out, not the origin"
    right(fresh, made)
    assert ("gave wrong bytes" in fresh.text()) is not silent
    first.close()


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_owner_that_ends_or_stops_in_the_middle(site: Site, tmp_path: Path, how: signal.Signals) -> None:
    big = {"config.json": 700, "model-1.safetensors": 200 * MIB + 13, "model-2.safetensors": 100 * MIB}
    made = model(tmp_path / "model", big)
    site.hub.publish("org/model", made)
    hosts = rack(site, "abc", rack_rate="50MB")
    site.hub.forget_requests()
    pid = hosts[0].pid
    struck = threading.Event()

    def strike() -> None:
        wait_for(lambda: metrics(hosts[0])["instantstart_rack_given_bytes_total"] > 0, "a chunk", 60)
        os.kill(pid, how)
        struck.set()

    thread = threading.Thread(target=strike)
    thread.start()
    at_once(site, hosts[1:])
    thread.join(60)
    assert struck.is_set()
    told = [{name: value for name, value in metrics(host).items() if "fallback" in name} for host in hosts[1:]]
    assert site.sent() == 0, (told, [host.text()[-2000:] for host in hosts[1:]])
    for host in hosts[1:]:
        right(host, made)
    if how == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
