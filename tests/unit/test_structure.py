"""The structure that scripts/check cannot see: no import circle, no module or class beyond what one person reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.harness import REPOSITORY

PACKAGE = "instantstart_fs"
ROOT = REPOSITORY / PACKAGE
MOST_LINES = 500
MOST_PUBLIC = 25
MOST_COLLABORATORS = 8
REASON = ("collaborators", "methods")
"""A class beyond a bound has a sentence in its docstring that says why: it names what there are many of."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that this one names, wherever the import stands: at the top, in a function, or for types
    alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            while full and full not in known:
                full = full.rpartition(".")[0]
            if full and full != name:
                found.add(full)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components of more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(stack[at:])
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_import_makes_a_circle() -> None:
    known = modules()
    assert len(known) > 200
    assert circles({name: imported(name, path, known) for name, path in known.items()}) == []


def test_a_module_can_be_read_at_a_sitting() -> None:
    """A longer one has two reasons to change: split it there."""
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_path_of_the_architecture_exists() -> None:
    text = (REPOSITORY / "docs/ARCHITECTURE.md").read_text() + (REPOSITORY / "docs/GLOSSARY.md").read_text()
    paths = set(re.findall(r"`([\w./-]+(?:\.py|/))`", text))
    assert len(paths) > 100
    assert {path for path in paths if not (ROOT / path).exists() and not (REPOSITORY / path).exists()} == set()


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{name}.{node.name}", node


def test_a_large_class_says_why_it_is_large() -> None:
    silent = []
    for name, node in classes():
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        public = sum(not method.name.startswith("_") for method in methods)
        start = next((method for method in methods if method.name == "__init__"), None)
        taken = 0 if start is None else len(start.args.args) - 1 + len(start.args.kwonlyargs)
        if public <= MOST_PUBLIC and taken <= MOST_COLLABORATORS:
            continue
        text = ast.get_docstring(node) or ""
        if not any(word in text for word in REASON):
            silent.append(f"{name}: {public} public methods, {taken} things that it is made with")
    assert not silent
