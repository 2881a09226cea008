"""The daemon as a process, by its command line alone: starts, serves, stops, and starts again after SIGKILL."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import children

DEADLINE = 60.0
CONTENT = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40_000}


class Daemon:
    """``serve`` in a directory of its own, and the commands that talk to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mount = root / "models"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("INSTANTSTART_")},
            "INSTANTSTART_SOCKET": str(root / "control.sock"),
            "PYTHONWARNINGS": "",
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self, *, environment: dict[str, str] | None = None) -> str:
        """Returns the ready line."""
        self.log = open(self.root / "log", "a")  # noqa: SIM115 – the process's stderr, closed in stop
        self.process = subprocess.Popen(
            [sys.executable, "-m", "instantstart_fs.cli", "serve", "--config", str(self.root / "config.toml")],
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        return self.process.stdout.readline() if readable else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(number)
        status = self.process.wait(DEADLINE)
        self.process.stdout.close()
        self.log.close()
        self.process = None
        return status

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "instantstart_fs.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def json(self, *arguments: str) -> dict[str, object]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def mounted(self) -> bool:
        return f" {self.mount} " in Path("/proc/self/mountinfo").read_text()

    def wait_until(self, condition: object) -> None:
        """Polls: what a process does is seen from outside only."""
        assert callable(condition)
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, (self.root / "log").read_text()
            time.sleep(0.05)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    for name, content in CONTENT.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path)
    write(found, "")
    yield found
    if found.process is not None:
        found.stop(signal.SIGKILL)
    subprocess.run(["umount", "-l", str(found.mount)], capture_output=True, check=False)


def write(daemon: Daemon, pipelines: str) -> None:
    (daemon.root / "config.toml").write_text(
        f'[mount]\npath = "{daemon.mount}"\n[store]\npath = "{daemon.root}/store"\nmin_free = 0\n{pipelines}'
    )


def test_a_pipeline_from_add_to_a_restart_without_its_origin(daemon: Daemon, source: Path) -> None:
    assert daemon.start().startswith("ready: 0 pipelines")
    added = daemon.run("add", "x", f"file://{source}")
    assert (added.returncode, added.stderr) == (0, "")
    assert str(daemon.mount / "x") in added.stdout
    for name, content in CONTENT.items():
        assert (daemon.mount / "x" / name).read_bytes() == content
    assert daemon.run("warm", "x", "--wait").returncode == 0
    status = daemon.json("status", "x")
    assert (status["state"], status["cached_bytes"]) == ("unverified", status["total_bytes"])
    assert daemon.run("add", "x", f"file://{source}").returncode == 1
    assert daemon.run("status", "y").stderr.count("\n") == 1
    assert daemon.run("lease", "x", "--", "sh", "-c", "exit 3").returncode == 3
    assert daemon.run("pin", "x").returncode == 0
    assert "pinned" in daemon.run("evict", "x").stderr
    assert daemon.stop() == 0
    assert not daemon.mounted()
    source.rename(source.with_name("gone"))
    assert daemon.start().startswith("ready: 1 pipelines")
    assert (daemon.mount / "x" / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    assert daemon.json("status", "x")["pinned"] is True
    assert daemon.run("remove", "x").returncode == 0
    assert os.listdir(daemon.mount / ".warm") == []
    assert daemon.stop(signal.SIGINT) == 0


def test_after_sigkill_the_next_start_clears_what_is_left(daemon: Daemon, source: Path) -> None:
    daemon.start()
    assert daemon.run("add", "x", f"file://{source}", "--warm").returncode == 0
    assert daemon.run("warm", "x", "--wait").returncode == 0
    daemon.stop(signal.SIGKILL)
    assert daemon.mounted()
    assert "is gone" in daemon.run("ls").stderr
    assert daemon.start().startswith("ready: 1 pipelines")
    assert (daemon.mount / "x" / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    assert daemon.stop() == 0


def test_the_second_daemon_of_a_store_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    second = daemon.run("serve", "--store", f"{tmp_path}/store", "--mount", f"{tmp_path}/other")
    assert second.returncode == 1
    assert str(daemon.process.pid if daemon.process else "") in second.stderr.splitlines()[-1]
    third = daemon.run("serve", "--store", f"{tmp_path}/store2", "--mount", str(daemon.mount))
    assert third.returncode == 1
    assert "served by another instantstart daemon" in third.stderr
    fourth = daemon.run("serve", "--store", f"{tmp_path}/store3", "--mount", f"{tmp_path}/other")
    assert fourth.returncode == 1
    assert "another daemon answers there" in fourth.stderr
    for failed in (second, third, fourth):
        assert "Traceback" not in failed.stderr
    assert daemon.run("fsck", "--store", f"{tmp_path}/store").returncode == 1
    assert daemon.run("ls").returncode == 0


def test_configured_pipelines_start_with_their_origin_down_and_sighup_adds_more(daemon: Daemon, source: Path) -> None:
    write(daemon, f'[pipelines.away]\nsource = "file://{source}/none"\n')
    assert daemon.start().startswith("ready: 0 pipelines")
    daemon.wait_until(lambda: daemon.run("status", "away").returncode == 0)
    away = daemon.json("status", "away")
    assert away["state"] == "error"
    assert "no such directory" in str(away["error"])
    write(daemon, f'[pipelines.here]\nsource = "file://{source}"\nmode = "0550"\n')
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: daemon.run("status", "here").returncode == 0)
    assert (daemon.mount / "here").stat().st_mode & 0o777 == 0o550
    assert daemon.run("status", "away").returncode == 1
    write(daemon, "[nonsense]\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "nonsense: unknown key" in (daemon.root / "log").read_text())
    assert daemon.run("status", "here").returncode == 0
    assert daemon.stop() == 0


def test_systemd_is_told_when_the_mount_answers(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(daemon.root / "notify"))
        notified.settimeout(DEADLINE)
        daemon.start(environment={"NOTIFY_SOCKET": str(daemon.root / "notify")})
        assert notified.recv(4096).decode().startswith("READY=1\nSTATUS=ready: 0 pipelines")
        assert daemon.mounted()
        daemon.stop()
        told = iter(lambda: notified.recv(4096), b"STOPPING=1")  # TimeoutError where it never comes
        assert all(line.startswith(b"STATUS=ready: 0 pipelines") for line in told)


def test_an_unmount_by_somebody_else_ends_the_daemon_with_its_reason(daemon: Daemon) -> None:
    daemon.start()
    # EBUSY while the daemon's own probe is in the mount.
    daemon.wait_until(lambda: subprocess.run(["umount", str(daemon.mount)], check=False).returncode == 0)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 1
    assert "was unmounted by somebody else" in (daemon.root / "log").read_text().splitlines()[-1]


def test_what_keeps_it_from_starting_is_one_line(daemon: Daemon) -> None:
    write(daemon, "[fill]\nchunk_size = 5\n")
    done = daemon.run("serve", "--config", str(daemon.root / "config.toml"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"instantstart: {daemon.root}/config.toml: fill.chunk_size: ")
    assert done.stderr.count("\n") == 1
    (daemon.root / "models").mkdir()
    (daemon.root / "models" / "file").touch()
    write(daemon, "")
    done = daemon.run("serve", "--config", str(daemon.root / "config.toml"))
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert "Traceback" not in done.stderr


def broken_workers(directory: Path, end: str) -> dict[str, str]:
    """The environment of an installation whose fetch workers do nothing but that."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        f"import os, sys, time\nif 'instantstart_fs.filler.worker' in sys.orig_argv:\n    {end}\n"
    )
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize("end", ["os._exit(3)", "time.sleep(600)"])
def test_a_stop_is_heard_while_no_fetch_worker_starts(daemon: Daemon, tmp_path: Path, end: str) -> None:
    started = threading.Thread(
        target=daemon.start, kwargs={"environment": broken_workers(tmp_path / "broken", end)}, daemon=True
    )
    started.start()
    daemon.wait_until(lambda: daemon.process is not None and workers_of(daemon.process.pid))
    assert daemon.process is not None
    daemon.process.terminate()
    began = time.monotonic()
    assert daemon.process.wait(DEADLINE) == 0
    assert time.monotonic() - began < 15
    started.join(DEADLINE)
    daemon.stop()
    assert "stopped" in (daemon.root / "log").read_text().splitlines()[-1]


def workers_of(pid: int) -> list[int]:
    return [child for child in children(pid) if b"instantstart_fs.filler.worker" in command_of(child)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_daemon_whose_fetch_workers_never_start_ends_and_says_what_to_do(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.start(environment=broken_workers(tmp_path / "broken", "os._exit(3)")) == ""
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 1
    daemon.stop()
    log = (daemon.root / "log").read_text()
    assert "Traceback" not in log
    said = log.splitlines()[-1]
    assert said.startswith("instantstart: no fetch worker starts: ")
    assert "the last one with status 3" in said
    assert f"{sys.executable} -c 'import instantstart_fs.filler.worker'" in said
    assert not daemon.mounted()


def test_a_lease_forwards_signals_to_its_command(daemon: Daemon, source: Path) -> None:
    daemon.start()
    daemon.run("add", "x", f"file://{source}")
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    leased = subprocess.Popen(
        [sys.executable, "-m", "instantstart_fs.cli", "lease", "x", "--", "sh", "-c", script],
        env=daemon.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leased.stdout is not None
    with leased.stdout:
        assert leased.stdout.readline() == "ready\n"
        assert daemon.json("status", "x")["leases"] == 1
        leased.send_signal(signal.SIGTERM)
        assert leased.stdout.readline() == "caught\n"
    assert leased.wait(DEADLINE) == 9
    daemon.wait_until(lambda: daemon.json("status", "x")["leases"] == 0)


def test_fsck_restores_a_lost_index(daemon: Daemon, source: Path) -> None:
    daemon.start()
    daemon.run("add", "x", f"file://{source}")
    assert daemon.run("warm", "x", "--wait").returncode == 0
    daemon.stop()
    (daemon.root / "store" / "index" / "data.mdb").write_bytes(b"not an index" * 1000)
    done = daemon.run("fsck", "--config", str(daemon.root / "config.toml"))
    assert done.returncode == 0, done.stderr
    assert "1 pipelines, 2 complete files" in done.stdout
    daemon.start()
    assert daemon.json("status", "x")["state"] == "unverified"
    assert (daemon.mount / "x" / "config.json").read_bytes() == b"{}"
