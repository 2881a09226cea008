"""Buckets that are read with keys that a security token service lends: by a web identity, or by a role of a profile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.errors import CredentialsUnusable, OriginUnavailable
from instantstart_fs.origins.base import Origin
from tests.contract.test_s3_access import gate, home, read, through, world, write_keys
from tests.contract.worlds import S3World
from tests.servers.s3_gate import S3Gate
from tests.servers.sts import StsServer

__all__ = ["gate", "home", "world"]  # fixtures

ROLE = "arn:aws:iam::123456789012:role/reader"


@pytest.fixture
def sts(gate: S3Gate, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StsServer]:
    with StsServer(gate) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        gate.keys = set()
        yield server


@pytest.fixture
def token(sts: StsServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a web identity."""
    path = home / "token"
    path.write_text("first-token")
    sts.tokens = {"first-token"}
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(path))
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    return path


def every_door(origin: Origin, files: tuple[ManifestFile, ...]) -> list[Callable[[], object]]:
    return [origin.check, origin.resolve, lambda: origin.locate(files[0])]


def test_a_web_identity_whose_token_is_replaced(world: S3World, gate: S3Gate, sts: StsServer, token: Path) -> None:
    origin = through(gate, world)
    files = origin.resolve().files
    read(origin, files)
    assert sts.asked == ["first-token"]
    sts.tokens, gate.keys = {"second-token"}, set()
    with pytest.raises(CredentialsUnusable, match="InvalidIdentityToken"):
        origin.check()
    token.write_text("second-token")
    read(origin, files)
    origin.check()
    assert origin.resolve().files == files
    assert sts.asked[-1] == "second-token"


def test_a_session_that_ended_is_renewed(world: S3World, gate: S3Gate, sts: StsServer, token: Path) -> None:
    """By the clock, or because the service has ended it before its time."""
    sts.lifetime = 60.0  # boto3 trusts no session in its last ten minutes
    origin = through(gate, world)
    files = origin.resolve().files
    for _ in range(2):
        before, gate.keys = len(sts.asked), set()
        read(origin, files)
        assert len(sts.asked) > before
    sts.lifetime = 3600.0
    origin.check()
    before = len(sts.asked)
    read(origin, files)
    assert len(sts.asked) == before, "one that is good is used"
    gate.keys = set()
    origin.check()
    read(origin, files)


@pytest.mark.parametrize("fault", [(503, "ServiceUnavailable"), (500, "InternalFailure"), (400, "Throttling")])
def test_a_token_service_that_fails_is_no_refusal(
    world: S3World, gate: S3Gate, sts: StsServer, token: Path, fault: tuple[int, str]
) -> None:
    sts.lifetime = 60.0
    origin = through(gate, world)
    files = origin.resolve().files
    sts.fault = fault
    for call in every_door(origin, files):
        with pytest.raises(OriginUnavailable, match=f"AssumeRoleWithWebIdentity.*{fault[1]}"):
            call()
    with pytest.raises(OriginUnavailable):
        through(gate, world).resolve()
    sts.fault = None
    read(origin, files)


def test_a_token_service_that_is_away_or_hangs(
    world: S3World, gate: S3Gate, sts: StsServer, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the time that the bucket has."""
    sts.lifetime = 60.0
    origin = through(gate, world, timeout=0.2)
    files = origin.resolve().files
    sts.hung.clear()
    for call in every_door(origin, files):
        with pytest.raises(OriginUnavailable, match="credentials"):
            call()
    sts.hung.set()
    read(origin, files)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    with pytest.raises(OriginUnavailable, match=r"credentials.*127\.0\.0\.1:9"):
        through(gate, world).resolve()


@pytest.mark.parametrize("content", [None, "", "x"])
def test_a_lost_or_half_written_token_is_no_refusal(
    world: S3World, gate: S3Gate, sts: StsServer, token: Path, content: str | None
) -> None:
    origin = through(gate, world)
    files = origin.resolve().files
    if content is None:
        token.unlink()
    else:
        token.write_text(content)
    for call in every_door(origin, files):
        with pytest.raises(CredentialsUnusable):
            call()
    token.write_text("first-token")
    read(origin, files)


def test_a_session_that_has_ended_when_it_comes(world: S3World, gate: S3Gate, sts: StsServer, token: Path) -> None:
    sts.lifetime = -60.0
    with pytest.raises(CredentialsUnusable, match="clock"):
        through(gate, world).resolve()


def test_a_role_of_a_profile_whose_source_is_replaced(world: S3World, gate: S3Gate, sts: StsServer, home: Path) -> None:
    (home / "config").write_text(f"[profile tenant]\nrole_arn = {ROLE}\nsource_profile = base\n")
    write_keys(home / "credentials", "old", "base")
    sts.sources = {"old"}
    origin = through(gate, world, aws_profile="tenant")
    files = origin.resolve().files
    read(origin, files)
    sts.sources, gate.keys = {"new"}, set()
    with pytest.raises(CredentialsUnusable, match=r"'tenant'.*InvalidClientTokenId"):
        origin.check()
    write_keys(home / "credentials", "new", "base")
    read(origin, files)
    origin.check()
    assert sts.asked[-1] == "new"


def test_a_role_whose_source_is_a_process(world: S3World, gate: S3Gate, sts: StsServer, home: Path) -> None:
    """No file shows that its keys were replaced: the token service refuses the old ones."""
    key = home / "key"
    script = home / "keys.py"
    script.write_text(
        f"key = open({str(key)!r}).read()\n"
        'print(\'{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "s"}\' % key)\n'
    )
    (home / "config").write_text(
        f"[profile tenant]\nrole_arn = {ROLE}\nsource_profile = base\n"
        f"[profile base]\ncredential_process = {sys.executable} {script}\n"
    )
    key.write_text("old")
    sts.sources, sts.lifetime = {"old"}, 60.0
    origin = through(gate, world, aws_profile="tenant")
    files = origin.resolve().files
    key.write_text("new")
    sts.sources, gate.keys = {"new"}, set()
    read(origin, files)
    origin.check()
