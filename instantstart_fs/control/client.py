"""The blocking side of the control socket, for the command line and scripts. Plain sockets; quick to import.

One Client is one connection: it sends a request and reads answers until ``done`` or ``failed``. Errors of the daemon
are raised as what they were over there; a daemon that is not there is DaemonUnreachable, which says what to do.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Self, TypeVar

import msgspec

from instantstart_fs.config.places import SOCKET_NAME, SYSTEM_RUN_DIRECTORY, default_socket
from instantstart_fs.control.protocol import (
    MAX_MESSAGE,
    Add,
    DaemonInfo,
    Done,
    Evict,
    Failed,
    Lease,
    LineBuffer,
    Ls,
    Pin,
    Ping,
    Progress,
    Remove,
    Request,
    Specs,
    Status,
    Touch,
    Update,
    Verify,
    VerifyResult,
    Warm,
    decode_response,
    encode_request,
)
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import ControlProtocolError, DaemonUnreachable, PermissionRefused

_T = TypeVar("_T")
CONNECT_DEADLINE = 5.0
"""Seconds to be accepted."""
ANSWER_DEADLINE = 50.0
"""Seconds for an answer that comes from memory: a loaded daemon is not a dead one."""
RESOLVE_DEADLINE = 660.0
"""Seconds for what lists an origin or deletes bytes; the daemon's own limit is a minute shorter."""


def find_socket(given: str | None = None) -> str:
    """``given``, else $INSTANTSTART_SOCKET, else this user's socket, else the machine's where only that is there."""
    if given or os.environ.get("INSTANTSTART_SOCKET"):
        return given or os.environ["INSTANTSTART_SOCKET"]
    own = default_socket()
    machine = os.path.join(SYSTEM_RUN_DIRECTORY, SOCKET_NAME)
    return machine if not os.path.exists(own) and os.path.exists(machine) else own


class Client:
    """A connection to the daemon at ``path`` (default: ``find_socket()``). A context manager; not for several threads.

    Every method raises ControlError's family for trouble between the two, and what the daemon raised.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = find_socket(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(CONNECT_DEADLINE)
        self._buffer = LineBuffer(MAX_MESSAGE)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            raise self._unreachable(error) from error

    def _unreachable(self, error: OSError) -> DaemonUnreachable | PermissionRefused:
        if isinstance(error, PermissionError):
            return PermissionRefused(f"{self.path}: this user may not talk to the daemon; ask as its owner (sudo)")
        if isinstance(error, FileNotFoundError):
            reason = "no daemon listens there"
        elif isinstance(error, ConnectionRefusedError):
            reason = "the daemon that listened there is gone"
        elif isinstance(error, TimeoutError):
            reason = f"it did not answer within {CONNECT_DEADLINE:g} s"
        else:
            reason = error.strerror or str(error)
        return DaemonUnreachable(
            f"{self.path}: {reason}; start one (`systemctl start instantstart`, or `instantstart serve`) "
            "or name its socket with --socket"
        )

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def ping(self) -> DaemonInfo:
        return self._ask(Ping(), DaemonInfo)

    def add(self, spec: PipelineSpec, *, warm: bool = False) -> PipelineStatus:
        return self._ask(Add(spec, warm), PipelineStatus, deadline=RESOLVE_DEADLINE)

    def update(self, pipeline: str) -> PipelineStatus:
        return self._ask(Update(pipeline), PipelineStatus, deadline=RESOLVE_DEADLINE)

    def remove(self, pipeline: str) -> None:
        self._ask(Remove(pipeline), type(None), deadline=RESOLVE_DEADLINE)

    def evict(self, pipeline: str) -> None:
        self._ask(Evict(pipeline), type(None), deadline=RESOLVE_DEADLINE)

    def set_pinned(self, pipeline: str, pinned: bool) -> None:
        self._ask(Pin(pipeline, pinned), type(None))

    def touch(self, pipeline: str) -> None:
        self._ask(Touch(pipeline), type(None))

    def pipelines(self) -> list[PipelineStatus]:
        return self._ask(Ls(), list[PipelineStatus])

    def specs(self) -> list[PipelineSpec]:
        return self._ask(Specs(), list[PipelineSpec])

    def status(self, pipeline: str) -> PipelineStatus:
        return self._ask(Status(pipeline), PipelineStatus)

    def warm(self, pipeline: str, *, everything: bool = False) -> PipelineStatus:
        """Start filling; its status at once."""
        return self._ask(Warm(pipeline, everything), PipelineStatus)

    def wait_warm(
        self, pipeline: str, *, everything: bool = False, progress: Callable[[PipelineStatus], None] | None = None
    ) -> PipelineStatus:
        """Start filling and wait until all is there; raises what made the fill fail. No deadline but progress: the
        daemon reports at least every second, so silence for ANSWER_DEADLINE means that it is gone."""

        def on_progress(message: Progress) -> None:
            if progress is not None:
                progress(_as(message.status, PipelineStatus))

        return self._ask(Warm(pipeline, everything, wait=True), PipelineStatus, on_progress=on_progress)

    def verify(self, pipeline: str, progress: Callable[[int, int], None] | None = None) -> VerifyResult:
        """``progress(bytes done, bytes in all)``."""

        def on_progress(message: Progress) -> None:
            if progress is not None:
                progress(message.done_bytes, message.total_bytes)

        return self._ask(Verify(pipeline), VerifyResult, on_progress=on_progress)

    def lease(self, pipeline: str) -> None:
        """Hold a lease until this client is closed (or its process ends)."""
        self._ask(Lease(pipeline), type(None))

    # -- the exchange ----------------------------------------------------------------------------------------------

    def _ask(
        self,
        request: Request,
        kind: type[_T],
        *,
        deadline: float = ANSWER_DEADLINE,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> _T:
        """``deadline``: seconds of silence after which the daemon counts as gone."""
        self._socket.settimeout(deadline)
        line = encode_request(request)
        # A daemon that refuses the connection may have closed it before the request was out: its reason is to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(line)
        while True:
            match decode_response(self._read_line(deadline)):
                case Progress() as message:
                    if on_progress is not None:
                        on_progress(message)
                case Done(result):
                    return _as(result, kind)
                case Failed() as failed:
                    raise failed.error()

    def _read_line(self, deadline: float) -> bytes:
        while True:
            for line in self._buffer.lines():
                return line
            try:
                data = self._socket.recv(256 * 1024)
            except TimeoutError as error:
                raise DaemonUnreachable(f"{self.path}: the daemon said nothing for {deadline:g} s") from error
            except OSError as error:
                raise DaemonUnreachable(f"{self.path}: {error.strerror or error}") from error
            if not data:
                raise DaemonUnreachable(f"{self.path}: the daemon ended before it answered; its log says why")
            self._buffer.feed(data)


def _as(value: Any, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ControlProtocolError(f"the daemon's answer is not understood: {error}") from error
