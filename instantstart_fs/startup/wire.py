"""A few requests to the daemon before the engine starts. The protocol is control/protocol.py's; this speaks it with
what the interpreter has at hand, since the full client's imports take longer than a warm start may (60 ms)."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable, Mapping

from instantstart_fs.errors import ControlProtocolError, DaemonUnreachable, from_code
from instantstart_fs.ipc import fd_passing

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import Any

ANSWER_SECONDS = 50.0
RESTART_SECONDS = 20.0
"""Seconds to wait for a daemon that is not there: it restarts, or the machine comes up."""
SAID_AFTER = 1.0
"""Seconds after which who waits for it says so."""
MAX_DESCRIPTORS = 64
"""The most descriptors of one message: control.protocol.MAX_HANDED_FILES, two each."""
MAX_ANSWER = 16 * 1024 * 1024


class Wire:
    """One connection to the daemon. Raises the errors of control.client.Client. ``say`` is told once that the daemon
    is waited for."""

    def __init__(
        self, path: str, *, patience: float = RESTART_SECONDS, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = path
        self._pending = b""
        self.descriptors: list[int] = []
        began, said = time.monotonic(), False
        end = began + patience
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(ANSWER_SECONDS)
            try:
                self._socket.connect(path)
                return
            except OSError as error:
                self._socket.close()
                if isinstance(error, PermissionError) or time.monotonic() >= end:
                    raise DaemonUnreachable(
                        f"{path}: {error.strerror or error}; start a daemon (`systemctl start instantstart`, or "
                        "`instantstart start`) or name its socket with --socket"
                    ) from error
                if not said and time.monotonic() >= began + SAID_AFTER:
                    said = True
                    say(
                        f"waits for the daemon at {path} ({error.strerror or error}), {patience:g} s at most; "
                        "`systemctl start instantstart` or `instantstart start` starts one, --socket names another"
                    )
            time.sleep(0.1)

    def ask(
        self,
        operation: str,
        *,
        seconds: float = ANSWER_SECONDS,
        at_most: float = 0.0,
        waits: Callable[[], None] = lambda: None,
        **fields: object,
    ) -> Any:
        """The result; descriptors that came with it are in ``descriptors``. ``seconds``: for which it may say
        nothing; ``at_most``: for all of it, 0 = as long as it says something. ``waits`` is called after SAID_AFTER
        without an answer, and each time that the daemon says that it is still at it."""
        end = time.monotonic() + at_most if at_most else float("inf")
        self._socket.settimeout(seconds)
        self.send(operation, **fields)
        if not self._pending and not _is_readable(self._socket, SAID_AFTER):
            waits()
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise DaemonUnreachable(f"{self.path}: the daemon did not answer within {at_most:g} s")
            self._socket.settimeout(min(seconds, left))
            message = self.receive()
            if message.get("type") == "done":
                return message.get("result")
            if message.get("type") == "progress":
                waits()

    def send(self, operation: str, **fields: object) -> None:
        line = json.dumps({"v": 1, "request": {"op": operation, **fields}}).encode() + b"\n"
        try:
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            pass  # why, is to be read
        except OSError as error:
            raise DaemonUnreachable(f"{self.path}: {error.strerror or error}") from error

    def receive(self) -> Mapping[str, Any]:
        """The next message that is no failure."""
        while b"\n" not in self._pending:
            try:
                data, descriptors, _ = fd_passing.receive(self._socket, 65536, MAX_DESCRIPTORS)
            except TimeoutError as error:
                raise DaemonUnreachable(
                    f"{self.path}: the daemon said nothing for {self._socket.gettimeout():g} s"
                ) from error
            except OSError as error:
                raise DaemonUnreachable(f"{self.path}: {error.strerror or error}") from error
            self.descriptors += descriptors
            if not data:
                raise DaemonUnreachable(f"{self.path}: the daemon ended before it answered; its log says why")
            self._pending += data
            if len(self._pending) > MAX_ANSWER:
                raise ControlProtocolError(f"{self.path}: an answer of more than {MAX_ANSWER} bytes")
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ControlProtocolError(f"{self.path}: not an answer of an instantstart daemon: {error}") from error
        if not isinstance(message, dict):
            raise ControlProtocolError(f"{self.path}: not an answer of an instantstart daemon")
        if message.get("type") == "failed":
            raise from_code(str(message.get("code")), str(message.get("message")))
        return message

    def wait_disconnected(self) -> None:
        """Return when the daemon ends this connection. For a thread of its own."""
        self._socket.settimeout(None)
        try:
            while self._socket.recv(65536):
                pass
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        self._socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def _is_readable(connection: socket.socket, seconds: float) -> bool:
    """Whether there is something to read within so many seconds."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(1000 * seconds))
