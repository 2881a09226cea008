"""HTTP's small print, and choosing by globs."""

from __future__ import annotations

import pytest

from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.origins.common import (
    is_trusted,
    retry_after,
    selected,
    signature_expiry,
)

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:10 GMT", None),
        ("-1", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    ("query", "expiry"),
    [
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=3600&X-Amz-Signature=x", NOW + 3600),
        ("x-goog-date=20231114T221320Z&x-goog-expires=60", NOW + 60),
        ("X-Amz-Expires=60", NOW + 60),
        ("Expires=1700000100&Signature=x&Key-Pair-Id=k", NOW + 100),
        ("Expires=never", None),
        ("X-Amz-Date=yesterday&X-Amz-Expires=60", None),
        ("", None),
    ],
)
def test_signature_expiry(query: str, expiry: float | None) -> None:
    assert signature_expiry(f"https://cdn.example/x?{query}", NOW) == expiry


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("https://example.com/x", True),
        ("file:///x", True),
        ("http://localhost:80/x", True),
        ("http://127.1.2.3/x", True),
        ("http://[::1]:9000/x", True),
        ("http://10.0.0.1/x", False),
        ("http://localhost.example.com/x", False),
        ("http://127.0.0.1.example.com/x", False),
    ],
)
def test_is_trusted(url: str, trusted: bool) -> None:
    assert is_trusted(url) == trusted


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), True),
        (("*.json",), (), True),  # * crosses /, as in huggingface_hub
        (("sub/",), (), True),
        (("*.JSON",), (), False),
        (("*.bin", "sub/*"), (), True),
        ((), ("sub/",), False),
        (("*",), ("*.json",), False),
        (("config.json",), (), False),
    ],
)
def test_globs(include: tuple[str, ...], exclude: tuple[str, ...], chosen: bool) -> None:
    assert selected("sub/config.json", ModelSpec("hf://x", include=include, exclude=exclude)) == chosen


@pytest.mark.parametrize(
    "value", ["0 Jan 1 1:1:1 " + "9" * 40, "9" * 5000, "nan", "-1", "Mon, 01 Jan 2024 99:00:00 GMT"]
)
def test_a_senseless_retry_after_is_none(value: str) -> None:
    assert retry_after(value, 0.0) is None
