"""The end of a fill: seals a file whose bytes are all there and proven, poisons one whose digest does not match, and
fetches again what a failed sync may have lost. When bytes become durable is the committer's (filler/committer.py).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.errors import DigestMismatch, InstantStartError, StoreFull
from instantstart_fs.filler.committer import CommitEvents, Committer
from instantstart_fs.filler.delivery import Delivery
from instantstart_fs.filler.events import FillEvents
from instantstart_fs.filler.fill import Fill
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.quarantine import Quarantine, etag_hint
from instantstart_fs.filler.settings import FillSettings
from instantstart_fs.filler.space import SpaceRequests
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey, FileState, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.store.blobstore import BlobStore

if TYPE_CHECKING:
    from instantstart_fs.filler.regional import Regional

log = logging.getLogger(__name__)


class Completion(CommitEvents):
    """Ends fills, on the trio thread.

    It has more than 8 collaborators, because the end of a fill touches the plan, the worker, the index and the library
    in one order, which must not be spread over several classes.
    """

    def __init__(
        self,
        store: BlobStore,
        index: Index,
        settings: FillSettings,
        events: FillEvents,
        *,
        plan: FillPlan[FileKey],
        table: FillTable,
        delivery: Delivery,
        origin_backoff: OriginBackoff,
        quarantine: Quarantine,
        space: SpaceRequests,
    ) -> None:
        self._events = events
        self._plan = plan
        self._table = table
        self._delivery = delivery
        self._origin_backoff = origin_backoff
        self._quarantine = quarantine
        self._space = space
        self.committer = Committer(store, index, settings.commit_bytes, settings.commit_seconds, self)
        self.regional: Regional | None = None
        self.poisoned = 0
        """Digest mismatches since the start."""

    def check(self, fill: Fill) -> None:
        """Seal the file if it is complete and proven; have it hashed if only that is missing."""
        target = fill.target
        if fill.done or fill.sealing or not target.present.complete:
            return
        digest = target.entry.file.digest
        if digest is None:
            if target.blob is None:
                self._delivery.schedule_open(fill)
                return
            fill.sealing = True
            self._delivery.close_in_worker(fill)
            self.committer.seal(target, "unverified")
        elif fill.proven_by:
            fill.sealing = True
            self._delivery.close_in_worker(fill)
            target.proven_by = fill.proven_by
            self.committer.seal(target, "sealed")
        elif fill.hashed is None:
            if fill.unhashed:  # a chunk came from elsewhere: the file is hashed after all
                fill.unhashed = False
                self._delivery.close_in_worker(fill)
            if fill.worker is None:
                self._delivery.schedule_open(fill)
        elif fill.hashed == digest.value:
            fill.sealing = True
            self._delivery.close_in_worker(fill)
            self.committer.seal(target, "sealed")
        else:
            self._poison(fill, fill.hashed)

    def _poison(self, fill: Fill, found: str) -> None:
        target = fill.target
        key = target.key
        digest = target.entry.file.digest
        assert digest is not None
        error = DigestMismatch(
            f"{target.entry.path}: the bytes that came have {digest.algorithm} {found}, the manifest says "
            f"{digest.value}{etag_hint(target.entry.file)}"
        )
        log.error("%s", error.message, extra={"pipeline": key.pipeline})
        self.poisoned += 1
        self._quarantine.mismatch(key, trio.current_time())
        self._table.leave(fill)
        target.state = FileState.POISONED
        target.fail(error)
        if self.regional is not None:
            self.regional.poisoned(target)
        self.committer.poison(target)

    def hash_failed(self, fill: Fill, error: InstantStartError) -> None:
        """Handle stored bytes that cannot be read back: fetch again what is not durable, once; then give up."""
        fill.hash_failures += 1
        if fill.hash_failures > 1:
            self._table.fail(fill, error)
        else:
            self.on_lost(fill.target, error)

    # -- what the committer reports --------------------------------------------------------------------------------

    def on_sealed(self, target: FillTarget) -> None:
        fill = self._table.find(target)
        if fill is not None:
            self._table.leave(fill)
        for chunk in target.present.missing():
            target.present.add(chunk)
        target.error = None
        self._quarantine.proven(target.key)
        target.wake()
        if self.regional is not None:
            digest = target.entry.file.digest
            self.regional.sealed(target, "" if target.proven_by else str(digest or "size"))
        self._events.target_sealed(target)

    def on_poisoned(self, target: FillTarget) -> None:
        assert target.error is not None
        self._events.target_poisoned(target, target.error)

    def on_lost(self, target: FillTarget, error: InstantStartError) -> None:
        log.error(
            "%s: what was written may be lost, and is fetched again: %s",
            target.entry.path,
            error.message,
            extra={"pipeline": target.key.pipeline},
        )
        target.losses += 1
        for chunk in range(target.present.chunks):
            if chunk in target.present and chunk not in target.durable:
                target.present.discard(chunk)
        fill = self._table.find(target)
        if fill is None:
            return
        self.committer.discard_dirty(target)
        fill.proven_by = target.proven_by = ""  # what comes now may come from elsewhere: it is hashed here
        fill.sealing = False
        for request in list(fill.requests):
            self._delivery.finish(request)
            for key in self._table.keys(target.key):
                self._plan.failed(key, request.chunk)
        fill.unsent.clear()
        self._table.stream_ended(fill)
        self._delivery.close_in_worker(fill)  # its hash covers bytes that will be written again
        self._plan.refill(target.key)
        self._table.demand_again(target)
        target.error = error
        self._events.failure(target, error)
        self._origin_backoff.hold(fill)
        if isinstance(error, StoreFull):
            self._space.store_full(fill, error)
        self.check(fill)
        self._table.wakeup.set()

    def on_stuck(self, targets: list[FillTarget], error: InstantStartError | None) -> None:
        for target in targets:
            target.error = error
            self._events.failure(target, error)
        self._table.wakeup.set()
