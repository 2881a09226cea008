"""Answers lookups, listings, attributes and xattrs of the mount from memory: its namespace.

/                      ROOT
/.warm /.filling /.cold   symlinks to the pipelines of that state
/<pipeline>/…          the current generation's tree
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile, Generation, Pipeline
from instantstart_fs.core.status import PipelineState
from instantstart_fs.errors import AccessRefused, NoSuchEntry
from instantstart_fs.vfs import ROOT, Attributes
from instantstart_fs.views import status

STATE_DIRECTORIES = {".warm": 2, ".filling": 3, ".cold": 4}
"""Name → nodeid; below the first nodeid that the index hands out."""

_STATE_NAMES = {nodeid: name for name, nodeid in STATE_DIRECTORIES.items()}

XATTR_PREFIX = "user.instantstart."


class Namespace:
    """Owned by the Library. ``state_of`` computes a pipeline's state; ``keep_hot`` in seconds."""

    def __init__(
        self, catalog: Catalog, clocks: status.Clocks, state_of: Callable[[Pipeline], PipelineState], keep_hot: float
    ) -> None:
        self._catalog = catalog
        self._clocks = clocks
        self._state_of = state_of
        self._keep_hot = keep_hot
        self._started_ns = catalog.now_ns()

    def lookup(self, parent: int, name: str) -> Attributes:
        """See vfs.Vfs.lookup."""
        if parent == ROOT:
            if name in STATE_DIRECTORIES:
                return self._state_directory(STATE_DIRECTORIES[name])
            pipeline = self._catalog.pipelines.get(name)
            if pipeline is not None and pipeline.hidden is None:
                return self._pipeline_root(pipeline, pipeline.root_nodeid)
            raise NoSuchEntry(f"no pipeline {name!r}")
        if parent in _STATE_NAMES:
            pipeline = self._catalog.pipelines.get(name)
            if pipeline is not None and self._is_listed(pipeline, _STATE_NAMES[parent]):
                return status.link_attributes(pipeline)
            raise NoSuchEntry(f"no pipeline {name!r} in {_STATE_NAMES[parent]}")
        generation, node = self._directory(parent)
        child = generation.tree.child(node, name)
        if child is None:
            raise NoSuchEntry(f"no file {name!r}")
        return self._node(generation, child)

    def attributes(self, nodeid: int) -> Attributes:
        """See vfs.Vfs.attributes."""
        if nodeid == ROOT:
            return status.directory_attributes(
                ROOT,
                mode=0o755,
                uid=0,
                gid=0,
                time_ns=self._started_ns,
                children=len(self._catalog.pipelines) + len(STATE_DIRECTORIES),
                stable=True,  # but for its times, which go with each invalidation of an entry
            )
        if nodeid in _STATE_NAMES:
            return self._state_directory(nodeid)
        found = self._catalog.nodes.find(nodeid)
        if isinstance(found, CachedFile):
            return status.file_attributes(found, self._clocks, nodeid)
        if isinstance(found, Pipeline):
            if nodeid == found.link_nodeid:
                return status.link_attributes(found)
            return self._pipeline_root(found, nodeid)
        if found is not None:
            return self._node(*found)
        raise NoSuchEntry(f"node {nodeid} is gone")

    def list_directory(self, nodeid: int) -> Sequence[str]:
        """See vfs.Vfs.list_directory."""
        if nodeid == ROOT:
            shown = (name for name, pipeline in self._catalog.pipelines.items() if pipeline.hidden is None)
            return [*STATE_DIRECTORIES, *sorted(shown)]
        if nodeid in _STATE_NAMES:
            return [
                name
                for name, pipeline in sorted(self._catalog.pipelines.items())
                if self._is_listed(pipeline, _STATE_NAMES[nodeid])
            ]
        generation, node = self._directory(nodeid)
        return list(generation.tree.nodes[node].children or ())

    def keeps_listing(self, nodeid: int) -> bool:
        """See vfs.Vfs.keeps_listing."""
        if nodeid == ROOT or nodeid in _STATE_NAMES:
            return False
        try:
            generation, node = self._directory(nodeid)
        except (NoSuchEntry, AccessRefused):
            return False
        return generation.mostly_complete(node)

    def readlink(self, nodeid: int) -> str:
        """See vfs.Vfs.readlink."""
        found = self._catalog.nodes.find(nodeid)
        if isinstance(found, Pipeline) and nodeid == found.link_nodeid:
            return status.link_target(found)
        raise NoSuchEntry(f"node {nodeid} is no symlink")

    def xattrs(self, nodeid: int) -> dict[str, bytes]:
        """See vfs.Vfs.xattrs."""
        found = self._catalog.nodes.find(nodeid)
        if isinstance(found, CachedFile):
            state = self._state_of(found.generation.pipeline)
            values = status.file_xattrs(found, state, self._clocks, self._keep_hot)
        elif isinstance(found, Pipeline) and nodeid == found.root_nodeid:
            values = status.pipeline_xattrs(found, self._state_of(found), self._clocks, self._keep_hot)
        else:
            return {}
        return {XATTR_PREFIX + name: value.encode() for name, value in values.items()}

    def _state_directory(self, nodeid: int) -> Attributes:
        return status.directory_attributes(
            nodeid, mode=0o555, uid=0, gid=0, time_ns=self._started_ns, children=0, stable=False
        )

    def _pipeline_root(self, pipeline: Pipeline, nodeid: int) -> Attributes:
        generation = pipeline.head
        children = generation.subdirectories(nodeid) if generation is not None else None
        if generation is not None and children is not None:
            return status.root_attributes(pipeline, nodeid, generation.resolved_at_ns, children)
        spec = pipeline.spec
        return status.directory_attributes(
            nodeid,
            mode=spec.mode & 0o555,
            uid=spec.uid,
            gid=spec.gid,
            time_ns=pipeline.created_at_ns,
            children=0,
            stable=False,
        )

    def _is_listed(self, pipeline: Pipeline, directory: str) -> bool:
        return pipeline.hidden is None and status.state_directory(self._state_of(pipeline)) == directory

    def _directory(self, nodeid: int) -> tuple[Generation, int]:
        """Return a directory. Raises NoSuchEntry; AccessRefused if the pipeline is hidden, since a container may have
        its directory bound."""
        found = self._catalog.nodes.find(nodeid)
        pipeline = found if isinstance(found, Pipeline) else found[0].pipeline if isinstance(found, tuple) else None
        if pipeline is not None:
            pipeline.check_visible()
        if isinstance(found, Pipeline) and (generation := found.current_nowait()) is not None:
            node = generation.node_of_root(nodeid)
            if node is not None:
                return generation, node
        if isinstance(found, tuple):
            return found
        raise NoSuchEntry(f"node {nodeid} is no directory, or is gone")

    def _node(self, generation: Generation, node: int) -> Attributes:
        file = generation.tree.nodes[node].file
        if file < 0:
            return status.tree_directory_attributes(generation, node)
        found = generation.files[file]
        passed = self._catalog.passthrough and found.passthrough_eligible
        return status.file_attributes(found, self._clocks, found.passthrough_nodeid if passed else found.nodeid)
