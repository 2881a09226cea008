"""The command line against a real daemon: exit statuses, JSON, signals, what needs no daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, Daemon, run, wait_for


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("cli"), config={"fill": {"chunk_size": "1MiB"}}) as running:
        running.ok("add", "m", f"file://{model}")
        yield running


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_lease_passes_the_exit_status(daemon: Daemon, script: str, status: int) -> None:
    done = daemon.cli("lease", "m", "--", "sh", "-c", f"echo out; {script}")
    assert (done.returncode, done.stdout) == (status, "out\n"), done.stderr


def test_lease_of_a_command_that_is_not_there(daemon: Daemon) -> None:
    assert daemon.cli("lease", "m", "--", "/no/such/command").returncode == 127


def test_a_lease_counts_and_ends_with_its_holder(daemon: Daemon) -> None:
    """Held: counted, and neither evicted nor removed. SIGKILL of the holder ends it."""
    holder = subprocess.Popen(
        [sys.executable, "-m", "instantstart_fs.cli", "lease", "m", "--", "sleep", "60"],
        env={**os.environ, **daemon.env},
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        wait_for(lambda: daemon.status("m")["leases"] == 1, "the lease", 10)
        assert daemon.status("m")["last_request"] is not None
        assert "lease" in daemon.refused(1, "evict", "m")
        assert "lease" in daemon.refused(1, "remove", "m")
        holder.send_signal(signal.SIGKILL)
        wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end", 10)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # its sleep
        holder.wait(10)
    daemon.ok("evict", "m")


def test_warm_wait_prints_plain_lines(daemon: Daemon) -> None:
    daemon.ok("evict", "m")
    done = daemon.cli("warm", "m", "--wait")
    assert done.returncode == 0
    lines = done.stderr.splitlines() + done.stdout.splitlines()
    assert lines and "\x1b" not in done.stderr + done.stdout and "\r" not in done.stderr + done.stdout
    assert all(line.startswith("m: ") for line in lines), lines


def test_verify_heals_what_has_rotted(daemon: Daemon, hub_model: Path) -> None:
    """A byte of a sealed file changes on the disk: verify finds it, drops the file and fetches it again."""
    daemon.ok("add", "rot", "hf://org/cli")
    daemon.warm("rot")
    name = "model-00001-of-00002.safetensors"
    blob = daemon.store / "slots" / "rot" / "1" / "files" / name
    with blob.open("r+b") as file:
        file.seek(5_000_000)
        byte = file.read(1)
        file.seek(5_000_000)
        file.write(bytes([byte[0] ^ 1]))
    daemon.allow.append(r"\[rot\]")
    done = daemon.cli("verify", "rot", "--json")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, "wrong bytes were found: no success"
    assert json.loads(done.stdout)["healed"] == [name]
    daemon.warm("rot")
    assert daemon.path("rot", name).read_bytes() == (hub_model / name).read_bytes()
    assert json.loads(daemon.ok("verify", "rot", "--json"))["healed"] == []


@pytest.fixture
def hub_model(daemon: Daemon, hub: object, model: Path) -> Path:
    from tests.servers.hub import HubServer

    assert isinstance(hub, HubServer)
    hub.publish("org/cli", model)
    daemon.stop()
    daemon.configure({"fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}})
    daemon.start()
    return model


def test_fsck_after_the_index_is_lost(make_daemon: Callable[..., Daemon], model: Path) -> None:
    """The whole index deleted: fsck restores what was sealed, and nothing is fetched again: the source is gone."""
    import shutil

    source = model.parent / "fsck-source"
    shutil.copytree(model, source)
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{source}")
    daemon.warm("m", "--all")
    assert "daemon" in daemon.refused(1, "fsck", "--store", daemon.store), "fsck while a daemon runs"
    daemon.stop()
    shutil.rmtree(daemon.store / "index")
    shutil.rmtree(source)
    daemon.ok("fsck", "--store", daemon.store, "--deep")
    daemon.start()
    for path in model.rglob("*"):
        if path.is_file():
            assert daemon.path("m", str(path.relative_to(model))).read_bytes() == path.read_bytes()
    assert daemon.status("m")["state"] == "unverified"


def test_usage_errors_exit_2(daemon: Daemon) -> None:
    for arguments in (["no-such-command"], ["add"], ["warm"], ["status", "m", "--nonsense"]):
        assert daemon.cli(*arguments).returncode == 2, arguments


def test_json_errors(daemon: Daemon) -> None:
    done = daemon.cli("status", "nobody", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "pipeline-not-found"


def test_a_stale_socket_is_taken_over(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    path = tmp_path / "d" / "control.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    daemon = make_daemon()
    assert daemon.ok("ls", "--json").strip() == "[]"


def test_sigterm_ends_it_while_a_reader_waits(make_daemon: Callable[..., Daemon], hub: object, model: Path) -> None:
    from tests.servers.hub import HubServer

    assert isinstance(hub, HubServer)
    hub.publish("org/cli", model)
    hub.fault("stall", port="cdn", after=10)
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}})
    daemon.ok("add", "m", "hf://org/cli")
    reader = subprocess.Popen(
        ["cat", daemon.path("m", "model-00001-of-00002.safetensors")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: hub.requests("cdn"), "the stalled fetch", 10)
        daemon.stop()
        assert reader.wait(10) != 0
    finally:
        reader.kill()
        reader.wait(10)


def test_help_is_instant() -> None:
    done = run(sys.executable, "-m", "instantstart_fs.cli", "--help", timeout=20)
    assert done.returncode == 0 and "serve" in done.stdout
