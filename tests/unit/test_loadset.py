"""Which files an engine loads, on the listings of repositories as they are."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.learned import MOST_WANTED, Learned
from instantstart_fs.core.loadset import (
    Hints,
    fill_threshold,
    load_set,
    natural_key,
    safetensors_header_length,
    sort_files,
    with_wanted,
)
from instantstart_fs.core.manifest import FileEntry, Manifest, ManifestFile, ModelManifest, matches

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


# -- twins and variants ----------------------------------------------------------------------------------------------


def left_out(*paths: str, sizes: dict[str, int] | None = None) -> dict[str, str]:
    files = tuple(ManifestFile(path, (sizes or {}).get(path, 1), path) for path in sorted(paths))
    listing = Manifest("p", 1, 8 * MIB, (ModelManifest("", "hf://a/b", "r", files),), 0).files
    return {listing[index].path: reason for index, reason in sort_files(listing).left_out.items()}


@pytest.mark.parametrize(
    "paths",
    [
        ("model.safetensors", "other.bin"),
        ("unet/model.safetensors", "vae/pytorch_model.bin"),
        ("model-00001-of-00002.safetensors", "pytorch_model.bin"),  # a shard is missing
        ("voices.bin", "model.onnx"),
        ("pytorch_model.bin", "model.bin", "vocabulary.json"),
        ("model.safetensors", "model.bin", "shared_vocabulary.json"),  # CTranslate2's
        ("adapter_model.safetensors", "pytorch_model.bin"),
        ("consolidated.safetensors", "model-00001-of-00001.safetensors"),
        ("model.safetensors", "model.fp32.safetensors"),  # vLLM reads both
        ("model.safetensors", "asr.nemo", "model.plan", "conds.pt"),
        ("drafter/model.safetensors", "consolidated.safetensors"),
        ("onnx/model.onnx", "onnx/model_quantized.onnx"),
        ("onnx/model.onnx", "projector.safetensors"),
        ("model.safetensors", "onnx/vocoder.onnx"),  # in no other format
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),  # variant="fp16"
        ("model.safetensors", "assets/mask.png"),
        ("modules.json", "model.safetensors", "README.md"),  # sentence-transformers reads it
        ("llm-Q4_K_M.gguf", "vocoder-F16.gguf"),
        ("a.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"),
        ("model.pt", "tf_model.h5"),
    ],
)
def test_what_is_no_twin_is_kept(paths: tuple[str, ...]) -> None:
    assert left_out(*paths) == {}


@pytest.mark.parametrize(
    ("kept", "twin"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "tf_model.h5"),
        ("model.safetensors", "flax_model.msgpack"),
        ("model.safetensors", "rust_model.ot"),
        ("pytorch_model.bin", "tf_model.h5"),
        ("model.safetensors", "model.pt"),
        ("ve.safetensors", "ve.pt"),
        ("a/v1-5.safetensors", "a/v1-5.ckpt"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
        ("vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.bin"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/model.onnx_data"),
        ("adapter_model.safetensors", "adapter_model.bin"),
        ("adapter_model.safetensors", "checkpoint-500/adapter_model.safetensors"),
        ("model.safetensors", "checkpoint-500/model.safetensors"),
        ("model.safetensors", "consolidated.00.pth"),
        ("consolidated.safetensors", "consolidated.00.pth"),
        ("model.safetensors", "original/consolidated.00.pth"),
        ("model.safetensors", "metal/model.bin"),
        ("model.safetensors", "openvino_model.bin"),
        ("model.safetensors", "onnx/decoder_model_merged_q4.onnx"),
        ("model.safetensors", "coreml/x.mlpackage/Data/weight.bin"),
        ("unet/model.safetensors", "onnx/unet/model.onnx"),
    ],
)
def test_a_twin_is_left_out_and_named(kept: str, twin: str) -> None:
    found = left_out(kept, twin)
    assert found.keys() == {twin}
    assert kept.rpartition("/")[2] in found[twin]


def test_only_alike_sizes_make_twins_of_files_with_one_stem() -> None:
    sizes = {"a.safetensors": 10 * MIB, "a.pt": 100 * MIB}
    assert left_out(*sizes, sizes=sizes) == {}
    assert left_out(*sizes, sizes={**sizes, "a.pt": 20 * MIB}) == {"a.pt": "twin of a.safetensors"}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.Q4_K_M.gguf", "a.Q8_0.gguf", "a.i1-IQ2_XXS.gguf"], ["Q4_K_M", "Q8_0", "i1-IQ2_XXS"]),
        (["llama-3.1-8b-q4_0.gguf", "llama-3.1-8b-f16.gguf"], ["f16", "q4_0"]),
        (["Q4_K_M/x-Q4_K_M-00001-of-00002.gguf", "BF16/x-BF16-00001-of-00002.gguf"], ["BF16", "Q4_K_M"]),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf", "m-MXFP4_MOE.gguf"], ["MXFP4_MOE", "Q4_K_XL", "UD-Q4_K_XL"]),
        (["ggml-base.bin", "ggml-base-q5_1.bin"], ["", "q5_1"]),
        (["x_int8.onnx", "x_fp16.onnx", "x_q4f16.onnx"], ["fp16", "int8", "q4f16"]),
    ],
)
def test_variants_are_told_apart_and_each_has_a_glob_of_its_own(names: list[str], labels: list[str]) -> None:
    (choice,) = sort_files(entries(*names)).open
    assert [variant.label for variant in choice.variants] == labels
    for position, variant in enumerate(choice.variants):
        glob = choice.glob(position)
        assert [path for path in sorted(names) if matches(path, [glob])] == sorted(variant.paths)


def test_a_choice_in_one_part_of_a_model_is_none_in_the_other() -> None:
    """Both experts are loaded; of models that merely lie side by side one is."""
    experts = [f"{part}Noise/w-{part}Noise-{tag}.gguf" for part in ("High", "Low") for tag in ("Q4_0", "Q8_0")]
    for names, still_open in ((experts, 2), (["a-Q4_0.gguf", "a-Q8_0.gguf", "b-Q4_0.gguf", "b-Q8_0.gguf"], 0)):
        files = entries(*names)
        assert sort_files(files).undecided == 4
        assert sort_files(files, Hints(wanted=[names[0]])).undecided == still_open
        assert sort_files(files, Hints(wanted=[names[0], names[2]])).undecided == 0


def test_beside_a_model_in_safetensors_variants_are_no_question() -> None:
    known = sort_files(entries("config.json", "model.safetensors", "a-Q4_0.gguf", "a-Q8_0.gguf"))
    assert known.open == ()
    assert set(known.left_out.values()) == {"one of 2 GGUF variants beside model.safetensors"}


def test_the_onnx_file_without_a_tag_is_taken_and_others_come_when_they_are_read() -> None:
    files = entries("onnx/m.onnx", "onnx/m_q4.onnx", "onnx/m_q4.onnx_data", "onnx/m_fp16.onnx")
    assert [files[index].path for index in sort_files(files).order] == ["onnx/m.onnx"]
    learned = sort_files(files, Hints(wanted=["onnx/m_q4.onnx"]))
    assert {files[index].path for index in learned.order} == {"onnx/m.onnx", "onnx/m_q4.onnx", "onnx/m_q4.onnx_data"}


_NAMES = st.sampled_from(
    [
        *("config.json", "README.md", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "a-Q4_0.gguf"),
        *(
            "a-Q8_0-00001-of-00002.gguf",
            "a-Q8_0-00002-of-00002.gguf",
            "b-Q4_0.gguf",
            "b-Q6_K.gguf",
            "x.pt",
            "mmproj.gguf",
        ),
    ]
)


@given(st.sets(_NAMES, min_size=1), st.data())
def test_what_is_learned_now_and_what_was_learned_before_a_start_come_to_the_same(
    names: set[str], data: st.DataObject
) -> None:
    files = entries(*names)
    wanted = data.draw(st.sets(st.sampled_from(range(len(files)))))
    now = with_wanted(sort_files(files), wanted)
    later = sort_files(files, Hints(wanted=frozenset(files[index].path for index in now.order)))
    assert set(now.order) == set(later.order) >= wanted
    assert (now.left_out.keys(), now.weights) == (later.left_out.keys(), later.weights)
    assert now.open == later.open or wanted == set()


def test_what_is_learned_has_a_bound_and_outlives_its_file() -> None:
    learned = Learned().wanting(["a", "b", "a"])
    assert learned.wanted == ("a", "b")
    assert learned.after_update(frozenset()).wanted == ("a", "b")
    assert len(Learned().wanting(str(number) for number in range(3 * MOST_WANTED)).wanted) == MOST_WANTED


def test_untouched_is_what_three_starts_in_a_row_did_not_open() -> None:
    learned = Learned()
    for opened in (["a", "b"], ["a"], ["a"], ["a"]):
        learned = learned.after_start(opened)
    assert learned.untouched(["a", "b"]) == ("b",)
    assert learned.after_update(frozenset({"a", "b", "new"})).untouched(["a", "new"]) == ()
