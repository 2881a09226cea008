"""What runs in threads, where none can be started; what they open too late."""

from __future__ import annotations

import logging
import os
import threading

import pytest
import trio
import trio.testing

from instantstart_fs.config.threads import keep_spare_threads
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


async def test_a_descriptor_that_comes_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await open_abandonable(os.open, "/", os.O_RDONLY)
    os.fstat(opened)
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    close = os.close

    def slow() -> int:
        begun.set()
        go_on.wait(30)
        return os.dup(opened)

    def closes(fd: int) -> None:
        close(fd)
        closed.set()

    with pytest.raises(trio.TooSlowError):
        await open_abandonable(slow, deadline=0.01)
    monkeypatch.setattr(os, "close", closes)
    go_on.set()
    assert begun.is_set() and closed.wait(30)
    monkeypatch.undo()
    os.close(opened)
