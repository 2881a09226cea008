"""Tests against a real daemon and a real mount; see tests/harness.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import make_daemon, model, why_no_mount

__all__ = ["make_daemon", "model"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_mount()
    here = str(Path(__file__).parent)
    for item in items:
        if reason is not None and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason=reason))
