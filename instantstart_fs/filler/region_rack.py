"""Takes chunks that the region's tier holds from neighbours in the rack, so that each group crosses the uplink once.

It is asked for each chunk that PullPlan sends to the tier: whether a neighbour is to give it (``choose``), in which
order chunks of a file are opened (``line_up``), and what follows when a neighbour fails. The tier is the way out at any
time: core/rack.py decides, and a chunk goes to at most two neighbours before it goes there.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core import rack
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.core.region import GROUP_CHUNKS
from instantstart_fs.errors import (
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
)
from instantstart_fs.filler.events import RackStatistics
from instantstart_fs.filler.fill import FetchRequest
from instantstart_fs.filler.messages import Piece
from instantstart_fs.filler.region_follow import Follow, RegionSettings
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import Location, OriginKey

if TYPE_CHECKING:
    from instantstart_fs.regional.keys import RegionKey

log = logging.getLogger(__name__)

WINDOW = 4 * GROUP_CHUNKS
"""Chunks of a file that are open at once: enough to keep a host's connections busy, few enough to keep its order."""
MOST_DIGESTS = 256
"""Files."""
TIER = 0
"""The region's own tier among a file's sources: only what that holds is taken from neighbours."""


class Neighbour:
    """One host of the rack as a source of chunks; all of a rack are one for the counters."""

    def __init__(self, host: str, address: str, key: OriginKey) -> None:
        self.host = host
        self.address = address
        self.key = key

    def locate(self, file: ManifestFile) -> Location:
        raise OriginUnavailable(f"{file.path}: a neighbour keeps no files")


class RackLevel:
    """On the trio thread. ``clock``: the storage's, None while it is not known: then nobody is asked."""

    def __init__(self, settings: RegionSettings, plan: FillPlan[FileKey], table: FillTable) -> None:
        self._plan = plan
        self._table = table
        self._follows: dict[str, Follow] = {}
        """By pin, what neighbours may ask for."""
        self._digests: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        """By pin, of the chunks of files that were filled here last: neighbours have no seal of theirs yet."""
        self._secret: RegionKey = settings.key
        self._rack = settings.rack
        self._key = OriginKey("rack", settings.rack, "")
        self._sources: dict[str, Neighbour] = {}
        self._neighbours = rack.Neighbours(settings.host)
        self.clock: Callable[[], float | None] = lambda: None
        self.taken_bytes = self.given_bytes = 0
        self.fallbacks: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    @property
    def statistics(self) -> RackStatistics:
        return RackStatistics(
            self._rack,
            len(self._sources) if self.clock() is not None else 0,
            self.taken_bytes,
            self.given_bytes,
            tuple(sorted(self.fallbacks.items())),
            tuple(sorted(self.refused.items())),
        )

    def live(self, hosts: dict[str, str]) -> None:
        """These hosts of the rack live, with their addresses; this one may be among them."""
        self._neighbours.live(hosts)
        self._sources = {name: Neighbour(name, hosts[name], self._key) for name in self._neighbours.names}

    # -- what is filled here -----------------------------------------------------------------------------------------

    def enter(self, follow: Follow) -> None:
        """This file is filled here."""
        self._follows[follow.pin] = follow
        self._digests.pop(follow.pin, None)

    def leave(self, follow: Follow) -> None:
        """It is not any more."""
        if self._follows.get(follow.pin) is follow:
            del self._follows[follow.pin]
            self._digests[follow.pin] = follow.digests
            while len(self._digests) > MOST_DIGESTS:
                self._digests.popitem(last=False)

    def digest(self, pin: str, chunk: int) -> bytes:
        """Of a chunk of a file that was filled here lately; b"" = not known."""
        return self._digests.get(pin, {}).get(chunk, b"")

    def followed(self, slot: str, pin: str) -> Follow | None:
        """The file that is filled here under these names."""
        found = self._follows.get(pin)
        return found if found is not None and found.slot == slot else None

    def owe(self, follow: Follow, chunk: int) -> None:
        """A neighbour waits for this chunk: take it from the tier, if that has it, and not from a neighbour."""
        if not follow.over() and chunk not in follow.line.owed:
            follow.line.owed.add(chunk)
            self.demand(follow, [chunk])
            self._table.wakeup.set()

    # -- in which order --------------------------------------------------------------------------------------------

    def takes_turns(self, follow: Follow, chunk: int) -> bool:
        """Whether the chunk waits for its turn; a reader's does not, nor do those of a file of one group."""
        asks = bool(self._sources) and self.clock() is not None
        return asks and follow.pull.groups > 1 and not follow.pull.demanded(chunk)

    def demand(self, follow: Follow, chunks: Iterable[int]) -> None:
        """Somebody waits for these: it is their turn now."""
        for chunk in chunks:
            if follow.pull.route(chunk) == TIER:
                self._plan.open(follow.tier_key, chunk)

    def line_up(self, follow: Follow, chunks: Sequence[int]) -> None:
        """These can be had of the tier: they are opened in this host's order, after those that wait already."""
        if chunks:
            self._plan.shut(follow.tier_key, chunks)
        groups: dict[int, list[int]] = {}
        for chunk in chunks:
            groups.setdefault(chunk // GROUP_CHUNKS, []).append(chunk)
        hosts = [self._neighbours.me, *self._sources]
        for group in rack.walk(self._neighbours.me, follow.pin, groups, hosts):
            follow.line.waiting.extend(groups[group])
        self.go_on(follow)

    def go_on(self, follow: Follow, came: int = -1) -> None:
        """Open the chunks whose turn it is. ``came``: one that is here now."""
        line = follow.line
        line.ahead.discard(came)
        while line.waiting and len(line.ahead) < WINDOW and not follow.over():
            chunk = line.waiting.popleft()
            if follow.pull.route(chunk) == TIER:
                line.ahead.add(chunk)
                self._plan.open(follow.tier_key, chunk)

    # -- from whom -------------------------------------------------------------------------------------------------

    def choose(
        self, follow: Follow, chunk: int, key: bytes, digest: bytes, *, reader: bool
    ) -> tuple[Neighbour, Piece] | None:
        """The neighbour to ask for a chunk that the tier holds, and what to ask; None: the tier. ``key`` of its digest;
        ``digest``: what the seal says of it, b"" without a seal."""
        now, line = self.clock(), follow.line
        if (
            now is None
            or chunk in line.owed
            or line.tried.get(chunk, 0) >= rack.MOST_NEIGHBOURS_ASKED
            or follow.target.present.byte_range(chunk).length < rack.LEAST_BYTES
        ):
            return None
        host = self._neighbours.owner(follow.slot, follow.pin, chunk // GROUP_CHUNKS, trio.current_time())
        source = self._sources.get(host) if host is not None else None
        if source is None:
            return None
        wait = rack.READER_WAIT_SECONDS if reader else rack.WAIT_SECONDS
        asked = rack.Asked(follow.slot, follow.pin, chunk, wait, bool(digest))
        ticket = rack.make_ticket(self._secret.tickets, source.host, asked, now)
        url = f"http://{source.address}{rack.path_of(asked)}"
        return source, Piece(url, key, digest, (("Authorization", ticket),), neighbour=True)

    @staticmethod
    def give_up_at(began: float, last_byte: float, *, demanded: bool) -> float:
        """When a neighbour has been too slow with a chunk."""
        return rack.give_up_at(began, last_byte, demanded=demanded)

    @staticmethod
    def asked(request: FetchRequest) -> Neighbour | None:
        """The neighbour that the request went to, None where it went elsewhere."""
        return request.source if isinstance(request.source, Neighbour) else None

    def gave(self, request: FetchRequest, length: int) -> bool:
        """A chunk came, and is what it should be. Whether it came from a neighbour."""
        source = self.asked(request)
        if source is not None:
            self._neighbours.gave(source.host)
            self.taken_bytes += length
        return source is not None

    def failed(self, source: Neighbour, follow: Follow, chunk: int, error: InstantStartError) -> None:
        """It did not give a chunk: another neighbour, or the tier, is asked for it."""
        now, host, line = trio.current_time(), source.host, follow.line
        if isinstance(error, OriginNotFound):
            reason = "nothing"
            self._neighbours.has_nothing(host, follow.slot, now)
            line.tried[chunk] = line.tried.get(chunk, 0) + 1
        else:
            line.tried[chunk] = rack.MOST_NEIGHBOURS_ASKED
            if isinstance(error, OriginThrottled):
                reason = "busy"
            elif isinstance(error, OriginMisbehaved) and error.fault not in (Fault.CUT, Fault.ANSWER):
                reason = "wrong"
                self._neighbours.lied(host, now)
                log.error(
                    "the neighbour %s gave wrong bytes and is not asked for %d minutes: %s",
                    *(host, rack.WRONG_SECONDS // 60, error.message),
                    extra={"pipeline": follow.key.pipeline},
                )
            else:
                reason = "failed"
                if self._neighbours.failed(host, now):
                    log.warning("the neighbour %s is left alone for a while: %s", host, error.message)
        self.fallbacks[reason] += 1
