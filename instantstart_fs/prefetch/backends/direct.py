"""The built-in backend: several threads read, by O_DIRECT or from the page cache.

CPU: they read into the file's memory itself. CUDA: they read into page-locked buffers, two for each thread, and
copy each to the device on a stream of the thread's own, so that copies overlap the reads.

os.preadv releases the GIL; the rest of a thread's turn is some 50 µs for 8 MiB.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

from instantstart_fs.prefetch.backends.base import Item, Threaded
from instantstart_fs.prefetch.device_errors import explained
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.plan import BLOCK, EXTENT
from instantstart_fs.prefetch.reader import read_extent

CPU_READERS = 8
CUDA_READERS = 8
SLOTS = 2
"""Page-locked buffers of each reader: one is filled while the other is copied."""


class _Readers(Threaded):
    name = "direct"

    def submit(self, item: Item, start: int = 0, end: int | None = None) -> None:
        if start == 0:
            os.posix_fadvise(item.plain, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead for what O_DIRECT reads
        super().submit(item, start, end)


class DirectCpu(_Readers):
    def __init__(self, readers: int, rate: float) -> None:
        super().__init__(readers or CPU_READERS, rate)

    def _read(self, item: Item, start: int, end: int) -> None:
        if item.failed:
            return
        self._throttle.wait_for_turn(end - start)
        try:
            padded = start + -(-(end - start) // BLOCK) * BLOCK
            memory, target = item.memory, item.target
            if memory is not None:
                memory.fill(start, padded)
            cached, disk = read_extent(item.plain, item.direct, start, end, target[start:padded], item.path)
        except Exception as error:
            item.fail(error)
            return
        item.moved(cached, disk)


class _Slot:
    """A page-locked buffer, and the copy out of it that may be under way."""

    def __init__(self, tensor: Any, event: Any) -> None:
        self.tensor = tensor
        self.memory = memoryview((ctypes.c_ubyte * len(tensor)).from_address(tensor.data_ptr())).cast("B")
        self.event = event
        self.pending: tuple[Item, Any, int, int] | None = None
        """The copy's target too: freed before its end, that memory could be another file's when the bytes arrive."""

    def finish_copy(self) -> None:
        """Wait for its copy, and tell of it."""
        if self.pending is not None:
            item, _target, cached, disk = self.pending
            self.pending = None
            try:
                self.event.synchronize()
            except Exception as error:
                item.fail(error)
                return
            item.moved(cached, disk)


class DirectCuda(_Readers):
    """``extent``: bytes of each read, and of each buffer; ``slots``: buffers of each reader."""

    def __init__(self, device: str, readers: int, rate: float, *, extent: int = EXTENT, slots: int = SLOTS) -> None:
        super().__init__(readers or CUDA_READERS, rate, extent)
        self._extent = extent
        self._slots = slots
        self._device = device
        self._torch = load_torch()
        self._ring: list[_Slot] = []
        self._used_slots = 0
        self._lock = threading.Lock()
        self.lacked: tuple[str, str] | None = None
        """What was wanted and could not be had, and why, where fewer readers serve than that."""

    def refusal(self) -> str | None:
        """Return why there is no page-locked memory: a driver, or a limit, may refuse it. Where there is some, as many
        readers serve as it suffices for: with one it is still several times as fast as without."""
        wanted = self._count
        while True:
            try:
                self._make_ring()
                return None
            except RuntimeError as error:
                reason = f"no page-locked memory for the ring: {explained(error)}"
            self._ring.clear()
            if self._count == 1:
                return reason
            self.lacked = (f"direct with {wanted} readers", reason)
            self._count //= 2

    def _make_ring(self) -> None:
        torch = self._torch
        with torch.cuda.device(self._device):
            # Exactly a power of two by default: torch's allocator of such memory rounds up to one.
            size = self._count * self._slots * self._extent
            whole = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            first = -whole.data_ptr() % BLOCK
            if first:
                del whole
                # O_DIRECT wants whole blocks of memory, too: twice the memory is better than the slow backend.
                whole = torch.empty(size + BLOCK, dtype=torch.uint8, pin_memory=True)
                first = -whole.data_ptr() % BLOCK
            for begin in range(first, first + size, self._extent):
                # blocking: eight threads that wait would otherwise spin on eight cores.
                self._ring.append(_Slot(whole[begin : begin + self._extent], torch.cuda.Event(blocking=True)))

    def _run(self) -> None:
        torch = self._torch
        with self._lock:
            slots = self._ring[self._used_slots : self._used_slots + self._slots]
            self._used_slots += self._slots
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream()
        turn = 0
        item: Item | None = None
        while True:
            slot = slots[turn]
            slot.finish_copy()
            taken = self._extents.next_now()
            if taken is None:
                for other in slots:
                    other.finish_copy()
                item = None  # held by nobody who waits
                taken = self._extents.wait_next()
            item, start, end = taken
            del taken
            if item.failed:
                continue
            self._throttle.wait_for_turn(end - start)
            try:
                cached, disk = read_extent(item.plain, item.direct, start, end, slot.memory, item.path)
                target = item.target[start:end]
                with torch.cuda.stream(stream):
                    target.copy_(slot.tensor[: end - start], non_blocking=True)
                    slot.event.record(stream)
            except Exception as error:
                item.fail(error)
                continue
            slot.pending = (item, target, cached, disk)
            del target
            turn = (turn + 1) % self._slots
