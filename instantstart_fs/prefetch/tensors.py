"""Makes tensors that are views into a staged file. It copies a tensor only where its bytes are not aligned to its
dtype.

It serves the Stage's own process and the one that takes the memory over: it needs the file's bytes and its layout.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any

from instantstart_fs.errors import BadWeights, PrefetchError
from instantstart_fs.prefetch.device_errors import explained, visible
from instantstart_fs.prefetch.layout import BITS, FileLayout, torch_dtypes
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.messages import IpcHandle

RAW = 64
"""Bytes of CUDA's own handle (CUDA_IPC_HANDLE_SIZE)."""
_OTHER_FORMAT = ("future version", "handle size", "illegal type")
"""Words in the errors of torch about a handle that another release has made."""


class NotShared(PrefetchError):
    """One process's device memory cannot be had by another; bytes can reach the device in other ways."""


def place_of(device: str) -> str:
    """The name of a device's memory in every process: "cpu", or the UUID of the GPU that is "cuda:N" here.
    Raises PrefetchError for a GPU that is not there."""
    if not device.startswith("cuda"):
        return "cpu"
    torch, number = load_torch(), int(device.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        seen = visible()
        raise PrefetchError(
            f"{device}: there are {torch.cuda.device_count()} CUDA devices{f' ({seen})' if seen else ''}"
        )
    uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    if uuid is None:
        raise PrefetchError(f"{device}: torch {torch.__version__} does not tell a GPU's UUID; a newer release does")
    return str(uuid)


def _number_of(place: str) -> int:
    torch = load_torch()
    for number in range(torch.cuda.device_count()):
        if place_of(f"cuda:{number}") == place:
            return number
    raise PrefetchError(
        f"the GPU {place} is not visible to this process ({visible() or 'a container that has fewer devices?'})"
    )


def from_memory(memory: mmap.mmap, size: int) -> Any:
    """The ``size`` first bytes of a mapping as a uint8 tensor that keeps it alive."""
    torch = load_torch()
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)


def from_ipc(handle: IpcHandle, size: int, device: int | None = None) -> Any:
    """The ``size`` first bytes of another process's device memory as a uint8 tensor. A handle can be opened once.

    Args:
        device: the GPU that is to see the memory, which may lie on another one: then its number is the tensor's
            device, too. None: the one on which the memory lies.

    Raises:
        NotShared: CUDA refuses: the owner has ended, or processes may not share memory here.
        PrefetchError: this process sees other devices.
    """
    torch = load_torch()
    try:
        number, storage = _opened(torch, handle, device)
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{number}").set_(storage)[:size]
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError) as error:
        # AssertionError: a torch without CUDA. The last three: one whose private calls are others.
        other = f" (made by torch {handle.torch}, and this is {torch.__version__})"
        raise NotShared(
            f"device memory of another process cannot be opened: {explained(error, opening=True)}"
            f"{other if handle.torch not in ('', str(torch.__version__)) else ''}"
        ) from error


def _opened(torch: Any, handle: IpcHandle, device: int | None = None) -> tuple[int, Any]:
    """The number of the GPU that sees it here, and the memory as a storage, which takes itself off the owner's count
    when it is freed."""
    reference = bytes.fromhex(handle.reference_handle), handle.reference_offset
    try:
        number = _number_of(handle.place)
        torch.cuda.init()
        # Opened on its own GPU it would make a context there, of 500 MiB for each process that takes from it.
        if device is not None and device != number and torch.cuda.can_device_access_peer(device, number):
            number = device
        for exported in _versions(bytes.fromhex(handle.handle)):
            try:
                storage = torch.UntypedStorage._new_shared_cuda(
                    number,
                    exported,
                    handle.size,
                    handle.offset,
                    *reference,
                    bytes.fromhex(handle.event_handle),
                    handle.event_sync,
                )
            except RuntimeError as error:
                if not any(text in str(error) for text in _OTHER_FORMAT):
                    raise
                refused = error
                continue
            return number, storage
        raise refused
    except Exception:
        # Without a storage nobody else does that, and the owner would keep the memory for as long as it lives.
        with contextlib.suppress(Exception):  # the owner has ended, or this torch is one without CUDA
            torch.UntypedStorage._release_ipc_counter_cuda(*reference)
        raise


def _versions(handle: bytes) -> Iterator[bytes]:
    """The exported handle, then the same as other releases of torch write it: helper and engine may have different
    ones.

    Its first byte is the version of the format (c10/cuda/CUDACachingAllocator.cpp, SHAREABLE_HANDLE_VERSION), its
    second the kind. torch refuses a version that is newer than its own, though nothing but the number differs for
    memory of cudaMalloc (kind "c"). Before there were versions it was CUDA's own handle, of RAW bytes."""
    yield handle
    if len(handle) == RAW:
        yield b"\x01c" + handle
    elif handle[1:2] == b"c":
        for version in range(handle[0] - 1, 0, -1):
            yield bytes([version]) + handle[1:]
        if len(handle) == RAW + 2:
            yield handle[2:]


def views(base: Any, layout: FileLayout, path: str = "file") -> dict[str, Any]:
    """name → tensor of the file whose bytes are ``base`` (uint8, 1-D), as safetensors.torch.load_file would give them.
    Raises BadWeights for a dtype that this torch does not have."""
    torch = load_torch()
    dtypes = torch_dtypes(torch)
    size, offset, address = len(base), base.storage_offset(), base.data_ptr()
    typed: dict[str, Any] = {}
    """dtype → an element of the file as such: a view of another place and shape costs one call of torch from it."""
    found = {}
    for tensor in layout.tensors:
        dtype = dtypes.get(tensor.dtype)
        if dtype is None:
            raise BadWeights(f"{path}: {tensor.name}: torch {torch.__version__} has no dtype for {tensor.dtype}")
        shape = list(tensor.shape)
        if tensor.dtype == "F4":  # torch counts pairs
            if not shape or shape[-1] % 2:
                raise BadWeights(f"{path}: {tensor.name}: torch cannot hold an odd number of F4 in a row")
            shape[-1] //= 2
        if tensor.start == tensor.end:
            found[tensor.name] = torch.empty(shape, dtype=dtype, device=base.device)
            continue
        if tensor.end > size:
            raise BadWeights(f"{path}: {tensor.name} ends at byte {tensor.end} of {size}")
        width = max(1, BITS[tensor.dtype] // 8)
        if (offset + tensor.start) % width or address % width:
            found[tensor.name] = base[tensor.start : tensor.end].clone().view(dtype).view(shape)
            continue
        if tensor.dtype not in typed:
            typed[tensor.dtype] = base[tensor.start : tensor.start + width].view(dtype)
        found[tensor.name] = typed[tensor.dtype].as_strided(shape, _strides(shape), (offset + tensor.start) // width)
    return found


def _strides(shape: list[int]) -> list[int]:
    """The strides of a contiguous tensor, in elements."""
    found, step = [], 1
    for count in reversed(shape):
        found.append(step)
        step *= count
    return found[::-1]
