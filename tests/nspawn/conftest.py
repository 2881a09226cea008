"""What the machines' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import model_directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two models, ``warm`` and ``cold``."""
    model_directory(tmp_path / "source/warm", seed=1)
    model_directory(tmp_path / "source/cold", seed=2)
    return tmp_path / "source"
