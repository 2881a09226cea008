"""Startup caches: what an engine compiled at its start, kept beside the weights. Pure: which one may be restored,
which ones are kept. What a key is made of is the tenant's to say (startup/surroundings.py); who owns the pipeline and
what it holds, the daemon adds.

A cache is executable code. It is restored only to its pipeline's owner, and only what the same owner saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from instantstart_fs.errors import UsageError

MOST_FAILED = 2
"""Starts in a row that a version may be restored to, and that end before they are ready."""
MOST_GIVEN = 4096
"""Starts that are remembered until they say how they fared."""

KEPT_PER_KEY = 2
"""The newest, and the one before it, for where the newest proves damaged."""
KEPT = 16
"""Of one pipeline, of all keys: GPU types, engines' versions, arguments."""
MAX_FIELDS = 512
MAX_VALUE = 8192
"""Characters of a field's name, and of its value."""

Outcome = Literal["restored", "first", "mismatch", "damaged", "not-owner", "off", "failed"]
"""Of a start: restored; nothing was saved yet; nothing of this key; its bytes were wrong; the process is not the
owner's; not asked for; could not be put in place."""


class StartupRecord(msgspec.Struct, frozen=True):
    """One saved version. ``size`` of its pack in bytes, ``digest`` its SHA-256. ``uid`` who saved it. ``view``: the
    directory that the engine had it in. ``key``: field → value. ``host``: of the region, which compiled it; "" for this
    one."""

    number: int
    saved_at_ns: int
    uid: int
    size: int
    digest: str
    files: int
    view: str
    layouts: tuple[str, ...]
    key: dict[str, str]
    host: str = ""

    @property
    def engine(self) -> str:
        return self.key.get("engine", "")


class Choice(msgspec.Struct, frozen=True):
    """What a start gets. ``record``: None when nothing may be restored; ``differs``: the fields in which the nearest
    version is another."""

    outcome: Outcome
    record: StartupRecord | None = None
    differs: tuple[str, ...] = ()


def check_key(key: Mapping[str, str]) -> None:
    """Raises UsageError for one that is too large to be kept."""
    if len(key) > MAX_FIELDS or any(len(name) > MAX_VALUE or len(value) > MAX_VALUE for name, value in key.items()):
        raise UsageError(f"a startup cache's key may have {MAX_FIELDS} fields of {MAX_VALUE} characters")


def whole_key(
    key: Mapping[str, str], *, uid: int, generation: int, sources: Sequence[str], revision: str
) -> dict[str, str]:
    """Return ``key`` with the fields that only the daemon knows. They replace what the tenant said of them."""
    import shlex  # late: the daemon's start has no use for it

    return {
        **key,
        "owner": str(uid),
        "generation": f"{generation} {revision}".strip(),
        "source": shlex.join(sources),
    }


def choose(
    records: Iterable[StartupRecord], key: Mapping[str, str], *, uid: int, without: Iterable[int] = ()
) -> Choice:
    """The newest version of exactly that key which ``uid`` saved; else which fields of the nearest one differ.
    ``without``: numbers that proved damaged."""
    from instantstart_fs.core.enginetable import differences  # late: the daemon's start has no use for it

    nearest: tuple[int, int] | None = None
    differs: tuple[str, ...] = ()
    found: StartupRecord | None = None
    damaged = frozenset(without)
    for record in records:
        if record.number in damaged:
            continue
        other = differences(key, record.key)
        if record.uid != uid and "owner" not in other:
            other = (*other, "owner")
        if not other:
            found = record if found is None or record.number > found.number else found
        elif nearest is None or (len(other), -record.number) < nearest:
            nearest, differs = (len(other), -record.number), other
    if found is not None:
        return Choice("restored", found)
    return Choice("damaged" if damaged else "first" if nearest is None else "mismatch", None, differs)


def surplus(records: Iterable[StartupRecord]) -> list[StartupRecord]:
    """What to delete, oldest first: of each key all but the newest KEPT_PER_KEY, of all keys all but KEPT."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    kept, expired = 0, []
    for record in sorted(records, key=lambda found: found.number, reverse=True):
        name = tuple(sorted(record.key.items()))
        if counts.get(name, 0) >= KEPT_PER_KEY or kept >= KEPT:
            expired.append(record)
        else:
            counts[name] = counts.get(name, 0) + 1
            kept += 1
    return expired[::-1]


class Suspects:
    """Which versions are left out for a start because their engines ended before they were ready: what verifies may
    crash an engine all the same, at each start. One without whom a start fails, too, is none any more. In memory."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[str, int, int]] = {}
        self._failed: dict[tuple[str, int], int] = {}

    def given(self, start: str, pipeline: str, number: int, *, left_out: int = 0) -> None:
        """That start has that version, 0 for none, and without suspicion it had ``left_out``."""
        self._given.pop(start, None)
        self._given[start] = pipeline, number, left_out
        if len(self._given) > MOST_GIVEN:
            del self._given[next(iter(self._given))]

    def reported(self, start: str, pipeline: str, *, failed: bool) -> None:
        """It is ready, or has ended. What it says afterwards does not count, nor what another pipeline's owner says."""
        if self._given.get(start, ("",))[0] != pipeline:
            return
        _, number, left_out = self._given.pop(start)
        if not failed:
            self._failed.pop((pipeline, number), None)
        elif number:
            self._failed[pipeline, number] = self._failed.get((pipeline, number), 0) + 1
        else:
            self._failed.pop((pipeline, left_out), None)

    def of(self, pipeline: str) -> tuple[int, ...]:
        """Return the versions to leave out."""
        return tuple(
            number for (name, number), count in self._failed.items() if name == pipeline and count >= MOST_FAILED
        )

    def forget(self, pipeline: str, number: int = 0) -> None:
        """Forget that version, 0 for all: it is gone."""
        for name in [name for name in self._failed if name[0] == pipeline and number in (0, name[1])]:
            del self._failed[name]
