"""The requests that a client may make, and the meaning of answers: the part of the clients that has no socket. Pure.

A Call is one request with the type of its result and the silence after which the daemon counts as gone. ``outcome``
says what a message means for a Call. ``client.py`` (blocking) and ``async_client.py`` (trio, asyncio) send and wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from instantstart_fs.control import protocol, specification
from instantstart_fs.core.coldstart import ColdStart, Moment
from instantstart_fs.core.humanize import pipeline_meant
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.status import OriginCheck, PipelineStatus
from instantstart_fs.errors import (
    ControlProtocolError,
    DaemonUnreachable,
    InstantStartError,
    PermissionRefused,
    PipelineNotFound,
    UsageError,
    WaitDeadline,
)

_T = TypeVar("_T")
CONNECT_DEADLINE = 20.0
"""Seconds to be accepted. A client waits only while the backlog is full, because hundreds came at the same moment."""
ANSWER_DEADLINE = 50.0
"""Seconds for an answer that comes from memory: a loaded daemon is not a dead one."""
CHECK_DEADLINE = 120.0
"""Seconds for ``check_origins``. The daemon takes 25 s at most, after the checks of others who asked before."""
NAMES_DEADLINE = 2.0
"""Seconds for the names that may have been meant: an error message waits for them."""
RESOLVE_DEADLINE = 660.0
"""Seconds for what lists an origin or deletes bytes; the daemon's own limit is a minute shorter."""


class Call(NamedTuple, Generic[_T]):
    """One request. ``read`` makes the result of the answer; ``deadline`` is the seconds of silence that are allowed,
    however long the whole takes."""

    request: protocol.Request
    read: Callable[[Any], _T]
    deadline: float = ANSWER_DEADLINE


class Finished(NamedTuple, Generic[_T]):
    value: _T


class Refused(NamedTuple):
    """The daemon refused the request. The connection stays usable."""

    error: InstantStartError


def outcome(call: Call[_T], message: protocol.Response) -> Finished[_T] | Refused | protocol.Progress:
    """Return what ``message`` means for ``call``. Raises ControlProtocolError."""
    match message:
        case protocol.Progress():
            return message
        case protocol.Done(result):
            return Finished(call.read(result))
        case protocol.Failed():
            return Refused(message.error())
        case _:
            raise ControlProtocolError("the daemon answered something else; use the same release of both")


def wanted(call: Call[Any]) -> str:
    """Return the pipeline that the request names, "" for none."""
    return getattr(call.request, "pipeline", "")


def with_advice(error: PipelineNotFound, pipeline: str, known: Sequence[str]) -> PipelineNotFound:
    """Return the error with the name that may have been meant, of those that this user may see."""
    meant = pipeline_meant(pipeline, sorted(known))
    first, semicolon, rest = error.message.partition(";")
    return PipelineNotFound(f"{first}{meant}{semicolon}{rest}") if meant else error


def beginning(pipeline: str) -> str:
    """Return what the id that may have been meant begins with, since the daemon tells only so many names at once."""
    return pipeline.rstrip("/").rpartition("/")[2][:2]


def silence(deadline: float, end: float | None, now: float) -> float:
    """Return the seconds to wait for the next message. ``end`` is that of the caller's own time-out. Raises
    WaitDeadline."""
    if end is None:
        return deadline
    if end <= now:
        raise expired()
    return min(deadline, end - now)


def expired() -> WaitDeadline:
    return WaitDeadline("the time-out of this wait has passed; what was waited for goes on in the daemon")


def unreachable(path: str, error: OSError, deadline: float) -> DaemonUnreachable | PermissionRefused:
    """Return why nobody could be connected to at ``path`` within ``deadline`` seconds."""
    if isinstance(error, PermissionError):
        return PermissionRefused(f"{path}: this user may not talk to the daemon; ask as its owner (sudo)")
    if isinstance(error, FileNotFoundError):
        reason = "no daemon listens there"
    elif isinstance(error, ConnectionRefusedError):
        reason = "the daemon that listened there is gone"
    elif isinstance(error, TimeoutError):
        return DaemonUnreachable(
            f"{path}: the daemon is busy, it accepted nobody else within {deadline:g} s; try again, and look "
            "into its log (`journalctl -u instantstart`) if it stays so"
        )
    else:
        reason = error.strerror or str(error)
    return DaemonUnreachable(
        f"{path}: {reason}; start one (`systemctl start instantstart`, or `instantstart start`) "
        "or name its socket with --socket"
    )


def silent(path: str, deadline: float) -> DaemonUnreachable:
    return DaemonUnreachable(f"{path}: the daemon said nothing for {deadline:g} s; its log may say why")


def ended(path: str) -> DaemonUnreachable:
    return DaemonUnreachable(f"{path}: the daemon ended before it answered; its log says why")


def broken(path: str, error: OSError) -> DaemonUnreachable:
    return DaemonUnreachable(f"{path}: {error.strerror or error}")


# -- the verbs ---------------------------------------------------------------------------------------------------------


def as_kind(kind: type[_T]) -> Callable[[Any], _T]:
    """Reads a result as ``kind``, or raises ControlProtocolError."""

    def read(value: Any) -> _T:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ControlProtocolError(f"the daemon's answer is not understood: {error}") from error

    return read


def progress_status(message: protocol.Progress) -> PipelineStatus:
    return as_kind(PipelineStatus)(message.status)


_nothing = as_kind(type(None))
_status = as_kind(PipelineStatus)


def _held_by(value: Any) -> list[str]:
    return [] if value is None else as_kind(list[str])(value)


def ping() -> Call[protocol.DaemonInfo]:
    return Call(protocol.Ping(), as_kind(protocol.DaemonInfo))


def add(
    pipeline: str | PipelineSpec, source: str | None, options: specification.Options, warm: bool
) -> Call[PipelineStatus]:
    """Return the request to add a pipeline. Raises UsageError, InvalidName, InvalidSource, ConfigError."""
    if isinstance(pipeline, PipelineSpec):
        if source is not None or options:
            raise UsageError(f"{pipeline.id}: a PipelineSpec holds its source and options")
        spec = pipeline
    else:
        spec = specification.of_options(pipeline, source, options)
    return Call(protocol.Add(spec, warm), _status, RESOLVE_DEADLINE)


def update(pipeline: str) -> Call[PipelineStatus]:
    return Call(protocol.Update(pipeline), _status, RESOLVE_DEADLINE)


def remove(pipeline: str, force: bool) -> Call[list[str]]:
    return Call(protocol.Remove(pipeline, force), _held_by, RESOLVE_DEADLINE)


def evict(pipeline: str, force: bool) -> Call[list[str]]:
    return Call(protocol.Evict(pipeline, force), _held_by, RESOLVE_DEADLINE)


def set_pinned(pipeline: str, pinned: bool) -> Call[None]:
    return Call(protocol.Pin(pipeline, pinned), _nothing)


def touch(pipeline: str) -> Call[None]:
    return Call(protocol.Touch(pipeline), _nothing)


def mark(pipeline: str, moment: Moment, at_ns: int | None) -> Call[None]:
    return Call(protocol.Mark(pipeline, moment, at_ns), _nothing)


def startup_caches(pipeline: str) -> Call[list[StartupRecord]]:
    return Call(protocol.StartupCaches(pipeline), as_kind(list[StartupRecord]))


def startup_verify(pipeline: str) -> Call[protocol.StartupVerified]:
    return Call(protocol.StartupVerify(pipeline), as_kind(protocol.StartupVerified), RESOLVE_DEADLINE)


def startup_remove(pipeline: str, numbers: Sequence[int]) -> Call[int]:
    return Call(protocol.StartupRemove(pipeline, tuple(numbers)), as_kind(int))


def cold_starts(pipeline: str) -> Call[list[ColdStart]]:
    return Call(protocol.ColdStarts(pipeline), as_kind(list[ColdStart]))


def pipelines() -> Call[list[PipelineStatus]]:
    return Call(protocol.Ls(), as_kind(list[PipelineStatus]))


def region_state(pipeline: str, check: bool) -> Call[protocol.RegionState]:
    return Call(protocol.AskRegion(pipeline, check), as_kind(protocol.RegionState))


def names(prefix: str, deadline: float) -> Call[list[str]]:
    return Call(protocol.Names(prefix), as_kind(list[str]), deadline)


def specs() -> Call[list[PipelineSpec]]:
    return Call(protocol.Specs(), as_kind(list[PipelineSpec]))


def status(pipeline: str, brief: bool) -> Call[PipelineStatus]:
    return Call(protocol.Status(pipeline, brief), _status)


def warm(pipeline: str, everything: bool, wait: bool) -> Call[PipelineStatus]:
    return Call(protocol.Warm(pipeline, everything, wait=wait), _status)


def include(pipeline: str, globs: Sequence[str]) -> Call[None]:
    return Call(protocol.Include(pipeline, tuple(globs)), _nothing)


def check_access(pipeline: str, token_file: str | None) -> Call[list[str]]:
    return Call(protocol.Access(pipeline, token_file), as_kind(list[str]), RESOLVE_DEADLINE)


def check_origins() -> Call[list[OriginCheck]]:
    return Call(protocol.CheckOrigins(), as_kind(list[OriginCheck]), CHECK_DEADLINE)


def verify(pipeline: str, rate: float | None) -> Call[protocol.VerifyResult]:
    return Call(protocol.Verify(pipeline, rate), as_kind(protocol.VerifyResult))


def lease(pipeline: str) -> Call[None]:
    return Call(protocol.Lease(pipeline), _nothing)


def open_weights(pipeline: str, deadlines: Mapping[str, float] | None, stream: bool) -> Call[None]:
    """Return the request to open a pipeline's weights. Raises UsageError for a deadline that is no number."""
    # JSON knows no infinity, and a model without a deadline comes last anyway.
    wanted_at = {model: seconds for model, seconds in (deadlines or {}).items() if seconds != math.inf}
    for model, seconds in wanted_at.items():
        if not math.isfinite(seconds):
            raise UsageError(f"{pipeline}: the deadline of {model!r} is {seconds:g}")
    return Call(protocol.Open(pipeline, wanted_at, stream), _nothing)
