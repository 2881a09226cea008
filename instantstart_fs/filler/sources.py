"""The chain of sources of a file, and the Locator, which asks a source where the file is now. Nothing is fetched here.

The last link of a chain is the file's origin; a regional tier is a link before it (``Tier``). The Locator asks once per
file and signature lifetime, in a thread, with a deadline, at most ``LOCATE_THREADS`` at a time per origin key and
pipeline, so that a stuck service or repository delays no other. Where a source can foresee the address (small files of
a hub), it is not asked.
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
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.origins.base import Foresight, Location, OriginKey

log = logging.getLogger(__name__)

LOCATE_THREADS = 8
MOST_UNANSWERED = 64
"""Threads of one origin key and pipeline, abandoned ones included, beyond which nothing more is asked."""
MOST_WRONG = 3
ASKED_SECONDS = 600.0
"""Seconds for which an origin is asked for addresses after MOST_WRONG files in a row were not at their foreseen
address."""
EXPIRY_MARGIN = 30.0
"""Seconds before its end at which a signature counts as expired: a fetch takes a while."""


class Source(Protocol):
    """A link of a chain; an Origin is one."""

    @property
    def key(self) -> OriginKey:
        """The key of its limits, breakers and counters."""
        ...

    def locate(self, file: ManifestFile) -> Location:
        """The file's present address. Blocks. Raises OriginError."""
        ...


Tier = Callable[[FillTarget], Source | None]
"""The source that a tier offers for a file; None = do not ask it."""


def chain_for(target: FillTarget, tiers: Sequence[Tier]) -> tuple[Source, ...]:
    """The sources to ask for this file, in order; never empty."""
    links: list[Source] = [link for tier in tiers if (link := tier(target)) is not None]
    return (*links, target.origin)


def expired(location: Location) -> bool:
    """Whether the address is no good for another fetch."""
    return location.expires_at is not None and location.expires_at - EXPIRY_MARGIN <= time.time()


class _Line:
    """One pipeline's questions to one origin key. ``out``: threads that have not returned, abandoned ones included.
    ``wrong``: addresses foreseen wrongly in a row; ``asked_until``: trio.current_time() until which no address is
    foreseen."""

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
    """Finds files' addresses. ``deadline``: seconds for one answer, the wait for a thread included."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._lines: dict[tuple[OriginKey, str], _Line] = {}

    def forget(self, pipeline: str) -> None:
        """Forget a pipeline that has no question under way."""
        for place in [place for place, line in self._lines.items() if place[1] == pipeline and not line.out]:
            del self._lines[place]

    def foresaw(self, key: OriginKey, pipeline: str, *, rightly: bool) -> None:
        """Note whether a foreseen address was right. An origin whose files were not there a few times in a row is asked
        for a while: foreseeing would cost a request more per file, not one less."""
        line = self._lines.setdefault((key, pipeline), _Line())
        line.wrong = 0 if rightly else line.wrong + 1
        if line.wrong >= MOST_WRONG:
            line.wrong, line.asked_until = 0, trio.current_time() + ASKED_SECONDS

    async def locate(self, link: Source, entry: FileEntry, pipeline: str, *, foresee: bool = False) -> Location:
        """Find out where a file is. ``foresee``: without asking, if the source can. Raises OriginError."""
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
            with trio.fail_after(self._deadline):
                async with line.asking:
                    return await run_abandonable(ask)
        except trio.TooSlowError as error:
            raise OriginUnavailable(f"{link.key}: no answer within {self._deadline:g} s") from error
        except InstantStartError:
            raise
        except Exception as error:
            log.exception("%s: locating %s failed", link.key, entry.path)
            raise OriginUnavailable(f"{link.key}: {type(error).__name__}: {error}") from error
