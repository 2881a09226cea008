"""Startup caches in the daemon, over a real store and index: whatever is wrong with them is a start without one, and
what is being saved counts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest
import trio

from instantstart_fs.core.startupcache import MAX_FIELDS, StartupRecord
from instantstart_fs.core.startuppack import Entry, encode_index
from instantstart_fs.errors import DigestMismatch, StoreReadOnly
from instantstart_fs.library import Library
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
