"""Which files an engine loads, on the listings of repositories as they are."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.loadset import (
    fill_threshold,
    load_set,
    natural_key,
    safetensors_header_length,
    sort_files,
)
from instantstart_fs.core.manifest import FileEntry, Manifest, ManifestFile, ModelManifest

MIB = 1024 * 1024


def entries(*paths: str, model: str = "") -> tuple[FileEntry, ...]:
    files = tuple(ManifestFile(path, 1, path) for path in sorted(paths))
    return Manifest("p", 1, 8 * MIB, (ModelManifest(model, "hf://a/b", "r", files),), 0).files


def chosen(*paths: str) -> list[str]:
    listing = entries(*paths)
    return [listing[index].file.path for index in load_set(listing)]


def test_safetensors_win_over_everything_else() -> None:
    assert chosen(
        ".gitattributes",
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "onnx/model.onnx",
        "openvino/openvino_model.bin",
        "pytorch_model.bin",
        "rust_model.ot",
        "tf_model.h5",
        "tokenizer.json",
        "vocab.txt",
    ) == ["1_Pooling/config.json", "config.json", "tokenizer.json", "vocab.txt", "model.safetensors"]


def test_shards_come_in_natural_order_after_their_index() -> None:
    shards = [f"model-{number}-of-11.safetensors" for number in range(1, 12)]
    assert chosen(
        *shards,
        "model.safetensors.index.json",
        "pytorch_model-1-of-1.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
    ) == ["model.safetensors.index.json", *shards]


def test_pytorch_weights_where_there_is_nothing_better() -> None:
    assert chosen("config.json", "pytorch_model.bin", "training_args.bin", "flax_model.msgpack") == [
        "config.json",
        "pytorch_model.bin",
    ]


@pytest.mark.parametrize("path", ["llama.Q4_K_M.gguf", "rank0.engine"])
def test_gguf_and_engines(path: str) -> None:
    assert chosen("README.md", path) == [path]


def test_a_repository_of_unknown_formats_counts_whole() -> None:
    assert chosen("weights.xyz", "notes.md") == ["notes.md", "weights.xyz"]


def test_models_follow_one_another() -> None:
    one = ModelManifest("asr", "hf://a/b", "r", (ManifestFile("model.safetensors", 1, "a"),))
    two = ModelManifest("llm", "hf://a/c", "r", (ManifestFile("config.json", 1, "b"), ManifestFile("m.gguf", 1, "c")))
    files = Manifest("p", 1, 8 * MIB, (one, two), 0).files
    assert [files[index].path for index in load_set(files)] == [
        "asr/model.safetensors",
        "llm/config.json",
        "llm/m.gguf",
    ]


def test_requests_are_opens_of_weight_files() -> None:
    files = entries("a/model.safetensors", "config.json", "training_args.bin")
    assert [files[index].path for index in sort_files(files).weights] == ["a/model.safetensors"]


def test_the_threshold_lies_beyond_header_and_readahead() -> None:
    assert fill_threshold(100 * MIB, 5 * MIB, weights=True) == 5 * MIB
    assert fill_threshold(100 * MIB, 100, weights=True) == MIB
    assert fill_threshold(100 * MIB, None, weights=True) == MIB
    assert fill_threshold(1000, 100, weights=True) == 500
    assert fill_threshold(1000, None, weights=False) == 1000


def test_the_header_length_is_believed_only_where_it_can_be_one() -> None:
    assert safetensors_header_length((1000).to_bytes(8, "little") + b"{}") == 1008
    assert safetensors_header_length(b"\xff" * 8) is None
    assert safetensors_header_length(b"short") is None


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_name_has_its_place(names: list[str]) -> None:
    assert Counter(sorted(names, key=natural_key)) == Counter(names)


def _parts(path: str) -> list[tuple[int, int, str]]:
    """What "natural" means: numbers by their value and before text, text letter by letter."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path) if part]


@given(st.lists(st.text("aB-_./0123٣²9\x01", max_size=12), max_size=8))
def test_numbers_are_sorted_by_their_value(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(names, key=_parts)


def test_digits_that_are_no_numbers_are_letters() -> None:
    assert sorted(["²1.bin", "10.bin", "9.bin"], key=natural_key) == ["9.bin", "10.bin", "²1.bin"]
