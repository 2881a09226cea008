"""bench/gpu_watch.py: whatever becomes of the process that measures, its figures are kept and the others are run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_watch
from tests.harness import REPOSITORY, alive, wait_for

PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[sys.argv.index("--tree") + 1])
from pathlib import Path
from bench import gpu_watch
def after(name):
    return sys.argv[sys.argv.index(name) + 1]
out = Path(after("--out"))
gpu_watch.end_with_parent()
result = {"parts": {}, "ended": [], "chosen": ["one", "two", "three"], **gpu_watch.read(out)}
for name in result["chosen"]:
    if name in result["ended"]:
        continue
    hangs = name == "two" and "while" in after("--two")
    result["now"] = {"part": name, "until": time.monotonic() + (0.3 if hangs else 600), "pid": os.getpid()}
    result["parts"][name] = {"figure": 1}
    gpu_watch.write(out, result)
    if name == "two":
        exec(after("--two"))
    result["ended"].append(name)
    del result["now"]
    gpu_watch.write(out, result)
"""
HANGS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
SPOILED = "result['ended'].append('two'); gpu_watch.write(out, result | {'now': {}}); sys.exit(75)"


def program(tmp_path: Path, two: str) -> list[str]:
    """The arguments of a Watch over three parts, of which the second does this."""
    path = tmp_path / "measure.py"
    path.write_text(PROGRAM)
    return [str(path), "--tree", str(REPOSITORY), "--out", str(tmp_path / "out"), "--two", two]


def watched(tmp_path: Path, two: str) -> tuple[int, dict[str, Any]]:
    path, *arguments = program(tmp_path, two)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = gpu_watch.Watch(Path(path), arguments, tmp_path / "out", 600, str(tmp_path / "work")).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, json.loads((tmp_path / "out/gpu.json").read_text())


@pytest.mark.parametrize(
    ("two", "status", "failed"),
    [
        ("pass", 0, []),
        (HANGS, 1, ["two: its process ended by SIGKILL"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, ["two: its process ended by SIGSEGV"]),
        ("os._exit(9)", 1, ["two: its process ended with 9"]),
        (SPOILED, 0, []),
    ],
    ids=["nothing", "hangs where no signal reaches it", "crash", "exit", "spoiled"],
)
def test_the_other_parts_are_run_and_nothing_that_was_measured_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: str, status: int, failed: list[str]
) -> None:
    monkeypatch.setattr(gpu_watch, "GRACE", 0.3)
    ended, found = watched(tmp_path, two)
    assert (ended, found["exit"], found.get("failed", [])) == (status, status, failed)
    assert sorted(found["ended"]) == ["one", "three", "two"]
    assert all(part["figure"] == 1 for part in found["parts"].values())


def test_when_the_time_is_up_what_was_not_reached_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_watch.read

    def read(out: Path) -> dict[str, Any]:
        """As it is; what begins to hang finds that its time is up."""
        found = plain(out)
        if found.get("now", {}).get("part") == "two":
            monkeypatch.setattr(gpu_watch, "time", SimpleNamespace(monotonic=lambda: math.inf, sleep=time.sleep))
        return found

    monkeypatch.setattr(gpu_watch, "TOLD", -1.0)
    monkeypatch.setattr(gpu_watch, "read", read)
    ended, found = watched(tmp_path, HANGS)
    assert (ended, found["exit"], found.get("failed", [])) == (3, 3, [])
    assert found["not_run"] == ["two: the time was up came first", "three: the time was up came first"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_one_that_watches_ends_all_and_keeps_the_figures(tmp_path: Path, number: int) -> None:
    path, *arguments = program(tmp_path, "while True: time.sleep(0.05)")
    code = (
        "import sys; from pathlib import Path; from bench import gpu_watch; gpu_watch.GRACE = 600\n"
        "sys.exit(gpu_watch.Watch(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]), 600, sys.argv[2]).run())"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, path, str(out), *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    ) as watch:
        wait_for(lambda: gpu_watch.read(out).get("now", {}).get("part") == "two", "the second part", 60)
        child = gpu_watch.read(out)["now"]["pid"]
        watch.send_signal(number)
        status = watch.wait(60)
    wait_for(lambda: not alive(child), "the child's end", 60)
    found = json.loads((out / "gpu.json").read_text())
    assert found["parts"] == {"one": {"figure": 1}, "two": {"figure": 1}}
    if number == signal.SIGTERM:
        assert status == 3 and found["not_run"] == ["two: SIGTERM came first", "three: SIGTERM came first"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_start_by_the_drivers_interface_alone_is_measured(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, REPOSITORY / "tests/fake_cuda/libcuda.c"], check=True)
    done = subprocess.run(
        [sys.executable, "bench/gpu_probe.py", "driver"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        check=True, env={**os.environ, "INSTANTSTART_LIBCUDA": str(library)},
    )  # fmt: skip
    steps = [next(iter(json.loads(line))) for line in done.stdout.splitlines()]
    assert steps[0] == "cuInit" and steps[2] == "context" and steps[-1] == "cuMemFree 1 GiB", done.stdout
