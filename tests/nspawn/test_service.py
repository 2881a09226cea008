"""The unit under a real systemd: scripts/nspawn-test boots it in a container; elsewhere these are listed as not run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, model_directory, tree_files
from tests.nspawn.machine import Machine, why_no_machine

REASON = why_no_machine()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(600)]
FIRST = "model-00001-of-00002.safetensors"
UNIT = "instantstart.service"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums_inside(machine: Machine, root: str, names: list[str]) -> dict[str, str]:
    """sha256 of each file as a reader in the machine sees it."""
    lines = machine.run("sha256sum", "--", *(f"{root}/{name}" for name in names), timeout=120).splitlines()
    return {line[66:].removeprefix(f"{root}/"): line[:64] for line in lines}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "source")


@pytest.fixture
def machine(tmp_path: Path, source: Path) -> Iterator[Machine]:
    """Booted, with the unit installed and one pipeline ``p`` configured; not started."""
    machine = Machine(tmp_path / "machine", binds=[source])
    install(machine, source)
    with machine:
        yield machine


def install(machine: Machine, source: Path) -> None:
    unit = (REPOSITORY / "systemd" / UNIT).read_text()
    (machine.units / UNIT).write_text(unit.replace("/usr/local/bin/instantstart", "/opt/instantstart/bin/instantstart"))
    (machine.etc / "config.toml").write_text(f'[pipelines.p]\nsource = "file://{source}"\n')
    shutil.copytree(source, machine.directory / "expected")


def names_with_bytes(root: Path) -> list[str]:
    return [name for name in tree_files(root) if (root / name).stat().st_size]


def test_start_ready_read_stop(machine: Machine, source: Path) -> None:
    """`systemctl start` returns when the mount answers; the bytes are right; `stop` leaves no mount and no process."""
    machine.run("systemctl", "start", UNIT, timeout=60)
    assert machine.property("ActiveState") == "active"
    assert machine.property("StatusText").startswith("ready: ")
    assert "/models" in machine.run("findmnt", "-rn", "-o", "TARGET", "-t", "fuse.instantstart")
    machine.run("timeout", "30", "sh", "-c", "until [ -e /models/p/config.json ]; do sleep 0.1; done", timeout=40)
    names = names_with_bytes(source)
    assert sums_inside(machine, "/models/p", names) == {name: sha256(source / name) for name in names}
    machine.run("systemctl", "stop", UNIT, timeout=40)
    assert machine.property("Result") == "success"
    assert machine.run("findmnt", "-rn", "-t", "fuse.instantstart", check=False) == ""
    assert machine.run("pgrep", "-f", "instantstart_fs", check=False) == ""
