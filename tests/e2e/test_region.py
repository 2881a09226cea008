"""One pull for a region: hosts that miss together share the work, whoever dies meanwhile, and a fresh host asks the
origin for nothing. Real daemons in network namespaces, a real SeaweedFS with three volume servers: tests/region.py.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from bench.common import make_model
from tests.harness import MIB, wait_for
from tests.region import Region, RegionHost, why_no_region, why_no_tier
from tests.servers.named_engine import NAMED

REASON = why_no_region()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
NO_TIER = why_no_tier()
needs_tier = pytest.mark.skipif(NO_TIER is not None, reason=NO_TIER or "")
PULLED_ONCE = 1.05
"""Of the pipeline's size: what the origin may send for a whole region."""
SHARED = 1.5
"""The same on a machine of which nothing is known: one that gives nobody a turn for seconds makes a tier look dead."""
EIGHT = 8
SLOW_ORIGIN = "100mbit"
"""So that the origin is the limit, and not this machine's processors."""


NUMBERS = itertools.count(1)
"""Of pipelines: the hosts of a module's tests are the same ones."""


class Source:
    """Models that differ from one another, each published once. ``size``: bytes of all its files."""

    def __init__(self, directory: Path, region: Region, weights: int) -> None:
        self._directory, self._region, self._weights = directory, region, weights
        self._added: list[tuple[str, list[RegionHost] | None]] = []
        self.model = directory
        self.size = 0

    def next(self, hosts: list[RegionHost] | None = None, weights: int = 0) -> str:
        """Another model; the name of the pipeline that every host (or these) has of it now. ``weights``: 0 = as all."""
        name = f"p{next(NUMBERS)}"
        self._added.append((name, hosts))
        self.model = make_model(self._directory / name, weights or self._weights, 4).directory
        self.size = sum(path.stat().st_size for path in self.model.iterdir())
        self._region.publish(f"org/{name}", self.model)
        self._region.add(name, f"hf://org/{name}", hosts)
        self._region.hub.forget_requests()  # of listing it
        return name

    def remove(self) -> None:
        """Take them off the hosts again: their disk is one."""
        for name, hosts in self._added:
            for host in self._region.hosts if hosts is None else hosts:
                host.cli("remove", name, "--force")

    def pulled(self) -> float:
        """How many times its size the origin has sent."""
        return self._region.origin_egress() / self.size


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Region]:
    """Eight hosts for all long tests; each leaves eight that run."""
    config = {"fill": {"chunk_size": "1MiB"}}
    with Region(tmp_path_factory.mktemp("eight"), EIGHT, origin_rate=SLOW_ORIGIN, config=config) as region:
        yield region


@pytest.fixture
def source(eight: Region, tmp_path: Path) -> Iterator[Source]:
    eight.hub.reset()
    made = Source(tmp_path, eight, 128 * MIB)
    yield made
    made.remove()


def while_warming(region: Region, name: str, act: Callable[[], None], hosts: list[RegionHost]) -> dict[str, float]:
    """All of ``hosts`` want the pipeline; ``act`` is called meanwhile. Seconds by host."""
    failed: list[BaseException] = []

    def acting() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=acting)
    thread.start()
    try:
        return region.warm(name, hosts)
    finally:
        thread.join(60)
        assert not failed, failed


# -- the short ones ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_without_a_tier_each_host_pulls_for_itself(tmp_path: Path) -> None:
    """What a region is measured against, and that it is measured at all."""
    with Region(tmp_path / "region", 2, tier="") as region:
        source = Source(tmp_path, region, 16 * MIB)
        name = source.next()
        region.warm(name)
        assert source.pulled() == pytest.approx(2.0, abs=0.01)
        assert [region.from_origin(host) for host in region.hosts] == [source.size] * 2
        assert [region.from_tier(host) for host in region.hosts] == [0, 0]
        region.prove(name, source.model)


@needs_tier
@pytest.mark.timeout(180)
@pytest.mark.parametrize("tier", ["seaweed", "directory", *(["named"] if NAMED.hostname else [])])
def test_three_hosts_pull_once_and_a_fourth_pulls_nothing(
    tmp_path: Path, tier: Literal["seaweed", "directory", "named"]
) -> None:
    with Region(tmp_path / "region", 3, tier=tier, origin_rate="200mbit") as region:
        source = Source(tmp_path, region, 48 * MIB)
        name = source.next()
        region.warm(name)
        assert source.pulled() <= SHARED
        assert sum(region.from_origin(host) for host in region.hosts) <= SHARED * source.size
        region.prove(name, source.model)
        fresh = region.add_host()
        region.add(name, f"hf://org/{name}", [fresh])
        region.hub.forget_requests()
        region.warm(name, [fresh])
        assert region.origin_requests() == 0, "nor is it asked: adding it has proved that it may be read"
        assert region.from_tier(fresh) >= 48 * MIB
        region.prove(name, source.model, [fresh])
        # What the region's seal proves is read at once, though the way to the origin protects nothing, and the file can
        # never be whole here.
        another = region.add_host()
        region.add(name, f"hf://org/{name}", [another])
        region.hub.kill()
        assert region.delete_in_tier("/c/00000005")
        shard = max(source.model.iterdir(), key=lambda path: path.stat().st_size)
        with open(another.path(name) / shard.name, "rb") as file:
            assert file.read(1000) == shard.read_bytes()[:1000]


# -- eight hosts -------------------------------------------------------------------------------------------------------


@needs_tier
@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_eight_hosts_pull_once_in_the_time_of_one(eight: Region, source: Source) -> None:
    name = source.next(eight.hosts[:1])
    one = eight.warm(name, eight.hosts[:1])["host0"]
    name = source.next()
    seconds = eight.warm(name)
    assert source.pulled() <= PULLED_ONCE
    assert max(seconds.values()) <= 1.3 * one, f"{seconds}, one alone {one:.2f} s"
    eight.prove(name, source.model)


@needs_tier
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", range(20))
def test_a_killed_host_costs_its_chunks_in_flight_and_nobody_a_failure(
    eight: Region, source: Source, moment: int
) -> None:
    chance = random.Random(moment)
    # A host has a group of chunks in hand, here 8 MiB; what it has not put is pulled again. Of 16 GB that is nothing.
    name = source.next(weights=256 * MIB)
    victim = chance.choice(eight.hosts)
    others = [host for host in eight.hosts if host is not victim]
    fraction = chance.uniform(0.02, 0.98)

    def kill() -> None:
        wait_for(lambda: eight.origin_egress() >= fraction * source.size, "the origin's bytes", 60)
        victim.kill()

    asking = threading.Thread(target=lambda: victim.cli("warm", name, "--all"))
    asking.start()
    try:
        while_warming(eight, name, kill, others)
    finally:
        asking.join(60)
        victim.start()
    assert source.pulled() <= PULLED_ONCE
    eight.prove(name, source.model, others)
    eight.warm(name, [victim])
    eight.prove(name, source.model, [victim])


@needs_tier
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_killed_volume_server_is_not_noticed(eight: Region, source: Source) -> None:
    assert eight.cluster is not None
    cluster = eight.cluster
    name = source.next()

    def kill() -> None:
        wait_for(lambda: eight.origin_egress() >= 0.5 * source.size, "the origin's bytes", 60)
        cluster.kill_volume_server(1)

    try:
        while_warming(eight, name, kill, eight.hosts)
    finally:
        cluster.start_volume_server(1)
    assert source.pulled() <= PULLED_ONCE
    eight.prove(name, source.model)


@needs_tier
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_volume_server_that_hangs_costs_time_and_no_failure(eight: Region, source: Source) -> None:
    assert eight.cluster is not None
    name = source.next()
    with eight.cluster.paused_volume_server(2):
        eight.warm(name)
    eight.prove(name, source.model)


@needs_tier
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_origin_is_not_missed_once_the_first_host_is_done(eight: Region, source: Source) -> None:
    name = source.next()
    eight.warm(name, eight.hosts[:1])
    others = eight.hosts[1:]
    eight.hub.kill()
    try:
        eight.warm(name, others)
        eight.prove(name, source.model, others)
    finally:
        eight.hub.restart()


@needs_tier
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_tier_that_goes_away_costs_a_bounded_delay(eight: Region, source: Source) -> None:
    """Its network is cut off in the middle: nobody answers, nothing is refused. The rest comes from the origin."""
    assert eight.cluster is not None
    gateway = eight.cluster.gateway
    hosts = eight.hosts[:2]
    name = source.next(hosts)

    def cut() -> None:
        wait_for(lambda: eight.origin_egress() >= 0.3 * source.size, "the origin's bytes", 60)
        gateway.unplug()

    started = time.monotonic()
    try:
        while_warming(eight, name, cut, hosts)
        seconds = time.monotonic() - started
    finally:
        gateway.plug_in()
    # Both take all of it from an origin of 12 MB/s, and wait a little for the tier first.
    assert seconds < 2 * source.size / 11e6 + 30
    eight.prove(name, source.model, hosts)
