"""The account of a Stage's files and devices, and the reports made of it. It starts and reads nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from instantstart_fs.prefetch.device_worker import DeviceWorker
from instantstart_fs.prefetch.layout import FileLayout
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.memory import mapped
from instantstart_fs.prefetch.messages import IpcHandle
from instantstart_fs.prefetch.plan import PlannedFile
from instantstart_fs.prefetch.sources import OpenedFile
from instantstart_fs.prefetch.tensors import from_ipc, from_memory

ALIGNMENT = 512
"""Bytes. torch aligns each of its own allocations so; TMA and fp8 matrix products need 16, and a safetensors header
ends at a multiple of 8."""
_COUNTER = re.compile(r"torch_\w+")


class DeviceReport(NamedTuple):
    """``bytes`` of ``total`` are in place: ``cached`` out of the page cache, ``disk`` from the disk. ``seconds``: from
    the Stage's start to its last byte, or to now. ``loading``: the part of them since its
    first file was given to it, which leaves out starting the worker. ``refusals``: (backend, why not)."""

    device: str
    backend: str
    refusals: tuple[tuple[str, str], ...]
    bytes: int
    total: int
    cached: int
    disk: int
    seconds: float
    loading: float
    done: bool


class Exported(NamedTuple):
    """A staged file, for another process. CPU: ``fd``, a memfd that the caller closes. CUDA: ``handle``, to be opened
    once (tensors.from_ipc). ``layout`` None: not safetensors, a whole byte buffer."""

    path: str
    size: int
    layout: FileLayout | None
    fd: int | None
    handle: IpcHandle | None


class StagedFile:
    """A file of the plan on its way into ``worker``'s device. The Stage guards it; times are time.monotonic()."""

    def __init__(self, number: int, planned: PlannedFile, worker: DeviceWorker) -> None:
        self.number = number
        self.planned = planned
        self.worker = worker
        self.layout: FileLayout | None = planned.layout
        self.memory: int | None = None
        """CPU: the memfd that takes it."""
        self.mapping: mmap.mmap | None = None
        self.base: Any = None
        """All of its bytes as a uint8 tensor, made when it is first asked for."""
        self.given_at: float | None = None
        self.ready_at: float | None = None
        self.released = False
        self.opened: OpenedFile | None = None
        """The file's descriptors, until its worker has them."""
        self.offered: list[tuple[int, int]] = []
        """[start, end) that can be read and that its worker was not told of."""
        self.streaming = False
        """Whether its worker reads only what it is told of."""
        self.told = self.moved = 0
        """Bytes that its worker may read, and has read."""
        self.loaded = False
        self.complete = False
        """Whether the whole file is in the store, and proven."""

    @property
    def path(self) -> str:
        return self.planned.path

    def open(self, opened: OpenedFile | None) -> None:
        """Take these descriptors in the place of others."""
        before, self.opened = self.opened, opened
        if before is not None:
            before.close()

    @property
    def idle(self) -> bool:
        """Return whether its worker has nothing to do for it now."""
        return self.loaded or (self.streaming and self.moved >= self.told)

    def offered_from_start(self) -> int:
        """Return the bytes from its beginning, without a gap, that can be read."""
        end = 0
        for start, stop in sorted(self.offered):
            if start > end:
                break
            end = max(end, stop)
        return end

    def mark_ready(self) -> None:
        """Mark the file ready once all of it is loaded and proven."""
        if self.loaded and self.complete and self.ready_at is None:
            self.ready_at = time.monotonic()

    def forget(self) -> None:
        """Forget what was loaded of it."""
        self.worker.disk -= self.moved
        self.given_at = None
        self.offered.clear()
        self.told = self.moved = 0
        self.loaded = self.complete = self.streaming = False

    def drop_memory(self) -> None:
        """Release its memory in this process; tensors that are still in use keep theirs."""
        memory, self.memory, self.mapping, self.base = self.memory, None, None, None
        if memory is not None:
            os.close(memory)

    def tensor(self, handle: Callable[[], IpcHandle]) -> Any:
        """Return its bytes as a uint8 tensor on its device. ``handle``: asks the worker for the memory of a GPU."""
        if self.base is None:
            size = self.planned.size
            if self.memory is not None:
                self.mapping = mapped(self.memory)
                self.base = from_memory(self.mapping, size)
            elif not size:
                torch = load_torch()
                self.base = torch.empty(0, dtype=torch.uint8, device=self.worker.plan.device)
            else:
                self.base = from_ipc(handle(), size)
        return self.base


def lead_of(layout: FileLayout) -> int:
    """Bytes to leave free before a file in device memory, so that its tensors begin at a multiple of ALIGNMENT as far
    as the first one does."""
    return -layout.data_start % ALIGNMENT


def remove_counters(names: Iterable[str]) -> None:
    """Unlink torch's reference counters of memory that was handed over. A worker never ends in a way that does it.

    Args:
        names: as in IpcHandle.reference_handle: of files in /dev/shm, in hexadecimal.
    """
    for name in names:
        with contextlib.suppress(ValueError, OSError):
            file = bytes.fromhex(name).decode("ascii").lstrip("/")
            if _COUNTER.fullmatch(file):
                os.unlink(f"/dev/shm/{file}")


def device_reports(
    workers: Sequence[DeviceWorker], files: Collection[StagedFile], started_at: float, now: float
) -> tuple[DeviceReport, ...]:
    """Return one report for each device, in the order of ``workers``."""
    return tuple(
        DeviceReport(
            worker.plan.device,
            worker.ready.backend if worker.ready else "",
            worker.ready.refusals if worker.ready else (),
            worker.cached + worker.disk,
            sum(file.planned.size for file in files if file.worker is worker),
            worker.cached,
            worker.disk,
            (worker.finished_at or now) - started_at,
            (worker.finished_at or now) - (worker.first_given_at or now),
            worker.finished_at is not None,
        )
        for worker in workers
    )


def ready_seconds(files: Collection[StagedFile], started_at: float) -> dict[str, float]:
    """Model → seconds from the start until all of it was in place; models that are not, are left out."""
    found: dict[str, float] = {}
    late = {file.planned.model for file in files if file.ready_at is None}
    for file in files:
        if file.planned.model not in late and file.ready_at is not None:
            found[file.planned.model] = max(file.ready_at - started_at, found.get(file.planned.model, 0.0))
    return found
