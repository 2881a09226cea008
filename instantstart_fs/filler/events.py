"""The filler's reports to the library: events about single files, and statistics on request. Protocols and values
only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from instantstart_fs.core.histogram import Histogram

if TYPE_CHECKING:
    from instantstart_fs.errors import InstantStartError
    from instantstart_fs.filler.target import FillTarget


class FillEvents(Protocol):
    """Synchronous calls on the trio thread. An implementation must not raise."""

    def chunk_present(self, target: FillTarget, chunk: int) -> None:
        """A chunk can be read."""
        ...

    def target_sealed(self, target: FillTarget) -> None:
        """The file is sealed or unverified: it has its seal record, and the index says so."""
        ...

    def target_poisoned(self, target: FillTarget, error: InstantStartError) -> None:
        """The digest did not match: the target has failed, its record is the next incarnation's, its blob is unlinked.
        Replace the target by a fresh one; ``demand`` or ``fill`` for that fetches the file again."""
        ...

    def target_failed(self, target: FillTarget, error: InstantStartError) -> None:
        """The target has failed, for good unless a later ``demand`` revives it."""
        ...

    def failure(self, target: FillTarget, error: InstantStartError | None) -> None:
        """A transient failure; None: it is over."""
        ...


class BreakerState(msgspec.Struct, frozen=True):
    """The circuit breaker of one host, as metrics show it."""

    origin: str
    state: str
    in_flight: int


class RackStatistics(msgspec.Struct, frozen=True):
    """Since the start. ``neighbours`` live now, this host not counted; ``taken_bytes`` came from them (they count as
    the region's, too), ``given_bytes`` went to them; ``fallbacks``: what they did not give, by reason; ``refused``:
    requests of theirs that got no chunk, by reason."""

    rack: str
    neighbours: int
    taken_bytes: int
    given_bytes: int
    fallbacks: tuple[tuple[str, int], ...] = ()
    refused: tuple[tuple[str, int], ...] = ()


class UpstreamHealth(msgspec.Struct, frozen=True):
    """How another region's tier fares. ``asked``: it has answered, or failed; ``broken``: why it was left alone, ""
    once it has answered again, ``broken_since_ns``: the wall clock when that began."""

    endpoint: str
    asked: bool
    broken: str
    broken_since_ns: int


class RegionStatistics(msgspec.Struct, frozen=True):
    """Since the start. ``fallbacks``: what the tier did not give, or not rightly, by reason; ``broken``: why it is left
    alone now, "" = it is not, ``broken_since_ns``: the wall clock when that began; ``left_alone``: of this tier and
    each upstream one, by endpoint, whether it is; ``missed_bytes`` of files under the region came from their origins;
    ``pending``: chunks that wait to be written to it; ``rack``: what is taken from and given to neighbours, None
    without a rack level."""

    taken_bytes: int = 0
    put_bytes: int = 0
    claims_won: int = 0
    claims_lost: int = 0
    fallbacks: tuple[tuple[str, int], ...] = ()
    broken: str = ""
    broken_since_ns: int = 0
    left_alone: tuple[tuple[str, bool], ...] = ()
    upstream: tuple[UpstreamHealth, ...] = ()
    missed_bytes: int = 0
    pending: int = 0
    rack: RackStatistics | None = None


class FillStatistics(msgspec.Struct, frozen=True):
    """``queued`` chunks are wanted and not in flight. ``fetched_from``: bytes by scheme and endpoint."""

    workers: int
    worker_deaths: int
    files: int
    in_flight: int
    queued: int
    retries: int
    fetched_bytes: int
    commits: int
    poisoned: int
    index_stuck: bool
    fetched_from: tuple[tuple[str, int], ...]
    origins: tuple[BreakerState, ...]
    region: RegionStatistics | None = None
    """The tier's figures; None without a regional tier."""
    retried: tuple[tuple[tuple[str, str], int], ...] = ()
    """Failed requests by origin (as in ``fetched_from``) and error code."""
    answers: tuple[tuple[str, Histogram], ...] = ()
    """Seconds from a request to the first byte of its answer, by origin."""
