"""Reads the phases of an engine's start, in seconds, from its log lines. Pure.

vLLM and SGLang print how long loading, compiling, capturing and warming up took. What is not said is not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 4000
"""Characters of a line that are looked at."""

_SECONDS = r"([0-9]+(?:\.[0-9]+)?) ?(?:s\b|sec|secs|seconds)"
_MARKS: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (engine, phase, re.compile(pattern, re.IGNORECASE))
    for engine, phase, pattern in (
        ("vllm", "load", r"(?:Loading weights|Model loading) took (?:[0-9.]+ GiB (?:memory )?and )?" + _SECONDS),
        ("vllm", "compile", r"torch\.compile (?:and initial profiling/warmup run together )?took " + _SECONDS),
        ("vllm", "compile", r"torch\.compile takes " + _SECONDS),
        ("vllm", "capture", r"Graph capturing finished in " + _SECONDS),
        ("vllm", "warm-up", r"(?:Initial profiling/warmup run|JIT kernel warmup) (?:took|finished in) " + _SECONDS),
        # Of all that was compiled one after the other: a model's encoder, and the rest of it, print a line each.
        ("vllm", "compile", r"init engine \(.*?\) took [0-9.]+ s \(compilation: " + _SECONDS),
        ("vllm", "engine", r"init engine \(.*\) took " + _SECONDS),
        ("sglang", "load", r"Load weight end\..*?elapsed=" + _SECONDS),
        ("sglang", "capture", r"Capture (?:cuda|piecewise cuda|cpu) graph end\. Time elapsed: " + _SECONDS),
        ("sglang", "compile", r"(?:torch\.compile|Compil(?:e|ing)).*?(?:Time )?elapsed[:=] ?" + _SECONDS),
        ("sglang", "warm-up", r"(?:Warmup|warm up).*?(?:took|elapsed[:=]) ?" + _SECONDS),
    )
)  # fmt: skip
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class EngineLog:
    """Reads phases from an engine's log. ``engine``: whose words to listen for. ``phases``: seconds; of several ranks
    the longest."""

    def __init__(self, engine: str) -> None:
        self._marks = [(phase, pattern) for name, phase, pattern in _MARKS if name == engine]
        self.phases: dict[str, float] = {}

    @property
    def listens(self) -> bool:
        return bool(self._marks)

    def line(self, text: str) -> None:
        lowered = text[:LONGEST]
        if not any(word in lowered for word in (" took ", "elapsed", " finished in ", " takes ")):
            return
        lowered = _ANSI.sub("", lowered)
        for phase, pattern in self._marks:
            if (found := pattern.search(lowered)) is not None:
                self.phases[phase] = max(self.phases.get(phase, 0.0), float(found[1]))

    def lines(self, texts: Iterable[str]) -> dict[str, float]:
        for text in texts:
            self.line(text)
        return self.phases
