"""Formats what commands print: sizes, times and tables for people, JSON for programs. Asks and changes nothing."""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from instantstart_fs.cli.terminal import escaped, unicode_capable
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.humanize import human_bytes, human_seconds, pipeline_meant, reason_first
from instantstart_fs.core.status import FileStatus, PipelineStatus, SkippedStatus, TierStatus
from instantstart_fs.errors import PipelineNotFound, printable

_COLOURS = {
    "warm": "32",
    "sealed": "32",
    "unverified": "36",
    "filling": "33",
    "partial": "33",
    "cold": "34",
    "absent": "34",
    "error": "31",
    "poisoned": "31",
    "ok": "32",
    "warn": "33",
    "fail": "31",
}
MAX_FILES = 40
"""Lines of files that `status` shows; --json has them all."""


def coloured(word: str, text: str | None = None) -> str:
    """``text`` (default: the word) in the colour of a state, on terminals that want colours."""
    shown = word if text is None else text
    if word not in _COLOURS or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return shown
    return f"\x1b[{_COLOURS[word]}m{shown}\x1b[0m"


def human_time(value: str | None, now: datetime | None = None) -> str:
    """An RFC 3339 time with how long ago, or ahead, it is."""
    if value is None:
        return "never"
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value
    distance = ((now or datetime.now(UTC)) - moment).total_seconds()
    local = moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{local} ({human_seconds(distance)} ago)" if distance >= 0 else f"{local} (in {human_seconds(-distance)})"


def progress(status: PipelineStatus) -> int:
    """Return the cached bytes and those that came of chunks that are not whole yet."""
    return status.cached_bytes + (status.fill.received_bytes if status.fill is not None else 0)


def percent(status: PipelineStatus) -> int:
    """Return the percentage of the bytes, including those on their way. It is 100 only when all are there."""
    if status.total_bytes <= 0:
        return 100 if status.state in ("warm", "unverified") else 0
    if status.cached_bytes >= status.total_bytes:
        return 100
    return min(99, progress(status) * 100 // status.total_bytes)


def bar(share: int, width: int = 30) -> str:
    filled = width * share // 100
    return "█" * filled + "░" * (width - filled)


def rate_line(status: PipelineStatus) -> str:
    """Rate and ETA of a fill, "" when nothing runs."""
    if status.fill is None:
        return ""
    rate = f"{human_bytes(status.fill.bytes_per_second)}/s"
    return rate if status.fill.eta_seconds is None else f"{rate}, {human_seconds(status.fill.eta_seconds)} left"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None) -> str:
    """Columns two spaces apart; no trailing blanks."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str], colour: bool) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[-1] = padded[-1].rstrip()
        if colour and state_column is not None:
            padded[state_column] = coloured(cells[state_column], padded[state_column])
        return "  ".join(padded).rstrip()

    return "\n".join([line(header, False), *(line(row, True) for row in rows)])


def still_open(held: Sequence[str]) -> str:
    """Say who still has files open of what was removed or evicted."""
    return f"still open  by {printable(', '.join(held))}: that space is free once they close it"


def is_pattern(text: str) -> bool:
    return not set("*?[").isdisjoint(text)


def chosen(statuses: Sequence[PipelineStatus], wanted: Sequence[str]) -> list[PipelineStatus]:
    """Return the pipelines that the ids and patterns name; all if there are none. Raises PipelineNotFound for an id or
    pattern that names none."""
    if not wanted:
        return list(statuses)
    names = [status.pipeline for status in statuses]
    found: set[str] = set()
    for pattern in wanted:
        matching = {pattern} & set(names) or set(fnmatch.filter(names, pattern))
        if not matching:
            what = f"no pipeline matches {pattern!r}" if is_pattern(pattern) else f"there is no pipeline {pattern!r}"
            raise PipelineNotFound(f"{what}{pipeline_meant(pattern, names)}; `instantstart ls` lists them")
        found |= matching
    return [status for status in statuses if status.pipeline in found]


CHIP = "●"
HEADER = ("", "PIPELINE", "STATE", "%", "SIZE", "FILL", "REQUESTED", "HOT UNTIL", "SOURCE", "")
CHIP_COLUMN, NAME, STATE, SIZE, FILL, LAST_REQUEST, HOT_UNTIL, SOURCE, NOTE = 0, 1, 2, 4, 5, 6, 7, 8, 9


def pipelines(statuses: Sequence[PipelineStatus], *, width: int | None = None) -> str:
    """The table of `ls` and `status`: with a chip in the state's colour on terminals (``width`` columns wide, None:
    as wide as this one), plain columns elsewhere."""
    if not statuses:
        return "no pipelines yet: `instantstart add my-model hf://org/repo` makes one"
    rows = [_row(status) for status in statuses]
    if not sys.stdout.isatty() and width is None:
        told = [(*row[1:NOTE], printable(_note(status))) for row, status in zip(rows, statuses, strict=True)]
        return table(HEADER[1:], told)
    if width is None:
        width = shutil.get_terminal_size().columns
    return _drawn(rows, [_troubles(status) for status in statuses], width)


def _row(status: PipelineStatus) -> tuple[str, ...]:
    size = human_bytes(status.total_bytes)
    if 0 < status.cached_bytes < status.total_bytes:
        size = f"{human_bytes(status.cached_bytes)} of {size}"
    return (
        CHIP if status.cached_bytes or status.state == "error" else "○",
        status.pipeline,
        status.state,
        f"{percent(status)} %",
        size,
        rate_line(status) or "-",
        _distance(status.last_request) or "never",
        _distance(status.hot_until) or "-",
        printable(" ".join(status.source)),
        _short_note(status),
    )


def _distance(value: str | None) -> str:
    """The bracket of human_time: "3 min 20 s ago", "in 47 h 2 min"."""
    return human_time(value).partition(" (")[2].rstrip(")")


def _drawn(rows: Sequence[tuple[str, ...]], problems: Sequence[Sequence[str]], width: int) -> str:
    """Draw a table. ``problems``: for each row, what goes below it, on lines of their own."""
    from rich.cells import cell_len, chop_cells, set_cell_size

    natural = [max(cell_len(line[position]) for line in (HEADER, *rows)) for position in range(len(HEADER))]
    widths = _fitting(natural, width, filling=any(row[FILL] != "-" for row in rows))
    least = max(width, sum(widths.values()) + len(widths) - 1)

    def cell(row: Sequence[str], position: int) -> str:
        text, size = row[position], widths[position]
        if HEADER[position] == "%":
            return text.rjust(size)
        if cell_len(text) > size:
            text = set_cell_size(text, size - 1) + "…" if position == SOURCE else chop_cells(text, size)[0]
        padded = set_cell_size(text, size)
        return coloured(row[STATE], padded) if position in (CHIP_COLUMN, STATE) else padded

    def lines(row: Sequence[str]) -> Iterator[str]:
        yield " ".join(cell(row, position) for position in widths).rstrip()
        # A name is to be copied: it goes on in the next line.
        for rest in chop_cells(row[NAME], widths[NAME])[1:]:
            yield f"{' ' * (widths[CHIP_COLUMN] + 1)}{rest}".rstrip()

    drawn = list(lines(HEADER))
    for row, below in zip(rows, problems, strict=True):
        drawn.extend(lines(row))
        for problem in below:
            drawn.extend(textwrap.wrap(problem, least, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(drawn)


def _troubles(status: PipelineStatus) -> list[str]:
    found = []
    if status.uncached:
        found.append(printable(f"uncached: {status.uncached}"))
    if status.error:
        found.append(printable(reason_first(status.error.message, status.pipeline)))
    return found


def _fitting(natural: Sequence[int], width: int, *, filling: bool) -> dict[int, int]:
    """Column → width, within ``width`` as far as that goes: the source is cut short, then whole columns give way, those
    first that say least, and a name goes on in the next line. What remains is never cut."""
    widths = {position: size for position, size in enumerate(natural) if size}

    def excess() -> int:
        return sum(widths.values()) + len(widths) - 1 - width

    def shrink(position: int, least: int) -> None:
        if position in widths and excess() > 0:
            widths[position] = max(min(least, natural[position]), widths[position] - excess())

    def drop(position: int) -> None:
        if excess() > 0:
            widths.pop(position, None)

    shrink(SOURCE, 12)
    if not filling:
        drop(FILL)
    drop(SOURCE)
    shrink(NAME, 16)
    for position in (HOT_UNTIL, NOTE, LAST_REQUEST):
        drop(position)
    if filling and FILL in widths and 0 < excess() <= widths[SIZE] + 1:
        drop(SIZE)  # beside the share, how fast and how long yet say more
    drop(FILL)
    if NOTE not in widths and 0 < natural[NOTE] + 1 <= -excess():
        widths[NOTE] = natural[NOTE]  # broader columns were dropped too, so it fits
    if SOURCE in widths:
        widths[SOURCE] = min(natural[SOURCE], widths[SOURCE] + max(0, -excess()))
    elif NAME in widths:
        widths[NAME] = min(natural[NAME], widths[NAME] + max(0, -excess()))
    return widths


def mounted(info: DaemonInfo) -> str:
    """Return where the mount is, which transport serves it, and why no faster one does."""
    told = f"{info.mount}: {info.transport or 'not mounted yet'}"
    if info.tier is None:
        return told
    return "\n".join(
        [told, f"regional tier: {tier(info.tier)}", *(f"{name}: {what}" for name, what in beside(info.tier))]
    )


def tier(found: TierStatus) -> str:
    """How the regional tier fares, for whom that was asked."""
    if found.state in ("ok", "unknown"):
        return found.state if found.state == "ok" else "not asked yet"
    return f"{found.state} since {human_time(found.since)}: {printable(found.why)}"


def beside(found: TierStatus) -> list[tuple[str, str]]:
    """What else somebody should know of the region: other regions' tiers that are left alone, and what is wrong."""
    rows = [
        ("upstream tier", f"{printable(one.endpoint)}: down since {human_time(one.since)}: {printable(one.why)}")
        for one in found.upstream
        if one.state == "down"
    ]
    return [*rows, ("warning", printable(found.warning))] if found.warning else rows


def _short_note(status: PipelineStatus) -> str:
    notes = ["pinned"] if status.pinned else []
    if status.leases:
        notes.append(f"{status.leases} lease{'s' if status.leases > 1 else ''}")
    return "; ".join(notes)


def _note(status: PipelineStatus) -> str:
    notes = [_short_note(status)] if _short_note(status) else []
    if status.undecided:
        notes.append(f"{status.undecided} variants, none chosen")
    if status.uncached:
        notes.append(f"uncached: {status.uncached}")
    if status.error:
        notes.append(status.error.message)
    return "; ".join(notes)


def pipeline(status: PipelineStatus) -> str:
    """`status PIPELINE`."""
    share = percent(status)
    amount = f"{human_bytes(status.cached_bytes)} of {human_bytes(status.total_bytes)}"
    received = progress(status) - status.cached_bytes
    coming = f", {human_bytes(received)} of the next chunks" if received else ""
    rows = [
        ("state", coloured(status.state)),
        (
            "cached",
            f"{bar(share)} {share} %  {amount}{coming}",
        ),
    ]
    if status.fill is not None:
        rows.append(("filling", rate_line(status)))
    rows += [("source" if not position else "", printable(source)) for position, source in enumerate(status.source)]
    rows += [
        ("revision", printable(status.revision) or "-"),
        ("generation", str(status.generation)),
        ("last request", human_time(status.last_request)),
    ]
    if status.hot_until is not None:
        rows.append(("hot until", human_time(status.hot_until)))
    rows += [("pinned", "yes" if status.pinned else "no"), ("leases", str(status.leases))]
    if status.access is not None:
        told = f"{status.access.verdict}, {human_time(status.access.checked)}"
        rows.append(("access", told if status.access.trouble is None else f"{told}; last: {status.access.trouble}"))
    if status.tier is not None:
        rows.append(("tier", tier(status.tier)))
        rows += beside(status.tier)
    if status.scrub is not None:
        proven = human_time(status.scrub.proven)
        rows.append(("scrubbed", proven if status.scrub.state == "waiting" else f"{proven}; {status.scrub.state} now"))
    if status.startup_bytes:
        rows.append(("startup", f"{human_bytes(status.startup_bytes)} of caches (`startup-cache ls`)"))
    if status.uncached:
        rows.append(("uncached", printable(status.uncached)))
    if status.skipped is not None:
        rows.append(("skipped", skipped(status.skipped)))
    if status.error is not None:
        when = human_time(status.error.since)
        rows.append(("last error", printable(reason_first(status.error.message, status.pipeline))))
        rows.append(("", f"({status.error.code}, {when})"))
    rows += variants(status)
    lines = [status.pipeline, *(f"  {name:<12}  {value}" for name, value in rows)]
    if status.files is not None:
        lines.append(f"  {len(status.files)} files")
        for file in status.files[:MAX_FILES]:
            partly = f" ({human_bytes(file.cached_bytes)} here)" if 0 < file.cached_bytes < file.size else ""
            state = coloured(file.state, f"{file.state:<10}")
            shown = f"{printable(file.path)}{partly}{_explained(file)}"
            lines.append(f"    {state}  {human_bytes(file.size):>8}  {shown}")
        if len(status.files) > MAX_FILES:
            lines.append(f"    … and {len(status.files) - MAX_FILES} more (--json lists them all)")
    return "\n".join(lines)


def skipped(found: SkippedStatus) -> str:
    """Return how many files of the source cannot be shown, and which."""
    more = found.count - len(found.first)
    names = "; ".join(printable(name) for name in found.first) + (f"; and {more} more" if more > 0 else "")
    return f"{found.count} file{'s' if found.count != 1 else ''} that cannot be shown: {names}"


def variants(status: PipelineStatus) -> list[tuple[str, str]]:
    """Return the variants to choose from: rows of `status` and `add`."""
    found = status.variants
    if not found:
        return []
    chosen = [variant.label for variant in found if variant.chosen]
    named = ", ".join(variant.label for variant in found)
    rows = [("variants", printable(f"{len(found)} ({named}); chosen: {', '.join(chosen) or 'none'}"))]
    if status.undecided:
        example = printable(found[len(found) // 2].include)
        rows += [
            ("", f"an engine loads one: `instantstart warm {status.pipeline} --include '{example}'` takes it,"),
            ("", f"and so does the engine's first read; `add … --include '{example}'` shows no other"),
        ]
    return rows


def _explained(file: FileStatus) -> str:
    if file.left_out is not None:
        return f"  (left out: {printable(file.left_out)})"
    if file.untouched:
        return "  (not opened by the last 3 starts)"
    return "  (learned)" if file.learned else ""


OPTIONAL = frozenset(
    {"files", "listed", "variants", "undecided", "uncached", "scrub", "access", "skipped", "startup_bytes", "tier"}
)


def as_json(value: Any) -> str:
    """Two spaces of indent. A PipelineStatus shows only what there is of OPTIONAL."""
    text = msgspec.json.format(msgspec.json.encode(_plain(value)), indent=2).decode()
    return text if unicode_capable(sys.stdout) else escaped(text)


def _plain(value: Any) -> Any:
    if isinstance(value, PipelineStatus):
        plain = msgspec.to_builtins(value)
        return {key: found for key, found in plain.items() if key not in OPTIONAL or found is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
