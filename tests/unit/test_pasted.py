"""What people paste where a source is asked for: understood, or refused with the reason. The cases are data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.config.pipelines import read_pipeline
from instantstart_fs.control.specification import specification
from instantstart_fs.core.manifest import matches
from instantstart_fs.core.pasted import Pasted, understand
from instantstart_fs.core.source import parse_source
from instantstart_fs.errors import InvalidSource

QWEN = "hf://Qwen/Qwen3-8B"
UNDERSTOOD: list[tuple[str, str, tuple[str, ...]]] = [
    # the hub
    ("Qwen/Qwen3-8B", QWEN, ()),
    ("Qwen/Qwen3-8B@v1", f"{QWEN}@v1", ()),
    ("hf:Qwen/Qwen3-8B", QWEN, ()),
    ("HF:Qwen/Qwen3-8B@v1", f"{QWEN}@v1", ()),
    ("hf:/Qwen/Qwen3-8B", QWEN, ()),
    ("hf://Qwen/Qwen3-8B", QWEN, ()),
    ("HF://Qwen/Qwen3-8B", QWEN, ()),
    ("hf://gpt2", "hf://gpt2", ()),
    ("hf://gpt2@refs/pr/1", "hf://gpt2@refs/pr/1", ()),
    (" hf://Qwen/Qwen3-8B\n", QWEN, ()),
    ("https://huggingface.co/Qwen/Qwen3-8B", QWEN, ()),
    ("https://huggingface.co/Qwen/Qwen3-8B/", QWEN, ()),
    ("HTTPS://HuggingFace.co/Qwen/Qwen3-8B", QWEN, ()),
    ("http://www.huggingface.co/Qwen/Qwen3-8B", QWEN, ()),
    ("huggingface.co/Qwen/Qwen3-8B", QWEN, ()),
    ("hf.co/Qwen/Qwen3-8B", QWEN, ()),
    ("https://hf.co/Qwen/Qwen3-8B", QWEN, ()),
    ("https://huggingface.co/Qwen/Qwen3-8B?library=transformers", QWEN, ()),
    ("https://huggingface.co/Qwen/Qwen3-8B#usage", QWEN, ()),
    ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", f"{QWEN}@main", ()),
    ("https://huggingface.co/Qwen/Qwen3-8B/tree/refs%2Fpr%2F3", f"{QWEN}@refs/pr/3", ()),
    ("https://huggingface.co/Qwen/Qwen3-8B/tree/refs/pr/3", f"{QWEN}@refs/pr/3", ()),
    ("https://huggingface.co/Qwen/Qwen3-8B/tree/main/onnx", f"{QWEN}@main", ("onnx/",)),
    ("https://huggingface.co/Qwen/Qwen3-8B/discussions/4", QWEN, ()),
    # one file of a repository
    ("hf://org/repo/q4.gguf", "hf://org/repo", ("q4.gguf",)),
    ("hf://org/repo/sub/Q4.GGUF", "hf://org/repo", ("sub/Q4.GGUF",)),
    ("hf://org/repo@main/sub/q4.gguf", "hf://org/repo@main", ("sub/q4.gguf",)),
    ("hf://org/repo@refs/pr/2/q4.gguf", "hf://org/repo@refs/pr/2", ("q4.gguf",)),
    ("hf.co/org/repo/q4.gguf", "hf://org/repo", ("q4.gguf",)),
    ("https://huggingface.co/org/repo/blob/main/q4.gguf", "hf://org/repo@main", ("q4.gguf",)),
    ("https://huggingface.co/org/repo/blob/main/a%20b.gguf", "hf://org/repo@main", ("a b.gguf",)),
    ("https://huggingface.co/org/repo/resolve/v2/d/q4.gguf?download=true", "hf://org/repo@v2", ("d/q4.gguf",)),
    ("hf://org/repo/x[1].gguf", "hf://org/repo", ("x[[]1].gguf",)),
    ("hf://org/repo/m-00001-of-00003.gguf", "hf://org/repo", ("m-?????-of-00003.gguf",)),
    # S3
    ("s3://bucket/a", "s3://bucket/a", ()),
    ("S3://bucket/key.gguf", "s3://bucket/key.gguf", ()),
    ("s3a://bucket/a", "s3://bucket/a", ()),
    ("arn:aws:s3:::bucket/a/*", "s3://bucket/a", ()),
    ("https://models.s3.eu-west-1.amazonaws.com/llama/8b/", "s3://models/llama/8b/", ()),
    ("https://models.s3.amazonaws.com/a%20b", "s3://models/a b", ()),
    ("https://my.models.s3-us-west-2.amazonaws.com/x", "s3://my.models/x", ()),
    ("https://models.s3.dualstack.eu-west-1.amazonaws.com/x", "s3://models/x", ()),
    ("https://s3.eu-west-1.amazonaws.com/models/llama", "s3://models/llama", ()),
    (
        "https://s3.console.aws.amazon.com/s3/buckets/models?region=eu-west-1&prefix=llama/8b/",
        "s3://models/llama/8b/",
        (),
    ),
    ("https://eu-west-1.console.aws.amazon.com/s3/buckets/models?region=eu-west-1", "s3://models", ()),
    ("https://eu-west-1.console.aws.amazon.com/s3/object/models?prefix=a/q.gguf", "s3://models/a/q.gguf", ()),
    # directories
    ("/data/model", "file:///data/model", ()),
    ("/data/a b%20c", "file:///data/a%20b%2520c", ()),
    ("/data/q4.gguf", "file:///data", ("q4.gguf",)),
    ("FILE:///data/model", "file:///data/model", ()),
    ("~", "file:///home/me", ()),
    ("~/model", "file:///home/me/model", ()),
    ("./model", "file:///work/model", ()),
    ("../model", "file:///model", ()),
    (".", "file:///work", ()),
]
REFUSED: list[tuple[str, str]] = [
    ("datasets/org/name", "this is a dataset"),
    ("hf://datasets/org/name", "this is a dataset"),
    ("hf:datasets/org/name", "this is a dataset"),
    ("https://huggingface.co/datasets/org/name", "this is a dataset"),
    ("https://huggingface.co/spaces/org/name", "not of a dataset, a space or a page"),
    ("https://huggingface.co/Qwen", "not of a dataset, a space or a page"),
    ("https://huggingface.co", "not of a dataset, a space or a page"),
    ("https://me:hunter2@huggingface.co/org/repo", "unknown scheme"),
    ("Qwen/Qwen3-8B:main", "did you mean hf://Qwen/Qwen3-8B@main?"),
    ("hf://Qwen/Qwen3-8B:main", "did you mean hf://Qwen/Qwen3-8B@main?"),
    ("gpt2:main", "did you mean hf://gpt2@main?"),
    ("me:hunter2", "a revision follows @"),
    ("gpt2", "needs a scheme"),
    ("", "needs a scheme"),
    ("hf://org/repo/folder", "globs"),
    ("hf://org/repo/../x.gguf", "'..'"),
    ("s3:bucket/model", "come two slashes"),
    ("file:/data/model", "come two slashes"),
    ("~other/model", "only your own ~"),
    ("/data/../etc", "'..'"),
    ("https://models.s3.amazonaws.com/a?X-Amz-Signature=hunter2", "write s3://models/a, with"),
    ("https://AKIA:hunter2@models.s3.amazonaws.com/a", "write s3://models/a, with"),
    ("https://s3.console.aws.amazon.com/s3/home", "shows no bucket"),
    ("https://example.org/model", "unknown scheme 'https'"),
    ("gs://bucket/x", "unknown scheme 'gs'"),
    ("http://[", "unknown scheme 'http'|not an address"),
]


@pytest.mark.parametrize(("text", "source", "include"), UNDERSTOOD)
def test_understood(text: str, source: str, include: tuple[str, ...]) -> None:
    assert understand(text, home="/home/me", directory="/work") == Pasted(source, include)


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_refused_with_a_reason_and_without_a_password(text: str, reason: str) -> None:
    with pytest.raises(InvalidSource) as refused:
        understand(text, home="/home/me")
    assert any(one in refused.value.message for one in reason.split("|")), refused.value.message
    assert "hunter2" not in refused.value.message


def test_a_relative_path_needs_a_directory_to_begin_at() -> None:
    with pytest.raises(InvalidSource, match="absolute path"):
        understand("./model")


def test_a_part_of_a_split_file_stands_for_all_its_parts_and_a_bracket_for_itself() -> None:
    (parts,) = understand("hf://o/r/m-00001-of-00002.gguf").include
    assert matches("m-00002-of-00002.gguf", [parts])
    assert not matches("m-00002-of-00003.gguf", [parts])
    (literal,) = understand("hf://o/r/x[1]*.gguf").include
    assert matches("x[1]*.gguf", [literal])
    assert not matches("x1.gguf", [literal])


def test_add_and_the_configuration_understand_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "https://huggingface.co/org/repo/blob/main/q4.gguf"
    for spec in (
        specification("x", page, include=("*.json",)),
        read_pipeline("x", {"source": page, "include": ["*.json"]}, "config.toml", ""),
    ):
        assert (spec.models[0].source, spec.models[0].include) == ("hf://org/repo@main", ("q4.gguf", "*.json"))
    assert specification("x", "./here").models[0].source == f"file://{tmp_path}/here"


@given(
    st.sampled_from(("", "hf://", "hf.co/", "https://b.s3.amazonaws.com/", "/", "~/", "s3a://")), st.text(max_size=40)
)
def test_any_text_is_understood_or_refused(prefix: str, text: str) -> None:
    try:
        found = understand(prefix + text, home="/home/me", directory="/work")
    except InvalidSource:
        return
    parse_source(found.source)
