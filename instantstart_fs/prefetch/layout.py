"""Parses a safetensors header: where each tensor lies in its file. Pure, but for ``read_layout``, which reads it.

The format (github.com/huggingface/safetensors): 8 bytes little endian n, n bytes of JSON, then the data. Everything
here is bounded by the file's own size, since a header may lie: nothing is ever allocated by what it says.
"""

from __future__ import annotations

import math
import os
from typing import Any

import msgspec

from instantstart_fs.errors import BadWeights

MAX_HEADER = 100_000_000
"""The most bytes of a header: the limit of the format itself."""
PREFIX = 8

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by the format's dtype names (safetensors 0.8)."""


class TensorLayout(msgspec.Struct, frozen=True):
    """``start`` and ``end``: bytes from the beginning of the file; equal for a tensor without elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class FileLayout(msgspec.Struct, frozen=True):
    """``size`` of the file and ``data_start`` in bytes; ``tensors`` in the order of their bytes."""

    size: int
    data_start: int
    tensors: tuple[TensorLayout, ...]
    metadata: dict[str, str] = {}


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)
_metadata = msgspec.json.Decoder(dict[str, str])


def header_length(prefix: bytes, size: int, name: str = "file") -> int:
    """Return the bytes of the JSON that follows the first 8 bytes of a file of ``size`` bytes. Raises BadWeights."""
    if size < PREFIX or len(prefix) < PREFIX:
        raise BadWeights(f"{name}: {size} bytes are too few for a safetensors file; it is cut short")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER:
        raise BadWeights(f"{name} claims a header of {length} bytes; safetensors allows {MAX_HEADER}")
    if PREFIX + length > size:
        raise BadWeights(f"{name} claims a header of {length} bytes and has {size} in all; it is cut short, or wrong")
    return length


def parse_header(header: bytes, size: int, name: str = "file") -> FileLayout:
    """``header``: the JSON alone. ``size``: bytes of the whole file. Raises BadWeights for whatever safetensors itself
    would refuse: unknown dtypes, offsets that disagree with shapes, overlaps, holes, bytes that no tensor owns."""
    data_start = PREFIX + len(header)
    metadata: dict[str, str] = {}
    tensors = []
    try:
        for key, raw in _raw.decode(header).items():
            if key == "__metadata__":
                metadata = _metadata.decode(raw)
                continue
            tensors.append(_tensor(key, _entry.decode(raw), data_start, size, name))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadWeights(f"{name}: its header is no safetensors header: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise BadWeights(f"{name}: {tensor.name} begins at byte {tensor.start} where {position} is due: it {what}")
        position = tensor.end
    if position != size:
        what = "is cut short" if position > size else "has bytes that belong to no tensor"
        raise BadWeights(f"{name}: its tensors end at byte {position} and it has {size}: it {what}")
    return FileLayout(size, data_start, tuple(tensors), metadata)


def _tensor(key: str, entry: _Entry, data_start: int, size: int, name: str) -> TensorLayout:
    bits = BITS.get(entry.dtype)
    if bits is None:
        raise BadWeights(f"{name}: {key} has the dtype {entry.dtype!r}, which safetensors does not know")
    begin, end = entry.data_offsets
    if not 0 <= begin <= end:
        raise BadWeights(f"{name}: {key} lies from {begin} to {end}")
    if any(dimension < 0 for dimension in entry.shape):
        raise BadWeights(f"{name}: {key} has the shape {list(entry.shape)}")
    wanted = math.prod(entry.shape) * bits
    if wanted != (end - begin) * 8:
        raise BadWeights(
            f"{name}: {key}: {entry.dtype}{list(entry.shape)} needs {wanted} bits and lies on {end - begin} bytes"
        )
    if data_start + end > size:
        raise BadWeights(f"{name}: {key} ends at byte {data_start + end} of {size}: the file is cut short, or wrong")
    return TensorLayout(key, entry.dtype, entry.shape, data_start + begin, data_start + end)


def read_layout(fd: int, name: str = "file") -> FileLayout:
    """The layout of an open safetensors file. Raises BadWeights, and OSError from reading."""
    size = os.fstat(fd).st_size
    length = header_length(os.pread(fd, PREFIX, 0), size, name)
    header = bytearray(length)
    done = 0
    while done < length:
        count = os.preadv(fd, [memoryview(header)[done:]], PREFIX + done)
        if count == 0:
            raise BadWeights(f"{name} ends within its header")
        done += count
    return parse_header(bytes(header), size, name)


def torch_dtypes(torch: Any) -> dict[str, Any]:
    """The format's dtype names → dtypes of this torch; those that it lacks are left out."""
    names = {
        "BOOL": "bool",
        "F4": "float4_e2m1fn_x2",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }
    return {ours: getattr(torch, theirs) for ours, theirs in names.items() if hasattr(torch, theirs)}
