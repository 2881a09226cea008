"""The structure that scripts/check cannot see: no import circle, no module or class beyond what one person reads."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.harness import REPOSITORY

PACKAGE = "instantstart_fs"
ROOT = REPOSITORY / PACKAGE
MOST_LINES = 500
MOST_PUBLIC = 25
MOST_COLLABORATORS = 8
PLAIN = set(
    re.findall(
        r"\w+",
        "int float str bool bytes bytearray memoryview object None tuple list dict set frozenset Sequence Mapping"
        " Collection Iterable Literal Config",
    )
)
"""A constructor's parameter of these types alone is a value and no collaborator."""
REASON = r"more than {bound}\b[^.]*?(?:, because|, since|:) (?:\S+ ){{4,}}\S+\."
"""The sentence that a class beyond a bound has in its docstring: which bound, and why."""
GERUNDS = {"accounting", "staging", "listing", "fd_passing"}
"""Modules whose name ends in -ing: nouns of their own, and the field's terms."""
PRIVATE = set(
    re.findall(
        r"\w+",
        "shelf shelves fold folds folded folding unfold unfolded cover covers covered covering uncovered errand errands"
        " observing observer watching watcher room trouble gone settle settled settling unsettled doubt whoever"
        " hopeless collecting overview holders",
    )
)
"""Words that were ours for what the field has terms for (docs/GLOSSARY.md has those that remain)."""
WRITTEN = {
    "core/status.py trouble",  # a field of --json
    "upkeep/access_recheck.py trouble",
    "cli/show.py trouble",
}
"""Names that are the same on disk or in --json, with the module that has them."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that this one names, wherever the import stands: at the top, in a function, or for types
    alone."""
    found = set()
    for node in ast.walk(parsed(path)):
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


def classes() -> Iterator[tuple[str, ast.Module, ast.ClassDef]]:
    for name, path in modules().items():
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"{name}.{node.name}", tree, node


def public_methods(node: ast.ClassDef) -> set[str]:
    methods = (item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for name in methods if not name.startswith("_")}


def names_in(annotation: ast.expr | None) -> set[str]:
    if annotation is None:
        return set()
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}


def collaborators(tree: ast.Module, node: ast.ClassDef) -> list[str]:
    """What the constructor takes, beside values, and the parts of the package's own classes that it makes."""
    start = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if start is None:
        return []
    ours = {item.name for item in tree.body if isinstance(item, ast.ClassDef)}
    for item in ast.walk(tree):
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith(PACKAGE):
            ours |= {alias.asname or alias.name for alias in item.names}
    taken = [arg.arg for arg in start.args.args[1:] + start.args.kwonlyargs if not names_in(arg.annotation) <= PLAIN]
    made = [
        ast.unparse(item.targets[0])
        for item in ast.walk(start)
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Attribute)
        and isinstance(item.value, ast.Call)
        and isinstance(item.value.func, ast.Name)
        and item.value.func.id in ours
        and item.value.func.id[0].isupper()
    ]
    return taken + made


def says_why(docstring: str | None, bound: str) -> bool:
    return re.search(REASON.format(bound=bound), " ".join((docstring or "").split())) is not None


def test_a_large_class_says_why_it_is_large() -> None:
    silent = []
    for name, tree, node in classes():
        counts = {
            f"{MOST_PUBLIC} public methods": (len(public_methods(node)), MOST_PUBLIC),
            f"{MOST_COLLABORATORS} collaborators": (len(collaborators(tree, node)), MOST_COLLABORATORS),
        }
        for bound, (count, most) in counts.items():
            if count > most and not says_why(ast.get_docstring(node), bound):
                silent.append(f"{name}: {count}, and no sentence 'more than {bound}, because …' in its docstring")
    assert not silent


def test_what_counts_as_large_and_as_a_reason() -> None:
    source = """
from instantstart_fs.core.chunks import ChunkMap
class Large:
    def __init__(self, index: Index, count: int, names: tuple[str, ...], when: Callable[[], float]) -> None:
        self.map = ChunkMap(3)
        self.seen = dict()
    def one(self): ...
    @property
    def two(self): ...
    def _three(self): ...
"""
    tree = ast.parse(source)
    node = tree.body[1]
    assert isinstance(node, ast.ClassDef)
    assert public_methods(node) == {"one", "two"}
    assert collaborators(tree, node) == ["index", "when", "self.map"]
    bound = f"{MOST_COLLABORATORS} collaborators"
    assert says_why("Does.\n\nIt has more than 8 collaborators, because one event\nhas to reach them all.", bound)
    assert not says_why("It has more than 8 collaborators.", bound)
    assert not says_why("It has more than 8 collaborators, because so.", bound)
    assert not says_why("It has many methods and collaborators.", bound)


def words_of(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()))


def identifiers(path: Path) -> Iterator[str]:
    yield path.stem
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_names_are_the_fields_terms() -> None:
    found = {
        f"{path.relative_to(ROOT)} {word}"
        for path in modules().values()
        for name in identifiers(path)
        for word in words_of(name) & PRIVATE
    }
    assert found <= WRITTEN, sorted(found - WRITTEN)
    assert words_of("_no_room") & PRIVATE and words_of("ClaimRoom") & PRIVATE and not words_of("backroom") & PRIVATE


def test_modules_are_named_for_what_they_are() -> None:
    names = {path.stem for path in modules().values() if path.stem.endswith("ing")}
    assert names <= GERUNDS, sorted(names - GERUNDS)


def test_every_module_says_what_it_is_for() -> None:
    for name, path in modules().items():
        text = ast.get_docstring(parsed(path)) or ""
        first = text.split("\n\n")[0]
        assert len(first.split()) >= 5 or name.endswith("__main__"), f"{name}: what is it for?"


def test_dependencies_md_names_every_library_that_is_imported_or_required() -> None:
    told = set(re.findall(r"[a-z][a-z0-9_]+", (REPOSITORY / "docs/decisions/dependencies.md").read_text().lower()))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[A-Za-z0-9_]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]
    used = set()
    for path in modules().values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
    used -= {PACKAGE, "mypy_boto3_s3", *sys.stdlib_module_names}  # stubs, which nothing imports at run time
    assert len(used) > 10
    assert (required | used) - told == set()
