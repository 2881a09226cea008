"""Proves that pinned files may be fetched, by fetching one byte with the code that fills use.

Runs in a thread of the daemon; nothing is written.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.manifest import ManifestFile
from instantstart_fs.core.urls import shown_url
from instantstart_fs.errors import (
    LocationExpired,
    OriginChanged,
    OriginIncompatible,
    OriginMisbehaved,
    OriginNotFound,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.filler.messages import WorkerSettings
from instantstart_fs.origins.base import Location, Origin
from instantstart_fs.origins.common import samples


class _Nowhere:
    """A sink that discards all bytes."""

    def write(self, data: memoryview, offset: int) -> None:
        pass

    def before_read(self) -> None:
        pass

    def progress(self, count: int) -> None:
        pass

    def take_whole(self) -> None:
        pass


def prove_access(origin: Origin, pinned: tuple[ManifestFile, ...], timeout: float = 10.0) -> None:
    """Fetch a byte of each file of ``pinned`` that stands for the others. Raises OriginError where that is refused. A
    file that changed since it was pinned is no refusal: only callers with access are told so. Blocks, ``timeout``
    seconds for each silence."""
    from instantstart_fs.filler.fetch import Fetcher, new_buffer  # late: not everybody who imports this fetches

    fetcher = Fetcher(WorkerSettings(connect_timeout=timeout, stall_timeout=timeout, slow_window=timeout))
    for file in samples(pinned):
        if not file.size:
            continue
        for last in (False, True):
            location: Location | None = None
            try:
                location = origin.locate(file)
                fetcher.fetch(location, ByteRange(0, 1), file.size, new_buffer(), _Nowhere())
            except (OriginChanged, OriginNotFound, OriginMisbehaved, OriginUnsupported):
                break
            except OriginIncompatible as error:
                if error.fault != Fault.WHOLE:
                    raise
                break  # all of it was offered where one byte was asked for
            except LocationExpired as error:
                if last:
                    raise OriginUnavailable(
                        f"{error.message}, also at a fresh address; is there a proxy or a firewall in between?"
                    ) from error
            except OriginUnavailable as error:
                host = urlsplit(location.url).netloc.rpartition("@")[2] if location is not None else ""
                if not host:
                    raise  # the origin itself did not say where the bytes are
                reason = error.message.removeprefix(f"{shown_url(location.url)}: ") if location is not None else ""
                raise type(error)(
                    f"the origin answers, but its files come from {host}, and that fails: {reason}",
                    retry_after=error.retry_after,
                ) from error
            else:
                break
