"""Decides which failures of a fetch are final, and after how many in a row. Pure; backoff is in core/retry.py.

A server that misbehaves once may have had a bad moment: it is asked again, with backoff. One that misbehaves in the
same way several times in a row is like that, and asking it for ever helps nobody: the file then fails for good
(OriginIncompatible), until `warm` or `update`. A server that is down, slow or throttled is not at fault in this sense:
its readers have their own deadline, and it is asked as long as somebody wants the file.
"""

from __future__ import annotations

import enum

from instantstart_fs.errors import InstantStartError, OriginIncompatible, OriginMisbehaved


class Fault(enum.StrEnum):
    """A kind of misbehaviour of a server."""

    ANSWER = "answer"
    """An answer that cannot be understood, or a status that has no place here."""
    RANGE = "range"
    """The answer had other bytes than those asked for, by Content-Range or by length."""
    ENCODED = "encoded"
    """A body in an encoding that nobody asked for."""
    CUT = "cut"
    """The body ended too early. Networks do that, too."""
    LONG = "long"
    """The body is longer than it should be."""
    REDIRECTS = "redirects"
    """Redirects without end."""
    INSIDE = "inside"
    """A name that leads into this machine or its network."""
    WHOLE = "whole"
    """The whole file where a part was asked for: good enough for who keeps all of it (filler/worker.py)."""


_FINAL_AFTER = {
    Fault.ANSWER: 5,
    Fault.RANGE: 3,
    Fault.ENCODED: 3,
    Fault.CUT: 10,
    Fault.LONG: 3,
    Fault.REDIRECTS: 2,
    Fault.INSIDE: 3,
    Fault.WHOLE: 1,
}
_OF_ANY_KIND = 12
"""Misbehaviours in a row that are final though no two are of one kind."""
_ADVICE = {
    Fault.ANSWER: "is it what it should be, or does a proxy answer in its place?",
    Fault.RANGE: "a server or proxy that cannot answer ranged requests; use another endpoint",
    Fault.ENCODED: "switch off compression for these files at the server or proxy",
    Fault.CUT: "a proxy that limits the length of answers?",
    Fault.LONG: "a server or proxy that cannot answer ranged requests; use another endpoint",
    Fault.REDIRECTS: "correct the redirects at the server or proxy",
    Fault.INSIDE: "see docs/SECURITY.md, Where an origin may send the daemon",
    Fault.WHOLE: "free space in the store, or use another endpoint",
}


class Streak:
    """Misbehaviours of one file's source in a row, of one kind. Reset by ``answered``, when bytes have come."""

    def __init__(self) -> None:
        self._fault: Fault | None = None
        self._count = 0
        self._of_any_kind = 0

    def answered(self) -> None:
        self._fault, self._count, self._of_any_kind = None, 0, 0

    def failed(self, error: InstantStartError) -> OriginIncompatible | None:
        """Count ``error``, one for a burst of requests; what the file fails with for good, None while asking again may
        help."""
        if isinstance(error, OriginIncompatible):
            return error
        if not isinstance(error, OriginMisbehaved):
            return None
        fault = Fault(error.fault) if error.fault in _KNOWN else Fault.ANSWER
        self._count = self._count + 1 if fault is self._fault else 1
        self._fault = fault
        self._of_any_kind += 1
        if self._count >= _FINAL_AFTER[fault]:
            often = f"this is so for the {_ordinal(self._count)} time in a row"
        elif self._of_any_kind >= _OF_ANY_KIND:
            often = f"it is the {_ordinal(self._of_any_kind)} answer in a row that is of no use"
        else:
            return None
        return OriginIncompatible(
            f"{error.message}; {often}, so that it is not asked any more: {_ADVICE[fault]}; `warm` and `update` try "
            "again",
            fault=fault,
        )


_KNOWN = frozenset(Fault)


def _ordinal(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")
