"""What is S3's own: pins, checksums and multipart ETags as a real engine makes them, profiles, refusals."""

from __future__ import annotations

import gzip
import random
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.errors import AccessRefused, OriginThrottled
from instantstart_fs.filler.fetch import Fetcher, new_buffer
from instantstart_fs.filler.messages import WorkerSettings
from tests.contract.worlds import S3World, fetch
from tests.servers.seaweed import SeaweedServer

PART = 5 * 1024 * 1024
BIG = random.Random(7).randbytes(2 * PART + 12345)


@pytest.fixture
def world(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> S3World:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return S3World(seaweed, versioning=False)


def only(world: S3World, **globs: tuple[str, ...]) -> ManifestFile:
    (file,) = world.origin(**globs).resolve().files
    return file


def multipart(world: S3World, path: str, parts: list[bytes], **options: str) -> None:
    key = f"{world.prefix}/{path}"
    upload = world.client.create_multipart_upload(Bucket=world.bucket, Key=key, **options)["UploadId"]
    done = []
    for number, part in enumerate(parts, 1):
        answer = world.client.upload_part(
            Bucket=world.bucket, Key=key, UploadId=upload, PartNumber=number, Body=part, **options
        )
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        done.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
    world.client.complete_multipart_upload(
        Bucket=world.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": done}
    )


def proves(file: ManifestFile, content: bytes) -> bool:
    hasher = new_hasher(file.digest, file.size)
    hasher.update(content)
    return file.digest is not None and hasher.hexdigest() == file.digest.value


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC64NVME", "SHA1", "CRC32C", "CRC32"])
def test_a_checksum_given_at_upload_is_the_digest(world: S3World, algorithm: str) -> None:
    content = random.Random(5).randbytes(100_000)
    world.client.put_object(Bucket=world.bucket, Key=f"{world.prefix}/x.bin", Body=content, ChecksumAlgorithm=algorithm)
    file = only(world)
    assert file.digest is not None
    assert file.digest.algorithm == algorithm.lower()
    assert proves(file, content)
    assert not proves(file, content[:-1] + b"\0")


def test_an_object_stored_with_an_encoding_is_its_stored_bytes(world: S3World) -> None:
    """Length, ETag and digest speak of them; nobody unpacks them on the way."""
    stored = gzip.compress(random.Random(6).randbytes(200_000))
    world.client.put_object(Bucket=world.bucket, Key=f"{world.prefix}/x.bin", Body=stored, ContentEncoding="gzip")
    file = only(world)
    assert file.size == len(stored) and proves(file, stored)
    location = world.origin().locate(file)
    for wanted in (ByteRange(0, len(stored)), ByteRange(70_000, 150_000)):
        taken = bytearray()

        class Sink:
            def write(self, data: memoryview, offset: int, taken: bytearray = taken) -> None:
                taken.extend(data)

            def before_read(self) -> None: ...

            def progress(self, count: int) -> None: ...

            def take_whole(self) -> None: ...

        Fetcher(WorkerSettings()).fetch(location, wanted, file.size, new_buffer(), Sink())
        assert taken == stored[wanted.start : wanted.stop]


def test_a_multipart_upload_is_proven_part_by_part(world: S3World) -> None:
    multipart(world, "x.bin", [BIG[:PART], BIG[PART : 2 * PART], BIG[2 * PART :]])
    file = only(world)
    assert file.digest is not None
    assert file.digest.part_size in (0, PART)
    assert proves(file, BIG)
    assert not proves(file, b"\0" + BIG[1:])


def test_boto3s_own_upload_of_a_big_file_is_proven(world: S3World, tmp_path: Path) -> None:
    big = tmp_path / "model.safetensors"
    big.write_bytes(BIG * 2)
    world.seaweed.upload(tmp_path, world.bucket, world.prefix)
    file = only(world)
    assert proves(file, BIG * 2)
    assert fetch(world.origin().locate(file), PART - 3, PART + 3) == (BIG * 2)[PART - 3 : PART + 3]


def test_parts_of_mixed_sizes_prove_nothing_and_pin_all_the_same(world: S3World) -> None:
    multipart(world, "x.bin", [BIG[: PART + 1], BIG[PART + 1 : 2 * PART + 1], BIG[2 * PART + 1 :] + BIG[:PART]])
    file = only(world)
    content = BIG + BIG[:PART]
    assert file.digest is None or proves(file, content)
    assert file.version.startswith("etag=")


def test_a_versioned_object_stays_readable_after_it_was_replaced(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    world = S3World(seaweed, versioning=True)
    world.put({"x.bin": b"first"})
    origin, file = world.origin(), only(world)
    assert file.version.startswith("version-id=")
    world.replace("x.bin", b"other")
    assert fetch(origin.locate(file), 0, 5) == b"first"


def test_without_versions_a_replaced_object_answers_412(world: S3World) -> None:
    world.put({"x.bin": b"first"})
    origin, file = world.origin(), only(world)
    world.replace("x.bin", b"other")
    with pytest.raises(urllib.error.HTTPError, match="412") as refused:
        fetch(origin.locate(file), 0, 5)
    refused.value.close()


def test_a_prefix_is_a_directory_and_not_a_string(world: S3World) -> None:
    world.put({"x.bin": b"x"})
    world.client.put_object(Bucket=world.bucket, Key=f"{world.prefix}-other/y.bin", Body=b"y")
    assert only(world).path == "x.bin"


def test_one_object_can_be_named(world: S3World) -> None:
    world.put({"deep/x.bin": b"content"})
    origin = world.origin(f"{world.source}/deep/x.bin")
    origin.check()
    (file,) = origin.resolve().files
    assert (file.path, file.size) == ("x.bin", 7)
    assert fetch(origin.locate(file), 0, 7) == b"content"


def test_directory_markers_are_no_files(world: S3World) -> None:
    world.put({"x.bin": b"x"})
    world.client.put_object(Bucket=world.bucket, Key=f"{world.prefix}/empty/", Body=b"")
    assert only(world).path == "x.bin"


def test_more_objects_than_a_page(world: S3World) -> None:
    world.put({f"{number:04}.json": b"{}" for number in range(1050)})
    assert len(world.origin().resolve().files) == 1050


def test_no_credentials(world: S3World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put({"x.bin": b"x"})
    file = only(world)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    origin = world.origin()
    for call in (origin.resolve, origin.check, lambda: origin.locate(file)):
        with pytest.raises(AccessRefused, match="--aws-profile"):
            call()


@pytest.mark.parametrize(
    ("access", "secret"), [("unknown-key-id", "test-secret-key"), ("test-access-key", "wrong-secret-value")]
)
def test_bad_credentials(world: S3World, monkeypatch: pytest.MonkeyPatch, access: str, secret: str) -> None:
    world.put({"x.bin": b"x"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    for call in (world.origin().resolve, world.origin().check):
        with pytest.raises(AccessRefused, match="refused") as refused:
            call()
        assert access not in refused.value.message
        assert secret not in refused.value.message


def test_a_pipelines_profile_and_no_other(world: S3World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put({"x.bin": b"x"})
    credentials = tmp_path / "credentials"
    credentials.write_text(
        "[tenant]\naws_access_key_id = test-access-key\naws_secret_access_key = test-secret-key\n"
        "[wrong]\naws_access_key_id = test-access-key\naws_secret_access_key = nonsense\n"
    )
    credentials.chmod(0o600)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    # the machine's own keys work, and must not be used in place of a profile's
    for profile in ("wrong", "missing"):
        with pytest.raises(AccessRefused, match=profile):
            world.origin(profile=profile).resolve()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert len(world.origin(profile="tenant").resolve().files) == 1


class Canned(ThreadingHTTPServer):
    """Answers every request with what ``answer(path, query)`` says, for what no real engine can be made to say."""

    daemon_threads = True

    def __init__(self) -> None:
        self.status, self.body, self.headers = 200, b"", {}
        super().__init__(("127.0.0.1", 0), CannedHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class CannedHandler(BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        listing = "list-type" in parse_qs(urlsplit(self.path).query) or self.server.status != 200
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        body = self.server.body if listing else b""
        self.send_header("ETag", '"d41d8cd98f00b204e9800998ecf8427e"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def canned() -> Iterator[Canned]:
    with Canned() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["../../etc/cron.d/evil", "/absolute", "a//b", "./x", "x" * 300])
def test_odd_keys_are_left_out_and_told_of(world: S3World, canned: Canned, name: str) -> None:
    canned.body = (
        "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
        "<IsTruncated>false</IsTruncated>"
        f"<Contents><Key>{world.prefix}/{name}</Key><Size>0</Size></Contents>"
        f"<Contents><Key>{world.prefix}/config.json</Key><Size>0</Size></Contents></ListBucketResult>"
    ).encode()
    manifest = world.origin(endpoint=canned.url).resolve()
    assert [file.path for file in manifest.files] == ["config.json"]
    assert manifest.skipped is not None
    assert manifest.skipped.count == 1
    assert manifest.skipped.first[0].startswith(name[:100])


def test_slow_down_is_told_with_its_wait(world: S3World, canned: Canned) -> None:
    canned.status, canned.headers = 503, {"Retry-After": "9"}
    canned.body = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
    with pytest.raises(OriginThrottled, match="SlowDown") as throttled:
        world.origin(endpoint=canned.url).resolve()
    assert throttled.value.retry_after == 9.0


def test_access_denied(world: S3World, canned: Canned) -> None:
    canned.status, canned.body = 403, b"<Error><Code>AccessDenied</Code></Error>"
    with pytest.raises(AccessRefused, match="s3:ListBucket"):
        world.origin(endpoint=canned.url).resolve()
