"""Measures the bytes per second of each pipeline over the last WINDOW seconds. Pure: time is a parameter."""

from __future__ import annotations

from collections import deque

WINDOW = 5.0
STEP = 0.25


class Rates:
    """Receive rates, by pipeline."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[list[float]]] = {}
        self._swept_at = 0.0

    def add(self, pipeline: str, count: int, now: float) -> None:
        """Count bytes that came now."""
        samples = self._samples.setdefault(pipeline, deque())
        if samples and now - samples[-1][0] < STEP:
            samples[-1][1] += count
        else:
            samples.append([now, count])
        while samples and now - samples[0][0] > WINDOW:
            samples.popleft()
        if now >= self._swept_at + WINDOW:
            # Removed pipelines are never asked about.
            self._swept_at = now
            for silent in [name for name, known in self._samples.items() if now - known[-1][0] > WINDOW]:
                del self._samples[silent]

    def __len__(self) -> int:
        return len(self._samples)

    def rate(self, pipeline: str, now: float) -> float:
        """Return bytes per second; 0 if nothing came within the window."""
        samples = self._samples.get(pipeline)
        while samples and now - samples[0][0] > WINDOW:
            samples.popleft()
        if not samples:
            self._samples.pop(pipeline, None)
            return 0.0
        return sum(count for _, count in samples) / max(now - samples[0][0], 1.0)
