"""What a person sees, on terminals of all kinds: none of them makes a command fail."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import MIB, REPOSITORY, START_DEADLINE, Daemon, model_directory

CLI = [sys.executable, "-m", "instantstart_fs.cli"]
ODD = "模型 é●.txt"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    source = model_directory(tmp_path_factory.mktemp("source"), weights=(2 * MIB, MIB))
    (source / ODD).write_text("x")
    with Daemon(tmp_path_factory.mktemp("terminal"), config={"fill": {"chunk_size": "1MiB"}}) as daemon:
        daemon.ok("add", "m", f"file://{source}")
        daemon.warm("m")
        daemon.ok("add", "cold", f"file://{source}")
        daemon.path("m", "model-00001-of-00002.safetensors").read_bytes()
        yield daemon


def plain(
    daemon: Daemon, arguments: Sequence[str], env: Mapping[str, str], shell: str = '"$@"'
) -> subprocess.CompletedProcess[bytes]:
    """The command with pipes, or as ``shell`` says."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}", "bash", *CLI, *arguments],
        env={**os.environ, **daemon.env, **env},
        cwd=REPOSITORY,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def on_terminal(daemon: Daemon, arguments: Sequence[str], columns: int, env: Mapping[str, str]) -> tuple[int, bytes]:
    """(exit status, what it wrote), on a terminal of so many columns. 0: one whose size nobody knows."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, columns) if columns else (0, 0))
    process = subprocess.Popen(
        [*CLI, *arguments],
        env={**{key: value for key, value in os.environ.items() if key != "COLUMNS"}, **daemon.env, **env},
        cwd=REPOSITORY,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    written, deadline = b"", time.monotonic() + START_DEADLINE
    try:
        while time.monotonic() < deadline:
            if select.select([outer], [], [], 0.5)[0]:
                try:
                    data = os.read(outer, 65536)
                except OSError:  # nobody has the other end any more
                    break
                if not data:
                    break
                written += data
        return process.wait(10), written
    finally:
        os.close(outer)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


COMMANDS = [
    ["ls"],
    ["ls", "--json"],
    ["status"],
    ["status", "m"],
    ["status", "m", "--json"],
    ["explain", "m"],
    ["explain", "m", "--json"],
    ["doctor", "--json"],
    ["doctor"],
    ["warm", "cold", "--wait"],
    ["verify", "m"],
    ["--help"],
    ["prefetch", "--help"],
    ["lease", "m", "--", "true"],
]
DRAWN = [["ls"], ["status", "cold"], ["explain", "m"], ["warm", "m", "--wait"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_encoding_makes_a_command_fail(daemon: Daemon, encoding: str) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}

    def through_a_pipe(arguments: Sequence[str]) -> None:
        done = plain(daemon, arguments, env)
        for text in (done.stdout.decode(encoding), done.stderr.decode(encoding)):
            assert "Traceback" not in text and "Error" not in text, f"{arguments}: {text}"
        assert done.returncode == 0 or arguments[0] == "doctor", (arguments, done)
        if "--json" in arguments:
            found = json.loads(done.stdout.decode(encoding))
            assert arguments[0] != "status" or ODD in [file["path"] for file in found["files"]]

    def on_one(arguments: Sequence[str]) -> None:
        status, shown = on_terminal(daemon, arguments, 80, {**env, "TERM": "xterm"})
        text = shown.decode(encoding)
        assert status == 0 and "Traceback" not in text, (arguments, text)
        assert "\\u2588" not in text and "\\u25cb" not in text, f"{arguments}: a drawing as an escape: {text}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(through_a_pipe, COMMANDS))
        list(pool.map(on_one, DRAWN))
    for arguments in (["status", "é●"], ["add", "x", "hf://●"], ["●"]):
        done = plain(daemon, arguments, env)
        assert done.returncode in (1, 2) and b"Traceback" not in done.stderr, done
        done.stderr.decode(encoding)


@pytest.mark.parametrize(
    ("shell", "statuses"),
    [
        ('"$@" | true', (0, 141)),
        ('"$@" >&-', (0,)),
        ('"$@" >&- 2>&-', (0,)),
        ('"$@" > /dev/full', (1,)),
    ],
)
def test_a_stdout_that_takes_nothing_is_no_traceback(daemon: Daemon, shell: str, statuses: tuple[int, ...]) -> None:
    for arguments in (["status", "m"], ["ls", "--json"], ["--help"]):
        done = plain(daemon, arguments, {}, shell)
        assert done.returncode in statuses, (arguments, done)
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done


@pytest.mark.parametrize(
    "env",
    [
        {"TERM": "xterm", "COLUMNS": "0"},
        {"TERM": "xterm", "COLUMNS": "1"},
        {"TERM": "xterm", "COLUMNS": "many"},
        {"TERM": "dumb"},
        {"TERM": ""},
        {"TERM": "xterm", "NO_COLOR": "1"},
    ],
)
def test_odd_terminals(daemon: Daemon, env: dict[str, str]) -> None:
    for arguments in DRAWN:
        status, shown = on_terminal(daemon, arguments, len(env) - 1, env)
        assert status == 0 and b"Traceback" not in shown, (arguments, shown.decode())
        if "NO_COLOR" in env and arguments[0] != "warm":
            assert b"\x1b[3" not in shown


def test_a_daemon_without_a_utf8_locale_serves_names_of_all_kinds(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "source", weights=(MIB, MIB))
    (source / ODD).write_text("x" * 100)
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    daemon = make_daemon(env=env)
    daemon.ok("add", "m", f"file://{source}")
    daemon.warm("m", "--all")
    assert daemon.path("m", ODD).read_text() == "x" * 100
    daemon.stop()
    assert " 0 partial" in daemon.ok("fsck", "--store", str(daemon.store))
