"""Bounds of a listing: what the daemon lists itself (IN_THE_DAEMON), and what its listing process may (WHOLE)."""

from __future__ import annotations

import msgspec

from instantstart_fs.errors import OriginUnsupported

MIB = 1024 * 1024


class TooLarge(Exception):
    """A listing outgrew the daemon: it goes on in a process of its own (origins/lister.py)."""


class Bounds(msgspec.Struct, frozen=True):
    """Limits of a listing. ``body``: bytes of one answer. ``files``: of one listing, 0 = as many as MAX_FILES and
    MAX_LISTED allow. ``final``: beyond them the source is refused."""

    body: int = 256 * MIB
    files: int = 0
    final: bool = True

    def allow(self, source: str, *, files: int = 0, body: int = 0) -> None:
        """Check the limits. Raises OriginUnsupported, or TooLarge if the listing may go on elsewhere."""
        if not self.final and ((self.files and files > self.files) or body > self.body):
            raise TooLarge(source)
        if body > self.body:
            raise OriginUnsupported(
                f"{source}: one answer of its listing has more than {self.body // MIB} MiB, which is the limit; ask a "
                "server that lists in pages"
            )


WHOLE = Bounds()
IN_THE_DAEMON = Bounds(body=4 * MIB, files=10_000, final=False)
"""Decoding an answer of 4 MiB holds up the others for some 10 ms; 10,000 files take 6 MB of memory for a while."""
