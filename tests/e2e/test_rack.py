"""The rack level between real daemons, a real hub, a real SeaweedFS: neighbours give each other what the tier holds."""

from __future__ import annotations

import http.server
import itertools
import os
import re
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.config import load_config
from instantstart_fs.core.rack import LEAST_BYTES, owner
from instantstart_fs.core.region import GROUP_CHUNKS
from instantstart_fs.doctor import check_rack
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


def names(site: Site, count: int) -> list[str]:
    """Of hosts of a rack, the first of them "a", each of which owns at least a fifth of what the tier holds now. Owners
    follow from names and the region's key, which is another in each run: with any names a host may own nothing."""
    held = [(re.search(r"/([0-9a-f]{32})/c/([0-9a-f]{8})$", name), size) for name, size in site.objects().items()]
    groups: Counter[tuple[str, int]] = Counter()
    for match, size in held:
        if match is not None and size >= LEAST_BYTES:
            groups[match[1], int(match[2], 16) // GROUP_CHUNKS] += size
    for others in itertools.combinations([f"h{number}" for number in range(40)], count - 1):
        shares = dict.fromkeys(["a", *others], 0)
        for (pin, group), size in groups.items():
            shares[owner(pin, group, shares)] += size
        if min(shares.values()) >= groups.total() / 5:
            return list(shares)
    raise AssertionError(groups)


def first(site: Site, **more: object) -> Daemon:
    """Host "a", which has the pipeline, and so has the tier."""
    host = site.host("a", rack="r17", rack_listen=f"127.0.0.1:{free_ports(1)[0]}", **more)
    site.warm(host)
    site.wait_seals(3, 60)
    return host


def rack(site: Site, count: int, **more: object) -> list[Daemon]:
    """Hosts of one rack that know each other; the first has the pipeline, and so has the tier."""
    hosts = [first(site, **more)]
    for name in names(site, count)[1:]:
        hosts.append(site.host(name, rack="r17", rack_listen=f"127.0.0.1:{free_ports(1)[0]}", **more))
    wait_for(lambda: all(neighbours(host) == count - 1 for host in hosts), "the rack", 90)
    return hosts


def neighbours(daemon: Daemon) -> float:
    return metrics(daemon)["instantstart_rack_neighbours"]


FILES = {"config.json": 700, "model-1.safetensors": 40 * MIB + 13, "model-2.safetensors": 20 * MIB}


@pytest.mark.timeout(180)
def test_hosts_of_a_rack_take_a_chunk_over_the_uplink_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    hosts = rack(site, 3)
    size = sum(FILES.values())
    site.hub.forget_requests()
    at_once(site, hosts[1:])
    assert site.sent() == 0
    told: list[dict[str, float]] = []

    def counted() -> bool:  # by those who gave, too: they count when a send has ended
        told[:] = [metrics(host) for host in hosts]
        return sum(of("given")) >= sum(of("taken"))

    def of(what: str) -> list[float]:
        return [one[f"instantstart_rack_{what}_bytes_total"] for one in told]

    wait_for(counted, "all that was given to be counted", 60)
    taken, given = of("taken"), of("given")
    from_rack = [one['instantstart_fetched_bytes_total{origin="rack://r17"}'] for one in told[1:]]
    assert from_rack == taken[1:]
    # Each took what its neighbours own, two fifths at least. A busy machine makes some neighbours late.
    assert all(one > size / 4 for one in taken[1:]), (taken, told)
    assert given[0] > 0, told

    regional = load_config(str(hosts[1].config)).regional
    assert regional is not None
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, hosts[1].env[name])

    def well() -> bool:  # on a busy machine a neighbour may take longer than doctor waits
        return check_rack(regional, True).found.endswith("; all 2 neighbours answer, with this key and clock")

    wait_for(well, "doctor to find the rack well", 60)
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
    host = first(site)
    _, lies, asks = names(site, 3)
    liar = type("OneLiar", (Liar,), {"silent": threading.Event()})
    if silent:
        liar.silent.set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        key = RegionKey(bytes.fromhex(site.key.read_text()))
        name, data = object_of(key, RackRecord(lies, "r17", f"127.0.0.1:{server.server_port}"))
        site.seaweed.client().put_object(Bucket=site.bucket, Key=f"t/{name}", Body=data)
        fresh = site.host(asks, rack="r17", rack_listen=f"127.0.0.1:{free_ports(1)[0]}")
        wait_for(lambda: neighbours(fresh) == 2, "the rack", 60)
        site.hub.forget_requests()
        site.warm(fresh)
        server.shutdown()
    told = metrics(fresh)
    reason = "failed" if silent else "wrong"
    assert liar.asked and told[f'instantstart_rack_fallbacks_total{{reason="{reason}"}}'] >= 1
    assert site.sent() == 0, "the tier is the way out, not the origin"
    right(fresh, made)
    assert ("gave wrong bytes" in fresh.text()) is not silent
    host.close()


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_owner_that_ends_or_stops_in_the_middle(site: Site, tmp_path: Path, how: signal.Signals) -> None:
    big = {"config.json": 700, "model-1.safetensors": 200 * MIB + 13, "model-2.safetensors": 100 * MIB}
    made = model(tmp_path / "model", big)
    site.hub.publish("org/model", made)
    hosts = rack(site, 3, rack_rate="50MB")
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
