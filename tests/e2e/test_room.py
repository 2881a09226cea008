"""A small disk, too many pipelines: they compete for it while readers check every byte, and the daemon is killed."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, Daemon, random_file, run

PIPELINES = 20
WEIGHTS = "model-00001-of-00001.safetensors"
SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", "20261124"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 96 MiB, loop-mounted: room for about 9 of the 20 pipelines."""
    image, mountpoint = tmp_path / "ext4.img", tmp_path / "ext4"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, timeout=30)
    done = run("mount", "-o", "loop", image, mountpoint, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"no loop device can be mounted here: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=30)


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
            assert taken(daemon.store) <= 0.95 * capacity + 8 * MIB, "more than the high watermark and one admission"
            daemon.start()
            readers.calm.set()
        time.sleep(between)
    assert readers.problems == []
    assert readers.compared > 3 * kills
    assert "evicted for" in daemon.text()
    daemon.restart()
    states = [daemon.status(source.name) for source in sources]
    assert {status["state"] for status in states} <= {"cold", "partial", "unverified"}
    # The readers' last misses are still being filled: the rule is the high watermark and one admission, as above.
    assert sum(status["cached_bytes"] for status in states) <= taken(daemon.store) <= 0.95 * capacity + 8 * MIB
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
    compete(daemon, sources(tmp_path / "sources"), 48 * MIB, 40, 6.0, time.time_ns())
