"""Tells which GPUs torch finds here, and what GPUDirect Storage would do: what `doctor` says of them.

    python -m instantstart_fs.prefetch.gpus

A process of its own looks, since a driver may hang or end who asks it. It makes no CUDA context.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from instantstart_fs.errors import PrefetchError
from instantstart_fs.ipc.children import spawn_module
from instantstart_fs.prefetch import start
from instantstart_fs.prefetch.backends.gds import GdsProbe, probe
from instantstart_fs.prefetch.device_errors import no_device
from instantstart_fs.prefetch.libtorch import load_torch

DEADLINE = 60.0
"""Seconds for importing torch and asking the driver, on a machine that is busy."""
GIB = 1 << 30


class Finding(NamedTuple):
    """What a check has found, as ``doctor.Check`` has it: that one's module needs the daemon's packages."""

    name: str
    outcome: Literal["ok", "warn"]
    found: str
    advice: str = ""


class Gpus(msgspec.Struct, frozen=True):
    """What was found. ``devices``: their names and sizes, in words. ``why``: there is none, or no torch."""

    torch: str
    devices: tuple[str, ...] = ()
    why: str = ""
    gds: GdsProbe | None = None


def look() -> Gpus:
    """Ask torch, in this process."""
    try:
        torch = load_torch()
    except PrefetchError as error:
        return Gpus("", why=error.message)
    cuda = torch.version.cuda
    name = f"torch {torch.__version__}{f' (CUDA {cuda})' if cuda else ''}"
    if not torch.cuda.is_available():
        return Gpus(name, why=no_device(torch) or "no CUDA device is there")
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return Gpus(name, tuple(f"{device.name}, {device.total_memory / GIB:.1f} GiB" for device in found), gds=probe())


def check_gpus(deadline: float = DEADLINE) -> Iterator[Finding]:
    """The findings; none on a machine without NVIDIA's driver."""
    if not os.path.exists(start.DRIVER):
        return
    try:
        child = spawn_module(
            "instantstart_fs.prefetch.gpus", stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            out, err = child.communicate(timeout=deadline)
        finally:
            child.kill()
            # Not waited for without end, as Popen's context manager does: what the driver holds no signal ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
    except subprocess.TimeoutExpired:
        advice = "the kernel's log (`dmesg | grep -i nvrm`) says why"
        yield Finding("GPU", "warn", f"NVIDIA's driver did not answer within {deadline:g} s", advice)
        return
    except OSError as error:
        yield Finding("GPU", "warn", f"nothing could be started that looks for it: {error.strerror}")
        return
    try:
        found = msgspec.json.decode(out, type=Gpus)
    except msgspec.DecodeError:
        last = (err.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        yield Finding("GPU", "warn", f"asking torch for GPUs ended with {child.returncode}: {last}")
        return
    yield from findings(found)


def findings(found: Gpus) -> Iterator[Finding]:
    """What is to be said of it."""
    if not found.torch:
        needed = "only `prefetch` needs torch: pip install 'instantstart-fs[gpu]', here or in the engine's environment"
        yield Finding("GPU", "ok", "NVIDIA's driver is there, and torch is not installed here", needed)
    elif not found.devices:
        yield Finding(
            "GPU", "warn", f"{found.torch} finds none: {found.why}", "`prefetch` stages to the CPU until then"
        )
    else:
        yield Finding("GPU", "ok", f"{found.torch} finds {len(found.devices)}: {'; '.join(found.devices)}")
    if found.gds is not None:
        there = "available" if found.gds.native else "not available"
        instead = "" if found.gds.native else "; `prefetch` reads through page-locked memory"
        yield Finding("GPU storage", "ok", f"GPUDirect Storage is {there}: {found.gds.reason}{instead}")


if __name__ == "__main__":
    print(msgspec.json.encode(look()).decode(), flush=True)
    os._exit(0)  # a driver that hangs at the end has said what it had to say
