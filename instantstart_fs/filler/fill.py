"""The filler's working state of one file (Fill) and of one request for a chunk of it (FetchRequest). Bookkeeping
only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instantstart_fs.core.faults import Streak

if TYPE_CHECKING:
    from instantstart_fs.filler.messages import Piece
    from instantstart_fs.filler.pool import Worker
    from instantstart_fs.filler.sources import Source
    from instantstart_fs.filler.target import FillTarget
    from instantstart_fs.origins.base import Location


class FetchRequest:
    """A request for one chunk, from dispatch until it arrives, fails or is given up.

    ``source``, ``url``, ``location_epoch``: where it was sent, set again when it is handed to ``worker``; ``url`` is
    None while no address is known. ``counted``: bytes that the rate already includes. ``answered``: seconds until its
    answer began.
    """

    __slots__ = (
        "answered",
        "chunk",
        "counted",
        "demand",
        "digest",
        "fill",
        "location_epoch",
        "number",
        "piece",
        "source",
        "url",
        "worker",
    )

    def __init__(self, number: int, fill: Fill, chunk: int, demand: bool) -> None:
        self.number = number
        self.fill = fill
        self.chunk = chunk
        self.demand = demand
        self.source: Source = fill.source
        self.piece: Piece | None = None
        """The part that a regional tier is asked for; None if the request goes to the chain of sources."""
        self.digest = b""
        self.worker: Worker | None = None
        self.counted = 0
        self.answered: float | None = None
        self.location_epoch = 0
        self.url: str | None = None


class Fill:
    """A target that is being filled. ``file``: its number at ``worker``, 0 = not open there."""

    def __init__(self, target: FillTarget, links: tuple[Source, ...]) -> None:
        self.target = target
        self.links = links
        self.link = 0
        self.location: Location | None = None
        self.location_epoch = 0
        """Counts the locations, so that a late failure of an old one does not discard the new one."""
        self.may_foresee = True
        """Whether an address may be foreseen. False once the file was not at its foreseen address."""
        self.worker: Worker | None = None
        self.file = 0
        self.preparing = False
        self.unsent: list[FetchRequest] = []
        """Requests that wait for the blob, a location or a worker."""
        self.requests: set[FetchRequest] = set()
        """All requests, the unsent ones included."""
        self.failures = 0
        self.slow = False
        """A request was preempted since a chunk last arrived."""
        self.held_until = 0.0
        self.refused = 0
        """Refusals in a row by the source itself."""
        self.stale = 0
        """Refusals in a row of an address by another party (a CDN, a proxy)."""
        self.missing = 0
        self.streak = Streak()
        self.streaming = False
        """Whether one request takes the whole file (the server ignores ranges), so that no other is sent meanwhile."""
        self.hash_failures = 0
        self.hashed: str | None = None
        self.sealing = False
        self.regional = True
        """The regional tier may be asked for it."""
        self.unhashed = False
        """The region's seal is to prove it: its worker does not hash the file."""
        self.proven_by = ""
        """The source of the proof, once every chunk is what the region's seal says: "region:" and the sealing host."""
        self.done = False

    def discard_location(self) -> None:
        """Ask for another location before the next fetch."""
        self.location = None
        self.location_epoch += 1

    @property
    def source(self) -> Source:
        """The link of the chain of sources that is asked now."""
        return self.links[self.link]
