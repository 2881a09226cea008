"""Heartbeats in a shared directory: who is read, who has gone, what is no heartbeat, what a reader costs."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from instantstart_fs.cli import show
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core import placement
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.placement import Holding
from instantstart_fs.core.status import PipelineStatus, UpstreamStatus
from instantstart_fs.errors import AccessRefused, OriginUnavailable
from instantstart_fs.filler.events import RegionStatistics, UpstreamHealth
from instantstart_fs.filler.region_follow import RegionSettings
from instantstart_fs.regional import heartbeats
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.heartbeats import HeartbeatReader, HostRecord, object_of
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.store import Stored
from instantstart_fs.upkeep.heartbeats import ASK_SECONDS, KEEP_SECONDS, MOST_NAMESAKES, Heartbeats
from tests.component.site import pipeline

KEY = RegionKey(b"k" * 32)
SLOT, OTHER = "ab" * 16, "cd" * 16


class Counting(DirectoryStore):
    """Counts requests by kind."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, name: str, most: int) -> bytes:
        with self._lock:
            self.asked["get"] += 1
        return super().get(name, most)

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        self.asked["list"] += 1
        return super().list(prefix, most)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(str(tmp_path))


def holding(state: str = "warm", cached: int = 10, slot: str = SLOT) -> Holding:
    return Holding(slot, "01020304", state, cached, 10)  # type: ignore[arg-type]


def beat(store: Counting, host: str, *held: Holding, at: float = 1000.0, key: RegionKey = KEY) -> str:
    name, data = object_of(key, HostRecord(host, placement.pack(held)))
    store.put(name, data)
    os.utime(Path(store.endpoint) / name, (at, at))
    return name


def hosts(reader: HeartbeatReader, now: float = 1010.0) -> list[tuple[str, str, int]]:
    return [(one.host, one.state, one.percent) for one in reader.holding(SLOT, now)]


def test_who_holds_what(store: Counting) -> None:
    beat(store, "half", holding("partial", 5))
    beat(store, "whole", holding(), holding(slot=OTHER))
    beat(store, "none", holding(slot=OTHER))
    reader = HeartbeatReader(store, KEY)
    assert (reader.look(1010.0).hosts, reader.look(1010.0).unread) == (3, 0)
    assert hosts(reader) == [("whole", "warm", 100), ("half", "partial", 50)]
    first = reader.holding(SLOT, 1010.0, "01020304")[0]
    assert (first.current, first.age, first.last_seen) == (True, 10.0, "1970-01-01T00:16:40Z")
    assert reader.holding(SLOT, 1010.0, "ffffffff")[0].current is False
    assert not reader.filling()
    beat(store, "half", holding("filling", 6), at=1001.0)
    reader.look(1010.0)
    assert reader.filling() == {SLOT}


def test_who_is_silent_is_gone(store: Counting) -> None:
    beat(store, "dead", holding(), at=1000.0)
    beat(store, "alive", holding(), at=2000.0)
    reader = HeartbeatReader(store, KEY)
    assert reader.look(999.0 + placement.expiry(2)).hosts == 2
    assert reader.look(1001.0 + placement.expiry(2)).hosts == 1
    assert hosts(reader, 2010.0) == [("alive", "warm", 100)]


def test_a_host_that_only_lives_is_read_once(store: Counting) -> None:
    names = [beat(store, f"host{number}", holding()) for number in range(20)]
    reader = HeartbeatReader(store, KEY)
    for now in (1010.0, 1040.0, 1070.0):
        for name in names:
            os.utime(Path(store.endpoint) / name, (now, now))
        assert reader.look(now).hosts == 20
    assert store.asked == {"list": 3, "get": 20}
    beat(store, "host3", holding("partial", 5), at=1071.0)  # and died before it removed what it had said
    reader.look(1080.0)
    assert store.asked["get"] == 21
    assert ("host3", "partial", 50) in hosts(reader, 1080.0)
    assert len(hosts(reader, 1080.0)) == 20


def test_what_is_no_heartbeat_is_not_believed_and_read_once(store: Counting) -> None:
    beat(store, "stranger", holding(), key=RegionKey(b"x" * 32))
    one, other = beat(store, "one", holding()), beat(store, "other", holding("partial", 5))
    root = Path(store.endpoint)
    (root / one).write_bytes((root / other).read_bytes())  # another's heartbeat under this name
    forged = f"{heartbeats.DIRECTORY}{'0' * 32}.{'0' * 16}"
    store.put(forged, b"x" * 5_000_000)
    for name in (one, forged):
        os.utime(root / name, (1000.0, 1000.0))
    store.put(heartbeats.DIRECTORY + "no name of ours", b"")
    reader = HeartbeatReader(store, KEY)
    assert reader.look(1010.0).unread == 3
    assert hosts(reader) == [("other", "partial", 50)]
    asked = store.asked["get"]
    reader.look(1011.0)
    assert store.asked["get"] == asked


def test_what_was_put_over_a_host_hides_it_not(store: Counting) -> None:
    """Somebody who may write to the bucket, and has no key: bytes of nobody under a host's name, newer than its own,
    and one from the future, as a share lets anybody set."""
    said = beat(store, "one", holding("filling", 5))
    beat(store, "two", holding())
    forged = [f"{said.partition('.')[0]}.{number:016x}" for number in range(2)]
    for name, at in zip(forged, (1005.0, 99_999.0), strict=True):
        store.put(name, b"x" * 100)
        os.utime(Path(store.endpoint) / name, (at, at))
    reader = HeartbeatReader(store, KEY)
    look = reader.look(1010.0)
    assert (look.hosts, look.unread) == (2, 0)
    assert hosts(reader) == [("two", "warm", 100), ("one", "filling", 50)] and reader.filling() == {SLOT}
    asked = store.asked["get"]
    assert asked == 3 and reader.look(1011.0).hosts == 2 and store.asked["get"] == asked, "each is read once"
    for number in range(9):  # more of them than are tried
        name = f"{said.partition('.')[0]}.{number + 16:016x}"
        store.put(name, b"x")
        os.utime(Path(store.endpoint) / name, (1006.0, 1006.0))
    assert reader.look(1010.0).unread == 1 and store.asked["get"] <= asked + heartbeats.TRIED
    assert hosts(reader) == [("two", "warm", 100)]


def test_memory_is_bounded(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "MOST_HELD", 3 * placement.ENTRY_BYTES)
    for number in range(5):
        beat(store, f"host{number}", holding())
    reader = HeartbeatReader(store, KEY)
    assert (reader.look(1010.0).hosts, reader.look(1010.0).unread) == (5, 2)
    assert len(hosts(reader)) == 3


def test_a_tier_that_fails_is_said_to(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(store, "one", holding())

    def fail(*_: object) -> bytes:
        raise OriginUnavailable("gone")

    monkeypatch.setattr(store, "get", fail)
    with pytest.raises(OriginUnavailable):
        HeartbeatReader(store, KEY).look(1010.0)


# -- the daemon's side ------------------------------------------------------------------------------------------------


class Broken(Counting):
    """``writes``, ``reads``: whether it takes them."""

    writes = reads = True

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        if not self.writes:
            raise AccessRefused("read-only")
        super().put(name, data)

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        if not self.reads:
            raise OriginUnavailable("no answer")
        return super().list(prefix, most)


class Site:
    """A host's Heartbeats over a made-up library."""

    def __init__(self, store: Broken, host: str = "here") -> None:
        self.store = store
        self.broken = ""
        self.upstream: tuple[UpstreamHealth, ...] = ()
        self.statuses = {"p": pipeline("p", "warm", cached_bytes=10, total_bytes=10)}
        self.spec = PipelineSpec("p", (ModelSpec("hf://org/model"),))
        self.settings = RegionSettings(host, KEY, (store,), (KEY,))
        self.hosts, self.answers, self.warmed = 1, True, 0
        self.pipelines = {"p": SimpleNamespace(id="p", spec=self.spec, removed=False)}
        known = SimpleNamespace(spec=lambda _: self.spec, status=self.status, status_of=self.status_of)
        self.heartbeats = Heartbeats(cast(Any, self), cast(Any, self), cast(Any, known), lambda: self.warmed)

    @property
    def statistics(self) -> RegionStatistics:
        return RegionStatistics(broken=self.broken, broken_since_ns=1, upstream=self.upstream)

    def answered(self) -> None:
        self.broken = ""

    def refusal(self, pipeline: str) -> tuple[int, str] | None:
        return (2_000_000_000, "403") if pipeline == "refused" else None

    def status_of(self, pipeline: Any) -> PipelineStatus:
        return self.statuses[pipeline.id]

    def status(self, pipeline: str, **_: object) -> PipelineStatus:
        return self.statuses[pipeline]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(Broken(str(tmp_path)))


async def test_a_host_says_what_it_has_and_answers_from_what_it_has_read(site: Site) -> None:
    other = Site(site.store, "there")
    other.statuses["p"] = pipeline("p", "partial", cached_bytes=3, total_bytes=10)
    await other.heartbeats.beat()
    await site.heartbeats.beat()
    assert site.hosts == 2
    site.store.asked.clear()
    for _ in range(50):  # a scraper that hammers
        found = await site.heartbeats.placement("p")
    assert [(one.host, one.percent, one.current) for one in found.hosts] == [("here", 100, True), ("there", 30, True)]
    assert (found.live_hosts, found.unread) == (2, 0)
    assert site.store.asked == {"list": 1, "get": 2}


async def test_a_host_keeps_one_object_and_none_of_what_it_lost(site: Site) -> None:
    await site.heartbeats.beat()
    site.statuses["p"] = pipeline("p", "partial", cached_bytes=3, total_bytes=10)
    await site.heartbeats.beat()
    assert len(list(site.store.list(heartbeats.DIRECTORY, 10))) == 1
    site.statuses["p"] = pipeline("p", "cold", cached_bytes=0, total_bytes=10)
    await site.heartbeats.beat()
    assert (await site.heartbeats.placement("p")).hosts == ()


async def test_status_says_how_the_tier_fares(site: Site) -> None:
    assert site.heartbeats.tier.state == "unknown"
    await site.heartbeats.beat()
    ok = site.heartbeats.tier
    assert (ok.state, ok.why) == ("ok", "")
    site.store.writes = False
    with pytest.raises(AccessRefused):
        await site.heartbeats.beat()
    assert (site.heartbeats.tier.state, site.heartbeats.tier.why) == ("read-only", "read-only")
    site.store.reads = False
    with pytest.raises(AccessRefused):
        await site.heartbeats.beat()
    assert (site.heartbeats.tier.state, site.heartbeats.tier.why) == ("down", "no answer")
    site.store.writes = site.store.reads = True
    site.broken = "as a fill found it"
    assert (site.heartbeats.tier.state, site.heartbeats.tier.since) == ("down", "1970-01-01T00:00:00Z")
    await site.heartbeats.beat()  # it answers again: nobody has to fill for that to be known
    assert site.heartbeats.tier.state == "ok"
    refused = site.heartbeats.tier_of(cast(Any, SimpleNamespace(id="refused")))
    assert (refused.state, refused.since, refused.why) == ("refused", "1970-01-01T00:00:02Z", "403")


async def test_two_hosts_of_one_name_say_so(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Two hosts of one image, with one name: each names the other, and is named by it."""
    twin = Site(site.store)
    for one in (site, twin):
        await one.heartbeats.beat()
    assert not site.heartbeats.tier.warning and not twin.heartbeats.tier.warning, "it may be of the life before"
    assert len(list(site.store.list(heartbeats.DIRECTORY, 10))) == 2, "they hold the same, and say it as two"
    for one in (site, twin, site, twin):
        await later(one)
    for one in (site, twin):
        assert one.heartbeats.tier.state == "ok" and "calls itself 'here', too" in one.heartbeats.tier.warning
        assert one.heartbeats.tier_of(cast(Any, SimpleNamespace(id="refused"))).warning
    assert len([record for record in caplog.records if "calls itself" in record.message]) == 2
    site.store.delete(twin.heartbeats._name)  # it has another name now
    await later(site)
    assert not site.heartbeats.tier.warning


class Timed(Broken):
    """Its clock is trio's."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.written: dict[str, float] = {}

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        super().put(name, data)
        self.written[name] = trio.current_time()

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        for stored in super().list(prefix, most):
            yield stored._replace(modified=float(math.floor(self.written[stored.name])))


@pytest.mark.parametrize("apart", [0.0, 3.0, 31.0, 500.0])
async def test_two_hosts_of_one_name_know_it_within_two_minutes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    async def at_once(call: Any, *_: object) -> Any:
        return call()

    monkeypatch.setattr("instantstart_fs.upkeep.heartbeats.ask_tier", at_once)
    store = Timed(str(tmp_path))
    for _ in range(20):
        store.written.clear()
        for path in tmp_path.rglob("*.*"):
            path.unlink()
        one, twin = Site(store), Site(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.heartbeats.run)
            await trio.sleep(apart)
            nursery.start_soon(twin.heartbeats.run)
            for _ in range(120):
                await trio.sleep(1)
                if one.heartbeats.tier.warning and twin.heartbeats.tier.warning:
                    break
            nursery.cancel_scope.cancel()
        assert one.heartbeats.tier.warning and twin.heartbeats.tier.warning


async def later(one: Site) -> None:
    """Its next heartbeats: what it has found out, it says with the second one."""
    for _ in range(2):
        one.heartbeats._counted_at = -math.inf
        await one.heartbeats.beat()


async def test_what_a_host_said_in_its_past_is_no_other_host_when_somebody_puts_it_again(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may write to the bucket and has no key can do that. What he cannot is to answer."""
    kept: list[tuple[str, bytes]] = []
    lives: tuple[str, ...] = ()
    for _ in range(6):  # lives of its daemon, which met one another
        past = Site(site.store)
        past.heartbeats._met, lives = lives, (*lives, past.settings.life)
        await past.heartbeats.beat()
        kept.append((past.heartbeats._name, site.store.get(past.heartbeats._name, 10_000)))
        site.store.delete(past.heartbeats._name)
    await site.heartbeats.beat()
    for _ in range(5):
        for name, data in kept:
            site.store.put(name, data)
        await later(site)
        assert not site.heartbeats.tier.warning
    assert not [record for record in caplog.records if "calls itself" in record.message]
    twin = Site(site.store)  # and one that is there is found beside all that
    await twin.heartbeats.beat()
    for one in (site, twin, site, twin):
        await later(one)
    assert site.heartbeats.tier.warning and twin.heartbeats.tier.warning


async def test_what_nobody_with_the_key_wrote_is_read_within_bounds_and_hides_no_other_host(site: Site) -> None:
    await site.heartbeats.beat()
    own = site.heartbeats._name.partition(".")[0]
    for number in range(50):
        site.store.put(f"{own}.{number:016x}", b"x" * 200)
    twin = Site(site.store)
    await twin.heartbeats.beat()
    for number in range(50):
        site.store.put(f"{own}.{number:016x}", b"x" * 200)
    for turn in range(20):
        before = site.store.asked["get"]
        await later(site)
        assert site.store.asked["get"] - before <= 2 * MOST_NAMESAKES
        await later(twin)
        if turn >= 15:
            assert site.heartbeats.tier.warning and twin.heartbeats.tier.warning


async def test_an_upstream_tier_that_is_left_alone_is_told_of(site: Site) -> None:
    site.upstream = (UpstreamHealth("far", True, "403", 1), UpstreamHealth("new", False, "", 0))
    found = site.heartbeats.tier.upstream
    assert found == (UpstreamStatus("far", "down", "1970-01-01T00:00:00Z", "403"), UpstreamStatus("new", "unknown"))
    info = DaemonInfo("1", 1, "/models", "/store", 1.0, 0, True, tier=site.heartbeats.tier)
    assert "upstream tier: far: down since" in show.mounted(info) and "new" not in show.mounted(info)


async def test_no_answer_about_placement_is_an_error_and_not_an_empty_region(site: Site) -> None:
    site.store.reads = False
    with pytest.raises(OriginUnavailable):
        await site.heartbeats.placement("p")


class Hung(Broken):
    """``held``: listings wait until it is set."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.held = threading.Event()
        self.held.set()

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        found = super().list(prefix, most)
        self.held.wait(60)
        return found


async def test_of_many_who_ask_a_tier_that_hangs_one_waits_and_beats_go_on(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    store = Hung(str(tmp_path))
    site = Site(store)
    await site.heartbeats.beat()
    store.held.clear()
    refused: list[str] = []

    async def ask() -> None:
        try:
            await site.heartbeats.placement("p")
        except OriginUnavailable as error:
            refused.append(error.message)

    try:
        mock_clock.autojump_threshold = 0.0
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(refused) == 20 and trio.current_time() - began <= ASK_SECONDS
        for _ in range(6):  # those who ask later are refused, and take no thread
            await trio.sleep(KEEP_SECONDS)
            await ask()
        assert len(refused) == 26
        mock_clock.autojump_threshold = math.inf
        for _ in range(1000):
            if site.heartbeats._threads.borrowed_tokens == 1:
                break
            await trio.to_thread.run_sync(time.sleep, 0.01)
        assert site.heartbeats._threads.borrowed_tokens == 1
        site.heartbeats._threads.total_tokens = 1  # as if more questions hung
        site.statuses["p"] = pipeline("p", "partial", cached_bytes=3, total_bytes=10)
        site.heartbeats._counted_at = trio.current_time()  # the others are counted later: that is a listing
        name = site.heartbeats._name
        await site.heartbeats.beat()
        assert site.heartbeats._name != name
    finally:
        store.held.set()
