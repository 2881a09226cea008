"""Claims of a region's hosts: what is seen of one over time, when its owner counts as dead, how many a host makes.
Pure: time is a parameter, on the observer's own monotonic clock. Clocks of two hosts are never compared.

A claim is believed dead by evidence only: it was looked at, and was the same each time. A host that was not looked at,
or looked at by a machine that is slow itself, is not dead (tests/unit/test_region_plan.py).
"""

from __future__ import annotations

import enum
import math

import msgspec

CLAIM_TTL = 8.0
"""Seconds without a change of its record after which a claim's owner may count as dead."""
CLAIM_STALL = 60.0
"""Seconds without a further byte after which it may count as stuck, though its owner renews it."""
LEAST_STILL = 3
"""Looks in a row with an unchanged record, without which no owner is dead: a machine that is slow looks seldom."""
LAGS = 4.0
"""How many of its own slowest answers an observer adds to CLAIM_TTL: if they are slow for it, they are slow for the
owner too."""
RENEW_SECONDS = WATCH_SECONDS = 2.0
"""Seconds between two renewals of a claim, and between two looks at a claim that may be dead."""
CALM_SECONDS = 10.0
"""Seconds between two looks at a claim that listings show to be renewed."""
BUDGET_SECONDS = 0.25
"""Seconds for which a host keeps its budget at least: claims of others are to be seen meanwhile."""
MOST_UNREADABLE, MOST_VANISHED = 4, 3
"""Looks (over CLAIM_TTL) at what cannot be read, or is not there though listed, after which a claim is nobody's."""
MOST_OWNERS = 3
"""Hosts that may be seen to have one claim, one after the other. Who can write to the bucket and has no key can put
records of the past there again; what changes to and fro is no life."""


class ClaimMark(msgspec.Struct, frozen=True):
    """What one look at a claim's record showed: whose it is, how often renewed; ``done`` grows as its host gets on."""

    host: str
    beat: int
    done: int


class Claim:
    """Another host's claim, as it was seen over time. ``epoch``: how often the group was taken over before.

    Two things tell that it lives: its record, which costs a request, and the time that listings give for it, which
    costs none. What was alive at the last look is alive until looks tell otherwise."""

    __slots__ = (
        "_owners",
        "_stamp",
        "_stamp_read",
        "changed",
        "epoch",
        "looked",
        "mark",
        "moved",
        "observed",
        "still",
        "tries",
    )

    def __init__(self, epoch: int, now: float) -> None:
        self.epoch = epoch
        self.mark: ClaimMark | None = None
        self.changed = self.moved = self.observed = now
        self.looked = -math.inf
        self.still = 0
        """Looks in a row that showed nothing new."""
        self.tries = 0
        """Looks since its record was last read."""
        self._owners = 0
        self._stamp: float | None = None
        self._stamp_read: float | None = None
        """The listed time when its record was last read."""

    def listed(self, stamp: float, now: float) -> None:
        """A listing named it, with this time of its last change (of the storage's clock: only ever compared with
        itself)."""
        if self._stamp is None:
            self._stamp = stamp
        elif stamp != self._stamp:
            self._stamp, self.changed, self.still = stamp, now, 0

    def look(self, now: float) -> None:
        """Its record is asked for."""
        self.looked = now
        self.tries += 1

    def see(self, mark: ClaimMark, now: float) -> None:
        """Its record was read."""
        self.looked = self.observed = now
        self.tries = 0
        known = self.mark
        explained = self._stamp is not None and self._stamp != self._stamp_read
        self._stamp_read = self._stamp
        if known is None or known.host != mark.host:
            self._owners += 1
            if self._owners > MOST_OWNERS:
                self.still += 1
                return
            self.mark = mark
            self.changed = self.moved = now
            self.still = 0
            return
        # Both only grow: what is less than it was is a record of the past.
        self.mark = ClaimMark(known.host, max(known.beat, mark.beat), max(known.done, mark.done))
        if mark.done > known.done:
            self.moved = now
        if mark.beat <= known.beat:
            self.still += 1
        elif not explained:  # else listings have told when it was renewed
            self.changed, self.still = now, 0

    def due(self, now: float) -> bool:
        """Return whether the claim should be looked at."""
        calm = self.mark is not None and now - self.changed < 2 * RENEW_SECONDS
        return now - self.looked >= (CALM_SECONDS if calm else WATCH_SECONDS)

    def dead(self, now: float, lag: float = 0.0) -> bool:
        """Whether its owner counts as dead or stuck, or nobody can read the record. ``lag``: seconds that the slowest
        of the observer's own requests took of late."""
        patience = CLAIM_TTL + LAGS * lag
        if self.mark is None:
            return self.tries >= MOST_UNREADABLE and now - self.changed >= patience
        if self.still >= LEAST_STILL and self.observed - self.changed >= patience:
            return True
        if self.observed - self.moved >= CLAIM_STALL + LAGS * lag:
            return True
        return self.tries >= MOST_UNREADABLE and self.looked - self.observed >= patience


class OwnClaim:
    """A claim of this host. ``beat``: more than in any claim that this process had before, also of the same group:
    one that was given up and made again is not taken for its own past."""

    __slots__ = ("beat", "epoch", "renewed")

    def __init__(self, epoch: int, now: float) -> None:
        self.epoch = epoch
        self.beat = int(now)
        self.renewed = now


class Take(msgspec.Struct, frozen=True):
    """Claim this group: by a conditional put of the record of this epoch."""

    group: int
    epoch: int


class Renewal(msgspec.Struct, frozen=True):
    group: int
    epoch: int
    mark: ClaimMark


class ClaimState(enum.Enum):
    FREE = "free"
    ASKED = "asked"
    MINE = "mine"
    THEIRS = "theirs"
    ADVISORY = "advisory"
    """The tier keeps no claims: everybody pulls."""


class ClaimBudget:
    """How much of a pipeline one host may have in hand: under its claims and not here, and where others pull, too, here
    and not in the tier. They wait for that; a host alone is not to wait for a tier that is slower than the origin.

    Hosts that start together see no claims of one another. Who takes much at once then takes all of a small pipeline,
    and the others watch; of a slow origin it has too much in hand for long. So each starts with one group, and doubles
    that as long as nobody else shows up and it gets on with what it has. Where others pull, a group of each keeps the
    origin busy, and little is pulled again when one of them dies.

    Args:
        group: Chunks of a group: in hand while others pull.
        alone: Chunks in hand while nobody else does.
    """

    def __init__(self, group: int, alone: int) -> None:
        self._group, self._alone = group, alone
        self._now = group
        self._since = math.inf
        """When it was set: the first look, then what changed it."""
        self._others = 0
        self._claims = 0
        """How often more was claimed since then: the first time fills it up, the second shows that half is done."""

    def looked(self, now: float, *, others: int) -> None:
        """A listing has come. ``others``: how many claims other hosts have."""
        self._others = others
        self._since = min(self._since, now)
        if others:
            self._set(self._group, now)

    def claimed(self, now: float) -> None:
        """What was due was claimed."""
        self._claims += 1
        if not self._others and self._claims > 1 and now - self._since >= BUDGET_SECONDS:
            self._set(min(2 * self._now, self._alone), now)

    def _set(self, chunks: int, now: float) -> None:
        self._now, self._since, self._claims = chunks, now, 0

    def left(self, pulling: int, putting: int = 0) -> int:
        """Chunks that may be claimed beside those ``pulling``, under claims and not here, and those ``putting``, here
        and not in the tier."""
        return self._now - pulling - (putting if self._others else 0)

    def due(self, pulling: int, putting: int = 0) -> int:
        """Chunks to claim now, where nobody waits for them: what is left, once that is half a group. Who claims a whole
        group as soon as one chunk has come has nearly two in hand, and a host that dies costs that much."""
        left = self.left(pulling, putting)
        return left if 2 * left >= self._group else 0


def starting_delay(hosts: int, chance: float) -> float:
    """Seconds until a host claims for the first time, where ``hosts`` may start at once: their claims are to be seen by
    one another. ``chance`` is from [0, 1)."""
    return min(0.02 * (hosts - 1), 2.0) * chance


def looking_period(hosts: int, least: float) -> float:
    """Seconds between two listings of a host, so that ``hosts`` together ask a tier about as often as 50 would."""
    return min(max(least, least * hosts / 50), 10.0)
