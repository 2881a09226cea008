"""Where a file's bytes can come from, in order: the chain of sources, and where each has them now.

The last link is the file's origin; a regional tier is a link before it (``Tier``), and nothing else changes.
``Locator`` asks a link where a file lies: once per file and signature lifetime, in a thread, with a deadline, at most
``LOCATE_THREADS`` at a time per origin key and pipeline, so that a service, or a repository, that is stuck holds up
nobody else. Where a link can foresee it (small files of a hub), nobody is asked.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from instantstart_fs.core.manifest import FileEntry, ManifestFile
from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.origins.base import Foresight, Location, OriginKey

log = logging.getLogger(__name__)

LOCATE_THREADS = 8
MOST_UNANSWERED = 64
"""Threads of one origin key and pipeline, those included that were given up and still wait: beyond it nothing is
asked."""
MOST_WRONG = 3
ASKED_SECONDS = 600.0
"""After so many files that were not where they were foreseen, an origin is asked for so long."""
EXPIRY_MARGIN = 30.0
"""Seconds before its end at which a signature counts as used up: a fetch takes a while."""


class Source(Protocol):
    """A link: an Origin is one."""

    @property
    def key(self) -> OriginKey: ...

    def locate(self, file: ManifestFile) -> Location:
        """Blocks. Raises OriginError."""
        ...


Tier = Callable[[FillTarget], Source | None]
"""What a tier offers for a file; None = it is not to be asked."""


def chain_for(target: FillTarget, tiers: Sequence[Tier]) -> tuple[Source, ...]:
    """The links to ask for this file, in order; never empty."""
    links: list[Source] = [link for tier in tiers if (link := tier(target)) is not None]
    return (*links, target.origin)


def expired(location: Location) -> bool:
    return location.expires_at is not None and location.expires_at - EXPIRY_MARGIN <= time.time()


class _Line:
    """One pipeline's questions to one origin key. ``out``: threads that have not come back, those that were given up
    included. ``wrong``: what was foreseen wrongly in a row; ``asked_until``: trio.current_time() until which nothing
    is."""

    def __init__(self) -> None:
        self.asking = trio.Semaphore(LOCATE_THREADS)
        self.out = 0
        self.wrong = 0
        self.asked_until = -math.inf

    def went(self) -> None:
        self.out += 1

    def came_back(self) -> None:
        self.out -= 1


class Locator:
    """``deadline``: seconds for one answer, waiting for one's turn included."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._lines: dict[tuple[OriginKey, str], _Line] = {}

    def forget(self, pipeline: str) -> None:
        for place in [place for place, line in self._lines.items() if place[1] == pipeline and not line.out]:
            del self._lines[place]

    def foresaw(self, key: OriginKey, pipeline: str, *, rightly: bool) -> None:
        """What came of a location that was foreseen. An origin whose files were not there a few times in a row is
        asked for a while: else each file would cost one request more, and not one less."""
        line = self._lines.setdefault((key, pipeline), _Line())
        line.wrong = 0 if rightly else line.wrong + 1
        if line.wrong >= MOST_WRONG:
            line.wrong, line.asked_until = 0, trio.current_time() + ASKED_SECONDS

    async def locate(self, link: Source, entry: FileEntry, pipeline: str, *, foresee: bool = False) -> Location:
        """``foresee``: without asking, if the link can. Raises OriginError."""
        line = self._lines.setdefault((link.key, pipeline), _Line())
        foresight = (
            link if foresee and isinstance(link, Foresight) and trio.current_time() >= line.asked_until else None
        )
        if line.out >= MOST_UNANSWERED:
            raise OriginUnavailable(f"{link.key}: {line.out} questions are still unanswered")
        token = trio.lowlevel.current_trio_token()

        def tell(what: Callable[[], None]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(what)

        def ask() -> Location:
            tell(line.went)
            try:
                found = foresight.foresee(entry.file) if foresight is not None else None
                return found if found is not None else link.locate(entry.file)
            finally:
                tell(line.came_back)

        try:
            # A thread that is given up keeps its own limiter, and nobody else's: a server may never let go of it.
            with trio.fail_after(self._deadline):
                async with line.asking:
                    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        except trio.TooSlowError as error:
            raise OriginUnavailable(f"{link.key}: no answer within {self._deadline:g} s") from error
        except InstantStartError:
            raise
        except Exception as error:
            log.exception("%s: locating %s failed", link.key, entry.path)
            raise OriginUnavailable(f"{link.key}: {type(error).__name__}: {error}") from error
