"""One pull for a region: which chunks of a file this host pulls itself, which it takes from the regional tier, and how
long it waits for what another host pulls. Pure: time is a parameter, chance is not needed.

One ``PullPlan`` follows one file that is being filled. Knowledge goes in (what the tier holds, what is claimed, what
came, who waits); out come where each chunk is fetched (``take_moves``), and which claims to make and watch.

Rules (tests/unit/test_region_plan.py shows each):
- A claim is an economy. Bytes are proven by digests: a wrong belief about a claim costs a duplicate fetch.
- Every host walks the groups in an order of its own (rendezvous hashing): hosts claim different ones.
- A claim is dead by evidence only: looks that showed an unchanged record (core/claims.py). No two clocks are compared.
- A reader's chunk never waits longer for a claim than ``patience``: then this host fetches it as well.
- What the tier failed to give goes to the next source at once, chunk by chunk, and stays there. What it is slow to give
  and no reader waits for, it is asked for once more: a busy machine must not cost a duplicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from instantstart_fs.core import rendezvous
from instantstart_fs.core.claims import (
    MOST_VANISHED,
    RENEW_SECONDS,
    Claim,
    ClaimMark,
    ClaimState,
    OwnClaim,
    Renewal,
    Take,
)
from instantstart_fs.core.patience import Patience

GROUP_CHUNKS = 8
"""Chunks under one claim: 64 MiB of chunks of 8 MiB. Measured in docs/decisions/regional.md."""
MOST_LIVE = 32
"""Groups of a file that may be claimed in a region at once; beyond, nobody claims more: origins count connections."""
WHOLE_PATIENCE = 10.0
"""Seconds without a further chunk of a file after which one whose readers wait for all of it waits for no claim."""
WAIT = -1
"""A route: nobody fetches the chunk here now; another host may be pulling it."""


def order(host: str, pin: str, groups: int) -> list[int]:
    """The groups of the file ``pin`` in the order in which ``host`` claims them."""
    return sorted(range(groups), key=lambda group: (-rendezvous.score(host, f"{pin}/{group}"), group))


class PullPlan:
    """One file that is being filled here.

    It has more than 25 public methods, because each thing that becomes known about a chunk or a claim has one, and all
    of them change the same tables.

    A route is WAIT, or a source: 0 is the region's own tier, 1 … ``upstream`` the tiers asked after it, the next number
    the origin (``origin``). A chunk moves from WAIT to a source and from a source to a later one, so that no two
    sources fetch it at once for long. One step goes back: from the own tier to WAIT, when that is left (``leave_own``).

    Args:
        host: This host's name.
        pin: Which file: the same on every host that pinned the same bytes.
        present: For each chunk, whether it is here.
        patience: Shared by all files of one origin.
        upstream: How many tiers are asked after the region's own.
    """

    def __init__(self, host: str, pin: str, present: Sequence[bool], patience: Patience, *, upstream: int = 0) -> None:
        self.host = host
        self.pin = pin
        self.chunks = len(present)
        self.groups = -(-self.chunks // GROUP_CHUNKS)
        self.origin = upstream + 1
        self.background = False
        self.lag = 0.0
        """Seconds that the slowest of this host's own requests to the tier took of late."""
        self._patience = patience
        self._here = bytearray(map(bool, present))
        self._missing = self.chunks - sum(self._here)
        self._there = bytearray(self.chunks)
        self._first = bytearray(self.chunks)
        """The first source that may be asked for the chunk: those before failed."""
        self._route = [WAIT] * self.chunks
        self._sealed = [False] * self.origin
        self._demands: dict[int, float] = {}
        self._late: set[int] = set()
        """Chunks whose reader has waited long enough."""
        self._whole = False
        """Readers wait for all of it."""
        self._still = (0, 0.0)
        """Chunks that were missing, and since when that is so, while they do."""
        self._slow: set[int] = set()
        """Chunks that the tier was slow to give once."""
        self._moves: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._mine: dict[int, OwnClaim] = {}
        self._theirs: dict[int, Claim] = {}
        self._advisory: set[int] = set()
        self._advisory_all = False
        self._asks_upstream = False
        """The own tier was left, and which upstream tiers have the file is not known yet."""
        self._vanished: dict[int, int] = {}
        self._order: list[int] | None = None
        self._finished: set[int] = set()
        """Groups that need no claim any more: each of their chunks is here or in the tier."""

    # -- what became known -------------------------------------------------------------------------------------------

    def came(self, chunk: int) -> None:
        """The chunk is here and proven."""
        if self._here[chunk]:
            return
        self._here[chunk] = 1
        self._missing -= 1
        self._route[chunk] = WAIT
        self._moves.pop(chunk, None)
        self._demands.pop(chunk, None)
        self._late.discard(chunk)
        self._slow.discard(chunk)
        self.progressed()
        self._check_group(chunk // GROUP_CHUNKS)

    def left(self, chunk: int) -> None:
        """The chunk is not here any more (a failed write): it is fetched again."""
        if self._here[chunk]:
            self._here[chunk] = 0
            self._missing += 1
            self._finished.discard(chunk // GROUP_CHUNKS)
            self._decide(chunk)

    def demand(self, chunks: Iterable[int], now: float) -> None:
        """Readers wait for these."""
        for chunk in chunks:
            if not self._here[chunk]:
                self._demands.setdefault(chunk, now)

    def demand_whole(self, now: float) -> None:
        """Readers wait for the whole file: its bytes may not be served before it is proven."""
        if not self._whole:
            self._whole, self._still = True, (self._missing, now)

    def undemand_whole(self) -> None:
        self._whole = False

    def undemand(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._demands.pop(chunk, None)

    def listed(
        self, chunks: Iterable[int], claims: Mapping[int, int], now: float, stamps: Mapping[int, float] | None = None
    ) -> None:
        """The tier holds these chunks, and these groups are claimed (group → epoch). ``stamps``: when a claim's record
        last changed, by the storage's clock. What a listing leaves out is not believed to be gone."""
        for chunk in chunks:
            if 0 <= chunk < self.chunks and not self._there[chunk]:
                self._there[chunk] = 1
                self._decide(chunk)
                self._check_group(chunk // GROUP_CHUNKS)
        for group, epoch in claims.items():
            if not 0 <= group < self.groups or group in self._finished:
                continue
            mine, theirs = self._mine.get(group), self._theirs.get(group)
            if mine is not None and epoch <= mine.epoch:
                continue
            if theirs is None or epoch > theirs.epoch:
                theirs = self._theirs[group] = Claim(epoch, now)
            if stamps is not None and group in stamps and epoch == theirs.epoch:
                theirs.listed(stamps[group], now)

    def sealed(self, source: int = 0) -> None:
        """This tier holds the whole file, and says by whose proof."""
        self._sealed[source] = True
        for chunk in range(self.chunks):
            self._decide(chunk)

    def failed(self, chunk: int, source: int) -> None:
        """This tier did not give the chunk: late, missing, wrong or refused. The next source is asked."""
        self._first[chunk] = max(self._first[chunk], source + 1)
        self._finished.discard(chunk // GROUP_CHUNKS)
        self._decide(chunk)

    def without(self, source: int) -> None:
        """This upstream tier is not to be asked any more: what was sent there goes to the next source."""
        self._sealed[source] = False
        for chunk in range(self.chunks):
            if self._route[chunk] == source:
                self.failed(chunk, source)

    def slow(self, chunk: int, source: int) -> bool:
        """This tier was too slow with the chunk. Whether it is asked for it once more: the first time, if no reader
        waits; else the next source is."""
        if chunk in self._demands or chunk in self._slow:
            self.failed(chunk, source)
            return False
        self._slow.add(chunk)
        return True

    def demanded(self, chunk: int) -> bool:
        """Whether a reader waits for it."""
        return chunk in self._demands

    @property
    def has_readers(self) -> bool:
        return self._whole or bool(self._demands)

    def leave_own(self, *, asking: bool) -> None:
        """The region's own tier is not to be asked any more, for chunks or for claims: what an upstream tier has sealed
        comes from there, all else from the origin. ``asking``: upstream tiers are asked what they have. Until
        ``asked_upstream`` chunks wait for that, a reader's no longer than for a claim."""
        self._advisory_all, self._asks_upstream = True, asking
        for chunk in range(self.chunks):
            self._first[chunk] = max(self._first[chunk], 1)
            if self._route[chunk] == 0:
                self._route[chunk] = WAIT
                self._moves.pop(chunk, None)
            self._decide(chunk)

    def asked_upstream(self) -> None:
        """Every upstream tier that may be asked has said what it has."""
        self._asks_upstream = False
        for chunk in range(self.chunks):
            self._decide(chunk)

    def give_up(self) -> None:
        """No tier is to be asked any more: all goes to the origin."""
        self._advisory_all, self._asks_upstream = True, False
        for chunk in range(self.chunks):
            self._first[chunk] = self.origin
            self._decide(chunk)

    # -- claims --------------------------------------------------------------------------------------------------------

    def state(self, group: int) -> ClaimState:
        """How the group stands, as far as this host knows."""
        if group in self._mine:
            return ClaimState.MINE
        if self._advisory_all or group in self._advisory:
            return ClaimState.ADVISORY
        if group in self._asked:
            return ClaimState.ASKED
        return ClaimState.THEIRS if group in self._theirs else ClaimState.FREE

    def next_claims(self, budget: int, now: float) -> list[Take]:
        """Groups to claim now, of at most ``budget`` chunks together but for the first: those with readers first, then
        in this host's own order. Answer each by ``won``, ``lost`` or ``unclaimed``."""
        if self._advisory_all or not self._missing:
            return []
        takes: list[Take] = []
        live = len(self._mine) + len(self._asked)
        live += sum(1 for claim in self._theirs.values() if not claim.dead(now, self.lag))
        for group in self._candidates():
            if budget <= 0 or (live >= MOST_LIVE and not self._demanded(group)):
                break
            if group in self._finished or group in self._mine or group in self._asked or group in self._advisory:
                continue
            if not self._lacks(group):
                continue
            claim = self._theirs.get(group)
            if claim is not None and not claim.dead(now, self.lag):
                continue
            epoch = claim.epoch + 1 if claim is not None else 0
            self._asked[group] = epoch
            takes.append(Take(group, epoch))
            budget -= len(self._chunks_of(group))
            live += 1
        return takes

    def won(self, group: int, now: float) -> None:
        """The claim was written: this host pulls the group's missing chunks."""
        epoch = self._asked.pop(group, 0)
        self._theirs.pop(group, None)
        self._mine[group] = OwnClaim(epoch, now)
        self._decide_group(group)

    def lost(self, group: int, now: float) -> None:
        """Another host has it: what it pulls is taken from the tier."""
        epoch = self._asked.pop(group, 0)
        claim = self._theirs.get(group)
        if claim is None or claim.epoch < epoch:
            self._theirs[group] = Claim(epoch, now)

    def recovered(self, group: int, epoch: int, now: float) -> None:
        """A claim that was not known to be written is this host's own."""
        self._asked[group] = epoch
        self.won(group, now)

    def progressed(self) -> None:
        """More came, or was put into the tier: claims of this host that have to wait for it are not stuck."""
        self._patience.progress += 1

    def unclaimed(self, group: int) -> None:
        """The tier does not say (it failed, or keeps no claims): this host pulls the group, as others may."""
        self._asked.pop(group, None)
        self._advisory.add(group)
        self._decide_group(group)

    def others(self, now: float) -> int:
        """How many live claims of this file others have."""
        return sum(not claim.dead(now, self.lag) for claim in self._theirs.values())

    def unasked(self, group: int) -> None:
        """It is not known what became of the claim: it is tried again."""
        self._asked.pop(group, None)

    def watches(self, most: int, now: float) -> list[Take]:
        """Claims of others to look at now: those with readers first, then those that may be dead, then those not looked
        at for long; ``seen`` and ``vanished`` tell the answer."""
        readers = {chunk // GROUP_CHUNKS for chunk in self._demands}
        due = [
            (group not in readers, not claim.still, claim.looked, group, claim)
            for group, claim in self._theirs.items()
            if claim.due(now)
        ]
        due.sort(key=lambda item: item[:4])
        chosen: list[Take] = []
        for *_, group, claim in due:
            if len(chosen) >= most:
                break
            if group not in self._finished and self._lacks(group):
                claim.look(now)
                chosen.append(Take(group, claim.epoch))
        return chosen

    def seen(self, group: int, epoch: int, mark: ClaimMark, now: float) -> None:
        claim = self._theirs.get(group)
        if claim is not None and claim.epoch == epoch:
            claim.see(mark, now)

    def vanished(self, group: int, epoch: int) -> None:
        """Its record is gone: who made it has finished, or was cleaned up after."""
        claim = self._theirs.get(group)
        if claim is not None and claim.epoch == epoch:
            del self._theirs[group]
            # A listing that goes on naming what is gone must not make anybody wait for ever.
            times = self._vanished[group] = self._vanished.get(group, 0) + 1
            if times >= MOST_VANISHED:
                self.unclaimed(group)

    def forged(self, group: int, epoch: int) -> None:
        """Its record was not written by a host of the region: nobody is behind it, and no claim of the group means
        anything. This host pulls it."""
        claim = self._theirs.get(group)
        if claim is not None and claim.epoch == epoch:
            del self._theirs[group]
            self.unclaimed(group)

    def renewals(self, now: float) -> list[Renewal]:
        """Records of this host's claims to write again now: also of groups that are here whole, until ``released``."""
        due: list[Renewal] = []
        for group, mine in self._mine.items():
            if now - mine.renewed >= RENEW_SECONDS:
                mine.renewed, mine.beat = now, mine.beat + 1
                due.append(Renewal(group, mine.epoch, self.mark(group)))
        return due

    def mark(self, group: int) -> ClaimMark:
        """What this host's record of the group says now."""
        mine = self._mine.get(group)
        return ClaimMark(self.host, mine.beat if mine is not None else 0, self._patience.progress)

    def held(self) -> list[tuple[int, int, bool]]:
        """(group, epoch, whether all of it is here or in the tier) of each claim of this host. A claim is removed, and
        ``released``, once what was pulled under it is in the tier: before that others would see neither."""
        return [(group, mine.epoch, group in self._finished) for group, mine in self._mine.items()]

    def released(self, group: int) -> None:
        """This host's claim of it is no more."""
        self._mine.pop(group, None)

    @property
    def holding(self) -> int:
        """Chunks under claims of this host, or about to be, that are not here."""
        groups = [*self._mine, *self._asked]
        return sum(1 for group in groups for chunk in self._chunks_of(group) if not self._here[chunk])

    # -- where to fetch --------------------------------------------------------------------------------------------

    def route(self, chunk: int) -> int:
        """WAIT or the source that is to be asked for the chunk; WAIT too where it is here."""
        return self._route[chunk]

    def take_moves(self, now: float) -> list[tuple[int, int]]:
        """(chunk, source) of every chunk whose source has changed since the last call; it includes those whose readers
        have now waited long enough."""
        patience = self._patience.seconds
        for chunk, since in self._demands.items():
            if self._route[chunk] == WAIT and now - since >= patience and chunk not in self._late:
                self._late.add(chunk)
                self._decide(chunk)
        if self._whole and (self._still[0] != self._missing or now - self._still[1] >= WHOLE_PATIENCE):
            late = range(self.chunks) if self._still[0] == self._missing else ()
            self._still = (self._missing, now)
            self._late.update(late)
            for chunk in late:
                self._decide(chunk)
        moves, self._moves = list(self._moves.items()), {}
        return moves

    @property
    def complete(self) -> bool:
        return not self._missing

    def next_patience(self) -> float:
        """When the next reader has waited long enough for other hosts; inf = none waits for them."""
        waiting = (
            since for chunk, since in self._demands.items() if self._route[chunk] == WAIT and chunk not in self._late
        )
        whole = self._still[1] + WHOLE_PATIENCE if self._whole and self._missing else math.inf
        return min(min(waiting, default=math.inf) + self._patience.seconds, whole)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _chunks_of(self, group: int) -> range:
        return range(group * GROUP_CHUNKS, min((group + 1) * GROUP_CHUNKS, self.chunks))

    def _lacks(self, group: int) -> bool:
        """Whether a chunk of it is neither here nor to be had from the tier."""
        return any(not self._here[chunk] and self._route[chunk] != 0 for chunk in self._chunks_of(group))

    def _demanded(self, group: int) -> bool:
        return any(chunk in self._demands for chunk in self._chunks_of(group))

    def _candidates(self) -> Iterable[int]:
        seen = dict.fromkeys(chunk // GROUP_CHUNKS for chunk in self._demands)
        yield from list(seen)
        if self.background:
            if self._order is None:
                self._order = order(self.host, self.pin, self.groups)
            if len(self._order) > 2 * (self.groups - len(self._finished)):  # once in a while: there may be thousands
                self._order = [group for group in self._order if group not in self._finished]
            yield from (group for group in self._order if group not in seen)

    def _check_group(self, group: int) -> None:
        if group in self._finished:
            return
        if all(
            self._here[chunk] or (self._there[chunk] and not self._first[chunk]) for chunk in self._chunks_of(group)
        ):
            self._finished.add(group)
            self._theirs.pop(group, None)

    def _decide_group(self, group: int) -> None:
        for chunk in self._chunks_of(group):
            self._decide(chunk)

    def _decide(self, chunk: int) -> None:
        if self._here[chunk]:
            return
        first, route = self._first[chunk], WAIT
        if first == 0 and (self._there[chunk] or self._sealed[0]):
            route = 0
        else:
            group = chunk // GROUP_CHUNKS
            may_pull = (
                first > 0  # the tier has failed it: nobody else is waited for
                or group in self._mine
                or group in self._advisory
                or self._advisory_all
            )
            if chunk in self._late or (may_pull and not self._asks_upstream):
                upstream = (source for source in range(max(first, 1), self.origin) if self._sealed[source])
                route = next(upstream, self.origin)
        if route > self._route[chunk]:
            self._route[chunk] = self._moves[chunk] = route
