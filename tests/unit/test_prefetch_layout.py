"""Safetensors headers: what is read from good ones, and that no bad one gets past, or costs memory."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.errors import BadWeights
from instantstart_fs.prefetch.layout import BITS, header_length, parse_header, read_layout


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_offsets_are_the_files_and_the_order_is_that_of_the_bytes() -> None:
    text = header(b=entry("F32", [2], 4, 12), a=entry("I16", [2, 1], 0, 4), __metadata__={"format": "pt"})
    layout = parse_header(text, 8 + len(text) + 12)
    assert [
        (tensor.name, tensor.start - layout.data_start, tensor.end - layout.data_start) for tensor in layout.tensors
    ] == [
        ("a", 0, 4),
        ("b", 4, 12),
    ]
    assert layout.metadata == {"format": "pt"}


def test_empty_and_scalar_tensors() -> None:
    text = header(empty=entry("BF16", [0, 5], 0, 0), scalar=entry("F64", [], 0, 8), end=entry("U8", [0], 8, 8))
    layout = parse_header(text, 8 + len(text) + 8)
    assert {tensor.name: tensor.end - tensor.start for tensor in layout.tensors} == {"empty": 0, "scalar": 8, "end": 0}


@pytest.mark.parametrize(
    ("tensors", "extra", "says"),
    [
        ({"a": entry("F32", [2], 0, 8)}, -1, "cut short"),
        ({"a": entry("F32", [2], 0, 8)}, 1, "belong to no tensor"),
        ({"a": entry("F32", [3], 0, 8)}, 0, "needs 96 bits"),
        ({"a": entry("F31", [2], 0, 8)}, 0, "does not know"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 0, "overlaps"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [2], 6, 8)}, 0, "hole"),
        ({"a": entry("U8", [4], 4, 0)}, 0, "lies from"),
        ({"a": entry("U8", [-2, -2], 0, 4)}, 0, "shape"),
        ({"a": entry("U8", [1 << 60, 1 << 60], 0, 4)}, 0, "needs"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 0, "no safetensors header"),
        ({"a": [1, 2]}, 0, "no safetensors header"),
    ],
)
def test_what_lies_is_refused(tensors: dict[str, Any], extra: int, says: str) -> None:
    text = header(**tensors)
    end = max((tensor["data_offsets"][1] for tensor in tensors.values() if "data_offsets" in tensor), default=0)
    with pytest.raises(BadWeights, match=says):
        parse_header(text, 8 + len(text) + end + extra, "x.safetensors")


@pytest.mark.parametrize(
    ("prefix", "size", "says"),
    [
        (b"", 0, "too few"),
        (b"1234567", 7, "too few"),
        ((1 << 63).to_bytes(8, "little"), 1 << 40, "allows"),
        ((1000).to_bytes(8, "little"), 1007, "cut short"),
    ],
)
def test_a_claimed_header_is_bounded_by_the_format_and_the_file(prefix: bytes, size: int, says: str) -> None:
    with pytest.raises(BadWeights, match=says):
        header_length(prefix, size)


@given(st.binary(max_size=200))
def test_garbage_is_a_clear_error(garbage: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(garbage)
        file.flush()
        try:
            layout = read_layout(file.fileno())
        except BadWeights:
            return
        assert layout.size == len(garbage)  # "{}" and blanks around it are a header


@given(
    st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 4), max_size=3)), max_size=6),
    st.integers(0, 3),
)
def test_every_byte_of_the_data_belongs_to_one_tensor(wanted: list[tuple[str, list[int]]], cut: int) -> None:
    position, tensors = 0, {}
    for number, (dtype, shape) in enumerate(wanted):
        count = BITS[dtype]
        for dimension in shape:
            count *= dimension
        if count % 8:
            continue
        tensors[f"t{number}"] = entry(dtype, shape, position, position + count // 8)
        position += count // 8
    text = header(**tensors)
    size = 8 + len(text) + position
    layout = parse_header(text, size)
    assert sum(tensor.end - tensor.start for tensor in layout.tensors) == position
    if cut and position:
        with pytest.raises(BadWeights):
            parse_header(text, size - min(cut, position))


def test_the_whole_header_is_read_where_it_lies(tmp_path: Any) -> None:
    text = header(a=entry("U8", [3], 0, 3)) + b" " * 100_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    fd = os.open(path, os.O_RDONLY)
    try:
        layout = read_layout(fd)
    finally:
        os.close(fd)
    assert layout.data_start == 8 + len(text)
