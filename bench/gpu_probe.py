"""Parts of bench/gpu.py that ask the machine, rather than the stager: what a start costs, what page-locking costs by
size, which settings of the reading ring are fastest, what devices can do with each other's memory, and whether two
releases of torch can.

Whatever may end a process, or leaves threads and page-locked memory behind, runs in one of its own, which prints a line
of JSON for each figure: what it printed before it was killed counts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_watch import Skipped, last_words  # noqa: E402

if TYPE_CHECKING:
    from bench.gpu import Run

MIB = 1024 * 1024
DEVICE = "cuda:0"
DRIVER = "INSTANTSTART_LIBCUDA"
"""Variable: the driver's library, where it is not libcuda.so.1."""
SIZES = (2 * MIB, 32 * MIB, 256 * MIB, 1024 * MIB)
"""Bytes that are page-locked at once."""
WARM = ((8, 8, 2), (12, 8, 2), (16, 8, 2), (4, 8, 2), (8, 2, 2), (16, 2, 2), (16, 2, 4), (12, 4, 2), (8, 16, 2))
COLD = ((8, 8, 2), (16, 8, 2), (32, 8, 2), (16, 2, 4))
"""(readers, MiB of an extent, buffers of each reader); each reader has a stream. The first is what is built in."""


# -- what a start costs ------------------------------------------------------------------------------------------------


def startup(run: Run) -> dict[str, Any]:
    """Seconds of whole processes: Python, torch, a context and a ring; the same by the driver's interface alone, which
    is what a worker without torch would pay. Raises AssertionError."""
    found: dict[str, Any] = {}
    run.result["parts"]["startup"] = found
    ring = "torch.empty(1 << 27, dtype=torch.uint8, pin_memory=True)"
    programs = {
        "python": "pass",
        "torch, first": "import torch",
        "torch": "import torch",
        "torch, context": "import torch; torch.empty(1, device='cuda:0')",
        "torch, context, ring": f"import torch; torch.empty(1, device='cuda:0'); {ring}",
    }
    for name, program in programs.items():
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{name}: exit {done.returncode}: {last_words(done.stderr)}\n{done.stderr[-500:]}"
        found[name] = round(time.perf_counter() - began, 3)
        run.write()
    began = time.perf_counter()
    for line in lines(run, "driver"):
        found.setdefault("driver", {}).update(line)
    found["driver, whole process"] = round(time.perf_counter() - began, 3)
    if "missing" in found["driver"]:
        run.not_run.append(f"startup by the driver's interface: {found['driver']['missing']}")
    return found


def driver(_: argparse.Namespace) -> None:
    """A context and page-locked memory as a worker without torch would make them."""
    try:
        cuda = ctypes.CDLL(os.environ.get(DRIVER, "libcuda.so.1"))
    except OSError as error:
        tell({"missing": str(error)})
        return
    at = time.perf_counter()

    def lap(name: str, code: int) -> None:
        nonlocal at
        now = time.perf_counter()
        tell({name: round(now - at, 4)} if code == 0 else {name: f"CUDA error {code}"})
        assert code == 0, f"{name}: CUDA error {code}"
        at = time.perf_counter()

    device, context = ctypes.c_int(), ctypes.c_void_p()
    memory, address = ctypes.c_uint64(), ctypes.c_void_p()
    lap("cuInit", cuda.cuInit(0))
    lap("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), 0))
    lap("context", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    lap("cuCtxSetCurrent", cuda.cuCtxSetCurrent(context))
    lap("cuMemHostAlloc 128 MiB", cuda.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(128 * MIB), 0))
    lap("cuMemAlloc 1 GiB", cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1024 * MIB)))
    lap("cuMemFree 1 GiB", cuda.cuMemFree_v2(memory))


# -- page-locking ------------------------------------------------------------------------------------------------------


def page_locking(run: Run) -> dict[str, Any]:
    """By size: GB/s of making memory there and then (cudaHostAlloc), of registering what exists already (a memfd;
    anonymous huge pages), and of copies out of each."""
    found: dict[str, Any] = {}
    run.result["parts"]["page-locking"] = found
    for line in lines(run, "locking"):
        found.setdefault(line.pop("kind"), []).append(line)
        run.write()
    assert found, "nothing was measured"
    return found


def locking(_: argparse.Namespace) -> None:
    import torch

    runtime = torch.cuda.cudart()
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    sizes = [size for size in SIZES if size <= min(free // 4, torch.cuda.mem_get_info(DEVICE)[0] // 2)]
    target = torch.empty(max(sizes), dtype=torch.uint8, device=DEVICE)
    for size in sizes:
        began = time.perf_counter()
        line: dict[str, Any] = {"kind": "cudaHostAlloc", "mib": size // MIB}
        try:
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            tell({**line, "refused": str(error).splitlines()[0]})
        else:
            told(line, size, time.perf_counter() - began, copied(target, pinned))
            del pinned
        for kind in ("memfd", "huge pages"):
            with memory_of(kind, size) as area:
                address = ctypes.addressof(ctypes.c_char.from_buffer(area))
                began = time.perf_counter()
                ctypes.memset(address, 1, size)
                line = {"kind": kind, "mib": size // MIB, "touch_gb_s": rate(size, time.perf_counter() - began)}
                began = time.perf_counter()
                code = int(runtime.cudaHostRegister(address, size, 0))
                took = time.perf_counter() - began
                if code:
                    tell({**line, "refused": code})
                    continue
                source = torch.frombuffer(area, dtype=torch.uint8)
                speed = copied(target, source)
                began = time.perf_counter()
                runtime.cudaHostUnregister(address)
                told({**line, "unlock_gb_s": rate(size, time.perf_counter() - began)}, size, took, speed)
                del source


@contextlib.contextmanager
def memory_of(kind: str, size: int) -> Iterator[mmap.mmap]:
    if kind == "memfd":
        fd = os.memfd_create("bench", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            area = mmap.mmap(fd, size)
        finally:
            os.close(fd)
    else:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
    yield area  # unmapped with its last reference: ctypes keeps one for a while


def copied(target: Any, source: Any) -> float:
    """GB/s of the best of three copies to the device."""
    import torch

    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target[: len(source)].copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, rate(len(source), time.perf_counter() - began))
    return best


def told(line: dict[str, Any], size: int, seconds: float, speed: float) -> None:
    tell({**line, "lock_gb_s": rate(size, seconds), "lock_ms": round(seconds * 1e3, 2), "h2d_gb_s": speed})


# -- which settings are fastest ----------------------------------------------------------------------------------------


def sweep(run: Run) -> dict[str, Any]:
    """Page cache to device memory, and disk to device memory, by the built-in backend's own loop in one process: by
    number of readers, bytes of an extent, and buffers of each reader. Interleaved rounds, as many as there is time."""
    found: dict[str, Any] = {"warm": {}, "cold": {}, "refused": {}}
    run.result["parts"]["sweep"] = found
    for line in lines(run, "ring", "--work", str(run.files_at)):
        if "refused" in line:
            found["refused"][line["settings"]] = line["refused"]
        else:
            found[line["temperature"]].setdefault(line["settings"], []).append(line["gb_s"])
        run.write()
    for temperature in ("warm", "cold"):
        middle = {name: round(statistics.median(values), 2) for name, values in found[temperature].items()}
        found[f"{temperature} medians"] = middle
    if found["refused"] and not found["warm"]:
        raise Skipped(next(iter(found["refused"].values())))
    assert found["warm"], "nothing was measured"
    return found


def ring(options: argparse.Namespace) -> None:
    from bench.gpu import forget, remember

    files = sorted(Path(options.work).glob("*.safetensors"))
    for number in range(options.rounds):
        turn = number % len(WARM)
        remember(files)
        for readers, extent, slots in (*WARM[turn:], *WARM[:turn]):
            one_setting(files, "warm", readers, extent, slots)
        for readers, extent, slots in COLD if number < 2 else ():
            forget(files)
            one_setting(files, "cold", readers, extent, slots)


def one_setting(files: list[Path], temperature: str, readers: int, extent: int, slots: int) -> None:
    """Through the backend as a worker uses it, without a worker. Its threads stay, and wait."""
    import torch

    from instantstart_fs.prefetch.backends.base import Item
    from instantstart_fs.prefetch.backends.direct import DirectCuda

    backend = DirectCuda(DEVICE, readers, 0.0, extent=extent * MIB, slots=slots)
    settings = f"{readers} readers, {extent} MiB, {slots} buffers each"
    reason = backend.refusal() or (backend.lacked and backend.lacked[1])  # fewer readers are another setting
    if reason:
        tell({"temperature": temperature, "settings": settings, "refused": reason})
        return
    targets = [torch.empty(path.stat().st_size, dtype=torch.uint8, device=DEVICE) for path in files]
    torch.cuda.synchronize()
    ended, left, errors, lock = threading.Event(), [len(files)], list[Exception](), threading.Lock()

    def on_end(item: Item, error: Exception | None) -> None:
        with lock:
            left[0] -= 1
            if error is not None:
                errors.append(error)
            if errors or not left[0]:
                ended.set()

    began = time.perf_counter()
    for number, (path, target) in enumerate(zip(files, targets, strict=True)):
        fds = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
        backend.submit(Item(number, path.name, len(target), number, fds, target, lambda *_: None, on_end))
    assert ended.wait(60), "not within 60 s"
    seconds = time.perf_counter() - began
    if errors:
        raise errors[0]
    total = sum(len(target) for target in targets)
    tell({"temperature": temperature, "settings": settings, "gb_s": rate(total, seconds)})
    del targets
    torch.cuda.empty_cache()


# -- devices with each other -------------------------------------------------------------------------------------------


def peers(run: Run) -> dict[str, Any]:
    """Which GPU reaches which, how fast copies between them are, and what it costs a GPU that another one's process
    opens memory of it: no context of its own where peers can be reached. Raises AssertionError; Skipped."""
    from bench.gpu import SLACK

    torch = run.torch
    count = torch.cuda.device_count()
    if count < 2:
        raise Skipped("there is one GPU")
    found: dict[str, Any] = {"reaches": {}, "copies_gb_s": {}}
    run.result["parts"]["peers"] = found
    size = min(256 * MIB, *(torch.cuda.mem_get_info(number)[0] // 4 for number in range(count)))
    for one in range(count):
        for other in range(count):
            if one == other:
                continue
            pair = f"{one}→{other}"
            found["reaches"][pair] = bool(torch.cuda.can_device_access_peer(one, other))
            source = torch.empty(size, dtype=torch.uint8, device=f"cuda:{one}")
            target = torch.empty(size, dtype=torch.uint8, device=f"cuda:{other}")
            best = 0.0
            for _ in range(3):
                torch.cuda.synchronize(one)
                torch.cuda.synchronize(other)
                began = time.perf_counter()
                target.copy_(source)
                torch.cuda.synchronize(other)
                best = max(best, rate(size, time.perf_counter() - began))
            found["copies_gb_s"][pair] = best
            del source, target
    torch.cuda.empty_cache()
    run.write()
    with run.staged(["cuda:1"]) as stage:
        stage.wait(120)
        before = torch.cuda.mem_get_info("cuda:1")[0]
        with run.consuming() as (ask, _):
            exported = stage.export(run.files[0].name)
            answer = ask(exported, "share", device=0)
            found["taken_on_the_owner"] = before - torch.cuda.mem_get_info("cuda:1")[0]
    found["opened_on"] = answer["number"]
    if found["reaches"]["0→1"]:
        assert answer["number"] == 0, "it was opened on its owner's device, though peers can be reached"
        assert found["taken_on_the_owner"] <= SLACK, f"{found['taken_on_the_owner'] / MIB:.0f} MiB more on its owner"
    return found


# -- two releases of torch ---------------------------------------------------------------------------------------------

OWNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import msgspec, torch
from instantstart_fs.prefetch import DirectorySource, Stager, plan
source = DirectorySource(sys.argv[2])
with Stager(source).start(plan(source.weights, None, [sys.argv[4]])) as stage:
    stage.wait(60)
    exported = stage.export(sys.argv[3])
    print(json.dumps({"torch": torch.__version__, "size": exported.size, "handle": msgspec.to_builtins(exported.handle),
                      "layout": msgspec.to_builtins(exported.layout)}), flush=True)
    sys.stdin.readline()
"""


def releases(run: Run) -> dict[str, Any]:
    """A hand-over from this torch to another release, and back: opened with equal bytes, or refused with both named.
    Raises AssertionError; Skipped."""
    from bench.gpu import byte_sum

    other = getattr(run.options, "other_python", "") or os.environ.get("INSTANTSTART_OTHER_PYTHON")
    if not other:
        raise Skipped("no second environment was named (--other-python, or INSTANTSTART_OTHER_PYTHON)")
    if why := unusable(other):
        raise Skipped(f"{other} is of no use: {why}")
    path = run.files[0]
    wanted = byte_sum(run.torch, path)
    found: dict[str, Any] = {"here": str(run.torch.__version__)}
    run.result["parts"]["two releases of torch"] = found
    with run.staged() as stage, run.consuming(python=other) as (ask, _):
        stage.wait(120)
        answer = ask(stage.export(path.name), "share")
        found["there"] = answer["torch"]
        found["given"] = verdict(answer, wanted, found)
    run.write()
    with (
        subprocess.Popen(
            [other, "-c", OWNER, str(ROOT), str(run.files_at), path.name, DEVICE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as owner,
        run.consuming() as (ask, _),
    ):  # fmt: skip
        assert owner.stdout is not None
        try:
            line = owner.stdout.readline()
            assert line, f"the other release's stage ended with {owner.wait(10)}"
            found["taken"] = verdict(ask(json.loads(line), "share"), wanted, found)
        finally:
            owner.kill()
    return found


def unusable(python: str) -> str:
    """Why nothing can be taken over by this interpreter; empty where it can."""
    try:
        done = subprocess.run(
            [python, "-c", "import msgspec, torch"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else last_words(done.stderr)


def verdict(answer: dict[str, Any], wanted: int, found: dict[str, Any]) -> str:
    """Opened, or why not. Raises AssertionError where it has other bytes, or the refusal does not name the releases."""
    if "error" not in answer:
        assert answer["sum"] == wanted, f"the sum of its bytes is {answer['sum']}, not {wanted}"
        return "opened, equal"
    assert found["here"] in answer["error"] and found["there"] in answer["error"], answer["error"]
    return f"refused: {answer['error']}"


# -- processes of their own --------------------------------------------------------------------------------------------


def lines(run: Run, role: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """What a process of its own prints, as it comes. Killed with the part's time. Raises AssertionError."""
    command = [sys.executable, __file__, role, "--rounds", str(run.options.rounds), *arguments]
    with (
        tempfile.TemporaryFile("w+") as said,  # no pipe: nobody reads it until the end, and what fills one waits
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout is not None
        late = threading.Timer(max(1.0, run.part_left - 2), process.kill)
        late.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
            status = process.wait(10)
        finally:
            in_time = not late.finished.is_set()
            late.cancel()
            process.kill()
        if not in_time:
            run.not_run.append(f"{role}: some of it: its time was up")
            return
        said.seek(0)
        words = said.read()
        assert status == 0, f"{role}: exit {status}: {last_words(words)}\n{words[-500:]}"


def tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def rate(size: int, seconds: float) -> float:
    return round(size / max(seconds, 1e-9) / 1e9, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["driver", "locking", "ring"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", default="")
    options = parser.parse_args()
    {"driver": driver, "locking": locking, "ring": ring}[options.role](options)
    sys.stdout.flush()
    os._exit(0)  # readers wait for ever


if __name__ == "__main__":
    main()
