"""The verbs of the HTTP API, version 1: which method and path stand for which request of the control protocol. Pure.

web/api.py serves from the table VERBS, and web/openapi.py describes it. A request that is neither in VERBS nor in
ON_THE_SOCKET_ALONE fails a test.

A verb's arguments are the fields of its request. Some are in the path. The others are in the query (GET, DELETE) or in
a JSON object in the body (PUT, POST). The request's own types check the values.
"""

from __future__ import annotations

import functools
import math
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from instantstart_fs import errors
from instantstart_fs.control import protocol, specification
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.core.status import OriginCheck, PipelineStatus
from instantstart_fs.errors import InstantStartError, UsageError

PREFIX = "/v1/"
DEFAULT_TIMEOUT, LONGEST_TIMEOUT = 3600.0, 86_400.0
"""Seconds that an answer may take: the first unless ``?timeout=`` says otherwise, the second at most. A lease has no
such end."""
MAX_ARGUMENTS = 32
"""The most arguments in a query."""

Method = Literal["GET", "PUT", "POST", "DELETE"]
Streams = Literal["never", "asked", "always"]


class AddPipeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The body of a PUT: the options of `add`.

    ``source`` is an address as people write it; ``models`` maps names to sources instead. ``owner`` is "UID:GID" or
    names; without it the caller's own. ``mode`` is octal, ``quota`` a size ("50GiB"). Paths are absolute. ``warm``
    starts filling the load set.
    """

    source: str | None = None
    models: dict[str, str] = {}
    owner: str | None = None
    mode: str = "0555"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    token_file: str | None = None
    aws_profile: str | None = None
    endpoint_url: str | None = None
    quota: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    warm: bool = False


class Verb(NamedTuple):
    """One verb. ``arguments`` is the type of its query or body; ``fixed`` gives fields of the request that the path
    stands for. ``streams`` says whether progress is sent as JSON lines: where the client accepts them, or always (a
    lease)."""

    method: Method
    path: str
    request: type[protocol.Request]
    result: Any
    says: str
    arguments: type[msgspec.Struct]
    fixed: Mapping[str, object]
    status: int
    streams: Streams

    @property
    def in_body(self) -> bool:
        return self.method in ("PUT", "POST")


@functools.cache
def _arguments_of(request: type[protocol.Request], taken: frozenset[str]) -> type[msgspec.Struct]:
    """Return the fields of ``request`` that are not ``taken``."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(request):
        if field.name in taken:
            continue
        if field.required:
            fields.append((field.name, field.type))
        elif field.default_factory is not msgspec.NODEFAULT:
            fields.append((field.name, field.type, msgspec.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, field.type, field.default))
    name = f"{request.__name__}Arguments"
    return msgspec.defstruct(name, fields, forbid_unknown_fields=True, frozen=True, kw_only=True, module=__name__)


def _verb(
    method: Method,
    path: str,
    request: type[protocol.Request],
    result: Any,
    says: str,
    *,
    arguments: type[msgspec.Struct] | None = None,
    status: int = 200,
    streams: Streams = "never",
    **fixed: object,
) -> Verb:
    if arguments is None:
        arguments = _arguments_of(request, frozenset({*fixed, *(("pipeline",) if "{pipeline}" in path else ())}))
    return Verb(method, path, request, result, says, arguments, fixed, status, streams)


_ONE = "/v1/pipelines/{pipeline}"

VERBS: tuple[Verb, ...] = (
    _verb("GET", "/v1/daemon", protocol.Ping, protocol.DaemonInfo, "What the daemon says about itself."),
    _verb("GET", "/v1/pipelines", protocol.Ls, list[PipelineStatus], "The pipelines that the caller owns, or all."),
    _verb("GET", "/v1/names", protocol.Names, list[str], "Ids that begin with a prefix, at most 1000, sorted."),
    _verb("GET", "/v1/specs", protocol.Specs, list[PipelineSpec], "How the pipelines were asked for."),
    _verb(
        "POST", "/v1/origins/check", protocol.CheckOrigins, list[OriginCheck],
        "What the daemon gets when it fetches one byte from each of its origins.",
    ),
    _verb(
        "PUT", _ONE, protocol.Add, PipelineStatus, "Adds a pipeline: resolves and pins its source.",
        arguments=AddPipeline, status=201,
    ),
    _verb("GET", _ONE, protocol.Status, PipelineStatus, "Its state, with its files unless `brief`."),
    _verb(
        "DELETE", _ONE, protocol.Remove, list[str],
        "Removes it. The answer lists those who still have files of it open.",
    ),
    _verb("POST", f"{_ONE}/update", protocol.Update, PipelineStatus, "Shows what its source holds now."),
    _verb(
        "POST", f"{_ONE}/evict", protocol.Evict, list[str],
        "Deletes its bytes. The answer lists those who still have files of it open.",
    ),
    _verb("POST", f"{_ONE}/pin", protocol.Pin, None, "Keeps it from eviction.", pinned=True),
    _verb("POST", f"{_ONE}/unpin", protocol.Pin, None, "Undoes `pin`.", pinned=False),
    _verb("POST", f"{_ONE}/touch", protocol.Touch, None, "Counts as a request."),
    _verb(
        "POST", f"{_ONE}/warm", protocol.Warm, PipelineStatus,
        "Fills its load set, or `everything`; with `wait` the answer comes when all is there.", streams="asked",
    ),
    _verb("POST", f"{_ONE}/include", protocol.Include, None, "What these globs match belongs to the load set."),
    _verb(
        "POST", f"{_ONE}/verify", protocol.Verify, protocol.VerifyResult, "Hashes what is cached again.",
        streams="asked",
    ),
    _verb("POST", f"{_ONE}/access", protocol.Access, list[str], "Its sources that its credentials may still fetch."),
    _verb("GET", f"{_ONE}/region", protocol.AskRegion, protocol.RegionState, "What of it the regional tier is owed."),
    _verb(
        "POST", f"{_ONE}/lease", protocol.Lease, None, "A lease: it lasts until the client disconnects.",
        streams="always",
    ),
    _verb("POST", f"{_ONE}/mark", protocol.Mark, None, "A moment of a cold start that the filesystem cannot see."),
    _verb("GET", f"{_ONE}/cold-starts", protocol.ColdStarts, list[ColdStart], "Its last cold starts, newest first."),
    _verb(
        "GET", f"{_ONE}/startup-caches", protocol.StartupCaches, list[StartupRecord],
        "Its startup caches, newest first.",
    ),
    _verb(
        "POST", f"{_ONE}/startup-caches/verify", protocol.StartupVerify, protocol.StartupVerified,
        "Reads its startup caches again, and deletes those that are damaged.",
    ),
    _verb(
        "POST", f"{_ONE}/startup-caches/remove", protocol.StartupRemove, int,
        "Removes startup caches: these numbers, or all. How many there were.",
    ),
)  # fmt: skip

ON_THE_SOCKET_ALONE: Mapping[type[protocol.Request], str] = {
    protocol.Open: "descriptors of weight files",
    protocol.StartupBegin: "a descriptor of the startup cache, and the connection is the start's life",
    protocol.StartupSave: "a pipe's descriptor",
    protocol.StartupReport: "the start that the same connection has begun",
}
"""Requests that only the control socket's lines take, and why: what each hands over there."""


class Found(NamedTuple):
    """A verb, and the values that its path names."""

    verb: Verb
    named: dict[str, str]


_PARTS = [(verb, verb.path.split("/")) for verb in VERBS]


def find(method: str, path: bytes) -> Found | frozenset[str] | None:
    """Return the verb for ``path``, as it was sent and without its query.

    Where only other methods are taken, return those. None: nothing is there. Segments are split before they are
    decoded, so %2F in a name is no slash. Raises UsageError.
    """
    try:
        segments = [urllib.parse.unquote(part, errors="strict") for part in path.decode("ascii").split("/")]
    except UnicodeDecodeError:
        raise UsageError("the path is not UTF-8 in percent-encoding") from None
    allowed: set[str] = set()
    for verb, parts in _PARTS:
        if len(parts) == len(segments) and all(
            part == segment or (part.startswith("{") and segment) for part, segment in zip(parts, segments, strict=True)
        ):
            if method == verb.method or (method == "HEAD" and verb.method == "GET"):
                named = zip(parts, segments, strict=True)
                return Found(verb, {part[1:-1]: segment for part, segment in named if part.startswith("{")})
            allowed |= {verb.method, *(("HEAD",) if verb.method == "GET" else ())}
    return frozenset(allowed) or None


class Arguments(NamedTuple):
    """What a request carries beside its path. ``timeout``: seconds that its answer may take."""

    values: msgspec.Struct
    timeout: float


def arguments(verb: Verb, query: bytes, body: bytes) -> Arguments:
    """Decode the query or the body. Raises UsageError."""
    try:
        pairs = urllib.parse.parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_ARGUMENTS
        )
    except ValueError as error:
        raise UsageError(f"the query is not understood: {error}") from None
    given = dict(pairs)
    if len(given) != len(pairs):
        raise UsageError("the query says something twice")
    timeout = _timeout(given.pop("timeout", None), verb)
    try:
        if not verb.in_body:
            if body:
                raise UsageError(f"{verb.method} takes its arguments from the query, and no body")
            return Arguments(msgspec.convert(given, verb.arguments, strict=False), timeout)
        if given:
            raise UsageError(f"{verb.method} takes its arguments from the body; its query knows `timeout` alone")
        return Arguments(msgspec.json.decode(body or b"{}", type=verb.arguments), timeout)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"not what {verb.method} {verb.path} takes: {error}") from None


def _timeout(text: str | None, verb: Verb) -> float:
    if text is None:
        return math.inf if verb.streams == "always" else DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise UsageError(f"timeout={text[:40]}: give seconds, at most {LONGEST_TIMEOUT:g}")
    return seconds


def request(verb: Verb, named: Mapping[str, str], given: msgspec.Struct) -> protocol.Request:
    """Build the request of the control protocol, for every verb but `add`. Raises UsageError."""
    fields = {name: getattr(given, name) for name in given.__struct_fields__}
    make: Callable[..., protocol.Request] = verb.request
    return make(**named, **verb.fixed, **fields)


def added(pipeline: str, given: AddPipeline, *, owner: str) -> protocol.Add:
    """Build the request for a PUT of a pipeline.

    Blocks for a moment: it reads the token's file and looks up names of users. Raises UsageError, InvalidName,
    InvalidSource, ConfigError.
    """
    sources = [text for text in (given.source, *given.models.values()) if text is not None]
    for text in (*sources, *((given.token_file,) if given.token_file is not None else ())):
        if text.lstrip()[:1] in (".", "~"):
            raise UsageError(f"{text[:200]!r}: give the whole path; the daemon's directories are not yours")
    if given.token_file is not None and not given.token_file.startswith("/"):
        raise UsageError("token_file: give the whole path; the daemon's directories are not yours")
    options: dict[str, Any] = {
        name: value
        for name in specification.Options.__optional_keys__
        if (value := getattr(given, name)) is not None and value != ()
    }
    spec = specification.of_options(pipeline, given.source, {"owner": owner, **options})  # type: ignore[typeddict-item]
    return protocol.Add(spec, given.warm)


# -- answers -----------------------------------------------------------------------------------------------------------


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as `--json` and the control protocol show it. ``retry_after`` is in seconds, where it is known."""

    code: str
    message: str
    retry_after: float | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is not 2xx."""

    error: ErrorBody


STATUS: Mapping[type[InstantStartError], int] = {
    errors.InstantStartError: 500,
    errors.UsageError: 400,
    errors.NoSuchEntry: 404,
    errors.PipelineNotFound: 404,
    errors.PipelineExists: 409,
    errors.PipelineBusy: 409,
    errors.VariantNotChosen: 409,
    errors.NoColdStart: 409,
    errors.FillCancelled: 409,
    # Not 401, 403 or 404: those are this daemon's own words to its caller.
    errors.OriginError: 502,
    errors.OriginUnavailable: 503,
    errors.OriginBroken: 503,
    errors.StoreFull: 507,
    errors.IndexFull: 507,
    errors.StoreReadOnly: 503,
    errors.OutOfResources: 503,
    errors.IndexStuck: 503,
    errors.DigestMismatch: 502,
    errors.ReadDeadline: 504,
    errors.DaemonUnreachable: 503,
    errors.WaitDeadline: 504,
    errors.ControlProtocolError: 400,
    errors.PermissionRefused: 403,
}
"""Error → status. The nearest class of the error tree counts; 500 stands for all others."""


def status_of(error: InstantStartError) -> int:
    """Return the HTTP status for ``error``."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
