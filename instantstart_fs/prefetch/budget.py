"""Decides which models fit the memory of the devices, before anything is allocated. It takes no memory itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from instantstart_fs.errors import OutOfBudget
from instantstart_fs.prefetch.device_worker import DeviceWorker
from instantstart_fs.prefetch.memory import available, rounded
from instantstart_fs.prefetch.plan import Plan, admit

DEVICE_RESERVE = 512 * 1024 * 1024
"""Bytes of a GPU's free memory that are left alone: engines start at the same time, and a context takes about so
much."""
CUDA_UNIT = 2 * 1024 * 1024
"""The step of allocations, in bytes. cudaMalloc takes whole pages of the device, and torch rounds what it asks for up
to so much."""


def cpu_limits(plan: Plan, budget: Mapping[str, int], *, what_fits: bool) -> dict[str, int]:
    """Bytes that may be taken on each CPU device that has a limit.

    Args:
        budget: device → bytes, as the user asked.
        what_fits: whether a part of the models would do.

    Raises:
        OutOfBudget: the machine's free memory does not suffice for the whole plan, and for a part it may not be used.
    """
    devices = [device for device in plan.devices if not device.device.startswith("cuda")]
    limits = {device.device: budget[device.device] for device in devices if device.device in budget}
    refused = admit(plan, limits)
    wanted = sum(rounded(file.size) for device in devices for file in device.files if file.model not in refused)
    if not devices:
        return limits
    free = available()
    if wanted <= free:
        return limits
    if what_fits and len(devices) == 1:
        name = devices[0].device
        return {name: min(free, limits.get(name, free))}
    raise OutOfBudget(f"{plan.pipeline} needs {wanted} bytes of memory and {free} may be taken (90 % of what is free)")


def device_limits(workers: Sequence[DeviceWorker], budget: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that may be taken on each GPU: of what is free there, and not more than the user's
    ``budget``."""
    limits = {}
    for worker in workers:
        if worker.ready is not None and worker.ready.free is not None:
            free = max(0, worker.ready.free - DEVICE_RESERVE)
            limits[worker.plan.device] = min(free, budget.get(worker.plan.device, free))
    return limits


def refusals(plan: Plan, limits: Mapping[str, int], *, what_fits: bool) -> tuple[str, ...]:
    """The models of ``plan`` that do not fit. Raises OutOfBudget unless what fits is wanted and something does."""
    refused = admit(plan, limits, cuda_unit=CUDA_UNIT)
    if refused and (not what_fits or not plan.without(refused).total_bytes):
        needed = {device.device: device.bytes for device in plan.devices}
        described = ", ".join(
            f"{device}: {needed[device]} bytes needed, {limit} may be taken" for device, limit in limits.items()
        )
        raise OutOfBudget(f"{plan.pipeline} does not fit: {described}")
    return refused
