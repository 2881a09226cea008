"""Starts the staging of a whole pipeline in one call: what `instantstart prefetch` and ``Client.prefetch`` do alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from instantstart_fs.errors import PrefetchError
from instantstart_fs.prefetch.device_errors import no_device, visible
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.plan import plan
from instantstart_fs.prefetch.sources import Source
from instantstart_fs.prefetch.stager import Stage, Stager

DRIVER = "/dev/nvidiactl"
"""A device file that NVIDIA's driver makes."""


def every_device() -> tuple[str, ...]:
    """Every CUDA device that torch sees; the CPU where there is none, or no torch."""
    try:
        count = int(load_torch().cuda.device_count())
    except PrefetchError:
        count = 0
    return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)


def why_no_gpu() -> str:
    """Return why torch finds no GPU where there should be one: the driver is there, or the environment names some;
    empty elsewhere."""
    if not (os.path.exists(DRIVER) or visible()):
        return ""
    try:
        return no_device(load_torch())
    except PrefetchError as error:
        return error.message


def start_stage(
    source: Source,
    devices: Sequence[str],
    *,
    tensor_parallel: int | None = None,
    backend: str = "auto",
    readers: int = 0,
    deadlines: Mapping[str, float] | None = None,
    what_fits: bool = False,
) -> Stage:
    """Plan all of ``source`` and start; its bytes are on their way when this returns.

    The Stage closes ``source``; where it raises, ``source`` is closed already. The arguments are those of ``plan`` and
    Stager, and so are the errors."""
    try:
        planned = plan(source.weights, None, devices, tensor_parallel, deadlines=deadlines)
        stager = Stager(source, backend=backend, readers=readers, what_fits=what_fits)
    except BaseException:
        source.close()
        raise
    return stager.start(planned)
