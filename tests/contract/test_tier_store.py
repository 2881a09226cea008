"""What the regional tier needs of its storage, on each kind: SeaweedFS' S3, a shared directory, an engine that runs.

The last is named by INSTANTSTART_TEST_S3=http://ACCESS_KEY:SECRET_KEY@HOST:PORT; the keys may make buckets.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import random
import socket
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.errors import (
    AccessRefused,
    InstantStartError,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.filler.fetch import Fetcher, new_buffer
from instantstart_fs.filler.messages import Piece, WorkerSettings
from instantstart_fs.filler.pieces import fetch_piece
from instantstart_fs.origins.base import Location
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.probe import probe
from instantstart_fs.regional.s3 import PIECE, S3Store, _listing
from instantstart_fs.regional.store import TierStore
from instantstart_fs.regional.stores import open_store
from tests.contract.worlds import fetch
from tests.servers.blackhole import BlackHole
from tests.servers.ports import free_ports
from tests.servers.seaweed import SeaweedServer

ENGINE = urllib.parse.urlsplit(os.environ.get("INSTANTSTART_TEST_S3", ""))


@pytest.fixture(params=["s3", "directory", *(["engine"] if ENGINE.hostname else [])])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TierStore:
    if request.param == "directory":
        (tmp_path / "shared dir").mkdir()
        return open_store(f"file://{tmp_path}/shared dir")
    if request.param == "engine":
        import boto3

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ENGINE.username or "")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ENGINE.password or "")
        endpoint = f"{ENGINE.scheme}://{ENGINE.hostname}:{ENGINE.port}"
        bucket = f"tier-{uuid.uuid4().hex[:12]}"
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
        return open_store(f"s3://{bucket}/a b", endpoint_url=endpoint)
    server: SeaweedServer = request.getfixturevalue("seaweed")
    bucket = server.new_bucket(f"tier-{uuid.uuid4().hex[:12]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    return open_store(f"s3://{bucket}/a b", endpoint_url=server.endpoint_url)


def test_what_was_put_comes_back(store: TierStore) -> None:
    store.put("v1/x/one", b"first")
    store.put("v1/x/one", memoryview(b"second"))
    assert store.get("v1/x/one", 100) == b"second"
    with pytest.raises(OriginNotFound):
        store.get("v1/x/two", 100)


def test_an_object_that_is_too_large_is_refused(store: TierStore) -> None:
    store.put("v1/x/large", b"x" * 2000)
    with pytest.raises(OriginMisbehaved):
        store.get("v1/x/large", 1000)


def test_of_many_that_write_one_new_object_one_wins(store: TierStore) -> None:
    wins: list[int] = []
    lines = threading.Barrier(6)

    def race(number: int) -> None:
        lines.wait()
        try:
            if store.put_new("v1/k/claim", str(number).encode()):
                wins.append(number)
        except OriginUnavailable:  # the time-out of a loser: SeaweedFS lets them wait for seconds
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in wins] == [store.get("v1/k/claim", 10)]
    assert not store.put_new("v1/k/claim", b"late")


def test_a_listing_tells_names_below_the_prefix_and_ends(store: TierStore) -> None:
    for number in range(5):
        store.put(f"v1/p/c/{number:08x}", b"12345")
    store.put("v1/q/c/00000000", b"other")
    found = list(store.list("v1/p/", 100))
    assert sorted(one.name for one in found) == [f"v1/p/c/{number:08x}" for number in range(5)]
    assert {one.size for one in found} == {5}
    assert all(one.modified > 1e9 for one in found)
    assert len(list(store.list("v1/p/", 3))) == 3
    assert list(store.list("v1/nothing/", 10)) == []


def test_a_prefix_may_end_within_a_name(store: TierStore) -> None:
    for name in ("c/00000008", "c/0000000f", "c/00000010", "k/00000001.0000"):
        store.put(f"v1/p/{name}", b"x")
    assert sorted(each.name for each in store.list("v1/p/c/0000000", 100)) == ["v1/p/c/00000008", "v1/p/c/0000000f"]
    assert [each.name for each in store.list("v1/p/c/00000010", 100)] == ["v1/p/c/00000010"]


def test_what_was_deleted_is_gone_and_deleting_it_again_does_nothing(store: TierStore) -> None:
    store.put("v1/x/gone", b"1")
    store.delete("v1/x/gone")
    store.delete("v1/x/gone")
    with pytest.raises(OriginNotFound):
        store.get("v1/x/gone", 10)


def test_an_emptied_tier_is_still_one(store: TierStore) -> None:
    """A shared directory whose last object goes stays: without it the next look would call the tier unreachable."""
    store.put("v1/slot/c/one", b"x")
    store.delete("v1/slot/c/one")
    assert list(store.list("v1/", 10)) == []


def test_a_share_that_is_not_mounted_is_neither_made_nor_taken_for_an_empty_tier(tmp_path: Path) -> None:
    """Its chunks would fill the disk below the mount point."""
    store = open_store(f"file://{tmp_path}/share/tier/")
    calls: list[Callable[[], object]] = [
        lambda: store.put("v1/x/one", b"x"),
        lambda: store.put_new("v1/x/one", b"x"),
        lambda: store.get("v1/x/one", 10),
        lambda: list(store.list("v1/", 10)),
    ]
    for call in calls:
        with pytest.raises(OriginUnavailable, match="is not there"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_share_without_hard_links_takes_chunks_and_no_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As SMB, FAT and many filesystems of FUSE. A claim that failed for another reason would close the tier for chunks,
    too."""

    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    store = open_store(f"file://{tmp_path}")
    with pytest.raises(OriginUnsupported, match="hard links"):
        store.put_new("v1/x/one", b"x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.put("v1/x/one", b"x")
    assert store.get("v1/x/one", 10) == b"x" and probe(store).winners == 0


def test_a_delete_that_takes_the_directory_costs_no_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last object of a directory goes while another host is about to write one there."""
    store = open_store(f"file://{tmp_path}")
    store.put("v1/x/c/old", b"old")
    real, taken = os.open, []

    def late(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and len(taken) < 3:
            taken.append(path)
            store.delete("v1/x/c/old")  # its directories, too
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", late)
    store.put("v1/x/c/new", b"new")
    assert store.get("v1/x/c/new", 10) == b"new"
    assert store.put_new("v1/x/k/claim", b"claim")


def test_an_address_opens_the_object_to_whoever_has_it(store: TierStore) -> None:
    store.put("v1/x/chunk", b"0123456789")
    address = store.address("v1/x/chunk")
    with urllib.request.urlopen(urllib.request.Request(address.url, headers=dict(address.headers))) as answer:
        assert answer.read() == b"0123456789"


def test_wrong_credentials_are_refused(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    store = open_store("s3://tier/p", endpoint_url=seaweed.endpoint_url)
    with pytest.raises(AccessRefused):
        store.put("v1/x", b"1")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off_is_found_out(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    store = open_store(
        f"s3://{seaweed.new_bucket(f'clock-{uuid.uuid4().hex[:12]}')}/clock", endpoint_url=seaweed.endpoint_url
    )
    assert isinstance(store, S3Store)

    class Off:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def time() -> float:
            return time.time() + hours * 3600

    monkeypatch.setattr("instantstart_fs.regional.s3.time", Off)
    store.put("v1/x", b"1")
    assert store.get("v1/x", 10) == b"1"
    assert abs(store.skew + hours * 3600) < 60


def test_a_tier_that_is_not_there_says_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    store = open_store("s3://tier/p", endpoint_url=f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(InstantStartError):
        store.get("v1/x", 10)
    assert time.monotonic() - began < 10


# -- what origins promise (tests/contract/test_origins.py), as far as a tier has it --------------------------------


def test_one_address_serves_many_ranged_reads_and_says_when_it_ends(store: TierStore) -> None:
    content = random.Random(1).randbytes(300_000)
    store.put("v1/s/p/c/00000000", content)
    address = store.address("v1/s/p/c/00000000")
    location = Location(address.url, address.headers)
    for start, stop in ((0, 10), (1, 2), (100_000, 300_000), (299_999, 300_000)):
        assert fetch(location, start, stop) == content[start:stop]
    assert (address.expires_at is None) == address.url.startswith("file:")
    if address.expires_at is not None:
        assert 600 < address.expires_at - time.time() <= 7 * 86400


class Memory:
    """A sink that keeps the bytes of one chunk."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def before_read(self) -> None:
        pass

    def progress(self, count: int) -> None:
        pass

    def take_whole(self) -> None:
        return None


def test_a_replaced_object_never_gives_other_bytes(store: TierStore) -> None:
    """Replaced, cut short, grown, of another place, or gone: it is refused, and not taken for the tier's silence."""
    key, content = RegionKey(bytes(32)), random.Random(2).randbytes(200_000)
    fetcher = Fetcher(WorkerSettings(connect_timeout=2, stall_timeout=5))
    name, secret = "v1/s/pin/c/00000003", key.chunk_key("pin", 3, len(content))

    def take(secret: bytes = secret) -> bytes:
        address, sink = store.address(name), Memory()
        wanted = ByteRange(0, len(content))
        fetch_piece(fetcher, Piece(address.url, secret, b"", address.headers), wanted, new_buffer(), sink)
        return bytes(sink.data)

    whole = keyed_digest(secret, content) + content
    store.put(name, whole)
    assert take() == content
    with pytest.raises(OriginMisbehaved):
        take(key.chunk_key("pin", 4, len(content)))
    for wrong in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole + b"x", b""):
        store.put(name, wrong)
        with pytest.raises(OriginMisbehaved):
            take()
    store.delete(name)
    with pytest.raises(OriginNotFound):
        take()


def test_opening_does_no_io() -> None:
    (port,) = free_ports(1)
    store = open_store("s3://bucket/prefix", endpoint_url=f"http://127.0.0.1:{port}")
    assert store.endpoint == f"127.0.0.1:{port}"
    assert open_store("file:///nowhere/at/all").endpoint == "/nowhere/at/all"


def test_a_server_that_never_answers_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with BlackHole() as hole:
        store = open_store("s3://bucket/prefix", endpoint_url=f"http://127.0.0.1:{hole.port}")
        with pytest.raises(OriginUnavailable):
            store.get("v1/x", 100)


@pytest.mark.parametrize("encoding", ["gbk", "nonsense", "shift_jis", "utf-32"])
def test_a_listing_in_an_encoding_that_is_not_read_is_a_misbehaving_tier(encoding: str) -> None:
    with pytest.raises(OriginMisbehaved):
        _listing(f'<?xml version="1.0" encoding="{encoding}"?><a/>'.encode())


@pytest.mark.parametrize(("said", "seconds"), [(b"7", 7.0), (b"\xb2", None), (b"soon", None), (b"", None)])
def test_a_tier_that_asks_for_a_pause_is_understood_or_ignored(
    monkeypatch: pytest.MonkeyPatch, said: bytes, seconds: float | None
) -> None:
    """\xb2 is a digit to str.isdigit, and no number."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    answer = b"HTTP/1.1 503 Slow Down\r\nRetry-After: " + said + b"\r\nContent-Length: 0\r\n\r\n"
    server = SlowServer(1e9, 1, answer)
    try:
        with pytest.raises(OriginThrottled) as caught:
            open_store("s3://tier/p", endpoint_url=f"http://127.0.0.1:{server.port}").get("v1/x", 10)
        assert caught.value.retry_after == seconds
    finally:
        server.close()


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (501, "NotImplemented", OriginUnsupported),
        (400, "InvalidArgument", OriginUnsupported),
        (400, "RequestTimeout", OriginUnavailable),
        (500, "InternalError", OriginUnavailable),
    ],
)
def test_an_engine_without_conditional_writes_says_so(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[InstantStartError]
) -> None:
    """Its hosts pull without claims at once; what fails for the moment is asked again."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    body = f"<Error><Code>{code}</Code></Error>".encode()
    answer = f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    server = SlowServer(1e9, 1, answer)
    try:
        with pytest.raises(error):
            open_store("s3://tier/p", endpoint_url=f"http://127.0.0.1:{server.port}").put_new("v1/x", b"1")
    finally:
        server.close()


class SlowServer:
    """Takes a request of ``size`` bytes at ``rate`` bytes a second, and answers when it has all."""

    def __init__(self, rate: float, size: int, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.port: int = self._socket.getsockname()[1]
        self._rate, self._size = rate, size
        self.received = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection, contextlib.suppress(OSError):
            while self.received < self._size:
                data = connection.recv(65536)
                if not data:
                    return
                self.received += len(data)
                time.sleep(len(data) / self._rate)
            connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.close()


def test_a_chunk_is_sent_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection's time-out is for all that is sent at once: a whole chunk would need a tier of many MB/s."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    sent: list[int] = []
    send = http.client.HTTPConnection.send

    def counted(self: http.client.HTTPConnection, data: Any) -> None:
        sent.append(len(data))
        send(self, data)

    monkeypatch.setattr(http.client.HTTPConnection, "send", counted)
    size = (8 << 20) + 1
    server = SlowServer(1e9, size)
    try:
        open_store("s3://tier/p", endpoint_url=f"http://127.0.0.1:{server.port}").put("v1/x", bytearray(size))
        assert server.received >= size and max(sent) == PIECE
    finally:
        server.close()


def test_a_put_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr("instantstart_fs.regional.store.LEAST_PUT_SECONDS", 0.2)
    monkeypatch.setattr("instantstart_fs.regional.store.SLOWEST_PUT", 1 << 30)
    size = 8 << 20
    server = SlowServer(1e6, size)
    try:
        with pytest.raises(OriginUnavailable):
            open_store("s3://tier/p", endpoint_url=f"http://127.0.0.1:{server.port}").put("v1/x", bytearray(size))
        assert server.received < size
    finally:
        server.close()
