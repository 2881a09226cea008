"""A small disk, too many pipelines: they compete for it while readers check every byte, and the daemon is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, Daemon, loop_ext4, model_directory, must, random_file, wait_for
from tests.servers.hub import HubServer

PIPELINES = 20
WEIGHTS = "model-00001-of-00001.safetensors"
SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", "20261124"))
SOAK_SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", str(time.time_ns())))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for about 9 of the 20 pipelines."""
    with loop_ext4(tmp_path, 96 * MIB) as mountpoint:
        yield mountpoint


def sources(root: Path) -> list[Path]:
    made = []
    for number in range(PIPELINES):
        directory = root / f"p{number:02}"
        random_file(directory / WEIGHTS, 3 * MIB + number * MIB // 4 + 17 * number, number)
        (directory / "config.json").write_text(f'{{"n": {number}}}')
        made.append(directory)
    return made


class Readers:
    """Threads that compare whole files with their source, by `cmp` in processes of their own. ``calm`` is cleared
    around a kill: only then may a read fail; wrong bytes never."""

    def __init__(self, daemon: Daemon, sources: list[Path], seed: int) -> None:
        self._daemon, self._sources, self._seed = daemon, sources, seed
        self._stop = threading.Event()
        self.calm = threading.Event()
        self.calm.set()
        self.compared = 0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(3)]

    def _run(self, number: int) -> None:
        generator = random.Random(self._seed * 10 + number)
        while not self._stop.is_set():
            # A few favourites, so that there are hits as well.
            source = generator.choice(self._sources[: generator.choice((5, PIPELINES))])
            calm = self.calm.is_set()
            found = self._daemon.path(source.name, WEIGHTS)
            try:
                done = subprocess.run(["cmp", str(source / WEIGHTS), str(found)], capture_output=True, timeout=60)
            except subprocess.TimeoutExpired:
                self.problems.append(f"{source.name}: the reader hangs")
                return
            if done.returncode == 0:
                self.compared += 1
            elif done.returncode == 1 or (calm and self.calm.is_set()):
                self.problems.append(f"{source.name}: {done.stdout!r} {done.stderr!r}")

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)


def taken(store: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in store.glob("slots/*/*/files/**/*") if path.is_file())


def compete(daemon: Daemon, sources: list[Path], capacity: int, kills: int, between: float, seed: int) -> None:
    print(f"seed {seed}")
    generator = random.Random(seed)
    for source in sources:
        daemon.ok("add", source.name, f"file://{source}")
    with Readers(daemon, sources, seed) as readers:
        for _ in range(kills):
            time.sleep(generator.uniform(0.5, 1.5) * between)  # the moment is what is random here
            readers.calm.clear()
            daemon.kill()
            assert taken(daemon.store) <= 0.95 * capacity, "more than the high watermark"
            daemon.start()
            readers.calm.set()
        time.sleep(between)
    assert readers.problems == []
    assert readers.compared > 3 * kills
    assert "evicted for" in daemon.text()
    daemon.restart()
    states = [daemon.status(source.name) for source in sources]
    assert {status["state"] for status in states} <= {"cold", "partial", "unverified"}
    assert sum(status["cached_bytes"] for status in states) <= taken(daemon.store) <= 0.95 * capacity
    assert os.listdir(daemon.store / "trash") == []


def competing(make_daemon: Callable[..., Daemon], disk: Path, capacity: int) -> Daemon:
    config = {
        "store": {"capacity": capacity, "min_free": "5%"},
        "eviction": {"keep_hot": "1s"},
        "fill": {"chunk_size": "1MiB"},
    }
    return make_daemon(config=config, store=disk / "store", allow=["worker", "space", "full"])


def test_twenty_pipelines_compete_for_a_small_disk(
    make_daemon: Callable[..., Daemon], tmp_path: Path, small_disk: Path
) -> None:
    daemon = competing(make_daemon, small_disk, 48 * MIB)
    compete(daemon, sources(tmp_path / "sources"), 48 * MIB, 1, 2.0, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_pipelines_compete_for_long(
    make_daemon: Callable[..., Daemon], tmp_path: Path, small_disk: Path
) -> None:
    daemon = competing(make_daemon, small_disk, 48 * MIB)
    compete(daemon, sources(tmp_path / "sources"), 48 * MIB, 40, 6.0, SOAK_SEED)


@pytest.fixture
def shared_disk(tmp_path: Path) -> Iterator[Path]:
    with loop_ext4(tmp_path, 160 * MIB) as mountpoint:
        yield mountpoint


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_fills_the_disk_in_the_middle_of_a_fill(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, shared_disk: Path
) -> None:
    """The reader never notices, what is warm stays, what had come is not fetched again when there is room."""
    small = model_directory(tmp_path / "small", seed=8, weights=(6 * MIB, 5 * MIB))
    large = model_directory(tmp_path / "large", seed=9, weights=(24 * MIB, 16 * MIB))
    weights = "model-00001-of-00002.safetensors"
    hub.publish("org/small", small)
    hub.publish("org/large", large)
    config = {
        "store": {"capacity": "100%", "min_free": 0},
        "fill": {"chunk_size": "1MiB", "connections": 4},
        "origins": {"huggingface": {"endpoint": hub.endpoint}},
    }
    daemon = make_daemon(config=config, store=shared_disk / "store", allow=["full", "space"])
    daemon.ok("add", "small", "hf://org/small")
    daemon.warm("small")
    must("cmp", small / weights, daemon.path("small", weights))  # a request: hot, so it may not go
    daemon.ok("add", "large", "hf://org/large")
    others = shared_disk / "others"
    others.mkdir()
    os.chown(others, 12345, 12345)
    hub.fault("bandwidth", port="cdn", rate=2 * MIB)
    reader = subprocess.Popen(["cmp", str(large / weights), str(daemon.path("large", weights))])
    try:
        wait_for(lambda: daemon.status("large")["cached_bytes"] >= 4 * MIB, "the middle of the fill", 30)
        # As another user, to the last block: root's processes and everybody's draw from one pool.
        done = subprocess.run(
            ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "sh", "-c", "cat /dev/zero > ballast"],
            cwd=others,  # pytest lets nobody else in from above
            capture_output=True,
            timeout=60,
        )
        assert b"No space left" in done.stderr
        wait_for(lambda: daemon.status("large").get("uncached"), "the full disk", 60)
        hub.clear()
        assert reader.wait(90) == 0, "the bytes of the reader in the middle of it"
    finally:
        reader.kill()
        reader.wait(10)
    status = daemon.status("large")
    assert status["uncached"].startswith("store full: ")
    assert (status["state"], status["error"]) == ("partial", None)
    must("cmp", small / weights, daemon.path("small", weights))
    assert daemon.status("small")["state"] == "warm"
    had = status["cached_bytes"]
    assert had >= 4 * MIB

    (others / "ballast").unlink()
    hub.forget_requests()

    def kept_again() -> bool:
        must("cmp", large / weights, daemon.path("large", weights))
        return daemon.status("large").get("uncached") is None

    wait_for(kept_again, "that there is room again", 60)
    wait_for(lambda: daemon.status("large")["state"] == "warm", "the rest", 60)
    must("cmp", large / weights, daemon.path("large", weights))
    daemon.restart()
    assert {daemon.status(name)["state"] for name in ("small", "large")} == {"warm"}


def test_a_quota_changes_with_sighup(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", seed=3, weights=(3 * MIB, 2 * MIB))
    table = {"source": f"file://{source}", "quota": "4MiB"}
    daemon = make_daemon(config={"pipelines": {"tenant": table}})
    wait_for(lambda: daemon.cli("status", "tenant").returncode == 0, "the configured pipeline")
    assert "quota: needs" in daemon.refused(1, "warm", "tenant")
    started = daemon.pid
    daemon.configure({"pipelines": {"tenant": {**table, "quota": "40MiB"}}})
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: "its quota is now" in daemon.text(), "the new quota")
    daemon.warm("tenant")
    assert daemon.status("tenant")["state"] == "unverified"
    assert daemon.pid == started and "differs from its configuration" not in daemon.text()
