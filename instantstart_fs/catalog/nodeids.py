"""Hands out nodeids that were never used before and never will be again. Some are kept ready, for files that cannot
wait.
"""

from __future__ import annotations

from instantstart_fs.index.environment import Index

SPARE_NODEIDS = 4096
"""Reserved ahead, so that a poisoned file gets its new nodeid without waiting for the disk."""


class NodeidSupply:
    """The supply of unused nodeids. Use it on the trio thread, unless a method says otherwise."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._spare = range(0)

    def _reserve_now(self, count: int) -> int:
        return self._index.write_sync(lambda txn: txn.reserve_nodeids(count), patience=self._index.commit_deadline)

    async def reserve(self, count: int) -> int:
        """Return the first of ``count`` consecutive nodeids that were never used before and never will be again."""
        return await self._index.write(lambda txn: txn.reserve_nodeids(count))

    def fill(self) -> None:
        """Reserve a whole stock of spare nodeids. Blocks."""
        self._spare = _evens(self._reserve_now(SPARE_NODEIDS))

    async def top_up(self) -> None:
        """Reserve more nodeids for ``spare``. Raises StoreError; those that were left stay usable."""
        if len(self._spare) < SPARE_NODEIDS // 8:
            self._spare = _evens(await self.reserve(SPARE_NODEIDS))

    def spare(self) -> int:
        """Return one unused nodeid at once. It is even, so that its odd neighbour is free for the file's other I/O
        mode."""
        if len(self._spare) == 0:
            self.fill()
        nodeid, self._spare = self._spare[0], self._spare[1:]
        return nodeid


def _evens(first: int) -> range:
    """Return the even ones of SPARE_NODEIDS nodeids from ``first`` on."""
    return range(first + first % 2, first + SPARE_NODEIDS - 1, 2)
