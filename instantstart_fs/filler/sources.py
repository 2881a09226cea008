"""Where a file's bytes can come from, in order: the chain of sources, and where each has them now.

The last link is the file's origin; a regional tier is a link before it (``Tier``), and nothing else changes.
``Locator`` asks a link where a file lies: once per file and signature lifetime, in a thread, with a deadline, at most
``LOCATE_THREADS`` at a time per origin key, so that a stuck service holds up nobody else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from instantstart_fs.core.manifest import FileEntry, ManifestFile
from instantstart_fs.errors import InstantStartError, OriginUnavailable
from instantstart_fs.filler.target import FillTarget
from instantstart_fs.origins.base import Location, OriginKey

log = logging.getLogger(__name__)

LOCATE_THREADS = 8
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


class Locator:
    """``deadline``: seconds for one answer, waiting for a free thread included."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._limiters: dict[OriginKey, trio.CapacityLimiter] = {}

    async def locate(self, link: Source, entry: FileEntry) -> Location:
        """Raises OriginError."""
        limiter = self._limiters.get(link.key)
        if limiter is None:
            limiter = self._limiters[link.key] = trio.CapacityLimiter(LOCATE_THREADS)
        try:
            with trio.fail_after(self._deadline):
                return await trio.to_thread.run_sync(link.locate, entry.file, abandon_on_cancel=True, limiter=limiter)
        except trio.TooSlowError as error:
            raise OriginUnavailable(f"{link.key}: no answer within {self._deadline:g} s") from error
        except InstantStartError:
            raise
        except Exception as error:
            log.exception("%s: locating %s failed", link.key, entry.path)
            raise OriginUnavailable(f"{link.key}: {type(error).__name__}: {error}") from error
