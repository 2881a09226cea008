"""Startup caches in the daemon, over a real store and index: whatever is wrong with them is a start without one, and
what is being saved counts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pwd
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.control import startup as control
from instantstart_fs.control.protocol import StartupBegin, StartupSave
from instantstart_fs.core.startupcache import KEPT_PER_KEY, MAX_FIELDS, Choice, StartupRecord
from instantstart_fs.core.startuppack import Entry, encode_index
from instantstart_fs.errors import (
    AccessRefused,
    ControlError,
    DigestMismatch,
    IndexFull,
    OriginNotFound,
    OriginUnavailable,
    PipelineBusy,
    StoreError,
    StoreReadOnly,
)
from instantstart_fs.filler.region_follow import RegionSettings, WriteRate
from instantstart_fs.library import Library
from instantstart_fs.origins.directory import DirectoryOrigin
from instantstart_fs.regional import hygiene
from instantstart_fs.regional import startup as startup_objects
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.keys import RegionKey, read_key
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.startup import CHUNK, Place, identity_of
from instantstart_fs.serving import startup_arrivals, startup_region, startup_versions, startupcaches
from instantstart_fs.serving.startup_region import RegionalStartups, content_of
from instantstart_fs.store import startupcaches as on_disk
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


async def hold(lock: trio.Lock, *, task_status: trio.TaskStatus[None]) -> None:
    async with lock:
        task_status.started()
        await trio.sleep_forever()


async def test_an_update_that_holds_the_pipeline_costs_a_start_its_cache_and_no_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert startupcaches.START_LOCK_SECONDS < 5
    monkeypatch.setattr(startupcaches, "START_LOCK_SECONDS", 0.05)
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(hold, library.catalog.pipelines["p"].lock)
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
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        startup = library.startup
        put(await place_of(library), valid(70_000), "there")
        library.filler.regional.forget("p")  # type: ignore[union-attr]  # as if it had been listed a minute ago
        offer = await startup.offer("p", KEY, 0, restore=True)
        assert (offer.choice.outcome, offer.pack) == ("first", -1)
        refused = False
        library.filler.regional.forget("p")  # type: ignore[union-attr]  # as if the minute were over
        offer = await startup.offer("p", KEY, 0, restore=True)
        os.close(offer.pack)
        assert offer.choice.record is not None and offer.choice.record.host == "there"


# ---------------------------------------------------------------- in a region's tier


def region_of(root: Path, *users: str) -> RegionalConfig:
    (root / "tier").mkdir(exist_ok=True)
    (root / "key").write_text("ab" * 32)
    (root / "key").chmod(0o600)
    return RegionalConfig(f"file://{root}/tier", str(root / "key"), "here", startup_caches=users)


async def place_of(library: Library, uid: int = 0) -> Place:
    """Where other hosts have that user's caches of KEY."""
    startup, pipeline = library.startup, library.catalog.pipelines["p"]
    key = startup._whole(pipeline, KEY, uid, (await startup.offer("p", KEY, uid, restore=False)).generation)
    assert startup._region is not None and pipeline.current is not None
    place = startup._region.place("p", key, pipeline.current.manifest, uid)
    assert place is not None
    return place


async def restored(library: Library) -> tuple[str, str]:
    """What the next start gets: (outcome, the host that compiled it)."""
    offer = await library.startup.offer("p", KEY, 0, restore=True)
    if offer.pack >= 0:
        os.close(offer.pack)
    return offer.choice.outcome, offer.choice.record.host if offer.choice.record is not None else ""


REGION = RegionKey(b"k" * 32)
PACK = valid(CHUNK + 100)
IDENTITY = {"engine": "vllm", "owner": "7", "generation": "digest"}


def of(raw: bytes) -> StartupRecord:
    return StartupRecord(1, 1, 7, len(raw), hashlib.sha256(raw).hexdigest(), 1, "/v", ("triton",), {"owner": "7"})


def put(place: Place, raw: bytes, host: str = "a", **how: Any) -> bool:
    saving = place.saving(of(raw), host, 0.0, **how)
    try:
        piece = next(saving)
        while True:
            piece = saving.send(raw[piece.at : piece.at + piece.length])
    except StopIteration as end:
        if end.value:
            place.tidy()
        return bool(end.value)


def packs(tier: Path) -> set[str]:
    return {path.parent.name for path in tier.glob("v1/*/*/seal")}


def test_a_region_gives_the_last_version_of_exactly_that_key(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "5" * 32, IDENTITY)
    assert place.entries() == []
    assert put(place, PACK) and not put(place, PACK, "b"), "what is there already is not written again"
    found = place.entries()[0]
    assert (found.by, b"".join(place.read(found.record))) == ("a", PACK)
    newer = valid(5)
    assert put(place, newer, "b")
    found, older = place.entries()
    assert (found.by, b"".join(place.read(found.record))) == ("b", newer) and older.by == "a"
    forged = tmp_path / "v1" / ("5" * 32) / "startup" / place.name / "00000000"
    forged.write_bytes(b"no key")
    assert place.entries()[0].by == "b", "who has no key cannot hide what others saved by one record"
    assert put(place, valid(6), "c") and place.entries()[0].by == "c" and not forged.exists(), "nor end their numbers"
    for other in ({**IDENTITY, "owner": "8"}, {**IDENTITY, "generation": "x"}, {**IDENTITY, "package torch": "2"}):
        assert Place(store, REGION, "5" * 32, other).entries() == []
    assert Place(store, REGION, "6" * 32, IDENTITY).entries() == [], "another pipeline's"


def test_a_last_number_that_nobody_may_delete_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "5" * 32, IDENTITY)
    assert put(place, PACK)
    last = f"startup/{place.name}/00000000"
    (tmp_path / "v1" / ("5" * 32) / last).write_bytes(b"no key")

    def refuse(name: str) -> None:
        raise AccessRefused(f"{name}: not yours")

    monkeypatch.setattr(store, "delete", refuse)
    with pytest.raises(OriginUnavailable, match=f"{last}: an object is in the way"):
        put(place, valid(6), "c")
    assert place.entries()[0].by == "a"


def test_of_many_versions_the_newest_stay_with_their_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "5" * 32, IDENTITY)
    for number in range(20):
        assert put(place, valid(number + 10)), "there is no last one"
    assert [found.record.size for found in place.entries()] == [len(valid(29)), len(valid(28))]
    assert packs(tmp_path) == {found.pack for found in place.entries()}
    assert put(place, valid(28)) and put(place, valid(29)) and put(place, valid(28))
    assert [b"".join(place.read(found.record)) for found in place.entries()] == [valid(28), valid(29)], (
        "a pack stays for as long as one record names it"
    )
    monkeypatch.setattr(startup_objects, "KEPT", 5)
    for number in range(9):
        other = Place(store, REGION, "5" * 32, {**IDENTITY, "arguments": str(number)})
        put(other, valid(100 + number))
        (record,) = (tmp_path / "v1" / ("5" * 32) / "startup" / other.name).iterdir()
        os.utime(record, (1e9 + number, 1e9 + number))
    other.tidy()
    assert len(list(tmp_path.glob("v1/*/startup/*/*"))) == len(packs(tmp_path)) == 5, "of all keys together"


@pytest.mark.parametrize("lost", ["seal", "c/00000001"])
def test_a_pack_that_is_lost_hides_no_older_one_and_is_mended_by_the_next_save(tmp_path: Path, lost: str) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "5" * 32, IDENTITY)
    put(place, valid(9), "a")
    put(place, PACK, "b")
    newest = place.entries()[0]
    (tmp_path / "v1" / ("5" * 32) / newest.pack / lost).unlink()
    with pytest.raises(OriginNotFound):
        b"".join(place.read(newest.record))
    assert b"".join(place.read(place.entries()[1].record)) == valid(9)
    assert put(place, PACK, "c") and b"".join(place.read(newest.record)) == PACK
    (tmp_path / "v1" / ("5" * 32) / newest.pack / lost).unlink()
    hygiene.verify(store, REGION, "5" * 32)
    assert [found.by for found in place.entries()] == ["a"], "a record without its pack goes"
    assert put(place, PACK, "d") and b"".join(place.read(place.entries()[0].record)) == PACK


class KeepsAll(DirectoryStore):
    """A storage in which this host may delete nothing. ``puts``: names of chunks that were written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.puts: list[str] = []

    def delete(self, name: str) -> None:
        raise AccessRefused(name)

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        super().put(name, data)
        if "/c/" in name:
            self.puts.append(name)


def test_what_hosts_saved_that_may_delete_nothing_does_not_hide_what_they_save_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_objects, "MOST_OF_KEY", 10)
    place = Place(KeepsAll(tmp_path), REGION, "5" * 32, IDENTITY)
    for number in range(25):
        with pytest.raises(AccessRefused) if number > 1 else contextlib.nullcontext():
            put(place, valid(number + 10))  # the tidying after it is refused
        assert place.entries()[0].record.size == len(valid(number + 10))
    assert len(place._numbers()) == 10, "the work has a bound"
    whole = Place(DirectoryStore(str(tmp_path)), REGION, "5" * 32, IDENTITY)
    assert whole.remove() == 25 and whole.entries() == [] and packs(tmp_path) == set()


def wrong(tier: Path, place: Place, pack: str, chunk: int = 0) -> Path:
    """Change a byte of a chunk; its path."""
    found = tier / "v1" / place._slot / pack / "c" / f"{chunk:08x}"
    raw = bytearray(found.read_bytes())
    raw[50] ^= 1
    found.write_bytes(raw)
    return found


def test_what_is_wrong_is_written_again_by_who_found_it_so_even_where_nothing_may_be_deleted(tmp_path: Path) -> None:
    store = KeepsAll(tmp_path)
    place = Place(store, REGION, "5" * 32, IDENTITY)
    put(place, PACK)
    entry = place.entries()[0]
    assert not place.discard(entry.record, 1), "it is right when it is read again: the way here was not"
    wrong(tmp_path, place, entry.pack, 1)
    with pytest.raises(Forged):
        b"".join(place.read(entry.record))
    with pytest.raises(AccessRefused):
        place.discard(entry.record, 1)
    assert not put(place, PACK, "b"), "its size tells nothing"
    assert put(place, PACK, "b", mend=True)
    assert b"".join(place.read(place.entries()[0].record)) == PACK
    wrong(tmp_path, place, entry.pack, 1)
    deletes = Place(DirectoryStore(str(tmp_path)), REGION, "5" * 32, IDENTITY)
    assert deletes.discard(entry.record, 1) and deletes.entries() == [] and packs(tmp_path) == set()


def test_a_save_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = KeepsAll(tmp_path)
    place, raw = Place(store, REGION, "5" * 32, IDENTITY), valid(3 * CHUNK)
    first = place.saving(of(raw), "a", 0.0)
    piece = next(first)
    while piece.at < 2 * CHUNK:
        piece = first.send(raw[piece.at : piece.at + piece.length])
    assert len(store.puts) == 2
    first.close()
    assert put(place, raw, since=piece)
    assert [name[-8:] for name in store.puts] == ["00000000", "00000001", "00000002", "00000003"]
    assert b"".join(place.read(place.entries()[0].record)) == raw
    # What went meanwhile is put again.
    shutil.rmtree(tmp_path / "v1")
    assert put(place, raw, since=piece) and b"".join(place.read(place.entries()[0].record)) == raw


def test_two_hosts_that_save_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw none, and both draw the first number: each pack lies by itself, and one record is first."""
    store = DirectoryStore(str(tmp_path))
    one, two = (Place(store, REGION, "5" * 32, IDENTITY) for _ in range(2))
    monkeypatch.setattr(two, "_numbers", list)
    drawn = iter((0, 0, 1))
    monkeypatch.setattr(startup_objects.secrets, "randbelow", lambda _: next(drawn))
    assert put(one, PACK) and put(two, valid(9), "b")
    found = Place(store, REGION, "5" * 32, IDENTITY).entries()[0]
    assert found.by == "b" and b"".join(one.read(found.record)) == valid(9)
    assert b"".join(one.read(of(PACK))) == PACK


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "as SMB")

    monkeypatch.setattr(os, "link", link)


async def test_a_tier_without_conditional_writes_takes_startup_caches_and_keeps_no_packs_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(monkeypatch)
    tier = tmp_path / "tier"
    tier.mkdir()
    place, region = Place(DirectoryStore(str(tier)), REGION, "5" * 32, IDENTITY), regional(DirectoryStore(str(tier)))
    (tmp_path / "pack").write_bytes(PACK)
    region.put("p", place, of(PACK), os.open(tmp_path / "pack", os.O_RDONLY))
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            await nursery.start(region.run)
            while not place.entries():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    for number in range(5):
        assert put(place, valid(number + 10)), "each has a number of its own"
    assert [found.record.size for found in place.entries()] == [len(valid(14)), len(valid(13))]
    assert packs(tier) == {found.pack for found in place.entries()}
    assert place.remove() == 2 and [path for path in tier.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("storage", ["refuses conditions", "ignores conditions"])
@pytest.mark.parametrize(
    ("when", "drawn"),
    [
        ("it has listed", (5, 9)),
        ("it has listed", (5, 5)),
        ("it has looked", (5, 9)),
        ("it has looked", (9, 5)),
        ("it has written", (5, 9)),
    ],
)
def test_two_hosts_that_save_at_once_where_nothing_is_conditional_both_have_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, drawn: tuple[int, ...], storage: str
) -> None:
    """The other's record comes when this host has done that. Of hosts that draw one number and look at the same
    instant one loses its record: one time in thousands."""
    if storage == "refuses conditions":
        without_links(monkeypatch)
    else:

        def put_new(store: DirectoryStore, name: str, data: bytes) -> bool:
            store.put(name, data)
            return True

        monkeypatch.setattr(DirectoryStore, "put_new", put_new)
    numbers = iter(drawn)
    monkeypatch.setattr(startup_objects.secrets, "randbelow", lambda _: next(numbers))
    other, tier = tmp_path / "other", tmp_path / "tier"
    other.mkdir()
    tier.mkdir()
    assert put(Place(DirectoryStore(str(other)), REGION, "5" * 32, IDENTITY), valid(9), "b")

    class Beside(DirectoryStore):
        def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
            if when == "it has looked" and "/startup/" in name:
                self.comes(name)
            super().put(name, data)
            if "/startup/" in name if when == "it has written" else name.endswith("/seal"):
                self.comes(name)

        def comes(self, name: str) -> None:
            if not came and not (when == "it has looked" and name.endswith("/seal")):
                came.append(name)
                shutil.copytree(other, tier, dirs_exist_ok=True)

    came: list[str] = []
    place = Place(Beside(str(tier)), REGION, "5" * 32, IDENTITY)
    assert put(place, PACK) and came
    assert {found.by for found in place.entries()} == {"a", "b"}
    assert packs(tier) == {found.pack for found in place.entries()}


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *((what, how) for what in ("startup", "c", "seal") for how in ("flipped", "cut")),
        ("startup", "another's"),
        ("seal", "another's"),
    ],
)
def test_what_was_not_written_with_the_regions_key_is_not_used(tmp_path: Path, what: str, how: str) -> None:
    store = DirectoryStore(str(tmp_path))
    place = Place(store, REGION, "5" * 32, IDENTITY)
    put(place, PACK)
    other = Place(store, RegionKey(b"x" * 32), "5" * 32, IDENTITY)
    mine = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    put(other, PACK)
    theirs = [path for path in tmp_path.rglob("*") if path.is_file() and path not in mine]
    target, foreign = (
        next(path for path in sorted(some) if what in (path.name, path.parent.name, path.parent.parent.name))
        for some in (mine, theirs)
    )
    raw = bytearray(mine[target])
    raw[50] ^= 1
    target.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-1]), "another's": foreign.read_bytes()}[how])
    with pytest.raises(Forged):
        b"".join(place.read(place.entries()[0].record))


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


# ---------------------------------------------------------------- waits, and who may hold whom up


async def test_a_disk_that_hangs_and_a_lock_that_is_held_cost_a_start_its_cache_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startupcaches, "OFFER_SECONDS", 0.1)
    monkeypatch.setattr(startupcaches, "START_LOCK_SECONDS", 0.05)
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        over, numbers = threading.Event(), startupcaches.on_disk.numbers

        def hangs(*_: object) -> list[int]:
            over.wait(50)
            return []

        monkeypatch.setattr(startupcaches.on_disk, "numbers", hangs)
        with trio.fail_after(40):
            offer = await library.startup.offer("p", KEY, 0, restore=True)
        over.set()
        assert offer.choice.outcome == "failed" and "within" in offer.problem
        monkeypatch.setattr(startupcaches.on_disk, "numbers", numbers)
        monkeypatch.setattr(startupcaches, "OFFER_SECONDS", 70.0)
        record = await save(library, bytes(100) + encode_index([Entry("../k", 0, 100, 0o644, 0)]))
        async with trio.open_nursery() as nursery:
            await nursery.start(hold, library.catalog.pipelines["p"].lock)  # what is damaged cannot be deleted now
            with trio.fail_after(40):
                offer = await library.startup.offer("p", KEY, 0, restore=True, without=(record.number,))
            nursery.cancel_scope.cancel()
        assert (offer.choice.outcome, offer.problem) == ("damaged", "")


async def test_a_save_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(control, "SLOWEST", 1 << 40)
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        generation = (await library.startup.offer("p", KEY, 0, restore=True)).generation
        pipes: list[int] = []

        async def send(_: object, descriptors: Sequence[int]) -> None:
            pipes.extend(os.dup(one) for one in descriptors)

        async def drip() -> None:
            while True:
                with contextlib.suppress(BrokenPipeError):  # it was given up
                    os.write(pipes[0], b"x") if pipes else None
                await trio.sleep(0.02)

        request = StartupSave("p", KEY, generation, 1 << 30, "0", 1, "/v", ("triton",))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            with trio.fail_after(40), pytest.raises(ControlError, match="too slowly"):
                await control.save(library.startup, request, 0, send)
            nursery.cancel_scope.cancel()
        os.close(pipes[0])
        assert library.catalog.pipelines["p"].startup_promised == 0


async def test_who_saves_slowly_holds_up_nobody_elses_saves(tmp_path: Path) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        await library.admin.add(msgspec.structs.replace(spec("q", make_source(tmp_path / "other")), uid=7))
        mine = (await library.startup.offer("p", KEY, 0, restore=True)).generation
        theirs = (await library.startup.offer("q", KEY, 7, restore=True)).generation
        raw, held = valid(100), trio.Event()
        digest = hashlib.sha256(raw).hexdigest()

        async def slow() -> None:
            async with library.startup.receiving(
                "p", KEY, 0, generation=mine, size=len(raw), digest=digest, files=1, view="/v", layouts=()
            ):
                held.set()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for _ in range(startupcaches.SAVING_AT_ONCE):
                nursery.start_soon(slow)
            await held.wait()
            while library.startup._turns.count(0) < startupcaches.SAVING_AT_ONCE:
                await trio.sleep(0.01)
            with trio.fail_after(40):
                async with library.startup.receiving(
                    "q", KEY, 7, generation=theirs, size=len(raw), digest=digest, files=1, view="/v", layouts=()
                ) as receiving:
                    await receiving.write(raw)
                    assert (await receiving.keep()).number == 1
            nursery.cancel_scope.cancel()
        assert library.startup._turns._users == {}


# ---------------------------------------------------------------- what travels, for whom, and what if it does not come


@pytest.mark.parametrize(
    ("named", "travels"), [((), False), (("7",), False), (("0",), False), (("root",), True)], ids=str
)
async def test_code_that_others_planted_in_the_region_is_not_executed_here(
    tmp_path: Path, named: tuple[str, ...], travels: bool
) -> None:
    """Another host of the region, which has its key, saved it for what it calls root."""
    config = region_of(tmp_path, *named)
    async with running(tmp_path, regional=config) as library:
        await added(library, tmp_path)
        pipeline = library.catalog.pipelines["p"]
        key = library.startup._whole(
            pipeline, KEY, 0, (await library.startup.offer("p", KEY, 0, restore=False)).generation
        )
        assert pipeline.current is not None
        region = RegionKey(read_key(config.key_file))
        identity = identity_of(key, content_of(pipeline.current.manifest), "root")
        planted = Place(DirectoryStore(f"{tmp_path}/tier"), region, region.slot(pipeline.spec), identity)
        assert put(planted, valid(70_000), "there")
        assert await restored(library) == (("restored", "there") if travels else ("first", ""))
        await save(library, valid(80_000))
        with trio.move_on_after(40 if travels else 0.2):
            while {found.by for found in planted.entries()} == {"there"}:
                await trio.sleep(0.02)
        assert [found.by for found in planted.entries()] == (["here", "there"] if travels else ["there"])


async def test_a_pack_that_comes_too_slowly_for_one_start_is_there_for_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_arrivals, "WAIT_SECONDS", 0.05)
    go_on, read = threading.Event(), Place.read

    def slow(place: Place, record: StartupRecord) -> Iterator[bytes]:
        go_on.wait(50)
        yield from read(place, record)

    monkeypatch.setattr(Place, "read", slow)
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        put(await place_of(library), valid(70_000), "there")
        assert await restored(library) == ("first", "")
        go_on.set()
        with trio.fail_after(40):
            while not await library.startup.records("p"):
                await trio.sleep(0.02)
        assert await restored(library) == ("restored", "there")


async def test_what_did_not_come_whole_is_not_waited_for_again_and_an_older_one_is_taken(tmp_path: Path) -> None:
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        place = await place_of(library)
        put(place, valid(50_000), "first")
        put(place, valid(70_000), "second")
        newest = place.entries()[0]
        chunk = next(tmp_path.glob(f"tier/v1/*/{newest.pack}/c/*"))
        good = chunk.read_bytes()
        chunk.unlink()
        assert await restored(library) == ("restored", "first")
        chunk.parent.mkdir(exist_ok=True)
        chunk.write_bytes(good)
        await library.startup._versions.drop(library.catalog.pipelines["p"], await library.startup.records("p"))
        assert await restored(library) == ("restored", "first"), "it is left alone for minutes"
        arrivals = library.startup._arrivals
        assert arrivals is not None
        arrivals._failed.clear()
        await library.startup._versions.drop(library.catalog.pipelines["p"], await library.startup.records("p"))
        assert await restored(library) == ("restored", "second")


@pytest.mark.parametrize("may_delete", [True, False])
async def test_a_host_that_finds_one_wrong_sees_to_it_that_the_next_host_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_delete: bool
) -> None:
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        place = await place_of(library)
        put(place, valid(50_000), "first")
        put(place, valid(70_000), "second")
        wrong(tmp_path / "tier", place, place.entries()[0].pack)
        if not may_delete:
            monkeypatch.setattr(DirectoryStore, "delete", KeepsAll.delete)
        assert await restored(library) == ("restored", "first")
        with trio.fail_after(40):
            while place.entries()[0].record.size != len(valid(50_000)):
                await trio.sleep(0.02)
        newest = place.entries()[0]
        assert newest.by == "first" and b"".join(place.read(newest.record)) == valid(50_000)
        assert len(place.entries()) == (1 if may_delete else 3)


async def test_a_removal_finds_the_region_though_the_pipeline_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        place = await place_of(library)
        put(place, valid(70_000), "there")
        assert await restored(library) == ("restored", "there")
        pipeline, load = library.catalog.pipelines["p"], library.catalog.ensure_loaded
        generation = pipeline.current

        async def brings_it_back(_: object) -> Any:
            pipeline.current = generation
            return await load(pipeline)

        monkeypatch.setattr(library.catalog, "ensure_loaded", brings_it_back)
        pipeline.current = None
        assert await library.startup.remove("p", ()) == 1
        assert place.entries() == []


async def test_what_is_removed_here_is_removed_in_the_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that verifies, and whose engine crashes, would be back at the next start."""
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        place = await place_of(library)
        put(place, valid(70_000), "there")
        assert await restored(library) == ("restored", "there")
        assert await library.startup.remove("p", ()) == 1
        assert place.entries() == [] and packs(tmp_path / "tier") == set()
        assert await restored(library) == ("first", "")

        # What still waits to be saved there is not saved any more.
        region = library.startup._region
        assert region is not None
        queue = region._queue
        monkeypatch.setattr(region, "_queue", (held := trio.open_memory_channel[Any](1))[0])
        await save(library, valid(70_000))
        await library.startup.remove("p", ())
        queue.send_nowait(held[1].receive_nowait())
        monkeypatch.setattr(region, "_queue", queue)
        await save(library, valid(80_000))
        with trio.fail_after(40):
            while not place.entries():
                await trio.sleep(0.02)
        assert [found.record.size for found in place.entries()] == [len(valid(80_000))]
        shutil.rmtree(tmp_path / "tier")
        with pytest.raises(OriginUnavailable, match="removed from this host; in the region"):
            await library.startup.remove("p", ())
        assert await library.startup.records("p") == []


async def test_what_engines_failed_with_is_left_out_and_does_not_come_back_from_the_region(tmp_path: Path) -> None:
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        put(await place_of(library), valid(70_000), "there")
        assert await restored(library) == ("restored", "there")
        suspects = library.startup.suspects
        for start in ("a", "b"):
            suspects.given(start, "p", 1)
            suspects.reported(start, "p", failed=True)
        offer = await library.startup.offer("p", KEY, 0, restore=True)
        assert (offer.choice.outcome, offer.pack) == ("failed", -1) and "version 1 is left out" in offer.problem
        record = await save(library, valid(80_000))
        assert await restored(library) == ("restored", "") and record.number == 2
        await library.startup.remove("p", (1,))
        assert suspects.of("p") == (), "another may have its number"


@contextlib.contextmanager
def its_end_failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A save's directory comes to its place; then the parent's fsync fails."""
    sync = on_disk._sync

    def fails(directory: str) -> None:
        sync(directory)
        if directory.endswith("/startup"):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "_sync", fails)
        yield


async def test_what_is_kept_though_its_end_failed_does_not_block_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        await save(library, valid(100))
        with its_end_failing(monkeypatch), pytest.raises(StoreError):
            await save(library, valid(200))
        assert (await save(library, valid(300))).number == 3


def counted(library: Library) -> int:
    """The bytes of startup caches that the index says, and the next start believes."""
    found = library.index.read(lambda txn: txn.get_upkeep("p"))
    return found.startup_bytes if found is not None else 0


async def test_what_startup_caches_take_comes_to_the_index_though_its_commit_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)

        async def fails(_: object) -> None:
            raise IndexFull("the index has no space left")

        monkeypatch.setattr(library.index, "write", fails)
        record = await save(library, valid(70_000))
        monkeypatch.undo()
        with trio.fail_after(40):
            while counted(library) != on_disk.taken(record):
                await trio.sleep(0.02)
        assert library.catalog.pipelines["p"].startup_bytes == on_disk.taken(record)


async def test_what_may_be_on_the_disk_counts_until_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save whose end fails, and a deletion that does."""
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        pipeline, raw = library.catalog.pipelines["p"], valid(70_000)
        with its_end_failing(monkeypatch), pytest.raises(StoreError):
            await save(library, raw)
        takes = on_disk.taken(of(raw))
        assert pipeline.startup_bytes == counted(library) == takes, "it is in its place"
        (record,) = await library.startup.records("p")
        really = library.store.delete_entry

        def deletes_and_fails(*components: str) -> None:
            really(*components)
            raise StoreError("Input/output error")

        monkeypatch.setattr(library.store, "delete_entry", deletes_and_fails)
        with pytest.raises(StoreError):
            await library.startup.remove("p", (record.number,))
        monkeypatch.undo()
        assert pipeline.startup_bytes == counted(library) == takes
        assert await library.startup.records("p") == []
        assert pipeline.startup_bytes == counted(library) == 0


async def test_a_save_is_none_that_failed_because_an_old_one_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        for size in range(KEPT_PER_KEY):
            await save(library, valid(size + 1))

        def fails(*_: str) -> None:
            raise StoreError("Input/output error")

        monkeypatch.setattr(library.store, "delete_entry", fails)
        record = await save(library, valid(100))
        monkeypatch.undo()
        assert record.number == KEPT_PER_KEY + 1
        known = await library.startup.records("p")
        assert known[0] == record and len(known) == KEPT_PER_KEY + 1
        assert counted(library) == sum(map(on_disk.taken, known))


async def test_a_disk_that_does_not_answer_keeps_no_save_and_no_question_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where it is to be opened for the region, nor where somebody asks what there is."""
    over = threading.Event()
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        assert await library.startup.records("p") == []
        monkeypatch.setattr(startup_versions, "DISK_SECONDS", 0.05)

        def hangs(*_: object) -> int:
            over.wait(50)
            raise StoreError("it was a test")

        monkeypatch.setattr(on_disk, "open_pack", hangs)
        with trio.fail_after(20):
            assert (await save(library, valid(100))).number == 1
        assert "stays on this host: the store's disk does not answer within" in caplog.text
        library.startup.forget(library.catalog.pipelines["p"])
        monkeypatch.setattr(on_disk, "numbers", hangs)
        with trio.fail_after(20), pytest.raises(StoreError, match="does not answer"):
            await library.startup.records("p")
        over.set()
        monkeypatch.undo()
        assert len(await library.startup.records("p")) == 1


async def test_a_save_that_waits_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its turn, and for an update that holds the pipeline."""
    monkeypatch.setattr(control, "PROGRESS_SECONDS", 0.01)
    async with running(tmp_path) as library:
        await added(library, tmp_path)
        generation = (await library.startup.offer("p", KEY, 0, restore=True)).generation
        raw, said = valid(100), list[str]()
        told = {"first": trio.Event(), "second": trio.Event()}
        pipes: list[int] = []

        async def send(response: object, descriptors: Sequence[int]) -> None:
            said.append(type(response).__name__)
            pipes.extend(os.dup(one) for one in descriptors)
            if said[-1] == "Progress":
                told["second" if "Handed" in said else "first"].set()

        request = StartupSave(*("p", KEY, generation, len(raw), hashlib.sha256(raw).hexdigest(), 1, "/v", ("triton",)))
        saving = library.startup._saving
        for _ in range(startupcaches.SAVING_AT_ONCE):
            await saving.acquire()
        lock = library.catalog.pipelines["p"].lock
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.save, library.startup, request, 0, send)
                await told["first"].wait()
                assert not pipes
                for _ in range(startupcaches.SAVING_AT_ONCE):
                    saving.release()
                while not pipes:
                    await trio.sleep(0.01)
                async with lock:
                    os.write(pipes[0], raw)
                    os.close(pipes[0])
                    await told["second"].wait()
        assert [found.number for found in await library.startup.records("p")] == [1]


async def test_a_client_that_leaves_while_a_cache_is_looked_for_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = os.open(tmp_path, os.O_RDONLY)
    async with running(tmp_path) as library:
        with trio.CancelScope() as scope:

            async def offer(*_: object, **__: object) -> startupcaches.Offer:
                scope.cancel()
                return startupcaches.Offer(Choice("first"), "", given)

            async def send(*_: object) -> None:
                pass

            monkeypatch.setattr(library.startup, "offer", offer)
            await control.begin(library.startup, StartupBegin("p", {}), 0, "s", "/m", None, send)
        assert scope.cancelled_caught
        with pytest.raises(OSError):
            os.fstat(given)


async def test_what_this_host_may_not_remove_in_the_region_is_said(tmp_path: Path) -> None:
    config = msgspec.structs.replace(region_of(tmp_path, "root"), write_back=False)
    async with running(tmp_path, regional=config) as library:
        await added(library, tmp_path)
        put(await place_of(library), valid(70_000), "there")
        assert await restored(library) == ("restored", "there")
        with pytest.raises(OriginUnavailable, match=r"in the region they may be left: .*write_back = false"):
            await library.startup.remove("p", ())
        assert await library.startup.records("p") == []


async def test_a_removal_that_fails_once_while_a_save_is_under_way_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_region, "AGAIN", 0.01)
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        place = await place_of(library)
        region = library.startup._region
        assert region is not None
        put_it, removals = region._put, list[int]()

        async def put_and_withdraw(save: Any) -> bool:
            found = await put_it(save)
            region._removed[save.place.name] = trio.current_time()
            return found

        def remove(self: Any) -> int:
            removals.append(len(removals))
            if len(removals) == 1:
                raise OriginUnavailable("503")
            return really(self)

        really = type(place).remove
        monkeypatch.setattr(type(place), "remove", remove)
        monkeypatch.setattr(region, "_put", put_and_withdraw)
        await save(library, valid(70_000))
        with trio.fail_after(40):
            while len(removals) < 2 or place.entries():
                await trio.sleep(0.02)


async def test_what_is_saved_in_the_region_keeps_the_hosts_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, regional=region_of(tmp_path, "root")) as library:
        await added(library, tmp_path)
        waited: list[int] = []

        async def wait(_: object, length: int) -> None:
            waited.append(length)

        monkeypatch.setattr(WriteRate, "wait", wait)
        place, raw = await place_of(library), valid(CHUNK + 100)
        await save(library, raw)
        with trio.fail_after(40):
            while not place.entries():
                await trio.sleep(0.02)
        assert waited == [CHUNK, len(raw) - CHUNK]


async def test_a_save_waits_for_the_rate_as_long_as_it_takes_and_a_try_goes_on_where_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    """Beside a fill the rate leaves it a fraction. A tier that fails at the last chunk does not get the first again."""
    store, raw = KeepsAll(tmp_path), valid(2 * CHUNK)
    place, failures = Place(store, REGION, "5" * 32, IDENTITY), [OriginUnavailable("503")]
    record = of(raw)

    async def wait(_: object, length: int) -> None:
        mock_clock.jump(10 * (startup_region.SAVE_SECONDS + 2 * record.size))
        await trio.lowlevel.checkpoint()

    def put_chunk(name: str, data: bytes | bytearray | memoryview) -> None:
        if name.endswith("c/00000001") and failures:
            raise failures.pop()
        KeepsAll.put(store, name, data)

    monkeypatch.setattr(WriteRate, "wait", wait)
    monkeypatch.setattr(startup_region, "AGAIN", 0.0)
    monkeypatch.setattr(store, "put", put_chunk)
    pack = tmp_path / "pack"
    pack.write_bytes(raw)
    region, over = regional(store), trio.Event()
    save_it = region._save

    async def save_and_say(save: Any) -> bool:
        if done := await save_it(save):
            over.set()
        return done

    monkeypatch.setattr(region, "_save", save_and_say)
    async with trio.open_nursery() as nursery:
        await nursery.start(region.run)
        region.put("p", place, record, os.open(pack, os.O_RDONLY))
        await over.wait()
        nursery.cancel_scope.cancel()
    assert [name[-8:] for name in store.puts] == ["00000000", "00000001", "00000002"]
    assert b"".join(place.read(record)) == raw


async def test_of_saves_of_one_key_that_wait_only_the_last_is_written_to_the_region(tmp_path: Path) -> None:
    store = KeepsAll(tmp_path)
    place, other = (Place(store, REGION, "5" * 32, {**IDENTITY, "arguments": word}) for word in ("a", "b"))
    region = regional(store)
    (tmp_path / "packs").mkdir()
    for at, (where, size) in enumerate([(place, 10), (other, 20), (place, 30)]):
        pack = tmp_path / "packs" / str(at)
        pack.write_bytes(valid(size))
        region.put("p", where, of(valid(size)), os.open(pack, os.O_RDONLY))
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            await nursery.start(region.run)
            while not place.entries():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert [found.record.size for found in place.entries()] == [len(valid(30))]
    assert [found.record.size for found in other.entries()] == [len(valid(20))]
    assert region._newest == {}


class Fails(DirectoryStore):
    """Takes nothing while it fails. ``refused``: how often it was asked to."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.fails = True
        self.refused = 0

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        if self.fails:
            self.refused += 1
            raise OriginUnavailable("503")
        super().put(name, data)


async def test_a_save_that_is_to_be_tried_again_holds_up_no_other_and_is_withdrawn_without_a_trace(
    tmp_path: Path,
) -> None:
    assert startup_region.AGAIN > 40
    store = Fails(tmp_path)
    failing = Place(store, REGION, "5" * 32, IDENTITY)
    other = Place(DirectoryStore(str(tmp_path)), REGION, "5" * 32, {**IDENTITY, "arguments": "b"})
    region = regional(store)
    (tmp_path / "packs").mkdir()
    fds = []
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            await nursery.start(region.run)
            for at, where in enumerate((failing, other)):
                pack = tmp_path / "packs" / str(at)
                pack.write_bytes(valid(10))
                fds.append(os.open(pack, os.O_RDONLY))
                region.put("p", where, of(valid(10)), fds[-1])
            while not other.entries() or set(region._newest) != {failing.name}:  # that one is to be tried again
                await trio.sleep(0.01)
            assert store.refused
            store.fails = False
            await region.remove(failing)
            region._queue.send_nowait(region._newest[failing.name])  # its pause is over
            while region._newest:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert failing.entries() == [] and region._saves == set() and region._removed == {}
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


async def test_a_save_that_was_withdrawn_before_its_turn_leaves_nothing_in_memory(tmp_path: Path) -> None:
    store = KeepsAll(tmp_path)
    place = Place(store, REGION, "5" * 32, IDENTITY)
    region = regional(store)
    (tmp_path / "pack").write_bytes(valid(10))
    region.put("p", place, of(valid(10)), os.open(tmp_path / "pack", os.O_RDONLY))
    await region.remove(place)
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            await nursery.start(region.run)
            while region._newest:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert store.puts == [] and place.entries() == []


def regional(store: DirectoryStore, *users: str) -> RegionalStartups:
    async def may_use(*_: object) -> bool:
        return True

    settings = RegionSettings("here", REGION, (store,), (REGION,), rate=WriteRate(None))
    return RegionalStartups(settings, users, lambda _: "5" * 32, may_use)


async def test_a_user_database_that_hangs_holds_no_start_of_the_daemon_up_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(startup_region, "USERS_SECONDS", 0.05)
    answers, known = threading.Event(), pwd.getpwnam

    def hangs(user: str) -> pwd.struct_passwd:
        answers.wait(50)
        return known(user)

    monkeypatch.setattr(pwd, "getpwnam", hangs)
    region = regional(DirectoryStore(str(tmp_path)), "root", "7")
    async with trio.open_nursery() as nursery:
        with trio.fail_after(40):
            await nursery.start(region.run)
        assert region._users == {7: "7"} and "user database" in caplog.text and "root" in caplog.text
        answers.set()
        with trio.fail_after(40):
            while 0 not in region._users:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_store_that_hangs_while_a_cache_is_saved_in_the_region_holds_no_end_of_the_daemon_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, over = threading.Event(), threading.Event()

    def hangs(*_: object) -> bytes:
        reads.set()
        over.wait(50)
        return b""

    (tmp_path / "pack").write_bytes(PACK)
    region = regional(DirectoryStore(str(tmp_path)))
    descriptor = os.open(tmp_path / "pack", os.O_RDONLY)
    place = Place(DirectoryStore(str(tmp_path)), REGION, "5" * 32, IDENTITY)
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            await nursery.start(region.run)
            monkeypatch.setattr(os, "pread", hangs)
            region.put("p", place, of(PACK), descriptor)
            while not reads.is_set():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert not over.is_set()
    over.set()
