"""The unit under a real systemd: scripts/nspawn-test boots it in a container; elsewhere these are listed as not run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import REPOSITORY, tree_files, wait_for
from tests.nspawn.machine import Machine, why_no_machine

REASON = why_no_machine()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]
UNIT = "instantstart.service"
DESCRIPTION = "Instant Start FS: model weights, read through a mount"
GOES_ON = "the mount of the daemon before goes on"
RESTARTS = int(os.environ.get("INSTANTSTART_NSPAWN_RESTARTS", "50"))
READERS = (("held", "warm"), ("held", "warm"), ("open", "warm"), ("open", "warm")) + (("open", "cold"),) * 4


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_bytes(machine: Machine, source: Path, pipeline: str = "warm") -> None:
    """As a reader in the machine sees them."""
    names = [name for name in tree_files(source) if (source / name).stat().st_size]
    lines = machine.run("sha256sum", "--", *(f"/models/{pipeline}/{name}" for name in names), timeout=120).splitlines()
    assert {line[66:].removeprefix(f"/models/{pipeline}/"): line[:64] for line in lines} == {
        name: sha256(source / name) for name in names
    }


@pytest.fixture
def machine(tmp_path: Path, source: Path) -> Iterator[Machine]:
    """Booted, with the service installed and started, and the pipelines ``warm`` and ``cold``."""
    machine = Machine(tmp_path / "machine", binds=[source])
    lines = [f'[pipelines.{name}]\nsource = "file://{source}/{name}"\n' for name in ("warm", "cold")]
    (machine.etc / "config.toml").write_text("".join(lines))
    with machine:
        machine.run("systemctl", "enable", "--now", UNIT, timeout=60)
        machine.run(
            "timeout", "30", "sh", "-c", "until [ -e /models/warm/config.json ]; do sleep 0.1; done", timeout=40
        )
        yield machine


def mounts(machine: Machine) -> str:
    return machine.run("findmnt", "-rn", "-o", "TARGET", "-t", "fuse.instantstart", check=False).strip()


def test_start_ready_read_stop(machine: Machine, source: Path) -> None:
    """Ready means that the mount answers; `stop` leaves no mount and no process."""
    assert machine.property("StatusText").startswith("ready: ")
    assert mounts(machine) == "/models"
    pid = machine.main_pid()
    assert machine.run("readlink", f"/proc/{pid}/ns/mnt") == machine.run("readlink", "/proc/1/ns/mnt")
    check_bytes(machine, source / "warm")
    machine.run("systemctl", "stop", UNIT, timeout=40)
    assert machine.property("Result") == "success"
    assert mounts(machine) == ""
    assert machine.run("pgrep", "-f", "instantstart_fs", check=False) == ""


def test_restart_kill_and_watchdog_keep_the_mount(machine: Machine, source: Path) -> None:
    """Three ways to another daemon; the mount is the same one after each."""
    drop_in = machine.units / f"{UNIT}.d"
    drop_in.mkdir()
    (drop_in / "watchdog.conf").write_text("[Service]\nWatchdogSec=3\n")
    machine.run("systemctl", "daemon-reload")
    check_bytes(machine, source / "warm")
    device = machine.run("mountpoint", "-d", "/models")
    for number, how in enumerate((["restart"], ["kill", "-s", "KILL"], ["kill", "-s", "STOP"])):
        before = machine.main_pid()
        machine.run("systemctl", *how, UNIT, timeout=40)
        wait_for(lambda pid=before: machine.main_pid() not in (0, pid) and machine.job_done(), f"after {how}", 60)
        check_bytes(machine, source / "warm")
        assert machine.run("mountpoint", "-d", "/models") == device
        assert machine.journal().count(GOES_ON) == number + 1
    assert "watchdog" in machine.journal().lower()
    machine.run("systemctl", "stop", UNIT, timeout=40)
    assert mounts(machine) == ""


def test_a_start_that_fails_loses_no_mount(machine: Machine, source: Path) -> None:
    """Killed, and the next three daemons find no store: the fourth goes on with the mount."""
    check_bytes(machine, source / "warm")
    device, config = machine.run("mountpoint", "-d", "/models"), machine.etc / "config.toml"
    text = config.read_text()
    config.write_text('[store]\npath = "/proc/nothing"\n')
    machine.run("systemctl", "kill", "-s", "KILL", UNIT)
    wait_for(lambda: "restart counter is at 3" in machine.journal(), "three starts", 60)
    config.write_text(text)
    wait_for(lambda: machine.main_pid() and machine.job_done(), "a start that does not fail", 60)
    assert machine.journal().count(GOES_ON) == 1
    assert machine.run("mountpoint", "-d", "/models") == device
    check_bytes(machine, source / "warm")


def test_reload_reads_the_pipelines_again(machine: Machine, source: Path) -> None:
    """The same daemon; what cannot be read leaves everything as it was."""
    before, file = machine.main_pid(), machine.etc / "config.toml"
    text = file.read_text()
    file.write_text(f'{text}[pipelines.again]\nsource = "file://{source}/cold"\n')
    machine.run("systemctl", "reload", UNIT)
    machine.run("timeout", "30", "sh", "-c", "until [ -e /models/again/config.json ]; do sleep 0.1; done", timeout=40)
    file.write_text("[pipelines.again\n")
    machine.run("systemctl", "reload", UNIT)
    wait_for(lambda: "the configuration stays as it was" in machine.journal(), "the refusal", 20)
    check_bytes(machine, source / "warm")
    assert machine.main_pid() == before and machine.property("NRestarts") == "0"


def test_it_is_back_after_a_reboot(machine: Machine, source: Path) -> None:
    """`systemctl reboot` with a reader in the mount: the stop before it is orderly, and what was warm is warm."""
    machine.instantstart("warm", "warm", "--wait")
    machine.run("systemd-run", "--unit=reader", "sh", "-c", "exec 3< /models/warm/config.json; exec sleep 1000")
    machine.reboot()
    lines = machine.journal(boot=-1).splitlines()
    assert lines.index("info    stopping (SIGTERM)") < lines.index("info    stopped")
    assert lines[-2:] == [f"{UNIT}: Deactivated successfully.", f"Stopped {UNIT} - {DESCRIPTION}."]
    everything = machine.journal("-n", "1000", boot=-1)
    assert "Unmounted var-lib-instantstart.mount" in everything, "something held the store"
    assert "Unmounting models.mount" not in everything, "the service left its mount to systemd"
    assert "timed out" not in everything
    machine.wait_active()
    check_bytes(machine, source / "warm")
    assert "warm" in machine.run("ls", "/models/.warm")


def test_fifty_restarts_under_readers(machine: Machine, source: Path) -> None:
    """Half of them kill -9; eight readers of warm and cold files check every byte. Writes what it found to bench/."""
    machine.instantstart("warm", "warm", "--wait", "--all")
    limit = machine.units / f"{UNIT}.d"
    limit.mkdir()
    (limit / "limit.conf").write_text("[Unit]\nStartLimitBurst=1000\n")
    machine.run("systemctl", "daemon-reload")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    program = (sys.executable, "-m", "tests.readers")
    readers = [
        subprocess.Popen(
            machine.enter(*program, kind, str(source / name), f"/models/{name}", str(seed)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        for seed, (kind, name) in enumerate(READERS)
    ]
    outages = []
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "reading\n"
        for number in range(RESTARTS):
            machine.run("/opt/instantstart/bin/instantstart", "evict", "cold", check=False)
            before, began = machine.main_pid(), time.monotonic()
            machine.run("systemctl", *(["kill", "-s", "KILL"] if number % 2 else ["restart"]), UNIT, timeout=60)
            wait_for(lambda pid=before: machine.main_pid() not in (0, pid) and machine.job_done(), f"{number}", 60)
            outages.append(time.monotonic() - began)
        found: list[dict[str, Any]] = []
        for reader in readers:
            out, _ = reader.communicate(timeout=120)
            assert reader.returncode == 0, f"a reader ended with {reader.returncode}"
            found.append(json.loads(out))
    finally:
        for reader in readers:
            reader.kill()
    summary = {
        "restarts": RESTARTS,
        "taken_over": machine.journal().count(GOES_ON),
        "errors": sum(len(reader["errors"]) for reader in found),
        "reads": sum(reader["reads"] for reader in found),
        "bytes": sum(reader["bytes"] for reader in found),
        "longest_step_s": {
            "warm, held open": max(reader["longest"] for reader in found[:2]),
            "warm, opened anew": max(reader["longest"] for reader in found[2:4]),
            "cold": max(reader["longest"] for reader in found[4:]),
        },
        "restart_command_s": {
            "median": round(sorted(outages)[len(outages) // 2], 2),
            "longest": round(max(outages), 2),
        },
    }
    print(json.dumps(summary, indent=1))
    results = REPOSITORY / "bench/results/restarts-nspawn.json"
    results.write_text(json.dumps(summary, indent=1) + "\n")
    assert [error for reader in found for error in reader["errors"]] == []
    assert summary["taken_over"] == RESTARTS
