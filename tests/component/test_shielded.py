"""What has begun is finished, whoever waits for it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from instantstart_fs.errors import FillCancelled, StoreError
from instantstart_fs.serving.shielded import ShieldedOperations


async def test_it_is_finished_though_its_requester_was_cancelled() -> None:
    shielded, go, done = ShieldedOperations(), trio.Event(), trio.Event()

    async def work() -> int:
        await go.wait()
        done.set()
        return 7

    async with trio.open_nursery() as nursery:
        await nursery.start(shielded.run)
        with trio.move_on_after(0.01) as asking:
            await shielded.run_to_completion(work)
        assert asking.cancelled_caught and not done.is_set()
        go.set()
        with trio.fail_after(5):
            await done.wait()
        assert await shielded.run_to_completion(work) == 7
        nursery.cancel_scope.cancel()


async def test_what_fails_is_told_to_who_waits_and_ends_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    shielded, go = ShieldedOperations(), trio.Event()

    async def fail() -> None:
        await go.wait()
        raise StoreError("no")

    async with trio.open_nursery() as nursery:
        await nursery.start(shielded.run)
        with trio.move_on_after(0.01):
            await shielded.run_to_completion(fail)
        go.set()
        with pytest.raises(StoreError, match="no"):
            await shielded.run_to_completion(fail)
        assert "nobody waits any more for what failed: no" in caplog.text
        nursery.cancel_scope.cancel()


async def test_at_the_end_nothing_begins_any_more_while_what_is_under_way_is_finished() -> None:
    shielded, go, finished = ShieldedOperations(), trio.Event(), trio.Event()

    async def work() -> None:
        with trio.move_on_after(5, shield=True):
            await go.wait()
        finished.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as outer:
            scope = trio.CancelScope()

            async def run(*, task_status: trio.TaskStatus[None]) -> None:
                with scope:
                    await shielded.run(task_status=task_status)

            await outer.start(run)
            with trio.move_on_after(0.01):
                await shielded.run_to_completion(work)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(FillCancelled):
                await shielded.run_to_completion(work)
            assert not finished.is_set()
            go.set()
        assert finished.is_set()


async def test_at_the_end_who_waits_is_told_so() -> None:
    shielded = ShieldedOperations()
    told: list[str] = []

    async def wait() -> None:
        with pytest.raises(FillCancelled) as error:
            await shielded.run_to_completion(trio.sleep_forever)
        told.append(error.value.message)

    with trio.fail_after(5):
        async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
            await nursery.start(shielded.run)
            outer.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    await wait()
    assert told == ["the daemon ends"] * 2
