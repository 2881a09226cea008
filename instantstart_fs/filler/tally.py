"""Counters by origin, for metrics: bytes, failures by code, seconds to the first byte of an answer."""

from __future__ import annotations

from collections import Counter

from instantstart_fs.core.histogram import Histogram
from instantstart_fs.origins.base import OriginKey

ANSWER_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: a disk's own server at one end, a stalled one at the other."""
WORKER_LOST = "worker-lost"
"""The code of a request that was lost with its fetch process."""


class Tally:
    """Counts since the daemon's start. On the trio thread."""

    def __init__(self) -> None:
        self.fetched: Counter[str] = Counter()
        self.retried: Counter[tuple[str, str]] = Counter()
        """Requests that were tried again, by (origin, code)."""
        self.answers: dict[str, Histogram] = {}

    def came(self, origin: OriginKey, length: int) -> None:
        """Count bytes that were written into the store."""
        self.fetched[label_of(origin)] += length

    def answered(self, origin: OriginKey, seconds: float) -> None:
        """Count the seconds from a request to the first byte of a good answer."""
        label = label_of(origin)
        if label not in self.answers:
            self.answers[label] = Histogram(ANSWER_BUCKETS)
        self.answers[label].observe(seconds)

    def failed(self, origin: OriginKey, code: str) -> None:
        """Count a failed request."""
        self.retried[label_of(origin), code] += 1


def label_of(origin: OriginKey) -> str:
    """The label of an origin in metrics. A directory's path is left out: it is private, and would be a label each."""
    return origin.scheme if origin.scheme == "file" else f"{origin.scheme}://{origin.endpoint}"
