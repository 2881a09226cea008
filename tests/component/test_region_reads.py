"""Reads of a tier for which there is no room on this host (filler/region_reads.py)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.errors import OriginUnavailable
from instantstart_fs.filler import pieces, region_reads
from instantstart_fs.filler.fetch import Fetcher
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.filler.target import FileKey
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.records import Seal
from instantstart_fs.regional.store import Address
from tests.component.region_site import CHUNK, RegionSite, Source, region

pytestmark = pytest.mark.timeout(60)
FETCHER = Fetcher(WorkerSettings())


async def read(site: RegionSite, entry: FileEntry, source: Source, wanted: ByteRange) -> bytearray | None:
    return await site.reads.read(FileKey("p", 1, 0), entry, CHUNK, source, wanted, FETCHER)


async def test_a_pipeline_gets_no_byte_of_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    """Its generations begin at 1 again, and a reader of the earlier one may still be at work."""
    old, new, whole = os.urandom(2 * CHUNK), os.urandom(2 * CHUNK), ByteRange(0, 2 * CHUNK)
    earlier, later = Source(), Source()
    async with region(tmp_path) as site:
        site.slots["p"] = "a" * 32
        was = site.seal("p", old)
        assert await read(site, was, earlier, ByteRange(0, CHUNK)) == old[:CHUNK]
        site.reads.forget("p")
        site.slots["p"] = "b" * 32
        now = site.seal("p", new)
        site.slots["p"] = "a" * 32  # of the earlier one a read is under way, and ends now
        assert await read(site, was, earlier, whole) == old
        site.slots["p"] = "b" * 32
        assert await read(site, now, later, whole) == new
        del site.slots["p"]
        assert await read(site, was, earlier, ByteRange(0, 1)) in (None, old[:1])


async def test_what_is_removed_takes_no_memory(tmp_path: Path) -> None:
    async with region(tmp_path) as site:
        site.slots["p"] = "a" * 32
        entry = site.seal("p", bytes(CHUNK))
        assert await read(site, entry, Source(), ByteRange(0, CHUNK)) == bytes(CHUNK)
        assert site.reads._chunks and site.reads._seals
        site.reads.forget("p")
        assert not site.reads._chunks and not site.reads._seals


class Held:
    """Fetches of chunks wait until ``go``. ``wrong``: they fail then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun = 0
        self.wrong = False
        fetch = pieces.fetch_piece

        def held(*arguments: object) -> object:
            self.begun += 1
            self.go.wait(30)
            if self.wrong:
                raise OriginUnavailable("it is not well")
            return fetch(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(pieces, "fetch_piece", held)


async def sealed(site: RegionSite, data: bytes, source: Source) -> FileEntry:
    """A file in the tier of which it is known already that it is there, and that it may be used."""
    site.slots["p"] = "a" * 32
    entry = site.seal("p", data)
    assert await site.claims.access.may_use("p", 0, source)
    assert await site.reads._find((FileKey("p", 1, 0), source), entry, CHUNK) is not None
    return entry


async def wait_begun(held: Held, count: int) -> None:
    with trio.fail_after(30):
        while held.begun < count:
            await trio.sleep(0.005)


@pytest.mark.parametrize("fails", [False, True])
async def test_readers_of_one_chunk_share_its_fetch_and_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    data, held, results = os.urandom(CHUNK), Held(monkeypatch), []
    held.wrong = fails
    async with region(tmp_path) as site:
        source = Source()
        entry = await sealed(site, data, source)

        async def reader(start: int) -> None:
            results.append(await read(site, entry, source, ByteRange(start, start + 10)))

        async with trio.open_nursery() as nursery:
            for start in range(0, 100, 10):
                nursery.start_soon(reader, start)
            await wait_begun(held, 1)
            await trio.testing.wait_all_tasks_blocked()
            held.go.set()
        assert held.begun == 1
        assert len(site.routes.errors) == (1 if fails else 0), "one fetch failed, and once that is said"
        expected = [None] * 10 if fails else [data[start : start + 10] for start in range(0, 100, 10)]
        assert sorted(results, key=str) == sorted(expected, key=str)


async def test_readers_that_come_at_once_ask_for_the_seal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with region(tmp_path) as site:
        site.slots["p"] = "a" * 32
        entry, source, asked = site.seal("p", bytes(CHUNK)), Source(), []
        find = site.claims.find_seal

        async def counted(*arguments: Any) -> Seal | None:
            asked.append(1)
            return await find(*arguments)

        monkeypatch.setattr(site.claims, "find_seal", counted)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read, site, entry, source, ByteRange(0, 10))
        assert len(asked) == source.asked == 1


async def test_who_goes_away_while_it_fetches_leaves_the_chunk_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, held, results = os.urandom(CHUNK), Held(monkeypatch), []
    async with region(tmp_path) as site, trio.open_nursery() as nursery:
        source, first = Source(), trio.CancelScope()
        entry = await sealed(site, data, source)

        async def reader(scope: trio.CancelScope) -> None:
            with scope:
                results.append(await read(site, entry, source, ByteRange(0, 10)))

        nursery.start_soon(reader, first)
        await wait_begun(held, 1)
        nursery.start_soon(reader, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await wait_begun(held, 2)
        held.go.set()
    assert results == [data[:10]]


async def test_a_queue_of_our_own_is_no_silence_of_the_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads are at work: others go to the origin after a while, and the tier is not left alone for that."""
    monkeypatch.setattr(region_reads, "CHUNK_DEADLINE", 15.0)
    monkeypatch.setattr(region_reads, "QUEUE_SECONDS", 0.05)
    data, held, results = os.urandom(CHUNK * (region_reads.THREADS + 2)), Held(monkeypatch), {}
    async with region(tmp_path) as site:
        source = Source()
        entry = await sealed(site, data, source)

        async def reader(chunk: int) -> None:
            results[chunk] = await read(site, entry, source, ByteRange(chunk * CHUNK, chunk * CHUNK + 10))

        async with trio.open_nursery() as nursery:
            for chunk in range(region_reads.THREADS):
                nursery.start_soon(reader, chunk)
            await wait_begun(held, region_reads.THREADS)
            for chunk in range(region_reads.THREADS, region_reads.THREADS + 2):
                await reader(chunk)
                assert results[chunk] is None
            assert not site.routes.errors and not site.tiers.fallbacks
            held.go.set()
        for chunk in range(region_reads.THREADS):
            assert results[chunk] == data[chunk * CHUNK : chunk * CHUNK + 10]
        assert await read(site, entry, source, ByteRange(0, 10)) == data[:10]


class Broken(DirectoryStore):
    """Its seals cannot be had; with ``chunks``, its chunks are not where it says."""

    chunks = False

    def get(self, name: str, most: int) -> bytes:
        if self.chunks:
            return super().get(name, most)
        raise OriginUnavailable("it is not well")

    def address(self, name: str) -> Address:
        raise OriginUnavailable("it is not well")


@pytest.mark.parametrize("chunks", [False, True])
async def test_an_upstream_tier_that_fails_a_read_is_blamed_itself(tmp_path: Path, chunks: bool) -> None:
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    far = Broken(str(tmp_path / "far"))
    far.chunks = chunks
    async with region(tmp_path / "near", upstream=(far,)) as site:
        site.slots["p"] = "a" * 32
        entry = site.seal("p", bytes(CHUNK), source=1)
        assert await read(site, entry, Source(), ByteRange(0, CHUNK)) is None
        assert site.routes.blamed == [1]


async def test_while_the_own_tier_is_left_alone_upstream_tiers_are_read(tmp_path: Path) -> None:
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    data = os.urandom(2 * CHUNK)
    async with region(tmp_path / "near", upstream=(DirectoryStore(str(tmp_path / "far")),)) as site:
        site.slots["p"] = "a" * 32
        for source in (0, 1):
            entry = site.seal("p", data, source=source)
        source = Source()
        assert await read(site, entry, source, ByteRange(0, 10)) == data[:10]
        for _ in range(2):
            site.tiers.own.failed(OriginUnavailable("it is not well"))
        assert site.tiers.own.is_broken()
        assert await read(site, entry, source, ByteRange(CHUNK, CHUNK + 10)) == data[CHUNK : CHUNK + 10]
        assert await read(site, entry, Source(), ByteRange(0, 10)) == data[:10], "by who asks for the first time"
        for _ in range(2):
            site.tiers.sources[1].failed(OriginUnavailable("nor is this one"))
        site.reads.forget("p")
        assert await read(site, entry, source, ByteRange(0, 10)) is None


async def test_what_is_read_without_room_is_marked_as_used(tmp_path: Path) -> None:
    async with region(tmp_path) as site:
        site.slots["p"] = "a" * 32
        entry = site.seal("p", bytes(CHUNK))
        assert await read(site, entry, Source(), ByteRange(0, 10)) == bytes(10)
        with trio.fail_after(30):
            while not list((tmp_path / "v1" / ("a" * 32)).glob("used/*")):
                await trio.sleep(0.005)
