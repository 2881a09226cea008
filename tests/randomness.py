"""How Hypothesis draws: the same examples in every run of the suite, fresh ones in ``scripts/test --explore``.

A plugin of pytest (tests/conftest.py names it). The second command of the README must not fail by chance, so a test's
seed is its own source; what a fresh seed finds is for the explorer, whose findings come with what repeats them.
"""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import engine, providers

SUITE, EXPLORE = "suite", "explore"
TIMEOUTS = {SUITE: 300, EXPLORE: 1800}
"""Seconds that a random test may take, unless it says otherwise; another test's limit is pyproject.toml's."""
SHRINKING = {SUITE: 20, EXPLORE: 120}
"""Seconds after which a finding is reported as small as it is by then."""

# Nothing here may fail by the machine's load: neither an example's time nor that of drawing it.
settings.register_profile(
    SUITE, derandomize=True, database=None, deadline=None, print_blob=True, report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile(
    EXPLORE,
    settings.get_profile(SUITE),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/explore"),
)
settings.load_profile(SUITE)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # Neither is a setting. tests/unit/test_suite.py says so when a new version of Hypothesis keeps them elsewhere.
    # Without the second, numbers are drawn from the source of whatever modules happen to be loaded: by a worker's luck.
    seconds = os.environ.get("INSTANTSTART_TEST_SHRINKING")
    engine.MAX_SHRINKING_SECONDS = int(seconds) if seconds else SHRINKING.get(profile(config), SHRINKING[SUITE])
    providers._get_local_constants = lambda: providers._local_constants


def profile(config: pytest.Config) -> str:
    return str(config.getoption("--hypothesis-profile", None) or SUITE)


@pytest.hookimpl(trylast=True)  # after Hypothesis' own, which marks them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("hypothesis") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUTS.get(profile(config), TIMEOUTS[SUITE])))


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """For the explorer: each failure as a line of JSON."""
    place = os.environ.get("INSTANTSTART_TEST_FINDINGS")
    if place and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(place, "a") as file:
            file.write(json.dumps({"test": report.nodeid, "text": report.longreprtext}) + "\n")
