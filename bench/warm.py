"""Warm reads through the mount against the same bytes in a plain directory.

    scripts/bench warm [--size 1GiB] [--rounds 5] [--transport passthrough|pyfuse3]

The pipeline is sealed; the plain side is the store's own file, so that both read the same blocks of one disk. Three
temperatures: ``disk`` (no page cache anywhere), ``store`` (the store's file cached, the mount's pages dropped: with
pyfuse3 each byte goes through the daemon), ``cached`` (the mount's own pages are there; with passthrough it has none,
and this is ``store`` again).
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import GIB, MIB, ratios, summary, table

RANDOM_READS = 4000


def sequential(path: Path, buffer: memoryview) -> int:
    total = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def mapped(path: Path, buffer: memoryview) -> int:
    """Map it and copy it out by 1 MiB, as a loader does."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
        view = memoryview(area)
        for offset in range(0, len(view), len(buffer)):
            piece = view[offset : offset + len(buffer)]
            buffer[: len(piece)] = piece
            piece.release()
        total = len(view)
        view.release()
    return total


def four_readers(path: Path, buffer: memoryview) -> int:
    size = path.stat().st_size
    quarter = size // 4

    def read(start: int, stop: int) -> None:
        own = memoryview(bytearray(MIB))
        with open(path, "rb", buffering=0) as file:
            while start < stop:
                start += os.preadv(file.fileno(), [own[: stop - start]], start)

    threads = [
        threading.Thread(target=read, args=(part * quarter, size if part == 3 else (part + 1) * quarter))
        for part in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return size


def scattered(length: int) -> Callable[[Path, memoryview], int]:
    def read(path: Path, buffer: memoryview) -> int:
        numbers = random.Random(7)
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(RANDOM_READS):
                os.preadv(file.fileno(), [buffer[:length]], numbers.randrange(size // length) * length)
        return RANDOM_READS * length

    return read


WAYS: dict[str, Callable[[Path, memoryview], int]] = {
    "sequential 1 MiB": sequential,
    "mmap + copy": mapped,
    "4 readers": four_readers,
    "random 4 KiB": scattered(4096),
    "random 64 KiB": scattered(65536),
}


def forget(path: Path) -> None:
    """Drop this inode's pages alone."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(temperature: str, path: Path, plain: Path, buffer: memoryview) -> None:
    if temperature == "disk":
        forget(path)
        forget(plain)
        common.drop_caches()
    else:
        sequential(plain, buffer)
        if path != plain:
            sequential(path, buffer) if temperature == "cached" else forget(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the store lies (default: the temporary directory)")
    parser.add_argument("--transport", choices=("passthrough", "pyfuse3"), default="passthrough")
    parser.add_argument("--name", help="of the result file (default: warm-TRANSPORT)")
    options = parser.parse_args()
    config = f'[mount]\ntransport = "{options.transport}"\n'
    buffer = memoryview(bytearray(MIB))
    result: dict[str, Any] = {"transport": options.transport, "bytes": options.size, "rounds": options.rounds}
    rows = []
    with common.workspace(options.dir) as work:
        model = common.make_model(work / "model", options.size, 1)
        name = model.shards[0].name
        with daemon.daemon(work, config=config) as served:
            served.cli("add", "warm", f"file://{model.directory}")
            served.cli("warm", "warm", "--wait")
            (plain,) = served.store.glob(f"slots/warm/*/files/{name}")
            mount = served.mount / "warm" / name
            for temperature in ("disk", "store", "cached"):
                for way, read in WAYS.items():
                    times: dict[str, list[float]] = {"mount": [], "plain": []}
                    count = 0
                    for number in range(options.rounds):
                        sides = [("mount", mount), ("plain", plain)]
                        for side, path in sides if number % 2 else reversed(sides):
                            prepare(temperature, path, plain, buffer)
                            started = time.monotonic()
                            count = read(path, buffer)
                            times[side].append(time.monotonic() - started)
                    share = ratios(times["mount"], times["plain"])
                    rates = {side: count / statistics.median(values) / 1e9 for side, values in times.items()}
                    result[f"{way}, {temperature}"] = {
                        "bytes": count,
                        "mount": summary(times["mount"]),
                        "plain": summary(times["plain"]),
                        "mount_divided_by_plain": share,
                    }
                    rows.append(
                        [
                            temperature,
                            way,
                            f"{rates['mount']:.3f}",
                            f"{rates['plain']:.3f}",
                            f"{share['median']:.2f} ({share['min']:.2f}–{share['max']:.2f})",
                        ]
                    )
                    print("  " + "  ".join(rows[-1]), flush=True)
    print()
    print(table(["pages in", "way", "mount GB/s", "plain GB/s", "mount ÷ plain (range)"], rows))
    common.write_result(options.name or f"warm-{options.transport}", result)


if __name__ == "__main__":
    main()
