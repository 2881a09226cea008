"""What tests of a region rest on: links of limited rate, unplugged hosts, a cluster that survives a volume server."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.region import why_no_region
from tests.servers.hub import HubServer
from tests.servers.netns import Network
from tests.servers.seaweed_cluster import SeaweedCluster

REASON = why_no_region()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MIB = 1024 * 1024


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def test_a_host_reaches_the_others_at_its_rate_and_not_when_unplugged(network: Network, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(os.urandom(9 * MIB))
    client = network.host("client")
    with HubServer(network.host("origin", rate="100mbit")) as hub:
        hub.publish("org/m", tmp_path / "model")

        def fetch() -> bytes:
            return client.get(hub.hub_port, "/org/m/resolve/main/config.json", host=hub.address)

        before = client.received()
        started = time.monotonic()
        assert fetch() == (tmp_path / "model" / "config.json").read_bytes()
        seconds = time.monotonic() - started
        assert seconds > 0.5, f"9 MiB at 100 Mbit/s, less a burst of 2 MB, take 0.6 s, not {seconds:.2f}"
        assert client.received() - before > 9 * MIB
        client.unplug()
        with pytest.raises((TimeoutError, OSError)):
            client.call(lambda: socket.create_connection((hub.address, hub.hub_port), timeout=0.3))
        client.plug_in()
        assert fetch()


def test_a_rack_reaches_the_others_over_its_uplink(network: Network) -> None:
    network.rack("r0", "100mbit")
    inside, beside, outside = network.host("a", rack="r0"), network.host("b", rack="r0"), network.host("c")

    def seconds(to: str) -> float:
        """Of 8 MiB to it."""
        started = time.monotonic()
        with inside.call(lambda: socket.create_connection((to, 7000), timeout=5)) as connection:
            connection.sendall(bytes(8 * MIB))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        return time.monotonic() - started

    for host in (beside, outside):
        server = host.call(lambda host=host: socket.create_server((host.address, 7000)))  # type: ignore[misc]
        _drain_in_background(server)
    assert seconds(outside.address) > 0.4
    assert seconds(beside.address) < 0.4


def _drain_in_background(server: socket.socket) -> None:
    def drain() -> None:
        with server:
            connection, _ = server.accept()
            with connection:
                while connection.recv(MIB):
                    pass

    threading.Thread(target=drain, daemon=True).start()


def test_objects_outlive_a_volume_server(network: Network, tmp_path: Path) -> None:
    body = os.urandom(2 * MIB)
    with SeaweedCluster(network, tmp_path / "weed", rate="2gbit") as cluster, cluster.client() as client:
        cluster.new_bucket("bucket")
        for number in range(4):
            client.put_object(Bucket="bucket", Key=f"before/{number}", Body=body)
        assert sum(host.received() for host in cluster.volume_hosts) > 2 * 4 * len(body), "two copies of each"
        cluster.kill_volume_server(1)
        for number in range(4):
            assert client.get_object(Bucket="bucket", Key=f"before/{number}")["Body"].read() == body
            client.put_object(Bucket="bucket", Key=f"after/{number}", Body=body)
        assert set(cluster.objects("bucket", "after/")) == {f"after/{number}" for number in range(4)}
        cluster.kill_gateway()
        with pytest.raises(OSError):
            cluster.gateway.call(lambda: socket.create_connection((cluster.gateway.address, 8333), timeout=1))
