"""Records of a tier that cannot be had cost their own file the tier, and no other one (filler/region_claims.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.region import Patience, PullPlan
from instantstart_fs.errors import AccessRefused, InstantStartError, OriginUnavailable
from instantstart_fs.filler import region_claims
from instantstart_fs.filler.region_claims import MOST_ASKED, MOST_FOLLOWED
from instantstart_fs.filler.region_follow import Follow
from instantstart_fs.filler.regional import Regional
from instantstart_fs.filler.target import FileKey
from instantstart_fs.regional.directory import DirectoryStore
from tests.component.region_site import CHUNK, RegionSite, Source, region

pytestmark = pytest.mark.timeout(60)


class Odd(DirectoryStore):
    """It fails where a name of ``bad`` is asked for. All else works."""

    def __init__(self, directory: str, error: InstantStartError) -> None:
        super().__init__(directory)
        self.bad: set[str] = set()
        self._error = error

    def get(self, name: str, most: int) -> bytes:
        self._fail(name)
        return super().get(name, most)

    def list(self, prefix: str, most: int) -> Any:
        self._fail(prefix)
        return super().list(prefix, most)

    def _fail(self, name: str) -> None:
        if any(name.startswith(bad) for bad in self.bad):
            raise self._error


def follow(site: RegionSite, number: int, data: bytes) -> Follow:
    entry = site.seal("p", data, f"{number}.bin")
    target = SimpleNamespace(
        key=FileKey("p", 1, number), entry=entry, origin=Source(), present=ChunkMap(len(data), CHUNK)
    )
    fill: Any = SimpleNamespace(target=target, worker=None, unhashed=False)
    places = site.places("p", entry, CHUNK)
    return Follow(fill, places, PullPlan("here", places[0].pin, [False] * target.present.chunks, Patience()))


@pytest.mark.parametrize("error", [AccessRefused("403"), OriginUnavailable("400")])
@pytest.mark.parametrize("what", ["seal", ""])
async def test_files_whose_records_alone_fail_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: InstantStartError, what: str
) -> None:
    """Who can write to the bucket can make single objects unreadable. ``what``: the seal, or all of the file."""
    for name in ("RETRY_SECONDS", "LIST_SECONDS", "TURNS_SECONDS"):
        monkeypatch.setattr(region_claims, name, 0.05)
    store = Odd(str(tmp_path), error)
    async with region(tmp_path, store) as site:
        site.slots["p"] = "a" * 32
        odd = [follow(site, number, bytes(9 * CHUNK)) for number in range(MOST_ASKED + MOST_FOLLOWED)]
        good = follow(site, 99, bytes(9 * CHUNK))
        store.bad = {f"v1/{one.slot}/{one.pin}/{what}" for one in odd}
        for one in (*odd, good):
            site.claims.start(one)
        with trio.fail_after(30):
            while good.state != "sealed" or any(one.state in ("waiting", "asking") for one in odd):
                await trio.sleep(0.005)
        if isinstance(error, AccessRefused) or not what:
            with trio.fail_after(30):
                while any(one.state != "off" for one in odd):
                    await trio.sleep(0.005)
        assert good.state == "sealed"


def test_what_comes_from_elsewhere_ends_the_tiers_request_for_it(tmp_path: Path) -> None:
    """A server that ignores ranges streams the file: the piece of the tier must not go on writing."""
    stopped: list[object] = []
    nothing: Any = SimpleNamespace(arrived=lambda *_: None, wakeup=trio.Event())
    delivery: Any = SimpleNamespace(stop_request=stopped.append)
    site = RegionSite(tmp_path, write_back=False)
    site.slots["p"] = "a" * 32
    regional = Regional(site.settings, lambda *_: "a" * 32, nothing, nothing, delivery, serve_verified=True)
    one = follow(site, 0, bytes(2 * CHUNK))
    regional._follows[one.key] = one
    piece: Any = SimpleNamespace(piece=object(), digest=b"", answered=None)
    stream: Any = SimpleNamespace(piece=None, answered=None)
    for chunk in range(2):
        one.flights[chunk] = (piece, 0.0, 0)
    regional.came(one.fill, 0, stream)
    assert stopped == [piece] and not one.digests and not one.proven, "nothing is proven of what the stream brought"
    regional.came(one.fill, 1, piece)
    assert stopped == [piece] and not one.flights
