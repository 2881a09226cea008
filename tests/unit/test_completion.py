"""What shells are offered after TAB: the real protocol of each shell, the real shells where they are, a scripted
daemon."""

from __future__ import annotations

import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.cli import run
from instantstart_fs.cli.completion_scripts import script
from instantstart_fs.control.lines import decode_request, encode_response
from instantstart_fs.control.protocol import Done, Names
from tests.harness import REPOSITORY

IDS = ["my-asr", "my-llm", "other"]
VERBS = ["status", "release"]
PROGRAM = [sys.executable, "-m", "instantstart_fs.cli"]


class Daemon:
    """Answers ``names``, or (``silent``) accepts and says nothing."""

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path = path
        self.asked: list[str] = []
        self._silent = silent
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._held.append(connection)
            if not self._silent:
                request = decode_request(connection.makefile("rb").readline())
                assert isinstance(request, Names)
                self.asked.append(request.prefix)
                found = [name for name in IDS if name.startswith(request.prefix)]
                connection.sendall(encode_response(Done(found)))

    def close(self) -> None:
        # Closing alone does not wake an accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        for connection in self._held:
            connection.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path / "s")
    yield found
    found.close()


def complete(shell: str, line: str, path: Path) -> list[str]:
    """What ``shell`` would be told for ``line``, whose last word is being typed."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "INSTANTSTART_SOCKET": str(path),
        "_INSTANTSTART_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    found = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert found.stderr == ""
    return [name for name in (*IDS, *VERBS) if name in found.stdout]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", ["prefetch", "prefetch --devices cpu", "status", "warm", "lease"])
def test_ids_are_offered(shell: str, command: str, daemon: Daemon) -> None:
    assert complete(shell, f"instantstart {command} my-", daemon.path) == ["my-asr", "my-llm"]
    assert daemon.asked == ["my-"]


def test_the_verbs_of_prefetch_are_offered_and_then_what_is_held(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete("bash", "instantstart prefetch rel", daemon.path) == ["release"]
    monkeypatch.setenv("INSTANTSTART_PREFETCH_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as held, socket.socket(socket.AF_UNIX) as dead:
        held.bind(str(tmp_path / "my-llm.sock"))
        held.listen()
        dead.bind(str(tmp_path / "my-asr.sock"))
        for verb in VERBS:
            assert complete("bash", f"instantstart prefetch {verb} my-", daemon.path) == ["my-llm"]
    assert daemon.asked == ["rel"]


def test_holds_that_cannot_be_looked_for_are_no_word(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INSTANTSTART_PREFETCH_DIR", str(tmp_path / "file"))
    assert complete("bash", "instantstart prefetch release my-", daemon.path) == []


def test_a_socket_that_was_typed_is_asked(daemon: Daemon, tmp_path: Path) -> None:
    assert complete("bash", f"instantstart status --socket {daemon.path} o", tmp_path / "nobody") == ["other"]


def test_a_new_pipeline_has_no_known_id(daemon: Daemon) -> None:
    assert complete("bash", "instantstart add my-", daemon.path) == []
    assert daemon.asked == []


def test_no_daemon_means_no_word(tmp_path: Path) -> None:
    assert complete("bash", "instantstart status my-", tmp_path / "nobody") == []


def test_a_daemon_that_says_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    stuck = Daemon(tmp_path / "s", silent=True)
    began = time.monotonic()
    assert complete("bash", "instantstart status my-", stuck.path) == []
    assert time.monotonic() - began < 10  # its own deadline is half a second; the rest is the interpreter's start
    stuck.close()


# -- real shells -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody with an empty home directory, whose PATH finds the program."""
    program = tmp_path / "bin" / "instantstart"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m instantstart_fs.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ZDOTDIR"))}
    return {
        **kept,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "TERM": "dumb",
        "PYTHONPATH": str(REPOSITORY),
        "INSTANTSTART_SOCKET": str(daemon.path),
    }


def shell_or_skip(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")


def run_in(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=environment, cwd=environment["HOME"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def press_tab(environment: dict[str, str], shell: str, line: str, awaited: str) -> str:
    """Type ``line`` and one TAB in an interactive shell; what it shows, at the latest once ``awaited`` is in it."""
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", shell, "-i"],
        env=environment,
        cwd=environment["HOME"],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
    )
    os.close(other_end)
    shown = ""

    def show(until: str) -> None:
        nonlocal shown
        end = time.monotonic() + 30
        while until not in shown and (left := end - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the shell has ended
                    return

    try:
        os.write(terminal, b"echo its-'prompt'\n")  # before it is there, a TAB is only a character
        show("its-prompt")
        shown = shown.rpartition("its-prompt")[2]
        os.write(terminal, f"{line}\t".encode())
        show(awaited)
        return shown
    finally:
        process.kill()
        process.wait(10)
        os.close(terminal)


@pytest.mark.parametrize(("shell", "line"), [("bash", "rm my-l"), ("zsh", "prefetch my-l")])
def test_the_first_tab_in_a_shell_completes(shell: str, line: str, home: dict[str, str]) -> None:
    shell_or_skip(shell)
    said = run_in(home, "instantstart", "--install-completion", shell)
    assert said.startswith(f"{shell} completes instantstart")
    assert "my-llm " in press_tab(home, shell, f"instantstart {line}", "my-llm ")


def test_zsh_shows_help_whole_and_takes_the_script_by_source_too(home: dict[str, str]) -> None:
    shell_or_skip("zsh")
    start = 'autoload -Uz compinit; compinit\neval "$(instantstart --show-completion zsh)"\n'
    Path(home["HOME"], ".zshrc").write_text(start)
    shown = press_tab(home, "zsh", "instantstart re", "its bytes.")
    assert "The region's tier of weights ([regional])." in shown and "Remove a pipeline and its bytes." in shown
    assert "--json " in press_tab(home, "zsh", "instantstart evict --js", "--json ")
    Path(home["HOME"], "a-model").mkdir()
    assert "./a-model/" in press_tab(home, "zsh", "instantstart add new ./a-", "./a-model/")


def test_fish_completes(home: dict[str, str]) -> None:
    shell_or_skip("fish")
    run_in(home, "instantstart", "--install-completion", "fish")

    def offered(line: str) -> list[str]:
        return run_in(home, "fish", "-c", f"complete -C '{line}'").splitlines()

    assert offered("instantstart prefetch my-l") == ["my-llm"]
    assert offered("instantstart evict --js") == ["--json\tPrint JSON (see docs/CONFIGURATION.md)."]
    assert "regional\tThe region's tier of weights ([regional])." in offered("instantstart re")
    Path(home["HOME"], "a-model").mkdir()
    assert offered("instantstart add new ./a-") == ["./a-model/"]


@pytest.mark.parametrize("written", ["{option} {shell}", "{option}={shell}"])
@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "--no-files")])
def test_the_shell_that_is_named_is_the_one_whose_script_is_shown(
    shell: str, mark: str, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever shell this is typed in: a packager's is `sh`."""
    assert run(written.format(option="--show-completion", shell=shell).split()) == 0
    assert mark in capsys.readouterr().out


def test_a_shell_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--install-completion", "fihs"]) == 2
    assert "none of bash, zsh, fish (did you mean 'fish'?)" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_without_a_name_it_is_the_shell_that_it_is_typed_in(shell: str, home: dict[str, str]) -> None:
    shell_or_skip(shell)
    shown = run_in({**home, "SHELL": "/bin/none"}, shell, "-c", "instantstart --show-completion; true")
    assert shown == script(shell)
