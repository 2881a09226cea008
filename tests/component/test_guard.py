"""An origin cannot send the daemon into this machine: servers on loopback addresses, and a resolver that lies.

The addresses that nobody may be sent to are 127.0.0.2 and its like, where a canary listens; the hub and the fetch are
allowed 127.0.0.1 by their configuration, and so must not reach the canary, however it is written.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import set_client_factory

from instantstart_fs.core.addresses import permit
from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.manifest import ManifestFile, ModelSpec
from instantstart_fs.core.source import HubSource, S3Source
from instantstart_fs.errors import (
    InstantStartError,
    OriginError,
    OriginIncompatible,
    OriginMisbehaved,
    OriginUnavailable,
)
from instantstart_fs.filler.fetch import Fetcher, new_buffer
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.origins import guard
from instantstart_fs.origins.base import Location
from instantstart_fs.origins.bounds import Bounds
from instantstart_fs.origins.hubclient import new_client
from instantstart_fs.origins.huggingface import HuggingFaceOrigin
from instantstart_fs.origins.s3 import S3Origin
from tests.component.open_origins import open_origin

SECRET = b"what only this machine may know"
COMMIT = "c" * 40


class Site(ThreadingHTTPServer):
    """``answers``: path → (status, headers, body); "" for every other path. ``seen``: (path, Authorization);
    ``proxied``: Proxy-Authorization."""

    daemon_threads = True

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), SiteHandler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.proxied: list[str | None] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class SiteHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((path, self.headers.get("Authorization")))
        self.server.proxied.append(self.headers.get("Proxy-Authorization"))
        status, headers, body = self.server.answers.get(path) or self.server.answers.get("") or (404, {}, b"")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def site(address: str) -> Iterator[Site]:
    server = Site(address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def canary() -> Iterator[Site]:
    with site("127.0.0.2") as server:
        server.answers[""] = (200, {}, SECRET)
        yield server


@pytest.fixture
def hub() -> Iterator[Site]:
    with site("127.0.0.1") as server:
        yield server


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to, in this process; each look-up takes the next answer, and the last one stays."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def lookup(host: Any, port: Any, *args: Any, **keywords: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in known:
            answers = known[name]
            host = answers.pop(0) if len(answers) > 1 else answers[0]
        return real(host, port, *args, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return known


WRITTEN = [
    "127.0.0.2",
    "2130706434",
    "0x7f000002",
    "0x7f.2",
    "127.2",
    "0177.0.0.2",
    "0177.0.0.02",
    "[::ffff:127.0.0.2]",
    "[::ffff:7f00:2]",
    "inside.example",
    "INSIDE.example.",
]


class Bytes:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: memoryview, offset: int) -> None:
        self.data += bytes(data)

    def before_read(self) -> None: ...

    def progress(self, count: int) -> None: ...

    def take_whole(self) -> None: ...


def _fetch(url: str, named: tuple[str, ...] = ("127.0.0.1",), size: int = len(SECRET)) -> bytes:
    taken = Bytes()
    fetcher = Fetcher(WorkerSettings(connect_timeout=2, stall_timeout=2))
    fetcher.fetch(Location(url, named=named, trusted=False), ByteRange(0, size), size, new_buffer(), taken)
    return taken.data


def _origin(hub: Site, host: str = "127.0.0.1", **settings: Any) -> HuggingFaceOrigin:
    return HuggingFaceOrigin(
        HubSource("org/model"),
        ModelSpec("hf://org/model"),
        endpoint=f"http://{host}:{hub.port}",
        token_file=settings.pop("token_file", None),
        timeout=2,
        bounds=Bounds(),
        **settings,
    )


FILE = ManifestFile("a", len(SECRET), "a", COMMIT)


@pytest.mark.parametrize("host", WRITTEN)
def test_a_fetch_is_not_sent_inside_whatever_the_address_looks_like(
    hub: Site, canary: Site, names: dict[str, list[str]], host: str
) -> None:
    names |= {"inside.example": ["127.0.0.2"], "INSIDE.example.": ["127.0.0.2"], "inside.example.": ["127.0.0.2"]}
    inside = f"http://{host}:{canary.port}/x"
    hub.answers["/once"] = (302, {"Location": inside}, b"")
    hub.answers["/twice"] = (302, {"Location": "/once"}, b"")
    for url in (inside, f"http://127.0.0.1:{hub.port}/once", f"http://127.0.0.1:{hub.port}/twice"):
        with pytest.raises((OriginIncompatible, OriginMisbehaved), match="allow_private"):
            _fetch(url)
    assert canary.seen == []
    assert _fetch(inside, named=("127.0.0.0/8",)) == SECRET


@pytest.mark.parametrize("host", WRITTEN)
def test_a_hub_does_not_send_its_files_or_its_api_inside(
    hub: Site, canary: Site, names: dict[str, list[str]], host: str
) -> None:
    """The whole way: what `locate` takes is what the workers fetch."""
    names |= {"inside.example": ["127.0.0.2"], "INSIDE.example.": ["127.0.0.2"], "inside.example.": ["127.0.0.2"]}
    inside = f"http://{host}:{canary.port}/x"
    head = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(SECRET)), "ETag": '"e"', "Location": inside}
    hub.answers[f"/org/model/resolve/{COMMIT}/a"] = (302, head, b"")
    hub.answers["/api/models/org/model"] = hub.answers["/api/models/org/model/revision/main"] = (
        307,
        {"Location": inside},
        b"",
    )
    origin = _origin(hub)
    with pytest.raises(InstantStartError, match="allow_private"):
        fetcher = Fetcher(WorkerSettings(connect_timeout=2, stall_timeout=2))
        size = len(SECRET)
        fetcher.fetch(origin.locate(FILE), ByteRange(0, size), size, new_buffer(), Bytes())
    with pytest.raises(OriginError, match=r"allow_private|Invalid URL"):  # the client reads no octal numbers
        origin.resolve()
    assert canary.seen == []


def test_a_hub_of_another_name_does_not_make_its_address_known(
    hub: Site, names: dict[str, list[str]], tmp_path: Any
) -> None:
    """A hub that is named by a name which leads to loopback may be asked, and may not send anybody to 127.0.0.1."""
    names["hub.example"] = ["127.0.0.1"]
    with site("127.0.0.1") as local:
        local.answers[""] = (200, {}, SECRET)
        head = {"X-Repo-Commit": COMMIT, "ETag": '"e"', "Location": f"http://127.0.0.1:{local.port}/x"}
        hub.answers[f"/org/model/resolve/{COMMIT}/a"] = (302, head, b"")
        with pytest.raises(OriginIncompatible, match="allow_private"):
            _origin(hub, "hub.example").locate(FILE)
        assert [path for path, _ in hub.seen] == [f"/org/model/resolve/{COMMIT}/a"] and local.seen == []
        location = _origin(hub, "hub.example", allow_private=("127.0.0.1",)).locate(FILE)
        assert _fetch(location.url, location.named) == SECRET


def test_what_was_judged_is_what_is_connected_to(hub: Site, canary: Site, names: dict[str, list[str]]) -> None:
    """A name that answers differently the second time gains nothing: it is asked once."""
    hub.answers[""] = (200, {}, SECRET)
    names["rebinding.example"] = ["127.0.0.1", "127.0.0.2"]
    with guard.connect("rebinding.example", hub.port, permit(("127.0.0.1",)), 2) as connection:
        assert connection.getpeername() == ("127.0.0.1", hub.port)
    with pytest.raises(OriginMisbehaved):
        guard.connect("rebinding.example", canary.port, permit(("127.0.0.1",)), 2)


def test_a_connection_that_one_may_use_another_may_not(canary: Site) -> None:
    fetcher = Fetcher(WorkerSettings(connect_timeout=2, stall_timeout=2))
    url, size = f"http://127.0.0.2:{canary.port}/x", len(SECRET)
    taken = Bytes()
    fetcher.fetch(Location(url, named=("127.0.0.2",)), ByteRange(0, size), size, new_buffer(), taken)
    assert taken.data == SECRET
    with pytest.raises(OriginIncompatible):
        fetcher.fetch(Location(url, named=("127.0.0.1",)), ByteRange(0, size), size, new_buffer(), Bytes())
    assert len(canary.seen) == 1


def test_the_api_is_followed_without_credentials_to_another_host(hub: Site, canary: Site, tmp_path: Any) -> None:
    (token_file := tmp_path / "token").write_text("hf_secretsecretsecret")
    token_file.chmod(0o600)
    info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": "a", "size": 1, "blobId": "b" * 40}]}
    canary.answers[""] = (200, {"Content-Type": "application/json"}, json.dumps(info).encode())
    there = f"http://127.0.0.2:{canary.port}/api"
    for path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
        hub.answers[path] = (307, {"Location": there}, b"")
    head = {"X-Repo-Commit": COMMIT, "Content-Length": "1", "ETag": '"e"'}
    hub.answers[f"/org/model/resolve/{COMMIT}/a"] = (200, head | {"ETag": f'"{"b" * 40}"'}, b"x")
    origin = _origin(hub, token_file=str(token_file), allow_private=("127.0.0.2",))
    assert origin._info().sha == COMMIT
    assert hub.seen[0][1] == "Bearer hf_secretsecretsecret"
    assert [authorization for _, authorization in canary.seen] == [None]
    for path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
        hub.answers[path] = (307, {"Location": path}, b"")
    with pytest.raises(OriginMisbehaved, match="redirects"):
        origin._info()


def test_s3_follows_no_redirect_of_its_api(canary: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with site("127.0.0.1") as s3:
        s3.answers[""] = (307, {"Location": f"http://127.0.0.2:{canary.port}/b", "x-amz-bucket-region": "x@evil"}, b"")
        origin = S3Origin(
            S3Source("bucket"),
            ModelSpec("s3://bucket"),
            endpoint_url=f"http://127.0.0.1:{s3.port}",
            region_name=None,
            profile=None,
            timeout=2,
            bounds=Bounds(),
        )
        with pytest.raises(OriginError):
            origin.resolve()
    assert s3.seen and canary.seen == []


@pytest.mark.parametrize("written", ["http://evil.example\\@hub.example/x", "http://evil.example\\@u:p@hub.example/"])
def test_an_address_that_is_read_in_two_ways_is_not_followed(written: str) -> None:
    """urlsplit finds one host in it, urllib3 the other: the one would be judged, and get the token, for the other."""
    with pytest.raises(OriginIncompatible, match="another way"):
        guard.next_address("http://hub.example/", written)


def test_behind_a_proxy_the_name_is_judged_too(
    hub: Site, canary: Site, monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]
) -> None:
    """The proxy connects; what this machine can tell of the name is judged before it is asked."""
    names |= {"inside.example": ["127.0.0.2"]}
    hub.answers[""] = (200, {}, SECRET)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("no_proxy", "")
    lookup = socket.getaddrinfo

    def both(host: Any, *args: Any, **keywords: Any) -> Any:
        if host == "both.example":
            return [*lookup("127.0.0.1", *args, **keywords), *lookup("127.0.0.2", *args, **keywords)]
        return lookup(host, *args, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    # Of several addresses it is the proxy that chooses.
    for host in ("inside.example", "127.0.0.2", "2130706434", "both.example"):
        with pytest.raises((OriginIncompatible, OriginMisbehaved), match="allow_private"):
            _fetch(f"http://{host}:{canary.port}/x")
    assert hub.seen == []
    assert _fetch("http://a-name-that-only-the-proxy-knows.invalid/x") == SECRET


@contextlib.contextmanager
def dripping(head: bytes, rest: bytes) -> Iterator[str]:
    """HOST:PORT of a server that answers everybody with ``head``, and then ``rest`` again and again."""
    done = threading.Event()

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.sendall(head)
            while not done.wait(0.05):
                client.sendall(rest)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"", b"x"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["status", "headers", "interim answers"],
)
@pytest.mark.parametrize("behind", ["a server", "a proxy"])
def test_a_hub_that_drips_is_given_up(behind: str, head: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with dripping(head, rest) as place:
        endpoint = f"http://{place}"
        if behind == "a proxy":
            monkeypatch.setenv("https_proxy", f"http://me:secret@{place}")
            monkeypatch.setenv("no_proxy", "")
            endpoint = "https://hub.invalid"
        set_client_factory(new_client)
        origin = HuggingFaceOrigin(
            HubSource("o/r"), ModelSpec("hf://o/r"), endpoint=endpoint, token_file=None, timeout=0.5, anonymous=True
        )
        began = time.monotonic()
        try:
            with pytest.raises(OriginUnavailable, match=r"did not answer within|cannot be reached"):
                origin._head("a", COMMIT)
        finally:
            set_client_factory(new_client)
        assert time.monotonic() - began < 10  # the test's end is the only one there would be


def test_a_proxy_of_the_environment_gets_its_password(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:p%40w@127.0.0.1:{hub.port}")
    monkeypatch.setenv("no_proxy", "")
    hub.answers[""] = (200, {"Content-Type": "application/json"}, json.dumps({"sha": COMMIT}).encode())
    set_client_factory(new_client)
    origin = HuggingFaceOrigin(
        HubSource("o/r"), ModelSpec("hf://o/r"), endpoint="http://hub.invalid", token_file=None, timeout=2
    )
    try:
        assert origin._info().sha == COMMIT
    finally:
        set_client_factory(new_client)
    assert hub.proxied == ["Basic bWU6cEB3"] and hub.seen[0][0].startswith("http://hub.invalid/api/")


UNUSABLE_PROXIES = [
    ("http_proxy", "http://me:Xq7/Zk9@127.0.0.1:9"),
    ("http_proxy", "socks5://me:Xq7@127.0.0.1:9"),
    ("all_proxy", "//me:Xq7@127.0.0.1:9"),
]


@pytest.mark.parametrize(
    ("scheme", "variable", "value"),
    [
        *(("hf", *proxy) for proxy in UNUSABLE_PROXIES),
        *(("s3", *proxy) for proxy in UNUSABLE_PROXIES),
        ("hf", "HF_ENDPOINT", "http://me:Xq7/Zk9@hub.example"),
        ("s3", "AWS_ENDPOINT_URL", "http://me:Xq7/Zk9@s3.example"),
    ],
)
def test_an_address_in_the_environment_that_can_be_none_is_said_without_its_password(
    scheme: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("no_proxy", "")
    set_client_factory(new_client)  # a new one: proxies are read once
    told = None if variable in ("HF_ENDPOINT", "AWS_ENDPOINT_URL") else f"http://{scheme}.example"
    origin = open_origin(scheme, told)
    try:
        with pytest.raises(OriginUnavailable, match="not an http://") as caught:
            origin.resolve()
    finally:
        set_client_factory(new_client)
    chain = "".join(traceback.format_exception(caught.value))
    assert "Xq7" not in chain and "Zk9" not in chain


def test_a_password_in_the_hubs_endpoint_is_used_and_not_shown(hub: Site) -> None:
    origin = _origin(hub, "me:sec%2Fret@127.0.0.1")
    with pytest.raises(OriginError) as caught:
        origin.resolve()
    assert hub.seen[0][1] == "Basic bWU6c2VjL3JldA=="
    head = {"X-Repo-Commit": COMMIT, "ETag": '"e"'}
    hub.answers[f"/org/model/resolve/{COMMIT}/a"] = (200, head, SECRET)
    location = origin.locate(FILE)
    for shown in (str(caught.value), str(origin.key), location.url):
        assert "ret" not in shown.replace("secret", "ret") and "me:" not in shown
    taken = Bytes()
    Fetcher(WorkerSettings()).fetch(location, ByteRange(0, len(SECRET)), len(SECRET), new_buffer(), taken)
    assert taken.data == SECRET and hub.seen[-1][1] == "Basic bWU6c2VjL3JldA=="
