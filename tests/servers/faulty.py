"""A TCP proxy in front of a real server that delays, drops and corrupts (the `faulty` program)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from tests.servers.ports import free_port
from tests.servers.process import ServerProcess, answers


class FaultyProxy:
    """``FaultyProxy(upstream_port, "--corrupt-down", "0.2")``; talk to ``port``; arguments: `faulty --help`."""

    def __init__(self, upstream: int, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        program = str(Path(sys.executable).parent / "faulty")
        self._process = ServerProcess([program, f"127.0.0.1:{self.port}", f"127.0.0.1:{upstream}", *arguments])
        self._process.wait_ready(lambda: answers(self.port), 20)

    def close(self) -> None:
        self._process.kill()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
