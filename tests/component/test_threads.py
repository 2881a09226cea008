"""What runs in threads, where none can be started."""

from __future__ import annotations

import logging
import threading

import pytest
import trio
import trio.testing

from instantstart_fs.config.threads import keep_spare_threads

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
