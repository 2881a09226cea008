"""`instantstart` commands of tests: forks of one process that has imported the command line.

A command spends a quarter of a second of processor time on imports alone, and the end-to-end tests run some two
thousand. A fork is a process of its own like any other: arguments, environment, streams, session, exit status. Tests
of how the program itself starts (its encodings, its imports) run it by `tests.harness.run` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_REQUEST = 1 << 18
"""Bytes of arguments and environment together; /proc/sys/net/core/wmem_default is 212,992 where nobody raised it."""
PYTHONS = ("PYTHON", "LC_", "LANG", "LD_PRELOAD")
"""Environment that counts when an interpreter starts: a command that differs in it gets a process of its own."""

_lock = threading.Lock()
_connection: socket.socket | None = None


def forkable(env: Mapping[str, str] | None) -> bool:
    return not any(name.startswith(PYTHONS) and os.environ.get(name) != value for name, value in (env or {}).items())


class Command:
    """One that runs."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        request = json.dumps([list(arguments), dict(env)]).encode()
        with theirs:
            socket.send_fds(_server(), [request], [theirs.fileno(), stdout, stderr])
        self._answers = ours.makefile("r")
        ours.close()
        self._pid = int(self._answers.readline())

    def wait(self, timeout: float) -> int | None:
        """Its exit status, negative for a signal. None: it took longer than ``timeout`` seconds, and was killed."""
        with self._answers:
            poll = select.poll()  # not select(2): a test may have more than a thousand descriptors
            poll.register(self._answers, select.POLLIN)
            if poll.poll(timeout * 1000):
                return int(self._answers.readline())
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # not waited for: it may be unkillable until its mount goes
        return None


def _server() -> socket.socket:
    global _connection
    with _lock:
        if _connection is None:
            _connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.commands", str(theirs.fileno())],
                    cwd=REPOSITORY,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            atexit.register(process.wait)
            atexit.register(_connection.close)  # it ends with its connection; called before the wait
        return _connection


def _next(connection: socket.socket) -> list[str] | None:
    """In each fork: its arguments, with streams and environment set. In the server, at its end: None."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([connection, *running], [], [])
        for pidfd in ready:
            if isinstance(pidfd, int):
                pid, answers = running.pop(pidfd)
                with answers, contextlib.suppress(OSError):
                    answers.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(pidfd)
        if connection not in ready:
            continue
        request, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
        if not request:
            return None
        answers = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid:
            running[os.pidfd_open(pid)] = (pid, answers)
            for fd in fds[1:]:
                os.close(fd)
            with contextlib.suppress(OSError):
                answers.sendall(b"%d\n" % pid)
            continue
        os.setsid()
        connection.close()
        answers.close()
        for pidfd, (_, other) in running.items():
            other.close()
            os.close(pidfd)
        arguments, environment = json.loads(request)
        for number, fd in enumerate(fds[1:], 1):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(environment)
        return [*arguments]


def _serve(fd: int) -> None:
    from instantstart_fs import cli

    with contextlib.redirect_stderr(io.StringIO()):  # whatever a command imports when it runs
        cli.run(["status", "nothing", "--socket", "/nonexistent/control.sock"])
    gc.collect()
    gc.freeze()
    arguments = _next(socket.socket(fileno=fd))
    if arguments is not None:
        sys.argv = ["instantstart", *arguments]
        for name, number in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        try:
            status = cli.run(arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # to take the interpreter apart would cost twice as much as the command


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
