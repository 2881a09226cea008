"""Files that a hub serves itself: one request each; the hub is asked as soon as the answer is not what was pinned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing

from instantstart_fs.config import FillConfig
from instantstart_fs.core.manifest import FileEntry, ManifestFile, ModelSpec, PipelineSpec
from instantstart_fs.filler.sources import ASKED_SECONDS, MOST_WRONG, Locator
from instantstart_fs.origins.base import Location, OriginKey
from tests.component.hub_library import hub_library
from tests.component.test_library import read_all, wait_state
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(90)

REPO = "org/small"
COUNT = 120


def voices(root: Path) -> Path:
    """Many small files, and one that lies on the CDN."""
    for number in range(COUNT):
        path = root / f"voices/voice-{number:03}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"voice": number}))
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    return root


async def warm(root: Path, hub: HubServer, source: Path) -> dict[str, int]:
    """Add and warm it; every byte is compared. How often each file was asked for by HEAD, under its name, and by GET,
    under "GET" and its name."""
    token = root / "token"
    token.touch(0o600)
    token.write_text("hf_mine\n")
    async with hub_library(root, hub, fill={"workers": 2, "connections": FillConfig().connections}) as library:
        models = (ModelSpec(source=f"hf://{REPO}"),)
        await library.admin.add(PipelineSpec(id="p", models=models, token_file=str(token)))
        hub.forget_requests()
        await library.warming.warm("p")
        await wait_state(library, "p", "warm")
        requests = hub.requests()
        for path in source.rglob("*"):
            if path.is_file():
                parts = path.relative_to(source).parts
                assert await read_all(library, "p", *parts) == path.read_bytes()
    assert not [request for request in requests if request.port == "cdn" and request.token], "the hub's alone"
    asked = [request for request in requests if request.port == "hub"]
    assert {request.token for request in asked} == {"hf_mine"}
    names = [(request.method, request.path.rpartition("/")[2]) for request in asked]
    return Counter(name if method == "HEAD" else f"{method} {name}" for method, name in names)


@pytest.fixture
def source(hub: HubServer, tmp_path: Path) -> Path:
    directory = voices(tmp_path / "source")
    hub.publish(REPO, directory, gated=True, tokens=["hf_mine"])
    return directory


async def test_a_small_file_costs_one_request(hub: HubServer, source: Path, tmp_path: Path) -> None:
    asked = await warm(tmp_path, hub, source)
    assert asked == {f"GET voice-{number:03}.json": 1 for number in range(COUNT)} | {"model.safetensors": 1}


async def test_a_hub_that_redirects_within_itself_is_followed(hub: HubServer, source: Path, tmp_path: Path) -> None:
    commit = hub.publish(REPO, source, gated=True, tokens=["hf_mine"])
    place = f"/{REPO}/resolve/{commit}/voices/voice-007.json"
    hub.fault("status", port="hub", method="GET", path=place, status=307, headers={"Location": place}, count=1)
    asked = await warm(tmp_path, hub, source)
    assert asked["GET voice-007.json"] == 2 and asked["voice-007.json"] == 0


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418, 302])
async def test_what_is_not_where_it_was_foreseen_is_asked_for(
    hub: HubServer, source: Path, tmp_path: Path, status: int
) -> None:
    hub.fault("status", port="hub", method="GET", path="voice-007.json", status=status, count=1)
    asked = await warm(tmp_path, hub, source)
    assert asked["GET voice-007.json"] == 2 and asked["voice-007.json"] == 1, "its own answer is not the last word"


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


class Link:
    """Of a hub that says of itself what it was asked."""

    key = OriginKey("hf", "hub", "")

    def foresee(self, file: ManifestFile) -> Location | None:
        return Location("http://hub/foreseen") if file.size else None

    def locate(self, file: ManifestFile) -> Location:
        return Location("http://hub/asked")


async def test_an_origin_that_is_foreseen_wrongly_is_asked_for_a_while(clock: trio.testing.MockClock) -> None:
    locator, link = Locator(5.0), Link()
    entry = FileEntry(0, 0, "f", ManifestFile("f", 3, "f", "c"))

    async def where(entry: FileEntry = entry, *, foresee: bool = True) -> str:
        return (await locator.locate(link, entry, "p", foresee=foresee)).url.rpartition("/")[2]

    assert await where() == "foreseen"
    assert await where(foresee=False) == "asked"
    assert await where(FileEntry(1, 0, "e", ManifestFile("e", 0, "e", "c"))) == "asked", "what it cannot foresee"
    for rightly in (False, True, *[False] * (MOST_WRONG - 1)):
        locator.foresaw(link.key, "p", rightly=rightly)
    assert await where() == "foreseen", "once in a while is no reason"
    locator.foresaw(link.key, "p", rightly=False)
    assert await where() == "asked"
    clock.jump(ASKED_SECONDS)
    assert await where() == "foreseen"
