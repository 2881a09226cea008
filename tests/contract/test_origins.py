"""What every origin promises, asked of each of them against a real server."""

from __future__ import annotations

import random
import urllib.error
from pathlib import Path

import pytest

from instantstart_fs.core.digests import new_hasher
from instantstart_fs.errors import OriginChanged, OriginNotFound, OriginUnavailable
from tests.contract.worlds import DirectoryWorld, HubWorld, S3World, World, fetch
from tests.servers.blackhole import BlackHole
from tests.servers.ports import free_port

FILES = {
    "config.json": b'{"hidden": 1}',
    "empty.txt": b"",
    "model.safetensors": random.Random(1).randbytes(3 * 1024 * 1024 + 17),
    "with space/ünïcode ☃ 100%+?#&.bin": random.Random(2).randbytes(70_000),
    "deep/er/tokenizer.json": b"{}",
}


servers = pytest.mark.parametrize("world", ["hf", "s3"], indirect=True)
"""For promises about servers, which a directory has none of."""


@pytest.fixture(params=["hf", "s3", "s3-versioned", "file"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    match request.param:
        case "hf":
            return HubWorld(request.getfixturevalue("hub"), tmp_path)
        case "file":
            return DirectoryWorld(tmp_path)
        case kind:
            seaweed = request.getfixturevalue("seaweed")
            for name, value in seaweed.environment.items():
                monkeypatch.setenv(name, value)
            return S3World(seaweed, versioning=kind == "s3-versioned")


def test_resolve_lists_every_file_with_its_size_sorted(world: World) -> None:
    world.put(FILES)
    manifest = world.origin().resolve()
    assert [(file.path, file.size) for file in manifest.files] == sorted((p, len(c)) for p, c in FILES.items())
    assert manifest.source == world.source
    assert all(file.mtime_ns > 1_500_000_000 * 10**9 for file in manifest.files)


def test_resolve_twice_pins_the_same(world: World) -> None:
    world.put(FILES)
    assert world.origin().resolve() == world.origin().resolve()


def test_digests_are_those_of_the_bytes(world: World) -> None:
    world.put(FILES)
    for file in world.origin().resolve().files:
        if isinstance(world, DirectoryWorld):
            assert file.digest is None  # nothing to prove it by: `unverified`
            continue
        assert file.digest is not None
        hasher = new_hasher(file.digest, file.size)
        hasher.update(FILES[file.path])
        assert hasher.hexdigest() == file.digest.value


def test_ranged_reads_of_located_files_give_the_right_bytes(world: World) -> None:
    world.put(FILES)
    origin = world.origin()
    chance = random.Random(3)
    for file in origin.resolve().files:
        location = origin.locate(file)
        assert location.trusted  # loopback or local
        content = FILES[file.path]
        for _ in range(4 if content else 0):
            start = chance.randrange(file.size)
            stop = chance.randint(start + 1, file.size)
            assert fetch(location, start, stop) == content[start:stop]
            assert fetch(location, file.size - 1, file.size) == content[-1:]


def test_one_location_serves_many_reads_and_says_when_it_ends(world: World) -> None:
    world.put(FILES)
    origin = world.origin()
    file = next(file for file in origin.resolve().files if file.path == "model.safetensors")
    location = origin.locate(file)
    assert (location.expires_at is None) == isinstance(world, DirectoryWorld)
    assert (location.identity is not None) == isinstance(world, DirectoryWorld)
    assert (
        b"".join(fetch(location, at, at + 65536) for at in range(0, 4 * 65536, 65536))
        == (FILES["model.safetensors"][: 4 * 65536])
    )


def test_a_replaced_object_never_gives_other_bytes(world: World) -> None:
    """The old bytes (a commit, a version) or a refusal; for a directory the identity that a reader holds it to."""
    world.put(FILES)
    origin = world.origin()
    file = next(file for file in origin.resolve().files if file.path == "model.safetensors")
    before = origin.locate(file)
    world.replace("model.safetensors", bytes(len(FILES["model.safetensors"])))
    if isinstance(world, DirectoryWorld):
        with pytest.raises(OriginChanged, match="run update"):
            origin.locate(file)
    else:
        for location in (before, origin.locate(file)):
            try:
                assert fetch(location, 0, 1000) == FILES["model.safetensors"][:1000]
            except urllib.error.HTTPError as error:
                assert error.code == 412
                error.close()
    renewed = next(file for file in world.origin().resolve().files if file.path == "model.safetensors")
    assert renewed != file


def test_include_and_exclude_choose(world: World) -> None:
    world.put(FILES)
    chosen = world.origin(include=("*.json", "model*"), exclude=("deep/",)).resolve()
    assert [file.path for file in chosen.files] == ["config.json", "model.safetensors"]
    with pytest.raises(OriginNotFound, match="globs"):
        world.origin(include=("*.gguf",)).resolve()


def test_check_passes_where_the_source_can_be_fetched(world: World) -> None:
    world.put(FILES)
    world.origin().check()


def test_a_missing_source_is_not_found(world: World) -> None:
    world.put(FILES)
    missing = {"HubWorld": "hf://org/not-there", "DirectoryWorld": "file:///not/there"}
    sources = [missing.get(type(world).__name__, "s3://bucket-not-there/model")]
    if isinstance(world, HubWorld):
        sources.append(world.source + "@no-such-revision")
    if isinstance(world, S3World):
        sources.append(f"s3://{world.bucket}/no/such/prefix")
    for source in sources:
        with pytest.raises(OriginNotFound):
            world.origin(source).resolve()
        with pytest.raises(OriginNotFound):
            world.origin(source).check()


def test_opening_does_no_io(world: World) -> None:
    """A warm pipeline starts with its origin gone and no credentials at hand."""
    unreachable = {"HubWorld": "hf://org/never", "DirectoryWorld": "file:///never"}
    origin = world.origin(unreachable.get(type(world).__name__, "s3://never-there/x"))
    assert str(origin.key)


def test_keys_tell_services_and_credentials_apart(world: World) -> None:
    assert world.origin().key == world.origin().key
    if isinstance(world, HubWorld):
        assert world.origin(token_file="/etc/other").key != world.origin().key
    if isinstance(world, S3World):
        assert world.origin(profile="other").key != world.origin().key


@servers
def test_a_server_that_never_answers_is_unavailable(world: World, black_hole: BlackHole) -> None:
    world.put(FILES)
    with pytest.raises(OriginUnavailable, match="did not answer"):
        world.origin(endpoint=black_hole.url).resolve()
    assert black_hole.connections


@servers
def test_a_server_that_is_not_there_is_unavailable(world: World) -> None:
    with pytest.raises(OriginUnavailable, match="cannot be reached"):
        world.origin(endpoint=f"http://127.0.0.1:{free_port()}").resolve()
