"""What `doctor` says of GPUs: which there are, why there are none, whether GPUDirect Storage is there; it never hangs.

On the fake device, asked by a real process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.cli import run
from instantstart_fs.prefetch import gpus, start
from tests.harness import REPOSITORY


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with NVIDIA's driver, and the fake device."""
    pytest.importorskip("torch")
    there = tmp_path / "nvidiactl"
    there.touch()
    monkeypatch.setattr(start, "DRIVER", str(there))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests/fake_cuda"))
    monkeypatch.setenv("INSTANTSTART_FAKE_CUDA", str(tmp_path / "device"))
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "cufile.json"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return there


@pytest.mark.timeout(200)
def test_what_there_is_is_told(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTANTSTART_FAKE_CUDA_GPUS", "2")
    monkeypatch.setenv("INSTANTSTART_FAKE_CUDA_GDS", "works")
    devices, storage = gpus.check_gpus(150)
    assert devices.outcome == storage.outcome == "ok"
    assert " finds 2: fake device" in devices.found and devices.found.endswith("1.0 GiB")
    assert storage.found.startswith("GPUDirect Storage is not available: ") and "page-locked" in storage.found
    assert not list((tmp_path / "device").glob("context.*")), "a context was made"
    (tmp_path / "cufile.json").write_text('{"properties": {"use_pci_p2pdma": true}}')
    assert list(gpus.check_gpus(150))[1].found.startswith("GPUDirect Storage is available: ")


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("state", "outcome", "says"),
    [
        ({"INSTANTSTART_FAKE_CUDA_DRIVER": "The NVIDIA driver on your system is too old"}, "warn", "older than this"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "warn", "CUDA_VISIBLE_DEVICES is ''"),
        ({"INSTANTSTART_FAKE_MISSING": "torch"}, "ok", "torch is not installed here"),
    ],
    ids=["an old driver", "hidden", "no torch"],
)
def test_why_there_is_none_is_told(
    driver: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, str], outcome: str, says: str
) -> None:
    for name, value in state.items():
        monkeypatch.setenv(name, value)
    (found,) = gpus.check_gpus(150)
    assert found.outcome == outcome and says in found.found and found.advice


@pytest.mark.parametrize(
    ("program", "deadline", "says"),
    [
        ("import time\nwhile True: time.sleep(1)", 0.2, "did not answer within 0.2 s"),
        ("raise SystemExit('the driver is broken')", 60, "ended with 1: the driver is broken"),
    ],
    ids=["hangs", "crashes"],
)
def test_a_driver_that_is_broken_neither_holds_nor_ends_doctor(
    driver: Path, monkeypatch: pytest.MonkeyPatch, program: str, deadline: float, says: str
) -> None:
    def spawn(_: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(gpus, "spawn_module", spawn)
    (found,) = gpus.check_gpus(deadline)
    assert (found.name, found.outcome) == ("GPU", "warn") and says in found.found


def test_a_process_that_no_signal_ends_is_not_waited_for(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is that waits in the driver."""
    started: list[subprocess.Popen[bytes]] = []

    class Held(subprocess.Popen[bytes]):
        def kill(self) -> None:
            started.append(self)

    def spawn(_: str, **options: Any) -> subprocess.Popen[bytes]:
        return Held([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(gpus, "spawn_module", spawn)
    began = time.monotonic()
    (found,) = gpus.check_gpus(0.2)
    assert "did not answer" in found.found and time.monotonic() - began < 20
    os.kill(started[0].pid, signal.SIGKILL)
    started[0].wait(10)


def test_doctor_shows_it(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    finding = gpus.Finding("GPU", "warn", "it is broken", "mend it")
    monkeypatch.setattr(gpus, "check_gpus", lambda: iter([finding]))
    monkeypatch.setenv("INSTANTSTART_SOCKET", str(tmp_path / "none.sock"))
    run(["doctor", "--json", "--mount", str(tmp_path / "m"), "--store", str(tmp_path / "s")])
    assert json.loads(capsys.readouterr().out)[-1] == finding._asdict()


def test_a_machine_without_the_driver_is_told_nothing_of_gpus(driver: Path) -> None:
    os.unlink(driver)
    assert list(gpus.check_gpus()) == []
