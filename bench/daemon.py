"""One `instantstart serve` under measurement: started with a configuration of its own, asked through its command line,
watched through /proc."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.common import run, wait_for

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Daemon:
    """A running daemon. ``cli`` asks it; ``memory`` and ``cpu_seconds`` watch it and its workers."""

    def __init__(
        self, child: subprocess.Popen[bytes], mount: Path, store: Path, env: dict[str, str], log: Path
    ) -> None:
        self.child, self.mount, self.store, self.env, self.log = child, mount, store, env, log
        self.ready_after = 0.0
        """Seconds from its start until the mount answered."""

    def cli(self, *arguments: str, timeout: float = 600.0) -> tuple[float, str]:
        """(seconds of the whole process, stdout) of `instantstart ARGUMENTS…`."""
        return run([sys.executable, "-m", "instantstart_fs.cli", *arguments], env=self.env, timeout=timeout)

    def status(self, pipeline: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("status", pipeline, "--json")[1])
        return found

    def workers(self) -> list[int]:
        """The pids of the fetch processes."""
        return [pid for pid in children(self.child.pid) if b"filler.worker" in command_line(pid)]


@contextlib.contextmanager
def daemon(
    directory: Path,
    *,
    config: str = "",
    env: Mapping[str, str] | None = None,
    name: str = "d",
    mount: Path | None = None,
) -> Iterator[Daemon]:
    """Run one with its mount, store, socket and log under ``directory``. ``config``: TOML beside mount and store.
    ``mount``: where another one was mounted before, as on two hosts of a fleet."""
    mount, store = mount or directory / f"{name}-mount", directory / f"{name}-store"
    mount.mkdir(exist_ok=True)
    file = directory / f"{name}.toml"
    file.write_text(config)
    log = directory / f"{name}.log"
    whole = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "AWS_ACCESS", "AWS_SECRET"))},
        "INSTANTSTART_SOCKET": str(directory / f"{name}.sock"),
        "HF_HOME": str(directory / f"{name}-hf"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **(env or {}),
    }
    started = time.monotonic()
    with log.open("ab") as out:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "instantstart_fs.cli", "serve"),
                *("--config", str(file), "--mount", str(mount), "--store", str(store)),
            ],
            stdout=out,
            stderr=out,
            env=whole,
        )
    found = Daemon(child, mount, store, whole, log)
    try:

        def ready() -> bool:
            if child.poll() is not None:
                raise RuntimeError(f"the daemon exited with {child.returncode}:\n{log.read_text()[-4000:]}")
            return os.path.ismount(mount) and os.path.exists(whole["INSTANTSTART_SOCKET"])

        wait_for(ready, "the mount", 120.0)
        found.ready_after = time.monotonic() - started
        found.cli("ls")
        yield found
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if os.path.ismount(mount):
            subprocess.run(["umount", "-l", str(mount)], check=False)


# -- /proc -------------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.extend(int(word) for word in (task / "children").read_text().split())
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def memory(pid: int) -> dict[str, int]:
    """Bytes: ``rss`` and ``peak`` (VmHWM since the start or the last ``reset_peak``), ``pss``."""
    found = {"rss": 0, "peak": 0, "pss": 0}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            found["rss"] = int(line.split()[1]) * 1024
        elif line.startswith("VmHWM:"):
            found["peak"] = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found["pss"] = int(line.split()[1]) * 1024
    return found


def reset_peak(pid: int) -> None:
    """Start VmHWM anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """User and system time of the process, all its threads, ended ones too. Steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Clock:
    """CPU seconds of several processes since it was made."""

    def __init__(self, pids: list[int]) -> None:
        self.started = time.monotonic()
        self.before = {pid: cpu_seconds(pid) for pid in pids}

    def spent(self) -> dict[int, float]:
        return {pid: cpu_seconds(pid) - before for pid, before in self.before.items()}
