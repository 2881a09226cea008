"""Runs commands that last: `warm --wait`, `verify` and `fsck` with their progress, and `lease` with its command."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from instantstart_fs.cli.progress import Bar, fits
from instantstart_fs.cli.show import percent, rate_line
from instantstart_fs.cli.show import progress as fetched
from instantstart_fs.control.client import Client, Lease
from instantstart_fs.control.protocol import RegionState
from instantstart_fs.core.humanize import human_bytes, reason_first
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import InstantStartError, printable

if TYPE_CHECKING:
    from instantstart_fs.upkeep.fsck import FsckProgress

LINE_SECONDS = 5.0
"""Without a terminal, a line is printed at each tenth, and after so many seconds at the latest."""
WRITTEN_SECONDS = 0.3
"""Seconds between two questions how far write-back is."""
LEASE_RETRY = 0.5
"""Seconds between two tries to get a lease back."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def wait_warm(client: Client, pipeline: str, everything: bool, *, quiet: bool) -> PipelineStatus:
    """Wait with a bar on a terminal and lines elsewhere (``quiet``: neither). Ctrl-C ends waiting, not the fill."""
    started = time.monotonic()
    first: list[PipelineStatus] = []

    def seen(status: PipelineStatus) -> None:
        if not first:
            first.append(status)

    try:
        with _reporter(pipeline, quiet) as report:

            def progress(status: PipelineStatus) -> None:
                seen(status)
                report(fetched(status), status.total_bytes, status)

            status = client.wait_warm(pipeline, everything=everything, progress=progress)
    except KeyboardInterrupt:
        print(
            f"instantstart: no longer waiting; the fill of {pipeline} goes on (`instantstart status {pipeline}`)",
            file=sys.stderr,
        )
        raise
    if not quiet:
        print(_summary(status, first[0] if first else None, time.monotonic() - started))
    return status


def _summary(status: PipelineStatus, first: PipelineStatus | None, seconds: float) -> str:
    if first is None:
        return f"{status.pipeline}: {status.state} already, {human_bytes(status.cached_bytes)}"
    fetched = max(0, status.cached_bytes - first.cached_bytes)
    rate = f"{human_bytes(fetched / max(seconds, 0.001))}/s"
    return (
        f"{status.pipeline}: {status.state}, {human_bytes(status.cached_bytes)}; "
        f"fetched {human_bytes(fetched)} in {seconds:.1f} s ({rate})"
    )


@contextmanager
def verify_progress(pipeline: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    with _reporter(pipeline, quiet) as report:
        yield lambda done, total: report(done, total, None)


def wait_written(client: Client, pipeline: str, report: Callable[[int, int], None]) -> RegionState:
    """Wait until this host has written to the regional tier what it can. Returns what the tier has then. There is no
    deadline but progress: chunks that cannot be written are given up by the daemon."""
    most = 0
    while True:
        state = client.region_state(pipeline)
        most = max(most, state.owed_bytes)
        report(most - state.owed_bytes, most)
        if not state.owed_bytes and not state.unsealed:
            return client.region_state(pipeline, check=True)
        time.sleep(WRITTEN_SECONDS)


@contextmanager
def fsck_progress(*, quiet: bool) -> Iterator[Callable[[FsckProgress], None]]:
    """A line on stderr per pipeline and every LINE_SECONDS."""
    shown = [("", -LINE_SECONDS)]

    def report(progress: FsckProgress) -> None:
        pipeline, at = shown[-1]
        now = time.monotonic()
        if not quiet and (pipeline != progress.pipeline or now >= at + LINE_SECONDS):
            shown[-1] = (progress.pipeline, now)
            hashed = f", {human_bytes(progress.bytes)} hashed" if progress.bytes else ""
            print(f"{progress.pipeline}: {progress.files} of {progress.total_files} files{hashed}", file=sys.stderr)

    yield report


Report = Callable[[int, int, PipelineStatus | None], None]


@contextmanager
def _reporter(pipeline: str, quiet: bool) -> Iterator[Report]:
    if quiet:
        yield lambda done, total, status: None
    elif fits(sys.stderr):
        with Bar(pipeline) as bar:
            yield lambda done, total, status: bar.report(done, total, _rate(status), _reason(status))
    else:
        yield _Lines(pipeline).report


def _rate(status: PipelineStatus | None) -> str:
    return rate_line(status) if status is not None else ""


def _reason(status: PipelineStatus | None) -> str:
    if status is None or status.error is None:
        return ""
    return printable(reason_first(status.error.message, status.pipeline))


class _Lines:
    """Progress for logs: plain lines on stderr."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._tenth = -1
        self._at = -LINE_SECONDS

    def report(self, done: int, total: int, status: PipelineStatus | None) -> None:
        share = percent(status) if status is not None else (done * 100 // total if total else 0)
        now = time.monotonic()
        if share // 10 <= self._tenth and now < self._at + LINE_SECONDS:
            return
        self._tenth, self._at = max(self._tenth, share // 10), now
        line = f"{self._pipeline}: {share} %, {human_bytes(done)} of {human_bytes(total)}"
        if status is not None:
            line += f", {_rate(status)}" if _rate(status) else ""
            line += f"; {_reason(status)}" if status.error is not None else ""
        print(line, file=sys.stderr, flush=True)


def _keep_leased(client: Client, held: Lease) -> None:
    """A lease ends with its connection, and a restart of the daemon ends that, but not the command: take it again. Ends
    with the process."""
    while True:
        held.wait_disconnected()
        while True:
            time.sleep(LEASE_RETRY)
            try:
                held = client.lease(held.pipeline)
                break
            except InstantStartError:
                continue  # not back yet; or the pipeline is gone, and may come back


def run_leased(client: Client, pipeline: str, command: list[str]) -> int:
    """Run the command under a lease; its exit status, 128 + N when signal N ended it, 127 when there is no such."""
    held = client.lease(pipeline)
    threading.Thread(target=_keep_leased, args=(client, held), name="lease", daemon=True).start()
    before = {number: signal.getsignal(number) for number in FORWARDED}
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif number != signal.SIGINT or not sys.stdin.isatty():
            # At a terminal, Ctrl-C reaches the whole foreground group by itself: the command must not get it twice.
            child.send_signal(number)

    try:
        for number in FORWARDED:
            signal.signal(number, forward)
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            print(f"instantstart: {command[0]}: {error.strerror or error}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
        for missed in early:
            child.send_signal(missed)
        status = child.wait()
        return status if status >= 0 else 128 - status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
