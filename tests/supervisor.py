"""What systemd does for the daemon, without systemd: a notification socket, a descriptor store, restarts.

    with Supervised(tmp_path / "d") as daemon:
        daemon.again(kill=True)        # SIGKILL; the next daemon gets the descriptors
        daemon.told("WATCHDOG=1")

tests/listenfds.py starts the daemon as systemd would. Ending for good runs stop-post, as the unit does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.harness import REPOSITORY, STOP_DEADLINE, Daemon, alive, mounted, wait_for

PLACES = 8


class DescriptorStore:
    """systemd's, with its semantics: added by FDSTORE=1 under FDNAME, dropped by FDSTOREREMOVE=1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptors: dict[str, int] = {}
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, descriptors, *_ = socket.recv_fds(self._socket, 4096, PLACES)
            if data == b"END":
                return
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            name = fields.get("FDNAME", "stored")
            if "FDSTORE" in fields:
                self.descriptors[name] = descriptors[0]
            elif "FDSTOREREMOVE" in fields and name in self.descriptors:
                os.close(self.descriptors.pop(name))
            self.messages.append(data.decode())

    def drop(self) -> None:
        """The unit has really stopped."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"END", str(self.path))
        self._thread.join(5)
        self._socket.close()
        self.drop()


class Supervised(Daemon):
    """A Daemon whose supervisor keeps its descriptors. ``stop`` is the end for good; ``again`` a restart."""

    def __init__(self, directory: Path, **keywords: Any) -> None:
        super().__init__(directory, **keywords)
        self.kept = DescriptorStore(directory / "notify")
        self.env |= {"NOTIFY_SOCKET": str(self.kept.path), "FDSTORE": str(PLACES)}

    def spawn(self) -> subprocess.Popen[bytes]:
        kept = self.kept.descriptors
        starter = [sys.executable, "-S", "-E", str(REPOSITORY / "tests/listenfds.py")]
        supervisor = [*starter, *(f"{name}={fd}" for name, fd in kept.items()), "--"]
        return self.launch(supervisor, tuple(kept.values()))

    def leave(self, *, kill: bool) -> None:
        """SIGTERM or SIGKILL; whatever is mounted stays so."""
        assert self._process is not None
        workers = self.workers()
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        status = self._process.wait(STOP_DEADLINE)
        assert status == (-9 if kill else 0), f"the daemon ended with {status}:\n{self.text()[-3000:]}"
        self._process = None
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # KillMode=mixed: what is left of the service
        wait_for(lambda: not any(alive(pid) for pid in workers), "the workers' end", 15)

    def again(self, *, kill: bool) -> Supervised:
        self.leave(kill=kill)
        self.start()
        return self

    def stop(self) -> None:
        if self._process is None:
            return
        self.leave(kill=False)
        self.end()
        assert not mounted(self.mount), "the mount outlived its service"

    def end(self) -> None:
        """What systemd does when the unit has stopped for good."""
        script = REPOSITORY / "instantstart_fs/installation/systemd/stop-post"
        environment = {**os.environ, "SERVICE_RESULT": "success"}
        subprocess.run([str(script), str(self.socket.parent)], check=True, timeout=20, env=environment)
        self.kept.drop()

    def close(self, *, check: bool = True) -> None:
        try:
            super().close(check=check)
        finally:
            self.kept.close()

    def told(self, wanted: str, timeout: float = 10.0) -> str:
        """The first notification that has this line in it, or will have."""

        def find() -> str | None:
            return next((text for text in self.kept.messages if wanted in text), None)

        return str(wait_for(find, f"the notification {wanted!r}", timeout))
