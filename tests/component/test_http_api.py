"""The HTTP API on the control socket, over the scripted library of test_control.py: verbs, errors, hostile input."""

from __future__ import annotations

import http.client
import json
import logging
import pwd
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import trio
import trio.testing

from instantstart_fs.config import HttpConfig, units
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control import connection as connection_module
from instantstart_fs.control import http_verbs, protocol
from instantstart_fs.control.server import ControlServer, serving
from instantstart_fs.core.status import FillStatus
from instantstart_fs.errors import all_errors
from instantstart_fs.library import Library
from instantstart_fs.web import api, openapi
from instantstart_fs.web.control_http import ControlHttp
from tests.component.test_control import INFO, FakeLibrary
from tests.component.test_control import ask as ask_by_lines


class Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


class Answer:
    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> tuple[int, str]:
        return self.status, self.value["error"]["code"]


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "control.sock")


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No client, whatever it does, is a defect of ours."""
    yield
    told = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in told if record.getMessage() != "control request evict failed"] == []


@asynccontextmanager
async def run(library: FakeLibrary, path: str, **options: Any) -> AsyncIterator[ControlServer]:
    library.heartbeats = None  # type: ignore[attr-defined]
    door = ControlHttp(HttpConfig(), cast(Library, library))
    async with serving(library, lambda: INFO, path, http=door, **options) as server:
        yield server


async def ask(path: str, method: str, target: str, body: object = None, **headers: str) -> Answer:
    def call() -> Answer:
        connection = Unix(path)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            if raw is not None:
                given.setdefault("Content-Type", "application/json")
            connection.request(method, target, raw, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    with trio.fail_after(60):
        return await trio.to_thread.run_sync(call)


async def talk(path: str, said: bytes, *, more: Callable[[socket.socket], None] | None = None) -> bytes:
    """All that is answered to these bytes, until the other side closes."""

    def call() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(path)
            received = b""
            try:
                client.sendall(said)
                if more is not None:
                    more(client)
            except (BrokenPipeError, ConnectionResetError):
                pass
            try:
                while chunk := client.recv(65536):
                    received += chunk
            except ConnectionResetError:
                pass
            return received

    with trio.fail_after(60):
        return await trio.to_thread.run_sync(call)


# -- the table and the document ----------------------------------------------------------------------------------------


def test_every_request_of_the_protocol_has_a_verb_or_a_reason() -> None:
    requests = set(protocol.Request.__args__)  # type: ignore[attr-defined]
    assert {verb.request for verb in http_verbs.VERBS} | set(http_verbs.ON_THE_SOCKET_ALONE) == requests
    assert not {verb.request for verb in http_verbs.VERBS} & set(http_verbs.ON_THE_SOCKET_ALONE)
    # A body or a query takes what the request has, beside what the path says.
    for verb in http_verbs.VERBS:
        if verb.request is protocol.Add:
            continue
        said = {*verb.fixed, *(("pipeline",) if "{pipeline}" in verb.path else ())}
        assert {*verb.arguments.__struct_fields__, *said} == set(verb.request.__struct_fields__)
    options = {*http_verbs.AddPipeline.__struct_fields__} - {"source", "warm"}
    assert options == http_verbs.specification.Options.__optional_keys__


def test_every_error_has_a_status_of_its_own_kind() -> None:
    for kind in all_errors():
        status = http_verbs.status_of(kind("x"))
        assert status in (400, 403, 404, 409, 500, 502, 503, 504, 507)
        assert status not in (401, 403) or kind.code == "permission-refused", "an origin's no is not ours"
    wanted = {"pipeline-not-found": 404, "pipeline-busy": 409, "store-full": 507, "invalid-name": 400}
    assert wanted.items() <= {kind.code: http_verbs.status_of(kind("x")) for kind in all_errors()}.items()


def test_the_document_describes_the_table() -> None:
    found = openapi.describe()
    described = {(path, method.upper()) for path, methods in found["paths"].items() for method in methods}
    assert described == {(verb.path, verb.method) for verb in http_verbs.VERBS} | {("/v1/placement/{pipeline}", "GET")}
    names = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def validate(value: object, method: str, path: str, status: str = "200") -> None:
    """By what the document says of that verb's answer."""
    found = openapi.describe()
    answer = found["paths"][path][method.lower()]["responses"][status]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**answer, "components": found["components"]}).validate(value)


# -- verbs -------------------------------------------------------------------------------------------------------------


async def test_verbs_reach_the_library_and_answer_as_the_document_says(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        one = "/v1/pipelines/{pipeline}"
        for method, target, template in (
            ("GET", "/v1/daemon", "/v1/daemon"),
            ("GET", "/v1/pipelines", "/v1/pipelines"),
            ("GET", "/v1/names?prefix=x", "/v1/names"),
            ("GET", "/v1/specs", "/v1/specs"),
            ("GET", "/v1/pipelines/x?brief=true", one),
            ("GET", "/v1/pipelines/%78", one),
            ("POST", "/v1/pipelines/x/update", f"{one}/update"),
            ("POST", "/v1/pipelines/x/access", f"{one}/access"),
            ("POST", "/v1/pipelines/x/warm", f"{one}/warm"),
        ):
            answer = await ask(path, method, target)
            assert answer.status == 200, answer.body
            validate(answer.value, method, template)
        for target, body in (("pin", None), ("unpin", None), ("touch", {})):
            assert (await ask(path, "POST", f"/v1/pipelines/x/{target}", body)).status == 204
        assert (await ask(path, "POST", "/v1/pipelines/x/warm", {"everything": True})).status == 200
        added = await ask(path, "PUT", "/v1/pipelines/y", {"source": "org/repo", "mode": "0550", "warm": True})
        assert added.status == 201 and library.specs["y"].models[0].source == "hf://org/repo"
        validate(added.value, "PUT", one, "201")
        assert library.specs["y"].mode == 0o550
        removed = await ask(path, "DELETE", "/v1/pipelines/x")
        assert removed.value == [] and (await ask(path, "DELETE", "/v1/pipelines/x?force=true")).value
        document = await ask(path, "GET", "/openapi.json")
        assert document.value == json.loads(json.dumps(openapi.describe()))
        # Lines and HTTP on one socket, beside one another.
        assert await ask_by_lines(path, lambda client: client.ping()) == INFO
    assert library.calls == [
        *("update", "warm False", "pin True", "pin False", "touch", "warm True"),
        *("add", "warm False", "remove", "remove"),
    ]


async def test_errors_have_the_fields_of_the_protocol_and_a_status(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        for method, target, body, wanted in (
            ("GET", "/v1/pipelines/none", None, (404, "pipeline-not-found")),
            ("PUT", "/v1/pipelines/x", {"source": "org/repo"}, (409, "pipeline-exists")),
            ("PUT", "/v1/pipelines/..", {"source": "org/repo"}, (400, "invalid-name")),
            ("PUT", "/v1/pipelines/y", {"source": "./model"}, (400, "usage")),
            ("PUT", "/v1/pipelines/y", {"source": "~/model"}, (400, "usage")),
            ("PUT", "/v1/pipelines/y", {"source": "org/repo", "token_file": "token"}, (400, "usage")),
            ("PUT", "/v1/pipelines/y", {}, (400, "usage")),
            ("POST", "/v1/pipelines/x/warm", {"evrything": True}, (400, "usage")),
            ("POST", "/v1/pipelines/x/warm", {"everything": "yes"}, (400, "usage")),
            ("POST", "/v1/pipelines/x/warm?wait=true", {}, (400, "usage")),
            ("POST", "/v1/pipelines/x/verify", {"rate": 0}, (400, "usage")),
            ("POST", "/v1/pipelines/x/warm", b"{", (400, "usage")),
            ("POST", "/v1/pipelines/x/warm", b"[" * 100_000, (400, "usage")),
            ("POST", "/v1/pipelines/x/warm", b'{"wait":\xff}', (400, "usage")),
            ("GET", "/v1/pipelines/x?brief=perhaps", None, (400, "usage")),
            ("GET", "/v1/pipelines/x?brief=1&brief=0", None, (400, "usage")),
            ("GET", "/v1/pipelines/x?timeout=nan", None, (400, "usage")),
            ("GET", "/v1/pipelines/x?timeout=99999999", None, (400, "usage")),
            ("GET", "/v1/pipelines/x?" + "&".join(f"a{n}=" for n in range(99)), None, (400, "usage")),
            ("GET", "/v1/pipelines/%ff", None, (400, "usage")),
            ("GET", "/v1/pipelines/x%2Fcold-starts", None, (404, "pipeline-not-found")),
            ("GET", "/v1/nothing", None, (404, "no-such-path")),
            ("GET", "/v1/pipelines//warm", None, (404, "no-such-path")),
            ("GET", "/", None, (404, "no-such-path")),
            ("PATCH", "/v1/pipelines/x", {}, (405, "method-not-allowed")),
            ("GET", "/v1/placement/none", None, (404, "pipeline-not-found")),
        ):
            answer = await ask(path, method, target, body)
            assert answer.code == wanted, (method, target, body, answer.body)
            assert answer.headers["Content-Type"] == "application/json"
        assert (await ask(path, "PATCH", "/v1/pipelines/x")).headers["Allow"] == "DELETE, GET, HEAD, PUT"
        failed = await ask(path, "POST", "/v1/pipelines/x/evict")
        assert failed.code == (500, "error") and "ZeroDivisionError in the daemon" in failed.value["error"]["message"]
        assert (await ask(path, "GET", "/v1/daemon")).status == 200


async def test_a_user_database_that_hangs_keeps_no_request_that_needs_none_and_the_others_not_for_long(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def hangs(_: object) -> None:
        over.wait(50)
        raise KeyError

    monkeypatch.setattr(units, "LOOKUP_SECONDS", 0.05)
    monkeypatch.setattr(pwd, "getpwuid", hangs)
    async with run(library, path):
        given = {"source": "org/repo", "owner": "7:8"}
        assert (await ask(path, "PUT", "/v1/pipelines/y", given)).status == 201
        assert (library.specs["y"].uid, library.specs["y"].gid) == (7, 8)
        refused = await ask(path, "PUT", "/v1/pipelines/z", {"source": "org/repo"})
        assert refused.status == 400 and "user database" in refused.value["error"]["message"]
    assert not over.is_set()
    over.set()


async def test_progress_comes_as_lines_and_a_wait_has_an_end(library: FakeLibrary, path: str) -> None:
    library.change(state="filling", fill=FillStatus(10, 9))
    lines = "application/x-ndjson"
    async with run(library, path), trio.open_nursery() as nursery:
        late = await ask(path, "POST", "/v1/pipelines/x/warm?timeout=0.2", {"wait": True})
        assert late.code == (504, "wait-deadline")
        late = await ask(path, "POST", "/v1/pipelines/x/warm?timeout=0.2", {"wait": True}, Accept=lines)
        told = [json.loads(line) for line in late.body.splitlines()]
        assert late.status == 200 and told[0]["type"] == "progress" and told[-1]["code"] == "wait-deadline"

        async def finish() -> None:
            await library.entered.wait()
            library.change(state="warm", cached_bytes=100, fill=None)

        library.entered = trio.Event()
        nursery.start_soon(finish)
        found = await ask(path, "POST", "/v1/pipelines/x/warm", {"wait": True}, Accept=lines)
        assert found.headers["Content-Type"] == lines
        last = [json.loads(line) for line in found.body.splitlines()][-1]
        assert last["type"] == "done" and last["result"]["state"] == "warm"
        verified = await ask(path, "POST", "/v1/pipelines/x/verify", {})
        assert verified.value["healed"] == ["a"]
        validate(verified.value, "POST", "/v1/pipelines/{pipeline}/verify")


async def test_a_lease_lasts_until_its_client_leaves(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        for wake in (b"", b"GET /v1/daemon HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            said = b"POST /v1/pipelines/x/lease HTTP/1.1\r\nHost: localhost\r\n\r\n"
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.sendall(said + wake)
            await library.wait_leases(1)
            # A second request in its wake is not read before the lease ends, and hides nobody's leaving.
            client.close()
            await library.wait_leases(0)
        missing = await ask(path, "POST", "/v1/pipelines/none/lease")
        assert missing.code == (404, "pipeline-not-found")


async def test_who_leaves_in_the_middle_of_a_wait_ends_the_wait_alone(library: FakeLibrary, path: str) -> None:
    library.change(state="filling", fill=FillStatus(10, 9))
    waiting = 0

    async def wait_changed(pipeline: str, timeout: float) -> None:
        nonlocal waiting
        waiting += 1
        try:
            await trio.sleep_forever()
        finally:
            waiting -= 1

    library.wait_changed = wait_changed  # type: ignore[method-assign]
    said = b"POST /v1/pipelines/x/warm HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    said += b'Content-Length: 13\r\n\r\n{"wait":true}'
    async with run(library, path):
        for leave in (lambda client: client.close(), lambda client: client.shutdown(socket.SHUT_WR)):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(said)
                await until(lambda: waiting == 1)
                leave(client)
                await until(lambda: waiting == 0)
        # A change that has begun goes on though nobody waits for it.
        library.hold = trio.Event()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"DELETE /v1/pipelines/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            library.entered = trio.Event()
            with trio.fail_after(20):
                await library.entered.wait()
        library.hold.set()
        with trio.fail_after(20):
            await library.done.wait()
    assert library.calls[-1] == "remove"


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not holds():
            await trio.sleep(0.01)


# -- who may -----------------------------------------------------------------------------------------------------------


async def test_callers_are_told_apart_as_on_lines(library: FakeLibrary, path: str, tmp_path: Path) -> None:
    """Of the others not even whether a file exists is told."""
    for uid, statuses in ((1234, (200, 200, 204, 403, 403, 403)), (99, (200, 403, 403, 403, 403, 403))):
        async with run(library, path, peer=lambda _, uid=uid: Peer(1, uid, frozenset({uid}))):
            found = [
                (await ask(path, "GET", "/v1/daemon")).status,
                (await ask(path, "GET", "/v1/pipelines/x")).status,
                (await ask(path, "POST", "/v1/pipelines/x/touch")).status,
                (await ask(path, "DELETE", "/v1/pipelines/x")).status,
                (await ask(path, "GET", "/v1/specs")).status,
            ]
            secret = await ask(path, "PUT", "/v1/pipelines/y", {"source": "org/r", "token_file": "/etc/none"})
            found.append(secret.status)
            assert tuple(found) == statuses
            assert secret.value["error"]["code"] == "permission-refused" and "none" not in secret.body.decode()


async def test_too_many_connections_are_told_in_http(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instantstart_fs.control import callers

    monkeypatch.setattr(callers, "MAX_CONNECTIONS_PER_OWNER", 1)
    async with run(library, path, peer=lambda _: Peer(1, 1234, frozenset({1234}))):
        with socket.socket(socket.AF_UNIX) as holder:
            holder.connect(path)
            holder.sendall(b"POST /v1/pipelines/x/lease HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await library.wait_leases(1)
            refused = await ask(path, "GET", "/v1/daemon")
            assert refused.code == (503, "pipeline-busy") and refused.headers["Retry-After"] == "1"
        await library.wait_leases(0)


# -- hostile input -----------------------------------------------------------------------------------------------------

GET = b"GET /v1/daemon HTTP/1.1\r\nHost: localhost\r\n"


async def test_web_pages_and_foreign_hosts_get_nothing(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        for headers in ({"Origin": "http://localhost"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
            assert (await ask(path, "GET", "/v1/daemon", **headers)).code == (403, "permission-refused")
        for host in ("evil.example", "localhost.evil.example", "localhost@evil.example", ""):
            assert (await ask(path, "GET", "/v1/daemon", Host=host)).code == (400, "usage")
        for host in ("LOCALHOST", "localhost:80", "[::1]:80", "instantstart"):
            assert (await ask(path, "GET", "/v1/daemon", Host=host)).status == 200


async def test_two_lengths_are_one_too_many(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        post = b"POST /v1/pipelines/x/warm HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        smuggled = b"DELETE /v1/pipelines/x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for head in (
            post + b"Content-Length: 2\r\nContent-Length: 60\r\n\r\n",
            post + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            post + b"Content-Length: +2\r\n\r\n",
            post + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            post.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            GET + b"Host: localhost\r\n\r\n",
            b"GET /v1/daemon HTTP/1.1\r\n\r\n",
            GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
            b"HELLO\r\n\r\n",
            b"x" * 2_000_000,
        ):
            answer = await talk(path, head + smuggled)
            assert answer.split(b"\r\n")[0].split()[1] in (b"400", b"431", b"501"), (head[:80], answer)
            assert answer.count(b"HTTP/1.1 ") == 1
        assert library.calls == []


async def test_pipelined_requests_are_answered_in_turn(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        touch = b"POST /v1/pipelines/x/touch HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = await talk(path, touch * 5 + GET + b"Connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 204") == 5 and answer.count(b"HTTP/1.1 200") == 1
        assert library.calls == ["touch"] * 5


async def test_bodies_are_bounded_in_size_and_time(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post(*headers: bytes) -> bytes:
        lines = [b"POST /v1/pipelines/x/warm HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    monkeypatch.setattr(api, "DRAIN_SECONDS", 0.2)
    async with run(library, path):
        announced = await talk(path, post(b"Content-Length: 99999999999"))
        assert announced.startswith(b"HTTP/1.1 413") and b'"too-large"' in announced
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        chunked = await talk(path, post(b"Transfer-Encoding: chunked") + 40 * chunk)
        assert chunked.startswith(b"HTTP/1.1 413")
        form = post(b"Content-Length: 2").replace(b"application/json", b"text/plain") + b"{}"
        assert (await talk(path, form.replace(b"Host", b"Connection: close\r\nHost"))).startswith(b"HTTP/1.1 415")
        # What nobody reads holds no connection, either.
        refused = await talk(
            path, post(b"Origin: http://x", b"Connection: close", b"Content-Length: 3000000") + b" " * 3_000_000
        )
        assert refused.startswith(b"HTTP/1.1 403")
        monkeypatch.setattr(api, "REQUEST_DEADLINE", 0.1)
        slow = await talk(path, post(b"Content-Length: 9") + b"{")
        assert slow.startswith(b"HTTP/1.1 408") and b'"request-timeout"' in slow
        monkeypatch.setattr(connection_module, "REQUEST_DEADLINE", 0.1)
        assert (await ask(path, "GET", "/v1/daemon")).status == 200


async def test_who_leaves_in_the_middle_of_a_body_is_no_defect(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        said = b"POST /v1/pipelines/x/warm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        for leave in (lambda client: client.shutdown(socket.SHUT_WR), lambda client: client.close()):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(said + b"Content-Type: application/json\r\n\r\n{")
                await trio.testing.wait_all_tasks_blocked()
                leave(client)
        assert (await ask(path, "GET", "/v1/daemon")).status == 200
        head = await ask(path, "HEAD", "/v1/daemon")
        assert (head.status, head.body) == (200, b"") and int(head.headers["Content-Length"]) > 100
        assert library.calls == []


async def test_an_answer_that_is_not_unicode_is_an_error(library: FakeLibrary, path: str) -> None:
    library.change(state="filling", revision="\udcff")
    async with run(library, path):
        assert (await ask(path, "GET", "/v1/pipelines/x")).code == (500, "error")


async def test_half_a_head_has_a_deadline(library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from instantstart_fs.web import control_http

    monkeypatch.setattr(control_http, "IDLE_SECONDS", 0.3)

    def drip(client: socket.socket) -> None:
        for _ in range(2000):
            client.sendall(b"X: y\r\n")
            time.sleep(0.02)

    async with run(library, path):
        assert await talk(path, GET, more=drip) == b""


async def test_the_end_of_the_server_waits_for_no_client(library: FakeLibrary, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client, trio.fail_after(20):
        async with run(library, path):
            client.connect(path)
            client.sendall(b"POST /v1/pipelines/x/lease HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await library.wait_leases(1)
        assert library.lease_count == 0
