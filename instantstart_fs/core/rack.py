"""The rack level, pure: what a neighbour has to show to get bytes of this host, and how much of it at once.

A ticket says that whoever shows it holds the region's key, for one file and for a short time. Time is the *serving*
host's own clock (seconds since some start of its own), which it tells to whoever asks: the clocks of two hosts are
never compared. It is bound to one life of the server (``epoch``), so that it opens nothing at a host that later has the
same address.
"""

from __future__ import annotations

import enum
import hmac
import re

TICKET_SECONDS = 60
"""How long a ticket is good for, at most: nobody can make one that is good for longer."""
_RACK_KEY = b"instantstart rack tickets, version 1"
_TICKET = re.compile(r"([0-9]{1,12})\.([0-9a-f]{32})\.([0-9a-f]{64})\Z")
_RANGE = re.compile(r"bytes=([0-9]{1,19})-([0-9]{1,19})\Z")


def rack_key(region_key: bytes) -> bytes:
    """What tickets are made and checked with. The region's key does not follow from it, so that the process that talks
    to the network never has that."""
    return hmac.digest(region_key, _RACK_KEY, "sha256")


def ticket(key: bytes, path: str, epoch: str, expires: int) -> str:
    """For ``path`` at the server whose life is ``epoch`` (32 hex digits), until its clock says ``expires``."""
    return f"{expires}.{epoch}.{_mac(key, path, epoch, expires)}"


class Refusal(enum.StrEnum):
    """Why a ticket opens nothing."""

    MALFORMED = "malformed"
    ANOTHER_LIFE = "another-life"
    EXPIRED = "expired"
    TOO_LONG = "too-long"
    WRONG = "wrong"


def check_ticket(key: bytes, path: str, epoch: str, now: float, shown: str) -> Refusal | None:
    """None if ``shown`` opens ``path`` at ``now`` of the server's own clock."""
    found = _TICKET.match(shown)
    if found is None:
        return Refusal.MALFORMED
    expires = int(found[1])
    if not hmac.compare_digest(found[2], epoch):
        return Refusal.ANOTHER_LIFE
    if not hmac.compare_digest(found[3], _mac(key, path, epoch, expires)):
        return Refusal.WRONG
    if expires <= now:
        return Refusal.EXPIRED
    if expires > now + TICKET_SECONDS + 1:
        return Refusal.TOO_LONG
    return None


def _mac(key: bytes, path: str, epoch: str, expires: int) -> str:
    return hmac.digest(key, f"{epoch}\n{expires}\n{path}".encode(), "sha256").hex()


def parse_range(value: str | None, most: int) -> tuple[int, int] | None:
    """(first, stop) of ``bytes=first-last``; None where it is anything else, empty, or more than ``most`` bytes."""
    found = _RANGE.match(value or "")
    if found is None:
        return None
    first, stop = int(found[1]), int(found[2]) + 1
    return (first, stop) if first < stop <= first + most else None
