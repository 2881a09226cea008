"""A process that opens, reads, maps and closes the files of a pipeline that changes under it, and checks every byte.

    python -m tests.churn SECONDS SEED PAUSE MOUNTED SOURCE…

The SOURCEs are the versions that the pipeline may have had. While the file PAUSE exists it holds nothing open. Prints a
JSON object: ``opens``: [began, ended, versions that every byte read through it fits, when EIO ended it or null], times
of the monotonic clock; ``errors``: how often an open failed, by errno name; ``violations``: what may never happen.

A mapping is read by write(2) into a memory file, which gives EFAULT where a load would get SIGBUS.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
import time
from collections import Counter
from typing import Any

MOST_OPEN = 6
LONGEST = 300_000
GONE = (errno.ENOENT, errno.ESTALE)
"""What an open of a name may say that is being taken away or replaced."""


class Held:
    """One open file. ``record``: what is printed of it."""

    def __init__(self, name: str, fd: int, began: float, versions: int) -> None:
        self.name = name
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.map: mmap.mmap | None = None
        self.record: list[Any] = [began, time.monotonic(), list(range(versions)), None]


class Churn:
    """``sources``: for each version the bytes of every file."""

    def __init__(self, seed: int, mounted: str, sources: list[dict[str, bytes]]) -> None:
        self.random = random.Random(seed)
        self.mounted = mounted
        self.sources = sources
        self.names = sorted({name for source in sources for name in source})
        self.held: list[Held] = []
        self.records: list[list[Any]] = []
        self.errors: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.violations: list[str] = []
        self.scratch = os.memfd_create("churn")

    def step(self) -> None:
        what = self.random.choices(("open", "read", "map", "close", "list"), (4, 8, 4, 3, 1))[0]
        self.done[what] += 1
        if what == "list":
            self.list()
        elif what == "open" or not self.held:
            if len(self.held) < MOST_OPEN:
                self.open(self.random.choice(self.names))
        else:
            held = self.random.choice(self.held)
            if what == "close":
                self.close(held)
            else:
                self.read(held, mapped=what == "map")

    def open(self, name: str) -> None:
        began = time.monotonic()
        try:
            fd = os.open(os.path.join(self.mounted, name), os.O_RDONLY)
        except OSError as error:
            self.failed(f"open {name}", error)
            return
        held = Held(name, fd, began, len(self.sources))
        self.held.append(held)
        self.records.append(held.record)
        self.narrow(held, lambda whole: len(whole) == held.size, f"{held.size} bytes")

    def read(self, held: Held, *, mapped: bool) -> None:
        offset = self.random.randrange(held.size)
        length = min(self.random.randint(1, LONGEST), held.size - offset)
        data = b""
        how = "mmap" if mapped else "read"
        try:
            if mapped:
                data = self.through_map(held, offset, length)
            while len(data) < length:
                # The kernel gives what it has up to a page that fails, and the error with the next read.
                piece = os.pread(held.fd, length - len(data), offset + len(data))
                if not piece:
                    self.violations.append(f"{held.name}: ends at {offset + len(data)} of {held.size}")
                    return
                data += piece
        except OSError as error:
            self.narrow(held, lambda whole: whole[offset:].startswith(data), f"{how} {len(data)} bytes at {offset}")
            if error.errno in (errno.EIO, errno.EFAULT):
                held.record[3] = time.monotonic()
                self.close(held)
            else:
                self.violations.append(f"read {held.name}: {error}")
            return
        self.narrow(held, lambda whole: whole[offset:].startswith(data), f"{how} {length} bytes at {offset}")

    def through_map(self, held: Held, offset: int, length: int) -> bytes:
        if held.map is None:
            held.map = mmap.mmap(held.fd, held.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        with memoryview(held.map) as view, view[offset : offset + length] as piece:
            done = 0
            while done < length:
                done += os.pwrite(self.scratch, piece[done:], done)
        return os.pread(self.scratch, length, 0)

    def narrow(self, held: Held, fits: Any, what: str) -> None:
        left = [version for version in held.record[2] if fits(self.sources[version].get(held.name, b""))]
        if not left:
            self.violations.append(f"{held.name}: {what} fit none of the versions {held.record[2]}")
        else:
            held.record[2] = left

    def close(self, held: Held) -> None:
        if held.map is not None:
            held.map.close()
        os.close(held.fd)
        self.held.remove(held)

    def close_all(self) -> None:
        for held in list(self.held):
            self.close(held)

    def list(self) -> None:
        try:
            names = set(os.listdir(self.mounted))
        except OSError as error:
            self.failed("list", error)
            return
        if not any(names == source.keys() for source in self.sources):
            self.violations.append(f"a listing of no version: {sorted(names)}")

    def failed(self, what: str, error: OSError) -> None:
        self.errors[errno.errorcode.get(error.errno or 0, "?")] += 1
        if error.errno not in GONE:
            self.violations.append(f"{what}: {error}")


def main() -> None:
    seconds, seed, pause, mounted, *directories = sys.argv[1:]
    sources = []
    for directory in directories:
        with os.scandir(directory) as entries:
            sources.append({entry.name: open(entry.path, "rb").read() for entry in entries})  # noqa: SIM115
    churn = Churn(int(seed), mounted, sources)
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline and not churn.violations:
        if os.path.exists(pause):
            churn.close_all()
            time.sleep(0.01)  # the other side's turn
        else:
            churn.step()
    churn.close_all()
    found = {
        "opens": churn.records,
        "errors": churn.errors,
        "done": churn.done,
        "violations": churn.violations,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
