"""Draws cold starts for `explain`: phases as bars on one scale, coloured on a terminal and plain elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from instantstart_fs.cli.show import human_time, table
from instantstart_fs.core.coldstart import (
    MEANINGS,
    MOMENTS,
    PHASES,
    ColdStart,
    Moment,
    attack,
    late,
    phases,
    scale,
    spreads,
)
from instantstart_fs.core.humanize import did_you_mean, human_bytes, human_seconds
from instantstart_fs.core.humanize import precise_seconds as seconds
from instantstart_fs.errors import UsageError, printable

WIDTH = 44
"""Characters that the longest bar takes; with the labels it fits 100 columns."""
_LOOKS = {
    "scheduling": ("░", "bright_black"),
    "fetching": ("▒", "yellow"),
    "loading": ("█", "green"),
    "restore": ("░", "cyan"),
    "import": ("░", "white"),
    "compile": ("▓", "red"),
    "capture": ("▓", "bright_blue"),
    "warm-up": ("▓", "cyan"),
    "engine": ("▓", "blue"),
    "first-token": ("■", "magenta"),
}


def parse_moment(word: str) -> Moment:
    """Raises UsageError."""
    for moment in MOMENTS:
        if word == moment:
            return moment
    raise UsageError(f"{word!r} is none of {', '.join(MOMENTS)}{did_you_mean(word, MOMENTS)}")


def draw(pipeline: str, records: Sequence[ColdStart]) -> None:
    """Print the records, newest first."""
    if not records:
        print(f"{pipeline}: no cold start seen yet")
        print("  one begins with `run`, or with the first open of a weight file")
        return
    from rich.console import Console
    from rich.text import Text

    # Plain text off a terminal, as wide as it is: rich would cut lines at 80 columns there.
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    console = Console(
        width=None if sys.stdout.isatty() else 200, highlight=False, no_color=not coloured, soft_wrap=True
    )
    longest = scale(records)
    used = set()
    for record in records:
        console.print(Text(_title(record), style="bold"))
        for phase in (found := phases(record)):
            used.add(phase.name)
            sign, colour = _LOOKS[phase.name]
            offset = min(round((phase.start - found[0].start) / longest * WIDTH), WIDTH - 1)
            length = max(1, round(phase.seconds / longest * WIDTH))
            bar = Text(f"  {phase.name:<12}{' ' * offset}")
            bar.append(sign * min(length, WIDTH - offset), style=colour)
            bar.append(f"{' …' if offset + length > WIDTH + 1 else ''} {seconds(phase.seconds)}")
            console.print(bar)
        for line in details(record):
            console.print(Text(f"  {line}"))
        console.print()
    for name, meaning in MEANINGS.items():
        if name in used:
            console.print(Text(f"{_LOOKS[name][0]} {name:<12} {meaning}", style="dim"))


def draw_spreads(records: Sequence[ColdStart]) -> None:
    """Print how long each phase takes, over all records that are kept, and which one to attack. Prints nothing for a
    single record."""
    found = spreads(records)
    total = found.pop("total", None)
    if total is None or total.count < 2:
        return
    rows = [("whole start", total), *((name, found[name]) for name in PHASES if name in found)]
    texts = [(name, str(at.count), seconds(at.p50), seconds(at.p95), seconds(at.p99)) for name, at in rows]
    print(f"\n{table(('phase', 'starts', 'p50', 'p95', 'p99'), texts)}")
    if advice := attack(records):
        print(advice)


def _title(record: ColdStart) -> str:
    started = datetime.fromtimestamp(record.started_ns / 1e9, UTC).isoformat()
    found = phases(record)
    whole = f", {seconds(found[-1].end - found[0].start)}" if found else ""
    ended = " (running)" if record.live else " (the daemon ended meanwhile)" if record.interrupted else ""
    return f"{human_time(started)}: from {record.state}{whole}{ended}"


def details(record: ColdStart) -> list[str]:
    """The figures under a bar."""
    had = f"had {human_bytes(record.cached_bytes)} of {human_bytes(record.total_bytes)}"
    moved = (
        [f"fetched {human_bytes(record.fetched_bytes)}"]
        if record.fetched_bytes
        else ["fetched nothing"]
        if not record.uncached_bytes
        else []
    )
    for name, count in (
        ("straight from the origin and not kept (uncached)", record.uncached_bytes),
        ("staged", record.staged_bytes),
        ("read by the kernel itself, up to", record.passthrough_bytes),
        ("read through the daemon", record.daemon_bytes),
    ):
        if count:
            moved.append(f"{name} {human_bytes(count)}")
    lines = [f"{had}; {', '.join(moved)}"]
    times = [f"{record.opened_files} of {record.weight_files} weight files opened"]
    for name, after in (
        ("last sealed", record.sealed_after),
        ("last staged", record.staged_after),
        ("last opened", record.opened_after),
    ):
        if after is not None:
            times.append(f"{name} at {seconds(after)}")
    lines.append(", ".join(times))
    if record.waits:
        file = printable(record.slowest_file or "")
        slowest = f"slowest {seconds(record.slowest_wait)} ({file})"
        failed = f", {record.errors} failed" if record.errors else ""
        waited = f" for {seconds(record.waited_seconds)} in all" if record.waited_seconds else ""
        lines.append(f"{record.waits} reads waited for the origin{waited}, {slowest}{failed}")
    lines += [late_line(record, moment, after) for moment, after in late(record).items()]
    return lines


def late_line(record: ColdStart, moment: Moment, after: float) -> str:
    """Return what to think of a mark that came ``after`` so many seconds of nothing, and what to do about it."""
    return (
        f"{moment} came {human_seconds(after)} after what went before it; if it was told late, "
        f"`instantstart mark {record.pipeline} {moment} --at TIME` says when it was"
    )


def marked(records: Sequence[ColdStart], moment: Moment) -> str:
    """Return what `mark` says of the record that took it: "" when nothing is odd."""
    taken = [record for record in records if record.after(moment) is not None]
    record = max(taken, key=lambda found: _at(found, moment), default=None)
    if record is None or moment not in (found := late(record)):
        return ""
    started = human_time(datetime.fromtimestamp(record.started_ns / 1e9, UTC).isoformat())
    return f"{record.pipeline}: counted for the cold start of {started}; {late_line(record, moment, found[moment])}"


def _at(record: ColdStart, moment: Moment) -> float:
    return record.started_ns / 1e9 + (record.after(moment) or 0.0)
