"""Readers of a pipeline that is filled, sealed, evicted, updated, removed and added under them, on a real mount: each
byte is of one version, and of one that could be seen when the file was opened; no other error than the documented ones.

The seed is printed; INSTANTSTART_TEST_SEED=… repeats a run as far as timing lets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import PipelineBusy
from tests.e2e.test_generations import config
from tests.harness import MIB, REPOSITORY, Daemon, random_file, safetensors_file
from tests.servers.hub import HubServer

ACTORS = 3
VERSIONS = 3
NEWS = 0.5
"""Seconds that the kernel's news of a change may take longer than the answer to the command (seen: 1 to 2 ms)."""
SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", "20261124"))
SOAK_SEED = int(os.environ.get("INSTANTSTART_TEST_SEED", str(time.time_ns())))
REPO = "org/churn"


class Seen(NamedTuple):
    """``version`` could be seen from ``since`` until ``until``."""

    version: int
    since: float
    until: float


def make_version(directory: Path, number: int) -> Path:
    """Two shards of the same sizes in each version, a config, and a file whose name only this version has."""
    safetensors_file(directory / "model-00001-of-00002.safetensors", 3 * MIB, number * 10)
    random_file(directory / "model-00002-of-00002.safetensors", 2 * MIB + 77, number * 10 + 1)
    (directory / "config.json").write_text(json.dumps({"version": number}))
    (directory / f"only-{number}.json").write_text("{}" + " " * number)
    return directory


class Admin:
    """Changes the pipeline, and notes which version could be seen when."""

    def __init__(self, client: Client, hub: HubServer, versions: list[Path], pause: Path, seed: int) -> None:
        self.client, self.hub, self.versions, self.pause = client, hub, versions, pause
        self.random = random.Random(seed)
        self.seen: list[Seen] = []
        self.removed: list[tuple[float, float]] = []
        self.done: Counter[str] = Counter()
        self.version, self.since = 0, 0.0

    def add(self) -> None:
        self.publish()
        self.since = time.monotonic()
        owner = {"uid": os.geteuid(), "gid": os.getegid(), "mode": 0o555}
        self.client.add(PipelineSpec(id="p", models=(ModelSpec(f"hf://{REPO}"),), **owner))

    def publish(self) -> None:
        self.version = self.random.randrange(VERSIONS)
        self.hub.publish(REPO, self.versions[self.version])

    def step(self) -> None:
        what = self.random.choices(("warm", "update", "evict", "remove", "verify"), (6, 3, 5, 1, 1))[0]
        getattr(self, what)()

    def warm(self) -> None:
        self.client.warm("p", everything=self.random.random() < 0.5)
        deadline = time.monotonic() + self.random.choice((0.0, 0.05, 2.0))
        while time.monotonic() < deadline:
            if self.client.status("p").state == "warm":
                self.done["warm"] += 1
                return
            time.sleep(0.01)

    def update(self) -> None:
        before, since = self.version, self.since
        self.publish()
        now = time.monotonic()
        self.client.update("p")
        self.seen.append(Seen(before, since, time.monotonic()))
        self.since = now
        self.done["update"] += 1

    def evict(self) -> None:
        """The readers let go for a moment, and open again while it is tried."""
        self.pause.touch()
        time.sleep(0.05)
        self.pause.unlink()
        for _ in range(10):
            with contextlib.suppress(PipelineBusy):
                self.client.evict("p")
                self.done["evict"] += 1
                return

    def remove(self) -> None:
        began = time.monotonic()
        self.client.remove("p")
        now = time.monotonic()
        self.seen.append(Seen(self.version, self.since, now))
        self.removed.append((began, now))
        self.add()
        self.done["remove"] += 1

    def verify(self) -> None:
        assert not self.client.verify("p").healed

    def end(self) -> None:
        self.seen.append(Seen(self.version, self.since, time.monotonic()))


def churn(daemon: Daemon, hub: HubServer, tmp_path: Path, seconds: float, seed: int) -> Counter[str]:
    print(f"seed {seed}")
    versions = [make_version(tmp_path / f"version-{number}", number) for number in range(VERSIONS)]
    pause = tmp_path / "pause"
    with Client(str(daemon.socket)) as client:
        admin = Admin(client, hub, versions, pause, seed)
        admin.add()
        command = [sys.executable, "-m", "tests.churn", f"{seconds:g}"]
        actors = [
            subprocess.Popen(
                [*command, str(seed + number), str(pause), str(daemon.path("p")), *map(str, versions)],
                stdout=subprocess.PIPE,
                cwd=REPOSITORY,
            )
            for number in range(ACTORS)
        ]
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                admin.step()
            outputs = [actor.communicate(timeout=60)[0] for actor in actors]
        finally:
            for actor in actors:
                actor.kill()
        admin.end()
    done: Counter[str] = Counter(admin.done)
    for actor, output in zip(actors, outputs, strict=True):
        assert actor.returncode == 0
        found = json.loads(output)
        assert found["violations"] == []
        done.update(found["done"])
        done.update(found["errors"])
        for began, opened, fits, failed in found["opens"]:
            possible = {seen.version for seen in admin.seen if seen.since <= opened and began <= seen.until + NEWS}
            assert possible & set(fits), f"opened {began}–{opened}: the bytes of {fits}, where {possible} could be seen"
            if failed is not None:
                done["EIO"] += 1
                told = [when for when in admin.removed if began <= when[1] + NEWS and when[0] <= failed]
                assert told, f"EIO at {failed} by a handle opened at {began}, and nothing was removed meanwhile"
    print(dict(done))
    return done


@pytest.mark.timeout(120)
def test_every_byte_is_of_one_version_whatever_happens_meanwhile(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    daemon = make_daemon("d", config=config(hub))
    done = churn(daemon, hub, tmp_path, 6, SEED)
    assert min(done[what] for what in ("warm", "update", "evict", "read", "map")) > 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_byte_is_of_one_version_for_minutes(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    daemon = make_daemon("d", config=config(hub))
    done = churn(daemon, hub, tmp_path, 240, SOAK_SEED)
    assert min(done[what] for what in ("warm", "update", "evict", "remove", "read", "map")) > 10
