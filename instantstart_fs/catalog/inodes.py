"""The inode table: which pipeline, generation and file a nodeid names. It decides nothing and reads nothing."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable

from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline, UnloadedGeneration
from instantstart_fs.core.tree import NODEIDS_PER_NODE
from instantstart_fs.vfs import NotLoaded


class NodeTable:
    """Maps nodeids to what they name. Generations have blocks of consecutive nodeids; re-incarnated files and constant
    directories have single entries."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._blocks: list[tuple[int, int, Generation | UnloadedGeneration]] = []
        self._single: dict[int, CachedFile | Pipeline | UnloadedGeneration] = {}

    def __len__(self) -> int:
        """Entries: a block counts once."""
        return len(self._blocks) + len(self._single)

    def add_block(self, generation: Generation | UnloadedGeneration) -> None:
        position = bisect.bisect(self._bases, generation.base)
        self._bases.insert(position, generation.base)
        self._blocks.insert(position, (generation.base, generation.nodeid_count, generation))

    def load_blocks(self, unloaded: Iterable[UnloadedGeneration]) -> None:
        """Add the blocks of many unloaded generations at once."""
        for generation in unloaded:
            self._blocks.append((generation.base, generation.nodeid_count, generation))
            for nodeid in generation.summary.nodeids:
                self._single[nodeid] = generation
        self._blocks.sort(key=lambda block: block[0])
        self._bases = [block[0] for block in self._blocks]

    def unload(self, generation: Generation, unloaded: UnloadedGeneration) -> None:
        """``unloaded`` stands for ``generation`` from now on."""
        self.drop_generation(generation)
        self.add_block(unloaded)
        for nodeid in unloaded.summary.nodeids:
            self._single[nodeid] = unloaded

    def drop_unloaded(self, unloaded: UnloadedGeneration) -> None:
        self._drop_block(unloaded)
        for nodeid in unloaded.summary.nodeids:
            self._single.pop(nodeid, None)

    def drop_generation(self, generation: Generation) -> None:
        """Forget its block and the nodeids of its re-incarnated files."""
        self._drop_block(generation)
        for file in generation.files:
            self._single.pop(file.nodeid, None)

    def _drop_block(self, generation: Generation | UnloadedGeneration) -> None:
        position = bisect.bisect_left(self._bases, generation.base)
        if position < len(self._bases) and self._blocks[position][2] is generation:
            del self._bases[position], self._blocks[position]

    def add_pipeline(self, pipeline: Pipeline) -> None:
        for nodeid in pipeline.directory_nodeids.values():
            self._single[nodeid] = pipeline
        self._single[pipeline.link_nodeid] = pipeline

    def drop_pipeline(self, pipeline: Pipeline) -> None:
        for nodeid in pipeline.directory_nodeids.values():
            self._single.pop(nodeid, None)
        self._single.pop(pipeline.link_nodeid, None)

    def add_file(self, file: CachedFile) -> None:
        self._single[file.nodeid] = file

    def drop_file(self, nodeid: int) -> None:
        self._single.pop(nodeid, None)

    def find(self, nodeid: int) -> CachedFile | Pipeline | tuple[Generation, int] | None:
        """A file (by either of its nodeids), a pipeline (constant directory or symlink), a (generation, directory
        node), or None (stale). Raises NotLoaded where a generation has to be read first."""
        single = self._single.get(nodeid)
        if isinstance(single, UnloadedGeneration):
            raise NotLoaded(single.pipeline.id)
        if single is not None:
            return single
        single = self._single.get(nodeid - 1)
        if isinstance(single, CachedFile):
            return single
        if isinstance(single, UnloadedGeneration):
            raise NotLoaded(single.pipeline.id)
        position = bisect.bisect(self._bases, nodeid) - 1
        if position < 0:
            return None
        base, count, generation = self._blocks[position]
        if nodeid - base >= count:
            return None
        if isinstance(generation, UnloadedGeneration):
            raise NotLoaded(generation.pipeline.id)
        generation.pipeline.used_at = time.monotonic()
        node, mode = divmod(nodeid - base, NODEIDS_PER_NODE)
        file = generation.tree.nodes[node].file
        if file < 0:
            return (generation, node) if mode == 0 else None
        found = generation.files[file]
        return found if found.nodeid == nodeid - mode else None
