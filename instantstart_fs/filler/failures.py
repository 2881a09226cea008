"""Decides what a failed request means for its file: ask for a fresh address, back off, use the next source, wait for
space, or fail the file. core/faults.py decides which failures are final, and after how many; filler/origin_backoff.py
has backoff and breakers."""

from __future__ import annotations

import trio

from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.errors import (
    AccessRefused,
    InstantStartError,
    LocationExpired,
    OriginIncompatible,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OutOfResources,
    StoreError,
    StoreFull,
)
from instantstart_fs.filler.breakers import host_of
from instantstart_fs.filler.events import FillEvents
from instantstart_fs.filler.fill import FetchRequest, Fill
from instantstart_fs.filler.origin_backoff import OriginBackoff
from instantstart_fs.filler.quarantine import Quarantine
from instantstart_fs.filler.sources import Locator
from instantstart_fs.filler.space import SpaceRequests
from instantstart_fs.filler.table import FillTable
from instantstart_fs.filler.target import FileKey


class FailurePolicy:
    """Draws the consequences of failed requests, on the trio thread."""

    def __init__(
        self,
        events: FillEvents,
        plan: FillPlan[FileKey],
        table: FillTable,
        origin_backoff: OriginBackoff,
        locator: Locator,
        quarantine: Quarantine,
        space: SpaceRequests,
    ) -> None:
        self._events = events
        self._plan = plan
        self._table = table
        self._origin_backoff = origin_backoff
        self._locator = locator
        self._quarantine = quarantine
        self._space = space

    def apply(self, request: FetchRequest, error: InstantStartError, silent: float, *, counts: bool) -> None:
        """Draw the consequences of a failed request, which is over already.

        Args:
            request: The request.
            error: Its failure.
            silent: Seconds without a byte before it failed.
            counts: False for the others of a batch that failed for one and the same reason.
        """
        fill = request.fill
        target = fill.target
        key, now = target.key, trio.current_time()
        current = request.location_epoch == fill.location_epoch
        if not current and not isinstance(error, StoreError):
            # Of a link or an address that was given up meanwhile: it says nothing about the present one.
            return self._requeue(request)
        if self._foreseen_wrongly(fill, error):
            return self._requeue(request)
        if current:
            target.error = error
            if not isinstance(error, OriginIncompatible):  # that is final, and reported as such
                self._events.failure(target, error)
        final: InstantStartError | None = None
        suspect = False
        match error:
            case LocationExpired():
                # Somebody on the way refuses. Only the source can refuse access, when asked for a fresh address.
                fill.discard_location()
                fill.stale += 1
                if fill.stale > 1:
                    if self._origin_backoff.next_link(fill):
                        return self._requeue(request)
                    self._origin_backoff.hold(fill)
            case AccessRefused() if fill.location is not None and fill.refused == 0:
                # The service's own word about one address: credentials are replaced under a running daemon.
                fill.discard_location()
                fill.refused += 1
            case OriginNotFound():
                fill.discard_location()
                fill.missing += 1
                if fill.missing > 1:
                    final = error
            case OriginThrottled():
                self._origin_backoff.throttled(fill, error, now)
            case OriginMisbehaved():
                if self._origin_backoff.next_link(fill):
                    return self._requeue(request)
                final = fill.streak.failed(error)
                fill.discard_location()  # others of the same burst add nothing
                self._origin_backoff.hold(fill)
                suspect = True
            case OriginUnavailable():
                if self._origin_backoff.next_link(fill):
                    return self._requeue(request)
                if counts:
                    source = request.source.key
                    self._origin_backoff.origin_failed(source, host_of(source, request.url), key, silent, error)
                self._origin_backoff.hold(fill)
                suspect = True
            case OutOfResources():
                self._origin_backoff.hold(fill)  # it passes; the file is unchanged
            case StoreFull():
                self._plan.failed(key, request.chunk)
                self._space.store_full(fill, error)
                return None
            case _:
                final = error
        if final is not None and not isinstance(final, StoreError) and self._origin_backoff.next_link(fill):
            final = None
        if final is not None:
            if isinstance(final, OriginIncompatible):
                self._quarantine.refuse(key, final)
            self._table.fail(fill, final)
        else:
            self._requeue(request, suspect=suspect)
        return None

    def _foreseen_wrongly(self, fill: Fill, error: InstantStartError) -> bool:
        """Return whether the error is the answer of a foreseen address. Only the origin can say what that means, so it
        is asked."""
        if fill.location is None or not fill.location.foreseen or isinstance(error, OriginThrottled | StoreError):
            return False
        if isinstance(error, OriginUnavailable) and not isinstance(error, OriginMisbehaved | LocationExpired):
            return False
        self._locator.foresaw(fill.source.key, fill.target.key.pipeline, rightly=False)
        fill.may_foresee = False
        fill.discard_location()
        return True

    def _requeue(self, request: FetchRequest, *, suspect: bool = False) -> None:
        fill = request.fill
        self._plan.failed(fill.target.key, request.chunk, held_until=fill.held_until, suspect=suspect)
        if not fill.done:
            self._origin_backoff.sync_breaker(fill)
        self._table.wakeup.set()
