"""Keeps bind mounts away from files while they change.

Bind mounts over the FUSE mount (mount/bind.py) show the store's files directly. Whatever changes a complete file
(update, evict, remove, a damaged file) does so inside ``withdrawn``, so that no bind mount shows stale bytes. Which
files may be bound is decided in serving/bindings.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from instantstart_fs.errors import PipelineBusy

BUSY_SECONDS = 30.0
"""Seconds for which the evictor treats a pipeline as open after it was found open. Only an attempt to unmount shows
that, and each attempt withdraws the bind mounts for a moment."""

Withdraw = Callable[[str, bool], Awaitable[None]]
"""A function that unmounts the bind mounts of a pipeline. Arguments: the pipeline, and whether to do so only if nobody
has its files open. Raises PipelineBusy, MountFailed."""


class BindGate:
    """The gate between changes of files and their bind mounts. Without an attached binder there are no bind mounts, and
    nothing to withdraw. Use it on the trio thread."""

    def __init__(self) -> None:
        self._withdraw: Withdraw | None = None
        self._withdrawn: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._wake = trio.Event()
        self._busy_until: dict[str, float] = {}

    @asynccontextmanager
    async def withdrawn(self, pipeline: str, *, idle_only: bool = False) -> AsyncIterator[None]:
        """Keep the pipeline's files free of bind mounts inside the block. Raises PipelineBusy (with ``idle_only``, when
        a file is open) and MountFailed; nothing has changed then."""
        self._withdrawn[pipeline] += 1
        try:
            if self._withdraw is not None:
                try:
                    await self._withdraw(pipeline, idle_only)
                except PipelineBusy:
                    self._busy_until[pipeline] = trio.current_time() + BUSY_SECONDS
                    raise
            yield
        finally:
            self._withdrawn[pipeline] -= 1
            self.wake(pipeline)

    def is_withdrawn(self, pipeline: str) -> bool:
        return self._withdrawn[pipeline] > 0

    def recently_busy(self, pipeline: str) -> bool:
        """Whether a bound file of it was found open less than BUSY_SECONDS ago."""
        until = self._busy_until.get(pipeline)
        if until is not None and until < trio.current_time():
            del self._busy_until[pipeline]
            return False
        return until is not None

    def attach(self, withdraw: Withdraw | None) -> None:
        """Connect the binder; None disconnects it."""
        self._withdraw = withdraw

    def wake(self, pipeline: str) -> None:
        """Report that the set of files that may be bound has changed."""
        if self._withdraw is not None:
            self._changed.add(pipeline)
            self._wake.set()

    async def wait_changed(self, timeout: float) -> set[str]:
        """Return the pipelines reported since the last call; empty after ``timeout`` seconds without any."""
        with trio.move_on_after(timeout):
            await self._wake.wait()
        self._wake = trio.Event()
        changed, self._changed = self._changed, set()
        return changed
