"""The prefetch helper on a GPU: all checks and timings in one call, of at most --limit seconds (default 300).

    python bench/gpu.py [--size 8GiB] [--shards 16] [--dir DIR] [--out DIR] [--only PART,…] [--contenders NAME,…]

Needs only Python ≥ 3.11, torch with CUDA, safetensors and msgspec; fastsafetensors, runai-model-streamer and
instanttensor are rivals where they are installed. Makes a checkpoint on the disk, then measures, in interleaved rounds:

    disk      the O_DIRECT ceiling of that disk, plain threads into page-locked memory
    h2d       the ceiling of copies from page-locked memory to the device
    cold/warm each backend, load_file(device="cuda") and the rivals, with the page cache empty and full
    sweep     the built-in backend by readers, bytes of an extent, and buffers of each reader
    startup, page-locking, peers, two releases of torch: bench/gpu_probe.py

and checks that the bytes are equal, that memory stays within weights + 5 % during a hand-over to a second process, that
a helper killed at any stage frees its memory and says so, that what does not fit is refused, and what GDS would do.
`python -m pytest -c tests/gpu/bare.ini tests/gpu -ra` runs the same parts, smaller, as one test each.

The parts run in the order of what they tell. Each has a deadline of its own: one that fails, is late, hangs, or ends
its process keeps what it measured, is listed by name, and the next goes on (in a fresh process where the old one is of
no more use). SIGTERM, ^C or the end of the time print the table of what there is; gpu.json in --out is replaced whole
after every figure, so that a SIGKILL costs no more than the figure under way. Rates are GB/s of 10**9 bytes. Exit:

    0   all that was asked for was run, and what must hold holds; what this machine lacks is listed as not run
    1   a part failed
    2   wrong usage
    3   no part failed, and the time was up, or it was ended, before all had been run
    4   there is no GPU: nothing was run
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import math
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import common, gpu_mount, gpu_probe, gpu_table, gpu_watch  # noqa: E402
from bench.gpu_watch import Skipped  # noqa: E402

MIB = 1024 * 1024
GIB = 1024 * MIB
DEVICE = "cuda:0"
SHARE = gpu_table.SHARE
PEAK = 1.05
"""Of the weights: what a hand-over may take of device memory at its peak."""
LLAMA_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
SLACK = 64 * MIB
"""Bytes of device memory that are nobody's weights: cudaMalloc counts in steps of 2 MiB, and kernels load lazily."""


# -- the second process of a hand-over ---------------------------------------------------------------------------------


def consumer() -> None:
    """Reads one JSON line for each file: opens its handle, and either keeps the views ("share") or copies each tensor
    into parameters of its own ("copy"); answers a line with a checksum of the bytes. "close": lets go of all it kept,
    and answers whether its device still computes."""
    import msgspec
    import torch

    from instantstart_fs.errors import PrefetchError
    from instantstart_fs.prefetch.layout import FileLayout
    from instantstart_fs.prefetch.messages import IpcHandle
    from instantstart_fs.prefetch.tensors import from_ipc, views

    torch.cuda.init()
    # Kernels load with their first use, and are not what a hand-over takes.
    sum_of(torch, torch.empty(2 * MIB, dtype=torch.uint8, device=DEVICE))
    torch.cuda.empty_cache()
    kept: list[Any] = []
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["how"] == "close":  # what was kept, late: its owner has ended
            kept.clear()
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()
            print(
                json.dumps({"sum": sum_of(torch, torch.empty(1024, dtype=torch.uint8, device=DEVICE).zero_())}),
                flush=True,
            )
            continue
        try:
            base = from_ipc(msgspec.convert(order["handle"], IpcHandle), order["size"], order.get("device"))
        except PrefetchError as error:
            print(json.dumps({"error": error.message, "torch": torch.__version__}), flush=True)
            continue
        tensors = views(base, msgspec.convert(order["layout"], FileLayout))
        total, number = sum_of(torch, base), base.device.index
        if order["how"] == "copy":
            kept.extend(torch.empty_like(tensor).copy_(tensor) for tensor in tensors.values())
            torch.cuda.synchronize()
            del base, tensors
            torch.cuda.ipc_collect()
        else:
            kept.append(tensors)
        print(json.dumps({"sum": total, "number": number, "torch": torch.__version__}), flush=True)


def sum_of(torch: Any, data: Any) -> int:
    """The sum of a uint8 tensor's bytes, 2 MiB at a time: torch makes a copy of eight times what it adds up."""
    step = 2 * MIB
    return sum(int(data[at : at + step].sum(dtype=torch.int64).item()) for at in range(0, len(data), step))


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def make_checkpoint(directory: Path, total: int, shards: int) -> None:
    """A Llama of about ``total`` bytes of bf16, whose numbers are random, in valid safetensors files, as fast as the
    disk takes them. All its matrices are square, and of one size."""
    hidden = 2048 if total >= 512 * MIB else 512
    matrix = hidden * hidden * 2
    layers = max(1, (total // matrix - 2) // len(LLAMA_LAYER))
    square, row = [hidden, hidden], [hidden]
    tensors = [("model.embed_tokens.weight", square), ("lm_head.weight", square), ("model.norm.weight", row)]
    for layer in range(layers):
        tensors += [(f"model.layers.{layer}.{name}.weight", square) for name in LLAMA_LAYER]
        tensors += [(f"model.layers.{layer}.{name}_layernorm.weight", row) for name in ("input", "post_attention")]
    seed = os.urandom(16 * MIB)
    where: dict[str, str] = {}
    shards = min(shards, len(tensors))
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = tensors[len(tensors) * shard // shards : len(tensors) * (shard + 1) // shards]
        where |= {tensor: name for tensor, _ in mine}
        write_shard(directory / name, mine, seed, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": hidden,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, tensors: list[tuple[str, list[int]]], seed: bytes, number: int) -> None:
    entries, position = {}, 0
    for name, shape in tensors:
        end = position + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    # A tail that is no multiple of anything, as real checkpoints have.
    entries[f"tail.{number}"] = {"dtype": "F32", "shape": [1001], "data_offsets": [position, position + 4004]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for turn, (_, shape) in enumerate(tensors):
            cut, size = ((number + 1) * 7919 + turn) * 61_681 % len(seed), 2 * math.prod(shape)
            file.write(seed[cut : cut + size])
            file.write(seed[: max(0, cut + size - len(seed))])
        file.write(seed[:4004])
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fits(directory: Path, wanted: int) -> int:
    """``wanted`` bytes, or 2 GiB where the disk writes less than 1 GB/s: reading it again and again has to end."""
    if wanted <= 2 * GIB:
        return wanted
    path, data, started = directory / "try", os.urandom(16 * MIB), time.monotonic()
    with open(path, "wb") as file:
        for _ in range(32):
            file.write(data)
        os.fdatasync(file.fileno())
    rate = 32 * len(data) / (time.monotonic() - started)
    path.unlink()
    return wanted if rate >= 1e9 else 2 * GIB


def forget(files: list[Path]) -> None:
    """Out of the page cache, and proven so. Raises RuntimeError."""
    for left in range(10, -1, -1):
        try:
            common.evict(files)
            return
        except RuntimeError:  # a page that is still on its way in, or in somebody's map that is just being closed
            if not left:
                raise
            time.sleep(0.1)


def remember(files: list[Path]) -> None:
    """Into the page cache."""

    def read(path: Path) -> None:
        buffer = memoryview(mmap.mmap(-1, 8 * MIB))
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    in_threads(read, files, 8)


def in_threads(work: Callable[[Any], None], items: list[Any], count: int) -> None:
    left = list(items)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while True:
            with lock:
                if not left or errors:
                    return
                item = left.pop(0)
            try:
                work(item)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# -- ceilings ----------------------------------------------------------------------------------------------------------


Contender = Callable[[Any, str], tuple[float, float, str]]
"""(page-locked memory, "cold" or "warm") → (seconds of loading, seconds with its process's start, a note)."""


def temperatures(contender: str) -> tuple[str, ...]:
    """What a contender is measured at: the disk's ceiling has nothing to do with the page cache, and that of copies out
    of the page cache nothing with the disk."""
    if contender.startswith("ceiling"):
        return ("cold",) if "disk" in contender else ("warm",)
    return ("cold", "warm")


def source_ceiling(files: list[Path], threads: int, pinned: Any, *, direct: bool) -> float:
    """Seconds to read every byte, 8 MiB at a time, each thread into page-locked memory of its own: by O_DIRECT, or out
    of the page cache."""
    extent = 8 * MIB
    address = pinned.data_ptr()
    first = -address % 4096
    free = [
        memoryview((ctypes.c_ubyte * extent).from_address(address + first + number * extent)).cast("B")
        for number in range(threads)
    ]
    lock = threading.Lock()
    extents = []
    descriptors = []
    for path in files:
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        descriptors.append(fd)
        extents += [(fd, start) for start in range(0, path.stat().st_size, extent)]

    def read(item: tuple[int, int]) -> None:
        with lock:
            buffer = free.pop()
        os.preadv(item[0], [buffer], item[1])
        with lock:
            free.append(buffer)

    try:
        started = time.monotonic()
        in_threads(read, extents, threads)
        return time.monotonic() - started
    finally:
        for fd in descriptors:
            os.close(fd)


def h2d_ceiling(torch: Any, pinned: Any, target: Any, total: int) -> float:
    """Seconds to copy ``total`` bytes from page-locked memory, 8 MiB at a time, on two streams."""
    extent = 8 * MIB
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    slots = len(pinned) // extent
    torch.cuda.synchronize()
    started = time.monotonic()
    for number in range(total // extent):
        source = pinned[(number % slots) * extent : (number % slots + 1) * extent]
        at = (number * extent) % (len(target) - extent)
        with torch.cuda.stream(streams[number % 2]):
            target[at : at + extent].copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return time.monotonic() - started


# -- the run -----------------------------------------------------------------------------------------------------------


class CutOff(BaseException):
    """SIGTERM: whoever started this wants the table now."""


class Late(BaseException):
    """The part's deadline has passed."""


class Run:
    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self.began = time.monotonic()
        self.child = bool(getattr(options, "child", False))
        """Whether a parent watches the deadlines, prints the table, and goes on in a fresh process."""
        self.result: dict[str, Any] = gpu_watch.read(self.out) if self.child else {}
        self.result = {"bench": "gpu", "parts": {}, **self.result}
        self.not_run: list[str] = self.result.get("not_run", [])
        self.failed: list[str] = self.result.get("failed", [])
        self.part_ends = math.inf

    @functools.cached_property
    def torch(self) -> Any:
        import torch

        return torch

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @property
    def left(self) -> float:
        return float(self.options.limit) - (time.monotonic() - self.began)

    @property
    def part_left(self) -> float:
        """Seconds that the part under way still has."""
        return min(self.left, self.part_ends - time.monotonic())

    def all_parts(self, parts: Sequence[Part]) -> None:
        """Run them in turn, then say what came of it; what was not reached is said, too."""
        wanted = [name.strip() for name in self.options.only.split(",")] if self.options.only else None
        names = [part.name for part in parts]
        if unknown := [name for name in wanted or () if name not in names]:
            raise SystemExit(f"no part is named {unknown[0]!r}; there are: {', '.join(names)}")
        always = ("environment", "checkpoint")  # which card gave the figures; what the others read
        chosen = [part for part in parts if wanted is None or part.name in (*wanted, *always)]
        self.result["chosen"] = [part.name for part in chosen]
        ended = self.result.setdefault("ended", [])
        left = [part.name for part in chosen if part.name not in ended]
        try:
            for part in chosen:
                if part.name not in left:
                    continue
                self.part(part)
                left.remove(part.name)
                ended.append(part.name)
                if self.child and left and self.spoiled():
                    raise SystemExit(gpu_watch.GO_ON)
        except (KeyboardInterrupt, CutOff) as error:
            by = "SIGTERM" if isinstance(error, CutOff) else "^C"
            self.not_run += [f"{name}: {by} came first" for name in left]
        finally:
            self.result.pop("now", None)
            self.write()
            if not self.child:
                gpu_watch.table(self.result)

    def spoiled(self) -> bool:
        """Whether nothing works in this process any more: an error of the device stays with the process that had it."""
        if not self.failed or "torch" not in self.__dict__:
            return False
        try:
            self.torch.cuda.synchronize()
            self.torch.empty(1, device=DEVICE)
        except Exception as error:
            print(f"    this process is of no more use: {error}", flush=True)
            return True
        return False

    def part(self, part: Part) -> None:
        name = part.name
        if self.left < part.needs:
            self.not_run.append(f"{name}: no time left ({self.left:.0f} s of {part.needs:.0f} s)")
            return
        print(f"--- {name} ({self.left:.0f} s left)", flush=True)
        started = time.monotonic()
        most = part.most * float(getattr(self.options, "patience", 1.0))
        self.part_ends = started + most
        self.result["now"] = {"part": name, "until": min(self.part_ends, started + self.left)}
        self.write()
        try:
            if self.child:
                signal.setitimer(signal.ITIMER_REAL, max(0.1, min(most, self.left)))
            try:
                found = part.work(self)
            finally:
                if self.child:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except Skipped as reason:
            self.not_run.append(f"{name}: {reason}")
            return
        except Late:
            found = self.result["parts"].get(name, {})
            if self.left < 1:
                self.not_run.append(f"{name}: some of it: the end of the time came first")
            else:
                self.failed.append(f"{name}: not within {time.monotonic() - started:.0f} s")
                found["failed"] = self.failed[-1]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | CutOff):
                raise
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            found = {**self.result["parts"].get(name, {}), "failed": self.failed[-1]}
        finally:
            self.part_ends = math.inf
        found["part_seconds"] = round(time.monotonic() - started, 2)
        self.result["parts"][name] = found
        print(f"    {json.dumps(found, default=str)[:1500]}", flush=True)
        self.write()

    def write(self) -> None:
        self.result |= {"not_run": self.not_run, "failed": self.failed}
        gpu_watch.write(self.out, self.result)

    # -- helpers ---------------------------------------------------------------------------------------------------

    @property
    def files_at(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def files(self) -> list[Path]:
        return sorted(self.files_at.glob("*.safetensors"))

    @property
    def total(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def used(self) -> int:
        free, total = self.torch.cuda.mem_get_info(DEVICE)
        return int(total - free)

    @contextlib.contextmanager
    def staged(self, devices: list[str] | None = None, **options: Any) -> Iterator[Any]:
        from instantstart_fs.prefetch import DirectorySource, Stager, plan

        source = DirectorySource(str(self.files_at))
        with Stager(source, timeout=60, **options).start(plan(source.weights, None, devices or [DEVICE])) as stage:
            yield stage

    def wait_freed(self, baseline: int, timeout: float = 20.0, slack: int = 64 * MIB) -> float:
        """Seconds until the device's memory is back within ``slack`` of ``baseline``. Raises AssertionError."""
        started = time.monotonic()
        while self.used() > baseline + slack:
            if time.monotonic() > started + timeout:
                raise AssertionError(f"{(self.used() - baseline) / MIB:.0f} MiB still taken after {timeout:g} s")
            time.sleep(0.02)
        return round(time.monotonic() - started, 3)

    # -- parts -----------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, Any]:
        torch = self.torch
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(DEVICE)
        disk = shutil.disk_usage(self.directory)
        return {
            "device": torch.cuda.get_device_name(DEVICE),
            "memory_gib": round(properties.total_memory / GIB, 1),
            **driver(str(getattr(properties, "uuid", ""))),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cores": len(os.sched_getaffinity(0)),
            "host_gib": round(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE / GIB, 1),
            "disk_free_gib": round(disk.free / GIB, 1),
            "filesystem": filesystem(self.directory),
        }

    def checkpoint(self) -> dict[str, Any]:
        started = time.monotonic()
        self.files_at.mkdir(exist_ok=True)
        make_checkpoint(self.files_at, fits(self.directory, self.options.size), self.options.shards)
        seconds = time.monotonic() - started
        return {"bytes": self.total, "shards": len(self.files), "write_gb_s": round(self.total / seconds / 1e9, 2)}

    def gds(self) -> dict[str, Any]:
        from instantstart_fs.prefetch.backends.gds import probe

        found = probe()
        return {"usable": found.usable, "native": found.native, "reason": found.reason}

    def equality(self) -> dict[str, Any]:
        """Every tensor, as seen by this process through CUDA IPC, against load_file of the same file, which is read to
        the CPU: what is compared with has come by no part of the device's side."""
        compared = 0
        with self.staged() as stage:
            stage.wait(120)
            backend = stage.progress()[0]
            for path in self.files:
                compared += self.equal(stage, path)
        return {"equal_bytes": compared, "backend": backend.backend}

    def equal(self, stage: Any, path: Path) -> int:
        """The bytes of its tensors. Of the worker's memory nothing is open here when it returns: closed after the
        worker's end it could end this process. Raises AssertionError."""
        from safetensors.torch import load_file

        torch = self.torch
        ours, theirs = stage.file_tensors(path.name), load_file(str(path))
        assert set(ours) == set(theirs), path.name
        for name, on_cpu in theirs.items():
            tensor, mine = on_cpu.to(DEVICE), ours[name]
            assert mine.dtype == tensor.dtype and mine.shape == tensor.shape, name
            same = torch.equal(mine.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
            assert same, f"{name} differs"
        return sum(tensor.nbytes for tensor in theirs.values())

    def speed(self, name: str = "speed", *, others: bool = False) -> dict[str, Any]:
        """Rates of our backends beside the ceilings and load_file, or with ``others`` of the rivals beside ours."""
        torch = self.torch
        total = self.total
        pinned = torch.empty(17 * 8 * MIB, dtype=torch.uint8, pin_memory=True)
        size = min(GIB, torch.cuda.mem_get_info(DEVICE)[0] // 2)
        target = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        h2d = max(total / h2d_ceiling(torch, pinned, target, total // (8 * MIB) * 8 * MIB) / 1e9 for _ in range(3))
        del target
        contenders = self.contenders(others=others)
        samples: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
        whole: dict[str, list[float]] = {}
        problems: dict[str, str] = {}
        found: dict[str, Any] = {
            "bytes": total,
            "h2d_ceiling": round(h2d, 2),
            "samples": samples,
            "whole_seconds_with_process_start": whole,
            "problems": problems,
        }
        self.result["parts"][name] = found
        self.write()
        rounds = 0
        of_rounds, pace = (gpu_watch.Pace(lambda: self.part_left - 2) for _ in range(2))
        while rounds < self.options.rounds and (rounds == 0 or of_rounds.allows("")):
            turn = rounds % len(contenders)
            with of_rounds.timed(""):
                for contender in list(contenders)[turn:] + list(contenders)[:turn]:
                    for temperature in temperatures(contender):
                        called = f"{temperature} {contender}"
                        if contender in problems:
                            continue
                        if not pace.allows(called):
                            if not rounds:
                                self.not_run.append(f"{name}: {called}: no time left")
                            continue
                        with pace.timed(called):
                            self.one_load(name, contender, contenders[contender], temperature, pinned, rounds + 1)
            rounds += 1
        middle = gpu_table.medians(samples)
        shares = {}
        for temperature in () if others else ("cold", "warm"):
            most, _ = gpu_table.ceiling(middle, temperature, h2d)
            if most and "direct" in middle[temperature]:
                shares[temperature] = round(middle[temperature]["direct"] / most, 3)
        return {**found, "medians": middle, "share_of_ceiling": shares, "share_target": SHARE, "rounds": rounds}

    def one_load(self, name: str, contender: str, load: Contender, temperature: str, pinned: Any, number: int) -> None:
        """Adds its rate, or why there is none, to what the part has found."""
        found = self.result["parts"][name]
        self.torch.cuda.empty_cache()
        try:
            (forget if temperature == "cold" else remember)(self.files)
        except (OSError, RuntimeError) as error:  # a filesystem in memory, say: the other one is measured
            if (line := f"{name}: {temperature}: {error}") not in self.not_run:
                self.not_run.append(line)
            return
        try:
            loading, all_of_it, note = load(pinned, temperature)
        except Skipped as reason:
            self.not_run.append(f"{name}: {contender}: {reason}")
            found["problems"][contender] = f"was refused: {reason}"
        except Exception as error:
            found["problems"][contender] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"    {contender}: {found['problems'][contender]}", flush=True)
        else:
            rate = found["bytes"] / loading / 1e9
            found["samples"][temperature].setdefault(contender, []).append(rate)
            whole = found["whole_seconds_with_process_start"]
            whole.setdefault(f"{contender}, {temperature}", []).append(all_of_it)
            print(f"    {number} {temperature} {contender:<24} {rate:6.2f} GB/s  {note}", flush=True)
            self.write()

    def contenders(self, *, others: bool = False) -> dict[str, Contender]:
        """By name."""
        torch, files = self.torch, self.files

        def ours(backend: str, readers: int = 0) -> Contender:
            def run(_: Any, __: str) -> tuple[float, float, str]:
                started = time.monotonic()
                with self.staged(backend=backend, readers=readers) as stage:
                    stage.wait(150)
                    report = stage.progress()[0]
                    took = time.monotonic() - started
                if report.backend != backend:
                    raise Skipped("; ".join(why if who == backend else f"{who}: {why}" for who, why in report.refusals))
                share = report.cached / max(1, report.bytes)
                return report.loading, took, f"{share:.0%} from the page cache, whole {took:.2f} s"

            return run

        def ceiling(threads: int) -> Contender:
            def run(pinned: Any, temperature: str) -> tuple[float, float, str]:
                seconds = source_ceiling(files, threads, pinned, direct=temperature == "cold")
                return seconds, seconds, ""

            return run

        def timed(load: Callable[[], Any]) -> Contender:
            def run(_: Any, __: str) -> tuple[float, float, str]:
                torch.cuda.synchronize()
                started = time.monotonic()
                kept = load()
                torch.cuda.synchronize()
                seconds = time.monotonic() - started
                del kept
                return seconds, seconds, ""

            return run

        from safetensors.torch import load_file

        from instantstart_fs.prefetch.backends.gds import probe

        def chosen(found: dict[str, Contender]) -> dict[str, Contender]:
            if not self.options.contenders:
                return found
            wanted = [name.strip() for name in self.options.contenders.split(",")]
            found = {name: work for name, work in found.items() if name in wanted}
            if not found:
                raise Skipped(f"none of its contenders was asked for ({self.options.contenders})")
            return found

        if others:
            native = probe().native
            found = {"direct": ours("direct")}
            for name, load in rivals(files):
                if name.endswith(" gds") and not native:
                    self.not_run.append(f"speed of {name}: GPUDirect Storage is not available, only emulated")
                else:
                    found[name] = timed(load)
            for name in ("fastsafetensors", "runai_model_streamer", "instanttensor"):
                if importlib.util.find_spec(name) is None:
                    self.not_run.append(f"speed of {name}: is not installed")
            return chosen(found)
        found = {
            "ceiling disk ×8": ceiling(8),
            "ceiling copy ×8": ceiling(8),
            "direct": ours("direct"),
            "load_file": timed(lambda: [load_file(str(path), device=DEVICE) for path in files]),
            "ceiling disk ×16": ceiling(16),
            "ceiling copy ×16": ceiling(16),
            "mmap": ours("mmap"),
            "gds": ours("gds"),
            "direct ×16": ours("direct", 16),
            "direct ×4": ours("direct", 4),
            "ceiling disk ×4": ceiling(4),
        }
        return chosen(found)

    def handover(self, how: str) -> dict[str, Any]:
        """Peak device memory while a second process takes the files over, above what two idle contexts take."""
        sums = {path.name: byte_sum(self.torch, path) for path in self.files}
        with self.consuming() as (ask, _):
            self.torch.cuda.empty_cache()
            peak = [0]
            stop = threading.Event()
            with self.idle_worker():
                baseline = self.used()

            def watch() -> None:
                while not stop.wait(0.002):
                    peak[0] = max(peak[0], self.used())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                with self.staged() as stage:
                    stage.wait(120)
                    for path in self.files:
                        exported = stage.export(path.name)
                        answer = ask(exported, how)
                        assert answer["sum"] == sums[path.name], f"{path.name}: {answer['sum']}, not {sums[path.name]}"
                        if how == "copy":
                            stage.release(path.name)
                            time.sleep(0.05)
            finally:
                stop.set()
                watcher.join()
        above = peak[0] - baseline
        found = {"peak_above_contexts": above, "weights": self.total, "ratio": round(above / self.total, 4)}
        self.result["parts"][f"hand-over by {how}"] = found
        # A copy needs the file that is being copied, too.
        more = max(path.stat().st_size for path in self.files) if how == "copy" else 0
        assert above <= PEAK * self.total + more + SLACK, f"peak memory: {above / self.total:.3f} × the weights"
        return found

    def renumbered(self) -> dict[str, Any]:
        """A second process that CUDA_VISIBLE_DEVICES names the same GPU to otherwise: a hand-over goes by UUID."""
        uuid = str(self.torch.cuda.get_device_properties(DEVICE).uuid).removeprefix("GPU-")
        last = self.torch.cuda.device_count() - 1
        # An instance of MIG has a name of its own, which this process was given, or is the only one that there is.
        one = (
            os.environ.get("CUDA_VISIBLE_DEVICES")
            if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG")
            else ""
        )
        visible = one or (f"GPU-{uuid}" if last == 0 else ",".join(str(number) for number in range(last, -1, -1)))
        path = self.files[0]
        with self.consuming(CUDA_VISIBLE_DEVICES=visible) as (ask, _), self.staged() as stage:
            stage.wait(120)
            answer = ask(stage.export(path.name), "share")
            assert answer["sum"] == byte_sum(self.torch, path), answer
        return {"uuid": uuid, "visible": visible, "number_there": answer["number"]}

    def several_devices(self) -> dict[str, Any]:
        """All GPUs at once: every byte there once, and the whole in less than half of the sum of their times."""
        devices = [f"cuda:{number}" for number in range(self.torch.cuda.device_count())]
        if len(devices) < 2:
            raise Skipped("there is one GPU")
        forget(self.files)
        with self.staged(devices) as stage:
            stage.wait(120)
            reports = stage.progress()
            for path in self.files:
                found = sum_of(self.torch, stage.bytes_of(path.name))
                assert found == byte_sum(self.torch, path), path.name
        loading = {report.device: round(report.loading, 3) for report in reports}
        assert sum(report.total for report in reports) == self.total
        return {"loading": loading, "bytes": {report.device: report.total for report in reports}}

    @contextlib.contextmanager
    def idle_worker(self) -> Iterator[None]:
        """A worker with its context and ring, and nothing in it: what a stage costs before its first byte."""
        from instantstart_fs.prefetch import DirectorySource, Stager, plan

        with tempfile.TemporaryDirectory() as empty:
            Path(empty, "nothing.bin").write_bytes(b"x")
            source = DirectorySource(empty)
            with Stager(source).start(plan(source.weights, None, [DEVICE])) as stage:
                stage.wait(60)
                yield

    @contextlib.contextmanager
    def consuming(
        self, python: str = sys.executable, **environment: str
    ) -> Iterator[tuple[Callable[..., Any], subprocess.Popen[str]]]:
        import msgspec

        said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed below, with its process
        process = subprocess.Popen(
            [python, __file__, "--consumer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(150, process.kill)
        alarm.start()

        def answer() -> Any:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                status = process.wait(10)
                said.seek(0)
                raise AssertionError(f"the second process ended with {status}: {gpu_watch.last_words(said.read())}")
            return json.loads(line)

        def ask(exported: Any, how: str, device: int | None = None) -> Any:
            assert process.stdin is not None
            order = {"how": how, "device": device}
            for name in ("handle", "layout", "size") if exported is not None else ():
                given = exported[name] if isinstance(exported, dict) else getattr(exported, name)
                order[name] = msgspec.to_builtins(given)
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return answer()

        try:
            answer()
            yield ask, process
        finally:
            alarm.cancel()
            process.kill()
            process.communicate()
            said.close()

    def killed(self, when: str) -> dict[str, Any]:
        """SIGKILL the worker; the stage must say so, and the memory must come back."""
        from instantstart_fs.errors import PrefetchError

        self.torch.cuda.empty_cache()
        baseline = self.used()
        error = ""
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stage = stack.enter_context(self.staged(rate=1.5e9 if when == "while loading" else 0.0))
            ask = None
            if when == "while loading":
                enough = min(64 * MIB, self.total // 4)
                while stage.progress()[0].bytes <= enough:
                    assert time.monotonic() < started + 60, "a quarter of it did not come within 60 s"
                    stage.wait_changed(5)
            else:
                stage.wait(120)
            if when == "while another has it open":
                ask, _ = stack.enter_context(self.consuming())
                ask(stage.export(self.files[0].name), "share")
            taken = self.used() - baseline
            os.kill(stage.worker_pids()[0], signal.SIGKILL)
            killed_at = time.monotonic()
            while stage.error is None and time.monotonic() < killed_at + 10:
                with contextlib.suppress(PrefetchError):
                    stage.wait_changed(0.05)
            said = time.monotonic() - killed_at
            error = stage.error.message if stage.error is not None else ""
            assert "SIGKILL" in error, f"the stage says {error!r}"
            late_close = {} if ask is None else {"late_close": self.close_late(ask)}
        freed = self.wait_freed(baseline)
        return {
            **late_close,
            "error": error,
            "said_after": said,
            "freed_after": freed,
            "taken": taken,
            "took": time.monotonic() - started,
        }

    def close_late(self, ask: Callable[..., Any]) -> str:
        """What closing another process's memory does once that has ended: torch checks it in a destructor, where an
        error ends the process. Told, and no failure: the product closes before."""
        try:
            answer = ask(None, "close")
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            return f"harmful: {error}"
        return "harmless" if answer == {"sum": 0} else f"harmful: its device gives {answer}"

    def receiver_killed(self) -> dict[str, Any]:
        """SIGKILL the process that took a file; a second one takes the same and is done with it, and it is freed."""
        self.torch.cuda.empty_cache()
        path = self.files[0]
        wanted = byte_sum(self.torch, path)
        self.torch.cuda.empty_cache()
        baseline = self.used()
        with contextlib.ExitStack() as stack:
            stage = stack.enter_context(self.staged())
            stage.wait(120)
            loaded = self.used()
            with self.consuming() as (ask, process):
                given = stage.export(path.name)
                assert ask(given, "share")["sum"] == wanted
                process.kill()
                process.wait(10)
            self.wait_freed(loaded)  # of its context
            stage.abandoned(given)  # as a hold does when an engine's process has ended
            ask, second = stack.enter_context(self.consuming())
            assert ask(stage.export(path.name), "copy")["sum"] == wanted
            second.kill()  # with its copy and its context; it has let go of the file by then
            second.wait(10)
            stage.release(path.name)
            size = path.stat().st_size
            alone = self.wait_freed(loaded - size, 10, size // 2)
        freed = self.wait_freed(baseline)
        return {"file_freed_after": alone, "freed_after": freed}

    def owner_killed(self) -> dict[str, Any]:
        """SIGKILL the process that holds the Stage: its worker must end by itself, and free the memory."""
        self.torch.cuda.empty_cache()
        baseline = self.used()
        program = (
            "import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from instantstart_fs.prefetch import DirectorySource, Stager, plan\n"
            "source = DirectorySource(sys.argv[2])\n"
            f"stage = Stager(source).start(plan(source.weights, None, ['{DEVICE}']))\n"
            "stage.wait(120); print('staged', flush=True); time.sleep(300)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(ROOT), str(self.files_at)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "staged", f"the owner ended with {process.wait(10)}"
            taken = self.used() - baseline
            assert taken > self.total * 0.9, taken
        finally:
            process.kill()
            process.communicate()
        freed = self.wait_freed(baseline)
        return {"taken": taken, "freed_after": freed}

    def too_big(self) -> dict[str, Any]:
        """Refused before anything is allocated: by a budget, and because the device is full."""
        from instantstart_fs.errors import OutOfBudget

        torch = self.torch
        said = []
        for fill in (False, True):
            block = None
            options: dict[str, Any] = {} if fill else {"budget": {DEVICE: self.total - 1}}
            if fill:
                free = torch.cuda.mem_get_info(DEVICE)[0]
                block = torch.empty(free - self.total // 2, dtype=torch.uint8, device=DEVICE)
            baseline = self.used()
            try:
                with self.staged(**options):
                    raise AssertionError("it was not refused")
            except OutOfBudget as error:
                said.append(error.message)
            self.wait_freed(baseline)
            del block
            torch.cuda.empty_cache()
        return {"said": said}

    def lying_header(self) -> dict[str, Any]:
        from instantstart_fs.errors import BadWeights
        from instantstart_fs.prefetch import DirectorySource, Stager, plan

        baseline = self.used()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "model.safetensors")
            header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + b"x" * 4096)
            source = DirectorySource(directory)
            try:
                with Stager(source).start(plan(source.weights, None, [DEVICE])) as stage:
                    stage.wait(60)
                raise AssertionError("it was not refused")
            except BadWeights as error:
                self.wait_freed(baseline)
                return {"said": error.message}


def byte_sum(torch: Any, path: Path) -> int:
    """The sum of a file's bytes, by the device, from a plain read."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(DEVICE)
    return sum_of(torch, data)


def rivals(files: list[Path]) -> Iterator[tuple[str, Callable[[], Any]]]:
    paths = [str(path) for path in files]
    if importlib.util.find_spec("fastsafetensors"):
        for nogds in (True, False):

            def fast(nogds: bool = nogds) -> Any:
                from fastsafetensors import SafeTensorsFileLoader, SingleGroup

                loader = SafeTensorsFileLoader(SingleGroup(), DEVICE, nogds=nogds)
                loader.add_filenames({0: paths})
                buffers = loader.copy_files_to_device()
                kept = [buffers.get_tensor(name) for name in loader.get_keys()]
                return loader, buffers, kept

            yield f"fastsafetensors{' nogds' if nogds else ' gds'}", fast
    if importlib.util.find_spec("runai_model_streamer"):

        def runai() -> Any:
            from runai_model_streamer import SafetensorsStreamer

            with SafetensorsStreamer() as streamer:
                streamer.stream_files(paths)
                return [tensor.to(DEVICE, non_blocking=True) for _, tensor in streamer.get_tensors()]

        yield "runai streamer", runai
    if importlib.util.find_spec("instanttensor"):
        for buffered in (False, True):

            def instant(buffered: bool = buffered) -> Any:
                import instanttensor

                kind = instanttensor.BackendPolicy.BUFFERED if buffered else None  # None: O_DIRECT
                with instanttensor.safe_open(list(paths), framework="pt", device=0, backend=kind) as file:
                    return list(file.tensors())  # since 0.2 of memory of its own

            yield f"instanttensor{' buffered' if buffered else ''}", instant


SMI = ("driver_version", "pcie.link.gen.max", "pcie.link.width.current", "compute_mode", "mig.mode.current")


def driver(uuid: str) -> dict[str, str]:
    """What nvidia-smi tells of a GPU, in words for the table; nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu=uuid,{','.join(SMI)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    known = [[field.strip() for field in line.split(",")] for line in said.splitlines()]
    known = [fields for fields in known if len(fields) == 1 + len(SMI)]
    mine = [fields for fields in known if uuid and uuid in fields[0]] or known[
        :1
    ]  # MIG: an instance has one of its own
    if not mine:
        return {}
    _, version, generation, width, mode, mig = mine[0]
    found = {"driver": version, "link": f"PCIe {generation} ×{width}"}
    if mode not in ("Default", "[N/A]"):
        found["compute_mode"] = mode
    if mig == "Enabled":
        found["mig"] = mig
    return found


def roomy(size: int) -> str:
    """A directory for a checkpoint, the store's copy of it, and a little more, on a filesystem that reads by O_DIRECT
    and whose pages can be dropped: one in memory has no cold reads. If there is none, the usual one for temporary
    files."""
    usual = tempfile.gettempdir()
    for place in dict.fromkeys((usual, "/var/tmp", str(ROOT), "/root", "/mnt", "/data", "/scratch")):
        with contextlib.suppress(OSError):
            if filesystem(Path(place).resolve()) in ("tmpfs", "ramfs") or shutil.disk_usage(place).free < 2.5 * size:
                continue
            with tempfile.NamedTemporaryFile(dir=place) as file:
                os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
            return place
    return usual


def filesystem(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """What the path lies on. Of two mounts on one place the later one lies on top."""
    best, kind = Path(), "?"
    for line in Path(mounts).read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, right.split()[0]
    return kind


class Part(NamedTuple):
    """``needs``: seconds that must be left for it to be begun; ``most``: after so many it has failed."""

    name: str
    work: Callable[[Run], dict[str, Any]]
    needs: float = 15.0
    most: float = 40.0


PARTS = (
    Part("environment", Run.environment, 10, 30),
    Part("checkpoint", Run.checkpoint, 30, 60),
    Part("gds probe", Run.gds, 1, 15),
    Part("equality", Run.equality, 20, 60),
    Part("speed", Run.speed, 30, 55),
    Part("sweep", gpu_probe.sweep, 20, 35),
    Part("page-locking", gpu_probe.page_locking, 15, 25),
    Part("startup", gpu_probe.startup, 20, 40),
    Part("hand-over by share", functools.partial(Run.handover, how="share"), 20, 40),
    Part("hand-over by copy", functools.partial(Run.handover, how="copy"), 20, 40),
    Part("hand-over to another numbering of devices", Run.renumbered, 15, 30),
    Part("mount", gpu_mount.measure, 45, 65),
    Part("killed while loading", functools.partial(Run.killed, when="while loading")),
    Part("killed when loaded", functools.partial(Run.killed, when="when loaded")),
    Part("killed while another has it open", functools.partial(Run.killed, when="while another has it open")),
    Part("receiver killed", Run.receiver_killed, 20, 50),
    Part("owner killed", Run.owner_killed),
    Part("too big", Run.too_big),
    Part("lying header", Run.lying_header, 10, 20),
    Part("several devices", Run.several_devices, 20, 40),
    Part("peers", gpu_probe.peers, 15, 40),
    Part("two releases of torch", gpu_probe.releases, 15, 40),
    Part("rivals", functools.partial(Run.speed, name="rivals", others=True), 25, 90),
)
"""In this order, which the second makes the files for. tests/gpu runs the same, one test each."""


def no_gpu() -> str:
    """Why nothing can be run here; empty where it can."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=gibibytes, default=8 * GIB, help="of the checkpoint (default 8GiB)")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--patience", type=float, default=1.0, help="times the deadline of each part (a slow machine)")
    parser.add_argument("--other-python", default="", help="an interpreter with another release of torch")
    parser.add_argument("--dir", help="where the checkpoint lies for the time of the run")
    parser.add_argument("--out", default=os.environ.get("OUT") or str(Path(__file__).parent / "results"))
    parser.add_argument("--only", default="", metavar="PART,…", help="run these parts alone (and tell the machine)")
    parser.add_argument("--contenders", default="", metavar="NAME,…", help="measure these alone in the parts of speed")
    for hidden in ("--consumer", "--child"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.consumer:
        consumer()
        return 0
    if not options.child:
        names = [part.name for part in PARTS]
        if unknown := [name for name in options.only.split(",") if name.strip() and name.strip() not in names]:
            parser.error(f"no part is named {unknown[0].strip()!r}; there are: {', '.join(names)}")
        place = options.dir or roomy(options.size)
        with tempfile.TemporaryDirectory(prefix="isfs-gpu-", dir=place, ignore_cleanup_errors=True) as directory:
            return gpu_watch.Watch(Path(__file__), sys.argv[1:], Path(options.out), options.limit, directory).run()
    gpu_watch.end_with_parent()
    signal.signal(signal.SIGTERM, cut_off)
    signal.signal(signal.SIGALRM, late)
    run = Run(options, Path(options.work))
    if missing := no_gpu():
        print(f"no GPU: {missing}; not run:")
        for part in PARTS:
            print(f"  {part.name}")
        run.not_run += [f"{part.name}: no GPU: {missing}" for part in PARTS]
        run.write()
        return gpu_watch.NO_GPU
    run.all_parts(PARTS)
    return 0


def cut_off(*_: object) -> None:
    raise CutOff


def late(*_: object) -> None:
    raise Late


def gibibytes(text: str) -> int:
    number = text.lower().removesuffix("gib")
    return int(float(number) * GIB)


if __name__ == "__main__":
    sys.exit(main())
