"""What `instantstart regional gc` removes, and what it leaves alone, in a shared directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instantstart_fs.errors import OriginUnavailable
from instantstart_fs.regional import hygiene, records
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.hygiene import Rules, SlotSummary, chosen
from instantstart_fs.regional.keys import RegionKey, keyed_digest

DAY = 86_400.0
NOW = 100 * DAY


def slot(number: int, days: float, size: int = 10, claimed: float = 0.0) -> SlotSummary:
    return SlotSummary(f"{number:032x}", bytes=size, used=NOW - days * DAY, claimed=claimed)


def numbers(found: list[SlotSummary]) -> list[int]:
    return [int(one.slot, 16) for one in found]


def test_watermarks_are_as_a_hosts() -> None:
    """Above the high one, what was used longest ago goes until the low one; what is hot never does."""
    slots = [slot(1, 1), slot(2, 9), slot(3, 5), slot(4, 7), slot(5, 3)]
    assert numbers(chosen(slots, Rules(2 * DAY, 60), NOW)) == []
    assert numbers(chosen(slots, Rules(2 * DAY, 50), NOW)) == [2]
    assert numbers(chosen(slots, Rules(2 * DAY, 40), NOW)) == [2, 4]
    assert numbers(chosen(slots, Rules(2 * DAY, 1), NOW)) == [2, 4, 3, 5]
    assert numbers(chosen(slots, Rules(2 * DAY), NOW)) == [2, 4, 3, 5]


def test_what_a_host_fills_stays() -> None:
    slots = [slot(1, 9, claimed=NOW - 5), slot(2, 9), slot(3, 9, claimed=NOW - 2 * DAY)]
    assert numbers(chosen(slots, Rules(0.0, filling=frozenset({slots[1].slot})), NOW)) == [3]


SLOT, OTHER = "a" * 32, "b" * 32
PIN = "c" * 32


@pytest.fixture
def tier(tmp_path: Path) -> Callable[..., Path]:
    """A file of the tier, so many seconds old."""

    def put(name: str, age: float, data: bytes = b"x") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    return put


def test_what_dead_writers_left_goes(tier: Callable[..., Path], tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    kept = [
        tier(f"v1/{SLOT}/{PIN}/c/00000000", 60),
        tier(f"v1/{SLOT}/{PIN}/c/.tmp-0123", 60),
        tier(f"v1/{SLOT}/{PIN}/k/00000000.0000", 60),
        tier(f"v1/hosts/{'d' * 32}.{'e' * 16}", 600),
    ]
    gone = [
        tier(f"v1/{SLOT}/{PIN}/c/.tmp-4567", 2 * 3600, b"half a chunk"),
        tier(f"v1/{SLOT}/{PIN}/k/00000001.0000", 2 * 3600),
        tier(f"v1/hosts/{'f' * 32}.{'e' * 16}", 2 * DAY),
        tier("v1/probe/0123", 2 * 3600),
    ]
    found = hygiene.collect(store, Rules(DAY))
    assert (found.slots, found.claims, found.left, found.hosts) == (0, 1, 2, 1)
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in gone if path.exists()] == []


def test_gc_tells_how_far_it_is_and_removes_seals_first(tier: Callable[..., Path], tmp_path: Path) -> None:
    for number in range(30):
        tier(f"v1/{SLOT}/{PIN}/c/{number:08x}", 2 * DAY, bytes(100))
    tier(f"v1/{SLOT}/{PIN}/seal", 2 * DAY, bytes(10))
    tier(f"v1/{OTHER}/{PIN}/c/00000000", 3600, bytes(100))
    deleted: list[str] = []

    class Store(DirectoryStore):
        def delete(self, name: str) -> None:
            deleted.append(name)
            super().delete(name)

    told: list[tuple[int, int]] = []
    found = hygiene.collect(Store(str(tmp_path)), Rules(DAY), lambda done, size: told.append((done, size)))
    assert (found.slots, found.objects, found.bytes) == (1, 31, 3010)
    assert next(name for name in deleted if not name.startswith("v1/probe/")).endswith("/seal")
    assert told[-1] == (3010, 3010) and told == sorted(told)
    assert (tmp_path / f"v1/{OTHER}/{PIN}/c/00000000").exists()


def test_a_slot_that_is_written_meanwhile_stays(tier: Callable[..., Path], tmp_path: Path) -> None:
    tier(f"v1/{SLOT}/{PIN}/c/00000000", 2 * DAY)
    tier(f"v1/{OTHER}/{PIN}/c/00000000", 3 * DAY)

    class Store(DirectoryStore):
        def delete(self, name: str) -> None:
            super().delete(name)
            if name.startswith(f"v1/{OTHER}"):  # a host begins to fill the next one
                tier(f"v1/{SLOT}/{PIN}/k/00000000.0000", 0)

    found = hygiene.collect(Store(str(tmp_path)), Rules(DAY))
    assert (found.slots, found.kept_in_use) == (1, 1)
    assert (tmp_path / f"v1/{SLOT}/{PIN}/c/00000000").exists()


def test_a_time_in_the_future_keeps_nothing_for_ever(tier: Callable[..., Path], tmp_path: Path) -> None:
    """On a share anybody who writes there may set one; so may a server whose clock was wrong."""
    ahead = -400 * DAY
    gone = [
        tier(f"v1/{SLOT}/{PIN}/c/00000000", 2 * DAY),
        tier(f"v1/{SLOT}/{PIN}/c/00000001", ahead),
        tier(f"v1/{SLOT}/{PIN}/k/00000000.0000", ahead),
        tier(f"v1/{OTHER}/{PIN}/k/00000000.0000", ahead),
        tier(f"v1/hosts/{'f' * 32}.{'e' * 16}", ahead),
        tier("v1/probe/0123", ahead),
    ]
    kept = tier(f"v1/{OTHER}/{PIN}/c/00000000", 60)
    found = hygiene.collect(DirectoryStore(str(tmp_path)), Rules(DAY))
    assert (found.slots, found.claims, found.left, found.hosts) == (1, 1, 1, 1)
    assert [path for path in gone if path.exists()] == []
    assert kept.exists()


KEY = RegionKey(b"k" * 32)


def chunk(number: int, body: bytes, pin: str = PIN) -> bytes:
    return keyed_digest(KEY.chunk_key(pin, number, len(body)), body) + body


@pytest.mark.parametrize("filled", ["", "claimed", "written"])
def test_what_no_host_has_proven_is_counted_and_goes_when_told_so(
    tier: Callable[..., Path], tmp_path: Path, filled: str
) -> None:
    """A host that died before its hash, or found its bytes wrong and could not remove them, leaves chunks with a valid
    digest. Those of a running fill look the same, but for their age."""
    sealed = "d" * 32
    tier(f"v1/{SLOT}/{sealed}/c/00000000", DAY, chunk(0, b"proven", sealed))
    name = records.seal_name(SLOT, sealed)
    digest = keyed_digest(KEY.chunk_key(sealed, 0, 6), b"proven")
    tier(name, DAY, records.pack(KEY, "seal", name, records.Seal(6, 8, digest, "size", "there", 0.0)))
    left = tier(f"v1/{SLOT}/{PIN}/c/00000000", DAY, chunk(0, b"who knows"))
    wrong = tier(f"v1/{SLOT}/{PIN}/c/00000001", DAY, chunk(0, b"another's"))
    if filled:
        tier(f"v1/{SLOT}/{PIN}/k/00000000.0000" if filled == "claimed" else f"v1/{SLOT}/{PIN}/c/00000002", 5, b"")
    found = hygiene.verify(DirectoryStore(str(tmp_path)), KEY, SLOT)
    assert (found.chunks, found.unproven, found.dropped) == (3 + (filled == "written"), 1, 0)
    assert f"v1/{SLOT}/{PIN}/c/00000001" in found.damaged and not wrong.exists() and left.exists()
    if filled == "written":
        tier(f"v1/{SLOT}/{PIN}/c/00000002", 5, chunk(2, b"new"))
    found = hygiene.verify(DirectoryStore(str(tmp_path)), KEY, SLOT, drop_unproven=True)
    assert found.damaged == [] and (found.dropped > 0) == (not filled) == (not left.exists())
    assert hygiene.verify(DirectoryStore(str(tmp_path)), KEY, SLOT).chunks >= 1, "what is proven stays"


def test_a_tier_that_fails_while_it_is_verified_loses_nothing(tier: Callable[..., Path], tmp_path: Path) -> None:
    name = records.seal_name(SLOT, PIN)
    digest = keyed_digest(KEY.chunk_key(PIN, 0, 6), b"proven")
    seal = tier(name, DAY, records.pack(KEY, "seal", name, records.Seal(6, 8, digest, "size", "there", 0.0)))
    kept = tier(f"v1/{SLOT}/{PIN}/c/00000000", DAY, chunk(0, b"proven"))

    class Store(DirectoryStore):
        fails = "/c/"

        def get(self, name: str, most: int) -> bytes:
            if self.fails in name:
                raise OriginUnavailable("503")
            return super().get(name, most)

    for Store.fails in ("/c/", "/seal"):
        with pytest.raises(OriginUnavailable):
            hygiene.verify(Store(str(tmp_path)), KEY, SLOT)
    assert kept.exists() and seal.exists()
