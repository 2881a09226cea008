"""What origins did, counted by origin: bytes, failures by their code, how long they took to begin an answer."""

from __future__ import annotations

from collections import Counter

from instantstart_fs.core.histogram import Histogram
from instantstart_fs.origins.base import OriginKey

ANSWER_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: a disk's own server at one end, a stalled one at the other."""
WORKER_LOST = "worker-lost"
"""In the place of an error's code: the fetch process ended."""


class Tally:
    """Since the daemon's start; on the trio thread."""

    def __init__(self) -> None:
        self.fetched: Counter[str] = Counter()
        self.retried: Counter[tuple[str, str]] = Counter()
        """By (origin, code)."""
        self.answers: dict[str, Histogram] = {}

    def came(self, origin: OriginKey, length: int) -> None:
        """So many bytes, into the store."""
        self.fetched[label_of(origin)] += length

    def answered(self, origin: OriginKey, seconds: float) -> None:
        """It took so long from a request to the first byte of a good answer."""
        label = label_of(origin)
        if label not in self.answers:
            self.answers[label] = Histogram(ANSWER_BUCKETS)
        self.answers[label].observe(seconds)

    def failed(self, origin: OriginKey, code: str) -> None:
        """A request failed, and is made again unless that is in vain."""
        self.retried[label_of(origin), code] += 1


def label_of(origin: OriginKey) -> str:
    """Of a directory the endpoint is its path, which is nobody's business and would be a label each."""
    return origin.scheme if origin.scheme == "file" else f"{origin.scheme}://{origin.endpoint}"
