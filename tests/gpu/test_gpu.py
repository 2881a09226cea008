"""Everything that needs a GPU: the parts of bench/gpu.py, one test each, on a smaller checkpoint.

Without a device each is skipped by its own name, so that the summary of a test run lists what was not run. The speed of
the small checkpoint is printed and judged by nobody: that is for `python bench/gpu.py` on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from bench.gpu import GIB, PARTS, Part, Run, no_gpu
from bench.gpu_watch import Skipped

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("weights")
    options = argparse.Namespace(
        size=2 * GIB,
        shards=32,
        rounds=1,
        limit=3600.0,
        out=str(tmp_path_factory.mktemp("results")),
        only="",
        contenders="",
    )
    made = Run(options, directory)
    made.checkpoint()
    yield made
    for path in made.files:
        path.unlink()


@pytest.mark.parametrize("part", [part for part in PARTS if part.name != "checkpoint"], ids=lambda part: part.name)
def test_gpu(part: Part, request: pytest.FixtureRequest) -> None:
    if missing := no_gpu():
        pytest.skip(f"not run: {part.name}: {missing}")
    try:
        found = part.work(request.getfixturevalue("run"))
    except Skipped as reason:
        pytest.skip(f"not run: {part.name}: {reason}")
    print(part.name, found)
