"""kill -9 in the middle of evictions: no orphan bytes, no record without its bytes, no wrong byte afterwards."""

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
from instantstart_fs.index.environment import Index
from tests.harness import Daemon, probe

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="as test_kill.py")

SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", "20261124"))
FILES = 400
"""So many that taking them away lasts long enough to be killed in."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("evict") / "model", random.Random(3)
    for number in range(FILES):
        path = root / f"part-{number % 7}" / f"model-{number:05}-of-{FILES:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.randbytes(20_000 + number))
    return root


def records(store: Path, pipeline: str) -> dict[int, str]:
    """What the index says about the pipeline's files, after a kill: index in the manifest → state."""
    with Index.open(str(store / "index")) as index, index.reading() as txn:
        record = txn.get_pipeline(pipeline)
        assert record is not None
        return {number: file.state for number, file in txn.files(pipeline, record.generation)}


def files_of(store: Path, pipeline: str) -> list[Path]:
    return [path for path in (store / "slots" / pipeline).glob("*/files/**/*") if path.is_file()]


def evict_and_kill(daemon: Daemon, pipeline: str, generator: random.Random, *, seen: bool) -> str:
    """Kill at a random moment after the order, or (``seen``) as soon as files are on their way out."""

    def order() -> None:
        with contextlib.suppress(InstantStartError, OSError), Client(str(daemon.socket)) as client:
            client.evict(pipeline)

    thread = threading.Thread(target=order, daemon=True)
    thread.start()
    if seen:
        until = time.monotonic() + 10
        while not os.listdir(daemon.store / "trash") and time.monotonic() < until:
            pass
        how = "files in the trash"
    else:
        delay = generator.uniform(0.0, 0.08)
        time.sleep(delay)  # the moment is what is random here
        how = f"{delay * 1000:.1f} ms after the order"
    daemon.kill()
    thread.join(10)
    return how


def rounds(daemon: Daemon, source: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    print(f"seed {seed}")
    sample = sorted(source.rglob("*.safetensors"))
    for number in range(count):
        daemon.warm("m")
        how = evict_and_kill(daemon, "m", generator, seen=number % 2 == 0)
        known = records(daemon.store, "m")
        left = files_of(daemon.store, "m")
        print(f"kill {number}: {how}; {len(known)} records, {len(left)} files")
        # Index first, then the bytes: a record never outlives its file.
        assert len(left) >= len(known), "records without bytes"
        daemon.start()
        assert os.listdir(daemon.store / "trash") == []
        assert len(files_of(daemon.store, "m")) == len(known), "orphan bytes"
        status = daemon.status("m")
        assert sum(file["cached_bytes"] > 0 for file in status["files"]) == len(known)
        for path in generator.sample(sample, 3):
            probe("compare", "read", path, daemon.path("m", str(path.relative_to(source))))


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], source: Path) -> Daemon:
    daemon = make_daemon(config={"eviction": {"keep_hot": "0s"}}, allow=["worker"])
    daemon.ok("add", "m", f"file://{source}")
    return daemon


def test_killed_in_evictions(daemon: Daemon, source: Path) -> None:
    rounds(daemon, source, 3, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_in_many_evictions(daemon: Daemon, source: Path) -> None:
    rounds(daemon, source, 60, int(os.environ.get("INSTANTSTART_TEST_SEED", str(time.time_ns()))))
