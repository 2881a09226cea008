"""Whether a pipeline's own credentials may read its source (filler/region_access.py), on a clock of its own."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from huggingface_hub import set_client_factory

from instantstart_fs.errors import AccessRefused, OriginThrottled
from instantstart_fs.filler.region_access import PROVED_SECONDS, RECHECK_REFUSAL, SourceAccess
from instantstart_fs.origins.hubclient import new_client
from tests.component.open_origins import open_origin
from tests.component.region_site import Source

pytestmark = pytest.mark.timeout(60)
REFUSED, THROTTLED = AccessRefused("not yours"), OriginThrottled("too many")


def target(source: Source) -> Any:
    return SimpleNamespace(key=SimpleNamespace(pipeline="p"), entry=SimpleNamespace(model=0), origin=source)


class Later:
    """The time of ``SourceAccess`` alone: what waits in threads goes by the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        real = trio.current_time
        clock = SimpleNamespace(**{name: getattr(trio, name) for name in ("Event", "TooSlowError")})
        clock.current_time = lambda: real() + self.ahead
        monkeypatch.setattr("instantstart_fs.filler.region_access.trio", clock)


async def settled(source: Source, asked: int) -> None:
    with trio.fail_after(30):
        while source.asked < asked:
            await trio.sleep(0.005)
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_an_origin_that_does_not_answer_is_asked_again_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later, gate = Later(monkeypatch), threading.Event()
    gate.set()
    source = Source(THROTTLED, REFUSED, before=lambda: gate.wait(30))
    async with trio.open_nursery() as nursery:
        access = SourceAccess(None, lambda: nursery)
        assert await access.may_use("p", 0, source) and await access.may_use("p", 0, source)
        assert source.asked == 1
        later.ahead += RECHECK_REFUSAL
        gate.clear()
        for _ in range(3):
            assert await access.may_use("p", 0, source), "the answer is on its way"
        gate.set()
        with trio.fail_after(30):
            while access.refusal("p") is None:
                await trio.sleep(0.005)
        assert source.asked == 2
        assert not await access.may_use("p", 0, source) and access.refuses(target(source))


@pytest.mark.parametrize(
    ("scheme", "variable", "value"),
    [
        ("hf", "https_proxy", "socks5://127.0.0.1:1"),
        ("hf", "all_proxy", "//127.0.0.1:1"),
        ("hf", "HF_ENDPOINT", "hub.example"),
        ("s3", "https_proxy", "socks5://127.0.0.1:1"),
        ("s3", "AWS_ENDPOINT_URL", "s3.example"),
    ],
)
async def test_a_proxy_or_an_endpoint_that_can_be_none_refuses_nobody(
    scheme: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin cannot be asked. The region is all that is left, then."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("no_proxy", "")
    set_client_factory(new_client)  # a new one: proxies are read once
    origin = open_origin(scheme, "https://hub.example" if scheme == "hf" and variable != "HF_ENDPOINT" else None)
    try:
        async with trio.open_nursery() as nursery:
            access = SourceAccess(None, lambda: nursery)
            assert await access.may_use("p", 0, origin) and access.refusal("p") is None
    finally:
        set_client_factory(new_client)


async def test_a_refusal_stands_until_the_origin_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    later, source = Later(monkeypatch), Source(REFUSED, THROTTLED, None)
    async with trio.open_nursery() as nursery:
        access = SourceAccess(None, lambda: nursery)
        assert not await access.may_use("p", 0, source)
        later.ahead += RECHECK_REFUSAL
        assert not await access.may_use("p", 0, source), "it only did not answer"
        later.ahead += RECHECK_REFUSAL
        assert await access.may_use("p", 0, source) and access.refusal("p") is None
        later.ahead += 1e6
        assert await access.may_use("p", 0, source) and source.asked == 3, "a permission lasts"


@pytest.mark.parametrize("recheck", [None, 10.0])
async def test_who_was_listed_a_moment_ago_is_not_asked(monkeypatch: pytest.MonkeyPatch, recheck: float | None) -> None:
    """A listing proves what a question would, for as long as an answer may last at most, and a minute."""
    later, source, another = Later(monkeypatch), Source(REFUSED), Source(REFUSED)
    async with trio.open_nursery() as nursery:
        access = SourceAccess(recheck, lambda: nursery)
        access.proved("p", 0, source, trio.current_time())
        assert await access.may_use("p", 0, source) and source.asked == 0
        assert not await access.may_use("p", 0, another), "of other credentials it says nothing"
        later.ahead += 10.0 if recheck else PROVED_SECONDS
        assert not await access.may_use("p", 0, source) and source.asked == 1


async def test_an_answer_is_worth_nothing_to_a_later_pipeline_of_that_name() -> None:
    gate, results = threading.Event(), []
    earlier, later = Source(None, before=lambda: gate.wait(30)), Source(REFUSED)

    async def ask(source: Source) -> None:
        results.append((source, await access.may_use("p", 0, source)))

    async with trio.open_nursery() as nursery:
        access = SourceAccess(None, lambda: nursery)
        nursery.start_soon(ask, earlier)
        await settled(earlier, 1)
        access.forget("p")
        assert not await access.may_use("p", 0, later), "it waits for no question of the other's"
        gate.set()
        await settled(earlier, 1)
    assert results == [(earlier, True)]
    assert access.refusal("p") is not None and access.refuses(target(later)) and not access.refuses(target(earlier))
    assert not await access.may_use("p", 0, later) and later.asked == 1


async def test_who_asks_at_once_asks_once_and_generations_do_not_grow_it() -> None:
    source = Source()
    async with trio.open_nursery() as nursery:
        access = SourceAccess(None, lambda: nursery)
        async with trio.open_nursery() as readers:
            for _ in range(10):
                readers.start_soon(access.may_use, "p", 0, source)
        assert source.asked == 1
        for _ in range(10):
            assert await access.may_use("p", 0, Source())
        assert sum(map(len, access._answers.values())) == 2


async def test_an_origin_that_hangs_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory on a share that is gone never answers. Each question would take a thread for good, of those that all
    of the daemon shares."""
    monkeypatch.setattr("instantstart_fs.filler.region_access.CHECK_SECONDS", 0.02)
    later, gate = Later(monkeypatch), threading.Event()
    source, shared = Source(before=lambda: gate.wait(30)), trio.to_thread.current_default_thread_limiter()
    try:
        async with trio.open_nursery() as nursery:
            access = SourceAccess(None, lambda: nursery)
            for _ in range(5):
                assert await access.may_use("p", 0, source), "who does not answer refuses nobody"
                later.ahead += RECHECK_REFUSAL
                await trio.testing.wait_all_tasks_blocked(0.05)
            assert source.asked == 1 and not shared.borrowed_tokens
            gate.set()
            with trio.fail_after(30):
                while source.asked < 2:
                    later.ahead += RECHECK_REFUSAL
                    await access.may_use("p", 0, source)
                    await trio.sleep(0.005)
    finally:
        gate.set()


async def test_a_reader_that_is_killed_while_the_origin_is_asked_makes_no_permission() -> None:
    gate = threading.Event()
    source = Source(REFUSED, before=lambda: gate.wait(30))
    async with trio.open_nursery() as nursery:
        access = SourceAccess(None, lambda: nursery)
        with trio.move_on_after(0.05):
            await access.may_use("p", 0, source)
        found: list[bool] = []

        async def reader(pipeline: str) -> None:
            found.append(await access.may_use(pipeline, 0, source))

        async with trio.open_nursery() as readers:
            readers.start_soon(reader, "p")
            readers.start_soon(reader, "another, of the same origin")
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.set()
        assert found == [False, False] and source.asked == 1
        nursery.cancel_scope.cancel()


async def test_nothing_may_be_used_while_the_regions_tasks_do_not_run() -> None:
    source = Source()
    assert not await SourceAccess(None, lambda: None).may_use("p", 0, source) and source.asked == 0
