"""Fixtures of several component tests: a store, its index, and a small ext4 that can be full or read-only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.index.environment import Index
from instantstart_fs.store.blobstore import BlobStore
from tests.harness import loop_ext4


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    with BlobStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def index(store: BlobStore) -> Iterator[Index]:
    with Index.open(store.root + "/index", map_size=16 << 20) as opened:
        yield opened


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    with loop_ext4(tmp_path, 32 << 20) as mountpoint:
        yield mountpoint
