"""Records of a tier that cannot be had cost their own file the tier, and no other one (filler/region_claims.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.patience import Patience
from instantstart_fs.core.region import GROUP_CHUNKS, PullPlan
from instantstart_fs.errors import AccessRefused, InstantStartError, OriginUnavailable
from instantstart_fs.filler import region_claims
from instantstart_fs.filler.region_claims import MOST_ASKED, MOST_FOLLOWED
from instantstart_fs.filler.region_follow import Follow
from instantstart_fs.filler.regional import Regional
from instantstart_fs.filler.target import FileKey
from instantstart_fs.regional.directory import DirectoryStore
from tests.component.region_site import CHUNK, RegionSite, Source, entry_of, region

pytestmark = pytest.mark.timeout(60)


class Odd(DirectoryStore):
    """It fails where a name of ``bad`` is asked for. All else works."""

    def __init__(self, directory: str, error: InstantStartError) -> None:
        super().__init__(directory)
        self.bad: set[str] = set()
        self.asked = 0
        self.on_get: Callable[[], None] | None = None
        self._error = error

    def get(self, name: str, most: int) -> bytes:
        if self.on_get is not None:
            then, self.on_get = self.on_get, None
            trio.from_thread.run_sync(then)
        self._fail(name)
        return super().get(name, most)

    def list(self, prefix: str, most: int) -> Any:
        self._fail(prefix)
        return super().list(prefix, most)

    def _fail(self, name: str) -> None:
        self.asked += 1
        if any(name.startswith(bad) for bad in self.bad):
            raise self._error


def follow(site: RegionSite, number: int, data: bytes, source: int = 0, *, sealed: bool = True) -> Follow:
    name = f"{number}.bin"
    entry = site.seal("p", data, name, source) if sealed else entry_of(data, name)
    target = SimpleNamespace(
        key=FileKey("p", 1, number), entry=entry, origin=Source(), present=ChunkMap(len(data), CHUNK)
    )
    fill: Any = SimpleNamespace(target=target, worker=None, unhashed=False)
    places = site.places("p", entry, CHUNK)
    missing, upstream = [False] * target.present.chunks, len(site.settings.stores) - 1
    return Follow(fill, places, PullPlan("here", places[0].pin, missing, Patience(), upstream=upstream))


@pytest.mark.parametrize("error", [AccessRefused("403"), OriginUnavailable("400")])
@pytest.mark.parametrize("what", ["seal", ""])
async def test_files_whose_records_alone_fail_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: InstantStartError, what: str
) -> None:
    """Who can write to the bucket can make single objects unreadable. ``what``: the seal, or all of the file."""
    for name in ("RETRY_SECONDS", "LIST_SECONDS", "TURNS_SECONDS"):
        monkeypatch.setattr(region_claims, name, 0.05)
    store = Odd(str(tmp_path), error)
    async with region(tmp_path, store) as site:
        site.slots["p"] = "a" * 32
        odd = [follow(site, number, bytes(9 * CHUNK)) for number in range(MOST_ASKED + MOST_FOLLOWED)]
        good = follow(site, 99, bytes(9 * CHUNK))
        store.bad = {f"v1/{one.slot}/{one.pin}/{what}" for one in odd}
        for one in (*odd, good):
            site.claims.start(one)
        with trio.fail_after(30):
            while good.state != "sealed" or any(one.state in ("waiting", "asking") for one in odd):
                await trio.sleep(0.005)
        if isinstance(error, AccessRefused) or not what:
            with trio.fail_after(30):
                while any(one.state != "off" for one in odd):
                    await trio.sleep(0.005)
        assert good.state == "sealed"


@pytest.mark.parametrize(
    ("others", "reader", "waits"), [(1, False, True), (0, False, False), (1, True, False)], ids=["", "alone", "reader"]
)
async def test_what_is_here_and_not_in_the_tier_is_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int, reader: bool, waits: bool
) -> None:
    """Others wait for it, and pull it again should this host die. A reader waits for no put, nor does a host alone."""
    monkeypatch.setattr(region_claims, "LIST_SECONDS", 0.02)
    monkeypatch.setattr(region_claims, "LONE_BUDGET", GROUP_CHUNKS)
    monkeypatch.setattr(PullPlan, "others", lambda *_: others)
    store = Odd(str(tmp_path), OriginUnavailable("it never is"))
    async with region(tmp_path, store) as site:
        site.slots["p"] = "a" * 32
        one = follow(site, 0, bytes(4 * GROUP_CHUNKS * CHUNK), sealed=False)
        site.claims.start(one)

        async def claimed(groups: int) -> None:
            with trio.fail_after(20):
                while len(one.pull.held()) < groups:
                    await trio.sleep(0.005)

        await claimed(1)
        group = one.pull.held()[0][0]
        site.putting = 100 * GROUP_CHUNKS if reader else GROUP_CHUNKS
        wanted = (group + 1) % one.pull.groups
        if reader:
            one.pull.demand([wanted * GROUP_CHUNKS], trio.current_time())
        one.to_put.add(group * GROUP_CHUNKS)  # so that the claim stays
        for chunk in range(group * GROUP_CHUNKS, (group + 1) * GROUP_CHUNKS):
            one.pull.came(chunk)
        one.changed.set()
        if waits:
            looks = store.asked
            with trio.fail_after(20):
                while store.asked < looks + 6:
                    await trio.sleep(0.005)
            assert len(one.pull.held()) == 1
            site.putting = GROUP_CHUNKS // 2
            one.changed.set()
        await claimed(2)
        assert len(one.pull.held()) == 2
        assert not reader or wanted in [held for held, *_ in one.pull.held()]


def test_what_comes_from_elsewhere_ends_the_tiers_request_for_it(tmp_path: Path) -> None:
    """A server that ignores ranges streams the file: the piece of the tier must not go on writing."""
    stopped: list[object] = []
    nothing: Any = SimpleNamespace(arrived=lambda *_: None, wakeup=trio.Event())
    delivery: Any = SimpleNamespace(stop_request=stopped.append)
    site = RegionSite(tmp_path, write_back=False)
    site.slots["p"] = "a" * 32
    regional = Regional(site.settings, lambda *_: "a" * 32, nothing, nothing, delivery, serve_verified=True)
    one = follow(site, 0, bytes(2 * CHUNK))
    regional._follows[one.key] = one
    piece: Any = SimpleNamespace(piece=object(), digest=b"", answered=None)
    stream: Any = SimpleNamespace(piece=None, answered=None)
    for chunk in range(2):
        one.flights[chunk] = (piece, 0.0, 0)
    regional.came(one.fill, 0, stream)
    assert stopped == [piece] and not one.digests and not one.proven, "nothing is proven of what the stream brought"
    regional.came(one.fill, 1, piece)
    assert stopped == [piece] and not one.flights


class Open:
    """What of the fill plan and of deliveries matters here: in which pool chunks are open, and which requests were
    stopped."""

    def __init__(self) -> None:
        self.at: dict[int, object] = {}
        self.stopped: list[int] = []
        self.wakeup = trio.Event()

    def open(self, key: object, chunk: int) -> None:
        self.at[chunk] = key

    def stop(self, fill: object, chunk: int) -> None:
        self.stopped.append(chunk)

    def add(self, *_: object) -> None: ...

    def shut(self, *_: object) -> None: ...

    failed = arrived = shut


async def test_an_upstream_tier_that_fails_is_left_alone_and_the_regions_own_is_not(tmp_path: Path) -> None:
    far = Odd(str(tmp_path / "far"), OriginUnavailable("503"))
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    seen: Any = Open()
    async with region(tmp_path / "near", upstream=(far,), write_back=False) as site:
        site.slots["p"] = "a" * 32
        regional = Regional(site.settings, lambda *_: "a" * 32, seen, seen, seen, serve_verified=False)
        near, away = follow(site, 0, bytes(9 * CHUNK)), follow(site, 1, bytes(9 * CHUNK), 1)
        regional._follows.update({near.key: near, away.key: away})
        regional._tiers.nursery = site.tiers.nursery
        own, other = regional._tiers.sources
        for one, source in ((near, 0), (away, 1)):
            assert await regional._claims._take_seal(one, source)
        away.pull.unclaimed(0)
        away.pull.unclaimed(1)
        regional._routes.apply(away)
        assert seen.at == dict.fromkeys(range(9), away.tier_key)
        request: Any = [SimpleNamespace(fill=away.fill, chunk=chunk, piece=object(), digest=b"") for chunk in range(9)]
        away.flights = {chunk: (request[chunk], 0.0, 1) for chunk in range(6)}
        regional._routes.tier_failed(0, OriginUnavailable("its own"))
        regional.came(away.fill, 5, request[5])  # of the upstream tier, which says nothing of the own one
        for chunk in range(2):
            regional.failed(request[chunk], OriginUnavailable("503"))
        assert other.is_broken() and not own.is_broken() and regional.answers
        assert seen.stopped == [2, 3, 4], "what is under way from there"
        assert seen.at == dict.fromkeys([0, 1, 2, 3, 4, 6, 7, 8], away.key) | {5: away.tier_key}
        assert near.state == "sealed" and near.pull.route(0) == 0
        assert dict(regional.statistics.left_alone) == {str(tmp_path / "near"): False, str(tmp_path / "far"): True}
        regional._routes.tier_failed(0, OriginUnavailable("its own"))
        assert own.is_broken(), "what came from the other tier is no answer of this one"


async def test_an_upstream_tier_whose_seals_cannot_be_had_is_not_asked_for_each_file(tmp_path: Path) -> None:
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    far = Odd(str(tmp_path / "far"), OriginUnavailable("it does not answer"))
    seen: Any = Open()
    async with region(tmp_path / "near", upstream=(far,), write_back=False) as site:
        site.slots["p"] = "a" * 32
        regional = Regional(site.settings, lambda *_: "a" * 32, seen, seen, seen, serve_verified=True)
        regional._tiers.nursery = site.tiers.nursery
        far.bad = {"v1/"}
        files = [follow(site, number, bytes(9 * CHUNK)) for number in range(5)]
        assert not await regional._claims._take_seal(files[0], 1) and regional._tiers.lag == 0, "it is not the own tier"
        for one in files:
            site.store.delete(f"v1/{one.slot}/{one.pin}/seal")
            await regional._claims._ask(one)
        assert far.asked == 2 and all(one.state in ("parked", "followed") for one in files) and regional.answers


@pytest.mark.parametrize("when", ["before", "asked", "sealed", "parked"])
async def test_while_the_own_tier_is_left_alone_upstream_tiers_give(tmp_path: Path, when: str) -> None:
    """``when``: how far the file is when the own tier's breaker opens."""
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    near = Odd(str(tmp_path / "near"), OriginUnavailable("503"))
    far = DirectoryStore(str(tmp_path / "far"))
    seen: Any = Open()
    async with region(tmp_path / "near", near, upstream=(far,), write_back=False) as site:
        site.slots["p"] = "a" * 32
        regional = Regional(site.settings, lambda *_: "a" * 32, seen, seen, seen, serve_verified=True)
        regional._tiers.nursery = site.tiers.nursery
        made = follow(site, 0, bytes(9 * CHUNK), 1)
        if when == "sealed":
            site.seal("p", bytes(9 * CHUNK), "0.bin")

        def end() -> None:
            near.bad = {"v1/"}
            for _ in range(2):
                regional._routes.tier_failed(0, OriginUnavailable("503"))
            assert regional._tiers.own.is_broken()

        if when == "before":
            end()
        regional.enter(made.fill)
        one = regional._follows[made.key]
        if when == "asked":
            near.on_get = end
        if when == "parked":
            regional._claims._following = {one} | {follow(site, number, b"x") for number in range(1, MOST_FOLLOWED)}
        regional._claims.start(one)
        if when == "sealed":
            await until(lambda: one.state == "sealed")
            regional._routes.apply(one)
            request: Any = SimpleNamespace(fill=one.fill, chunk=0, piece=object(), digest=b"")
            one.flights[0] = (request, 0.0, 0)
        if when == "parked":
            await until(lambda: one.state == "parked")
        if when in ("sealed", "parked"):
            end()
        await until(lambda: one.state == "upstream")
        assert seen.at == dict.fromkeys(range(9), one.tier_key), "no chunk is opened at the origin"
        assert [one.pull.route(chunk) for chunk in range(9)] == [1] * 9 and not one.flights
        regional._routes.tier_failed(1, OriginUnavailable("503"))
        regional._routes.tier_failed(1, OriginUnavailable("503"))
        assert seen.at == dict.fromkeys(range(9), one.key), "it fails, too"
        told = {tier.endpoint: tier.broken for tier in regional.statistics.upstream}
        assert told == {far.endpoint: "503"}


async def test_without_an_upstream_tier_that_answers_nothing_is_asked(tmp_path: Path) -> None:
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    near = Odd(str(tmp_path / "near"), OriginUnavailable("503"))
    far = Odd(str(tmp_path / "far"), OriginUnavailable("403"))
    seen: Any = Open()
    async with region(tmp_path / "near", near, upstream=(far,), write_back=False) as site:
        site.slots["p"] = "a" * 32
        regional = Regional(site.settings, lambda *_: "a" * 32, seen, seen, seen, serve_verified=True)
        regional._tiers.nursery = site.tiers.nursery
        made = follow(site, 0, bytes(9 * CHUNK), 1)
        for source in (0, 0, 1, 1):
            regional._routes.tier_failed(source, OriginUnavailable("503"))
        regional.enter(made.fill)
        assert not regional._follows and not near.asked and not far.asked


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not holds():
            await trio.sleep(0.005)
