"""Source addresses: what is understood, what is refused, and that refusals repeat no password."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.source import DirectorySource, HubSource, S3Source, Source, parse_source
from instantstart_fs.errors import InvalidSource


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://org/model", HubSource("org/model", "main")),
        ("hf://gpt2", HubSource("gpt2", "main")),
        ("hf://org/model@v1.0", HubSource("org/model", "v1.0")),
        ("hf://org/model@refs/pr/12", HubSource("org/model", "refs/pr/12")),
        ("hf://gpt2@0123456789abcdef0123456789abcdef01234567", HubSource("gpt2", "0123456789abcdef" * 2 + "01234567")),
        ("hf://sentence-transformers/all-MiniLM-L6-v2", HubSource("sentence-transformers/all-MiniLM-L6-v2")),
        ("s3://bucket", S3Source("bucket")),
        ("s3://bucket/", S3Source("bucket")),
        ("s3://bucket/a/b/", S3Source("bucket", "a/b")),
        ("s3://bucket/with space%20and@sign", S3Source("bucket", "with space%20and@sign")),
        ("file:///data/model", DirectorySource("/data/model")),
        ("file:///data//model/./x/", DirectorySource("/data/model/x")),
        ("file:///data/a b%20c", DirectorySource("/data/a b c")),
        ("file://localhost/data", DirectorySource("/data")),
        ("file:///", DirectorySource("/")),
    ],
)
def test_understood(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "needs a scheme"),
        ("org/model", "needs a scheme"),
        ("gs://bucket/x", "unknown scheme 'gs'"),
        ("HF://org/model", "unknown scheme 'HF'"),
        ("hf://", "not a hub repository"),
        ("hf://a/b/c", "globs"),
        ("hf://org/../x", "not a hub repository"),
        ("hf://org/mo del", "not a hub repository"),
        ("hf://org/model@", "the revision"),
        ("hf://org/model@a/../b", "the revision"),
        ("hf://org/model@main?x", "the revision"),
        ("s3://", "not an S3 bucket"),
        ("s3://a/b", "not an S3 bucket"),
        ("s3://bucket/a/../b", "component"),
        ("s3://bucket/a//b", "component"),
        ("file://data/model", "absolute"),
        ("file://", "absolute"),
        ("file:///data/../etc", "'..'"),
        ("file:///data/%2e%2e/etc", "'..'"),
        ("file:///data%00x", "absolute"),
        ("s3://bucket/a\nb", "control"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidSource, match=reason.replace("..", r"\.\.")) as refused:
        parse_source(text)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "text", ["https://me:hunter2@host/x", "s3://AKIA:hunter2@bucket/x", "hf://me:hunter2@org/model", "hunter2"]
)
def test_a_refusal_never_repeats_a_password(text: str) -> None:
    with pytest.raises(InvalidSource) as refused:
        parse_source(text)
    assert "hunter2" not in refused.value.message


@given(st.text(max_size=40))
def test_any_text_is_understood_or_refused(text: str) -> None:
    for prefix in ("", "hf://", "s3://", "file:///"):
        try:
            source = parse_source(prefix + text)
        except InvalidSource:
            continue
        assert parse_source(str(source)) == source
