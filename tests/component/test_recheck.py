"""Asking the hub again whether a pipeline's token is still good, and what follows. A real library and a hub with gated
and private repositories; the clock is the test's. tests/unit/test_access_plan.py has what is decided."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from instantstart_fs.core.access import CONFIRM_SECONDS, REFUSED_SECONDS
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.sight import ANYBODY, EVERYTHING, Sight
from instantstart_fs.errors import AccessRefused, CredentialsUnusable, NoSuchEntry, OriginHidden, OriginUnavailable
from instantstart_fs.library import Library
from instantstart_fs.upkeep.access_recheck import Rechecker
from instantstart_fs.vfs import ROOT
from tests.component.hub_library import hub_library
from tests.component.test_full_store import Clock
from tests.component.test_library import MIB, find, make_source, read_all, spec, wait_state
from tests.component.test_update import bodies
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(90)

SHARD = "model-1-of-2.safetensors"
DAY = 86400.0


class World:
    def __init__(self, root: Path, hub: HubServer) -> None:
        self.root, self.hub, self.clock = root, hub, Clock()
        self.source = make_source(root / "source")
        self.token = root / "token"
        self.token.touch(0o600)
        self.token.write_text("hf_mine\n")
        self.lets_in("hf_mine")

    def lets_in(self, *tokens: str, **more: Any) -> None:
        self.hub.publish("org/recheck", self.source, tokens=list(tokens), **{"gated": True, **more})

    @asynccontextmanager
    async def running(self, on_refusal: Any = "hide") -> AsyncIterator[Library]:
        origins = {"recheck_access": DAY, "on_refusal": on_refusal}
        clock = {"now_ns": self.clock.now_ns, "boot": self.clock.boot}
        async with hub_library(self.root, self.hub, origins=origins, **clock) as library:
            yield library

    async def warm(self, library: Library) -> None:
        models = (ModelSpec(source="hf://org/recheck"),)
        await library.admin.add(PipelineSpec(id="p", models=models, token_file=str(self.token)))
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        self.hub.forget_requests()

    async def refused(self, library: Library) -> None:
        """The account loses its access; the day passes, and then the minute."""
        self.lets_in("hf_other")
        await self.later(library, DAY)
        await self.later(library, CONFIRM_SECONDS)

    async def later(self, library: Library, seconds: float) -> None:
        self.clock.passes(seconds)
        await rechecker(library).run_once()


@pytest.fixture
def world(tmp_path: Path, hub: HubServer) -> World:
    return World(tmp_path, hub)


def rechecker(library: Library) -> Rechecker:
    assert library.rechecker is not None
    return library.rechecker


def names(library: Library, *below: str) -> list[str]:
    return [name for name in library.mounted.list_directory(find(library, *below)) if not name.startswith(".")]


async def test_what_its_origin_refuses_twice_goes_out_of_view_and_comes_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.running() as library:
        await world.warm(library)
        root, shard = find(library, "p"), find(library, "p", SHARD)
        held = await library.mounted.open(shard)
        world.lets_in("hf_other")
        await world.later(library, 0.8 * DAY)
        assert not world.hub.requests(), "asked before its time"
        await world.later(library, 0.2 * DAY)
        assert "p" in names(library), "one 403 is no verdict"
        assert await read_all(library, "p", SHARD) == (world.source / SHARD).read_bytes()
        status = library.pipelines.status("p")
        assert status.access is not None and (status.state, status.access.verdict) == ("warm", "allowed")
        assert status.access.trouble is not None and status.access.trouble.startswith("access-refused: ")

        with caplog.at_level(logging.INFO):
            await world.later(library, CONFIRM_SECONDS)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1 and "out of view" in errors[0].message and "hf_" not in errors[0].message
        # Neither listed nor found, also by who has its directory (a container), or knows the file's nodeid.
        assert names(library) == [] and names(library, ".warm") == names(library, ".cold") == []
        for directory, name in ((ROOT, "p"), (find(library, ".warm"), "p"), (find(library, ".cold"), "p")):
            with pytest.raises(NoSuchEntry):
                library.mounted.lookup(directory, name)
        for what in (lambda: library.mounted.list_directory(root), lambda: library.mounted.lookup(root, SHARD)):
            with pytest.raises(AccessRefused):
                what()
        assert not library.mounted.keeps_listing(root)
        with pytest.raises(AccessRefused):
            await library.mounted.open(shard)
        with pytest.raises(AccessRefused):
            library.mounted.open_nowait(shard)
        assert library.bindings.files("p") == {}
        # Nor by another door, but to its owner, and to those who administer.
        owner = library.pipelines.spec("p").uid
        assert not library.pipelines.shown_to("p", ANYBODY) and not library.pipelines.shown_to(
            "p", Sight(False, owner + 1, frozenset())
        )
        assert library.pipelines.shown_to("p", EVERYTHING) and library.pipelines.shown_to(
            "p", Sight(False, owner, frozenset())
        )
        with pytest.raises(AccessRefused):
            await library.warming.warm("p")
        with pytest.raises(AccessRefused):
            async with library.leases.opening("p", {}):
                pass
        # Who has it open keeps it.
        buffer = bytearray(1000)
        assert await library.mounted.read_into(held, 0, memoryview(buffer)) == 1000
        assert buffer == (world.source / SHARD).read_bytes()[:1000]
        library.mounted.release(held)
        status = library.pipelines.status("p")
        assert status.state == "error" and status.error is not None and status.access is not None
        assert (status.error.code, status.access.verdict) == ("access-refused", "refused")
        assert status.cached_bytes == status.total_bytes
        store_summary = await library.snapshots.store_summary()
        assert store_summary.access == {"allowed": 0, "refused": 1, "unknown": 0}
        assert library.telemetry.totals.access_checks == {"allowed": 1, "refused": 2}

        # Access comes back: it is noticed within a quarter of an hour, and nothing has to be fetched.
        world.lets_in("hf_mine")
        await world.later(library, REFUSED_SECONDS)
        assert names(library) == ["p"]
        assert SHARD in library.bindings.files("p")
        assert library.pipelines.status("p").state == "warm" and library.pipelines.status("p").error is None
        assert await read_all(library, "p", SHARD) == (world.source / SHARD).read_bytes()
        assert not bodies(world.hub)


async def test_a_private_repository_that_is_not_shown_any_more_is_a_refusal(world: World) -> None:
    """The hub says 404 then."""
    async with world.running() as library:
        await world.warm(library)
        world.lets_in("hf_other", gated=False, private=True)
        await world.later(library, DAY)
        await world.later(library, CONFIRM_SECONDS)
        assert names(library) == []
        with pytest.raises(OriginHidden):
            await library.admin.check_access("p")


async def test_an_outage_and_unusable_credentials_refuse_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.running() as library:
        await world.warm(library)
        os.chmod(world.token, 0o644)
        with caplog.at_level(logging.WARNING):
            for _ in range(4):
                await world.later(library, DAY)
        assert names(library) == ["p"]
        assert sum("no answer" in record.message for record in caplog.records) == 1, "once is enough"
        assert not world.hub.requests(), "what others can read is shown to nobody"
        with pytest.raises(CredentialsUnusable):
            await library.admin.check_access("p")
        os.chmod(world.token, 0o600)
        world.hub.kill()
        try:
            for _ in range(3):
                await world.later(library, DAY)
            with pytest.raises(OriginUnavailable):
                await library.admin.check_access("p")
        finally:
            world.hub.restart()
        assert names(library) == ["p"] and library.pipelines.status("p").state == "warm"
        status = library.pipelines.status("p").access
        assert status is not None and status.verdict == "allowed" and status.trouble is not None
        assert (await library.snapshots.store_summary()).access == {"allowed": 0, "refused": 0, "unknown": 1}
        assert await read_all(library, "p", SHARD) == (world.source / SHARD).read_bytes()
        await world.later(library, DAY)
        assert (await library.snapshots.store_summary()).access == {"allowed": 1, "refused": 0, "unknown": 0}


async def test_a_restart_shows_nothing_that_was_refused_though_nobody_can_be_asked(world: World) -> None:
    async with world.running() as library:
        await world.warm(library)
        await world.refused(library)
    world.hub.kill()
    try:
        async with world.running() as library:
            assert names(library) == []
            assert library.pipelines.status("p").state == "error"
            await world.later(library, DAY)
            assert names(library) == [], "an outage does not make up for a refusal"
    finally:
        world.hub.restart()
    world.lets_in("hf_mine")
    async with world.running() as library:
        await library.admin.check_access("p")  # `verify --access` need not wait for the next check
        assert names(library) == ["p"] and library.pipelines.status("p").state == "warm"


async def test_an_update_with_a_new_token_brings_it_back(world: World) -> None:
    async with world.running() as library:
        await world.warm(library)
        await world.refused(library)
        assert names(library) == []
        with pytest.raises(AccessRefused):
            await library.admin.update("p")
        world.token.write_text("hf_other\n")
        await library.admin.update("p")
        assert names(library) == ["p"] and library.pipelines.status("p").state == "warm"


async def test_told_of_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """`on_refusal = "report"`"""
    async with world.running("report") as library:
        await world.warm(library)
        with caplog.at_level(logging.ERROR):
            await world.refused(library)
            await world.later(library, REFUSED_SECONDS)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert names(library) == ["p"]
        status = library.pipelines.status("p")
        assert status.access is not None and (status.state, status.access.verdict) == ("warm", "refused")
        assert (await library.snapshots.store_summary()).access == {"allowed": 0, "refused": 1, "unknown": 0}
        assert await read_all(library, "p", SHARD) == (world.source / SHARD).read_bytes()


async def test_a_fill_of_what_is_refused_ends(world: World) -> None:
    async with world.running() as library:
        models = (ModelSpec(source="hf://org/recheck"),)
        await library.admin.add(PipelineSpec(id="p", models=models, token_file=str(world.token)))
        world.hub.fault("bandwidth", port="cdn", rate=MIB // 8)
        await library.warming.warm("p")
        with trio.fail_after(10):
            while not library.pipelines.status("p").fill:
                await library.pipelines.wait_changed("p", 1.0)
        await world.refused(library)
        with trio.fail_after(10):
            while library.pipelines.status("p").fill:
                await library.pipelines.wait_changed("p", 0.2)
        world.hub.clear()


async def test_who_has_nobody_to_ask_is_not_asked_about(world: World) -> None:
    async with world.running() as library:
        await library.admin.add(spec("plain", world.source))
        await world.later(library, 3 * DAY)
        status = library.pipelines.status("plain")
        assert status.access is None
        assert library.telemetry.totals.access_checks == {}


async def test_the_daemons_own_loop_asks(world: World) -> None:
    """What was due when the daemon was down is asked for at its start."""
    async with world.running() as library:
        await world.warm(library)
    world.clock.passes(2 * DAY)
    async with world.running() as library:
        with trio.fail_after(20):
            while not library.telemetry.totals.access_checks:
                await library.pipelines.wait_changed("p", 0.5)
        assert library.telemetry.totals.access_checks == {"allowed": 1}
