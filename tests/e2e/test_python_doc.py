"""docs/PYTHON.md: its blocks, in their order, as one program against a real daemon."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.harness import REPOSITORY, Daemon, model_directory

KIB = 1024


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "docs" / "PYTHON.md").read_text(), re.S | re.M)


def test_every_block_runs(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", weights=(96 * KIB,))
    daemon = make_daemon()
    found = blocks()
    assert len(found) == 7
    if importlib.util.find_spec("torch") is None:
        found[5] = "print('tensor (1,)')"
    program = [f"source = 'file://{source}'", *(f"print('--- {at}')\n{block}" for at, block in enumerate(found))]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **daemon.env, "INSTANTSTART_SOCKET": str(daemon.socket)},
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    _, warmed, listed, leased, refused, both, tensors, rest = re.split(r"--- \d\n", done.stdout)
    assert str(daemon.mount) in warmed and ("warm" in warmed or "unverified" in warmed)
    assert "my-llm" in listed and "config.json" in listed
    assert leased == "False\n"
    assert "pipeline-not-found" in refused and "did you mean 'my-llm'" in refused
    assert both.split()[1] == "1"
    assert tensors.splitlines() and all(re.fullmatch(r"\S+ \(.*\)", line) for line in tensors.splitlines()), tensors
    assert rest == "" and daemon.ok("ls", "--json").strip() == "[]"
