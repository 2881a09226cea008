"""Loads a pipeline's weights as a dict of tensors (``load_state_dict``), for engines without a plugin of their own."""

from __future__ import annotations

import logging
import mmap
import os
from typing import Any

from instantstart_fs.errors import DaemonUnreachable, PrefetchError, UsageError
from instantstart_fs.prefetch.hold_client import HoldClient
from instantstart_fs.prefetch.plan import check_devices, plan
from instantstart_fs.prefetch.sources import LeaseSource, Source
from instantstart_fs.prefetch.stager import Stager
from instantstart_fs.prefetch.tensors import NotShared, from_ipc, from_memory, place_of, views

log = logging.getLogger(__name__)


def take(held: HoldClient, path: str, timeout: float = 600.0, *, device: int | None = None) -> dict[str, Any]:
    """name → tensor of one held safetensors file, uncopied; waits until it is in place. On the CPU a private view:
    writing into it changes nobody else's.

    Args:
        device: the GPU that is to see it (tensors.from_ipc); None: the one that holds it.

    Raises:
        PrefetchError: it cannot be had.
    """
    taken = held.take(path, timeout)
    if taken.layout is None:
        raise PrefetchError(f"{path} is no safetensors file")
    if taken.handle is not None:
        return views(from_ipc(taken.handle, taken.size, device), taken.layout, path)
    assert taken.fd is not None
    try:
        if os.fstat(taken.fd).st_size < taken.size:
            raise PrefetchError(f"{path}: its memory is smaller than the file")
        memory = mmap.mmap(taken.fd, taken.size, access=mmap.ACCESS_COPY)
    finally:
        os.close(taken.fd)
    return views(from_memory(memory, taken.size), taken.layout, path)


def load_state_dict(
    pipeline: str,
    device: str = "cpu",
    *,
    model: str | None = None,
    socket: str | None = None,
    source: Source | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """name → torch.Tensor on ``device`` of all safetensors files of a pipeline, or of one of its models.

    Weights that `instantstart prefetch --hold` keeps for it are taken over; others are staged here. On the CPU the
    tensors are views of the files' memory, uncopied; on a GPU they are this process's own, copied file by file within
    the device. ``socket``: the daemon's; ``source``: read from there instead of a daemon; ``timeout``: seconds.

    A hold of another generation than the daemon has now is left alone, with a line in the log; where no daemon is in
    reach (in a container, say) a hold counts as current, since it ends with its daemon. Where processes may not share a
    GPU's memory, weights come by way of the CPU's, with a line in the log (not with a ``source``).

    Raises UsageError for a device or model that is not there, PrefetchError, and what staging raises.
    """
    try:
        check_devices([device])
    except UsageError:
        if source is not None:
            source.close()
        raise
    if source is None:
        try:
            held = HoldClient(pipeline)
        except PrefetchError:
            pass  # nobody holds them: stage them here
        else:
            with held:
                try:
                    return _taken(held, pipeline, device, model, socket)
                except PrefetchError as error:
                    log.warning("%s: what is held was not taken over: %s", pipeline, error)
    try:
        return _staged(source or LeaseSource(pipeline, socket), device, model, timeout)
    except NotShared as error:
        if source is not None:  # it is used up
            raise
        log.warning("%s: staged to the CPU, and copied from there: %s", pipeline, error)
    found = _staged(LeaseSource(pipeline, socket), "cpu", model, timeout)
    return {name: tensor.to(device) for name, tensor in found.items()}


def _taken(held: HoldClient, pipeline: str, device: str, model: str | None, socket: str | None) -> dict[str, Any]:
    manifest = held.manifest()
    current = _generation(pipeline, socket)
    if current not in (None, manifest.generation):
        raise PrefetchError(f"{pipeline}: generation {manifest.generation} is held, and {current} is current")
    place = place_of(device)
    files = [file for file in manifest.files if model is None or file.model == model]
    if not files or any(file.place != place for file in files) or manifest.freed:
        raise PrefetchError(f"{pipeline} is not held on {device} as a whole")
    found: dict[str, Any] = {}
    for file in files:
        if file.path.endswith(".safetensors"):
            _join(found, _owned(take(held, file.path)), file.path)
            held.release_file(file.path)
    return found


def _generation(pipeline: str, socket: str | None) -> int | None:
    """The daemon's; None where none is in reach."""
    try:
        source = LeaseSource(pipeline, socket)
    except DaemonUnreachable:
        return None
    source.close()
    return source.weights.generation


def _staged(source: Source, device: str, model: str | None, timeout: float | None) -> dict[str, Any]:
    try:
        weights = source.weights
        if model is not None and model not in weights.models:
            raise UsageError(f"{weights.pipeline} has no model {model!r}")
        planned = plan(weights, None, [device])
        if model is not None:
            planned = planned.without([name for name in weights.models if name != model])
    except BaseException:
        source.close()
        raise
    found: dict[str, Any] = {}
    with Stager(source).start(planned) as stage:
        for file in planned.devices[0].files:
            stage.wait_file(file.path, timeout)
            if stage.layout(file.path) is not None:
                _join(found, _owned(stage.file_tensors(file.path)), file.path)
            stage.release(file.path)
    return found


def _owned(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors themselves on the CPU, where a view keeps its memory alive; copies of another process's GPU
    memory."""
    return {name: tensor.clone() if tensor.is_cuda else tensor for name, tensor in tensors.items()}


def _join(found: dict[str, Any], tensors: dict[str, Any], path: str) -> None:
    for name, tensor in tensors.items():
        if name in found:
            raise UsageError(f"{name} is in {path} and in a file before it; name the model")
        found[name] = tensor
