"""kill -9 in the middle of updates that keep nearly everything: one generation is there afterwards, whole, with the
bytes of its version, and nothing that had not changed is gone."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError
from tests.crash.test_evict import FILES, SEED, files_of, records
from tests.harness import Daemon, probe, wait_for

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="as test_kill.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Its own: the test changes it."""
    root, generator = tmp_path / "model", random.Random(4)
    for number in range(FILES):
        path = root / f"part-{number % 7}" / f"model-{number:05}-of-{FILES:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.randbytes(20_000 + number))
    return root


def update_and_kill(daemon: Daemon, generator: random.Random, *, seen: bool) -> str:
    """Kill at a random moment after the order, or (``seen``) as soon as the new generation has a name."""
    before = set(os.listdir(daemon.store / "slots/m"))

    def order() -> None:
        with contextlib.suppress(InstantStartError, OSError), Client(str(daemon.socket)) as client:
            client.update("m")

    thread = threading.Thread(target=order, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while set(os.listdir(daemon.store / "slots/m")) == before and time.monotonic() < until:
        time.sleep(0.0005)
    delay = 0.0 if seen else generator.uniform(0.0, 0.1)
    time.sleep(delay)  # the moment is what is random here
    daemon.kill()
    thread.join(10)
    return f"{delay * 1000:.1f} ms after its manifest was begun"


def rounds(daemon: Daemon, source: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    print(f"seed {seed}")
    paths = sorted(source.rglob("*.safetensors"))
    changing = paths[0]
    for number in range(count):
        daemon.warm("m")
        generation = daemon.status("m")["generation"]
        changing.write_bytes(generator.randbytes(changing.stat().st_size))
        how = update_and_kill(daemon, generator, seen=number % 3 == 0)
        known = records(daemon.store, "m")
        daemon.start()
        status = daemon.status("m")
        print(f"kill {number}: {how}; generation {generation} → {status['generation']}")
        assert status["generation"] in (generation, generation + 1)
        updated = status["generation"] > generation
        complete = [file["path"] for file in status["files"] if file["state"] == "unverified"]
        assert len(complete) == len(known) == (FILES - 1 if updated else FILES), "what had not changed is gone"
        assert sorted(os.listdir(daemon.store / "slots/m")) == [str(status["generation"]), "pipeline.json"]
        left = files_of(daemon.store, "m")
        assert len(left) == len(known) and {path.stat().st_nlink for path in left} == {1}
        for path in generator.sample(paths[1:], 3):
            probe("compare", "read", path, daemon.path("m", str(path.relative_to(source))))
        daemon.ok("update", "m")
        wait_for(lambda: {path.stat().st_nlink for path in files_of(daemon.store, "m")} == {1}, "the old one's end")
        probe("compare", "read", changing, daemon.path("m", str(changing.relative_to(source))))


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], source: Path) -> Daemon:
    daemon = make_daemon(allow=["worker"])
    daemon.ok("add", "m", f"file://{source}")
    return daemon


def test_killed_in_updates(daemon: Daemon, source: Path) -> None:
    rounds(daemon, source, 3, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_in_many_updates(daemon: Daemon, source: Path) -> None:
    rounds(daemon, source, 60, int(os.environ.get("INSTANTSTART_TEST_SEED", str(time.time_ns()))))
