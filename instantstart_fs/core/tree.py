"""A generation's files as a directory tree, built once from the manifest and immutable. It knows names and indexes, but
neither presence nor nodeids.

Node 0 is the pipeline's root, node 1…n the directories and files. A node's nodeid in the mount is
``base + NODEIDS_PER_NODE * node`` unless the library says otherwise (the roots keep theirs across generations).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from instantstart_fs.core.manifest import FileEntry

NODEIDS_PER_NODE = 2
"""A file has one nodeid for each I/O mode (cached, passthrough): the kernel allows one mode per nodeid."""


class TreeNode(msgspec.Struct, frozen=True, gc=False):
    """A file or directory. ``children``: name → node, None for a file. ``file``: index in the manifest, -1 for a
    directory."""

    parent: int
    name: str
    children: dict[str, int] | None
    file: int


class Tree:
    """The directories and files of one generation."""

    __slots__ = ("_node_of_file", "_subdirectories", "nodes")

    def __init__(self, entries: Sequence[FileEntry], model_names: Sequence[str] = ()) -> None:
        """``model_names``: directories that exist even when their model has no file."""
        nodes: list[TreeNode] = [TreeNode(0, "", {}, -1)]
        directories: dict[str, int] = {"": 0}
        subdirectories: Counter[int] = Counter()
        node_of_file = [0] * len(entries)

        def directory(path: str) -> int:
            known = directories.get(path)
            if known is not None:
                return known
            parent_path, _, name = path.rpartition("/")
            parent = directory(parent_path)
            node = len(nodes)
            nodes.append(TreeNode(parent, name, {}, -1))
            _children(nodes[parent])[name] = node
            directories[path] = node
            subdirectories[parent] += 1
            return node

        for name in model_names:
            if name:
                directory(name)
        for entry in entries:
            parent_path, _, name = entry.path.rpartition("/")
            parent = directory(parent_path)
            node = len(nodes)
            nodes.append(TreeNode(parent, name, None, entry.index))
            _children(nodes[parent])[name] = node
            node_of_file[entry.index] = node
        self.nodes = nodes
        self._node_of_file = node_of_file
        self._subdirectories = subdirectories

    def __len__(self) -> int:
        return len(self.nodes)

    def node_of_file(self, index: int) -> int:
        return self._node_of_file[index]

    def subdirectories(self, node: int) -> int:
        """Number of directories in that one."""
        return self._subdirectories[node]

    def child(self, node: int, name: str) -> int | None:
        children = self.nodes[node].children
        return None if children is None else children.get(name)


def _children(node: TreeNode) -> dict[str, int]:
    assert node.children is not None
    return node.children
