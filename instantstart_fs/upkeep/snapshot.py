"""Takes the summary of the whole store that the page and the metrics show, and checks that the store can be written."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.store.tree import REMOVED
from instantstart_fs.telemetry.telemetry import Telemetry
from instantstart_fs.upkeep.access_recheck import Rechecker
from instantstart_fs.upkeep.inventory import Inventory
from instantstart_fs.upkeep.scrub import Scrubber
from instantstart_fs.views.pipelines import Pipelines
from instantstart_fs.views.store_summary import RegionSummary, ScrubSummary, StoreSummary, StoreSummaryBuilder

log = logging.getLogger(__name__)


class Snapshots:
    """Makes snapshots of the daemon's state. Use it on the trio thread."""

    def __init__(
        self,
        catalog: Catalog,
        pipelines: Pipelines,
        inventory: Inventory,
        telemetry: Telemetry,
        scrubber: Scrubber | None,
        rechecker: Rechecker | None,
        region: Callable[[], RegionSummary | None],
    ) -> None:
        self._catalog = catalog
        self._pipelines = pipelines
        self._inventory = inventory
        self._telemetry = telemetry
        self._scrubber = scrubber
        self._rechecker = rechecker
        self._region = region
        self._removal_logged = False

    async def store_summary(self) -> StoreSummary:
        """Walks over all pipelines, and lets other tasks run in between."""
        catalog, scrubber, rechecker = self._catalog, self._scrubber, self._rechecker
        builder = StoreSummaryBuilder(self._inventory.budget(), catalog.now_ns(), len(catalog.nodes))
        for pipeline in list(catalog.pipelines.values()):
            if not pipeline.removed:
                builder.add(self._pipelines.status_of(pipeline), self._inventory.candidate(pipeline))
            if builder.wants_a_pause:
                await trio.lowlevel.checkpoint()
        scrub = None if scrubber is None else ScrubSummary(scrubber.overdue(), scrubber.resting)
        access = None if rechecker is None else rechecker.verdicts()
        latest = self._telemetry.latest(builder.COLD_STARTS)
        found = (self._telemetry.spread(name) for name in dict.fromkeys(record.pipeline for record in latest))
        spreads = [spread for spread in found if spread is not None]
        return builder.build(latest, scrub, access, spreads, self._region())

    async def prove_index_writable(self) -> None:
        """Write to the index. Raises StoreError if that fails."""
        await self._catalog.index.write(lambda txn: txn.prove_writable(self._catalog.now_ns()))

    def store_problem(self) -> str | None:
        """Return what is wrong with the store's directory, None if nothing is; logged once."""
        store = self._catalog.store
        if not store.tree.removed():
            return None
        if not self._removal_logged:
            self._removal_logged = True
            log.error("the store %s: %s", store.root, REMOVED)
        return "removed"
