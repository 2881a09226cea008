"""A small ext4 of its own, for what only a full or read-only filesystem shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loop_ext4


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    with loop_ext4(tmp_path, 32 << 20) as mountpoint:
        yield mountpoint
