"""The circuit breakers: one per pipeline and host that answered badly, and one per file. Bookkeeping over core/retry's
Breaker.

A host is the hub's API, its CDN, an S3 endpoint. One file's failures are that file's: they open its own breaker. A
pipeline's opens when two of its files fail at one host. Nobody's failures open another pipeline's: a host that is down
for one may have a repository, a path or a token that is ill, and whoever else asks it finds out by himself.

Lives on the trio thread. What follows from a breaker that opens or closes (held files, readers to wake) is its owner's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

import trio

from instantstart_fs.core.retry import Breaker
from instantstart_fs.errors import InstantStartError, OriginBroken
from instantstart_fs.filler.target import FileKey
from instantstart_fs.origins.base import OriginKey

log = logging.getLogger(__name__)

FILES = 2
"""Of one pipeline that fail at one host, before it counts as the host's failure."""
MOST_HOSTS = 1000
"""That are remembered for the metrics."""
MOST_FILES = 10_000


def host_of(origin: OriginKey, url: str | None) -> str:
    """Who answered: the origin's own endpoint, or the host of ``url`` where that is another. None: nobody was asked but
    the origin."""
    if url is None or url.startswith("file:"):
        return str(origin)
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return (
        str(origin) if place == (urlsplit(origin.endpoint).netloc or origin.endpoint) else f"{parts.scheme}://{place}"
    )


class _Scope:
    """``files``: of those that failed since the last success, the first FILES."""

    def __init__(self, origin: OriginKey, host: str) -> None:
        self.origin = origin
        self.host = host
        self.breaker = Breaker()
        self.files: set[FileKey] = set()
        self.last = "it does not answer"

    def error(self, what: str) -> OriginBroken:
        wait = max((self.breaker.probe_at or 0.0) - trio.current_time(), 0.0)
        return OriginBroken(f"{what} is down ({self.last}); tried again in {wait:.0f} s")


class Breakers:
    def __init__(self) -> None:
        self._scopes: dict[str, dict[str, _Scope]] = {}
        """By pipeline and host; those without a failure since the last success are forgotten."""
        self._files: dict[FileKey, _Scope] = {}
        self._hosts: dict[str, OriginKey] = {}
        """Where anything has ever failed."""

    def states(self) -> Iterator[tuple[str, OriginKey, str]]:
        """(host, origin, the worst state of any pipeline's breaker there) of all that have ever failed."""
        now = trio.current_time()
        worst: dict[str, str] = {}
        for scope in self._all():
            state = scope.breaker.state(now)
            if worst.get(scope.host, "closed") == "closed" or state == "open":
                worst[scope.host] = state
        for host, origin in self._hosts.items():
            yield host, origin, worst.get(host, "closed")

    def limits(self) -> Iterator[tuple[OriginKey, str, int, float]]:
        """(origin, pipeline, how many requests may be in flight, when that changes) where a pipeline's breaker is not
        closed."""
        now = trio.current_time()
        for pipeline, scopes in self._scopes.items():
            found = [scope for scope in scopes.values() if scope.breaker.probe_at is not None]
            for scope in found:
                limit = min(other.breaker.limit(now) or 0 for other in found if other.origin == scope.origin)
                yield scope.origin, pipeline, limit, scope.breaker.probe_at or now

    def succeeded(self, origin: OriginKey, host: str, file: FileKey) -> bool:
        """The host answered for this file. True if that closed a breaker."""
        closed = False
        mine = self._files.get(file)
        if mine is not None and mine.host == host:
            del self._files[file]
            closed = mine.breaker.succeeded()
        scopes = self._scopes.get(file.pipeline)
        scope = scopes.pop(host, None) if scopes is not None else None
        if scope is None:
            return closed
        if not scopes:
            del self._scopes[file.pipeline]
        if scope.breaker.succeeded():
            log.info("%s answers again", host, extra={"pipeline": file.pipeline})
            closed = True
        return closed

    def failed(
        self, origin: OriginKey, host: str, file: FileKey, silent: float, error: InstantStartError
    ) -> Literal["", "file", "pipeline"]:
        """The host failed for this file after ``silent`` seconds without a byte. Whose breaker that opened (anew)."""
        now = trio.current_time()
        self._hosts.setdefault(host, origin)
        if len(self._hosts) > MOST_HOSTS:
            del self._hosts[next(iter(self._hosts))]
        scope = self._scopes.setdefault(file.pipeline, {}).setdefault(host, _Scope(origin, host))
        if len(scope.files) < FILES:  # of a pipeline with a million files, more need not be known
            scope.files.add(file)
        scope.last = error.message
        was_closed = scope.breaker.closed
        opened = scope.breaker.failed(now, silent, may_open=len(scope.files) >= FILES)
        mine = self._files.get(file)
        if mine is None or mine.host != host:
            mine = self._files[file] = _Scope(origin, host)
            if len(self._files) > MOST_FILES:
                del self._files[next(iter(self._files))]
        mine.last = error.message
        file_was_closed = mine.breaker.closed
        file_opened = mine.breaker.failed(now, silent)
        if opened:
            if was_closed:
                log.warning("%s is down: %s", host, error.message, extra={"pipeline": file.pipeline})
            return "pipeline"
        if file_opened and file_was_closed and scope.breaker.closed:
            log.warning("%s does not answer for a file: %s", host, error.message, extra={"pipeline": file.pipeline})
        return "file" if file_opened else ""

    def broken(self, origin: OriginKey, file: FileKey, *, half_open: bool = True) -> OriginBroken | None:
        """What to refuse reads of this file with while it is known that they fail; None while it is not.

        ``half_open``: also while one request is tried.
        """
        for scope in (*self._scopes.get(file.pipeline, {}).values(), self._files.get(file)):
            if scope is not None and scope.origin == origin and self._closed(scope, half_open=half_open) is False:
                return scope.error(scope.host)
        return None

    def broken_for_anyone(self, origin: OriginKey) -> OriginBroken | None:
        """The same for whichever pipeline or file."""
        for scope in self._all():
            if scope.origin == origin and not scope.breaker.closed:
                return scope.error(scope.host)
        return None

    def probe_at(self, file: FileKey) -> float | None:
        """When this file may be tried again; None while its own breaker is closed."""
        mine = self._files.get(file)
        return mine.breaker.probe_at if mine is not None else None

    def forget(self, pipeline: str) -> set[OriginKey]:
        """The pipeline is no more. At which origins it had failed."""
        origins = {scope.origin for scope in self._scopes.pop(pipeline, {}).values()}
        for file in [file for file in self._files if file.pipeline == pipeline]:
            del self._files[file]
        return origins

    def _closed(self, scope: _Scope, *, half_open: bool) -> bool:
        state = scope.breaker.state(trio.current_time())
        return state == "closed" or (state == "half-open" and not half_open)

    def _all(self) -> Iterator[_Scope]:
        for scopes in self._scopes.values():
            yield from scopes.values()
        yield from self._files.values()
