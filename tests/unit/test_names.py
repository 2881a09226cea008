"""Which names may touch a filesystem."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.names import (
    validate_model_name,
    validate_origin_path,
    validate_origin_paths,
    validate_pipeline_id,
)
from instantstart_fs.errors import InvalidName


@pytest.mark.parametrize("value", ["a", "my-llm", "Llama-3.1_8B", "0", "a" * 128])
def test_good_ids(value: str) -> None:
    assert validate_pipeline_id(value) == value
    assert validate_model_name(value) == value


@pytest.mark.parametrize("value", [".", "..", ".warm", "-x", "_x", "a/b", "a b", "é", "a\n", "a\0", "a" * 129])
def test_bad_ids(value: str) -> None:
    with pytest.raises(InvalidName, match="letters"):
        validate_pipeline_id(value)
    with pytest.raises(InvalidName, match="letters"):
        validate_model_name(value)


def test_only_a_model_may_be_unnamed() -> None:
    assert validate_model_name("") == ""
    with pytest.raises(InvalidName):
        validate_pipeline_id("")


@pytest.mark.parametrize("path", ["x", "a/b/c.bin", "with space", "ünï/☃", "..x", "a..b", ".hidden", "x" * 255, "-rf"])
def test_good_paths(path: str) -> None:
    assert validate_origin_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/abs",
        "a//b",
        "a/",
        ".",
        "..",
        "a/../b",
        "../x",
        "a/./b",
        "x\0y",
        "x" * 256,
        "é" * 128,
        "/".join("a" * 65),
        "/".join(["x" * 200] * 20),
        "caf\udce9",
    ],
)
def test_bad_paths(path: str) -> None:
    with pytest.raises(InvalidName, match="refused"):
        validate_origin_path(path)


def test_collisions() -> None:
    validate_origin_paths(["a/b", "a/c", "ab", "a.b"])
    with pytest.raises(InvalidName, match="twice"):
        validate_origin_paths(["a", "b", "a"])
    for order in (["a", "a/b/c"], ["a/b/c", "a"], ["a/b/c", "a/b"]):
        with pytest.raises(InvalidName, match="both as a file and as a directory"):
            validate_origin_paths(order)


@given(st.one_of(st.text(max_size=60), st.text(alphabet="ab./\0", max_size=12)))
def test_what_passes_stays_below_its_root(path: str) -> None:
    try:
        validate_origin_path(path)
    except InvalidName:
        return
    joined = os.path.normpath(os.path.join("/root/of/it", path))
    assert joined == "/root/of/it/" + path
