"""The circuit breakers: one per pipeline and failing host, and one per file. Bookkeeping over core/retry's Breaker;
what follows when one opens or closes (held files, woken readers) is filler/origin_backoff.py's.

A host is the hub's API, its CDN, an S3 endpoint. The failures of one file open only its own breaker. A pipeline's
breaker opens when two of its files fail at one host. It never opens another pipeline's: the cause may be one
repository, path or token, so each pipeline finds out for itself. On the trio thread.
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
"""Files of one pipeline that must fail at a host before that counts as the host's failure."""
MOST_HOSTS = 1000
"""Hosts that are remembered for the metrics."""
MOST_FILES = 10_000


def host_of(origin: OriginKey, url: str | None) -> str:
    """The host of a request: the origin's own endpoint, or that of ``url`` where it is another. ``url``: None where
    only the origin was asked."""
    if url is None or url.startswith("file:"):
        return str(origin)
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return (
        str(origin) if place == (urlsplit(origin.endpoint).netloc or origin.endpoint) else f"{parts.scheme}://{place}"
    )


class _Scope:
    """Failures of one pipeline at one host. ``files``: the first FILES of those that failed since the last success."""

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
    """All breakers of the daemon."""

    def __init__(self) -> None:
        self._scopes: dict[str, dict[str, _Scope]] = {}
        """Pipeline → host → the failures there since the last success."""
        self._files: dict[FileKey, _Scope] = {}
        self._hosts: dict[str, OriginKey] = {}
        """Hosts where a request has ever failed."""

    def states(self) -> Iterator[tuple[str, OriginKey, str]]:
        """Yield (host, origin, the worst state of any pipeline's breaker there) of each host that has ever failed."""
        now = trio.current_time()
        worst: dict[str, str] = {}
        for scope in self._all():
            state = scope.breaker.state(now)
            if worst.get(scope.host, "closed") == "closed" or state == "open":
                worst[scope.host] = state
        for host, origin in self._hosts.items():
            yield host, origin, worst.get(host, "closed")

    def limits(self) -> Iterator[tuple[OriginKey, str, int, float]]:
        """Yield (origin, pipeline, requests that may be in flight, when that changes) of each breaker that is not
        closed."""
        now = trio.current_time()
        for pipeline, scopes in self._scopes.items():
            found = [scope for scope in scopes.values() if scope.breaker.probe_at is not None]
            for scope in found:
                limit = min(other.breaker.limit(now) or 0 for other in found if other.origin == scope.origin)
                yield scope.origin, pipeline, limit, scope.breaker.probe_at or now

    def succeeded(self, origin: OriginKey, host: str, file: FileKey) -> bool:
        """Note that the host answered for this file. True if that closed a breaker."""
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
        """Note a failure after ``silent`` seconds without a byte. Returns whose breaker that opened, or ""."""
        now = trio.current_time()
        self._hosts.setdefault(host, origin)
        if len(self._hosts) > MOST_HOSTS:
            del self._hosts[next(iter(self._hosts))]
        scope = self._scopes.setdefault(file.pipeline, {}).setdefault(host, _Scope(origin, host))
        if len(scope.files) < FILES:  # more are not needed, and a pipeline may have a million
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
        """The error for reads of this file while they are known to fail; None while they are not.

        ``half_open``: also return it while one request is tried.
        """
        for scope in (*self._scopes.get(file.pipeline, {}).values(), self._files.get(file)):
            if scope is not None and scope.origin == origin and self._closed(scope, half_open=half_open) is False:
                return scope.error(scope.host)
        return None

    def broken_for_anyone(self, origin: OriginKey) -> OriginBroken | None:
        """``broken`` for any pipeline or file of the origin."""
        for scope in self._all():
            if scope.origin == origin and not scope.breaker.closed:
                return scope.error(scope.host)
        return None

    def probe_at(self, file: FileKey) -> float | None:
        """Return when this file may be tried again; None while its own breaker is closed."""
        mine = self._files.get(file)
        return mine.breaker.probe_at if mine is not None else None

    def forget(self, pipeline: str) -> set[OriginKey]:
        """Forget a pipeline. Returns the origins at which it had failed."""
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
