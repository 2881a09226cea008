"""Which tests may run beside each other under pytest-xdist. A plugin of pytest (tests/conftest.py names it).

All may, each with a store, a mount, a socket and servers of its own, but for those marked ``alone``: they measure time,
or change what the whole machine shares. While one of them runs, no other test does, in any worker. Tests that share a
fixture of their module go to one worker (``--dist loadgroup``), so that it is made once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

BUDGET = 15 * 60
"""Seconds that the whole suite may take on two quiet cores. Said, not enforced: nothing fails by its time."""


class Room:
    """A lock of many workers: shared by most tests, held alone by some. Who waits to be alone keeps newcomers out, so
    that it comes in time. The kernel frees it when a worker dies."""

    def __init__(self, directory: Path) -> None:
        self._door = os.open(directory / "door", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._room = os.open(directory / "room", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._alone = False

    def enter(self, *, alone: bool) -> None:
        if self._alone and alone:
            return
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self._alone = alone

    def leave(self) -> None:
        self._alone = False
        fcntl.flock(self._room, fcntl.LOCK_UN)


ROOM = pytest.StashKey[Room]()


@pytest.hookimpl
def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        base: Path = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        session.config.stash[ROOM] = Room(base.parent)  # the run's own


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the wait is not the test's time
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    room = item.config.stash.get(ROOM, None)
    if room is None:
        return (yield)
    room.enter(alone=is_alone(item))
    try:
        return (yield)
    finally:
        if not (is_alone(item) and nextitem is not None and is_alone(nextitem)):  # to wait once for all of them
            room.leave()


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if is_alone(item):
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif shares_with_its_module(item):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath))))


@pytest.hookimpl
def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest whose node ids pytest-xdist cannot extend: every worker would make every fixture again."""
    if not (hasattr(session.config, "workerinput") and session.config.getoption("loadgroup", False)):
        return
    ungrouped = [
        item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid
    ]
    if ungrouped:
        raise pytest.UsageError(f"pytest-xdist does not group {ungrouped[0]}: see the pin of pytest in pyproject.toml")


def shares_with_its_module(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    definitions = item._fixtureinfo.name2fixturedefs.values()
    return any(each.scope in ("module", "class", "package") for some in definitions for each in some)


STARTED = time.monotonic()
SLOWEST = 10


class Totals:
    """Over all tests: seconds that they took, and CPU seconds of them and of the processes that they waited for. The
    second says what a test costs on a machine that has other things to do as well."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu: dict[str, float] = {}


TOTALS = Totals()


def cpu_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, object, object]:
    if call.when == "teardown":
        item.user_properties.append(("cpu", cpu_seconds() - item.stash[BEGAN]))
    return (yield)


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = cpu_seconds()


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    TOTALS.seconds += report.duration
    if report.when == "teardown":
        TOTALS.cpu[report.nodeid.partition("@")[0]] = float(dict(report.user_properties).get("cpu", 0.0))  # type: ignore[arg-type]


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.getoption("durations") is not None and len(TOTALS.cpu) > SLOWEST:
        terminalreporter.write_sep("=", f"the {SLOWEST} that take most CPU")
        for name, seconds in sorted(TOTALS.cpu.items(), key=lambda item: -item[1])[:SLOWEST]:
            terminalreporter.write_line(f"{seconds:.2f}s {name}")
    processes = config.getoption("numprocesses", None) or 1
    terminalreporter.write_line(
        f"{(time.monotonic() - STARTED) / 60:.1f} min, for {TOTALS.seconds / 60:.1f} min of tests with "
        f"{sum(TOTALS.cpu.values()) / 60:.1f} min of CPU in {processes} processes; the "
        f"whole suite's budget is {BUDGET // 60} min on two quiet cores (load average: {os.getloadavg()[1]:.1f})"
    )
