from __future__ import annotations

from instantstart_fs.core.manifest import FileEntry, Manifest, ManifestFile, ModelManifest
from instantstart_fs.core.tree import Tree


def manifest_files(*models: tuple[str, tuple[str, ...]]) -> tuple[FileEntry, ...]:
    made = tuple(
        ModelManifest(name, "file:///x", "r", tuple(ManifestFile(path, 1, path) for path in paths))
        for name, paths in models
    )
    return Manifest("p", 1, 8, made, 0).files


def walk(tree: Tree, node: int = 0, prefix: str = "") -> list[str]:
    found = []
    for name, child in (tree.nodes[node].children or {}).items():
        path = prefix + name
        found += walk(tree, child, path + "/") if tree.nodes[child].children is not None else [path]
    return found


def test_every_file_has_its_place_and_back() -> None:
    files = manifest_files(("", ("a/b/c", "a/b/d", "a/e", "f")))
    tree = Tree(files)
    assert sorted(walk(tree)) == ["a/b/c", "a/b/d", "a/e", "f"]
    for entry in files:
        node = tree.nodes[tree.node_of_file(entry.index)]
        assert node.file == entry.index
        names = [node.name]
        while node.parent:
            node = tree.nodes[node.parent]
            names.append(node.name)
        assert "/".join(reversed(names)) == entry.path


def test_named_models_are_directories_even_when_empty() -> None:
    tree = Tree(manifest_files(("asr", ("m",)), ("tts", ())), ["asr", "tts"])
    assert set(tree.nodes[0].children or ()) == {"asr", "tts"}
    assert tree.child(0, "nothing") is None
    file = tree.child(tree.child(0, "asr") or 0, "m")
    assert file is not None
    assert tree.child(file, "below a file") is None
