"""Random reads of one cached file through FUSE passthrough with nothing behind it: what the kernel's own code costs.

    scripts/bench kernel_passthrough [--size 256MiB] [--reads 300000] [--rounds 9] [--fio 1] [--dir DIR]

A mount of one file, served by the few lines below and idle while its file is read, against the same file in the store,
and against the daemon's mount of it, by turns. The variants differ in what may be chosen: flags of the mount, options
of the connection, and by which mount the passed file was opened. Two witnesses: preadv in a loop of Python, whose own
time is in both sides and hides a part of the difference, and fio's psync (``--fio`` seconds for each side; 0: without).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import stat
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyfuse3

from bench import common, daemon
from bench.common import MIB, ratios, summary, table
from bench.warm import scattered, sequential, shown
from instantstart_fs.mount import kernel, wire
from instantstart_fs.store import filesystem

FILE = 2
"""The nodeid of the one file."""
RECEIVE = 128 * 1024
MINIMAL = "fd={fd},rootmode=40000,user_id=0,group_id=0"


class Variant(NamedTuple):
    """``flags`` of mount(2); ``options`` beside the four that FUSE needs; ``view``: the passed file is opened by a
    read-only view of its directory, and not by the mount that it lies on."""

    flags: int
    options: str
    view: bool = False


READ_ONLY = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
VARIANTS = {
    "as the daemon mounts": Variant(READ_ONLY, ",default_permissions,allow_other"),
    "no options": Variant(READ_ONLY, ""),
    "read-write": Variant(kernel.MS_NOSUID | kernel.MS_NODEV, ",default_permissions,allow_other"),
    "noatime": Variant(READ_ONLY | kernel.MS_NOATIME, ",default_permissions,allow_other"),
    "read-only view of the store": Variant(READ_ONLY, ",default_permissions,allow_other", view=True),
}


class OneFile:
    """Serves ``path`` as ``file`` in the root of the connection ``fd``, in a thread, until the mount is gone."""

    def __init__(self, fd: int, backing: int) -> None:
        self._fd = fd
        self._backing = backing
        self._size = os.fstat(backing).st_size
        self._identifier = 0

    def run(self) -> None:
        buffer = memoryview(bytearray(RECEIVE))
        while True:
            try:
                count = os.readv(self._fd, [buffer])
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                continue
            request = wire.parse(buffer[:count])
            if request.opcode in wire.SILENT:
                continue
            answer = self._answer(request)
            payload = b"" if isinstance(answer, int) else answer
            with contextlib.suppress(OSError):
                os.write(
                    self._fd, wire.out(request.unique, len(payload), answer if isinstance(answer, int) else 0) + payload
                )

    def _answer(self, request: wire.Request) -> bytes | int:
        """A payload, or an errno."""
        if request.opcode == wire.INIT:
            offer = wire.init_in(request.body)
            return wire.init_out(offer, readahead=MIB, background=1024, max_pages=256)
        if request.opcode == wire.LOOKUP:
            return wire.entry_out(FILE, self._attributes(FILE)) if wire.name(request.body) == b"file" else errno.ENOENT
        if request.opcode == wire.GETATTR:
            return wire.attr_out(self._attributes(request.nodeid))
        if request.opcode == wire.OPEN:
            if not self._identifier:
                message = bytearray(wire.BACKING_MAP.pack(self._backing, 0, 0))
                self._identifier = fcntl.ioctl(self._fd, wire.BACKING_OPEN, message, True)
            return wire.OPEN_OUT.pack(1, wire.FOPEN_PASSTHROUGH, self._identifier)
        if request.opcode == wire.RELEASE:
            return b""
        return errno.ENOSYS

    def _attributes(self, nodeid: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = nodeid
        entry.st_mode = stat.S_IFREG | 0o444 if nodeid == FILE else stat.S_IFDIR | 0o555
        entry.st_nlink, entry.st_size, entry.st_blksize = 1, self._size if nodeid == FILE else 0, 4096
        entry.entry_timeout = entry.attr_timeout = 86400.0
        return entry


@contextlib.contextmanager
def one_file(directory: Path, path: Path, variant: Variant) -> Iterator[Path]:
    """``path`` passed through; where."""
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as stack:
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, parent)
        if variant.view:
            parent = filesystem.readonly_view(parent)
            stack.callback(os.close, parent)
        backing = os.open(path.name, os.O_RDONLY, dir_fd=parent)
        stack.callback(os.close, backing)
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        options = MINIMAL.format(fd=fd) + variant.options
        if libc.mount(b"bench", os.fsencode(directory), b"fuse.bench", variant.flags, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
        server = threading.Thread(target=OneFile(fd, backing).run)
        server.start()
        try:
            yield directory / "file"
        finally:
            kernel.umount(str(directory), lazily=True)
            server.join(10)


def by_python(path: Path, reads: int) -> float:
    """Nanoseconds of processor time of one read: what others do on the machine counts less than by the clock."""
    buffer = memoryview(mmap.mmap(-1, MIB))
    generator = random.Random(7)
    pages = path.stat().st_size // 4096
    read = scattered([generator.randrange(pages) * 4096 for _ in range(reads)], 4096)
    started = time.thread_time()
    read(path, buffer)
    return (time.thread_time() - started) / reads * 1e9


def by_fio(path: Path, seconds: float) -> float:
    """The same. ``--invalidate=0``: it would empty the page cache first."""
    command = [
        *("fio", "--name=read", f"--filename={path}", "--rw=randread", "--bs=4k", "--ioengine=psync", "--readonly"),
        *("--invalidate=0", "--norandommap", "--time_based", f"--runtime={seconds:g}", "--output-format=json"),
        *("--gtod_reduce=1", f"--size={path.stat().st_size}"),
    ]
    _, out = common.run(command, timeout=60 + seconds)
    job = json.loads(out)["jobs"][0]
    return float((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1e6 / job["read"]["total_ios"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=256 * MIB)
    parser.add_argument("--reads", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fio", type=float, default=1.0, help="seconds of each run")
    parser.add_argument("--dir", help="where the store lies (default: the temporary directory)")
    parser.add_argument("--name", default="kernel-passthrough", help="of the result file")
    options = parser.parse_args()
    witnesses: dict[str, Callable[[Path], float]] = {"preadv": lambda path: by_python(path, options.reads)}
    if options.fio and common.tool("fio"):
        witnesses["fio"] = lambda path: by_fio(path, options.fio)
    result: dict[str, Any] = {"bytes": options.size, "rounds": options.rounds}
    rows = []
    with common.workspace(options.dir) as work, contextlib.ExitStack() as stack:
        model = common.make_model(work / "model", options.size, 1)
        served = stack.enter_context(daemon.daemon(work, config='[mount]\ntransport = "passthrough"\n'))
        served.cli("add", "warm", f"file://{model.directory}")
        served.cli("warm", "warm", "--wait")
        name = model.shards[0].name
        (plain,) = served.store.glob(f"slots/warm/*/files/{name}")
        sides = {"plain": plain, "the daemon": served.mount / "warm" / name}
        for number, (title, variant) in enumerate(VARIANTS.items()):
            sides[title] = stack.enter_context(one_file(work / f"one-{number}", plain, variant))
        sequential(plain, memoryview(mmap.mmap(-1, MIB)))
        for witness, measure in witnesses.items():
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(options.rounds):
                names = list(sides)
                turn = number % len(names)
                for side in names[turn:] + names[:turn]:
                    times[side].append(measure(sides[side]))
            result[witness] = {}
            for side, values in times.items():
                share = ratios(values, times["plain"])
                result[witness][side] = {"ns": summary(values), "divided_by_plain": share}
                rows.append([witness, side, f"{statistics.median(values):,.0f}", shown(share)])
                print("  " + "  ".join(rows[-1]), flush=True)
    print()
    print(table(["witness", "side", "ns a read", "rate ÷ plain (range)"], rows))
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
