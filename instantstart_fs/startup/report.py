"""Reports where the time of a start went, for people (a table) and for scripts (a JSON file)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import stat
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from instantstart_fs.control.client import Client
from instantstart_fs.core.coldstart import MEANINGS, ColdStart, as_plain, attack, length, phases
from instantstart_fs.core.humanize import human_bytes, number_of
from instantstart_fs.core.humanize import precise_seconds as seconds
from instantstart_fs.errors import printable

if TYPE_CHECKING:
    from instantstart_fs.startup.start import Start

STREAM_SECONDS = 5.0
"""Seconds in which who reads a FIFO has to take the report: the command may have ended, and `run` ends after it."""
SHOWN_FIELDS = 4
"""How many of the fields are shown in which the nearest startup cache differs."""


def record_of(socket: str, pipeline: str, start: str) -> ColdStart | None:
    """Return the daemon's record of this start. Raises ControlError."""
    with Client(socket) as client:
        return next((record for record in client.cold_starts(pipeline) if record.start == start), None)


def cache_line(start: Start) -> str:
    """Return what became of the startup cache, in one line."""
    record: Any = start.restored
    if record is not None:
        compiled = f" (compiled by {printable(str(record['host']))})" if record.get("host") else ""
        return (
            f"startup cache {record['number']} restored{compiled}: {number_of(record['files'], 'file')}, "
            f"{human_bytes(record['size'])} in {seconds(start.restore_seconds)}"
        )
    fields = ", ".join(start.differs[:SHOWN_FIELDS]) + (", …" if len(start.differs) > SHOWN_FIELDS else "")
    return {
        "first": "no startup cache yet: this start compiles what later ones restore",
        "mismatch": f"no startup cache of this kind: {fields} {'differ' if len(start.differs) > 1 else 'differs'} from "
        f"the nearest; `instantstart startup-cache explain {start.pipeline}` says how",
        "damaged": "the startup cache was damaged: a normal cold start",
        "failed": "the startup cache could not be put in place: a normal cold start",
        "not-owner": "no startup cache: they are for the pipeline's owner alone, and this process is another user's",
        "off": "no startup cache was asked for",
    }.get(start.outcome, start.outcome)


def lines(start: Start, moments: Mapping[str, int], engine: Mapping[str, float], record: ColdStart | None) -> list[str]:
    """A heading, a line for each phase, and which one to attack."""
    last = "first-token" if "first-token" in moments else "ready"
    whole = (moments[last] - start.began_ns) / 1e9
    found = [f"{'first token' if last == 'first-token' else 'ready'} after {seconds(whole)}; {cache_line(start)}"]
    if record is None:
        return found
    for phase in phases(record):
        share = round(100 * phase.seconds / max(length(record), 1e-9))
        found.append(f"  {phase.name:<12} {seconds(phase.seconds):>9} {share:>3} %  {MEANINGS[phase.name]}")
    if advice := attack([_ended(record)]):
        found.append(f"  {advice}")
    return found


def _ended(record: ColdStart) -> ColdStart:
    import msgspec

    return msgspec.structs.replace(record, ended_after=record.ended_after or 0.0, interrupted=False)


def write(
    start: Start,
    moments: Mapping[str, int],
    engine: Mapping[str, float],
    record: ColdStart | None,
    path: str,
    *,
    status: int | None = None,
    why: str = "",
) -> None:
    """Write the report for scripts. ``status`` of a command that has ended, ``why`` it is no start that succeeded.
    Raises OSError."""
    found = {
        "pipeline": start.pipeline,
        "start": start.identity,
        "seconds": {name: round((at - start.began_ns) / 1e9, 3) for name, at in moments.items()},
        "command_after": round(start.spawned - start.began, 6) if start.spawned else None,
        "status": status,
        "failed": why or None,
        "startup_cache": {
            "outcome": start.outcome,
            "number": start.restored["number"] if start.restored is not None else None,
            "differs": list(start.differs),
            "restore_seconds": round(start.restore_seconds, 6),
        },
        "engine": dict(engine),
        "record": as_plain(record) if record is not None else None,
    }
    _put(path, json.dumps(found, indent=2) + "\n")


def _put(path: str, text: str) -> None:
    """Whole or not at all; what is no file (a FIFO, /dev/stdout) is written to and stays. Raises OSError."""
    if not path.startswith(("/dev/", "/proc/")):
        path = os.path.realpath(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        _stream(path, text.encode())
        return
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _stream(path: str, data: bytes) -> None:
    """Write to what somebody reads, or nobody. Raises OSError, at STREAM_SECONDS, too."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads it") from error
        raise
    writable = select.poll()
    writable.register(fd, select.POLLOUT)
    taken, end = 0, time.monotonic() + STREAM_SECONDS
    try:
        while taken < len(data):
            left = end - time.monotonic()
            if left <= 0 or not writable.poll(left * 1000):  # a pipe holds 64 KiB
                raise OSError(errno.ETIMEDOUT, f"its reader took {taken} of {len(data)} bytes in {STREAM_SECONDS:g} s")
            with contextlib.suppress(BlockingIOError):  # between none and all that is left of it is free
                taken += os.write(fd, data[taken : taken + select.PIPE_BUF])
    finally:
        os.close(fd)
