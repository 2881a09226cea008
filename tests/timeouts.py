"""A test that takes too long fails, and the others go on. A plugin of pytest (tests/conftest.py names it).

pytest-timeout decides how long a test may take and calls the two ``pytest_timeout_…`` hooks; what is done is ours,
since of its own methods one does not reach what hangs in C code, and the other ends the whole process. Four steps,
GRACE seconds apart, each for what the one before cannot end:

1. SIGALRM. In a trio run the main task's nurseries are cancelled, so that fixtures are finalized in order.
2. SIGALRM again, and again: TimedOut is raised wherever the main thread is. It is no Exception: Hypothesis would take
   one for a finding, and shrink it.
3. FUSE connections of the test's mounts are aborted (tests/sentinel.py): a read that waits for a mount ends.
4. The process is killed. Under pytest-xdist, as ``scripts/test`` runs, the test is reported as failed, and another
   worker goes on with the rest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from _pytest.outcomes import OutcomeException
from trio._core._run import GLOBAL_RUN_CONTEXT

GRACE = float(os.environ.get("INSTANTSTART_TEST_GRACE", "10"))


class TimedOut(OutcomeException):
    """The test took longer than it may. No Exception, but one of those after which pytest tears down in order."""


class Watch:
    """Over one process that runs tests: the alarm within, the sentinel beside it."""

    def __init__(self, below: Path) -> None:
        self._sentinel = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("sentinel.py")), str(os.getpid()), str(below),
             str(GRACE)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self._sentinel.wait(30)  # it has left a child of its own
        self.item: pytest.Item | None = None
        self.seconds = 0.0
        self.fired = 0
        self.inside = False
        """Whether an exception raised now fails the test, and not the run."""

    def _tell(self, line: str) -> None:
        assert self._sentinel.stdin is not None
        with contextlib.suppress(OSError):
            self._sentinel.stdin.write(line.encode() + b"\n")
            self._sentinel.stdin.flush()

    def arm(self, item: pytest.Item, seconds: float) -> None:
        self.item, self.seconds, self.fired = item, seconds, 0
        self._tell(f"start {seconds + 2 * GRACE}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, self._alarm)
            signal.setitimer(signal.ITIMER_REAL, seconds, GRACE)

    def disarm(self) -> None:
        if self.item is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._tell("end")
            if self.fired > 1:
                # Raised inside of trio itself, it may have left a run that nobody is in: no later test could begin one.
                GLOBAL_RUN_CONTEXT.__dict__.clear()
        self.item = None

    def close(self) -> None:
        self.disarm()
        self._tell("bye")
        assert self._sentinel.stdin is not None
        with contextlib.suppress(OSError):
            self._sentinel.stdin.close()

    def error(self) -> TimedOut:
        return TimedOut(f"the test took longer than {self.seconds:g} s")

    @contextlib.contextmanager
    def in_time(self) -> Iterator[None]:
        """A cancelled trio run returns, or raises what the cancellation made of it: either way the time was over."""
        try:
            yield
        except TimedOut:
            raise
        except BaseException as error:
            if self.fired:
                raise self.error() from error
            raise
        if self.fired:
            raise self.error()

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        if not self.inside or self.item is None:  # pytest's own steps: the next alarm comes soon
            return
        if sys.gettrace() is not None:  # a debugger's test takes as long as it likes
            return
        self.fired += 1
        if self.fired == 1:
            self.inside = False  # the next alarm may come before this one is done with
            self.item.add_report_section("call", "stacks when the time was over", stacks())
            self.inside = True
            with contextlib.suppress(RuntimeError):  # no trio run
                trio.lowlevel.current_trio_token().run_sync_soon(cancel_main_task)
                return
        raise self.error()


def cancel_main_task() -> None:
    root = trio.lowlevel.current_root_task()
    tasks = [task for nursery in root.child_nurseries for task in nursery.child_tasks] if root is not None else []
    for task in tasks:
        for nursery in task.child_nurseries:
            nursery.cancel_scope.cancel("the test took too long")


def stacks() -> str:
    """Of all threads, and of trio's tasks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, innermost in sys._current_frames().items():
        # Not traceback's own format: it parses source, and to be interrupted in that spoils the parser.
        lines = [
            f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
            for frame, line in traceback.walk_stack(innermost)
        ]
        parts.append("\n".join([f"thread {names.get(ident, ident)}, innermost first:", *lines]))
    with contextlib.suppress(RuntimeError):
        trio.lowlevel.current_trio_token()
        for task in tasks_below(trio.lowlevel.current_root_task()):
            lines = [
                f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
                for frame, line in task.iter_await_frames()
            ]
            parts.append("\n".join([f"task {task.name}:", *lines]))
    return "\n".join(parts)


def tasks_below(task: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    if task is not None:
        yield task
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield from tasks_below(child)


WATCH = pytest.StashKey[Watch]()


@pytest.hookimpl
def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # the one that runs no tests
    below: Path = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    session.config.stash[WATCH] = Watch(below)


@pytest.hookimpl
def pytest_unconfigure(config: pytest.Config) -> None:
    watch = config.stash.get(WATCH, None)
    if watch is not None:
        del config.stash[WATCH]
        watch.close()


@pytest.hookimpl
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    watch = item.config.stash.get(WATCH, None)
    if watch is None:
        return None
    watch.arm(item, settings.timeout)
    return True


@pytest.hookimpl
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool | None:
    """Also called after a failure: what is torn down then may hang as well, and keeps the rest of the time."""
    watch = item.config.stash.get(WATCH, None)
    if watch is None:
        return None
    if item.config.getoption("usepdb"):
        watch.disarm()
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        watch = item.config.stash.get(WATCH, None)
        if watch is not None:
            watch.disarm()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, object, object]:
    """A report parses the source of what failed. A collection in the midst of that may run finalizers whose complaint
    parses source too, and CPython's parser cannot be entered twice: a SystemError that ends the worker's run."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if collecting:
            gc.enable()


def _phase(item: pytest.Item) -> Generator[None, object, object]:
    watch = item.config.stash.get(WATCH, None)
    if watch is None:
        return (yield)
    watch.inside = True
    try:
        return (yield)
    finally:
        watch.inside = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    watch = pyfuncitem.config.stash.get(WATCH, None)
    if watch is None:
        return (yield)
    random_test = getattr(pyfuncitem.obj, "hypothesis", None)
    if random_test is not None:  # each example: or the next one begins, and none is ever TimedOut
        random_test.inner_test = in_time(watch, random_test.inner_test)
    with watch.in_time():
        return (yield)


def in_time(watch: Watch, test: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(test)
    def timed(*args: object, **kwargs: object) -> object:
        with watch.in_time():
            return test(*args, **kwargs)

    return timed
