"""What the region's seal had proven is proven no more once some of it was lost: filler/completion.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.errors import StoreDamaged
from instantstart_fs.filler.completion import Completion


def nothing(*_: object, **__: object) -> list[object]:
    return []


def test_a_file_proven_by_the_region_that_lost_chunks_is_hashed_here() -> None:
    """They come anew, perhaps from the origin: no seal speaks of those bytes."""
    sealed: list[str] = []
    opened: list[object] = []
    present = ChunkMap(16, 8)
    for chunk in (0, 1):
        present.add(chunk)
    file = SimpleNamespace(digest=SimpleNamespace(algorithm="sha256", value="x" * 64))
    target = SimpleNamespace(
        present=present, durable=ChunkMap(16, 8), losses=0, entry=SimpleNamespace(path="f", file=file)
    )
    target.key, target.blob, target.proven_by, target.error = SimpleNamespace(pipeline="p"), 1, "", None
    fill = SimpleNamespace(done=False, sealing=False, target=target, proven_by="region:there", hashed=None)
    fill.unhashed, fill.requests, fill.unsent, fill.worker = True, set(), [], None
    parts: dict[str, Any] = {
        "plan": SimpleNamespace(refill=nothing, failed=nothing),
        "table": SimpleNamespace(
            find=lambda _: fill,
            keys=nothing,
            stream_ended=nothing,
            demand_again=nothing,
            wakeup=SimpleNamespace(set=nothing),
        ),
        "delivery": SimpleNamespace(close_in_worker=nothing, finish=nothing, schedule_open=opened.append),
        "origin_backoff": SimpleNamespace(hold=nothing),
        "quarantine": None,
        "space": None,
    }
    settings, events = SimpleNamespace(commit_bytes=1, commit_seconds=1.0), SimpleNamespace(failure=nothing)
    completion = Completion(cast(Any, None), cast(Any, None), cast(Any, settings), cast(Any, events), **parts)
    completion.committer = cast(
        Any, SimpleNamespace(seal=lambda target, _: sealed.append(target.proven_by), discard_dirty=nothing)
    )
    completion.check(cast(Any, fill))
    assert sealed == ["region:there"]
    completion.on_lost(cast(Any, target), StoreDamaged("sync f: input/output error"))
    for chunk in (0, 1):
        present.add(chunk)
    completion.check(cast(Any, fill))
    assert sealed == ["region:there"], "the second time it is not believed"
    assert opened == [fill] and not fill.unhashed, "it is to be hashed"
