"""Many processes on the same bytes: faults on one mapping, and ranks that each map every shard of a cold pipeline."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_generations import config
from tests.harness import MIB, Daemon, model_directory, probe, wait_for
from tests.servers.hub import HubServer

RANKS = 8


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = (5 * MIB, 4 * MIB + 123, 3 * MIB)
    return model_directory(tmp_path_factory.mktemp("ranks") / "model", seed=77, weights=sizes)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def assert_each_byte_was_fetched_once(hub: HubServer, wanted: list[int]) -> None:
    """``wanted``: sizes of the files that were fetched whole, by ranges that do not overlap."""
    fetched: dict[str, list[tuple[int, int]]] = {}
    for request in hub.requests("cdn"):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        if request.method == "GET" and found is not None:
            fetched.setdefault(request.path, []).append((int(found[1]), int(found[2]) + 1))
    sizes: Counter[int] = Counter()
    for path, ranges in fetched.items():
        ranges.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges)), (path, ranges)
        sizes[sum(stop - start for start, stop in ranges)] += 1
    assert not Counter(wanted) - sizes, f"fetched {sizes}, wanted {wanted}"


@pytest.mark.timeout(120)
def test_64_processes_fault_on_one_mapping_of_a_cold_file(
    make_daemon: Callable[..., Daemon], hub: HubServer, sharded: Path
) -> None:
    hub.publish("org/ranks", sharded)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/ranks")
    hub.forget_requests()
    first = shards(sharded)[0]
    assert probe("forked", "one-map", 64, first, daemon.path("p", first.name), timeout=60) == 64
    daemon.warm("p")
    assert_each_byte_was_fetched_once(hub, [path.stat().st_size for path in shards(sharded)])
    # And on a warm one, which the kernel may read itself.
    assert probe("forked", "one-map", 64, first, daemon.path("p", first.name), timeout=60) == 64


def ranks_on_a_cold_pipeline(daemon: Daemon, hub: HubServer, source: Path, rounds: int) -> None:
    for _ in range(rounds):
        hub.forget_requests()
        pairs = [path for shard in shards(source) for path in (shard, daemon.path("p", shard.name))]
        assert probe("forked", "each-maps", RANKS, *pairs, timeout=60) == RANKS
        wait_for(lambda: daemon.status("p")["state"] == "warm", "the seal")
        assert_each_byte_was_fetched_once(hub, [path.stat().st_size for path in shards(source)])
        wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the files")


@pytest.mark.timeout(120)
def test_8_ranks_map_every_shard_of_a_cold_pipeline(
    make_daemon: Callable[..., Daemon], hub: HubServer, sharded: Path
) -> None:
    hub.publish("org/ranks", sharded)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/ranks")
    ranks_on_a_cold_pipeline(daemon, hub, sharded, 2)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_8_ranks_map_every_shard_of_a_cold_pipeline_200_times(
    make_daemon: Callable[..., Daemon], hub: HubServer, sharded: Path
) -> None:
    hub.publish("org/ranks", sharded)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/ranks")
    ranks_on_a_cold_pipeline(daemon, hub, sharded, 200)
