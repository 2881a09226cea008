"""One server process: started, waited for, killed by its pid. Nothing stays behind, even when pytest is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A child whose output goes to a file (shown when it fails to start)."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # the kernel ends the child with the thread that started it: right for the main thread, wrong for a short one
        setpriv = shutil.which("setpriv")
        if setpriv and threading.current_thread() is threading.main_thread():
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait_ready(self, ready: Callable[[], bool], seconds: float) -> None:
        """Return once ``ready()``; RuntimeError with the output if the process ends, or the deadline passes, first."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive or time.monotonic() > deadline:
                reason = "is not ready" if self.alive else f"ended with {self._process.returncode}"
                output = self.output()
                self.kill()
                raise RuntimeError(f"{self._process.args!r} {reason}:\n{output[-4000:]}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        if self.alive:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL and reap. Idempotent."""
        self.signal(signal.SIGKILL)
        self._process.wait(10)
        self._log.close()


def answers(port: int, address: str = "127.0.0.1") -> bool:
    """Whether something accepts connections on that port of ``address``."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((address, port)) == 0
