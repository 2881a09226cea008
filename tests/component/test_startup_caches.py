"""Startup caches in the daemon, over a real store and index: whatever is wrong with them is a start without one, and
what is being saved counts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest
import trio

from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.core.startupcache import MAX_FIELDS, StartupRecord
from instantstart_fs.core.startuppack import Entry, encode_index
from instantstart_fs.errors import AccessRefused, DigestMismatch, PipelineBusy, StoreReadOnly
from instantstart_fs.library import Library
from instantstart_fs.origins.directory import DirectoryOrigin
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.startup import CHUNK, MOST_VERSIONS, Place
from instantstart_fs.serving import startupcaches
from tests.component.test_library import make_source, running, spec

pytestmark = pytest.mark.timeout(60)
KEY = {"engine": "vllm"}


def valid(size: int = 0) -> bytes:
    return bytes(size) + encode_index([Entry("triton/k", 0, size, 0o644, 0)] if size else [])


async def added(library: Library, root: Path) -> None:
    await library.admin.add(spec("p", make_source(root / "source")))


async def save(library: Library, raw: bytes, key: dict[str, str] = KEY, *, said: bytes | None = None) -> StartupRecord:
    """``said``: of which the digest is announced."""
    generation = (await library.startup.offer("p", key, 0, restore=True)).generation
    digest = hashlib.sha256(raw if said is None else said).hexdigest()
    async with library.startup.receiving(
        "p", key, 0, generation=generation, size=len(raw), digest=digest, files=1, view="/v", layouts=("triton",)
    ) as receiving:
        await receiving.write(raw)
        return await receiving.keep()


async def test_an_update_that_holds_the_pipeline_costs_a_start_its_cache_and_no_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert startupcaches.START_LOCK_SECONDS < 5
    monkeypatch.setattr(startupcaches, "START_LOCK_SECONDS", 0.05)
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        async with trio.open_nursery() as nursery:

            async def update(task_status: trio.TaskStatus[None]) -> None:
                async with library.catalog.pipelines["p"].lock:
                    task_status.started()
                    await trio.sleep_forever()

            await nursery.start(update)
            offer = await library.startup.offer("p", KEY, 0, restore=True)
            nursery.cancel_scope.cancel()
        assert (offer.choice.outcome, offer.pack) == ("failed", -1) and "under way" in offer.problem
        assert (await library.startup.offer("p", KEY, 0, restore=True)).choice.outcome == "first"


async def test_a_store_that_cannot_be_read_and_a_key_that_cannot_be_kept_cost_a_start_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        offer = await library.startup.offer("p", dict.fromkeys(map(str, range(MAX_FIELDS + 1)), ""), 0, restore=True)
        assert offer.choice.outcome == "failed" and "fields" in offer.problem

        def refuses(*_: object) -> list[int]:
            raise StoreReadOnly("the store cannot be read")

        monkeypatch.setattr(startupcaches.on_disk, "numbers", refuses)
        offer = await library.startup.offer("p", KEY, 0, restore=True)
        assert (offer.choice.outcome, offer.problem) == ("failed", "the store cannot be read")


async def test_two_saves_at_once_both_count_until_they_have_come(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        pipeline = library.catalog.pipelines["p"]
        generation = (await library.startup.offer("p", KEY, 0, restore=True)).generation
        before = pipeline.allocated
        big = 50 << 20
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(
                library.startup.receiving(
                    "p", KEY, 0, generation=generation, size=big, digest="0", files=1, view="/", layouts=()
                )
            )
            record = await save(library, valid(5000), {"engine": "other"})
            assert pipeline.allocated >= before + big + record.size, "the other's promise stands"
        assert pipeline.allocated < before + big
        assert pipeline.startup_bytes >= record.size
        with pytest.raises(DigestMismatch):
            await save(library, valid(5000), {"engine": "third"}, said=b"")
        assert pipeline.startup_promised == 0


async def test_a_pack_that_no_start_can_unpack_is_deleted_when_one_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        bad = bytes(100) + encode_index([Entry("../k", 0, 100, 0o644, 0)])
        await save(library, valid(70_000))
        record = await save(library, bad)
        offer = await library.startup.offer("p", KEY, 0, restore=True)
        os.close(offer.pack)
        assert offer.choice.record == record
        offer = await library.startup.offer("p", KEY, 0, restore=True, without=(record.number,))
        os.close(offer.pack)
        assert offer.choice.record is not None and offer.choice.record.number == 1
        assert [found.number for found in await library.startup.records("p")] == [1], "its digest was right"


async def test_who_is_refused_by_the_source_gets_no_startup_cache_from_the_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = True

    def check(_: DirectoryOrigin) -> None:
        if refused:
            raise AccessRefused("not yours")

    monkeypatch.setattr(DirectoryOrigin, "check", check)
    (tmp_path / "tier").mkdir()
    (tmp_path / "key").write_text("ab" * 32)
    (tmp_path / "key").chmod(0o600)
    regional = RegionalConfig(f"file://{tmp_path}/tier", str(tmp_path / "key"), "here")
    async with running(tmp_path, regional=regional) as library:
        await added(library, tmp_path)
        startup, pipeline, raw = library.startup, library.catalog.pipelines["p"], valid(70_000)
        key = startup._whole(pipeline, KEY, 0, (await startup.offer("p", KEY, 0, restore=False)).generation)
        assert library._regional_startups is not None and pipeline.current is not None
        place = library._regional_startups.place("p", key, pipeline.current.manifest)
        assert place is not None
        saved = StartupRecord(1, 1, 0, len(raw), hashlib.sha256(raw).hexdigest(), 1, "/v", ("triton",), key)
        assert place.save(saved, lambda count, at: raw[at : at + count], "there", 0.0)
        offer = await startup.offer("p", KEY, 0, restore=True)
        assert (offer.choice.outcome, offer.pack) == ("first", -1)
        refused = False
        library.filler.regional.forget("p")  # type: ignore[union-attr]  # as if the minute were over
        offer = await startup.offer("p", KEY, 0, restore=True)
        os.close(offer.pack)
        assert offer.choice.record is not None and offer.choice.record.host == "there"


# ---------------------------------------------------------------- in a region's tier

REGION = RegionKey(b"k" * 32)
PACK = valid(CHUNK + 100)
IDENTITY = {"engine": "vllm", "owner": "7", "generation": "digest"}


def of(raw: bytes) -> StartupRecord:
    return StartupRecord(1, 1, 7, len(raw), hashlib.sha256(raw).hexdigest(), 1, "/v", ("triton",), {"owner": "7"})


def put(place: Place, raw: bytes, host: str = "a") -> bool:
    return place.save(of(raw), lambda count, at: raw[at : at + count], host, 0.0)


def test_a_region_gives_the_last_version_of_exactly_that_key(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "s" * 32, IDENTITY)
    assert place.latest() is None
    assert put(place, PACK) and not put(place, PACK, "b"), "what is there already is not written again"
    found = place.latest()
    assert found is not None and (found.by, b"".join(place.read(found.record))) == ("a", PACK)
    newer = valid(5)
    assert put(place, newer, "b")
    found = place.latest()
    assert found is not None and (found.by, b"".join(place.read(found.record))) == ("b", newer)
    forged = tmp_path / "v1" / ("s" * 32) / place._name / "s" / "0005"
    forged.write_bytes(b"no key")
    found = place.latest()
    assert found is not None and found.by == "b", "who has no key cannot hide what others saved by one record"
    forged.unlink()
    for other in ({**IDENTITY, "owner": "8"}, {**IDENTITY, "generation": "x"}, {**IDENTITY, "package torch": "2"}):
        assert Place(store, REGION, "s" * 32, other).latest() is None
    assert Place(store, REGION, "t" * 32, IDENTITY).latest() is None, "another pipeline's"
    for number in range(2 * MOST_VERSIONS):
        put(place, valid(number + 10))
    assert len(list((tmp_path / "v1" / ("s" * 32)).glob("*/s/*"))) == MOST_VERSIONS


def test_two_hosts_that_save_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw none, and both write version 0: each pack lies by itself, and one record is first."""
    store = DirectoryStore(str(tmp_path))
    one, two = (Place(store, REGION, "s" * 32, IDENTITY) for _ in range(2))
    monkeypatch.setattr(two, "_numbers", list)
    assert put(one, PACK) and put(two, valid(9), "b")
    found = Place(store, REGION, "s" * 32, IDENTITY).latest()
    assert found is not None and found.by == "b" and b"".join(one.read(found.record)) == valid(9)
    assert b"".join(one.read(of(PACK))) == PACK


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *((what, how) for what in ("s", "c", "seal") for how in ("flipped", "cut")),
        ("s", "another's"),
        ("seal", "another's"),
    ],
)
def test_what_was_not_written_with_the_regions_key_is_not_used(tmp_path: Path, what: str, how: str) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "s" * 32, IDENTITY)
    put(place, PACK)
    other = Place(store, RegionKey(b"x" * 32), "s" * 32, IDENTITY)
    mine = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    put(other, PACK)
    theirs = [path for path in tmp_path.rglob("*") if path.is_file() and path not in mine]
    target = next(path for path in sorted(mine) if what in (path.name, path.parent.name))
    foreign = next(path for path in sorted(theirs) if what in (path.name, path.parent.name))
    raw = bytearray(mine[target])
    raw[50] ^= 1
    target.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-1]), "another's": foreign.read_bytes()}[how])
    with pytest.raises(Forged):
        found = place.latest()
        assert found is not None
        b"".join(place.read(found.record))


async def test_what_an_update_overtook_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline holds something else when the pack has come."""
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        raw, caches = valid(100), library.startup
        generation = (await caches.offer("p", KEY, 0, restore=True)).generation
        digest = hashlib.sha256(raw).hexdigest()
        async with caches.receiving(
            "p", KEY, 0, generation=generation, size=len(raw), digest=digest, files=1, view="/v", layouts=()
        ) as receiving:
            await receiving.write(raw)

            async def updated(_: object) -> str:
                return "99 other"

            monkeypatch.setattr(caches, "_generation", updated)
            with pytest.raises(PipelineBusy, match="updated"):
                await receiving.keep()
        assert await caches.records("p") == []
