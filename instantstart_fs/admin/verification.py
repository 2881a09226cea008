"""Verifies a pipeline by hand: reads every complete file again and compares its digest."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.errors import StoreDamaged
from instantstart_fs.serving.reads import Reads
from instantstart_fs.upkeep.rehash import Pace, rehash


class VerifyReport(msgspec.Struct, frozen=True):
    """``files`` and ``bytes`` that were read. ``healed``: paths that were wrong and are fetched again. ``unproven``:
    paths that have no digest."""

    files: int
    bytes: int
    healed: tuple[str, ...]
    unproven: tuple[str, ...]


class Verifier:
    """Owned by the Library."""

    def __init__(self, catalog: Catalog, reads: Reads) -> None:
        self._catalog = catalog
        self._reads = reads

    async def verify(
        self, pipeline_id: str, progress: Callable[[int, int], None], rate: float | None = None
    ) -> VerifyReport:
        """Verify the pipeline; fetch again what is wrong.

        Reads go past the page cache, at most ``rate`` bytes per second. ``progress(bytes done, bytes in all)`` is
        called on the trio thread.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        generation = await self._catalog.ensure_loaded(pipeline)
        if generation is None:
            raise pipeline.failure.error if pipeline.failure else StoreDamaged(f"{pipeline_id} has no manifest")
        files = [file for file in generation.files if file.complete]
        total, done, healed, unproven = sum(file.size for file in files), 0, [], []
        pace = Pace(rate)
        with self._reads.using(generation):
            for file in files:
                if file.entry.file.digest is None:
                    unproven.append(file.entry.path)
                began = done

                def read(count: int) -> None:
                    nonlocal done
                    done += count
                    progress(done, total)

                problem = await rehash(self._catalog.store, file, pace.wait, read)
                done = began + file.size
                progress(done, total)
                if problem is not None and self._catalog.file(file.key) is file:
                    healed.append(file.entry.path)
                    await self._reads.replace_damaged(file, problem, wanted=True, found_by="verify")
        return VerifyReport(files=len(files), bytes=total, healed=tuple(healed), unproven=tuple(unproven))
