"""The protocol of backends, and their common parts: a file to load, a queue of extents, a rate limit. It reads
nothing."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from instantstart_fs.prefetch.memory import Memfd
from instantstart_fs.prefetch.plan import EXTENT

Refusals = tuple[tuple[str, str], ...]
"""(backend, reason) of the refusals."""


class Item:
    """One file on its way: a value of nine fields without collaborators. ``target``: a writable memoryview, long
    enough for whole blocks (CPU), of ``memory``, or a uint8 tensor of ``size`` elements on the device. ``fds``: the
    file, and the same opened O_DIRECT; closed when all of it is there, or else with the last reference: a reader
    may be inside a call when its file is released. ``on_moved(item, cached, disk)`` and ``on_end(item, error |
    None)`` are called from the backend's threads; ``on_end`` once, and nothing after it."""

    def __init__(
        self,
        number: int,
        path: str,
        size: int,
        order: int,
        fds: tuple[int, int | None],
        target: Any,
        on_moved: Callable[[Item, int, int], None],
        on_end: Callable[[Item, Exception | None], None],
        memory: Memfd | None = None,
    ) -> None:
        self.number = number
        self.path = path
        self.size = size
        self.order = order
        self.plain: int = fds[0]
        self.direct: int | None = fds[1]
        self.target = target
        self.memory = memory
        self.failed = False
        self._left = size
        self._on_moved = on_moved
        self._on_end = on_end
        self._lock = threading.Lock()

    def moved(self, cached: int, disk: int) -> None:
        with self._lock:
            failed = self.failed
        if failed:
            return
        # Before it counts: the end, which another thread may tell, comes after all that was moved.
        self._on_moved(self, cached, disk)
        with self._lock:
            self._left -= cached + disk
            done = self._left == 0 and not self.failed
        if done:
            self._on_end(self, None)

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self.failed or self._left == 0:
                return
            self.failed = True
        self._on_end(self, error)

    def close(self) -> None:
        """Close its descriptors. Idempotent."""
        with self._lock:
            descriptors = [fd for fd in (self.plain, self.direct) if fd is not None]
            self.plain, self.direct = -1, None
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        self.close()


class Backend(Protocol):
    """The backend of a worker; its threads end with the process. ``name`` is shown in the table."""

    name: str

    def refusal(self) -> str | None:
        """Return why it cannot serve here; None if it can. Called first, once; it may set up what it needs."""
        ...

    streams: bool
    """Whether ``submit`` takes parts of a file."""

    def submit(self, item: Item, start: int = 0, end: int | None = None) -> None:
        """Bring in these bytes of it (None: to its end); lower ``order`` first, then lower ``start``. ``start`` is a
        multiple of BLOCK, ``end`` too, or the file's end. Returns at once. A file without bytes is not submitted."""
        ...


class Extents:
    """The extents that are still to be read, the lowest ``order`` first, then the lowest byte."""

    def __init__(self, extent: int = EXTENT) -> None:
        self._extent = extent
        self._condition = threading.Condition()
        self._heap: list[tuple[int, int, int, int, Item]] = []
        """(order, start, serial, end, item)"""
        self._serial = itertools.count()

    def put(self, item: Item, start: int, end: int) -> None:
        with self._condition:
            heapq.heappush(self._heap, (item.order, start, next(self._serial), end, item))
            self._condition.notify_all()

    def next_now(self) -> tuple[Item, int, int] | None:
        """The next (item, start, end); None when there is none now."""
        with self._condition:
            return self._take() if self._heap else None

    def wait_next(self) -> tuple[Item, int, int]:
        """Wait for the next one: a reader has nothing else to do until its process ends."""
        with self._condition:
            self._condition.wait_for(lambda: self._heap)
            return self._take()

    def _take(self) -> tuple[Item, int, int]:
        order, start, serial, last, item = self._heap[0]
        end = min(start + self._extent, last)
        if end == last or item.failed:
            heapq.heappop(self._heap)
        else:
            heapq.heapreplace(self._heap, (order, end, serial, last, item))
        return item, start, end


class Throttle:
    """Limits all threads together to ``rate`` bytes a second; 0: no limit."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait_for_turn(self, count: int) -> None:
        if self._rate <= 0:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + count / self._rate
        time.sleep(max(0.0, self._free_at - now))


class Threaded:
    """A backend's threads, started by the first file; each runs ``_run``, taking extents until the process ends."""

    streams = True

    def __init__(self, count: int, rate: float, extent: int = EXTENT) -> None:
        self._count = count
        self._extents = Extents(extent)
        self._throttle = Throttle(rate)
        self._threads: list[threading.Thread] = []

    def submit(self, item: Item, start: int = 0, end: int | None = None) -> None:
        if not self._threads:
            for number in range(self._count):
                thread = threading.Thread(target=self._run_or_fail, name=f"reader-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._extents.put(item, start, item.size if end is None else end)

    def refusal(self) -> str | None:
        """Return why it cannot serve here: a backend that needs nothing always can."""
        return None

    def _run_or_fail(self) -> None:
        """A thread that cannot go on fails what it takes: left alone, the others' files would wait for its part."""
        try:
            self._run()
        except Exception as error:
            while True:
                self._extents.wait_next()[0].fail(error)

    def _run(self) -> None:
        while True:
            self._read(*self._extents.wait_next())

    def _read(self, item: Item, start: int, end: int) -> None:
        """Read one extent. A method of its own, so that a waiting thread holds no file's memory and no descriptor."""
        raise NotImplementedError
