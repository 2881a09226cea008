"""docs/SEMANTICS.md: every claim names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "SEMANTICS.md").read_text(encoding="utf-8")
REFERENCES = re.findall(r"`\[(tests/[\w/]+\.py)::(\w+)\]`", TEXT)


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("path", "name"), REFERENCES)
def test_the_named_test_exists(path: str, name: str) -> None:
    assert name in functions(ROOT / path)


def test_every_claim_names_a_test() -> None:
    body = TEXT.split("\n## ", 1)[1]
    claims = re.findall(r"^- .*?(?=^- |^## |\Z)", body, flags=re.MULTILINE | re.DOTALL)
    assert len(claims) > 25
    assert [claim for claim in claims if "`[tests/" not in claim] == []
