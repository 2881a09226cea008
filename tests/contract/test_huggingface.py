"""What is the hub's own: commits, gates, tokens, signatures, throttling."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from instantstart_fs.core.manifest import Digest, ManifestFile
from instantstart_fs.errors import (
    AccessRefused,
    OriginChanged,
    OriginError,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location
from tests.contract.worlds import HubWorld, fetch, write_files
from tests.servers.hub import HubServer

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}


@pytest.fixture
def world(hub: HubServer, tmp_path: Path) -> HubWorld:
    return HubWorld(hub, tmp_path)


def file_of(world: HubWorld, path: str, **options: str) -> ManifestFile:
    return next(file for file in world.origin(**options).resolve().files if file.path == path)


def token_file(directory: Path, token: str) -> str:
    path = directory / f"credential-{len(list(directory.iterdir()))}"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


def test_a_branch_is_pinned_to_its_commit(world: HubWorld, tmp_path: Path) -> None:
    first = world.hub.publish(world.repo, write_files(tmp_path / "a", FILES), revision="refs/pr/1")
    origin = world.origin(f"{world.source}@refs/pr/1")
    manifest = origin.resolve()
    assert manifest.revision == first
    world.hub.publish(world.repo, write_files(tmp_path / "b", {"config.json": b"new"}), revision="refs/pr/1")
    small, big = manifest.files
    assert fetch(origin.locate(small), 0, 2) == b"{}"
    assert fetch(origin.locate(big), 5, 9) == bytes([5, 6, 7, 8])
    assert world.origin(f"{world.source}@{first}").resolve().files == manifest.files


def test_a_repository_without_an_organisation(hub: HubServer, world: HubWorld, tmp_path: Path) -> None:
    hub.publish("gpt2", write_files(tmp_path / "gpt2", FILES))
    assert len(world.origin("hf://gpt2").resolve().files) == 2


def test_big_files_are_proven_by_sha256_and_small_ones_by_git(world: HubWorld) -> None:
    world.put(FILES)
    digests = {file.path: file.digest for file in world.origin().resolve().files}
    assert digests["config.json"] == Digest("git-sha1", "9e26dfeeb6e641a33dae4961196235bdb965b21b")  # git hash-object
    assert digests["model.safetensors"] is not None
    assert digests["model.safetensors"].algorithm == "sha256"


def test_a_gated_repository_asks_for_its_own_token(world: HubWorld, tmp_path: Path) -> None:
    directory = write_files(tmp_path / "gated", FILES)
    world.hub.publish(world.repo, directory, gated=True, tokens=["hf_allowed"])
    world.hub.publish("org/other", directory, tokens=["hf_other"])
    for wrong in (None, token_file(tmp_path, "hf_other")):
        for call in ("resolve", "check"):
            with pytest.raises(AccessRefused, match="request access") as refused:
                getattr(world.origin(token_file=wrong), call)()
            assert "hf_other" not in refused.value.message
    world.origin(token_file=token_file(tmp_path, "hf_allowed")).check()
    assert len(world.origin(token_file=token_file(tmp_path, "hf_allowed")).resolve().files) == 2


def test_the_token_goes_to_the_hub_and_never_to_the_cdn(world: HubWorld, tmp_path: Path) -> None:
    world.hub.publish(world.repo, write_files(tmp_path / "gated", FILES), gated=True, tokens=["hf_allowed"])
    origin = world.origin(token_file=token_file(tmp_path, "hf_allowed"))
    for file in origin.resolve().files:
        location = origin.locate(file)
        assert fetch(location, 0, 2) == FILES[file.path][:2]
        assert bool(location.headers) == location.url.startswith(world.hub.endpoint + "/")
    assert {request.token for request in world.hub.requests("hub")} == {"hf_allowed"}
    at_cdn = world.hub.requests("cdn")
    assert at_cdn
    assert all(request.token is None for request in at_cdn)


def test_a_pipelines_token_file_never_falls_back_to_the_machines_token(
    world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub.publish(world.repo, write_files(tmp_path / "gated", FILES), gated=True, tokens=["hf_machine"])
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    assert len(world.origin().resolve().files) == 2
    for bad, message in ((tmp_path / "missing", "cannot be read"), (Path(token_file(tmp_path, "")), "does not hold")):
        world.hub.forget_requests()
        with pytest.raises(AccessRefused, match=message):
            world.origin(token_file=str(bad)).resolve()
        assert world.hub.requests() == []


def test_a_rotated_token_is_read_anew(world: HubWorld, tmp_path: Path) -> None:
    path = token_file(tmp_path, "hf_stale")
    world.hub.publish(world.repo, write_files(tmp_path / "gated", FILES), gated=True, tokens=["hf_fresh"])
    origin = world.origin(token_file=path)
    with pytest.raises(AccessRefused):
        origin.resolve()
    Path(path).write_text("hf_fresh")
    assert len(origin.resolve().files) == 2


def test_an_invalid_token_is_refused(world: HubWorld, tmp_path: Path) -> None:
    world.put(FILES)
    with pytest.raises(AccessRefused, match="valid"):
        world.origin(token_file=token_file(tmp_path, "hf_unknown")).resolve()


def test_a_private_repository_looks_missing_without_its_token(world: HubWorld, tmp_path: Path) -> None:
    world.hub.publish(world.repo, write_files(tmp_path / "x", FILES), private=True, tokens=["hf_mine"])
    with pytest.raises(OriginNotFound, match="--token-file"):
        world.origin().resolve()
    assert world.origin(token_file=token_file(tmp_path, "hf_mine")).resolve().files


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"ratelimit": '"resolvers";r=0;t=11'}, 11.0),
        (503, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, None),
        (503, {}, None),
    ],
)
@pytest.mark.alone
def test_throttling_is_told_at_once_with_its_wait(
    world: HubWorld, status: int, headers: dict[str, str], wait: float | None
) -> None:
    world.put(FILES)
    file = file_of(world, "model.safetensors")
    for call in (world.origin().resolve, world.origin().check, lambda: world.origin().locate(file)):
        world.hub.clear()
        world.hub.fault("status", port="hub", status=status, headers=headers)
        started = time.monotonic()
        with pytest.raises(OriginThrottled) as throttled:
            call()
        assert time.monotonic() - started < 1.5
        if wait is not None:
            assert throttled.value.retry_after == wait
        elif headers:
            assert throttled.value.retry_after is not None
            assert throttled.value.retry_after > 10**9  # an HTTP date, as seconds from now
        else:
            assert throttled.value.retry_after is None


def test_server_errors_are_worth_another_try(world: HubWorld) -> None:
    world.put(FILES)
    world.hub.fault("status", port="hub", status=500)
    with pytest.raises(OriginUnavailable, match="500"):
        world.origin().resolve()


def test_signatures_say_when_they_end_and_can_be_had_again(world: HubWorld) -> None:
    world.put(FILES)
    world.hub.configure(lifetime=120)
    origin = world.origin()
    file = file_of(world, "model.safetensors")
    before = time.time()
    location = origin.locate(file)
    assert location.expires_at is not None
    assert before + 115 < location.expires_at <= time.time() + 120
    world.hub.expire_signatures()
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        fetch(location, 0, 10)
    refused.value.close()
    assert fetch(origin.locate(file), 0, 10) == FILES["model.safetensors"][:10]


def test_other_content_under_the_pinned_commit_is_noticed(world: HubWorld) -> None:
    world.put(FILES)
    file = file_of(world, "model.safetensors")
    origin = world.origin()
    changed = ManifestFile(file.path, file.size, file.address, file.version, Digest("sha256", "0" * 64))
    with pytest.raises(OriginChanged, match="other content"):
        origin.locate(changed)
    longer = ManifestFile(file.path, file.size + 1, file.address, file.version, file.digest)
    with pytest.raises(OriginChanged, match="bytes"):
        origin.locate(longer)


ODD_NAMES = ("../../etc/cron.d/evil", "/etc/passwd", "a//b", "./x", "nul\0byte", "x" * 300, "lone\udcff")


def test_odd_names_are_left_out_and_told_of(world: HubWorld, tmp_path: Path) -> None:
    real = tmp_path / "payload"
    real.write_bytes(b"x")
    for name in ODD_NAMES:
        world.hub.publish_names(world.repo, ["config.json", name], real)
        manifest = world.origin().resolve()
        assert [file.path for file in manifest.files] == ["config.json"]
        assert manifest.skipped is not None
        assert manifest.skipped.count == 1
        assert world.origin(include=("config.json",)).resolve().skipped is None
        world.hub.forget_requests()
        world.origin().check()
        world.origin().resolve()
        asked = [request.path for request in world.hub.requests() if "/resolve/" in request.path]
        assert asked and all(path.endswith("/config.json") for path in asked), "of odd names nothing is asked"
        with pytest.raises(OriginUnsupported, match="can be shown"):
            world.origin(exclude=("config.json",)).resolve()
    world.hub.publish_names(world.repo, ["config.json", "config.json/x", "CONFIG.json"], real)
    manifest = world.origin().resolve()
    assert [file.path for file in manifest.files] == ["CONFIG.json", "config.json/x"]
    assert str(manifest.skipped) == "config.json: is the name of a directory, too"


def test_many_odd_names_are_counted_and_the_first_are_named(world: HubWorld, tmp_path: Path) -> None:
    real = tmp_path / "payload"
    real.write_bytes(b"x")
    world.hub.publish_names(world.repo, ["config.json", *(f"m//{number:03}" for number in range(150))], real)
    skipped = world.origin().resolve().skipped
    assert skipped is not None
    assert (skipped.count, len(skipped.first)) == (150, 10)
    assert skipped.first[0].startswith("m//000: ")
    assert str(skipped).endswith("and 140 more")


def test_a_file_that_is_gone_is_not_found(world: HubWorld) -> None:
    world.put(FILES)
    file = file_of(world, "config.json")
    with pytest.raises(OriginNotFound):
        world.origin().locate(ManifestFile("x.bin", 1, "x.bin", file.version))


def test_a_proxys_error_page_is_no_answer(world: HubWorld, nginx: object, tmp_path: Path) -> None:
    page = tmp_path / "api/models" / world.repo / "revision/main"
    page.parent.mkdir(parents=True)
    page.write_text("<html>please log in</html>")
    with pytest.raises(OriginMisbehaved, match="cannot be understood"):
        world.origin(endpoint=nginx.url).resolve()  # type: ignore[attr-defined]


def test_a_paused_hub_does_not_hang_the_caller(world: HubWorld) -> None:
    world.put(FILES)
    file = file_of(world, "model.safetensors")
    world.hub.pause()
    try:
        with pytest.raises(OriginUnavailable, match="did not answer within 2 s"):
            world.origin().locate(file)
    finally:
        world.hub.resume()


def test_the_real_client_downloads_from_the_test_hub(
    world: HubWorld, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The hub is a fair stand-in: huggingface_hub's own snapshot_download works on it, with pages and all."""
    from huggingface_hub import set_client_factory, snapshot_download
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._http import default_client_factory

    from instantstart_fs.origins import hubclient

    request.addfinalizer(lambda: set_client_factory(hubclient.new_client))
    set_client_factory(default_client_factory)  # ours goes nowhere but on behalf of an origin
    disable_progress_bars()
    files = FILES | {f"many/{number:03}.json": b"{}" for number in range(30)}
    world.put(files)
    world.hub.configure(page=7)
    found = snapshot_download(world.repo, endpoint=world.hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    for path, content in files.items():
        assert (Path(found) / path).read_bytes() == content
    # and such a cache, links into ../../blobs and all, is a directory that can be served
    from tests.contract.worlds import DirectoryWorld

    local = DirectoryWorld(tmp_path).origin(f"file://{found}")
    assert [file.path for file in local.resolve().files] == sorted(files)
    assert fetch(local.locate(local.resolve().files[-1]), 0, 4) == FILES["model.safetensors"][:4]


@pytest.mark.parametrize("location", ["file://anybody/etc/hostname", "file:///etc/hostname", "ftp://example.org/x"])
def test_a_hub_cannot_send_the_daemon_to_a_local_file(world: HubWorld, location: str) -> None:
    world.put(FILES)
    origin = world.origin()
    big = next(file for file in origin.resolve().files if file.path == "model.safetensors")
    assert big.digest is not None
    headers = {
        "Location": location,
        "X-Repo-Commit": big.version,
        "X-Linked-Size": str(big.size),
        "X-Linked-Etag": f'"{big.digest.value}"',
    }
    world.hub.fault("status", port="hub", path="/resolve/", method="HEAD", status=302, headers=headers)
    with pytest.raises(OriginError):
        origin.locate(big)


def test_a_hub_cannot_send_the_token_elsewhere(world: HubWorld, tmp_path: Path) -> None:
    seen: list[str] = []

    class Thief(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    world.hub.publish(world.repo, write_files(tmp_path / "m", FILES), gated=True, tokens=["hf_secret"])
    origin = world.origin(token_file=token_file(tmp_path, "hf_secret"))
    big = next(file for file in origin.resolve().files if file.path == "model.safetensors")
    with ThreadingHTTPServer(("127.0.0.1", 0), Thief) as thief:
        thread = threading.Thread(target=thief.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        there = f"http://127.0.0.1:{thief.server_address[1]}/x"
        for status in (301, 302, 303, 307, 308):
            world.hub.clear()
            world.hub.fault("status", port="hub", status=status, headers={"Location": there})
            for call in (lambda: origin.locate(big), origin.check, origin.resolve):
                with contextlib.suppress(OriginError):
                    found = call()
                    if isinstance(found, Location):
                        assert found.headers == ()
        thief.shutdown()
    assert not [value for value in seen if "hf_secret" in value]
