"""Judges from access checks whether an origin still accepts a pipeline's credentials, and when to check next. Pure:
time is a parameter (the wall clock, since the state survives restarts). The checks themselves are made elsewhere.

A refusal must be said twice, CONFIRM_SECONDS apart, before it counts: proxies and rate limits say 403, too. What is no
answer (an outage, credentials that cannot be read here) changes nothing: a warm pipeline needs neither its origin nor
its credentials.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Literal

import msgspec

from instantstart_fs.errors import AccessRefused, CredentialsUnusable, InstantStartError, OriginHidden

CONFIRM_SECONDS = 60.0
CONFIRMATIONS = 2
REFUSED_SECONDS = 900.0
"""The longest time, in seconds, until origins are asked again after a refusal that counts: then returned access is
noticed."""
FIRST_RETRY = 60.0
LAST_RETRY = 3600.0
"""The longest time, in seconds, until the next question after no answer; the time doubles with each one."""

Outcome = Literal["allowed", "refused", "unknown"]
_WORST: tuple[Outcome, ...] = ("refused", "unknown", "allowed")


class Access(msgspec.Struct, frozen=True):
    """The state of a pipeline's access checks. ``checked_at_ns``: the last answer, yes or no, 0 = none;
    ``tried_at_ns``: the last check. ``refusals``, ``failures``: refusals, or checks without an answer, in a row.
    ``since_ns``: the first of these refusals. ``code``, ``message``: the last failure, "" after a yes."""

    checked_at_ns: int = 0
    tried_at_ns: int = 0
    refusals: int = 0
    failures: int = 0
    since_ns: int = 0
    code: str = ""
    message: str = ""

    @property
    def verdict(self) -> Outcome:
        """The present verdict: the last answer, a refusal only once it is confirmed."""
        if self.refusals >= CONFIRMATIONS:
            return "refused"
        return "allowed" if self.checked_at_ns else "unknown"


def asks_somebody(sources: Iterable[str]) -> bool:
    """Whether any of the sources has somebody who could refuse."""
    return any(not source.startswith("file:") for source in sources)


def judge(error: InstantStartError | None) -> Outcome:
    """Judge one check by its error. Credentials that cannot be used were never shown to the origin: that is no
    refusal."""
    if error is None:
        return "allowed"
    if isinstance(error, CredentialsUnusable):
        return "unknown"
    return "refused" if isinstance(error, AccessRefused | OriginHidden) else "unknown"


def worst(errors: Iterable[InstantStartError | None]) -> InstantStartError | None:
    """The answer that stands for a pipeline, of its sources' answers."""
    return min(errors, key=lambda error: _WORST.index(judge(error)), default=None)


def after(access: Access, error: InstantStartError | None, now_ns: int) -> Access:
    """The state after a check that ended with ``error`` (None: access is granted)."""
    outcome = judge(error)
    if error is None:
        return Access(checked_at_ns=now_ns, tried_at_ns=now_ns)
    if outcome == "unknown":
        return msgspec.structs.replace(
            access, tried_at_ns=now_ns, failures=access.failures + 1, code=error.code, message=error.message
        )
    return Access(
        checked_at_ns=now_ns,
        tried_at_ns=now_ns,
        refusals=access.refusals + 1,
        since_ns=access.since_ns or now_ns,
        code=error.code,
        message=error.message,
    )


def due_in(access: Access, pipeline: str, period: float, now_ns: int) -> float:
    """Seconds until it is to be asked (again); 0: now. Never more than ``period``."""
    pause: float
    if access.tried_at_ns == 0 or access.tried_at_ns > now_ns:
        return 0.0  # never, or the clock was set
    if access.failures:
        pause = min(FIRST_RETRY * 2.0 ** min(access.failures - 1, 16), LAST_RETRY)
    elif access.refusals >= CONFIRMATIONS:
        pause = REFUSED_SECONDS
    elif access.refusals:
        pause = CONFIRM_SECONDS
    else:
        # Those that were added together are not asked for together for ever.
        pause = period * (0.9 + 0.1 * zlib.crc32(pipeline.encode()) / 2**32)
    return max(0.0, min(pause, period) - (now_ns - access.tried_at_ns) / 1e9)
