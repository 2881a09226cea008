"""What the memory costs that takes weights on the CPU: O_DIRECT reads by 8 threads into each kind of it.

docs/decisions/prefetch-memory.md has what it found.

memfd allocated  shared memory, pages of 4 KiB, each extent's allocated in one call before it is read (what is shipped)
memfd            the same, faulted in by the reads themselves
memfd populated  the same, each extent populated by MADV_POPULATE_WRITE before it is read
memfd written    the same, read into a buffer of its thread and written to the memfd by pwrite, 1 MiB at a time
anonymous THP    private memory advised to huge pages, which no other process can take over
touched          memory that is there already: the price of the reads alone

python -m bench.memory [--size 2GiB] [--rounds 5] [--dir DIR]
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import common
from instantstart_fs.prefetch.backends.base import Item
from instantstart_fs.prefetch.backends.direct import DirectCpu
from instantstart_fs.prefetch.memory import Memfd, allocate, mapped
from instantstart_fs.prefetch.plan import EXTENT
from instantstart_fs.prefetch.reader import read_extent

PIECE = 1024 * 1024
MADV_POPULATE_WRITE = 23
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # releases the GIL, where mmap.madvise does not
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Writing(DirectCpu):
    memory = -1

    def _run(self) -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE))
        while True:
            item, first, last = self._extents.wait_next()
            for start in range(first, last, PIECE):
                end = min(start + PIECE, last)
                cached, disk = read_extent(item.plain, item.direct, start, end, buffer, item.path)
                assert os.pwrite(self.memory, buffer[: end - start], start) == end - start
                item.moved(cached, disk)


class Populating(DirectCpu):
    """``address`` of the target by the item's number."""

    addresses: dict[int, int]

    def _run(self) -> None:
        take = self._extents.wait_next

        def populated() -> tuple[Item, int, int]:
            item, start, end = take()
            _madvise(self.addresses[item.number] + start, -(-(end - start) // 4096) * 4096, MADV_POPULATE_WRITE)
            return item, start, end

        self._extents.wait_next = populated  # type: ignore[method-assign]
        super()._run()


def read(path: Path, kind: str, touched: mmap.mmap) -> dict[str, float]:
    import threading

    size = path.stat().st_size
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    plain, direct = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    if kind == "touched":
        memory: Any = touched
    elif kind == "anonymous THP":
        memory = mmap.mmap(-1, size + EXTENT)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        fd = allocate("bench", size)
        memory = mapped(fd)
    backends = {"memfd populated": Populating, "memfd written": Writing}
    backend = backends.get(kind, DirectCpu)(0, 0.0)
    if isinstance(backend, Writing):
        backend.memory = fd
    target = memoryview(memory)
    if isinstance(backend, Populating):
        backend.addresses = {1: ctypes.addressof(ctypes.c_char.from_buffer(memory))}
    ended = threading.Event()
    errors: list[Exception] = []

    def on_end(_: Item, error: Exception | None) -> None:
        errors.extend([error] if error else [])
        ended.set()

    allocated = Memfd(os.dup(fd)) if kind == "memfd allocated" else None
    backend.submit(Item(1, path.name, size, 0, (plain, direct), target, lambda *_: None, on_end, allocated))
    assert ended.wait(300) and not errors, errors
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if kind.startswith("memfd"):
        os.close(fd)
    return {"seconds": seconds, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=2 * common.GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isfs-bench-", dir=options.dir) as work:
        path = common.make_model(Path(work) / "model", options.size, 1).shards[0]
        touched = mmap.mmap(-1, options.size + EXTENT)
        touched.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(touched), 4096):
            touched[offset] = 1
        kinds = ("touched", "memfd allocated", "memfd", "memfd populated", "memfd written", "anonymous THP")
        rounds = common.Rounds({kind: lambda kind=kind: read(path, kind, touched) for kind in kinds}, options.rounds)
        rounds.run()
    result: dict[str, Any] = {"bytes": options.size, "rounds": options.rounds}
    rows = []
    for kind in kinds:
        seconds = rounds.seconds(kind)
        processor = [value / options.size * 1e9 for value in rounds.seconds(kind, "processor")]
        result[kind] = {"seconds": common.summary(seconds), "processor_seconds_per_gb": common.summary(processor)}
        rates = sorted(options.size / value / 1e9 for value in seconds)
        rows.append(
            [
                kind,
                f"{rates[len(rates) // 2]:.2f} ({rates[0]:.2f}–{rates[-1]:.2f})",
                f"{sorted(processor)[len(processor) // 2]:.2f} ({min(processor):.2f}–{max(processor):.2f})",
            ]
        )
    print()
    print(common.table(["memory", "GB/s (range)", "processor seconds for a GB"], rows))
    common.write_result("memory", result)


if __name__ == "__main__":
    main()
