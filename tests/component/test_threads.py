"""What runs in threads, where none can be started; what they open too late."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs.config.threads import keep_spare_threads
from instantstart_fs.ipc import threads
from instantstart_fs.ipc.threads import open_abandonable

MANY = 30
"""More than trio keeps idle from earlier tests, and less than its limiter allows."""


async def test_where_no_thread_can_be_started_the_work_is_done_by_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = trio._threads  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "start_thread_soon", module.start_thread_soon)
    keep_spare_threads()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    held = threading.Event()

    def work(number: int) -> None:
        held.wait(30)
        done.append(number)

    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            for number in range(MANY):
                nursery.start_soon(trio.to_thread.run_sync, work, number)
            await trio.testing.wait_all_tasks_blocked()
            held.set()
        with pytest.raises(ZeroDivisionError):
            await trio.to_thread.run_sync(lambda: 1 // 0)
    assert sorted(done) == list(range(MANY))
    assert sum("pids.max" in record.message for record in caplog.records) == 1


async def test_a_descriptor_that_comes_in_time_is_the_callers() -> None:
    opened = await open_abandonable(os.open, "/", os.O_RDONLY)
    os.fstat(opened)
    os.close(opened)


def ended(reader: int) -> bool:
    """Whether the other end of the pipe has been closed: there is nothing to read, and nobody who could write."""
    return bool(select.select([reader], [], [], 10)[0]) and os.read(reader, 1) == b""


@pytest.mark.parametrize("why", ["deadline", "cancelled"])
async def test_a_descriptor_that_comes_too_late_is_closed(why: str) -> None:
    begun, go_on = threading.Event(), threading.Event()
    reader, writer = os.pipe()

    def slow() -> int:
        begun.set()
        assert go_on.wait(30)
        return writer

    if why == "deadline":
        with pytest.raises(trio.TooSlowError):
            await open_abandonable(slow, deadline=0.3)
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_abandonable, slow)
            while not begun.is_set():
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    assert begun.wait(30)
    assert not select.select([reader], [], [], 0)[0], "it has not come yet"
    go_on.set()
    assert ended(reader)
    os.close(reader)


async def test_a_descriptor_that_comes_as_its_caller_is_cancelled_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and the caller does not learn of it any more."""
    reader, writer = os.pipe()
    really = threads.run_abandonable

    async def run_and_be_cancelled(work: Callable[[], None], **options: Any) -> None:
        await really(work, **options)
        raise trio.TooSlowError

    monkeypatch.setattr(threads, "run_abandonable", run_and_be_cancelled)
    with pytest.raises(trio.TooSlowError):
        await open_abandonable(lambda: writer)
    assert ended(reader)
    os.close(reader)
