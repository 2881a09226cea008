"""The plain backend: maps each file and copies it, in one thread. The page cache and its readahead do the reading."""

from __future__ import annotations

import mmap

from instantstart_fs.errors import StoreDamaged
from instantstart_fs.prefetch.backends.base import Item, Threaded
from instantstart_fs.prefetch.libtorch import load_torch


class Mapped(Threaded):
    name = "mmap"

    def __init__(self, device: str, rate: float) -> None:
        super().__init__(1, rate)
        self._device = device
        self._memory: mmap.mmap | None = None
        self._owner = -1

    def _run(self) -> None:
        if self._device.startswith("cuda"):
            # A thread begins on device 0, where its first copy could make a context.
            load_torch().cuda.set_device(self._device)
        super()._run()

    def _read(self, item: Item, start: int, end: int) -> None:
        if item.failed:
            self._memory = None
            return
        self._throttle.wait_for_turn(end - start)
        try:
            memory = self._memory
            if memory is None or self._owner != item.number:
                memory, self._owner = mmap.mmap(item.plain, item.size, prot=mmap.PROT_READ), item.number
                memory.madvise(mmap.MADV_SEQUENTIAL)
            self._memory = memory if end < item.size else None
            self._copy(memory, item, start, end)
        except Exception as error:
            item.fail(error if not isinstance(error, ValueError) else StoreDamaged(f"{item.path}: {error}"))
            return
        item.moved(0, end - start)

    def _copy(self, memory: mmap.mmap, item: Item, start: int, end: int) -> None:
        if isinstance(item.target, memoryview):
            item.target[start:end] = memoryview(memory)[start:end]
            return
        torch = load_torch()
        # A copy of the extent: torch wants writable memory, and the map must not be pinned by a tensor.
        piece = torch.frombuffer(bytearray(memory[start:end]), dtype=torch.uint8)
        item.target[start:end].copy_(piece)
