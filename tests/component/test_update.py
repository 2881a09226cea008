"""update: what has not changed is not fetched again, and what was bad does not become good by it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from instantstart_fs.admin.lifecycle import Lifecycle
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import InstantStartError, StoreDamaged
from instantstart_fs.library import Library
from tests.component.hub_library import hub_library
from tests.component.test_library import MIB, find, make_source, read_all, running, spec, wait_gone, wait_state
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(90)

SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
HUB_SPEC = PipelineSpec(id="p", models=(ModelSpec(source="hf://org/update"),))


@asynccontextmanager
async def from_hub(root: Path, hub: HubServer, *, held: Sequence[int] = ()) -> AsyncIterator[Library]:
    async with hub_library(root, hub, held=held) as library:
        yield library


def bodies(hub: HubServer) -> dict[str, int]:
    """Bytes of files that the hub and its CDN sent, by the file asked for."""
    sent: dict[str, int] = {}
    for request in hub.requests():
        if request.sent:
            name = request.path.rpartition("/")[2]
            sent[name] = sent.get(name, 0) + request.sent
    return sent


def published(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    """A model on the hub, warm nowhere, and a copy of it with another configuration and one more file."""
    old, new = make_source(tmp_path / "old"), tmp_path / "new"
    shutil.copytree(old, new)
    (new / "config.json").write_bytes(b'{"a": 2}')
    (new / "added.json").write_bytes(b"{}")
    hub.publish("org/update", old)
    return old, new


async def test_only_what_has_changed_is_fetched_again(tmp_path: Path, hub: HubServer) -> None:
    """Counted at the origin: after an update that changes a configuration file not a byte of the weights is asked for,
    while they are held open and after, by the daemon that made the update and by the next one."""
    old, new = published(hub, tmp_path)
    async with from_hub(tmp_path, hub) as library:
        await library.admin.add(HUB_SPEC)
        await library.warming.warm("p", everything=True)
        await wait_state(library, "p", "warm")
        await library.warming.warm("p", everything=True)
        with trio.fail_after(20):
            while any(file.state != "sealed" for file in library.pipelines.status("p").files or ()):
                await library.pipelines.wait_changed("p", 1.0)
        before = {name: find(library, "p", name) for name in SHARDS}
        held = await library.mounted.open(before[SHARDS[0]])
        allocated = library.inventory.candidates()[0].bytes
        hub.publish("org/update", new)
        hub.forget_requests()
        status = await library.admin.update("p")
        assert (status.generation, status.state) == (2, "partial"), "two files are not here yet"
        assert not bodies(hub), "update itself moves no bytes"
        states = {file.path: file.state for file in status.files or ()}
        assert {path for path, state in states.items() if state != "sealed"} == {"config.json", "added.json"}
        assert library.inventory.candidates()[0].bytes <= allocated, "what both generations share is counted once"
        # The holder of the old generation's file keeps it, under its nodeid; the new one has one of its own.
        buffer = bytearray(1000)
        assert await library.mounted.read_into(held, 2 * MIB, memoryview(buffer)) == 1000
        assert buffer == (old / SHARDS[0]).read_bytes()[2 * MIB : 2 * MIB + 1000]
        for name in SHARDS:
            assert find(library, "p", name) != before[name]
            assert await read_all(library, "p", name) == (new / name).read_bytes()
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        library.mounted.release(held)
        await wait_gone(tmp_path / "store/slots/p/1")
        report = await library.verifier.verify("p", lambda done, total: None)
        assert (report.healed, report.unproven) == ((), ())
        # (The files that went are gone from the disk: nothing keeps their space.)
        assert library.inventory.candidates()[0].bytes <= allocated + 2 * 4096
    async with from_hub(tmp_path, hub) as library:
        assert library.pipelines.status("p").state == "warm"
        for path in new.rglob("*"):
            if path.is_file():
                assert await read_all(library, "p", *path.relative_to(new).parts) == path.read_bytes()
        await library.admin.evict("p")
        assert not os.path.exists(tmp_path / "store/slots/p/2/files")
    assert bodies(hub) == {"config.json": 8, "added.json": 2}


async def test_a_plain_directory_keeps_what_is_the_very_same_file(tmp_path: Path) -> None:
    """Nothing proves such files: they stay where path, inode, length and time are what they were."""
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        changed = source / SHARDS[1]
        changed.write_bytes(os.urandom(changed.stat().st_size))
        status = await library.admin.update("p")
        states = {file.path: file.state for file in status.files or ()}
        assert (states[SHARDS[0]], states[SHARDS[1]]) == ("unverified", "absent")
        for name in SHARDS:
            assert await read_all(library, "p", name) == (source / name).read_bytes()


async def test_an_update_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    async with running(tmp_path) as library:
        await library.admin.add(spec("p", source))
        await library.warming.warm("p")
        await wait_state(library, "p", "unverified")
        (source / "config.json").write_bytes(b'{"a": 2}')

        async def fail(*arguments: object) -> None:
            raise StoreDamaged("the index cannot be written")

        with monkeypatch.context() as patch:
            patch.setattr(Lifecycle, "_record", fail)
            with pytest.raises(StoreDamaged):
                await library.admin.update("p")
        assert sorted(path.name for path in (tmp_path / "store/slots/p").iterdir()) == ["1", "pipeline.json"]
        assert library.pipelines.status("p").generation == 1
        assert (await library.admin.update("p")).generation == 2


async def test_a_generation_held_over_a_restart_shares_and_is_counted_once(tmp_path: Path, hub: HubServer) -> None:
    old, new = published(hub, tmp_path)
    async with from_hub(tmp_path, hub) as library:
        await library.admin.add(HUB_SPEC)
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        held = await library.mounted.open(find(library, "p", SHARDS[0]))
        allocated = library.inventory.candidates()[0].bytes
        hub.publish("org/update", new)
        await library.admin.update("p")
        nodeid = held.nodeid
    async with from_hub(tmp_path, hub, held=[nodeid]) as library:
        assert library.inventory.candidates()[0].bytes <= allocated
        handle = library.mounted.reopen(nodeid)
        buffer = bytearray(1000)
        assert await library.mounted.read_into(handle, MIB, memoryview(buffer)) == 1000
        assert buffer == (old / SHARDS[0]).read_bytes()[MIB : MIB + 1000]
        assert await read_all(library, "p", SHARDS[0]) == (new / SHARDS[0]).read_bytes()
        library.mounted.release(handle)
        await wait_gone(tmp_path / "store/slots/p/1")
        assert library.inventory.candidates()[0].bytes <= allocated


@pytest.mark.parametrize("when", ["before the record", "before the old one is deleted"])
async def test_what_a_crash_in_an_update_leaves(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Crash(Exception):
        pass

    async def crash(*arguments: object) -> None:
        raise Crash

    old, new = published(hub, tmp_path)
    async with from_hub(tmp_path, hub) as library:
        await library.admin.add(HUB_SPEC)
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        hub.publish("org/update", new)
        hub.forget_requests()
        with monkeypatch.context() as patch:
            patch.setattr(Lifecycle, "_record" if when == "before the record" else "drop_generation", crash)
            with pytest.raises(Crash):
                await library.admin.update("p")
    async with from_hub(tmp_path, hub) as library:
        assert library.pipelines.status("p").generation == (1 if when == "before the record" else 2)
        slots = tmp_path / "store/slots/p"
        assert len([path for path in slots.iterdir() if path.is_dir()]) == 1
        assert {path.stat().st_nlink for path in slots.rglob("*.safetensors")} == {1}
        usage = library.inventory.candidates()[0].bytes
        taken = sum(path.stat().st_blocks * 512 for path in slots.glob("*/files/**/*") if path.is_file())
        assert usage == taken, "accounts and disk differ"
        for name in SHARDS:
            assert await read_all(library, "p", name) == (old / name).read_bytes()
        await library.admin.update("p")
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        assert (await library.verifier.verify("p", lambda done, total: None)).healed == ()
    assert set(bodies(hub)) <= {"config.json", "added.json"}


async def found_bad(library: Library, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3 * MIB // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    assert (await library.verifier.verify("p", lambda done, total: None)).healed == (path.name,)


async def test_what_rots_is_dropped_in_every_generation_that_shares_it(tmp_path: Path, hub: HubServer) -> None:
    old, new = published(hub, tmp_path)
    async with from_hub(tmp_path, hub) as library:
        await library.admin.add(HUB_SPEC)
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        held = await library.mounted.open(find(library, "p", SHARDS[0]))
        hub.publish("org/update", new)
        await library.admin.update("p")
        await found_bad(library, tmp_path / "store/slots/p/2/files" / SHARDS[0])
        with pytest.raises(InstantStartError, match="not those that were sealed"):
            await library.mounted.read_into(held, 0, memoryview(bytearray(10)))
        library.mounted.release(held)
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        assert await read_all(library, "p", SHARDS[0]) == (old / SHARDS[0]).read_bytes()


async def test_what_is_found_bad_while_it_is_taken_over_is_bad_there(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = published(hub, tmp_path)
    async with from_hub(tmp_path, hub) as library:
        await library.admin.add(HUB_SPEC)
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        hub.publish("org/update", new)
        record: Callable[..., object] = Lifecycle._record

        async def late(self: Lifecycle, *arguments: object) -> None:
            await found_bad(library, tmp_path / "store/slots/p/1/files" / SHARDS[0])
            await record(self, *arguments)  # type: ignore[misc]

        monkeypatch.setattr(Lifecycle, "_record", late)
        await library.admin.update("p")
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        assert await read_all(library, "p", SHARDS[0]) == (old / SHARDS[0]).read_bytes()
        assert (await library.verifier.verify("p", lambda done, total: None)).healed == ()
