"""What the benches share: made-up models, processes with a deadline, interleaved rounds, medians, JSON.

Nothing here is part of the product. Sizes are bytes, times seconds, rates GB/s of 10**9 bytes. Every measured thing is
a whole process from its start to its exit (interpreter start included) unless a column says otherwise, since that is
what a user waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
GIB = 1024 * MIB
RESULTS = Path(__file__).parent / "results"
BIN = Path(sys.executable).parent
"""Where the environment keeps its programs (instantstart, hf, rclone, weed)."""
DTYPE = """
import transformers  # before 4.56 it has another word for it, and gives this one to the model, which refuses it
release = [int(part) for part in transformers.__version__.split('.')[:2]]
dtype = {'dtype' if release >= [4, 56] else 'torch_dtype': torch.bfloat16}
"""
"""For programs of `from_pretrained`, which have imported torch."""

_UNITS = {"": 1, "k": 1024, "m": MIB, "g": GIB, "t": 1024 * GIB}


def size(text: str) -> int:
    """``2GiB``, ``512M`` or plain bytes, as an argparse type."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size")
    return int(float(match[1]) * _UNITS[match[2]])


def show_size(count: float) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


# -- made-up models ----------------------------------------------------------------------------------------------------


class Model:
    """A directory that looks like a sharded model: config.json, an index, safetensors shards of random bytes."""

    def __init__(self, directory: Path, shards: list[Path], digests: dict[str, str]) -> None:
        self.directory = directory
        self.shards = shards
        self.digests = digests
        """sha256 by file name, for every file."""

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.shards)


def make_model(directory: Path, total: int, shards: int) -> Model:
    """Write it. Random bytes, so that no layer below can compress or recognise them."""
    directory.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    per_shard = total // shards
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensor = f"layer.{number}.weight"
        weight_map[tensor] = name
        digests[name] = _write_shard(directory / name, tensor, per_shard)
        paths.append(directory / name)
    small = {
        "config.json": {"architectures": ["BenchForCausalLM"], "torch_dtype": "bfloat16"},
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
    }
    for name, value in small.items():
        text = json.dumps(value).encode()
        (directory / name).write_bytes(text)
        digests[name] = hashlib.sha256(text).hexdigest()
    return Model(directory, paths, digests)


def _write_shard(path: Path, tensor: str, total: int) -> str:
    """A valid safetensors file of exactly ``total`` bytes; returns its sha256."""
    for room in range(64, 256, 8):
        data = total - 8 - room
        header = json.dumps({tensor: {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}).encode()
        if len(header) <= room:
            header = header.ljust(room)
            break
    else:
        raise ValueError("no header fits")
    digest = hashlib.sha256()
    seed = os.urandom(4 * MIB)
    with path.open("wb") as file:
        head = len(header).to_bytes(8, "little") + header
        file.write(head)
        digest.update(head)
        left, number = data, 0
        while left:
            # One random block, each time rotated by another amount: no 4 KiB page is like another, and it is quick.
            cut = (number * 61_681) % len(seed)
            piece = (seed[cut:] + seed[:cut])[:left]
            file.write(piece)
            digest.update(piece)
            left -= len(piece)
            number += 1
    return digest.hexdigest()


# -- processes ---------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], *, timeout: float = 600.0, env: dict[str, str] | None = None) -> tuple[float, str]:
    """(seconds, standard output) of a program that must succeed; its stderr is shown when it does not."""
    started = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, env=env, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return seconds, done.stdout


def tool(name: str) -> str | None:
    """Path of a program: beside this interpreter, on PATH, or in a package that carries it; None if nowhere."""
    beside = BIN / name
    if beside.exists():
        return str(beside)
    return shutil.which(name)


@contextlib.contextmanager
def process(
    command: Sequence[str], *, env: dict[str, str] | None = None, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A helper process, stopped by SIGTERM (and SIGKILL after 10 s) on leaving."""
    with log.open("ab") as out:
        child = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, env=env)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 30.0, interval: float = 0.01) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def let_writes_end() -> None:
    """Write everything back, so that one measurement does not pay for another's dirty pages."""
    os.sync()


def drop_caches() -> bool:
    """Empty the page cache (root); False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def workspace(root: str | None) -> Iterator[Path]:
    """A scratch directory on the filesystem to be measured (the store and all destinations lie in it)."""
    with tempfile.TemporaryDirectory(prefix="isfs-bench-", dir=root) as name:
        yield Path(name)


def cpu_times() -> tuple[float, list[int]]:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return time.monotonic(), [int(field) for field in fields]


def cpu_busy(before: tuple[float, list[int]]) -> float:
    """How many cores the whole machine kept busy since ``before``, what a hypervisor stole included."""
    started, old = before
    now, new = cpu_times()
    spent = [after - earlier for after, earlier in zip(new, old, strict=True)]
    busy = sum(spent[:3]) + sum(spent[5:8])  # user nice system | idle iowait | irq softirq steal
    return busy / os.sysconf("SC_CLK_TCK") / max(now - started, 1e-9)


# -- memory ------------------------------------------------------------------------------------------------------------

MOST_BACKED = 768 * MIB
"""A hypervisor takes back at once what is freed beyond about 1 GiB."""


def back_memory(directory: Path) -> None:
    """Let the next MOST_BACKED that are written into the page cache go to memory that the hypervisor has given to this
    guest already: a file is written and deleted.

    A virtual machine whose host takes free memory back pays at the first touch of each page: writing into the page
    cache costs 2.1 processor seconds a GB then instead of 0.2, to be paid by whatever is measured first.
    """
    block = bytes(MIB)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(MOST_BACKED // MIB):
            file.write(block)


# -- the page cache ----------------------------------------------------------------------------------------------------


def resident_bytes(path: Path | str) -> int:
    """How much of the file lies in the page cache, by mincore(2), as fincore(1) counts it. Faults nothing in."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if not length:
            return 0
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        try:
            pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
            if libc.mincore(address, length, pages) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            libc.munmap(address, length)
        return min(length, mmap.PAGESIZE * sum(byte & 1 for byte in pages.raw))


def evict(paths: Sequence[Path]) -> None:
    """Drop these files' pages, and only theirs, and prove it. Raises RuntimeError while somebody holds them."""
    for path in paths:
        with open(path, "rb") as file:
            for _ in range(3):  # pages on a processor's own list escape the first time
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if left := resident_bytes(path):
            raise RuntimeError(f"{path.name}: {left} bytes stay in the page cache")


def read_ahead_kb(path: Path | str) -> int:
    """Of the device, or FUSE mount, that the path lies on."""
    device = os.stat(path).st_dev
    file = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(file.read_text())


def direct_ceiling(paths: Sequence[Path], limit: int = GIB, threads: int = 4, block: int = 4 * MIB) -> float:
    """GB/s of O_DIRECT reads of the first ``limit`` bytes of these files by that many threads: what the disk gives."""
    work = [(path, offset) for path in paths for offset in range(0, path.stat().st_size // block * block, block)][
        : limit // block
    ]
    todo = iter(work)
    taking = threading.Lock()

    def read() -> None:
        buffer = mmap.mmap(-1, block)
        descriptors: dict[Path, int] = {}
        try:
            while True:
                with taking:
                    piece = next(todo, None)
                if piece is None:
                    return
                if piece[0] not in descriptors:
                    descriptors[piece[0]] = os.open(piece[0], os.O_RDONLY | os.O_DIRECT)
                os.preadv(descriptors[piece[0]], [buffer], piece[1])
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    started = time.monotonic()
    crew = [threading.Thread(target=read) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return len(work) * block / (time.monotonic() - started) / 1e9


# -- figures -----------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times faster ``ours`` is, from times taken in the same rounds: their time ÷ our time, pair by pair."""
    return summary([their / our for our, their in zip(ours, theirs, strict=True)])


class Rounds:
    """Interleaved measurements: each round runs every contender once, in an order that turns from round to round."""

    def __init__(self, contenders: dict[str, Callable[[], dict[str, float]]], rounds: int) -> None:
        self.contenders = contenders
        self.rounds = rounds
        self.samples: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}

    def run(self) -> None:
        names = list(self.contenders)
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                let_writes_end()
                before = cpu_times()
                sample = self.contenders[name]()
                sample.setdefault("cores_busy", cpu_busy(before))
                self.samples[name].append(sample)
                shown = ", ".join(f"{key} {value:.3f}" for key, value in sample.items())
                print(f"  round {number + 1}/{self.rounds}  {name:<34} {shown}", flush=True)

    def seconds(self, name: str, key: str = "seconds") -> list[float]:
        return [sample[key] for sample in self.samples[name]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on. No host names, no paths."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory_gib": round(memory / GIB, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_1m": os.getloadavg()[0],
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """bench/results/NAME.json, with the date and the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {
        "bench": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **result,
    }
    path.write_text(json.dumps(whole, indent=1, sort_keys=False) + "\n")
    print(f"written: bench/results/{path.name}")
    return path
