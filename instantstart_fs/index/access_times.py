"""AccessTimes: when each pipeline was last requested and each file last read. In memory at once, in the index every few
seconds. It decides nothing: eviction and ``stat`` read it.

On the trio thread. A crash loses at most ``interval`` seconds of times, which only eviction's order depends on. A time
is a reading of the wall clock in ns; one in the future (the clock was set back) counts as now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from instantstart_fs.errors import StoreError
from instantstart_fs.index.environment import Index
from instantstart_fs.index.transactions import WriteTxn

logger = logging.getLogger(__name__)

MOST_STORED = 50_000
"""Times cached beside the index, some 10 MB."""

FileTuple = tuple[str, int, int]
"""(pipeline, generation, index in the manifest)"""


def clamp(stored_ns: int, now_ns: int) -> int:
    """A stored time as it counts now."""
    return min(stored_ns, now_ns)


class AccessTimes:
    """Keeps when pipelines and files were last used. ``interval``: seconds between two writes. ``clock``: the wall
    clock, ns."""

    def __init__(self, index: Index, interval: float = 2.0, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._index = index
        self._interval = interval
        self._clock = clock
        self._requests = index.read(lambda txn: txn.last_requests())
        self._dirty_requests: set[str] = set()
        self._reads: dict[FileTuple, int] = {}
        self._writing: dict[FileTuple, int] = {}
        self._stored: dict[FileTuple, int | None] = {}
        """Times read from the index: a lookup there takes as long as the rest of a file's attributes."""
        self._wake = trio.Event()
        self._failing = False

    def record_request(self, pipeline: str, now_ns: int) -> None:
        """Note a request of ``pipeline``. Cheap: called for every open of a weight file."""
        self._requests[pipeline] = now_ns
        self._dirty_requests.add(pipeline)
        self._wake.set()

    def record_read(self, pipeline: str, generation: int, index: int, now_ns: int) -> None:
        """Note a read of a file. Cheap: called for every read."""
        self._reads[pipeline, generation, index] = now_ns
        if not self._wake.is_set():
            self._wake.set()

    def forget(self, pipeline: str) -> None:
        """Drop all times of a pipeline that was removed."""
        self._requests.pop(pipeline, None)
        self._dirty_requests.discard(pipeline)
        for times in (self._reads, self._stored):
            for file in [file for file in times if file[0] == pipeline]:
                del times[file]

    def clock_was_set(self) -> None:
        """Move requests that now lie in the future to now: otherwise they would count for an unknown time."""
        now = self._clock()
        for pipeline in [pipeline for pipeline, at_ns in self._requests.items() if at_ns > now]:
            self.record_request(pipeline, now)

    def last_request(self, pipeline: str) -> int | None:
        """Return when the pipeline was last requested, ns; None if never."""
        stored = self._requests.get(pipeline)
        return None if stored is None else clamp(stored, self._clock())

    def last_access(self, pipeline: str, generation: int, index: int) -> int | None:
        """Return when the file was last read, ns; None if never. The answer comes from memory, or from a lookup in the
        mapped index (microseconds)."""
        file = (pipeline, generation, index)
        stored = self._reads.get(file, self._writing.get(file))
        if stored is None:
            if file in self._stored:
                stored = self._stored[file]
            else:
                stored = self._index.read(lambda txn: txn.last_access(pipeline, generation, index))
                if len(self._stored) >= MOST_STORED:
                    self._stored.clear()
                self._stored[file] = stored
        return None if stored is None else clamp(stored, self._clock())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what was recorded every ``interval`` seconds until cancelled, then once more. A failure is logged once
        and tried again: losing times is no reason to stop the daemon."""
        task_status.started()
        try:
            while True:
                await self._wake.wait()
                await trio.sleep(self._interval)
                await self._flush_or_log()
        finally:
            with trio.move_on_after(self._interval + 5, shield=True):
                await self._flush_or_log()

    async def _flush_or_log(self) -> None:
        try:
            await self.flush()
        except StoreError as error:
            if not self._failing:
                logger.warning("last-access times cannot be written, trying on: %s", error)
            self._failing = True
        else:
            self._failing = False

    async def flush(self) -> None:
        """Make everything recorded so far durable. Raises StoreError; what was not written is written next time."""
        if self._wake.is_set():
            self._wake = trio.Event()
        requests = {pipeline: self._requests[pipeline] for pipeline in self._dirty_requests}
        reads, self._reads = self._reads, {}
        if not requests and not reads:
            return
        self._dirty_requests = set()
        self._writing = reads
        try:
            await self._index.write(lambda txn: _write_times(txn, requests, reads))
        except BaseException:
            self._dirty_requests.update(requests.keys() & self._requests.keys())
            self._reads = {**reads, **self._reads}
            self._wake.set()
            raise
        else:
            self._stored.update((file, at_ns) for file, at_ns in reads.items() if file in self._stored)
        finally:
            self._writing = {}


def _write_times(txn: WriteTxn, requests: dict[str, int], reads: dict[FileTuple, int]) -> None:
    """Write times, except those of pipelines and generations that were removed meanwhile."""
    for pipeline, at_ns in requests.items():
        if txn.get_pipeline(pipeline) is not None:
            txn.put_last_request(pipeline, at_ns)
    known: dict[tuple[str, int], bool] = {}
    for (pipeline, generation, index), at_ns in reads.items():
        where = (pipeline, generation)
        if where not in known:
            known[where] = txn.get_generation(pipeline, generation) is not None
        if known[where]:
            txn.put_last_access(pipeline, generation, index, at_ns)
