"""Whether a test that failed beside others fails by itself, too. A plugin of pytest (tests/conftest.py names it).

A run in several processes keeps two cores busy many times over, and others may use the machine as well. Of 4,000 tests
a few wait for something that comes late there. One of them must not decide over all: what failed in such a run is run
again alone, TIMES times. If it passes each time, it is listed as unsteady with what it said, and the run succeeds. More
than MOST failures are no chance, and a module that cannot be collected or a test that ends its process keeps others
from running: nothing is run again then. docs/decisions/unsteady-tests.md gives the reasons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

MOST = 3
TIMES = 3
SECONDS = 400.0
"""For one run of one test: the longest time-out of a test, and what stops it."""

FAILED: dict[str, str] = {}
"""Name of a test to what it said, in the order in which they failed."""
UNSTEADY: list[str] = []
BROKEN: list[str] = []
"""Modules that cannot be collected, and tests that ended their process: others did not run because of them."""


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        FAILED.setdefault(name_of(report.nodeid), report.longreprtext)
        if report.when not in ("setup", "call", "teardown"):  # pytest-xdist's word of a worker that died
            BROKEN.append(report.nodeid)


@pytest.hookimpl
def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        BROKEN.append(report.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the terminal's, which prints the summary
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    config = session.config
    parallel = bool(getattr(config.option, "numprocesses", None)) and "INSTANTSTART_TEST_FINDINGS" not in os.environ
    failed = session.exitstatus == pytest.ExitCode.TESTS_FAILED and not session.shouldfail
    if parallel and failed and not BROKEN and len(FAILED) <= MOST:
        base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        UNSTEADY.extend(
            name for number, name in enumerate(FAILED) if passes_alone(config, name, base / f"again{number}")
        )
    yield
    if FAILED and not BROKEN and len(UNSTEADY) == len(FAILED):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if UNSTEADY:
        terminalreporter.write_sep("=", "unsteady", yellow=True)
        for name in UNSTEADY:
            terminalreporter.write_line(FAILED[name])
            terminalreporter.write_line(
                f"UNSTEADY {name}: it failed beside others and passed {TIMES} times alone. Its cause is to be found.",
                yellow=True,
            )


def name_of(nodeid: str) -> str:
    """Without the group that pytest-xdist appends to it."""
    name, at, group = nodeid.rpartition("@")
    return name if at and (group == "alone" or group.endswith(".py")) else nodeid


def passes_alone(config: pytest.Config, name: str, base: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    for _ in range(TIMES):
        try:
            ended = subprocess.run(
                [*command, f"--basetemp={base}", name], cwd=config.rootpath, env=environment, capture_output=True,
                timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        if ended.returncode != 0 or b"1 passed" not in ended.stdout:  # one that skips has shown nothing
            return False
    return True
