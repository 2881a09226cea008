"""Whatever is asked of /v1, on the control socket and over TCP, with the API's token and without: an answer that
/openapi.json foresees, or an error of ours; no defect, and no hang, and over TCP nothing without the token."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantstart_fs.control.client import Client
from instantstart_fs.control.http_verbs import VERBS
from instantstart_fs.web import openapi
from tests.component.test_http_api import Unix
from tests.harness import Daemon, model_directory, wait_for

DOCUMENT = openapi.describe()
DEADLINE = 60.0
TOKEN = "a-token-of-the-fuzz-0123456789"
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["p", "q", "..", "%00", "a/b", "%2e%2e", "é", "\ud800", "x" * 3000, "-1", "1e400", "NaN", "*", "[", "0777"]
    ),
    st.sampled_from(["file:///nowhere", "hf://a/b", "s3://b/k", "https://user:secret@h/x", "org/repo", "/etc/passwd"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("fuzz")
    model_directory(root / "model", weights=(65536,))
    origins = {"huggingface": {"endpoint": "http://127.0.0.1:9"}, "s3": {"endpoint_url": "http://127.0.0.1:9"}}
    token = root / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    http = {"listen": "127.0.0.1:0", "api_token_file": str(token)}
    with Daemon(root / "d", config={"origins": origins, "http": http}, allow=["."]) as running:
        for name in ("p", "q"):
            running.ok("add", name, f"file://{root / 'model'}")
        wait_for(lambda: tcp_port(running), "the page")  # its libraries are imported after the daemon is ready
        yield running


def tcp_port(daemon: Daemon) -> int:
    with Client(str(daemon.socket)) as client:
        return urllib.parse.urlsplit(client.ping().http or "").port or 0


SOCKET, BEARER, WRONG, NOBODY = "socket", f"Bearer {TOKEN}", "Bearer wrong-wrong-wrong-wrong", ""
doors = st.sampled_from([SOCKET, BEARER, BEARER, WRONG, f"Basic {TOKEN}", f"bearer  {TOKEN}x", NOBODY])
"""The control socket, or the Authorization of a request over TCP."""


def connected(daemon: Daemon, door: str) -> http.client.HTTPConnection:
    if door == SOCKET:
        return Unix(str(daemon.socket))
    return http.client.HTTPConnection("127.0.0.1", tcp_port(daemon), timeout=DEADLINE)


def fields(verb: Any) -> list[str]:
    return list(verb.arguments.__struct_fields__)


@st.composite
def asked(draw: st.DrawFn) -> tuple[Any, str, bytes | None]:
    """A verb, its target, and a body: mostly the fields that it has, with values that fit or do not."""
    verb = draw(st.sampled_from(VERBS))
    pipeline = draw(texts if verb.method == "DELETE" else st.one_of(st.sampled_from(["p", "q"]), texts))
    if verb.method == "DELETE" and pipeline in ("p", "q"):
        pipeline = "neither"
    target = verb.path.replace("{pipeline}", urllib.parse.quote(pipeline, safe="", errors="surrogatepass"))
    given_values = draw(
        st.dictionaries(st.one_of(st.sampled_from([*fields(verb), "timeout"]), texts), values, max_size=4)
    )
    if verb.streams == "always" or "wait" in given_values or "rate" in given_values:
        target += "?timeout=0.2"
    body = None
    if verb.in_body:
        body = json.dumps(given_values).encode()
    elif given_values and "?" not in target:
        shown = {key: json.dumps(value) if not isinstance(value, str) else value for key, value in given_values.items()}
        target += "?" + urllib.parse.urlencode(shown, errors="surrogatepass")
    return verb, target, body


@MANY
@given(case=asked(), accept=st.sampled_from(["*/*", "application/x-ndjson", "text/html;q=0", ","]), door=doors)
def test_what_the_document_describes(
    daemon: Daemon, case: tuple[Any, str, bytes | None], accept: str, door: str
) -> None:
    verb, target, body = case
    connection = connected(daemon, door)
    try:
        headers = {"Accept": accept, **({"Content-Type": "application/json"} if body is not None else {})}
        if door not in (SOCKET, NOBODY):
            headers["Authorization"] = door
        connection.request(verb.method, target, body, headers)
        answer = connection.getresponse()
        said = answer.read()
    finally:
        connection.close()
    assert answer.status not in (500, 501), said
    if door in (SOCKET, BEARER):
        assert answer.status != 401, said
        check_answer(verb, answer, said)
    else:
        assert answer.status == 401 and json.loads(said)["error"]["code"] == "unauthorized", said


def check_answer(verb: Any, answer: http.client.HTTPResponse, said: bytes) -> None:
    responses = DOCUMENT["paths"][verb.path][verb.method.lower()]["responses"]
    kind = (answer.headers.get("Content-Type") or "").partition(";")[0]
    found = responses.get(str(answer.status), responses["default"])
    if answer.status == 204:
        assert said == b""
        return
    schema = {**found["content"][kind]["schema"], "components": DOCUMENT["components"]}
    for line in said.splitlines() if kind == "application/x-ndjson" else [said]:
        jsonschema.validate(json.loads(line), schema)
    if answer.status >= 400:
        error = json.loads(said)["error"]
        assert error["message"] and "\n" not in error["message"] and "secret" not in error["message"]


HEADS = st.sampled_from(
    [
        b"GET /v1/daemon HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/pipelines/p/pin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n",
        b"PUT /v1/pipelines/%2e%2e HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n",
        b"GET http://localhost/v1/daemon HTTP/1.1\r\nHost: localhost\r\n",
        b"GET //v1//daemon HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /v1/pipelines/../daemon HTTP/1.1\r\nHost: localhost\r\n",
        b"get /v1/daemon http/1.1\r\nhost: localhost\r\n",
        b"GET /v1/daemon HTTP/2.0\r\nHost: localhost\r\n",
        b"GET /v1/daemon HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)
LINES = st.sampled_from(
    [
        b"Host: evil\r\n",
        b"Host: localhost:99999999999\r\n",
        b"Host: [::1\r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
        b"Authorization: Basic Og==\r\n",
        b"Authorization: " + BEARER.encode() + b"\r\n",
        b"Authorization: " + BEARER.encode() + b"\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 0x10\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n",
        b"Expect: miracles\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
        b"Connection: close\r\n",
        b"Accept: application/x-ndjson\r\n",
        b"X-A: " + b"a" * 20_000 + b"\r\n",
        b"X: \x00\r\n",
        b" folded\r\n",
        b"No-Colon\r\n",
        b"\xf0\x9f\x98\x80: x\r\n",
        b"Origin: null\r\n",
        b"Range: bytes=0-\r\n",
    ]
)
BODIES = st.sampled_from(
    [
        b"", b"{}", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"5\r\n{}\r\n", b"2\r\n{}\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b'{"a":' * 5000, b'{"pipeline": "q", "type": "remove"}', b"GET /v1/daemon HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
)  # fmt: skip


@MANY
@given(
    head=HEADS,
    lines=st.lists(LINES, max_size=3),
    body=st.one_of(BODIES, st.binary(max_size=60)),
    over_tcp=st.booleans(),
)
def test_bytes_that_are_hardly_http(
    daemon: Daemon, head: bytes, lines: list[bytes], body: bytes, over_tcp: bool
) -> None:
    received = b""
    with socket.socket(socket.AF_INET if over_tcp else socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(("127.0.0.1", tcp_port(daemon)) if over_tcp else str(daemon.socket))
        try:
            client.sendall(head + b"".join(lines) + b"\r\n" + body)
            client.shutdown(socket.SHUT_WR)
            while chunk := client.recv(65536):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
    if received:
        assert received.startswith((b"HTTP/1.1 ", b'{"type"')), received[:200]
        if over_tcp and b"Authorization: Bearer " + TOKEN.encode() not in b"".join(lines) + body:
            assert not received.startswith(b"HTTP/1.1 2"), received
        assert not received.startswith(b"HTTP/1.1 500"), received  # 501: an unknown Transfer-Encoding (RFC 9112, 6.1)
    # Whatever came before, the next one is served, and what was asked by nobody is not done.
    assert daemon_is_well(daemon, BEARER if over_tcp else SOCKET)


def daemon_is_well(daemon: Daemon, door: str) -> bool:
    connection = connected(daemon, door)
    try:
        connection.request("GET", "/v1/names", headers={"Authorization": BEARER} if door == BEARER else {})
        return {"p", "q"} <= set(json.loads(connection.getresponse().read()))
    finally:
        connection.close()
