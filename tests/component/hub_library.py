"""A real library whose pipelines come from the test hub, as several modules of component tests set it up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from instantstart_fs.config import (
    Capacity,
    Config,
    FillConfig,
    HuggingFaceConfig,
    MountConfig,
    OriginsConfig,
    StoreConfig,
)
from instantstart_fs.index.environment import Index
from instantstart_fs.library import Library
from instantstart_fs.store.blobstore import BlobStore
from tests.servers.hub import HubServer

MIB = 1024 * 1024


@asynccontextmanager
async def hub_library(
    root: Path,
    hub: HubServer,
    *,
    store: dict[str, Any] | None = None,
    fill: dict[str, Any] | None = None,
    origins: dict[str, Any] | None = None,
    prepare: Callable[[Library], None] = lambda library: None,
    **options: Any,
) -> AsyncIterator[Library]:
    """A running library with its store and index below ``root``.

    Args:
        store, fill, origins: What differs from the tests' usual settings in that section.
        prepare: Called before the library runs.
        options: Passed to ``Library``.
    """
    config = Config(
        mount=MountConfig(path=str(root / "mnt")),
        store=StoreConfig(path=str(root / "store"), capacity=Capacity(bytes=1 << 40), **(store or {})),
        fill=FillConfig(**{"workers": 1, "connections": 4, "chunk_size": MIB, "read_deadline": 10.0, **(fill or {})}),
        origins=OriginsConfig(huggingface=HuggingFaceConfig(endpoint=hub.endpoint), **(origins or {})),
    )
    with BlobStore.open(config.store.path) as blobs, Index.open(str(root / "store" / "index")) as index:
        library = Library(config, blobs, index, **options)
        prepare(library)
        async with library.running():
            yield library
