"""With which credentials a bucket is asked, what rights that takes, and what becomes of refusals."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.admin.access_proof import prove_access
from instantstart_fs.config import S3Config
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.manifest import ETAG_HINT, ManifestFile, ModelSpec, PipelineSpec, rests_on_etag
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins import s3, s3access
from instantstart_fs.origins.base import Origin
from instantstart_fs.origins.registry import OriginSettings, open_origin
from tests.contract.test_s3 import PART, multipart
from tests.contract.worlds import S3World, fetch
from tests.servers.s3_gate import S3Gate
from tests.servers.seaweed import SeaweedServer

FILES = {"config.json": b'{"hidden": 1}', "model.safetensors": random.Random(1).randbytes(100_000)}


def bucket(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch, *, versioning: bool) -> S3World:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3access, "FIRST_PAUSE", 0.001)
    found = S3World(seaweed, versioning=versioning)
    found.put(FILES)
    return found


@pytest.fixture
def world(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> S3World:
    return bucket(seaweed, monkeypatch, versioning=False)


@pytest.fixture(params=[False, True], ids=["plain", "versioned"])
def both(request: pytest.FixtureRequest, seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> S3World:
    return bucket(seaweed, monkeypatch, versioning=request.param)


@pytest.fixture
def gate(seaweed: SeaweedServer) -> Iterator[S3Gate]:
    with S3Gate(seaweed) as gate:
        yield gate


def through(gate: S3Gate, world: S3World, *, timeout: float = 5.0, **options: object) -> Origin:
    model = ModelSpec(world.source)
    spec = PipelineSpec("p", (model,), endpoint_url=gate.url, **options)  # type: ignore[arg-type]
    return open_origin(spec, model, OriginSettings(timeout=timeout))


def read(origin: Origin, files: tuple[ManifestFile, ...]) -> None:
    for file in files:
        assert fetch(origin.locate(file), 0, file.size) == FILES[file.path]


def test_what_is_added_can_be_read_whichever_right_is_denied(both: S3World, gate: S3Gate) -> None:
    """Either `add` names the right, or every read succeeds."""
    world, named = both, {}
    versioned = world.bucket.endswith("versioned")
    for right in ("ListBucket", "ListBucketVersions", "GetObject", "GetObjectVersion", "GetObjectAttributes"):
        gate.denied = {f"s3:{right}"}
        origin = through(gate, world)
        try:
            manifest = origin.resolve()
        except AccessRefused as error:
            named[right] = error.message
            with pytest.raises(AccessRefused, match=f"s3:{right} "):
                origin.check()
            continue
        read(origin, manifest.files)
        origin.check()
        prove_access(origin, manifest.files)
        assert all(file.version.startswith("version-id=") for file in manifest.files) == (
            versioned and right != "GetObjectVersion"
        )
    assert named.keys() == {"ListBucket", "GetObject"}
    for right, message in named.items():
        assert f"need s3:{right} " in message and "AccessDenied" in message


def test_versions_that_may_not_be_read_any_more_are_found_out(world: S3World, gate: S3Gate) -> None:
    origin = through(gate, world)
    pinned = origin.resolve().files
    gate.denied = {"s3:GetObject", "s3:GetObjectVersion"}
    with pytest.raises(AccessRefused):
        prove_access(origin, pinned)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("InvalidObjectState", OriginUnsupported, "archived"),
        ("KMS.DisabledException", OriginUnsupported, "key"),
        ("KMS.AccessDeniedException", AccessRefused, "kms:Decrypt"),
        ("AllAccessDisabled", AccessRefused, "AllAccessDisabled"),
    ],
)
def test_refusals_that_are_not_about_credentials_say_so(
    world: S3World, gate: S3Gate, code: str, kind: type[Exception], words: str
) -> None:
    gate.denied, gate.code = {"s3:GetObject", "s3:GetObjectVersion"}, code
    with pytest.raises(kind, match=words) as refused:
        through(gate, world).resolve()
    assert code in str(refused.value)


def test_a_bucket_whose_requester_pays(world: S3World, gate: S3Gate) -> None:
    gate.requester_pays = True
    with pytest.raises(AccessRefused, match="--requester-pays"):
        through(gate, world).resolve()
    origin = through(gate, world, requester_pays=True)
    manifest = origin.resolve()
    read(origin, manifest.files)
    origin.check()


def write_keys(path: Path, key: str, section: str = "default") -> None:
    path.write_text(f"[{section}]\naws_access_key_id = {key}\naws_secret_access_key = secret-of-{key}\n")
    path.chmod(0o600)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3access, "RENEW_SECONDS", 0.0)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


@pytest.mark.parametrize("profile", [None, "tenant"])
def test_replaced_keys_serve_an_origin_that_is_open(
    world: S3World, gate: S3Gate, home: Path, profile: str | None
) -> None:
    section = profile or "default"
    write_keys(home / "credentials", "old", section)
    gate.keys = {"old"}
    origin = through(gate, world, aws_profile=profile)
    files = origin.resolve().files
    read(origin, files)
    gate.keys = {"new"}
    with pytest.raises(AccessRefused):
        origin.check()
    write_keys(home / "credentials", "new", section)
    read(origin, files)
    origin.check()
    origin.resolve()


def test_keys_of_a_process_are_asked_for_again_once_they_are_refused(world: S3World, gate: S3Gate, home: Path) -> None:
    """Nothing shows that they were replaced: neither a file nor an end of their time."""
    script, key = home / "keys.py", home / "key"
    calls = home / "calls"
    script.write_text(
        f"open({str(calls)!r}, 'a').write('x'); key = open({str(key)!r}).read()\n"
        'print(\'{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "s"}\' % key)\n'
    )
    (home / "config").write_text(f"[profile tenant]\ncredential_process = {sys.executable} {script}\n")
    key.write_text("old")
    gate.keys = {"old"}
    origin = through(gate, world, aws_profile="tenant")
    files = origin.resolve().files
    first = [origin.locate(file) for file in files]
    assert first
    key.write_text("new")
    gate.keys = {"new"}
    read(origin, files)  # asked for again before their time: those that were given out were refused
    origin.check()
    assert len(calls.read_text()) < 8
    gate.keys = set()
    before = len(calls.read_text())
    with pytest.raises(AccessRefused):
        origin.check()
    assert len(calls.read_text()) - before <= 2, "one refusal, one look"


def test_a_refusal_is_followed_by_one_look_at_the_credentials(
    world: S3World, gate: S3Gate, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(home / "credentials", "old")
    gate.keys = set()
    monkeypatch.setattr(s3access, "RENEW_SECONDS", 60.0)
    with pytest.raises(AccessRefused, match="InvalidAccessKeyId"):
        through(gate, world).resolve()
    assert len(gate.seen) == 1, "the same keys are not tried again"


def test_a_public_bucket_needs_no_credentials(world: S3World, gate: S3Gate, home: Path) -> None:
    gate.public = True
    origin = through(gate, world)
    files = origin.resolve().files
    read(origin, files)
    origin.check()
    assert {key for _, key in gate.seen} == {""}
    assert all("Signature" not in origin.locate(file).url for file in files)


def test_anonymous_looks_for_no_credentials(world: S3World, gate: S3Gate, home: Path) -> None:
    write_keys(home / "credentials", "unknown-there")
    gate.public, gate.keys = True, set()
    with pytest.raises(AccessRefused):
        through(gate, world).resolve()
    gate.seen.clear()
    origin = through(gate, world, anonymous=True)
    read(origin, origin.resolve().files)
    assert {key for _, key in gate.seen} == {""}
    gate.public = False
    with pytest.raises(AccessRefused, match="--anonymous"):
        origin.check()
    model = ModelSpec(world.source)
    of_all = OriginSettings(s3=S3Config(endpoint_url=gate.url, anonymous=True))
    assert open_origin(PipelineSpec("p", (model,)), model, of_all).key.credentials == "anonymous"
    assert open_origin(PipelineSpec("p", (model,), aws_profile="x"), model, of_all).key.credentials == "profile x"


def test_a_profile_without_keys_is_not_asked_for_without(world: S3World, gate: S3Gate, home: Path) -> None:
    gate.public = True
    (home / "config").write_text("[profile tenant]\nregion = us-east-1\n")
    for profile in ("tenant", "missing"):
        with pytest.raises(CredentialsUnusable, match=profile):
            through(gate, world, aws_profile=profile).resolve()
    assert not gate.seen


def test_lost_credentials_are_no_refusal(world: S3World, gate: S3Gate, home: Path) -> None:
    write_keys(home / "credentials", "old")
    origin = through(gate, world)
    files = origin.resolve().files
    (home / "credentials").unlink()
    for call in (origin.check, lambda: origin.locate(files[0])):
        with pytest.raises(CredentialsUnusable, match="--aws-profile"):
            call()
    write_keys(home / "credentials", "back")
    read(origin, files)


def part_heads(count: int, status: int) -> object:
    left = [count]

    def fault(method: str, query: dict[str, list[str]]) -> int | None:
        if method == "HEAD" and "partNumber" in query and left[0]:
            left[0] -= 1
            return status
        return None

    return fault


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_throttled_head_of_a_part_makes_nothing_unverified(world: S3World, gate: S3Gate, status: int) -> None:
    multipart(world, "big.bin", [os.urandom(PART), b"rest"])
    whole = through(gate, world).resolve()
    big = next(file for file in whole.files if file.path == "big.bin")
    assert big.digest is not None
    gate.fault = part_heads(3, status)  # type: ignore[assignment]
    assert through(gate, world).resolve() == whole
    gate.fault = part_heads(10**6, status)  # type: ignore[assignment]
    with pytest.raises(OriginUnavailable if status == 500 else OriginThrottled):
        through(gate, world).resolve()
    gate.fault = part_heads(10**6, 501)  # type: ignore[assignment]
    told = {file.path: file.digest for file in through(gate, world).resolve().files}
    assert told["big.bin"] is None or not told["big.bin"].part_size, "the engine does not know parts"


def test_etags_that_are_no_md5_prove_nothing(world: S3World, gate: S3Gate, caplog: pytest.LogCaptureFixture) -> None:
    honest = through(gate, world).resolve()
    gate.fake_etags = True
    origin = through(gate, world)
    files = origin.resolve().files
    assert [file.digest for file in files] == [None, None]
    assert "is not the MD5 of its bytes" in caplog.text
    read(origin, files)
    etags = {hashlib.md5(content).hexdigest() for content in FILES.values()}
    assert all(any(etag in file.version for etag in etags) for file in honest.files)


def heads(gate: S3Gate) -> int:
    return sum(1 for right, _ in gate.seen if right == "s3:GetObject")


def test_of_many_small_objects_the_listing_tells_enough(both: S3World, gate: S3Gate) -> None:
    """But for samples, and for those of which it does not: large ones, and all of a bucket that keeps versions."""
    contents = {f"{number:03}.json": b"{}" * (number + 1) for number in range(100)}
    both.put(contents)
    manifest = through(gate, both).resolve()
    versioned = both.bucket.endswith("versioned")
    assert heads(gate) > 100 if versioned else heads(gate) < 25
    assert len(manifest.files) == 100 + len(FILES)
    for file in manifest.files:
        content = contents.get(file.path) or FILES[file.path]
        hasher = new_hasher(file.digest, file.size)
        hasher.update(content)
        assert file.digest is not None and hasher.hexdigest() == file.digest.value
        assert file.size == len(content) and file.version.startswith("version-id=") == versioned
        assert file.mtime_ns > 1_500_000_000 * 10**9
    gate.fake_etags = True
    assert all(file.digest is None for file in through(gate, both).resolve().files)


def test_etags_can_be_said_to_be_no_md5(world: S3World, gate: S3Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing small shows it, a mismatch names the setting."""
    gate.fake_etags = True
    monkeypatch.setattr(s3, "TRIED_WHOLE", 0)
    model = ModelSpec(world.source)
    spec = PipelineSpec("p", (model,), endpoint_url=gate.url)
    believed = open_origin(spec, model, OriginSettings()).resolve().files
    assert all(rests_on_etag(file) for file in believed) and "etags_are_md5" in ETAG_HINT
    told = OriginSettings(s3=S3Config(etags_are_md5=False))
    assert [file.digest for file in open_origin(spec, model, told).resolve().files] == [None, None]
