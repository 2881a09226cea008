"""serve_unsealed."""

from __future__ import annotations

import pytest

from instantstart_fs.core.trust import endpoint_trusted, may_serve_unsealed


@pytest.mark.parametrize(
    ("setting", "trusted", "expected"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("always", False, True),
        ("always", True, True),
        ("never", True, False),
        ("never", False, False),
    ],
)
def test_may_serve_unsealed(setting: str, trusted: bool, expected: bool) -> None:
    assert may_serve_unsealed(setting, trusted) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "endpoint", "expected"),
    [
        ("hf", "https://hub.example", True),
        ("hf", "http://hub.example", False),
        ("s3", "http://127.0.0.1:8333", True),
        ("s3", "http://localhost:8333", True),
        ("s3", "[::1]:8333", True),
        ("s3", "10.0.0.1:8333", False),
        ("s3", "http://127.0.0.1.evil.example", False),
        ("file", "/data", True),
        ("s3", "", False),
    ],
)
def test_endpoint_trusted(scheme: str, endpoint: str, expected: bool) -> None:
    assert endpoint_trusted(scheme, endpoint) is expected
