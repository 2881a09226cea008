"""What a person sees, on terminals of all kinds: none of them makes a command fail."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
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
from tests.servers.hub import HubServer

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


def test_what_others_write_has_lines_of_its_own_beside_a_bar(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    """A cold fill on a slow line, with an error on the way, and a daemon's log on the same terminal."""
    hub.publish("org/m", model_directory(tmp_path / "source", weights=(6 * MIB, MIB)))
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}})
    daemon.ok("add", "m", "hf://org/m")
    hub.fault("bandwidth", port="cdn", rate=300_000)
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    env = {**os.environ, **daemon.env, "TERM": "xterm"}
    command = [*CLI, "warm", "m", "--wait"]
    process = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdin=inner, stdout=inner, stderr=inner)
    screen, written, told, deadline = Screen(24, 80), b"", 0, time.monotonic() + 60
    seen: list[str] = []
    while told < 3 and time.monotonic() < deadline:
        if not select.select([outer], [], [], 0.5)[0]:
            continue
        data = os.read(outer, 65536)
        written += data
        screen.feed(data.decode())
        bar = screen.lines[-2]
        if bar.startswith("m  ") and "%" in bar and bar not in seen:
            seen.append(bar)
            if len(seen) % 2 == 0:
                os.write(inner, f"warning [m] line {told} of the log\n".encode())
                told += 1
    hub.clear()
    while True:
        if not select.select([outer], [], [], 0.5)[0]:
            if process.poll() is not None:
                break
            continue
        screen.feed(os.read(outer, 65536).decode())
    os.close(inner)
    os.close(outer)
    assert process.wait(60) == 0
    shown = screen.lines
    for number in range(told):
        assert f"warning [m] line {number} of the log" in shown, shown
    assert not any("█" in line or "░" in line for line in shown), f"the bar was left behind: {shown}"
    # Nothing is whole yet: one chunk of 8 MiB and one of 1 MiB, and the bar moves all the same.
    assert len({bar.split("%")[0] for bar in seen}) >= 3, seen
    assert any("/s" in bar for bar in seen), seen


class Screen:
    """As much of a terminal as the bar uses: a cursor, a region that scrolls, lines that are erased."""

    SEQUENCE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|\x1b([78])|([\r\n])|([^\x1b\r\n])")

    def __init__(self, rows: int, columns: int) -> None:
        self._cells = [[" "] * columns for _ in range(rows)]
        self._rows, self._columns = rows, columns
        self._row = self._column = 0
        self._saved = (0, 0)
        self._bottom = rows
        self._rest = ""

    @property
    def lines(self) -> list[str]:
        return ["".join(line).rstrip() for line in self._cells]

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            found = self.SEQUENCE.match(text, at)
            if found is None:
                self._rest = text[at:]
                return
            at = found.end()
            self._do(found)

    def _do(self, found: re.Match[str]) -> None:
        numbers = [int(number) for number in (found[1] or "").split(";") if number]
        match found[2] or found[3] or found[4]:
            case "\r":
                self._column = 0
            case "\n":
                if self._row == self._bottom - 1:
                    self._cells.insert(self._bottom, [" "] * self._columns)
                    del self._cells[0]
                else:
                    self._row = min(self._row + 1, self._rows - 1)
            case "7":
                self._saved = (self._row, self._column)
            case "8":
                self._row, self._column = self._saved
            case "A":
                self._row = max(self._row - numbers[0], 0)
            case "H":
                self._row, self._column = numbers[0] - 1, numbers[1] - 1
            case "K":
                self._cells[self._row][self._column :] = [" "] * (self._columns - self._column)
            case "J":
                for row in range(self._row, self._rows):
                    self._cells[row] = [" "] * self._columns
            case "r":
                self._bottom = numbers[1] if numbers else self._rows
                self._row = self._column = 0
            case None:
                self._cells[self._row][min(self._column, self._columns - 1)] = found[5]
                self._column += 1


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


DRAWS = """
import os, sys
from instantstart_fs.cli.progress import Bar
if "background" in sys.argv:
    os.setpgid(0, 0)
with Bar("m") as bar:
    for done in range(10**9):
        bar.report(done, 10**9, "1 B/s", "")
        if done == 100:
            os.write(1, b"<drawn>")
            if "background" in sys.argv:
                break
            if "raise" in sys.argv:
                raise ValueError("a fault")
"""


@pytest.mark.parametrize("how", ["TERM", "HUP", "QUIT", "INT", "raise", "background"])
def test_the_terminal_is_given_back_however_a_bar_ends(how: str) -> None:
    """The signal comes while it draws without a pause."""
    process, outer = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", DRAWS, how])
    try:
        termios.tcsetwinsize(outer, (24, 80))
        written, told, deadline = b"", False, time.monotonic() + START_DEADLINE
        status: int | None = None
        while time.monotonic() < deadline:
            if select.select([outer], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # nobody has the other end any more
                    written += os.read(outer, 65536)
            if b"<drawn>" in written and not told and how.isupper():
                os.kill(process, getattr(signal, f"SIG{how}"))
                told = True
            if status is None:
                ended, found = os.waitpid(process, os.WNOHANG)
                status = found if ended else None
            elif not select.select([outer], [], [], 0.1)[0] or os.WIFEXITED(status) or os.WIFSIGNALED(status):
                break
        while select.select([outer], [], [], 0.1)[0]:
            try:
                written += os.read(outer, 65536)
            except OSError:
                break
        assert status is not None
        if how in ("TERM", "HUP", "QUIT"):
            assert os.WIFSIGNALED(status), written[-2000:]
            assert os.WTERMSIG(status) == getattr(signal, f"SIG{how}")
        assert written.rfind(b"\x1b[r") >= written.rfind(b"\x1b[1;22r"), written[-500:]
        assert (b"\x1b[1;22r" in written) == (how != "background")
    finally:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(outer)
