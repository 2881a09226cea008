"""Implements vfs.Vfs, what the mount calls, from the namespace (views/) and the read path (reads.py)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, cast

import trio

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Pipeline
from instantstart_fs.filler.scheduler import Filler
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.serving.reads import Reads
from instantstart_fs.vfs import FilesystemStats, Invalidation, NotLoaded, OpenFile
from instantstart_fs.views.namespace import Namespace
from instantstart_fs.views.pipelines import Pipelines


class MountedPipelines:
    """Implements vfs.Vfs. Its attributes are the parts' own methods, so that a request costs no extra call."""

    def __init__(
        self,
        catalog: Catalog,
        namespace: Namespace,
        pipelines: Pipelines,
        reads: Reads,
        open_files: OpenFiles,
        filler: Filler,
    ) -> None:
        self._catalog = catalog
        self._reads = reads
        self._open_files = open_files
        self._filler = filler
        self.ensure_loaded = pipelines.ensure_loaded
        self.lookup = namespace.lookup
        self.attributes = namespace.attributes
        self.list_directory = namespace.list_directory
        self.keeps_listing = namespace.keeps_listing
        self.readlink = namespace.readlink
        self.xattrs = namespace.xattrs
        self.open_nowait = reads.open_nowait
        self.open = reads.open
        self.reopen = reads.reopen
        # The mount hands back what ``open`` returned, so each OpenFile is a Handle.
        self.read_into = cast(Callable[[OpenFile, int, memoryview], Coroutine[Any, Any, int]], reads.read_into)
        self.release = cast(Callable[[OpenFile], None], reads.release)

    @property
    def invalidations(self) -> trio.MemoryReceiveChannel[Invalidation]:
        return self._catalog.invalidations

    def use_passthrough(self, on: bool, closing: Callable[[int], None] | None = None) -> None:
        """See vfs.Vfs.use_passthrough."""
        self._catalog.passthrough = on
        self._open_files.before_close(closing)

    def on_mounted(self, *, resumed: bool) -> None:
        """See vfs.Vfs.on_mounted."""
        self._reads.release_unclaimed()
        self._filler.start_workers()
        if resumed:
            self._catalog.expire_names()

    def filesystem(self) -> FilesystemStats:
        """See vfs.Vfs.filesystem."""
        space = self._catalog.store.space()
        return FilesystemStats(
            total_bytes=space.f_blocks * space.f_frsize,
            available_bytes=space.f_bavail * space.f_frsize,
            # Everybody may ask: the number of files would tell how many a hidden pipeline has.
            files=len(self._catalog.pipelines),
        )

    def pipeline_of(self, nodeid: int) -> str | None:
        """See vfs.Vfs.pipeline_of."""
        try:
            found = self._catalog.nodes.find(nodeid)
        except NotLoaded as unloaded:
            return unloaded.pipeline
        if isinstance(found, Pipeline):
            return found.id
        generation = found[0] if isinstance(found, tuple) else found.generation if found is not None else None
        return generation.pipeline.id if generation is not None else None
