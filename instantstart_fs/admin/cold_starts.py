"""Marks, starts and records of cold starts, by the name of their pipeline. The records are kept by telemetry.py."""

from __future__ import annotations

import secrets

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.core.coldstart import ColdStart, Moment
from instantstart_fs.telemetry.telemetry import Telemetry


class ColdStarts:
    """Cold starts as the control socket asks for them; on the trio thread."""

    def __init__(self, catalog: Catalog, telemetry: Telemetry) -> None:
        self._catalog = catalog
        self._telemetry = telemetry

    def mark(self, pipeline: str, moment: Moment, at_ns: int | None = None, start: str = "") -> None:
        """Record a moment of a cold start that a filesystem cannot see.

        Args:
            pipeline: its id.
            moment: which moment it is.
            at_ns: when, by the wall clock in nanoseconds; None for now.
            start: the id of the start; "" for the one that the time fits.

        Raises:
            PipelineNotFound, NoColdStart, UsageError (a time that cannot be meant).
        """
        self._telemetry.mark(self._catalog.pipeline(pipeline).id, moment, at_ns, start)

    async def begin(self, pipeline: str, start: str, requested_ns: int | None) -> str:
        """Begin a start for `run`, or go on with the one whose id is ``start``. Returns its id. Raises
        PipelineNotFound."""
        found = self._catalog.pipeline(pipeline)
        await self._catalog.ensure_loaded(found)
        self._catalog.pipeline(pipeline)
        if not start:
            start = secrets.token_hex(8)
            self._telemetry.begin_start(found, start, requested_ns)
        return start

    def report(self, pipeline: str, start: str, **changes: object) -> None:
        """Record what `run` says of its start. Raises PipelineNotFound, NoColdStart."""
        self._telemetry.report_start(self._catalog.pipeline(pipeline).id, start, **changes)

    def end(self, pipeline: str, start: str) -> None:
        """End a start whose `run` has disconnected."""
        self._telemetry.end_start(pipeline, start)

    def of(self, pipeline: str) -> list[ColdStart]:
        """Return the last records of a pipeline, newest first. Raises PipelineNotFound."""
        return self._telemetry.cold_starts(self._catalog.pipeline(pipeline).id)
