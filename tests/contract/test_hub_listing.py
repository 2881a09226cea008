"""What a hub lists: all of it, whatever cuts it short on the way, or none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from instantstart_fs.admin.access_proof import prove_access
from instantstart_fs.core.manifest import Digest, ManifestFile
from instantstart_fs.errors import AccessRefused, OriginMisbehaved, OriginUnavailable, OriginUnsupported
from instantstart_fs.origins import common, hubtree, huggingface
from instantstart_fs.origins.bounds import Bounds, TooLarge
from tests.contract.worlds import HubWorld, fetch, write_files
from tests.servers.handler import serving
from tests.servers.hub import HubServer

FILES = {"config.json": b"{}", "README.md": b"# m", "unet/model.safetensors": bytes(range(256)) * 64}


@pytest.fixture
def world(hub: HubServer, tmp_path: Path) -> Iterator[HubWorld]:
    yield HubWorld(hub, tmp_path)
    hub.reset()


def many(world: HubWorld, tmp_path: Path, count: int) -> list[str]:
    real = tmp_path / "payload"
    real.write_bytes(b"x")
    names = [f"part-{number:05}.json" for number in range(count)]
    world.hub.publish_names(world.repo, names, real)
    return names


def test_more_files_than_the_description_names(world: HubWorld, tmp_path: Path) -> None:
    names = many(world, tmp_path, 1501)
    world.hub.configure(siblings=1000)
    manifest = world.origin().resolve()
    assert [file.path for file in manifest.files] == names
    assert {file.version for file in manifest.files} == {manifest.revision}
    world.origin().check()


def test_a_description_without_files_is_no_empty_repository(world: HubWorld) -> None:
    world.put(FILES)
    world.hub.configure(siblings=0)
    assert len(world.origin().resolve().files) == 3
    world.origin().check()


def test_pages_are_followed_at_the_endpoint_that_was_asked(world: HubWorld, tmp_path: Path) -> None:
    """Mirrors pass on the address of the hub behind them."""
    names = many(world, tmp_path, 25)
    world.hub.configure(page=7, drop=["link-host"])
    assert [file.path for file in world.origin().resolve().files] == names


def test_pages_that_repeat_themselves_are_refused(world: HubWorld, tmp_path: Path) -> None:
    many(world, tmp_path, 25)
    world.hub.configure(page=7, drop=["cursor"])
    with pytest.raises(OriginMisbehaved, match="repeat"):
        world.origin().resolve()


def test_a_tree_that_is_cut_is_refused(world: HubWorld, tmp_path: Path) -> None:
    many(world, tmp_path, 25)
    world.hub.configure(page=7, drop=["link"])
    with pytest.raises(OriginMisbehaved, match="does not add up"):
        world.origin().resolve()
    many(world, tmp_path, 1501)
    world.hub.configure(page=1000, siblings=0)
    with pytest.raises(OriginMisbehaved, match="may be cut"):
        world.origin().resolve()


def test_exactly_a_page_of_files_is_no_cut(world: HubWorld, tmp_path: Path) -> None:
    assert len(many(world, tmp_path, 1000)) == len(world.origin().resolve().files)


def test_a_mirror_that_drops_sizes_from_the_description(world: HubWorld) -> None:
    world.put(FILES)
    whole = world.origin().resolve()
    world.hub.configure(drop=["blobs"])
    assert world.origin().resolve() == whole


def test_a_mirror_without_a_tree(world: HubWorld, tmp_path: Path) -> None:
    world.put(FILES)
    whole = world.origin().resolve()
    world.hub.configure(drop=["tree"])
    assert world.origin().resolve() == whole
    world.origin().check()
    world.hub.configure(drop=["tree", "blobs"])
    assert world.origin().resolve() == whole
    many(world, tmp_path, 2000)
    with pytest.raises(OriginMisbehaved, match="may be cut"):
        world.origin().resolve()


def test_a_tree_without_sizes_is_completed_by_a_head_of_each(world: HubWorld) -> None:
    world.put(FILES)
    whole = world.origin().resolve()
    world.hub.configure(drop=["sizes"])
    assert world.origin().resolve() == whole


def test_heads_have_a_deadline_together(world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put(FILES)
    world.hub.configure(drop=["sizes"])
    monkeypatch.setattr(huggingface, "LISTING_SECONDS", -1.0)
    with pytest.raises(OriginUnavailable, match="lists no sizes"):
        world.origin().resolve()


def test_a_listing_has_a_deadline(world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(world, tmp_path, 25)
    world.hub.configure(page=7)
    monkeypatch.setattr(hubtree, "LISTING_SECONDS", -1.0)
    with pytest.raises(OriginUnavailable, match="goes on"):
        world.origin().resolve()


def test_a_listing_has_limits_that_are_said(world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(world, tmp_path, 25)
    world.hub.configure(page=7)
    monkeypatch.setattr(common, "MAX_FILES", 20)
    with pytest.raises(OriginUnsupported, match=r"more than 20 files, which is the limit.*--include"):
        world.origin().resolve()
    assert len(world.origin(include=("part-0000*",)).resolve().files) == 10
    monkeypatch.setattr(common, "MAX_LISTED", 20)
    with pytest.raises(OriginUnsupported, match="beyond 20 files, which is the limit"):
        world.origin(include=("part-0000*",)).resolve()


@pytest.mark.parametrize("bounds", [Bounds(files=20, final=False), Bounds(body=1000, final=False)])
def test_a_listing_outgrows_its_bounds(world: HubWorld, tmp_path: Path, bounds: Bounds) -> None:
    many(world, tmp_path, 25)
    with pytest.raises(TooLarge):
        world.origin(bounds=bounds).resolve()


def token_file(directory: Path, token: str) -> str:
    path = directory / "token-of-its-own"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("files", [FILES, {"model.safetensors": b"w" * 100}, {"config.json": b"{}"}])
def test_a_token_that_may_list_and_not_download(world: HubWorld, tmp_path: Path, files: dict[str, bytes]) -> None:
    directory = write_files(tmp_path / "m", files)
    world.hub.publish(world.repo, directory, private=True, tokens=["hf_full"], listers=["hf_lists"])
    pinned = world.origin(token_file=token_file(tmp_path, "hf_full")).resolve().files
    origin = world.origin(token_file=token_file(tmp_path, "hf_lists"))
    for call in (origin.resolve, origin.check):
        with pytest.raises(AccessRefused, match="listed, but may not be downloaded"):
            call()
    with pytest.raises(AccessRefused):
        prove_access(origin, pinned)


def test_every_file_is_refused_though_the_list_is_not(world: HubWorld) -> None:
    world.put({"config.json": b"{}"})
    world.hub.fault("status", port="hub", path="/resolve/", status=403)
    for call in (world.origin().resolve, world.origin().check):
        with pytest.raises(AccessRefused, match="listed, but may not be downloaded"):
            call()


def test_the_readme_that_everybody_sees_proves_nothing(world: HubWorld) -> None:
    world.put({"README.md": b"# a large one" * 100, "config.json": b"{}"})
    world.hub.fault("status", port="hub", path="config.json", status=403)
    with pytest.raises(AccessRefused, match=r"config\.json"):
        world.origin().check()


def test_a_silent_cdn_is_named(world: HubWorld) -> None:
    world.put(FILES)
    origin = world.origin()
    pinned = origin.resolve().files
    world.hub.fault("blackhole", port="cdn")
    started = time.monotonic()
    with pytest.raises(OriginUnavailable, match=rf":{world.hub.cdn_port}, .*: no byte came within"):
        prove_access(origin, pinned, timeout=1.0)
    assert time.monotonic() - started < 8
    world.hub.clear()


def test_what_is_pinned_is_proven_by_one_byte_of_each_way(world: HubWorld) -> None:
    world.put(FILES)
    origin = world.origin()
    pinned = origin.resolve().files
    world.hub.forget_requests()
    prove_access(origin, pinned)
    got = [request for request in world.hub.requests() if request.range == "bytes=0-0"]
    assert {request.port for request in got} == {"cdn", "hub"}
    assert any(request.path.endswith("/config.json") for request in got)
    world.hub.fault("status", port="cdn", status=403, count=1)
    prove_access(origin, pinned)
    world.hub.fault("status", port="cdn", status=403)
    with pytest.raises(OriginUnavailable, match="also at a fresh address"):
        prove_access(origin, pinned)
    world.hub.clear()
    world.hub.fault("status", port="hub", path="/resolve/", method="GET", status=403)
    with pytest.raises(AccessRefused):
        prove_access(origin, pinned)


def test_a_rotated_token_serves_an_origin_that_is_open(world: HubWorld, tmp_path: Path) -> None:
    """The workers get addresses with the token in a header: the next one has the new token."""
    directory = write_files(tmp_path / "gated", FILES)
    world.hub.publish(world.repo, directory, gated=True, tokens=["hf_one"])
    path = token_file(tmp_path, "hf_one")
    origin = world.origin(token_file=path)
    config = next(file for file in origin.resolve().files if file.path == "config.json")
    assert fetch(origin.locate(config), 0, 2) == b"{}"
    world.hub.publish(world.repo, directory, gated=True, tokens=["hf_two"])
    with pytest.raises(AccessRefused):
        origin.locate(config)
    Path(path).write_text("hf_two")
    assert fetch(origin.locate(config), 0, 2) == b"{}"


class Endless(BaseHTTPRequestHandler):
    """A hub whose one answer does not end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(b'{"sha": "' + b"a" * 40 + b'", "siblings": [')
            while True:
                self.wfile.write(b'{"rfilename": "x"},' * 10_000)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_without_end_is_cut_off(world: HubWorld) -> None:
    with serving(Endless) as endpoint:
        for bounds in (Bounds(body=1 << 20), Bounds(body=4 << 20)):
            with pytest.raises(OriginUnsupported, match=f"more than {bounds.body >> 20} MiB, which is the limit"):
                world.origin(endpoint=endpoint, bounds=bounds).resolve()


def test_what_a_mirrors_etag_says_is_the_digest() -> None:
    found = huggingface._digest_of
    assert found("ab" * 32) == Digest("sha256", "ab" * 32)
    assert found("CD" * 20) == Digest("git-sha1", "cd" * 20)
    assert [found(odd) for odd in (None, "", "xy" * 20, "ab" * 16)] == [None] * 4


def test_of_samples_the_largest_of_each_way_is_taken() -> None:
    big, small = Digest("sha256", "a" * 64), Digest("git-sha1", "b" * 40)
    files = [
        ManifestFile("a.bin", 5, "a.bin", "c", big),
        ManifestFile("b.bin", 9, "b.bin", "c", big),
        ManifestFile("README.md", 99, "README.md", "c", small),
        ManifestFile("config.json", 2, "config.json", "c", small),
    ]
    assert {file.path for file in common.samples(files)} == {"b.bin", "config.json"}
    assert [file.path for file in common.samples(files[2:3])] == ["README.md"]


def test_an_lfs_file_is_as_long_as_its_content_and_not_as_its_pointer() -> None:
    content = hubtree.Lfs(size=5_000_000_000, oid="ab" * 32, sha256="ab" * 32)
    digest = Digest("sha256", "ab" * 32)
    of_tree = hubtree.listed(hubtree.Entry("a", size=134, oid="cd" * 20, lfs=content))
    of_description = hubtree.listed_sibling(hubtree.Sibling("a", size=134, blobId="cd" * 20, lfs=content))
    assert of_tree == of_description == hubtree.Listed("a", 5_000_000_000, digest)
    assert hubtree.listed(hubtree.Entry("b", size=7, oid="cd" * 20)).size == 7
    assert hubtree.listed(hubtree.Entry("c", size=9, lfs=hubtree.Lfs(oid="ab" * 32))).size == 9
