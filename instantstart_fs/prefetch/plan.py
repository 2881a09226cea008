"""Decides which file goes to which device, and in which order. Pure: sizes and names in, a frozen plan out.

- A ``sharded_state`` checkpoint (``model-rank-R-part-P.safetensors``) belongs to its ranks already: rank R's files go
  to rank R's device.
- Of any other checkpoint every rank needs a part of most tensors, so it is staged as whole files, spread so that all
  devices get about the same number of bytes; engines take their parts by peer copies.
- Several models of one pipeline share one schedule: earliest deadline first, and where no deadline says otherwise, the
  smaller model first (it is ready sooner and delays the others least). The device is never idle while bytes are left,
  so the last model is ready when all bytes have been read once, whatever the order.

Every byte of every file is in exactly one extent of one device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from instantstart_fs.core.weights import WeightFile, WeightSet, schedule
from instantstart_fs.errors import BadWeights, UsageError
from instantstart_fs.prefetch.layout import FileLayout

EXTENT = 8 * 1024 * 1024
"""Bytes read by one call: enough for a disk's full speed, and so few that four in flight overlap with copies."""
BLOCK = 4096
"""Bytes that extents and O_DIRECT reads are aligned to."""


class PlannedFile(msgspec.Struct, frozen=True):
    """A file of the plan. ``order``: position in the device's schedule. ``deadline``: seconds after the start that its
    model is wanted at, infinity if nobody said. ``layout``: None if it was unknown when planning; then it is found when
    the file is opened."""

    path: str
    model: str
    size: int
    order: int
    rank: int | None = None
    deadline: float = float("inf")
    layout: FileLayout | None = None

    @property
    def extents(self) -> Iterator[tuple[int, int]]:
        """(start, end) in bytes; starts are multiples of EXTENT, the last end is the file's."""
        for start in range(0, self.size, EXTENT):
            yield start, min(start + EXTENT, self.size)


class DevicePlan(msgspec.Struct, frozen=True):
    """The part of one device. ``device``: "cpu", "cpu:1" (a second worker with memory of its own) or "cuda:N".
    ``files`` in schedule order."""

    device: str
    files: tuple[PlannedFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


class Plan(msgspec.Struct, frozen=True):
    """The plan of a stage. ``how``: "sharded_state", "balanced", or "mixed" where models differ."""

    pipeline: str
    generation: int
    devices: tuple[DevicePlan, ...]
    how: str

    @property
    def total_bytes(self) -> int:
        return sum(device.bytes for device in self.devices)

    @property
    def models(self) -> tuple[str, ...]:
        """Return the models in schedule order."""
        found = {file.model: file.order for device in self.devices for file in reversed(device.files)}
        return tuple(sorted(found, key=lambda model: (found[model], model)))

    def device_of(self, path: str) -> str | None:
        for device in self.devices:
            if any(file.path == path for file in device.files):
                return device.device
        return None

    def without(self, models: Sequence[str]) -> Plan:
        """A plan without these models."""
        devices = tuple(
            msgspec.structs.replace(
                device, files=tuple(file for file in device.files if file.model not in frozenset(models))
            )
            for device in self.devices
        )
        return msgspec.structs.replace(self, devices=devices)


def plan(
    manifest: WeightSet,
    files: Mapping[str, FileLayout] | None,
    devices: Sequence[str],
    tensor_parallel: int | None = None,
    *,
    deadlines: Mapping[str, float] | None = None,
) -> Plan:
    """``files``: layouts that are known already, by path (None or a part of them: a file that is still being fetched
    has no header yet). ``devices``: one or more. ``tensor_parallel``: the number of ranks that will load (default: the
    number of devices); rank r uses device r · devices ÷ ranks. ``deadlines``: model → seconds.

    Raises UsageError for devices, ranks or deadlines that do not fit the checkpoint, BadWeights for layouts that do not
    fit their files or give two tensors of a rank one name.
    """
    check_devices(devices)
    ranks = len(devices) if tensor_parallel is None else tensor_parallel
    if ranks < 1:
        raise UsageError(f"tensor parallel size {ranks}: at least 1")
    if not manifest.files:
        raise UsageError(f"{manifest.pipeline} has no weight files that could be staged")
    deadlines = dict(deadlines or {})
    unknown = sorted(set(deadlines) - set(manifest.models))
    if unknown:
        raise UsageError(f"{manifest.pipeline} has no model {unknown[0]!r} to set a deadline for")
    if strange := [model for model, seconds in deadlines.items() if math.isnan(seconds)]:
        raise UsageError(f"{manifest.pipeline}: the deadline of {strange[0]!r} is no number")
    layouts = dict(files or {})
    _check_layouts(manifest, layouts)
    loads = [0] * len(devices)
    placed: list[list[PlannedFile]] = [[] for _ in devices]
    hows = set()
    order = 0
    for model in schedule(manifest, deadlines):
        group = [file for file in manifest.files if file.model == model]
        found = {file.rank for file in group}
        sharded = found != {None}
        hows.add("sharded_state" if sharded else "balanced")
        if sharded:
            places = _by_rank(manifest.pipeline, group, ranks, len(devices))
        else:
            places = _balanced(group, loads)
        for file in group:
            device = places[file.path]
            loads[device] += file.size
            placed[device].append(
                PlannedFile(
                    file.path,
                    file.model,
                    file.size,
                    order,
                    file.rank,
                    deadlines.get(model, float("inf")),
                    layouts.get(file.path),
                )
            )
            order += 1
    return Plan(
        manifest.pipeline,
        manifest.generation,
        tuple(DevicePlan(device, tuple(files)) for device, files in zip(devices, placed, strict=True)),
        hows.pop() if len(hows) == 1 else "mixed",
    )


def admit(planned: Plan, budgets: Mapping[str, int], *, cuda_unit: int = 1) -> tuple[str, ...]:
    """The models that do not fit: those are admitted, in schedule order, whose files still fit on every device.

    ``budgets``: bytes by device; a device that is not named has no limit. ``cuda_unit``: bytes that the memory of a
    file on a GPU is a multiple of."""
    left = dict(budgets)
    refused = []
    for model in planned.models:
        needed = {}
        for part in planned.devices:
            unit = cuda_unit if part.device.startswith("cuda") else 1
            needed[part.device] = sum(-(-file.size // unit) * unit for file in part.files if file.model == model)
        if any(device in left and count > left[device] for device, count in needed.items()):
            refused.append(model)
            continue
        for device, count in needed.items():
            if device in left:
                left[device] -= count
    return tuple(refused)


def check_devices(devices: Sequence[str]) -> None:
    """Check the names of devices. Raises UsageError for names that nothing could be staged to."""
    if not devices:
        raise UsageError("no device to stage to")
    for device in devices:
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cuda" and not number):
            raise UsageError(f"device {device!r} is neither cpu nor cuda:N")
    twice = [device for device in devices if list(devices).count(device) > 1]
    if twice:
        raise UsageError(f"device {twice[0]!r} is named twice")


def _check_layouts(manifest: WeightSet, layouts: Mapping[str, FileLayout]) -> None:
    sizes = {file.path: file.size for file in manifest.files}
    names: dict[tuple[str, int | None, str], str] = {}
    for file in manifest.files:
        layout = layouts.get(file.path)
        if layout is None:
            continue
        if layout.size != file.size:
            raise BadWeights(f"{file.path}: its layout speaks of {layout.size} bytes and the manifest of {file.size}")
        for tensor in layout.tensors:
            other = names.setdefault((file.model, file.rank, tensor.name), file.path)
            if other != file.path:
                raise BadWeights(f"{tensor.name} is in {other} and in {file.path}")
    foreign = sorted(set(layouts) - set(sizes))
    if foreign:
        raise BadWeights(f"{foreign[0]} is no weight file of {manifest.pipeline}")


def _by_rank(pipeline: str, group: Sequence[WeightFile], ranks: int, devices: int) -> dict[str, int]:
    found = {file.rank for file in group}
    if None in found:
        plain = next(file.path for file in group if file.rank is None)
        raise UsageError(f"{pipeline}: {plain} lies beside the files of a sharded state; one of them is not loaded")
    highest = max(rank for rank in found if rank is not None)
    if highest + 1 != ranks:
        raise UsageError(
            f"{pipeline} was saved for tensor parallel size {highest + 1} and {ranks} is asked for (--tensor-parallel)"
        )
    return {file.path: (file.rank or 0) * devices // ranks for file in group}


def _balanced(group: Sequence[WeightFile], loads: Sequence[int]) -> dict[str, int]:
    """The largest first, each to the device that has least."""
    loads = list(loads)
    places = {}
    for file in sorted(group, key=lambda file: -file.size):
        device = min(range(len(loads)), key=lambda candidate: (loads[candidate], candidate))
        loads[device] += file.size
        places[file.path] = device
    return places
