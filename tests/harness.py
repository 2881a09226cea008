"""A real daemon under test: its own store, mount, socket and log; always killed by pid and unmounted in the end.

    with Daemon(tmp_path / "d", config={"fill": {"chunk_size": "1MiB"}}) as daemon:
        daemon.ok("add", "m", f"file://{source}")
        assert daemon.status("m")["state"] == "cold"

Whatever may hang in the mount runs in a subprocess with a deadline (``run``, ``probe``), so that a hang fails one test
and never the run. At the end the log may hold no traceback and no ``error`` line but those that the test allows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from instantstart_fs.cli.show import as_json
from instantstart_fs.control.client import Client
from tests import commands

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024
START_DEADLINE = 30.0
STOP_DEADLINE = 30.0
TRANSPORT = os.environ.get("INSTANTSTART_TEST_TRANSPORT", "auto")
"""Of every daemon whose test does not choose: run the suite once with "pyfuse3" and once with "auto"."""


def why_no_mount() -> str | None:
    """Why no daemon can mount here; None if it can."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if os.geteuid() != 0 and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not open /dev/fuse"
    return None


def skip_below(directory: Path, items: list[pytest.Item], reason: str | None) -> None:
    """Skip the tests in that directory; None: skip nothing. For pytest_collection_modifyitems."""
    for item in items:
        if reason is not None and item.path.is_relative_to(directory):
            item.add_marker(pytest.mark.skip(reason=reason))


def give_up(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a command, but do not wait for it: it may be unkillable until its mount is unmounted."""
    process.kill()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.returncode = -9  # so that no ResourceWarning asks for the wait that we must not do


class Hung(AssertionError):
    """A command did not end in time."""


def run(
    *command: str | os.PathLike[str], timeout: float = 60.0, env: Mapping[str, str] | None = None, text: bool = True
) -> subprocess.CompletedProcess[Any]:
    """Run it to its end, whatever its status; Hung when it takes longer. It is not waited for after that: it may be
    unkillable until the mount goes."""
    words = [os.fspath(word) for word in command]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=text,
        env=None if env is None else {**os.environ, **env},
        start_new_session=True,
        cwd=REPOSITORY,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        give_up(process)
        raise Hung(f"{' '.join(words)} took longer than {timeout:g} s") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def must(*command: str | os.PathLike[str], timeout: float = 60.0, env: Mapping[str, str] | None = None) -> str:
    """``run``; its stdout. Fails the test unless it exits 0."""
    return succeeded(run(*command, timeout=timeout, env=env))


def command(
    *arguments: str | os.PathLike[str], timeout: float = 60.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[Any]:
    """``run`` of `instantstart ARGUMENTS…`, without the imports of a fresh interpreter. See tests/commands.py."""
    words = [os.fspath(word) for word in arguments]
    if not commands.forkable(env):
        return run(sys.executable, "-m", "instantstart_fs.cli", *words, timeout=timeout, env=env)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = commands.Command(words, {**os.environ, **(env or {})}, out.fileno(), err.fileno())
        status = running.wait(timeout)
        if status is None:
            raise Hung(f"instantstart {' '.join(words)} took longer than {timeout:g} s")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["instantstart", *words], status, *texts)


def succeeded(done: subprocess.CompletedProcess[Any]) -> str:
    """Its stdout. Fails the test unless it exited with 0."""
    assert done.returncode == 0, f"{done.args}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(done.stdout)


def probe(what: str, *arguments: str | os.PathLike[str] | int, timeout: float = 60.0) -> Any:
    """What tests/probe.py found, in a process of its own. See there."""
    done = run(sys.executable, "-m", "tests.probe", what, *(str(word) for word in arguments), timeout=timeout)
    assert done.returncode == 0, f"probe {what} {arguments}: exit {done.returncode}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def wait_for(condition: Callable[[], object], what: str, timeout: float = 30.0) -> Any:
    """The first true value of ``condition()``, asked every 20 ms."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.02)


def to_toml(config: Mapping[str, Any], prefix: str = "") -> str:
    """Nested mappings of strings, numbers, booleans and lists as TOML."""
    lines = [f"{json.dumps(key)} = {_inline(value)}" for key, value in config.items() if not isinstance(value, dict)]
    for key, value in config.items():
        if isinstance(value, dict):
            name = f"{prefix}{json.dumps(key)}"
            lines += [f"[{name}]", to_toml(value, f"{name}.")]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_inline(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    """Whether that process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def mounted(path: str | os.PathLike[str]) -> bool:
    """By /proc, which never asks the mount."""
    wanted = os.fspath(path).replace(" ", r"\040")
    return any(line.split()[4] == wanted for line in Path("/proc/self/mountinfo").read_text().splitlines())


@contextlib.contextmanager
def loop_ext4(directory: Path, size: int) -> Iterator[Path]:
    """The mountpoint of a fresh ext4 of ``size`` bytes, a loop-mounted image in ``directory``; unmounted, lazily, in
    the end. Skips the test where none can be mounted."""
    image, mountpoint = directory / "ext4.img", directory / "ext4"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    must("mkfs.ext4", "-q", "-m", "0", image, timeout=30)
    done = run("mount", "-o", "loop", image, mountpoint, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"no loop device can be mounted here: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        unmount(mountpoint)


def unmount(path: str | os.PathLike[str]) -> None:
    while mounted(path):
        command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*command, os.fspath(path)], check=True, timeout=20, capture_output=True)


class Daemon:
    """``directory`` takes everything. ``config``: TOML sections beside mount, store. ``env``: for daemon and commands.

    ``allow``: regular expressions of log lines of level error that are expected. ``prefix``: what the daemon is run by.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        store: Path | None = None,
        mount: Path | None = None,
        allow: Sequence[str] = (),
        log_level: str = "info",
        prefix: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.mount = mount or directory / "models"
        self.store = store or directory / "store"
        self.socket = directory / "control.sock"
        self.log = directory / "daemon.log"
        self.config = directory / "config.toml"
        self.configure(config or {})
        self.allow = list(allow)
        self.env = {"INSTANTSTART_SOCKET": str(self.socket), "HF_HOME": str(directory / "hf"), **(env or {})}
        self._log_level = log_level
        self._prefix = prefix
        self.program = REPOSITORY
        """The checkout whose daemon it is; another one for comparisons. Commands are always this one's."""
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: set[int] = set()

    def configure(self, config: Mapping[str, Any]) -> None:
        """``TRANSPORT`` is the transport unless ``config`` names one; no page unless it asks for one; and a disk that
        others filled is no test's failure."""
        mount = {"transport": TRANSPORT, **config.get("mount", {})}
        store = {"min_free": 0, **config.get("store", {})}
        http = {"listen": "off", **config.get("http", {})}
        self.config.write_text(to_toml({**config, "mount": mount, "store": store, "http": http}))

    # -- its life --------------------------------------------------------------------------------------------------

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start without waiting."""
        return self.launch(self._prefix)

    def launch(self, prefix: Sequence[str], pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """The daemon's own command, run by ``prefix``, which inherits ``pass_fds``."""
        command = [*prefix, sys.executable, "-m", "instantstart_fs.cli", "serve", "--config", str(self.config)]
        command += ["--mount", str(self.mount), "--store", str(self.store), "--socket", str(self.socket)]
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [*command, "--log-level", self._log_level],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.env},
                cwd=self.program,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    def start(self) -> Daemon:
        """Return when it says that it is ready."""
        assert self._process is None
        already = self.log.stat().st_size if self.log.exists() else 0
        self._process = self.spawn()

        def ready() -> bool:
            assert self._process is not None
            text = self.log.read_bytes()[already:]
            assert self._process.poll() is None, f"the daemon ended with {self._process.returncode}:\n{text.decode()}"
            return b"ready: " in text

        wait_for(ready, "the daemon's start", START_DEADLINE)
        self.workers()
        return self

    def stop(self) -> None:
        """SIGTERM; it must end by itself, leave no mount and no worker."""
        if self._process is None:
            return
        process, workers = self._process, self.workers()
        process.terminate()
        try:
            status = process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            raise Hung(f"the daemon does not stop:\n{self.text()[-3000:]}") from None
        self._process = None
        assert status == 0, f"the daemon stopped with {status}:\n{self.text()[-3000:]}"
        wait_for(lambda: not any(alive(pid) for pid in workers), "the workers' end", 10)
        assert not mounted(self.mount), "the mount outlived its daemon"

    def kill(self) -> None:
        """SIGKILL the daemon alone; its workers must die by themselves."""
        assert self._process is not None
        workers = self.workers()
        self._process.kill()
        self._process.wait(10)
        self._process = None
        wait_for(lambda: not any(alive(pid) for pid in workers), "the workers' end after SIGKILL of the daemon", 15)

    def restart(self) -> Daemon:
        """``stop`` (unless it was killed) and ``start``."""
        self.stop()
        return self.start()

    def close(self, *, check: bool = True) -> None:
        """End it however, unmount, and look through the log."""
        try:
            if check:
                self.stop()
        finally:
            workers = self.workers()
            if self._process is not None:
                self._process.kill()
                self._process.wait(10)
                self._process = None
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            unmount(self.mount)
        if check:
            self.check_log()

    def __enter__(self) -> Daemon:
        try:
            return self.start()
        except BaseException:
            self.close(check=False)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- the daemon's log ({self.log}):\n{self.text()[-6000:]}", file=sys.stderr)
        self.close(check=error is None)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def workers(self) -> list[int]:
        """The fetch processes that live now."""
        if self._process is not None:
            for pid in children(self._process.pid):
                with contextlib.suppress(OSError):
                    if b"filler.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        self._workers.add(pid)
        self._workers = {pid for pid in self._workers if alive(pid)}
        return sorted(self._workers)

    # -- its log ---------------------------------------------------------------------------------------------------

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def check_log(self) -> None:
        """No traceback, and no error line but the allowed ones."""
        text = self.text()
        assert "Traceback" not in text, f"a traceback in the daemon's log:\n{text[-6000:]}"
        for line in text.splitlines():
            if re.match(r"(\S+ )?(error|critical) ", line):
                assert any(re.search(pattern, line) for pattern in self.allow), f"unexpected in the log: {line}"

    # -- its command line ------------------------------------------------------------------------------------------

    def cli(self, *arguments: str | os.PathLike[str], timeout: float = 60.0) -> subprocess.CompletedProcess[Any]:
        """`instantstart ARGUMENTS…`, whatever its exit status."""
        return command(*arguments, timeout=timeout, env=self.env)

    def ok(self, *arguments: str | os.PathLike[str], timeout: float = 60.0) -> str:
        """The same; it must exit 0. Its stdout."""
        return succeeded(self.cli(*arguments, timeout=timeout))

    def refused(self, status: int, *arguments: str | os.PathLike[str], timeout: float = 60.0) -> str:
        """The same; it must fail with that exit status and say why in one clear line, which is returned."""
        done = self.cli(*arguments, timeout=timeout)
        assert done.returncode == status, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, f"not one line: {done.stderr!r}"
        return str(lines[0])

    def status(self, pipeline: str) -> dict[str, Any]:
        """What `status --json` prints, without the quarter of a second that a process of its own takes."""
        with Client(str(self.socket)) as client:
            found: dict[str, Any] = json.loads(as_json(client.status(pipeline)))
        return found

    def warm(self, pipeline: str, *more: str, timeout: float = 120.0) -> None:
        self.ok("warm", pipeline, "--wait", *more, timeout=timeout)

    def path(self, pipeline: str, *names: str) -> Path:
        return self.mount.joinpath(pipeline, *names)


# -- fixtures: import them in a conftest.py ----------------------------------------------------------------------------


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """``make_daemon(name="d", **Daemon's keywords)``: started; ended, unmounted and its log checked after the test.
    ``kind``: another class of it."""
    made: list[Daemon] = []

    def make(name: str = "d", kind: type[Daemon] = Daemon, **keywords: Any) -> Daemon:
        daemon = kind(tmp_path / name, **keywords)
        made.append(daemon)
        return daemon.start()

    failed = True
    try:
        yield make
        failed = False
    finally:
        errors: list[Exception | AssertionError] = []
        for daemon in reversed(made):
            try:
                daemon.close(check=not failed)
            except (Exception, AssertionError) as error:
                errors.append(error)
        if errors:
            raise errors[0]


def random_file(path: Path, size: int, seed: int) -> Path:
    """``size`` bytes that only this ``seed`` has."""
    import random

    generator = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(generator.randbytes(min(size, 8 * MIB)))
    return path


def safetensors_file(path: Path, size: int, seed: int) -> Path:
    """A valid safetensors file of exactly ``size`` bytes with one tensor."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
    for _ in range(3):  # its own length is in it
        count = size - 8 - len(header)
        header = json.dumps({"weight": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
    assert count == size - 8 - len(header)
    random_file(path, size, seed)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
    return path


def model_directory(root: Path, *, seed: int = 1, weights: Sequence[int] = (24 * MIB, 16 * MIB + 12345)) -> Path:
    """What a hub repository looks like: sharded safetensors, and much beside them that no engine loads."""
    root.mkdir(parents=True, exist_ok=True)
    names = [f"model-{k:05}-of-{len(weights):05}.safetensors" for k in range(1, len(weights) + 1)]
    for position, (name, size) in enumerate(zip(names, weights, strict=True)):
        safetensors_file(root / name, size, seed * 1000 + position)
    (root / "config.json").write_text(json.dumps({"architectures": ["Test"], "seed": seed}))
    (root / "tokenizer.json").write_text(json.dumps({"version": "1.0", "vocab": list(range(2000))}))
    (root / "tokenizer_config.json").write_text("{}")
    index = {"metadata": {"total_size": sum(weights)}, "weight_map": {f"w{k}": name for k, name in enumerate(names)}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "empty.txt").write_bytes(b"")
    random_file(root / "pytorch_model.bin", 3 * MIB, seed * 1000 + 100)
    random_file(root / "onnx" / "model.onnx", 2 * MIB, seed * 1000 + 101)
    random_file(root / "tf_model.h5", MIB, seed * 1000 + 102)
    random_file(root / "1 Pooling dir" / "vokabülär – größe.json", 5000, seed * 1000 + 103)
    (root / "README.md").write_text("# a model\n")
    return root


LOAD_SET_SKIPS = {"pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "README.md"}
"""Of ``model_directory``: what is not in the load set."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ``model_directory`` for the session; nobody may change it."""
    return model_directory(tmp_path_factory.mktemp("source") / "model")


def tree_files(root: Path) -> list[str]:
    """Relative paths of all files below a local directory, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# -- memory cgroups ----------------------------------------------------------------------------------------------------

CGROUPS = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def memory_cgroup(name: str, limit: int) -> Iterator[Path]:
    """A real one (v1), for this test alone; what is left in it goes back to where we are."""
    place = CGROUPS / name
    try:
        place.mkdir()
        (place / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    own = next(
        line.rpartition(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line
    )
    try:
        yield place
    finally:
        for pid in (place / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CGROUPS / own.lstrip("/") / "cgroup.procs").write_text(pid)
        wait_for(lambda: removed(place), "the cgroup's end", 10)


def removed(place: Path) -> bool:
    with contextlib.suppress(OSError):
        place.rmdir()
    return not place.exists()
