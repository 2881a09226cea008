"""Cold starts of a real daemon: which record says what, and where the time went."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, Daemon, model_directory
from tests.servers.hub import HubServer

SHARD = "model-00001-of-00002.safetensors"


def read(path: Path, count: int, offset: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        while count > 0 and (data := os.pread(fd, min(count, MIB), offset)):
            count -= len(data)
            offset += len(data)
    finally:
        os.close(fd)


def records(daemon: Daemon, pipeline: str) -> list[dict[str, Any]]:
    """Oldest first."""
    return list(reversed(json.loads(daemon.ok("explain", pipeline, "--json"))))


def seconds(record: dict[str, Any]) -> dict[str, float]:
    return {phase["name"]: phase["end"] - phase["start"] for phase in record["phases"]}


def test_each_start_has_a_record_of_its_own(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model_directory(tmp_path / 'source', weights=(6 * MIB, 4 * MIB))}")
    for _ in range(3):
        daemon.ok("mark", "m", "requested")
        read(daemon.path("m", SHARD), 6 * MIB)
        daemon.ok("mark", "m", "ready")
        daemon.ok("mark", "m", "first-token")
    found = records(daemon, "m")
    assert len(found) == 3
    for record in found:
        assert record["requested"] < record["started"] < record["ready"] < record["first_token"]
        assert record["ended_after"] is not None and record["phases"][-1]["name"] == "first-token"
    assert found[0]["first_token"] < found[1]["requested"]
    assert "running" not in daemon.ok("explain", "m")
    daemon.restart()
    after = records(daemon, "m")
    assert [record["started"] for record in after] == [record["started"] for record in found]
    assert not any(record["interrupted"] for record in after)
    assert "ahead of the daemon's clock" in daemon.refused(2, "mark", "m", "ready", "--at", str(time.time() + 3600))


@pytest.mark.parametrize("room", ["enough", "none"])
def test_what_a_reader_waited_for_the_network_was_fetching(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, room: str
) -> None:
    """One chunk of a cold file, and reads through a full store: no file is sealed by either."""
    hub.publish("org/m", model_directory(tmp_path / "source", weights=(24 * MIB, 16 * MIB)))
    capacity = {"store": {"capacity": "8MiB"}} if room == "none" else {}
    config = {"origins": {"huggingface": {"endpoint": hub.endpoint}}, "fill": {"chunk_size": "1MiB"}, **capacity}
    daemon = make_daemon(config=config)
    daemon.ok("add", "m", "hf://org/m")
    hub.fault("latency", port="cdn", seconds=1.0)
    # Not beyond the first half: nothing else is to be fetched.
    read(daemon.path("m", SHARD), MIB // 2)
    if room == "none":
        read(daemon.path("m", SHARD), 6 * MIB, 12 * MIB)
    (record,) = records(daemon, "m")
    took = seconds(record)
    assert record["sealed_after"] is None
    assert took["fetching"] >= 0.9 and took.get("loading", 0.0) < 0.5 * took["fetching"], record
    assert took["fetching"] == pytest.approx(record["waited_seconds"], abs=0.01)
    text = daemon.ok("explain", "m")
    if room == "none":
        assert record["uncached_bytes"] >= 6 * MIB and "uncached" in text
    else:
        assert record["uncached_bytes"] == 0 and "uncached" not in text
