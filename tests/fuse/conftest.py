"""A daemon that serves the fake View in a process of its own, always killed by pid and unmounted in the end.

Whatever touches the mount runs in a subprocess with a deadline: a hang of the mount fails a test, and never the run.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import instantstart_fs
from instantstart_fs.mount import kernel
from instantstart_fs.system import mountinfo
from tests.harness import give_up, skip_below

FAKE_DAEMON = Path(__file__).with_name("fake_view.py")
PACKAGE_ROOT = os.path.dirname(os.path.dirname(instantstart_fs.__file__))


def _why_no_fuse() -> str | None:
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if not kernel.has_sys_admin():
        return "making a mount needs CAP_SYS_ADMIN here"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_below(Path(__file__).parent, items, _why_no_fuse())


class Hung(Exception):
    """A command did not end in time."""


def command(*args: str, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
    """Run it to its end; Hung when it takes longer. It is not waited for after that: it may be unkillable until the
    mount goes."""
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        give_up(process)
        raise Hung(" ".join(args)) from None
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def python(code: str, *args: str, timeout: float = 20.0) -> str:
    """What ``code`` prints, in a fresh interpreter; its traceback fails the test."""
    done = command(sys.executable, "-c", code, *args, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def read_line(process: subprocess.Popen[bytes], timeout: float) -> str:
    assert process.stdout is not None
    fd = process.stdout.fileno()
    line = b""
    deadline = time.monotonic() + timeout
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise Hung(f"no line within {timeout} s")
        data = os.read(fd, 1)
        if not data:
            break
        line += data
    return line.decode().strip()


class FakeDaemon:
    """``path`` is the mountpoint."""

    def __init__(self, path: Path, log: Path, transport: str, *args: str, prefix: tuple[str, ...] = ()) -> None:
        self.path = path
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, str(FAKE_DAEMON), str(path), *args],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                env={**os.environ, "FAKE_TRANSPORT": transport,
                     "PYTHONPATH": os.pathsep.join((PACKAGE_ROOT, str(FAKE_DAEMON.parents[2])))},
            )  # fmt: skip

    def wait_ready(self, timeout: float = 20.0) -> None:
        line = read_line(self.process, timeout)
        assert line == "ready", self.log()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return read_line(self.process, 10.0)

    def wait_stuck(self, regions: int, *, reads: int = 0, timeout: float = 20.0) -> None:
        """Until reads wait in that many 4 MiB regions, and that many in all."""

        def stuck() -> bool:
            waiting, touched = (int(word) for word in self.ask("stuck").split())
            return touched >= regions and waiting >= reads

        wait_for(stuck, timeout)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def terminate(self, timeout: float = 20.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """Also lets go of every process that the mount holds: the end of the connection ends their requests."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        while mountinfo.find_mount(str(self.path)) is not None:
            kernel.umount_lazily(str(self.path))


def wait_for(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.01)


StartDaemon = Callable[..., FakeDaemon]


@pytest.fixture(scope="module", params=["pyfuse3", "passthrough"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every test with a daemon runs on both; what only one of them can do says so."""
    chosen = str(request.param)
    if chosen == "passthrough" and (reason := kernel.why_no_passthrough()) is not None:
        pytest.skip(f"no FUSE passthrough: {reason}")
    return chosen


@pytest.fixture
def start_daemon(tmp_path: Path, transport: str) -> Iterator[StartDaemon]:
    """Start a fake daemon at a mountpoint of this test's own; ready unless ``ready=False``."""
    daemons: list[FakeDaemon] = []

    def start(
        *args: str, ready: bool = True, path: Path = tmp_path / "mnt", prefix: tuple[str, ...] = ()
    ) -> FakeDaemon:
        daemon = FakeDaemon(path, tmp_path / "daemon.log", transport, *args, prefix=prefix)
        daemons.append(daemon)
        if ready:
            daemon.wait_ready()
        return daemon

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> FakeDaemon:
    return start_daemon()


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[FakeDaemon]:
    """One daemon for the tests of a module that leave nothing behind."""
    directory = tmp_path_factory.mktemp("shared")
    daemon = FakeDaemon(directory / "mnt", directory / "daemon.log", transport)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.close()


class Readers:
    """Processes that read from the mount and may hang in it; killed by pid in the end."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, code: str, *args: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            if process.stdout is not None:
                process.stdout.close()
            process.wait(10)


@pytest.fixture
def readers(start_daemon: StartDaemon, tmp_path: Path) -> Iterator[Readers]:
    readers = Readers()
    yield readers
    # The connection ends before they are waited for: a killed one may hang on it.
    mount = mountinfo.find_mount(str(tmp_path / "mnt"))
    if mount is not None:
        kernel.abort_connection(mount)
    readers.close()
