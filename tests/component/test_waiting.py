"""How long a reader waits, on a clock that jumps: once ``no_progress``, whatever is undertaken meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
import trio.testing

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.retry import MAX_RETRY_AFTER, REPEAT_SECONDS, Effort
from instantstart_fs.errors import OriginBroken, OriginThrottled, ReadDeadline
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.store.blobstore import BlobStore
from tests.component.byteserver import FakeOrigin, make_target

Clock = trio.testing.MockClock
CHUNK = 64 * 1024
FIRST, SECOND = ByteRange(0, 10), ByteRange(CHUNK, CHUNK + 10)


class Owner:
    """Fills nothing: notes which chunks nobody waits for any more."""

    def __init__(self, moved: Callable[[], float] = lambda: -math.inf) -> None:
        self._moved = moved
        self.unwaited_chunks: list[int] = []

    def unwaited(self, target: FillTarget, chunks: list[int]) -> None:
        self.unwaited_chunks += chunks

    def queue_moved(self, target: FillTarget) -> float:
        return self._moved()


@pytest.fixture
async def target(autojump_clock: Clock) -> FillTarget:
    def no_blob() -> BlobStore:
        raise AssertionError("nobody opens it")

    made = make_target(None, FakeOrigin("http://nobody.invalid"), "a", 4 * CHUNK)  # type: ignore[arg-type]
    made.open_blob = no_blob  # type: ignore[assignment]
    return made


async def waits(target: FillTarget, wanted: ByteRange, seconds: float = 10.0) -> float:
    begun = trio.current_time()
    with pytest.raises(ReadDeadline):
        await target.wait_readable(wanted, seconds)
    return trio.current_time() - begun


async def test_the_second_question_for_what_did_not_come_is_answered_at_once(
    target: FillTarget, autojump_clock: Clock
) -> None:
    assert await waits(target, FIRST) == 10
    assert await waits(target, FIRST) == 0, "the kernel asks again for a page whose readahead failed"
    assert await waits(target, SECOND) == 10, "others wait as long as anybody"
    await trio.sleep(REPEAT_SECONDS)
    assert await waits(target, FIRST) == 10, "and so does a read that comes later"


async def test_repeated_errors_do_not_prolong_themselves(target: FillTarget, autojump_clock: Clock) -> None:
    await waits(target, FIRST)
    begun = trio.current_time()
    while await waits(target, FIRST) == 0:
        await trio.sleep(0.1)
    assert trio.current_time() - begun <= REPEAT_SECONDS + 0.2 + 10


async def test_what_came_meanwhile_ends_the_repetition(target: FillTarget, autojump_clock: Clock) -> None:
    target.efforts[0] = Effort(0.0, 1)
    await waits(target, FIRST)
    await trio.sleep(0.5)
    target.efforts[0].received(1, trio.current_time())
    assert await waits(target, FIRST) == 10


async def test_waiting_before_the_wait_counts(target: FillTarget, autojump_clock: Clock) -> None:
    since = trio.current_time()
    await trio.sleep(6)
    with pytest.raises(ReadDeadline):
        await target.wait_readable(FIRST, 10, since)
    assert trio.current_time() - since == 10


async def test_a_body_that_drips_or_comes_again_and_again_is_no_progress(
    target: FillTarget, autojump_clock: Clock
) -> None:
    effort = target.efforts[0] = Effort(trio.current_time(), 1000)

    async def drip() -> None:
        while True:
            for count in range(0, 900, 100):  # cut off at 900 bytes, again and again
                await trio.sleep(0.5)
                effort.received(count, trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        assert await waits(target, FIRST) == 10
        nursery.cancel_scope.cancel()


async def test_a_slow_body_that_goes_on_is_waited_for(target: FillTarget, autojump_clock: Clock) -> None:
    effort = target.efforts[0] = Effort(trio.current_time(), 1000)

    async def send() -> None:
        for step in range(1, 6):
            await trio.sleep(9)
            effort.received(step * 1000, trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await waits(target, FIRST) == 55


async def test_other_chunks_of_the_file_excuse_nothing_for_one_that_was_asked_for(
    target: FillTarget, autojump_clock: Clock
) -> None:
    target.efforts[0] = Effort(trio.current_time(), 1000)
    target.owner = Owner(trio.current_time)
    begun = trio.current_time()

    async def others() -> None:
        while True:
            await trio.sleep(1)
            target.last_progress = trio.current_time()
            target.wake()
            if trio.current_time() - begun >= 40:
                target.present.add(1)
                target.wake()
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        nursery.start_soon(target.wait_readable, SECOND, 10)  # in the line of its pipeline, which moves on
        assert await waits(target, FIRST) == 10


async def test_a_retry_after_without_end_is_followed_for_ten_minutes(target: FillTarget, autojump_clock: Clock) -> None:
    async def throttled() -> None:
        while True:
            target.deadline_extended_to = trio.current_time() + MAX_RETRY_AFTER
            target.error = OriginThrottled("429")
            await trio.sleep(5)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(throttled)
        assert await waits(target, FIRST) == MAX_RETRY_AFTER + 10
        nursery.cancel_scope.cancel()


async def test_who_goes_takes_the_demand_along_unless_others_wait(target: FillTarget, autojump_clock: Clock) -> None:
    target.owner = owner = Owner()
    gone = owner.unwaited_chunks
    first, second = trio.CancelScope(), trio.CancelScope()

    async def read(scope: trio.CancelScope, wanted: ByteRange) -> None:
        with scope:
            await target.wait_readable(wanted, 100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, first, ByteRange(0, 2 * CHUNK))
        nursery.start_soon(read, second, SECOND)
        await trio.testing.wait_all_tasks_blocked()
        assert target.waiting == {0: 1, 1: 2}
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert gone == [0] and target.waiting == {1: 1}
        target.present.add(1)
        target.wake()
        await trio.testing.wait_all_tasks_blocked()
        assert gone == [0] and not target.waiting


async def test_a_breaker_that_opens_leaves_the_demand_as_its_probe(target: FillTarget, autojump_clock: Clock) -> None:
    target.owner = owner = Owner()
    gone = owner.unwaited_chunks
    target.broken = OriginBroken("down")
    with pytest.raises(OriginBroken):
        await target.wait_readable(FIRST, 10)
    assert not gone and not target.waiting
