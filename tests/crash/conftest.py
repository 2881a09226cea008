"""Tests against a real daemon and a real mount; see tests/harness.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import make_daemon, model, skip_below, why_no_mount

__all__ = ["make_daemon", "model"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_below(Path(__file__).parent, items, why_no_mount())
