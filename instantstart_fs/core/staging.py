"""Decides what is read ahead into the page cache while an engine loads, when and how much. Pure; mount/staging.py
reads.

An engine that maps its weights faults them in one readahead at a time and leaves a fast disk mostly idle. So the shards
that it is about to read are read ahead for it, in load order, within a budget of memory, a window of whole shards that
moves with what the engine opens and releases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.loadset import natural_key

HOLD_SECONDS = 1.0
"""Seconds. A weight file that is held open for so long is being loaded; shorter looks (file(1), a header's reader) are
not."""
LINGER_SECONDS = 5.0
"""Seconds after the last handle closed in which staging goes on: an engine that opens shard after shard has none open
in between."""
CGROUP_SHARE = 0.8
"""The share of a memory cgroup's rest that staging may use: the engine's own memory, which grows meanwhile, has to fit
as well."""

_NUMBERED = late(r"\d+-of-\d+")


class _Index(msgspec.Struct):
    """The parts of model.safetensors.index.json that are needed."""

    weight_map: dict[str, Any]


_index = msgspec.json.Decoder(_Index)
"""Several times as fast as json.loads, which would hold up every request of the mount: a hostile one is large."""


class Shard(msgspec.Struct, frozen=True):
    """A weight file of the load set. ``index`` in the manifest, ``path`` within the pipeline, ``size`` in bytes,
    ``ready``: all of it lies in the store."""

    index: int
    path: str
    size: int
    ready: bool


class Window(msgspec.Struct, frozen=True):
    """A plan of readahead. ``stage``: (file index, how many bytes from its start) to be read ahead now, in this order;
    ``drop``: indices of staged shards that the engine has gone past, whose reading ahead is over."""

    stage: tuple[tuple[int, int], ...]
    drop: tuple[int, ...]


def staging_budget(available: int, max_memory: int, cgroups_left: Collection[int]) -> int:
    """Bytes that may be staged and not yet released.

    ``available``: MemAvailable. ``max_memory``: the configured limit. ``cgroups_left``: of each enclosing memory
    cgroup, what it may still take before it reclaims what is in use. Page cache counts as available in both, so
    staging does not eat its own budget.
    """
    return max(0, min(available, max_memory, *(int(left * CGROUP_SHARE) for left in cgroups_left)))


def start_time(opened: Collection[int], held_since: float | None) -> float | None:
    """Return when staging starts, on the clock of ``held_since``; None: not as things are; -inf: at once.

    ``opened``: the files opened since the engine came; ``held_since``: when the one that is open was opened.
    """
    if len(opened) >= 2:
        return float("-inf")
    return None if held_since is None else held_since + HOLD_SECONDS


def plan_window(
    shards: Sequence[Shard],
    *,
    opened: Set[int],
    last_opened: int | None,
    done: Set[int],
    staged: Mapping[int, int],
    budget: int,
) -> Window:
    """Return the readahead to do now.

    ``shards`` in load order. ``opened``: file indices that are open now; ``last_opened``: the latest that was opened;
    ``done``: files that need no staging (released, or refused) until they are opened again; ``staged``: index → bytes
    staged or being staged and not released. The window begins at the first shard that is open (at the last one opened
    while none is). So an engine that opens one shard after the other is followed, and one that opens all of them first
    and then reads them in order gets them in that order. The window ends before the first shard that does not fit into
    the budget. A shard that is larger than the whole budget is staged in part when nothing else is.
    """
    positions = {shard.index: position for position, shard in enumerate(shards)}
    held_open = [positions[index] for index in opened if index in positions]
    begin = min(held_open) if held_open else positions.get(last_opened, 0) if last_opened is not None else 0
    passed = tuple(index for index in staged if positions.get(index, -1) < begin)
    held = sum(length for index, length in staged.items() if index not in passed)
    wanted: list[tuple[int, int]] = []
    for shard in shards[begin:]:
        if shard.index in staged or shard.index in done or not shard.ready or not shard.size:
            continue
        length = shard.size
        if held + length > budget:
            if held or budget <= 0:
                break
            length = budget
        wanted.append((shard.index, length))
        held += length
    return Window(tuple(wanted), passed)


def in_load_order(shards: Sequence[Shard], indexes: Mapping[str, bytes]) -> tuple[Shard, ...]:
    """``shards`` (in the natural order of their names) as an engine reads them. ``indexes``: the content of each
    ``*.index.json``, by its path within the pipeline.

    Shards that are numbered ("00002-of-00005") are read by number by every engine, whatever the index's first tensor is
    ("lm_head.weight", which sorts first, lies in the last one). Otherwise they come as the index names them first; what
    it does not name keeps its place behind them.
    """
    ranks: dict[str, int] = {}
    for path in sorted(indexes, key=natural_key):
        directory = path.rpartition("/")[0]
        for name in _named_by(indexes[path]):
            ranks.setdefault(f"{directory}/{name}" if directory else name, len(ranks))

    def rank(shard: Shard) -> int:
        if _NUMBERED.search(shard.path.rpartition("/")[2]):
            return -1
        return ranks.get(shard.path, len(ranks))

    groups: dict[str, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(shard.path.rpartition("/")[0], []).append(shard)
    return tuple(shard for group in groups.values() for shard in sorted(group, key=rank))


def _named_by(content: bytes) -> list[str]:
    try:
        names = _index.decode(content).weight_map.values()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def needs_index(shards: Sequence[Shard]) -> bool:
    """Whether ``in_load_order`` would look at an index at all."""
    return sum(not _NUMBERED.search(shard.path.rpartition("/")[2]) for shard in shards) > 1
