"""Readers that never stop and check every byte, as a program: what a restart must not be noticed by.

``readers.py KIND SOURCE MOUNTED [SEED]`` reads the files of MOUNTED that SOURCE has until its stdin ends, then prints
{"reads", "bytes", "longest": seconds of the slowest single step, "errors": [...]}. A fault that fails is a SIGBUS,
which ends the process: its exit status says so. KIND: "held" keeps every file open and mapped; "open" opens
and maps anew each time, and lists the directory.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import sys
import time
from pathlib import Path

STEP = 64 * 1024
STEPS = 24
"""Pieces of one file in a turn, so that all files get theirs."""
AT_REST = 0.002
"""Seconds between two turns: the question is correctness, and the machine has others on it."""


class Reader:
    def __init__(self, kind: str, source: Path, mounted: Path, seed: int) -> None:
        self.kind = kind
        self.mounted = mounted
        self.names = [p.relative_to(source).as_posix() for p in sorted(source.rglob("*")) if p.is_file()]
        self.names = [name for name in self.names if (source / name).stat().st_size]
        self.expected = {name: (source / name).read_bytes() for name in self.names}
        self.random = random.Random(seed)
        self.reads = self.bytes = 0
        self.longest = 0.0
        self.errors: list[str] = []
        self.held: dict[str, tuple[int, mmap.mmap]] = {}

    def timed(self, began: float) -> None:
        self.longest = max(self.longest, time.monotonic() - began)

    def open(self, name: str) -> tuple[int, mmap.mmap]:
        began = time.monotonic()
        fd = os.open(self.mounted / name, os.O_RDONLY)
        self.timed(began)
        return fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=self.random.choice([mmap.MAP_SHARED, mmap.MAP_PRIVATE]))

    def turn(self) -> None:
        name = self.random.choice(self.names)
        if self.kind == "held":
            if name not in self.held:
                self.held[name] = self.open(name)
            self.read(name, *self.held[name])
            return
        began = time.monotonic()
        os.listdir(self.mounted)
        os.stat(self.mounted / name)
        self.timed(began)
        fd, mapped = self.open(name)
        try:
            self.read(name, fd, mapped)
        finally:
            mapped.close()
            os.close(fd)

    def read(self, name: str, fd: int, mapped: mmap.mmap) -> None:
        expected = self.expected[name]
        for _ in range(STEPS):
            offset = self.random.randrange(len(expected))
            began = time.monotonic()
            if self.random.random() < 0.5:
                found = mapped[offset : offset + STEP]
            else:
                found = os.pread(fd, STEP, offset)
            self.timed(began)
            if found != expected[offset : offset + STEP]:
                self.errors.append(f"{name}: wrong bytes at {offset}")
            self.reads += 1
            self.bytes += len(found)

    def run(self) -> None:
        while not select.select([sys.stdin], [], [], AT_REST)[0]:
            try:
                self.turn()
            except OSError as error:
                self.errors.append(f"{type(error).__name__}: {error}")


def main() -> None:
    kind, source, mounted, *seed = sys.argv[1:]
    reader = Reader(kind, Path(source), Path(mounted), int(seed[0]) if seed else 0)
    print("reading", flush=True)
    reader.run()
    found = {"reads": reader.reads, "bytes": reader.bytes, "longest": round(reader.longest, 3)}
    print(json.dumps({**found, "errors": reader.errors[:20]}), flush=True)


if __name__ == "__main__":
    main()
