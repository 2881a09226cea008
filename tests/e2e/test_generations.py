"""update, remove, evict: what holders keep, and what newcomers see."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, model_directory, must, probe, run, wait_for
from tests.servers.hub import HubServer

FIRST = "model-00001-of-00002.safetensors"
pytestmark = pytest.mark.timeout(180)


def config(hub: HubServer, **more: object) -> dict[str, object]:
    return {"fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}, **more}


@contextmanager
def holding(path: Path) -> Iterator[Callable[[str], str]]:
    """A process that holds ``path`` open and mapped and answers commands (tests/probe.py: hold)."""
    with asking([sys.executable, "-m", "tests.probe", "hold", str(path)]) as ask:
        yield ask


@contextmanager
def asking(command: list[str]) -> Iterator[Callable[[str], Any]]:
    """A process that says "ready" and then answers each line with one of JSON; killed in the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(word: str) -> Any:
        stdin.write(word + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    try:
        assert json.loads(stdout.readline()) == "ready"
        yield ask
    finally:
        process.kill()
        process.wait(10)
        stdin.close()
        stdout.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_update_under_open_files(make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path) -> None:
    old = model_directory(tmp_path / "old", seed=21)
    new = model_directory(tmp_path / "new", seed=22)
    first = hub.publish("org/model", old)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    path = daemon.path("p", FIRST)
    inode = must("stat", "-c", "%i", daemon.path("p"), timeout=10)
    with holding(path) as ask:
        assert ask("hash-map") == sha256(old / FIRST)
        second = hub.publish("org/model", new)
        daemon.ok("update", "p")
        status = daemon.status("p")
        assert (status["generation"], status["revision"]) == (2, second)
        assert first != second
        assert ask("hash-new") == sha256(new / FIRST)
        assert ask("hash-fd") == sha256(old / FIRST)
        assert ask("hash-map") == sha256(old / FIRST)
        assert (daemon.store / "slots/p/1").exists()
    assert must("stat", "-c", "%i", daemon.path("p"), timeout=10) == inode
    wait_for(lambda: not (daemon.store / "slots/p/1").exists(), "the old generation's end")
    assert probe("tree", new, daemon.path("p"), timeout=60)["files"] > 5


def test_a_container_that_bound_the_pipeline_sees_the_new_generation(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    """A mount namespace of its own, and a slave bind of /models/<id> made before the update, as containers have."""
    old, new = model_directory(tmp_path / "old", seed=25), model_directory(tmp_path / "new", seed=26)
    (new / "extra.json").write_text("{}")
    hub.publish("org/model", old)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    target = tmp_path / "in-the-container"
    target.mkdir()
    enter = ["unshare", "-m", "--propagation", "slave", sys.executable, "-m", "tests.probe", "bound"]
    with asking([*enter, str(daemon.path("p")), str(target)]) as ask:
        assert ask(".") == sorted(os.listdir(old))
        assert ask(FIRST) == sha256(old / FIRST)
        hub.publish("org/model", new)
        daemon.ok("update", "p")
        assert ask(".") == sorted(os.listdir(new))
        assert ask(FIRST) == sha256(new / FIRST)
        daemon.warm("p")
        assert ask(FIRST) == sha256(new / FIRST)
        wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the files")
        assert ask(FIRST) == sha256(new / FIRST)


def test_an_update_keeps_what_has_not_changed(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, tmp_path: Path
) -> None:
    """Shards stay, held open or not; the configuration is another. Nothing of the shards comes from the hub again."""
    new = tmp_path / "new"
    shutil.copytree(model, new)
    (new / "config.json").write_text("{}")
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    with holding(daemon.path("p", FIRST)) as ask:
        before = ask("hash-map")
        hub.publish("org/model", new)
        hub.forget_requests()
        daemon.ok("update", "p")
        assert daemon.path("p", "config.json").read_text() == "{}"
        assert ask("hash-new") == ask("hash-fd") == ask("hash-map") == before == sha256(new / FIRST)
        daemon.warm("p")
        assert daemon.status("p")["generation"] == 2
        assert "open" in daemon.refused(1, "evict", "p")
    wait_for(lambda: not (daemon.store / "slots/p/1").exists(), "the old generation's end")
    requested = daemon.status("p")["last_request"]
    wait_for(
        lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) > requested, "the next second: it shows seconds"
    )
    assert probe("tree", new, daemon.path("p"), timeout=60)["files"] > 5
    wait_for(lambda: daemon.status("p")["last_request"] != requested, "the opens after the update to count")
    weights = [request for request in hub.requests("cdn") if request.sent]
    assert len({request.path for request in weights}) == 3, "the three weights that nobody loads, for the comparison"
    assert sum(request.sent for request in weights) < 7 * MIB
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the files")
    assert daemon.path("p", FIRST).read_bytes() == (new / FIRST).read_bytes()


def test_an_update_of_what_has_not_changed_changes_nothing(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    daemon.ok("update", "p")
    assert (daemon.status("p")["generation"], daemon.status("p")["state"]) == (1, "warm")


def test_a_cold_files_holder_keeps_reading_the_old_commit_after_an_update(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    old = model_directory(tmp_path / "old", seed=23)
    new = model_directory(tmp_path / "new", seed=24)
    hub.publish("org/model", old)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    with holding(daemon.path("p", FIRST)) as ask:  # opened cold: not a byte is here yet
        hub.publish("org/model", new)
        daemon.ok("update", "p")
        assert ask("hash-fd") == sha256(old / FIRST)
        assert ask("hash-new") == sha256(new / FIRST)


def test_remove_in_the_middle_of_a_fill(make_daemon: Callable[..., Daemon], hub: HubServer, model: Path) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("bandwidth", port="cdn", rate=MIB // 4)
    daemon.ok("warm", "p")
    wait_for(lambda: daemon.status("p")["cached_bytes"] > 0, "the first chunk")
    assert daemon.status("p")["state"] == "filling"
    daemon.ok("remove", "p", timeout=20)
    hub.clear()
    assert not (daemon.store / "slots/p").exists()
    assert run("ls", daemon.path("p"), timeout=5).returncode != 0
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5


def test_evicted_pipelines_come_back(make_daemon: Callable[..., Daemon], hub: HubServer, model: Path) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    with holding(daemon.path("p", FIRST)) as ask:
        assert "open" in daemon.refused(1, "evict", "p")
        assert ask("hash-fd") == sha256(model / FIRST)
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the file")
    assert daemon.status("p")["state"] == "cold"
    assert int(must("du", "-sk", daemon.store / "slots", timeout=20).split()[0]) < 1000
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5


def test_least_recently_requested_goes_at_the_high_watermark(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    store = {"capacity": "64MiB", "low_watermark": 0.5, "high_watermark": 0.8}
    daemon = make_daemon("d", config=config(hub, store=store, eviction={"keep_hot": "0s"}))
    for position, name in enumerate(("a", "b", "c")):
        source = model_directory(tmp_path / name, seed=30 + position, weights=(14 * MIB, 6 * MIB))
        hub.publish(f"org/{name}", source)
        daemon.ok("add", name, f"hf://org/{name}")
        daemon.warm(name)
        daemon.ok("touch", name)
    wait_for(lambda: daemon.status("a")["state"] == "cold", "the eviction of the least recently requested")
    assert daemon.status("c")["state"] == "warm"
    assert probe("tree", tmp_path / "c", daemon.path("c"), timeout=60)["files"] > 5


def test_lease_holds_and_passes_the_exit_status(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    assert daemon.cli("lease", "p", "--", "sh", "-c", "exit 7").returncode == 7
    command = [sys.executable, "-m", "instantstart_fs.cli", "lease", "p", "--", "sleep", "60"]
    import os

    holder = subprocess.Popen(command, env={**os.environ, **daemon.env}, cwd=REPOSITORY)
    try:
        wait_for(lambda: daemon.status("p")["leases"] == 1, "the lease")
        assert "lease" in daemon.refused(1, "evict", "p")
    finally:
        holder.terminate()
        assert holder.wait(10) == 128 + 15
    wait_for(lambda: daemon.status("p")["leases"] == 0, "the lease's end")
    daemon.ok("evict", "p")


def test_warm_wait_prints_plain_lines_where_there_is_no_terminal(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    done = daemon.cli("warm", "p", "--wait")
    assert done.returncode == 0
    assert "\x1b" not in done.stderr + done.stdout
    assert "%" in done.stderr
    assert "warm" in done.stdout
