"""Which chunks a host gives its neighbours, and of which pipelines none (serving/rack_chunks.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.rack import Asked
from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.target import FileState
from instantstart_fs.serving.rack_chunks import NotYet, RackChunks
from tests.component.region_site import CHUNK, KEY, entry_of

DATA = os.urandom(3 * CHUNK - 7)
DIGEST = b"d" * 32


class Host:
    """A host with one pipeline of one file, which is complete; ``fills``: which is being filled, and lacks chunk 2."""

    def __init__(self, directory: Path, *, fills: bool = False) -> None:
        path = directory / "blob"
        path.write_bytes(DATA)
        self._fd = os.open(path, os.O_RDONLY)
        entry = entry_of(DATA)
        spec = PipelineSpec("p", (ModelSpec("hf://org/model"),))
        self.slot = KEY.slot(spec)
        self.pin = KEY.pin(self.slot, entry.path, entry.file, CHUNK)
        self.pipeline = SimpleNamespace(id="p", spec=spec, hidden=None, removed=False)
        self.file = SimpleNamespace(complete=True, stale_error=None, size=len(DATA))
        manifest = SimpleNamespace(chunk_size=CHUNK, files=[entry])
        self.generation: Any = SimpleNamespace(
            pipeline=self.pipeline, number=1, resolved_at_ns=1, files=[self.file], manifest=manifest
        )
        self.digests: dict[int, bytes] = {}
        self.target = SimpleNamespace(
            present=ChunkMap(len(DATA), CHUNK),
            failed=False,
            state=FileState.FILLING,
            blob=SimpleNamespace(fd=self._fd),
            watch=lambda _: None,
            unwatch=lambda _: None,
        )
        for chunk in (0, 1):
            self.target.present.add(chunk)
        key = SimpleNamespace(pipeline="p")
        self.follow = SimpleNamespace(key=key, target=self.target, digests={0: DIGEST}, seals={}, over=lambda: False)
        self.owed: list[int] = []
        level = SimpleNamespace(
            followed=lambda slot, pin: self.follow if fills and (slot, pin) == (self.slot, self.pin) else None,
            owe=lambda _, chunk: self.owed.append(chunk),
            digest=lambda pin, chunk: self.digests.get(chunk, b"") if pin == self.pin else b"",
        )
        self.catalog = SimpleNamespace(pipelines={"p": self.pipeline}, ensure_loaded=self._load)
        opened = SimpleNamespace(duplicate=lambda _: os.dup(self._fd))
        self.chunks = RackChunks(cast(Any, self.catalog), cast(Any, opened), cast(Any, level), KEY)

    async def _load(self, _: object) -> Any:
        if isinstance(self.generation, Exception):
            raise self.generation
        return self.generation

    async def gives(self, chunk: int, *, sealed: bool = True, slot: str = "", pin: str = "", wait: float = 0.0) -> Any:
        """The bytes and the digest; None where it gives nothing."""
        with trio.fail_after(60):
            part = await self.chunks.find(Asked(slot or self.slot, pin or self.pin, chunk, wait, sealed))
        if part is None:
            return None
        try:
            return os.pread(part.fd, part.length, part.offset), part.digest
        finally:
            os.close(part.fd)


async def test_a_complete_file_is_given_to_who_can_prove_it(tmp_path: Path) -> None:
    host = Host(tmp_path)
    for chunk in range(3):
        assert await host.gives(chunk) == (DATA[chunk * CHUNK : (chunk + 1) * CHUNK], b"")
    assert await host.gives(3) is None and await host.gives(1 << 31) is None
    assert await host.gives(0, sealed=False) is None, "the digest is nowhere but in the seal"
    host.digests[0] = DIGEST
    assert await host.gives(0, sealed=False) == (DATA[:CHUNK], DIGEST)
    assert await host.gives(0, slot="ab" * 16) is None and await host.gives(0, pin="ab" * 16) is None


CHANGES: dict[str, Callable[[Host], None]] = {
    "hidden": lambda host: setattr(host.pipeline, "hidden", OriginUnavailable("refused")),
    "removed": lambda host: setattr(host.pipeline, "removed", True),
    "gone": lambda host: host.catalog.pipelines.clear(),
    "not complete": lambda host: setattr(host.file, "complete", False),
    "damaged": lambda host: setattr(host.file, "stale_error", OriginUnavailable("its digest is wrong")),
    "unreadable": lambda host: setattr(host, "generation", InstantStartError("the manifest is gone")),
    "evicted": lambda host: setattr(host, "generation", None),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_what_nobody_may_have_is_not_given(tmp_path: Path, what: str) -> None:
    """A pipeline is hidden when its source refuses its credentials."""
    host = Host(tmp_path)
    assert await host.gives(0) is not None
    CHANGES[what](host)
    assert await host.gives(0) is None


async def test_of_a_file_that_is_filled_what_is_here_and_proven_is_given(tmp_path: Path) -> None:
    host = Host(tmp_path, fills=True)
    host.file.complete = False
    assert await host.gives(0, sealed=False) == (DATA[:CHUNK], DIGEST)
    assert await host.gives(1) == (DATA[CHUNK : 2 * CHUNK], b"")
    for chunk, sealed in ((1, False), (2, True)):  # its digest is not known; it is not here
        with pytest.raises(NotYet):
            await host.gives(chunk, sealed=sealed)
    assert host.owed == [0, 1, 1, 2], "what a neighbour waits for comes from the tier"
    assert await host.gives(3) is None
    host.pipeline.hidden = cast(Any, OriginUnavailable("refused"))
    assert await host.gives(0, sealed=False) is None
