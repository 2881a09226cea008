"""Decides what a caller of the control socket may do, and limits how much of the loop's time it may cost.

Root, the daemon's own user and members of the configured group administer. The owner of a pipeline (its uid; with
``group_access`` its group, too) may see, touch, lease, warm and mark it. Users who may read its files in the mount, by
owner, group and mode, may open it. All others are refused. Callers that do not administer have an allowance of
requests and connections. All callers who own nothing share one, so that no local user can keep the loop busy.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import trio

from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control.parts import Pipelines
from instantstart_fs.control.protocol import (
    AskRegion,
    CheckOrigins,
    ColdStarts,
    Include,
    Lease,
    Ls,
    Mark,
    Names,
    Open,
    Ping,
    Request,
    StartupBegin,
    StartupCaches,
    StartupRemove,
    StartupReport,
    StartupSave,
    StartupVerify,
    Status,
    Touch,
    Warm,
)
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.core.seats import Seat, Seats
from instantstart_fs.core.sight import EVERYTHING, Sight
from instantstart_fs.core.weights import may_read
from instantstart_fs.errors import PermissionRefused, PipelineBusy

MAX_CONNECTIONS = 256
"""Leases and waits are few; beyond this a client is told to come again rather than the daemon to run out of files."""
MAX_WAITING = 1024
SEAT_DEADLINE = 15.0
"""How many more administrators may wait for one of the MAX_CONNECTIONS to end, and for how many seconds."""
MAX_CONNECTIONS_PER_OWNER = 32
"""The most connections of each user who does not administer: none of them can use up the others' share."""
MAX_STRANGERS = 128
"""The most connections of all together who own nothing, with any number of uids. Owners, and those who administer, have
places of their own."""
MAX_KNOWN = 4096
IDLE_SECONDS = 60.0
"""Seconds for which a connection of somebody who does not administer may be without a request."""
REQUEST_RATE = 20.0
REQUEST_BURST = 40.0
"""Requests a second, and the burst after a rest: of one owner, or of all who own nothing together. Beyond it answers
wait. A request costs the loop up to a millisecond (Ls of an owner with many pipelines), so some percent of it at
most."""
STRANGERS = -1
"""Stands for the uid of all who own nothing. A user may have 65,536 subordinate uids."""
MAX_ALLOWANCES = 4096
OWNERS_REFRESH = 1.0
"""Seconds for which the set of owners is kept: computing it walks over all pipelines."""


OF_OWNERS = (
    *(AskRegion, Status, Touch, Lease, Warm, Include, Mark, ColdStarts),
    *(StartupBegin, StartupSave, StartupReport, StartupCaches, StartupVerify, StartupRemove),
)
"""The requests that a pipeline's owner may make. A startup cache is code: serving/startupcaches.py gives it to nobody
else."""


class Place:
    """The place of one connection. ``refusal`` says why it has none; ``patience`` is the seconds for which it may be
    idle."""

    def __init__(self, seat: Seat | None, patience: float, refusal: PipelineBusy | None = None) -> None:
        self._seat = seat
        self.patience = patience
        self.refusal = refusal

    @property
    def seat(self) -> Seat:
        """The seat that the connection holds. A refused connection has none."""
        assert self._seat is not None
        return self._seat

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the connection's place inside the block, from a whole request to its answer."""
        self.seat.at_work()
        try:
            yield
        finally:
            self.seat.idle(trio.current_time())


class Callers:
    """The callers and what they use. Owned by the ControlServer; on the trio thread. Members of ``group``
    administer."""

    def __init__(self, pipelines: Pipelines, *, group: int | None = None, group_access: bool = False) -> None:
        self._pipelines = pipelines
        self._group = group
        self._group_access = group_access
        self._administrators, self._owners_seats, self._strangers = Seats(), Seats(), Seats()
        self._scopes: dict[Seat, trio.CancelScope] = {}
        self._waiting: dict[int, trio.lowlevel.ParkingLot] = {}
        self._allowances: dict[int, Bucket] = {}
        self._owners: frozenset[tuple[int, int]] = frozenset()
        self._owners_at = -OWNERS_REFRESH

    # -- what they may ---------------------------------------------------------------------------------------------

    def administers(self, peer: Peer) -> bool:
        return self.sight(peer.uid, peer.groups).everything

    def owns(self, peer: Peer, spec: PipelineSpec) -> bool:
        return self.sight(peer.uid, peer.groups).owns(spec)

    def oversees(self, peer: Peer, spec: PipelineSpec) -> bool:
        """Return whether the peer administers, or owns the pipeline."""
        return self.administers(peer) or self.owns(peer, spec)

    def sight(self, uid: int | None, groups: frozenset[int] | None) -> Sight:
        """Return what a caller may see; ``caller`` is None if the kernel does not name it."""
        administers = uid in (0, os.geteuid()) or (self._group is not None and self._group in (groups or ()))
        return EVERYTHING if administers else Sight(False, uid, groups, self._group_access)

    def authorize(self, peer: Peer, request: Request) -> None:
        """Check that the peer may make the request. Raises PermissionRefused. That a pipeline exists is no secret: the
        mount lists it."""
        if self.administers(peer) or isinstance(request, Ping | Ls | Names | CheckOrigins):
            return
        if isinstance(request, OF_OWNERS) and self.owns(peer, self._pipelines.spec(request.pipeline)):
            return
        if isinstance(request, Open):
            spec = self._pipelines.spec(request.pipeline)
            if _may_read(peer, spec):
                return
            raise PermissionRefused(
                f"uid {peer.uid} may not open {request.pipeline}, whose files belong to {spec.uid}:{spec.gid} "
                f"with mode {spec.mode:04o}"
            )
        self.must_administer(peer, type(request))

    def must_administer(self, peer: Peer, kind: type[Request]) -> None:
        """Check that the peer administers. Raises PermissionRefused, whatever a request of that ``kind`` says."""
        if not self.administers(peer):
            raise PermissionRefused(
                f"uid {peer.uid} may not {kind.__name__.lower()} here; ask as root, as the daemon's user, "
                "or, for status, touch, lease, warm, mark and explain, as the pipeline's owner"
            )

    def _is_owner(self, peer: Peer, uid: int, gid: int) -> bool:
        return uid == peer.uid or (self._group_access and gid in peer.groups)

    # -- how much --------------------------------------------------------------------------------------------------

    async def wait_for_seat(self, peer: Peer) -> None:
        """Wait until an administrator's connection has a seat, at most SEAT_DEADLINE. Call it before ``connected``.

        Hundreds of administrators at once are a fleet's scripts, and each is soon done.
        """
        if not self.administers(peer):
            return
        waiting = self._waiting.setdefault(peer.uid, trio.lowlevel.ParkingLot())
        with trio.move_on_after(SEAT_DEADLINE):
            while self._administrators.taken(peer.uid) >= MAX_CONNECTIONS and len(waiting) < MAX_WAITING:
                await waiting.park()

    @contextlib.contextmanager
    def connected(self, peer: Peer) -> Iterator[Place]:
        """Hold a place for a connection inside the block. A refused one is told why; an idle one may be closed for
        others."""
        administers, share = self.administers(peer), self._share(peer)
        known = not administers and share == peer.uid
        seats = self._administrators if administers else self._owners_seats if known else self._strangers
        each = MAX_CONNECTIONS if administers else MAX_CONNECTIONS_PER_OWNER
        total = MAX_STRANGERS if seats is self._strangers else MAX_KNOWN
        seat, leaves = seats.enter(peer.uid, trio.current_time(), each=each, total=total)
        if leaves is not None:
            self._scopes[leaves].cancel()
        if not isinstance(seat, Seat):
            reason = (
                f"uid {peer.uid} has {each} control connections open already, all of them at work"
                if seat == "share"
                else f"{total} control connections of other users are open, all of them at work; try again"
            )
            yield Place(None, math.inf, PipelineBusy(reason))
            return
        try:
            with trio.CancelScope() as self._scopes[seat]:
                yield Place(seat, math.inf if administers else IDLE_SECONDS)
        finally:
            del self._scopes[seat]
            seats.leave(seat)
            if peer.uid in self._waiting:
                self._waiting[peer.uid].unpark()

    async def wait_turn(self, peer: Peer) -> None:
        """Wait for this peer's turn to make a request. Administrators do not wait, others at most connections ÷
        REQUEST_RATE seconds."""
        if self.administers(peer):
            return
        share = self._share(peer)
        now = trio.current_time()
        if share not in self._allowances:
            if len(self._allowances) >= MAX_ALLOWANCES:  # who rested long has a full one, as a new one is
                self._allowances.pop(next(iter(self._allowances)))
            self._allowances[share] = Bucket(REQUEST_RATE, REQUEST_BURST, now)
        await trio.sleep(self._allowances[share].take(now))

    def _share(self, peer: Peer) -> int:
        """Return whose allowance this peer draws on: its uid's own, or that of the STRANGERS."""
        if self.administers(peer):
            return peer.uid
        if trio.current_time() >= self._owners_at + OWNERS_REFRESH:
            self._owners, self._owners_at = self._pipelines.owners(), trio.current_time()
        known = any(self._is_owner(peer, uid, gid) for uid, gid in self._owners)
        return peer.uid if known else STRANGERS


def _may_read(peer: Peer, spec: PipelineSpec) -> bool:
    return may_read(peer.uid, peer.groups, owner=spec.uid, group=spec.gid, mode=spec.mode)
