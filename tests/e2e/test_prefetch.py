"""The prefetch helper against a real daemon: descriptors under a lease, a cold fill followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from instantstart_fs.errors import PipelineNotFound
from instantstart_fs.prefetch import LeaseSource, Stager, plan
from tests.harness import Daemon, wait_for


def staged(daemon: Daemon, pipeline: str, tmp_path: Path) -> dict[str, bytes]:
    source = LeaseSource(pipeline, str(daemon.socket))
    with Stager(source, timeout=30).start(plan(source.weights, None, ["cpu"])) as stage:
        stage.wait(60)
        assert daemon.status(pipeline)["leases"] == 1
        found = {}
        for path in stage.paths:
            exported = stage.export(path)
            assert exported.fd is not None
            try:
                found[path] = os.pread(exported.fd, exported.size, 0)
            finally:
                os.close(exported.fd)
    return found


def test_a_cold_pipeline_is_followed_and_a_warm_one_taken_at_once(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    wanted = {path.name: path.read_bytes() for path in model.glob("*.safetensors")}
    assert daemon.status("m")["state"] == "cold"
    assert staged(daemon, "m", tmp_path) == wanted
    assert staged(daemon, "m", tmp_path) == wanted
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")


def test_while_it_is_leased_it_is_neither_evicted_nor_removed(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    source = LeaseSource("m", str(daemon.socket))
    try:
        files = source.files()
        opened = next(files)
        assert "lease" in daemon.refused(1, "evict", "m")
        assert "lease" in daemon.refused(1, "remove", "m")
        assert os.pread(opened.fd, opened.size, 0) == (model / opened.path).read_bytes()
        opened.close()
        for other in files:
            other.close()
        assert not source.wait_ended(0.05)
    finally:
        source.close()
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")
    daemon.ok("evict", "m")


def test_an_unknown_pipeline_is_said(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    try:
        LeaseSource("nothing", str(daemon.socket))
    except PipelineNotFound:
        return
    raise AssertionError("it was opened")
