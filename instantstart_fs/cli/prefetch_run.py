"""Runs `instantstart prefetch`, and asks a process that holds weights for its status or for their release.

The commands' arguments are in ``commands/prefetch.py``; how weights are staged is the package ``prefetch``.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgspec

from instantstart_fs.cli.progress import Bar, fits
from instantstart_fs.cli.show import table as columns
from instantstart_fs.core.humanize import human_bytes, human_seconds
from instantstart_fs.core.limits import MAX_SECONDS
from instantstart_fs.errors import DaemonUnreachable, InstantStartError, UsageError
from instantstart_fs.prefetch import DeviceReport, LeaseSource, Stage
from instantstart_fs.prefetch.hold_client import HoldClient
from instantstart_fs.prefetch.hold_protocol import HoldStatus, held_pipelines, hold_socket
from instantstart_fs.prefetch.holder import Holder
from instantstart_fs.prefetch.start import every_device, start_stage, why_no_gpu

LINE_SECONDS = 5.0
FREEING_SECONDS = 20.0
"""Seconds in which one device's worker ends, killed if need be, and the interpreter around it."""
FREEING_RATE = 1e9
"""Bytes a second that are freed at least: an idle core gives back pages of 4 KiB several times as fast."""


def devices_of(given: str) -> tuple[str, ...]:
    """Return the devices. ``auto``: every CUDA device, else the CPU; otherwise a list with commas. Raises UsageError,
    PrefetchError."""
    if given != "auto":
        found = tuple(word.strip() for word in given.split(",") if word.strip())
        if not found:
            raise UsageError("--devices: names none")
        return found
    return every_device()


def deadlines_of(given: Sequence[str]) -> dict[str, float]:
    """MODEL=SECONDS, each; ``inf`` comes last. Raises UsageError."""
    found = {}
    for word in given:
        model, equals, seconds = word.rpartition("=")
        try:
            found[model] = float(seconds)
        except ValueError:
            equals = ""
        if not equals or not (found[model] == math.inf or abs(found[model]) < MAX_SECONDS):
            raise UsageError(f"--deadline: {word!r} is not MODEL=SECONDS")
    return found


def run(
    pipeline: str,
    *,
    devices: str,
    tensor_parallel: int | None,
    backend: str,
    readers: int,
    deadlines: Sequence[str],
    what_fits: bool,
    hold: bool,
    timeout: float,
    socket: str | None,
    quiet: bool,
    on_staged: Callable[[Stage], None],
) -> None:
    """Stage; ``on_staged`` once all is in place; hold if asked to."""
    if devices == "auto":
        _say(quiet, f"{pipeline}: importing torch, to find the GPUs …")
    wanted = devices_of(devices)
    if devices == "auto" and wanted == ("cpu",) and (why := why_no_gpu()):
        print(f"instantstart: {pipeline}: staged to the CPU, for torch finds no GPU: {why}", file=sys.stderr)
    path = hold_socket(pipeline) if hold else ""
    wanted_at = deadlines_of(deadlines)
    with _terminated():
        source = LeaseSource(pipeline, socket, deadlines=wanted_at)
        _say(quiet, f"{pipeline}: starting a worker for each of {', '.join(wanted)} (each imports torch) …")
        with start_stage(
            source,
            wanted,
            tensor_parallel=tensor_parallel,
            backend=backend,
            readers=readers,
            deadlines=wanted_at,
            what_fits=what_fits,
        ) as stage:
            for report in stage.progress():
                for name, reason in report.refusals:
                    print(f"instantstart: {report.device}: backend {name} refused: {reason}", file=sys.stderr)
            for model in stage.refused_models:
                print(f"instantstart: {pipeline}: model {model or '(unnamed)'} does not fit", file=sys.stderr)
            if not hold:
                _watch(stage, None, quiet)
                on_staged(stage)
                return
            with Holder(stage, path, timeout or None, ranks=tensor_parallel or len(wanted)) as holder:
                _watch(stage, holder, quiet)
                if stage.done:  # engines may have taken all of it by then, which ends the hold too
                    on_staged(stage)
                if not holder.over:
                    _keep(pipeline, stage, source, holder)
                print(f"{pipeline}: {holder.over}")


def _say(quiet: bool, text: str) -> None:
    """Print a line for the user: importing torch takes seconds in which nothing else can be shown."""
    if not quiet and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _keep(pipeline: str, stage: Stage, source: LeaseSource, holder: Holder) -> None:
    """Keep the memory until the hold is released, or the lease ends (an error)."""
    left = holder.seconds_left
    limit = f" for {human_seconds(left)}" if left is not None else ""
    print(f"{pipeline}: held{limit}; `instantstart prefetch release {pipeline}` ends it", flush=True)
    while not holder.wait_released(0.2):
        if stage.error is not None:
            raise stage.error
        if holder.over:
            return
        if source.wait_ended(0.05):
            raise DaemonUnreachable(f"{pipeline}: the lease has ended with its daemon; the weights are released")


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: workers and memory are taken down on the way out."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(stage: Stage, holder: Holder | None, quiet: bool) -> None:
    """Show progress until all is in place, or its hold is over."""
    changes = _changes(stage, holder)
    if quiet:
        for _ in changes:
            pass
    elif fits(sys.stderr):
        _bar(stage, changes)
    else:
        _lines(stage, changes)
    if holder is None or not holder.over:
        stage.wait(10)


def _changes(stage: Stage, holder: Holder | None) -> Iterator[None]:
    while not stage.done and not (holder is not None and holder.over):
        stage.wait_changed(0.2)
        yield


def _bar(stage: Stage, changes: Iterator[None]) -> None:
    """Draw one bar for all devices, and below it each device's share."""
    started = time.monotonic()
    with Bar(stage.plan.pipeline) as bar:
        for _ in changes:
            reports = stage.progress()
            done = sum(report.bytes for report in reports)
            rate = f"{human_bytes(done / max(time.monotonic() - started, 0.001))}/s"
            shares = [f"{report.device} {report.bytes * 100 // max(report.total, 1)} %" for report in reports]
            bar.report(done, sum(report.total for report in reports), rate, "  ".join(shares))


def _lines(stage: Stage, changes: Iterator[None]) -> None:
    at = time.monotonic()
    for _ in changes:
        if time.monotonic() >= at + LINE_SECONDS:
            at = time.monotonic()
            for report in stage.progress():
                print(f"{report.device}: {human_bytes(report.bytes)} of {human_bytes(report.total)}", file=sys.stderr)


def table(stage: Stage) -> str:
    """Return what was done: a line for each device, one for each model if there are several, and how files were
    spread."""
    reports = stage.progress()
    header = ("device", "backend", "bytes", "seconds", "GB/s", "page cache", "disk")
    lines = [columns(header, [_row(report) for report in reports])]
    total = human_bytes(sum(report.bytes for report in reports))
    lines.append(f"{stage.plan.pipeline}: {total}, {stage.plan.how}")
    ready = stage.ready_seconds()
    if len(ready) > 1:
        lines += [f"  {model or '(unnamed)'} ready after {seconds:.2f} s" for model, seconds in sorted(ready.items())]
    return "\n".join(lines)


def _row(report: DeviceReport) -> tuple[str, ...]:
    """Rates are of loading alone: starting the worker is in the seconds."""
    rate = report.bytes / report.loading / 1e9 if report.loading > 0 else 0.0
    return (
        report.device,
        report.backend,
        human_bytes(report.bytes),
        f"{report.seconds:.2f}",
        f"{rate:.2f}",
        human_bytes(report.cached),
        human_bytes(report.disk),
    )


def hold_status(pipeline: str) -> HoldStatus:
    with HoldClient(pipeline) as client:
        return client.status()


def plain(found: HoldStatus) -> dict[str, Any]:
    """Its fields, less the tag of the protocol."""
    fields: dict[str, Any] = msgspec.to_builtins(found)
    return {name: value for name, value in fields.items() if name != "type"}


def hold_statuses() -> tuple[list[HoldStatus], list[InstantStartError]]:
    """Return the status of everything that this user holds, by id, and the errors of the holders that did not
    answer."""
    found, errors = [], []
    for pipeline in held_pipelines():
        try:
            found.append(hold_status(pipeline))
        except InstantStartError as error:
            errors.append(error)
    return found, errors


def release(pipeline: str) -> None:
    """End a hold, and wait until its process has ended and freed its memory. Raises PrefetchError."""
    with HoldClient(pipeline) as client:
        held = client.status()
        client.release()
        held_bytes = sum(device.bytes for device in held.devices)
        client.wait_ended(FREEING_SECONDS * len(held.devices) + held_bytes / FREEING_RATE)


def show_hold(found: HoldStatus) -> str:
    left = "no time limit" if found.seconds_left is None else f"{human_seconds(found.seconds_left)} left"
    heading = f"{found.pipeline}: generation {found.generation}, {found.files} files held by pid {found.pid}, {left}"
    rows = [
        (held.device, held.backend, f"{human_bytes(held.bytes)} of {human_bytes(held.total)}") for held in found.devices
    ]
    held = columns(("device", "backend", "in place"), rows)
    return "\n".join([heading, *(f"  {line}" for line in held.splitlines())])
