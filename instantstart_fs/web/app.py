"""The routes: / page, /pipelines/ID, /api/pipelines, /api/cold-starts/ID, /api/events, /badge/ID.svg,
/v1/placement/ID, /metrics, /healthz.

All are GET and change nothing; the API's verbs (api.py) are beside them for the bearer of its token. Each caller sees
what visitors.py and core/sight.py permit; what it may not see is answered as if it did not exist. One store summary at
a time is taken, kept for a second (longer where it takes long) and shared by everybody who asks; without callers none
is taken. Requests and event streams are counted and bounded.
Pages hold no inline script or style, so that the Content-Security-Policy can forbid them, and the templates escape
every name.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple

import jinja2
import msgspec
import trio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instantstart_fs import metrics
from instantstart_fs.config import HttpConfig
from instantstart_fs.config.unixsocket import Peer
from instantstart_fs.control.dispatcher import Dispatcher
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.coldstart import as_plain
from instantstart_fs.core.ratelimit import Bucket
from instantstart_fs.core.sight import EVERYTHING, Sight
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.library import Library
from instantstart_fs.views.store_summary import StoreSummary
from instantstart_fs.web import view_model
from instantstart_fs.web.api import DOCUMENT, Api, is_api
from instantstart_fs.web.health import HealthProbe
from instantstart_fs.web.pipeline_page import PipelinePages
from instantstart_fs.web.pipeline_view import PipelineView
from instantstart_fs.web.placement import PREFIX as PLACEMENT
from instantstart_fs.web.placement import placement
from instantstart_fs.web.visitors import STRANGER, Visitor, Visitors

MAX_STREAMS = 32
"""The most event streams: of each administrator, and of all other callers together. Of those each may have
MAX_STREAMS_EACH."""
MAX_STREAMS_EACH = 8
REQUEST_RATE, REQUEST_BURST = 50.0, 200.0
REQUEST_RATE_EACH, REQUEST_BURST_EACH = 20.0, 80.0
"""Requests a second, and the burst after a rest: of all callers that do not administer, and of each. Answers beyond
that wait."""
MAX_ALLOWANCES = 1024
STREAM_SECONDS = 900.0
"""Seconds that a stream lasts. The browser then connects anew, so a forgotten stream does not stay for ever."""
TICK_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
KEEP_SECONDS = 1.0
SHARE = 20
"""A store summary is kept SHARE times as long as it took to make. An open page thus costs at most a twentieth of the
daemon's time."""
MAX_SIGHTS = 64
"""The most callers with a view of their own that are kept for one store summary."""
LOOKS_AT_ONCE = 256
"""Pipelines that are checked between two pauses."""
MAX_VIEWS = 64
"""The most rendered pages that are kept for one summary. Any caller may ask for any page."""
TOKENS_BEARER = Peer(0, os.geteuid(), frozenset())
"""The peer that the bearer of the API's token counts as: no process of this machine, with the daemon's rights."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Seen(NamedTuple):
    """The part of a store summary that one kind of caller sees, and the pages made of it."""

    store_summary: StoreSummary
    views: dict[view_model.Query, view_model.View]


class StoreSummaries:
    """The store summary that all callers share. ``pending`` gives pipelines that are configured but not added yet."""

    def __init__(self, library: Library, pending: Callable[[], Mapping[str, PipelineStatus]], details: bool) -> None:
        self._library = library
        self._pending = pending
        self._details = details
        self._lock = trio.Lock()
        self._good_until = -1.0
        self._kept: StoreSummary | None = None
        self._seen: dict[Sight, Seen] = {}

    async def view(self, query: view_model.Query, sight: Sight) -> view_model.View:
        """Return a rendered page. Callers with the same sight and the same query share one."""
        seen = await self._look(sight)
        found = seen.views.get(query)
        if found is None:
            if len(seen.views) >= MAX_VIEWS:
                del seen.views[next(iter(seen.views))]
            found = view_model.view(seen.store_summary, query, details=self._details, everything=sight.everything)
            seen.views[query] = found
        return found

    async def get(self, sight: Sight) -> StoreSummary:
        """Return what that caller sees of the store summary. It is at most KEEP_SECONDS old, or SHARE times as old as
        it took to make."""
        return (await self._look(sight)).store_summary

    async def _look(self, sight: Sight) -> Seen:
        async with self._lock:
            if self._kept is None or trio.current_time() >= self._good_until:
                began = time.thread_time()
                self._kept = view_model.ordered(self._with_pending(await self._library.snapshots.store_summary()))
                self._seen.clear()
                took = time.thread_time() - began
                self._good_until = trio.current_time() + max(KEEP_SECONDS, SHARE * took)
            found = self._seen.get(sight)
            if found is None:
                if len(self._seen) >= MAX_SIGHTS:
                    del self._seen[next(iter(self._seen))]
                found = self._seen[sight] = Seen(await self._narrowed(self._kept, sight), {})
            return found

    async def _narrowed(self, store_summary: StoreSummary, sight: Sight) -> StoreSummary:
        if sight.everything:
            return store_summary
        shown: list[PipelineStatus] = []
        for position, status in enumerate(store_summary.pipelines):
            if self._library.pipelines.shown_to(status.pipeline, sight):
                shown.append(status)
            if position % LOOKS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return store_summary.narrowed(shown)

    def _with_pending(self, store_summary: StoreSummary) -> StoreSummary:
        known = {status.pipeline for status in store_summary.pipelines}
        missing = [status for name, status in self._pending().items() if name not in known]
        if not missing:
            return store_summary
        states = dict(store_summary.states)
        states["error"] = states.get("error", 0) + len(missing)
        found = sorted([*store_summary.pipelines, *missing], key=lambda status: status.pipeline)
        return msgspec.structs.replace(store_summary, pipelines=tuple(found), states=states)


class Site:
    """The handlers and what they share. ``info`` is the daemon's."""

    def __init__(
        self,
        library: Library,
        info: Callable[[], DaemonInfo],
        config: HttpConfig,
        health: HealthProbe,
        visitors: Visitors,
        pending: Callable[[], Mapping[str, PipelineStatus]] = dict,
    ) -> None:
        self._library = library
        self._info = info
        self._config = config
        self._health = health
        self._visitors = visitors
        self._summaries = StoreSummaries(library, pending, config.details)
        self._streams: Counter[str] = Counter()
        self._privileged_streams: Counter[str] = Counter()
        files = importlib.resources.files("instantstart_fs.web")
        self._static = {name: files.joinpath("static", name).read_bytes() for name in STATIC}
        sources = {
            entry.name: entry.read_text()
            for entry in files.joinpath("templates").iterdir()
            if entry.name.endswith((".html", ".svg"))
        }
        self._templates = jinja2.Environment(
            loader=jinja2.DictLoader(sources), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        self._version = hashlib.sha256(b"".join(self._static.values())).hexdigest()[:12]

    def app(self, dispatcher: Dispatcher | None = None) -> ASGIApp:
        """Return the application. With ``dispatcher`` the bearer of the API's token may use its verbs."""
        routes = [
            Route("/", self.page),
            Route("/api/pipelines", self.pipelines),
            Route("/api/cold-starts/{pipeline}", self.cold_starts),
            *PipelinePages(self._library, sight_of, self._render_pipeline, details=self._config.details).routes(),
            Route("/api/events", self.events),
            Route("/v1/placement/{pipeline}", self.placement),
            Route("/badge/{pipeline}.svg", self.badge),
            Route("/metrics", self.metrics),
            Route("/healthz", self.healthz),
            Route("/static/{name}", self.static),
        ]
        hosts = [*LOCAL_NAMES, self._config.host, *self._config.hosts]
        # A page elsewhere may point its own name at 127.0.0.1 and read what it finds: only known names are answered.
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
        page = Starlette(routes=routes, middleware=[trusted])
        api = Api(dispatcher, self._library, hosts, lambda _: EVERYTHING) if dispatcher is not None else None
        return _Bounded(page, self._visitors, api)

    # -- pages -----------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        query = query_of(request.query_params)
        shown = await self._summaries.view(query, sight_of(request))
        node = os.uname().nodename if sight_of(request).everything else ""
        text = self._render("page.html", shown, link=request.url.query, node=node)
        return Response(text, media_type="text/html; charset=utf-8")

    def _render(self, template: str, shown: view_model.View, **more: str) -> str:
        info = self._info()
        return self._templates.get_template(template).render(
            view=shown,
            version=info.version,
            assets=self._version,
            link_to=link_to,
            orders=list(view_model.ORDER),
            transport=info.transport,
            uptime=view_model.coarse(info.uptime),
            **more,
        )

    def _render_pipeline(self, template: str, found: PipelineView | None) -> str:
        """Render the page of a pipeline. ``found`` is None where the caller may see no such pipeline."""
        info = self._info()
        return self._templates.get_template(template).render(view=found, version=info.version, assets=self._version)

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static:
            return Response("no such file\n", 404, media_type="text/plain")
        kept = {"Cache-Control": "public, max-age=31536000, immutable"} if request.query_params.get("v") else {}
        return Response(self._static[name], media_type=STATIC[name], headers=kept)

    async def badge(self, request: Request) -> Response:
        """Return an SVG badge for a deployment card: ``cache: warm``."""
        pipeline = request.path_params["pipeline"]
        found = next(
            (it for it in (await self._summaries.get(sight_of(request))).pipelines if it.pipeline == pipeline), None
        )
        words = view_model.chip(found) if found is not None else "unknown"
        state = found.state if found is not None else "unknown"
        # 5.9 px a character is what 11 px fonts take, about; textLength makes each of them take just that.
        left, right = round(5 * 5.9) + 12, round(len(words) * 5.9) + 12
        text = self._templates.get_template("badge.svg").render(words=words, state=state, left=left, right=right)
        return Response(text, 200 if found is not None else 404, media_type="image/svg+xml")

    # -- values ----------------------------------------------------------------------------------------------------

    async def pipelines(self, request: Request) -> Response:
        shown = await self._summaries.view(query_of(request.query_params), sight_of(request))
        return JSONResponse(view_model.as_json(shown))

    async def cold_starts(self, request: Request) -> Response:
        """Return a pipeline's latest cold starts as `explain --json` prints them. File names need ``details``."""
        pipeline = request.path_params["pipeline"]
        known = {status.pipeline for status in (await self._summaries.get(sight_of(request))).pipelines}
        if pipeline not in known:
            return JSONResponse({"error": "pipeline-not-found"}, 404)
        records = [as_plain(record) for record in self._library.telemetry.cold_starts(pipeline)]
        if not self._config.details:
            for record in records:
                record.pop("slowest_file")
        return JSONResponse(records)

    async def placement(self, request: Request) -> Response:
        pipeline, sight = request.path_params["pipeline"], sight_of(request)
        return await placement(self._library, pipeline, sight, details=self._config.details)

    async def metrics(self, request: Request) -> Response:
        sight = sight_of(request)
        store_summary = await self._summaries.get(sight)
        info = self._info()
        health = self._health.last
        source = metrics.Source(
            version=info.version,
            uptime=info.uptime,
            totals=self._library.telemetry.totals,
            fills=self._library.filler.statistics(),
            store_summary=store_summary,
            healthy=health.ok if health is not None else None,
            per_pipeline=self._config.metrics_pipelines,
            requests=info.requests,
            everything=sight.everything,
        )
        return Response(metrics.render(source), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def healthz(self, request: Request) -> Response:
        health = await self._health.ask()
        checks = {check.name: check.problem or "ok" for check in health.checks}
        return JSONResponse({"ok": health.ok, "checks": checks}, 200 if health.ok else 503)

    # -- live ------------------------------------------------------------------------------------------------------

    async def events(self, request: Request) -> Response:
        """Send the page's live part as server-sent events: drawn anew, and sent when it has changed."""
        visitor = visitor_of(request)
        privileged = visitor.sight.everything
        streams = self._privileged_streams if privileged else self._streams
        each = MAX_STREAMS if privileged else MAX_STREAMS_EACH
        if streams[visitor.share] >= each or (not privileged and streams.total() >= MAX_STREAMS):
            return Response("too many pages are open\n", 503, headers={"Retry-After": "30"}, media_type="text/plain")
        query = query_of(request.query_params)
        return StreamingResponse(
            self._follow(query, sight_of(request), streams, visitor.share), media_type="text/event-stream"
        )

    async def _follow(
        self, query: view_model.Query, sight: Sight, streams: Counter[str], share: str
    ) -> AsyncIterator[bytes]:
        streams[share] += 1
        try:
            last: view_model.View | None = None
            sent_at = trio.current_time()
            end = sent_at + STREAM_SECONDS
            yield b"retry: 3000\n\n"
            while trio.current_time() < end:
                shown = await self._summaries.view(query, sight)
                if shown != last:
                    last = shown
                    sent_at = trio.current_time()
                    yield event(self._render("live.html", shown))
                elif trio.current_time() - sent_at >= HEARTBEAT_SECONDS:
                    sent_at = trio.current_time()
                    yield b": still here\n\n"
                await trio.sleep(TICK_SECONDS)
        finally:
            streams[share] -= 1
            if not streams[share]:
                del streams[share]


def visitor_of(request: Request) -> Visitor:
    """Return the visitor at the other end of the request's connection."""
    found = request.scope.get("state", {}).get("visitor", STRANGER)
    assert isinstance(found, Visitor)
    return found


def sight_of(request: Request) -> Sight:
    """Return what the sender of the request may see, as _Bounded found out."""
    found = request.scope["sight"]
    assert isinstance(found, Sight)
    return found


def event(text: str) -> bytes:
    """Return one server-sent event with that text."""
    return "".join(f"data: {line}\n" for line in text.splitlines()).encode() + b"\n"


def query_of(given: Mapping[str, str]) -> view_model.Query:
    """Parse a query string; values that make no sense count as not given."""

    def number(name: str, default: int, most: int) -> int:
        with contextlib.suppress(ValueError):
            return max(0, min(int(given.get(name, "")), most))
        return default

    state = given.get("state", "")
    return view_model.Query(
        text=given.get("q", "")[:200],
        state=state if state in view_model.ORDER else "",
        offset=number("offset", 0, 10_000_000),
        limit=max(1, number("limit", view_model.PAGE_SIZE, view_model.MAX_PAGE_SIZE)),
    )


def link_to(query: view_model.Query, **changes: object) -> str:
    """Return the page's address for that query with these changes."""
    from urllib.parse import urlencode

    wanted = msgspec.structs.replace(query, **changes)
    pairs: Sequence[tuple[str, object]] = [
        ("q", wanted.text),
        ("state", wanted.state),
        ("offset", wanted.offset or ""),
        ("limit", wanted.limit if wanted.limit != view_model.PAGE_SIZE else ""),
    ]
    return "/?" + urlencode([(name, str(value)) for name, value in pairs if value])


class _Bounded:
    """Guards the routes: it refuses methods other than GET and HEAD and wrong tokens, delays callers that ask too
    often, finds out what the caller may see, and adds the headers of every answer."""

    def __init__(self, app: ASGIApp, visitors: Visitors, api: Api | None) -> None:
        self._app = app
        self._visitors = visitors
        self._api = api
        self._all: Bucket | None = None
        self._each: OrderedDict[str, Bucket] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message.get("headers", ())}
                message["headers"] = [*message.get("headers", ())] + [
                    (name.lower().encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.lower().encode() not in given
                ]
            await send(message)

        if self._api is not None and is_api(scope["path"]) and not scope["path"].startswith(PLACEMENT):
            await self._ask_api(self._api, scope, receive, with_headers)
            return
        if scope["method"] not in ("GET", "HEAD"):
            await Response("read-only\n", 405, media_type="text/plain")(scope, receive, with_headers)
            return
        visitor = visitor_of(Request(scope))
        sight = self._visitors.sight(visitor, Request(scope).headers)
        if sight is None:
            asked = {"WWW-Authenticate": "Bearer"}
            refused = Response("the token is not the right one\n", 401, headers=asked, media_type="text/plain")
            await self._wait_turn(visitor)
            await refused(scope, receive, with_headers)
            return
        scope["sight"] = sight
        if not visitor.sight.everything:
            await self._wait_turn(visitor)
        await self._app(scope, receive, with_headers)

    async def _ask_api(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        allowed = self._visitors.may_ask_api(request.headers)
        if not allowed:
            await self._wait_turn(visitor_of(request))
        if allowed is False and scope["path"] != DOCUMENT:
            error = {"code": "unauthorized", "message": "the API's token is not the right one"}
            asked = {"WWW-Authenticate": "Bearer"}
            await JSONResponse({"error": error}, 401, headers=asked)(scope, receive, send)
            return
        scope["state"]["peer"] = TOKENS_BEARER if allowed else None
        await api(scope, receive, send)

    async def _wait_turn(self, visitor: Visitor) -> None:
        """Wait until the caller may ask. A page costs the loop some milliseconds, for which readers of the mount
        wait."""
        now = trio.current_time()
        self._all = self._all or Bucket(REQUEST_RATE, REQUEST_BURST, now)
        each = self._each.get(visitor.share)
        if each is None:
            if len(self._each) >= MAX_ALLOWANCES:  # who rested long has a full one, as a new one is
                self._each.popitem(last=False)
            each = self._each[visitor.share] = Bucket(REQUEST_RATE_EACH, REQUEST_BURST_EACH, now)
        self._each.move_to_end(visitor.share)
        await trio.sleep(max(each.take(now), self._all.take(now)))
