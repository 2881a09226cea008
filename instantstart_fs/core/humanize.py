"""Formats sizes, times and messages for people, alike on the command line and the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from instantstart_fs.core.late_pattern import late


def human_bytes(count: float, *, short: bool = False) -> str:
    """Decimal units, as disks and networks are sold: 90.9 MB. ``short``: one digit after the point at most."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.5 or unit == "PB":
            break
    digits = 0 if count >= 100 else 1 if short or count >= 10 else 2
    return f"{count:.{digits}f} {unit}"


_ADDRESS = late(r"https?://[^\s\"'()]*[^\s\"'():,.;]")


def reason_first(message: str, subject: str = "") -> str:
    """An error's message as one line that may be cut: first what went wrong, then, in brackets, of what; hosts in the
    place of addresses, which are in `--json` and in the log. ``subject``: what need not be said once more.

    "m.safetensors: http://hub:80/a/b?c: connection refused" → "connection refused (hub:80, m.safetensors)".
    """
    parts = _ADDRESS.sub(lambda found: urlsplit(found[0]).netloc.rpartition("@")[2] or found[0], message).split(": ")
    subjects: list[str] = []
    while len(parts) > 1 and " " not in parts[0]:
        of_what = parts.pop(0)
        if of_what not in (subject, *subjects):
            subjects.insert(0, of_what)
    reason = ": ".join(parts)
    return f"{reason} ({', '.join(subjects)})" if subjects else reason


def human_seconds(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} days"


def precise_seconds(value: float) -> str:
    """Return a time as precisely as it matters: 840 ms, 4.21 s, 93 s, 21 min 2 s."""
    if abs(value) >= 600:
        return human_seconds(value)
    if abs(value) < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if abs(value) < 10 else f"{value:.1f} s" if abs(value) < 60 else f"{value:.0f} s"


def number_of(count: int, thing: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint for the middle of a message, `` (did you mean 'b'?)``, from the ``known`` words; "" where none is
    similar."""
    import difflib  # late: for mistakes only

    small = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), list(small), n=1, cutoff=0.6)
    longer = [name for name in known if len(word) >= 3 and name.lower().startswith(word.lower())]
    meant = small[found[0]] if found else longer[0] if longer else None
    return "" if meant is None else f" (did you mean {meant!r}?)"


def pipeline_meant(word: str, pipelines: Sequence[str]) -> str:
    """``did_you_mean`` for a pipeline's id, in whose place people also paste a path under the mount: of
    ``/models/my-llm/config.json`` the pipeline on the way is meant, else what its last part is similar to."""
    parts = [part for part in word.split("/") if part]
    on_the_way = [part for part in parts if part in pipelines]
    return did_you_mean((on_the_way or parts or [word])[-1], pipelines)
