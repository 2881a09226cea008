"""The blocking client of the control socket, for the command line and scripts. It is quick to import.

One Client is one connection: it sends a request and reads answers until ``done`` or ``failed``. The daemon's errors are
raised with their own class. If no daemon answers, DaemonUnreachable says what to do.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import msgspec

from instantstart_fs.config import unixsocket
from instantstart_fs.config.places import find_socket
from instantstart_fs.control import protocol
from instantstart_fs.core.coldstart import ColdStart, Moment
from instantstart_fs.core.humanize import did_you_mean
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.status import OriginCheck, PipelineStatus
from instantstart_fs.core.weights import WeightSet
from instantstart_fs.errors import (
    ControlProtocolError,
    DaemonUnreachable,
    InstantStartError,
    PermissionRefused,
    PipelineNotFound,
    UsageError,
)

_T = TypeVar("_T")
CONNECT_DEADLINE = 20.0
"""Seconds to be accepted. One waits only while the backlog is full: hundreds of others came at the same moment."""
ANSWER_DEADLINE = 50.0
"""Seconds for an answer that comes from memory: a loaded daemon is not a dead one."""
CHECK_DEADLINE = 120.0
"""For ``check_origins``: the daemon takes 25 s at most, after those of others who asked before."""
NAMES_DEADLINE = 2.0
"""For the names that may have been meant: an error message waits for them."""
RESOLVE_DEADLINE = 660.0
"""Seconds for what lists an origin or deletes bytes; the daemon's own limit is a minute shorter."""


class Client:
    """A connection to the daemon at ``path`` (default: ``find_socket()``). A context manager; not for several threads.

    Every method raises errors of ControlError's family for the connection, and those that the daemon raised. It has as
    many public methods as the protocol has requests.
    """

    def __init__(self, path: str | None = None, *, deadline: float = CONNECT_DEADLINE) -> None:
        """``deadline``: seconds to be accepted."""
        self.path = find_socket(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = protocol.LineBuffer(protocol.MAX_MESSAGE)
        self._descriptors: collections.deque[int] = collections.deque()
        try:
            unixsocket.connect(self._socket, self.path, deadline)
        except OSError as error:
            self._socket.close()
            raise self._unreachable(error, deadline) from error

    def _unreachable(self, error: OSError, deadline: float) -> DaemonUnreachable | PermissionRefused:
        if isinstance(error, PermissionError):
            return PermissionRefused(f"{self.path}: this user may not talk to the daemon; ask as its owner (sudo)")
        if isinstance(error, FileNotFoundError):
            reason = "no daemon listens there"
        elif isinstance(error, ConnectionRefusedError):
            reason = "the daemon that listened there is gone"
        elif isinstance(error, TimeoutError):
            return DaemonUnreachable(
                f"{self.path}: the daemon is busy, it accepted nobody else within {deadline:g} s; try again, and look "
                "into its log (`journalctl -u instantstart`) if it stays so"
            )
        else:
            reason = error.strerror or str(error)
        return DaemonUnreachable(
            f"{self.path}: {reason}; start one (`systemctl start instantstart`, or `instantstart start`) "
            "or name its socket with --socket"
        )

    def close(self) -> None:
        """From any thread: one that waits for an answer gets DaemonUnreachable."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peer_pid(self) -> int:
        """The daemon's process as the kernel numbers it for this one; 0 where it lies in another pid namespace."""
        size = struct.calcsize("3i")
        return int(struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])

    # -- requests --------------------------------------------------------------------------------------------------

    def ping(self) -> protocol.DaemonInfo:
        return self._ask(protocol.Ping(), protocol.DaemonInfo)

    def add(self, spec: PipelineSpec, *, warm: bool = False) -> PipelineStatus:
        return self._ask(protocol.Add(spec, warm), PipelineStatus, deadline=RESOLVE_DEADLINE)

    def update(self, pipeline: str) -> PipelineStatus:
        return self._ask(protocol.Update(pipeline), PipelineStatus, deadline=RESOLVE_DEADLINE)

    def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        """Who still has files of it open, in words. ``force``: leases are ended rather than in the way."""
        return self._held_by(protocol.Remove(pipeline, force))

    def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        """The same. ``force``: opens are not in the way either."""
        return self._held_by(protocol.Evict(pipeline, force))

    def _held_by(self, request: protocol.Request) -> list[str]:
        answer: Any = self._ask(request, object, deadline=RESOLVE_DEADLINE)
        return [] if answer is None else _as(answer, list[str])

    def set_pinned(self, pipeline: str, pinned: bool) -> None:
        self._ask(protocol.Pin(pipeline, pinned), type(None))

    def touch(self, pipeline: str) -> None:
        self._ask(protocol.Touch(pipeline), type(None))

    def mark(self, pipeline: str, moment: Moment, at_ns: int | None = None) -> None:
        """``at_ns``: wall clock, None for the moment when the daemon gets it."""
        self._ask(protocol.Mark(pipeline, moment, at_ns), type(None))

    def startup_caches(self, pipeline: str) -> list[StartupRecord]:
        """Newest first."""
        return self._ask(protocol.StartupCaches(pipeline), list[StartupRecord])

    def startup_verify(self, pipeline: str) -> protocol.StartupVerified:
        """Read them again; what is damaged is deleted."""
        return self._ask(protocol.StartupVerify(pipeline), protocol.StartupVerified, deadline=RESOLVE_DEADLINE)

    def startup_remove(self, pipeline: str, numbers: Sequence[int] = ()) -> int:
        """These versions, or all; how many."""
        return self._ask(protocol.StartupRemove(pipeline, tuple(numbers)), int)

    def cold_starts(self, pipeline: str) -> list[ColdStart]:
        """Newest first."""
        return self._ask(protocol.ColdStarts(pipeline), list[ColdStart])

    def pipelines(self) -> list[PipelineStatus]:
        return self._ask(protocol.Ls(), list[PipelineStatus])

    def names(self, prefix: str = "", *, deadline: float = ANSWER_DEADLINE) -> list[str]:
        """Ids that begin with ``prefix``, of the pipelines that this user owns or may read."""
        return self._ask(protocol.Names(prefix), list[str], deadline=deadline)

    def specs(self) -> list[PipelineSpec]:
        return self._ask(protocol.Specs(), list[PipelineSpec])

    def status(self, pipeline: str, *, brief: bool = False) -> PipelineStatus:
        """``brief``: with ``listed`` in place of ``files``, which may be a hundred thousand."""
        return self._ask(protocol.Status(pipeline, brief), PipelineStatus)

    def warm(self, pipeline: str, *, everything: bool = False) -> PipelineStatus:
        """Start filling; its status at once."""
        return self._ask(protocol.Warm(pipeline, everything), PipelineStatus)

    def include(self, pipeline: str, globs: Sequence[str]) -> None:
        """What these match belongs to the load set from now on."""
        self._ask(protocol.Include(pipeline, tuple(globs)), type(None))

    def wait_warm(
        self, pipeline: str, *, everything: bool = False, progress: Callable[[PipelineStatus], None] | None = None
    ) -> PipelineStatus:
        """Start filling and wait until all is there; raises what made the fill fail. No deadline but progress: the
        daemon reports at least every second, so silence for ANSWER_DEADLINE means that it is gone."""

        def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                progress(_as(message.status, PipelineStatus))

        return self._ask(protocol.Warm(pipeline, everything, wait=True), PipelineStatus, on_progress=on_progress)

    def region_state(self, pipeline: str, *, check: bool = False) -> protocol.RegionState:
        """How far the regional tier has it. ``check``: the tier is asked what it holds."""
        return self._ask(protocol.AskRegion(pipeline, check), protocol.RegionState)

    def check_access(self, pipeline: str) -> list[str]:
        """The sources, when all of them may be fetched with the pipeline's own credentials; else raises why not."""
        return self._ask(protocol.Access(pipeline), list[str], deadline=RESOLVE_DEADLINE)

    def check_origins(self) -> list[OriginCheck]:
        """What the daemon itself gets from the origins of the pipelines that this user owns, or of all."""
        return self._ask(protocol.CheckOrigins(), list[OriginCheck], deadline=CHECK_DEADLINE)

    def verify(
        self, pipeline: str, progress: Callable[[int, int], None] | None = None, *, rate: float | None = None
    ) -> protocol.VerifyResult:
        """``progress(bytes done, bytes in all)``; ``rate``: bytes a second at most."""

        def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                progress(message.done_bytes, message.total_bytes)

        return self._ask(protocol.Verify(pipeline, rate), protocol.VerifyResult, on_progress=on_progress)

    def lease(self, pipeline: str) -> None:
        """Hold a lease until this client is closed (or its process ends)."""
        self._ask(protocol.Lease(pipeline), type(None))

    def open(self, pipeline: str, deadlines: Mapping[str, float] | None = None, *, stream: bool = False) -> WeightSet:
        """Ask for the pipeline's weight files, under a lease until this client is closed (or its process ends); what
        there will be. ``deadlines``: model → seconds, see core.weights.schedule. ``opened_files`` has to follow;
        with ``stream``: ``opened_parts``.
        Raises UsageError for a deadline that is no number."""
        # JSON knows no infinity, and a model without a deadline comes last anyway.
        wanted_at = {model: seconds for model, seconds in (deadlines or {}).items() if seconds != math.inf}
        for model, seconds in wanted_at.items():
            if not math.isfinite(seconds):
                raise UsageError(f"{pipeline}: the deadline of {model!r} is {seconds:g}")
        self._send(protocol.Open(pipeline, wanted_at, stream), ANSWER_DEADLINE)
        message = self._receive(ANSWER_DEADLINE)
        if isinstance(message, protocol.Opening):
            return message.weights
        raise (
            message.error()
            if isinstance(message, protocol.Failed)
            else ControlProtocolError("the daemon answered something else; use the same release of both")
        )

    def opened_files(self) -> Iterator[tuple[str, list[int]]]:
        """(path, descriptors) of each file, as it is complete: open for reading, and, where its filesystem can, the
        same opened O_DIRECT. They are the caller's to close. Raises what keeps a file from coming."""
        for part, descriptors in self.opened_parts():
            yield part.path, descriptors

    def opened_parts(self) -> Iterator[tuple[protocol.Part, list[int]]]:
        """News of the files as they come, with the descriptors (as of ``opened_files``). Raises what keeps a file from
        coming."""
        while True:
            match self._receive(ANSWER_DEADLINE):
                case protocol.Parts(parts):
                    for part in parts:
                        yield part, self._take_descriptors(part.descriptors)
                case protocol.Handed(files):
                    for file in files:
                        if not file.descriptors:
                            raise ControlProtocolError("a file came without a descriptor; use the same release of both")
                        part = protocol.Part(file.path, file.descriptors, complete=True)
                        yield part, self._take_descriptors(file.descriptors)
                case protocol.Failed() as failed:
                    raise failed.error()
                case protocol.Done():
                    return
                case _:
                    pass

    def _take_descriptors(self, count: int) -> list[int]:
        if len(self._descriptors) < count:
            raise ControlProtocolError("a file came without its descriptor: this process may not open more (ulimit -n)")
        return [self._descriptors.popleft() for _ in range(count)]

    def wait_ended(self, timeout: float) -> bool:
        """Whether the daemon ended the connection, and with it the lease, within ``timeout`` seconds."""
        self._socket.settimeout(timeout)
        try:
            return not self._socket.recv(4096)
        except TimeoutError:
            return False
        except OSError:
            return True

    def wait_gone(self) -> None:
        """Until the daemon closes this connection. For as long as that takes: for a thread of its own."""
        self._socket.settimeout(None)
        with contextlib.suppress(OSError):
            while self._socket.recv(protocol.MAX_MESSAGE):
                pass
        self.close()

    # -- the exchange ----------------------------------------------------------------------------------------------

    def _ask(
        self,
        request: protocol.Request,
        kind: type[_T],
        *,
        deadline: float = ANSWER_DEADLINE,
        on_progress: Callable[[protocol.Progress], None] | None = None,
    ) -> _T:
        """``deadline``: seconds of silence after which the daemon counts as gone."""
        self._send(request, deadline)
        while True:
            match self._receive(deadline):
                case protocol.Progress() as message:
                    if on_progress is not None:
                        on_progress(message)
                case protocol.Done(result):
                    return _as(result, kind)
                case protocol.Failed() as failed:
                    raise self._with_advice(failed.error(), request)
                case _:
                    raise ControlProtocolError("the daemon answered something else; use the same release of both")

    def _with_advice(self, error: InstantStartError, request: protocol.Request) -> InstantStartError:
        """For a pipeline that is not there, the name that may have been meant, of those that this user may see."""
        wanted = getattr(request, "pipeline", None)
        if not isinstance(error, PipelineNotFound) or not wanted:
            return error
        with contextlib.suppress(InstantStartError, OSError, ValueError):
            known = {*self.names(wanted[:2], deadline=NAMES_DEADLINE), *self.names(deadline=NAMES_DEADLINE)}
            if meant := did_you_mean(wanted, sorted(known)):
                first, semicolon, rest = error.message.partition(";")
                return PipelineNotFound(f"{first}{meant}{semicolon}{rest}")
        return error

    def _send(self, request: protocol.Request, deadline: float) -> None:
        self._socket.settimeout(deadline)
        line = protocol.encode_request(request)
        # A daemon that refuses the connection may have closed it before the request was out: its reason is to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(line)

    def _receive(self, deadline: float) -> protocol.Response:
        return protocol.decode_response(self._read_line(deadline))

    def _read_line(self, deadline: float) -> bytes:
        while True:
            for line in self._buffer.lines():
                return line
            try:
                # The kernel never joins bytes across descriptors: those that came belong to the lines that follow.
                data, descriptors, _, _ = socket.recv_fds(
                    self._socket, 256 * 1024, 2 * protocol.MAX_HANDED_FILES, socket.MSG_CMSG_CLOEXEC
                )
                self._descriptors.extend(descriptors)
            except TimeoutError as error:
                raise DaemonUnreachable(
                    f"{self.path}: the daemon said nothing for {deadline:g} s; its log may say why"
                ) from error
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
