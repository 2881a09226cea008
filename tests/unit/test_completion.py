"""What shells are offered after TAB: the real protocol of each shell, real bash where it is, a scripted daemon."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.control.protocol import Done, Names, decode_request, encode_response

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


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_takes_the_script_and_the_answer(daemon: Daemon, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "instantstart"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m instantstart_fs.cli "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(instantstart --show-completion bash)"\n'
        "COMP_WORDS=(instantstart prefetch my-l); COMP_CWORD=2\n"
        "_instantstart_completion instantstart my-l prefetch\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "INSTANTSTART_SOCKET": str(daemon.path),
    }
    found = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (found.stdout, found.stderr) == ("my-llm\n", "")
