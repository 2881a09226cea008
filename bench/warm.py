"""Warm reads and metadata through the mount against the same bytes in a plain directory.

    scripts/bench warm [--size 1GiB] [--rounds 5] [--transport passthrough|bind|pyfuse3] [--only reads|metadata]

The pipeline is sealed; the plain side is the store's own file, so that both read the same blocks of one disk. Three
temperatures: ``disk`` (no page cache anywhere), ``store`` (the store's file cached, the mount's pages dropped: with
pyfuse3 each byte goes through the daemon), ``cached`` (the mount's own pages are there; with passthrough it has none,
and this is ``store`` again, so it is left out).

``metadata``: one daemon of each transport and a plain directory, by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import GIB, MIB, ratios, summary, table
from instantstart_fs.control.client import Client

LARGEST = 8 * MIB
REST = 64 * MIB
"""How much sendfile puts into memory before it begins again at the front."""
FILES = 200

Way = Callable[[Path, memoryview], int]


def sequential(path: Path, buffer: memoryview, *, block: int = MIB, flags: int = 0) -> int:
    total = 0
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        while count := os.readv(fd, [buffer[:block]]):
            total += count
    finally:
        os.close(fd)
    return total


def sent(path: Path, buffer: memoryview) -> int:
    """sendfile(2) into a memory file, by 1 MiB."""
    total = 0
    out = os.memfd_create("bench")
    try:
        with open(path, "rb", buffering=0) as file:
            while count := os.sendfile(out, file.fileno(), total, MIB):
                total += count
                if total % REST == 0:
                    os.lseek(out, 0, os.SEEK_SET)
    finally:
        os.close(out)
    return total


def mapped(path: Path, buffer: memoryview) -> int:
    """Map it and copy it out by 1 MiB, as a loader does."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
        view = memoryview(area)
        for offset in range(0, len(view), MIB):
            piece = view[offset : offset + MIB]
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


def scattered(offsets: list[int], length: int) -> Way:
    """The offsets are made beforehand: making one takes as long as a read of 4 KiB."""

    def read(path: Path, buffer: memoryview) -> int:
        into = [buffer[:length]]
        preadv = os.preadv
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for offset in offsets:
                preadv(fd, into, offset)
        finally:
            os.close(fd)
        return len(offsets) * length

    return read


def ways(size: int, temperature: str) -> dict[str, Way]:
    generator = random.Random(7)

    def offsets(length: int, count: int) -> list[int]:
        return [generator.randrange(size // length) * length for _ in range(count)]

    many = 2000 if temperature == "disk" else 100_000
    found: dict[str, Way] = {
        "sequential 1 MiB": sequential,
        "sequential 8 MiB": partial(sequential, block=LARGEST),
        "mmap + copy": mapped,
        "4 readers": four_readers,
        "sendfile": sent,
        "random 4 KiB": scattered(offsets(4096, many), 4096),
        "random 64 KiB": scattered(offsets(65536, many // 8), 65536),
    }
    if temperature == "disk":
        found["O_DIRECT 8 MiB"] = partial(sequential, block=LARGEST, flags=os.O_DIRECT)
    return found


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
        if not os.path.samefile(path, plain):
            sequential(path, buffer) if temperature == "cached" else forget(path)


def requests(served: daemon.Daemon) -> dict[str, int]:
    """What the mount has been asked so far, by kind."""
    with Client(served.env["INSTANTSTART_SOCKET"]) as client:
        return client.ping().requests


def reads(work: Path, transport: str, size: int, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {"transport": transport, "bytes": size, "rounds": rounds}
    buffer = memoryview(mmap.mmap(-1, LARGEST))  # on a page's boundary, as O_DIRECT wants it
    rows = []
    model = common.make_model(work / "model", size, 1)
    name = model.shards[0].name
    with daemon.daemon(work, config=f'[mount]\ntransport = "{transport}"\n', name=transport) as served:
        served.cli("add", "warm", f"file://{model.directory}")
        served.cli("warm", "warm", "--wait")
        (plain,) = served.store.glob(f"slots/warm/*/files/{name}")
        mount = served.mount / "warm" / name
        if transport == "bind":
            common.wait_for(lambda: os.path.samefile(mount, plain), "the bind", 10.0)
        asked = requests(served)
        memory = daemon.memory(served.child.pid)["rss"]
        for temperature in ("disk", "store") if transport != "pyfuse3" else ("disk", "store", "cached"):
            for way, read in ways(mount.stat().st_size, temperature).items():
                times: dict[str, list[float]] = {"mount": [], "plain": []}
                count = 0
                for number in range(rounds):
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
                rows.append([temperature, way, f"{rates['mount']:.3f}", f"{rates['plain']:.3f}", shown(share)])
                print("  " + "  ".join(rows[-1]), flush=True)
        after = requests(served)
        result["requests"] = {kind: after[kind] - asked.get(kind, 0) for kind in sorted(after)}
        result["daemon_rss_bytes"] = {"before": memory, "after": daemon.memory(served.child.pid)["rss"]}
    print()
    print(table(["pages in", "way", "mount GB/s", "plain GB/s", "mount ÷ plain (range)"], rows))
    print(f"requests of the kernel meanwhile: {result['requests']}")
    before, now = (value / MIB for value in result["daemon_rss_bytes"].values())
    print(f"the daemon's RSS: {before:.1f} MiB before, {now:.1f} MiB after")
    return result


def shown(share: dict[str, Any]) -> str:
    return f"{share['median']:.2f} ({share['min']:.2f}–{share['max']:.2f})"


# -- metadata ----------------------------------------------------------------------------------------------------------


def opened(directory: Path, name: str) -> int:
    path = directory / name
    for _ in range(1000):
        os.close(os.open(path, os.O_RDONLY))
    return 1000


def statted(directory: Path, name: str) -> int:
    path = directory / name
    for _ in range(50_000):
        os.stat(path)
    return 50_000


def listed(directory: Path, name: str) -> int:
    for _ in range(20):
        with os.scandir(directory) as entries:
            for entry in entries:
                entry.stat()
    return 20


def listed_by_ls(directory: Path, name: str) -> int:
    for _ in range(10):
        subprocess.run(["ls", "-l", directory], stdout=subprocess.DEVNULL, check=True)
    return 10


def absent(directory: Path, name: str) -> int:
    path = directory / "adapter_config.json"
    for _ in range(20_000):
        os.path.exists(path)
    return 20_000


METADATA: dict[str, Callable[[Path, str], int]] = {
    "open + close": opened,
    "stat, cached": statted,
    "absent name": absent,
    f"readdir + stat of {FILES}": listed,
    f"ls -l of {FILES}": listed_by_ls,
}


def metadata(work: Path, rounds: int) -> dict[str, Any]:
    model = common.make_model(work / "meta-plain" / "warm", 8 * MIB, 1)  # as deep as the mounts' paths
    for number in range(FILES - 3):
        (model.directory / f"tokenizer-{number:03}.json").write_text("{}")
    name = model.shards[0].name
    result: dict[str, Any] = {"rounds": rounds}
    rows = []
    with contextlib.ExitStack() as stack:
        sides: dict[str, Path] = {}
        for transport in ("passthrough", "bind", "pyfuse3"):
            served = stack.enter_context(
                daemon.daemon(work, config=f'[mount]\ntransport = "{transport}"\n', name=f"meta-{transport}")
            )
            served.cli("add", "warm", f"file://{model.directory}")
            served.cli("warm", "warm", "--wait", "--all")
            sides[transport] = served.mount / "warm"
        sides["plain"] = model.directory
        for what, measure in METADATA.items():
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds + 1):
                names = list(sides)
                turn = number % len(names)
                for side in names[turn:] + names[:turn]:
                    started = time.monotonic()
                    count = measure(sides[side], name)
                    times[side].append((time.monotonic() - started) / count)
            times = {side: values[1:] for side, values in times.items()}  # the first round fills the kernel's caches
            pairs = {
                "passthrough ÷ plain": ratios(times["passthrough"], times["plain"]),
                "passthrough ÷ pyfuse3": ratios(times["passthrough"], times["pyfuse3"]),
            }
            result[what] = {**{side: summary(values) for side, values in times.items()}, **pairs}
            rates = [f"{1 / statistics.median(values):,.0f}" for values in times.values()]
            rows.append([what, *rates, *(shown(share) for share in pairs.values())])
            print("  " + "  ".join(rows[-1]), flush=True)
    print()
    print(table(["operations per second", *sides, "passthrough ÷ plain", "passthrough ÷ pyfuse3"], rows))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the store lies (default: the temporary directory)")
    parser.add_argument("--transport", choices=("passthrough", "bind", "pyfuse3"), default="passthrough")
    parser.add_argument("--only", choices=("reads", "metadata"))
    parser.add_argument("--name", help="of the result file (default: warm-TRANSPORT, and warm-metadata)")
    options = parser.parse_args()
    with common.workspace(options.dir) as work:
        if options.only != "metadata":
            found = reads(work, options.transport, options.size, options.rounds)
            common.write_result(options.name or f"warm-{options.transport}", found)
        if options.only != "reads":
            # Thrice as many: each takes a fraction of a second, and the scheduler's moods show.
            found = metadata(work, 3 * options.rounds)
            common.write_result(f"{options.name}-metadata" if options.name else "warm-metadata", found)


if __name__ == "__main__":
    main()
