"""Looks for --ready-log in a command's output: in a process of its own, since a user's pattern may take as long as it
likes over a line, and the output has to go on meanwhile. It is a few lines that import nothing of ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection

LONGEST = 4000
"""The bytes of a line that are looked at: less than a pipe takes in one piece."""
LINE_SECONDS = 30
PIPE_BYTES = 1024 * 1024

_PROGRAM = f"""
import re, signal, sys
pattern = re.compile(sys.argv[1])
for line in sys.stdin.buffer:
    signal.alarm({LINE_SECONDS})
    found = pattern.search(line.rstrip(b"\\n").decode("utf-8", "replace"))
    signal.alarm(0)
    if found:
        sys.stdout.write("x")
        break
"""


class Pattern:
    """Owned by ``Listening``; ``hear`` from any thread. Raises OSError where there can be no other process."""

    def __init__(self, pattern: str, matched: Callable[[], None], warn: Callable[[str], None]) -> None:
        self._matched, self._warn = matched, warn
        self._late = False
        self._process = -1
        self._lock = threading.Lock()
        self._pattern = pattern
        self._lines, self._write = os.pipe2(os.O_CLOEXEC)
        self._answer, self._say = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        with contextlib.suppress(OSError):  # pipe-user-pages-soft
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def begin(self, mask: Collection[int]) -> None:
        """Begin to match. ``mask``: the signals that its process has blocked."""
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _PROGRAM, self._pattern],
            dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, self._lines, 0), (os.POSIX_SPAWN_DUP2, self._say, 1)],
            setpgroup=0,  # the terminal's Ctrl-C is the command's
            setsigmask=mask,
            setsigdef=[signal.SIGTERM],
        )
        os.close(self._lines)
        os.close(self._say)
        with contextlib.suppress(OSError):
            self._process = os.pidfd_open(pid)  # the main thread reaps it at its end: its number may be another's soon
        threading.Thread(target=self._wait, name="pattern", daemon=True).start()

    def _wait(self) -> None:
        if os.read(self._answer, 1):
            self._matched()
        elif self._write >= 0:
            self._warn("--ready-log: nobody looks for it any more: its process ended, or a line took it too long")

    def hear(self, line: bytes) -> None:
        """A line of the output. Never waits."""
        try:
            with self._lock:
                if self._write >= 0:
                    os.write(self._write, line[:LONGEST] + b"\n")  # whole, or not at all: it is less than PIPE_BUF
        except BlockingIOError:
            if not self._late:
                self._late = True
                self._warn("--ready-log: the pattern is slower than the output: lines of it are not looked at")
        except OSError:
            pass  # it has found it, or is gone, which was said

    def end(self) -> None:
        """The command has ended: what it said last is still looked at, as far as that is quick."""
        with self._lock:
            write, self._write = self._write, -1
            os.close(write)

    def kill(self) -> None:
        """End its process, which may be at a line that takes for ever."""
        if self._process >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
