"""The HTTP API (/v1 and /openapi.json): an ASGI application over the dispatcher of the control protocol.

It decides nothing. control/http_verbs.py says which request a path stands for, control/callers.py who may make it and
how often; control/dispatcher.py carries it out. The rules of HTTP are here: requests from web pages are refused, bodies
are bounded in size and time, every wait has an end, and a request ends when its client leaves.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import trio
from starlette.types import Message, Receive, Scope, Send

from instantstart_fs.catalog.model import Lessee
from instantstart_fs.config.units import primary_group
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control import http_verbs, protocol
from instantstart_fs.control.connection import REQUEST_DEADLINE
from instantstart_fs.control.dispatcher import Caller, Dispatcher
from instantstart_fs.control.http_verbs import AddPipeline, ErrorAnswer, ErrorBody, Verb
from instantstart_fs.control.lines import MAX_REQUEST, encode_response
from instantstart_fs.core.sight import Sight
from instantstart_fs.errors import InstantStartError, PermissionRefused, UsageError, WaitDeadline, printable
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.library import Library
from instantstart_fs.web import openapi
from instantstart_fs.web.placement import PREFIX as PLACEMENT
from instantstart_fs.web.placement import placement

LINES = "application/x-ndjson"
JSON = "application/json"
DOCUMENT = "/openapi.json"
LOOK_SECONDS = 1.0
"""Seconds between two checks whether the client is still there. A client may have left with a second request sent
behind the first, and that one is read only after the first is answered."""
SPECIFICATION_DEADLINE = 25.0
"""Seconds for reading a token's file, which may lie on a network, and for two names of users, 10 s each at most."""
DRAIN_SECONDS = 1.0
"""Seconds for reading the rest of a refused body. Closing a connection with unread bytes would destroy the answer."""
RETRY_SECONDS = 10
"""Retry-After of a 503 whose cause names no time."""
_encoder = msgspec.json.Encoder()


class Refused(Exception):
    """An answer that HTTP itself gives, not a verb."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = printable(message)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def is_api(path: str) -> bool:
    """Whether a path is this application's, and not the page's."""
    return path == DOCUMENT or path == http_verbs.PREFIX[:-1] or path.startswith(http_verbs.PREFIX)


class Api:
    """The application. ``hosts`` are the names that it answers to; "*" means any. ``sight_of`` says what a caller may
    see of placements."""

    def __init__(
        self, dispatcher: Dispatcher, library: Library, hosts: Iterable[str], sight_of: Callable[[Peer], Sight]
    ) -> None:
        self._dispatcher = dispatcher
        self._library = library
        self._hosts = frozenset(host.lower() for host in hosts)
        self._sight_of = sight_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. ``scope["state"]["peer"]`` is the caller; without one only the document is served."""
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send)
        try:
            self._check_origin(exchange.headers)
            path: bytes = scope["raw_path"]
            if path == DOCUMENT.encode():
                if exchange.method not in ("GET", "HEAD"):
                    raise _not_allowed(frozenset({"GET", "HEAD"}))
                await exchange.answer(200, openapi.document())
                return
            peer: Peer | None = scope["state"].get("peer")
            if peer is None:
                raise Refused(403, PermissionRefused.code, "the verbs are on the control socket; see docs/HTTP.md")
            await self._dispatcher.callers.wait_turn(peer)
            if scope["path"].startswith(PLACEMENT) and exchange.method in ("GET", "HEAD"):
                pipeline = scope["path"].removeprefix(PLACEMENT)
                sight = self._sight_of(peer)
                found = await placement(self._library, pipeline, sight, details=sight.everything)
                await found(scope, receive, send)
                return
            await self._perform(exchange, path, peer)
        except Refused as refused:
            await exchange.refuse(refused)
        except InstantStartError as error:
            await exchange.fail(error)
        except trio.BrokenResourceError:
            pass  # the client left before it had asked: nobody is there to be told

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse requests that a web page caused: by a name of its own that points here, or by the visitor's
        browser."""
        if "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
            raise Refused(403, PermissionRefused.code, "requests of web pages are refused")
        given = headers.get("host", "").lower()
        host = given if given.endswith("]") else given.rpartition(":")[0] or given
        if "*" not in self._hosts and host not in self._hosts:
            raise Refused(400, UsageError.code, f"the host {given[:200]!r} is not one of [http] hosts; use localhost")

    async def _perform(self, exchange: _Exchange, path: bytes, peer: Peer) -> None:
        found = http_verbs.find(exchange.method, path)
        if found is None:
            raise Refused(404, "no-such-path", f"there is nothing at {path.decode('ascii', 'replace')[:200]}")
        if isinstance(found, frozenset):
            raise _not_allowed(found)
        verb = found.verb
        if verb.request is protocol.Add:
            # Before its names and paths are looked up, which would tell whether they exist.
            self._dispatcher.callers.must_administer(peer, verb.request)
        body = await exchange.body()
        given = http_verbs.arguments(verb, exchange.query, body)
        if isinstance(given.values, AddPipeline):
            request: protocol.Request = await self._added(found.named["pipeline"], given.values, peer)
        else:
            request = http_verbs.request(verb, found.named, given.values)
        await exchange.respond(self._dispatcher, verb, request, peer, given.timeout)

    @staticmethod
    async def _added(pipeline: str, given: AddPipeline, peer: Peer) -> protocol.Add:
        def make() -> protocol.Add:
            owner = given.owner or f"{peer.uid}:{primary_group(peer.uid)}"
            return http_verbs.added(pipeline, given, owner=owner)

        try:
            return await run_abandonable(make, deadline=SPECIFICATION_DEADLINE)
        except trio.TooSlowError:
            raise UsageError(
                f"{pipeline}: its owner or the token's file was not found within {SPECIFICATION_DEADLINE:g} s"
            ) from None


def _not_allowed(methods: frozenset[str]) -> Refused:
    allowed = ", ".join(sorted(methods))
    return Refused(405, "method-not-allowed", f"this path takes {allowed}", Allow=allowed)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send_message = send
        self._unread = True
        """Whether more of the body may come."""
        self._streaming = False
        self.method: str = scope["method"]
        self.query: bytes = scope["query_string"]
        self.headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}

    async def body(self) -> bytes:
        """Return the whole body. Raises Refused when it is too long, too slow, or not declared as JSON."""
        kind = self.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        length = int(self.headers.get("content-length", "0"))  # h11 has seen to its being a number
        if length > MAX_REQUEST:
            raise Refused(413, "too-large", f"a body may have {MAX_REQUEST} bytes")
        if (length or "transfer-encoding" in self.headers) and (kind != JSON or "content-encoding" in self.headers):
            raise Refused(
                415, "unsupported-media-type", "send the body as application/json (curl --json), uncompressed"
            )
        found = bytearray()
        with trio.move_on_after(REQUEST_DEADLINE):
            while self._unread:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise trio.BrokenResourceError("the client left before it had asked")
                self._unread = message.get("more_body", False)
                found += message.get("body", b"")
                if len(found) > MAX_REQUEST:
                    raise Refused(413, "too-large", f"a body may have {MAX_REQUEST} bytes")
            return bytes(found)
        raise Refused(
            408, "request-timeout", f"the body did not come within {REQUEST_DEADLINE:g} s", Connection="close"
        )

    async def _send(self, message: Message) -> None:
        """Send a message whole or not at all. A send that is cancelled in the middle would leave the server in an
        unknown state. The server bounds the time that it takes."""
        with trio.CancelScope(shield=True):
            await self._send_message(message)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send a complete answer."""
        await self._start(status, JSON if body else "", {"Content-Length": str(len(body)), **(headers or {})})
        if self._unread:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._drain()
            body = b""
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, refused: Refused) -> None:
        """Send the answer of HTTP itself."""
        told = ErrorAnswer(ErrorBody(refused.code, refused.message))
        await self.answer(refused.status, _encoder.encode(told) + b"\n", refused.headers)

    async def fail(self, error: InstantStartError) -> None:
        """Send an error of ours with its status."""
        status = http_verbs.status_of(error)
        told = ErrorAnswer(ErrorBody(error.code, error.message, error.retry_after))
        headers = {}
        if error.retry_after is not None or status == 503:
            headers["Retry-After"] = str(math.ceil(error.retry_after or RETRY_SECONDS))
        await self.answer(status, _encoder.encode(told) + b"\n", headers)

    async def respond(
        self, dispatcher: Dispatcher, verb: Verb, request: protocol.Request, peer: Peer, timeout: float
    ) -> None:
        """Carry ``request`` out for at most ``timeout`` seconds, or until the client leaves, and send the result."""
        lines = verb.streams == "always" or (verb.streams == "asked" and LINES in self.headers.get("accept", ""))

        async def tell(response: protocol.Response, descriptors: Sequence[int] = ()) -> None:
            if lines:
                await self._line(response)

        caller = Caller(peer, Lessee(peer.pid, peer.uid), tell, [])
        response: protocol.Response | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_left, nursery.cancel_scope)
            with trio.move_on_after(timeout) as waiting:
                try:
                    response = await dispatcher.respond(request, caller)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    response = None  # a lease has ended, and said so
            if waiting.cancelled_caught:
                response = protocol.failed(
                    WaitDeadline(
                        f"no end within {timeout:g} s; what was waited for goes on: ask again, or with ?timeout="
                    )
                )
            if response is not None:
                await self._tell_end(verb, response, lines)
            elif self._streaming:
                await self._send({"type": "http.response.body", "body": b""})
            nursery.cancel_scope.cancel()

    async def _tell_end(self, verb: Verb, response: protocol.Response, lines: bool) -> None:
        if self._streaming or (lines and isinstance(response, protocol.Done)):
            await self._line(response)
            await self._send({"type": "http.response.body", "body": b""})
        elif isinstance(response, protocol.Failed):
            await self.fail(response.error())
        elif isinstance(response, protocol.Done):
            if verb.result is None:
                await self.answer(204, b"")
                return
            found: Any = [] if response.result is None and verb.result == list[str] else response.result
            try:
                body = _encoder.encode(found) + b"\n"
            except UnicodeEncodeError as error:
                await self.fail(InstantStartError(f"the answer holds a name that is not UTF-8: {error.object!r}"))
            else:
                await self.answer(verb.status, body)

    async def _line(self, response: protocol.Response) -> None:
        line = encode_response(response)
        if not self._streaming:
            self._streaming = True
            await self._start(200, LINES, {})
        await self._send({"type": "http.response.body", "body": line, "more_body": True})

    async def _start(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        told = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **headers}
        if kind:
            told["Content-Type"] = kind
        if status == 204:
            told.pop("Content-Length", None)
        raw = [(name.lower().encode(), value.encode()) for name, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _drain(self) -> None:
        with trio.move_on_after(DRAIN_SECONDS):
            while self._unread:
                message = await self._receive()
                self._unread = message["type"] == "http.request" and message.get("more_body", False)

    async def _wait_left(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope`` when the client has left."""
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                while (await self._receive())["type"] != "http.disconnect":
                    pass
                scope.cancel()

            nursery.start_soon(listen)
            connection: trio.socket.SocketType = self._scope["state"]["socket"]
            while True:
                if _has_left(connection):
                    scope.cancel()
                await trio.sleep(LOOK_SECONDS)


def _has_left(connection: trio.socket.SocketType) -> bool:
    """Whether the client has closed the connection, or only its sending side, which counts as leaving
    (docs/HTTP.md)."""
    descriptor = connection.fileno()
    if descriptor < 0:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    return bool(poll.poll(0))
