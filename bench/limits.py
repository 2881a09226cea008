"""What each byte of a fill costs this machine: sha256, writing into the page cache, making it durable, reading back.

    scripts/bench limits [--size 1GiB] [--rounds 3] [--directory DIR]

The sum of the processor seconds is the least that any client pays that fetches (see `scripts/bench fetch` for that
part), proves and keeps a gigabyte; two cores can do no better than half of it.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import common
from bench.common import MIB


def spent() -> float:
    """Processor seconds of this process, in user mode and in the kernel."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=common.GIB)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    blocks = options.size // MIB
    block = mmap.mmap(-1, MIB)
    block[:] = os.urandom(MIB)
    view = memoryview(block)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryFile(dir=options.directory) as file:
        fd = file.fileno()

        def sha256() -> None:
            digest = hashlib.sha256()
            for _ in range(blocks):
                digest.update(view)

        def write() -> None:
            os.posix_fallocate(fd, 0, options.size)
            for number in range(blocks):
                os.pwrite(fd, view, number * MIB)

        def read() -> None:
            for number in range(blocks):
                os.preadv(fd, [view], number * MIB)

        steps: dict[str, Callable[[], None]] = {
            "sha256": sha256,
            "fallocate + pwrite": write,
            "fdatasync": lambda: os.fdatasync(fd),
            "pread, cached": read,
        }
        for _ in range(options.rounds):
            os.ftruncate(fd, 0)
            for name, step in steps.items():
                began, before = time.perf_counter(), spent()
                step()
                seconds = time.perf_counter() - began
                found.setdefault(name, []).append(
                    (options.size / 1e9 / seconds, (spent() - before) / options.size * 1e9)
                )
    result = {}
    for name, pairs in found.items():
        rates, costs = [rate for rate, _ in pairs], [cost for _, cost in pairs]
        result[name] = {"gigabytes_per_second": rates, "cpu_seconds_per_gigabyte": costs}
        print(
            f"{name:20} {statistics.median(rates):6.2f} GB/s ({min(rates):.2f}–{max(rates):.2f})"
            f"   {statistics.median(costs):.2f} processor seconds a GB"
        )
    common.write_result("limits", {"bytes": options.size, "rounds": options.rounds, "steps": result})


if __name__ == "__main__":
    main()
