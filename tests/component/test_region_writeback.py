"""What this host puts into the tier: its file's own bytes, nothing of a file that proved wrong, and never for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.claims import ClaimState
from instantstart_fs.core.manifest import FileEntry, ManifestFile
from instantstart_fs.core.patience import Patience
from instantstart_fs.core.region import GROUP_CHUNKS, PullPlan
from instantstart_fs.errors import InstantStartError, OriginUnavailable, OriginUnsupported
from instantstart_fs.filler import region_writeback
from instantstart_fs.filler.region_claims import CLAIM_TRIES
from instantstart_fs.filler.region_follow import Follow, Place, RegionSettings, WriteRate
from instantstart_fs.filler.region_records import MARK_AGAIN_SECONDS, MARK_SECONDS
from instantstart_fs.filler.region_writeback import PUTS
from instantstart_fs.filler.regional import Regional
from instantstart_fs.filler.target import FileKey, FillTarget
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.records import HEADER, chunk_name
from tests.component.region_site import Source

KEY = RegionKey(b"k" * 32)
SLOT, PIN = "a" * 32, "b" * 32
CHUNK = 8
OWN, OTHER = b"ownbytes" * 2, b"another's bytes!"
PATIENCE = 60.0
"""Seconds for what has to happen at all: a machine may be busy."""


class Store(DirectoryStore):
    """``held``: puts wait until it is set. ``putting``: one has begun."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.held = threading.Event()
        self.held.set()
        self.putting = threading.Event()
        self.fails: Exception | None = None

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        self.putting.set()
        self.held.wait(PATIENCE)
        if self.fails is not None:
            raise self.fails
        super().put(name, data)


class Host:
    """A real Regional, and files in it, without what fetches."""

    def __init__(self, directory: Path, **more: Any) -> None:
        (directory / "tier").mkdir(parents=True)
        self.directory = directory
        self.store = Store(str(directory / "tier"))
        self.settings = RegionSettings("here", KEY, (self.store,), (KEY,), **more)
        nothing = cast(Any, SimpleNamespace(wakeup=trio.Event(), remove=lambda *_: None, refill=lambda *_: None))
        self.regional = Regional(self.settings, lambda *_: SLOT, nothing, nothing, nothing, serve_verified=True)
        self.writeback = self.regional._writeback
        self.descriptors: list[int] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.regional.run)
            try:
                yield
            finally:
                self.store.held.set()
                nursery.cancel_scope.cancel()
        for fd in self.descriptors:
            os.close(fd)

    def file(self, content: bytes = OWN, index: int = 0) -> Follow:
        path = self.directory / f"file{index}"
        path.write_bytes(content)
        self.descriptors.append(os.open(path, os.O_RDONLY))
        present = ChunkMap(len(content), CHUNK)
        for chunk in range(present.chunks):
            present.add(chunk)
        entry = FileEntry(index, 0, "f", ManifestFile("f", len(content), "f"))
        target = FillTarget(FileKey("p", 1, index), entry, 0, present, cast(Any, None), cast(Any, None))
        target.blob = cast(Any, SimpleNamespace(fd=self.descriptors[-1]))
        pull = PullPlan("here", PIN, [True] * present.chunks, Patience())
        follow = Follow(cast(Any, SimpleNamespace(target=target)), [Place(SLOT, PIN)], pull)
        follow.state = "followed"
        self.regional._follows[target.key] = follow
        return follow

    def poison(self, follow: Follow) -> None:
        """As filler/completion.py does it."""
        self.regional.leave(follow.key)
        follow.target.fail(OriginUnavailable("wrong"))
        self.regional.poisoned(follow.target)

    def there(self) -> dict[int, bytes]:
        """The chunks in the tier, as far as their digest is right."""
        found: dict[int, bytes] = {}
        for chunk in range(9):
            try:
                data = self.store.get(chunk_name(SLOT, PIN, chunk), 1000)
            except InstantStartError:
                continue
            body = data[HEADER:]
            assert data[:HEADER] == keyed_digest(KEY.chunk_key(PIN, chunk, len(body)), body)
            found[chunk] = body
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not holds():
            await trio.sleep(0.005)


async def test_a_file_that_is_let_go_of_meanwhile_puts_no_bytes_of_another(tmp_path: Path) -> None:
    """Its descriptor's number is another file's by the time the rate lets the put begin."""
    host = Host(tmp_path, rate=WriteRate(CHUNK * 4))
    async with host.running():
        follow = host.file(OWN[:CHUNK])
        host.writeback.add(follow, 0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        number = follow.fd
        host.poison(follow)
        host.writeback.check_done(follow)
        assert follow.closed
        (tmp_path / "other").write_bytes(OTHER)
        taken: list[int] = []
        while number not in taken:
            taken.append(os.open(tmp_path / "other", os.O_RDONLY))
        host.descriptors += taken
        again = host.file(OWN, 1)
        host.writeback.add(again, 1)
        await until(lambda: 1 in again.put and not again.to_put)
        assert host.there() == {1: OWN[CHUNK:]}


async def test_what_waits_for_its_put_is_told_unless_that_takes_long(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims wait for what is in the tier soon. They wait neither for a tier that is slower than the origin nor for
    ``rate``, nor are the many files of a single group counted."""
    content = bytes(range(PUTS + GROUP_CHUNKS + 1)) * CHUNK
    async with host.running():
        host.store.held.clear()
        follow, small = host.file(content), host.file(OWN, 1)
        for chunk in range(follow.pull.chunks):
            host.writeback.add(follow, chunk)
        host.writeback.add(small, 0)
        await until(lambda: host.writeback.pending == follow.pull.chunks + 1 - PUTS)
        assert host.writeback.putting("p") == follow.pull.chunks and not host.writeback.putting("q")
        with monkeypatch.context() as patch:
            patch.setattr(region_writeback, "BEHIND_SECONDS", 0.0)
            await trio.sleep(0.001)
            assert not host.writeback.putting("p")
        assert host.writeback.putting("p")
        host.poison(follow)
        host.store.held.set()
        await until(lambda: not host.writeback.pending and not host.writeback.putting("p"))
    slow = Host(tmp_path / "slow", rate=WriteRate(1))
    async with slow.running():
        slow.writeback.add(slow.file(content), 0)
        assert not slow.writeback.putting("p")


async def test_while_a_put_runs_its_file_may_be_closed(host: Host, tmp_path: Path) -> None:
    """The thread reads by a descriptor of its own."""
    async with host.running():
        held = threading.Event()
        preadv = os.preadv

        def late(fd: int, buffers: Any, offset: int) -> int:
            held.wait(PATIENCE)
            return preadv(fd, buffers, offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", late)
            follow = host.file(OWN[:CHUNK])
            host.writeback.add(follow, 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            (tmp_path / "other").write_bytes(OTHER)
            other = os.open(tmp_path / "other", os.O_RDONLY)
            host.descriptors.append(other)
            os.dup2(other, follow.fd)
            held.set()
            await until(lambda: not follow.to_put)
        assert host.there() == {0: OWN[:CHUNK]}


@pytest.mark.parametrize("late", [False, True])
async def test_a_put_under_way_when_its_file_proves_wrong_leaves_nothing(host: Host, late: bool) -> None:
    """``late``: nobody waits for the thread any more when it ends."""
    async with host.running():
        first = host.file()
        host.writeback.add(first, 0)
        await until(lambda: host.there())
        host.store.held.clear()
        host.store.putting.clear()
        host.writeback.add(first, 1)
        await until(host.store.putting.is_set)
        host.poison(first)
        await until(lambda: not host.there())
        if not late:
            host.store.held.set()
            await until(lambda: host.writeback._threads.borrowed_tokens == 0)
            assert host.there() == {}
    await until(lambda: host.writeback._threads.borrowed_tokens == 0)
    assert host.there() == {}


async def test_a_file_that_failed_and_was_tried_again_while_it_was_put_is_let_go_of_twice(host: Host) -> None:
    async with host.running():
        first = host.file()
        host.store.held.clear()
        host.writeback.add(first, 0)
        await until(host.store.putting.is_set)
        host.regional.leave(first.key)
        pull = PullPlan("here", PIN, [True] * first.pull.chunks, Patience())
        second = Follow(cast(Any, SimpleNamespace(target=first.target)), [Place(SLOT, PIN)], pull)
        second.state = "followed"
        host.regional._follows[first.key] = second
        for chunk in (0, 1):
            host.writeback.add(second, chunk)
        host.regional.leave(first.key)
        assert {first, second} <= host.writeback.detached
        host.regional.sealed(first.target, "size")
        host.store.held.set()
        await until(lambda: first.closed and second.closed)
    assert len(host.there()) == 2


async def test_what_came_from_the_tier_without_a_seal_goes_when_the_file_proves_wrong(host: Host) -> None:
    """It may be what was wrong: left there, each host of the region takes it once."""
    async with host.running():
        unproven, proven = host.file(), host.file(index=1)
        for follow in (unproven, proven):
            follow.digests[0] = bytes(32)
        name = chunk_name(SLOT, PIN, 0)
        host.store.put(name, b"from somebody")
        proven.seals[0] = cast(Any, object())
        host.poison(proven)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert host.store.get(name, 100) == b"from somebody"
        host.poison(unproven)
        await until(lambda: not list(host.store.list("v1/", 10)))


async def test_what_was_lost_while_it_was_put_is_put_anew(host: Host) -> None:
    """A failed sync: what a put has read meanwhile may be no bytes of the file, and is not what a seal names."""
    async with host.running():
        host.store.held.clear()
        host.writeback._threads.total_tokens = 1
        follow = host.file()
        host.writeback.add(follow, 0)
        host.writeback.add(follow, 1)
        await until(host.store.putting.is_set)
        follow.target.losses += 1
        for chunk in (0, 1):
            follow.target.present.discard(chunk)
        host.regional.reread(follow.key)
        host.store.held.set()
        await until(lambda: not host.writeback._threads.borrowed_tokens)
        assert not follow.digests and host.there() == {}
        for chunk in (0, 1):  # it comes again
            follow.target.present.add(chunk)
            host.writeback.add(follow, chunk)
        await until(lambda: len(follow.digests) == 2)
        assert host.there() == {0: OWN[:CHUNK], 1: OWN[CHUNK:]}


async def test_a_tier_that_hangs_is_given_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A shared filesystem may hang for ever: the writers go on, and the daemon's stop waits for no thread."""
    host = Host(tmp_path)
    async with host.running():
        host.store.held.clear()
        follow = host.file()
        host.writeback.add(follow, 0)
        began = trio.current_time()
        while follow.to_put:
            await trio.sleep(1)
        assert 10 <= trio.current_time() - began < 15
        assert host.regional.statistics.fallbacks == (("not-written", 1),)
        assert host.writeback._threads.borrowed_tokens == 1, "it hangs still"


async def test_whatever_a_put_raises_the_writers_go_on(host: Host) -> None:
    async with host.running():
        host.store.fails = LookupError("unknown encoding: nonsense")
        follow = host.file()
        host.writeback.add(follow, 0)
        await until(lambda: not follow.to_put)
        host.store.fails = None
        host.writeback.add(follow, 1)
        await until(lambda: not follow.to_put)
        assert host.there() == {1: OWN[CHUNK:]}


async def test_an_answer_that_nobody_foresaw_is_a_tier_that_fails(host: Host) -> None:
    """Claims, records and seals are asked for in the filler's own nursery: one odd answer would end it."""

    def odd() -> None:
        raise LookupError("unknown encoding: nonsense")

    with pytest.raises(OriginUnavailable, match="not understood"):
        await host.regional._tiers.ask(odd)
    async with host.running():
        access = host.regional._claims.access
        assert await access.may_use("p", 0, Source(LookupError("unknown encoding: nonsense"))), "it refuses nobody"


@pytest.mark.parametrize(
    ("error", "tries"), [(OriginUnavailable("500"), CLAIM_TRIES), (OriginUnsupported("501 NotImplemented"), 1)]
)
async def test_a_tier_that_takes_chunks_and_no_claims_holds_up_nobody(
    host: Host, error: InstantStartError, tries: int
) -> None:
    """The chunks that it takes keep the breaker of writes shut: the group would be asked for again and again."""

    def refuse(*_: object) -> bool:
        raise error

    claims, tiers = host.regional._claims, host.regional._tiers
    follow = host.file()
    follow.pull = PullPlan("here", PIN, [False, False], Patience())
    follow.pull.background = True
    asked = 0
    while takes := follow.pull.next_claims(8, trio.current_time()):
        assert (asked := asked + 1) <= tries
        await claims._claim(follow, cast(Any, SimpleNamespace(claim=refuse)), takes[0].group, takes[0].epoch)
        tiers.writes.succeeded()
    assert asked == tries
    assert follow.pull.state(0) is ClaimState.ADVISORY
    assert follow.pull.take_moves(trio.current_time()) == [(0, follow.pull.origin), (1, follow.pull.origin)]
    assert tiers.takes_writes()


async def test_files_that_wait_for_a_slow_tier_take_no_more_descriptors_than_they_may(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instantstart_fs.filler.region_writeback.MOST_OPEN", 5)
    async with host.running():
        host.store.held.clear()
        follows = [host.file(OWN[:CHUNK], index) for index in range(8)]
        for follow in follows:
            host.writeback.add(follow, 0)
            host.regional.leave(follow.key)
            host.regional.sealed(follow.target, "size")
        assert sum(follow.fd >= 0 for follow in follows) == 5
        assert host.regional.statistics.fallbacks == (("not-written", 3),)
        host.store.held.set()
        await until(lambda: all(follow.closed for follow in follows))
        late = host.file(OWN, 9)
        host.writeback.add(late, 1)
        await until(lambda: 1 in host.there())


async def test_a_file_waits_for_its_seal_while_that_is_being_put(host: Host) -> None:
    """Its claim stays until then: others look for nothing else, and `regional warm` would end too soon."""
    async with host.running():
        follow = host.file(OWN[:CHUNK])
        host.writeback.add(follow, 0)
        await until(lambda: follow.digests)
        host.store.held.clear()
        host.store.putting.clear()
        host.regional.leave(follow.key)
        host.regional.sealed(follow.target, "size")
        await until(host.store.putting.is_set)
        for _ in range(3):  # as the ticks do
            host.writeback.check_done(follow)
        assert not follow.closed and host.regional.owed("p") == (0, 1)
        host.store.held.set()
        await until(lambda: follow.closed)
        assert host.regional.owed("p") == (0, 0)
        assert host.store.get(f"v1/{SLOT}/{PIN}/seal", 10_000)


async def test_a_slot_is_marked_as_used_each_hour(host: Host) -> None:
    """`regional gc` goes by the marker: one from this morning would not save what was used a minute ago."""

    def marked() -> list[float]:
        return [stored.modified for stored in host.store.list(f"v1/{SLOT}/used/", 10)]

    async with host.running():
        markers = host.regional._claims.markers
        host.store.fails = OriginUnavailable("500")
        markers.mark(SLOT)
        await until(lambda: trio.current_time() - markers._marked[SLOT] > MARK_SECONDS / 2)  # it failed
        host.store.fails = None
        markers.mark(SLOT)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not marked(), "a tier that takes no puts is not asked for each use"
        markers._marked[SLOT] -= MARK_AGAIN_SECONDS
        markers.mark(SLOT)
        await until(marked)
        (path,) = (host.directory / "tier").rglob("used/*")
        os.utime(path, (0, 0))
        markers.mark(SLOT)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert marked() == [0], "not for each file"
        markers._marked[SLOT] -= MARK_SECONDS
        markers.mark(SLOT)
        await until(lambda: marked() != [0])
