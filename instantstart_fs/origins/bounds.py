"""How large a listing may become in the process that makes it."""

from __future__ import annotations

import msgspec

from instantstart_fs.errors import OriginUnsupported

MIB = 1024 * 1024


class TooLarge(OriginUnsupported):
    """A listing outgrew its bounds. Within the daemon: it goes on in a process of its own (library/listing.py)."""


class Bounds(msgspec.Struct, frozen=True):
    """``body``: bytes of one answer. ``files``: of one listing, 0 = as many as MAX_FILES and MAX_LISTED allow."""

    body: int = 256 * MIB
    files: int = 0

    def allow(self, source: str, *, files: int = 0, body: int = 0) -> None:
        """Raises TooLarge."""
        if self.files and files > self.files:
            raise TooLarge(f"{source}: more than {self.files} files")
        if body > self.body:
            raise TooLarge(
                f"{source}: one answer of its listing has more than {self.body // MIB} MiB, which is the limit; ask a "
                "hub that lists in pages"
            )


IN_THE_DAEMON = Bounds(body=4 * MIB, files=20_000)
"""Decoding an answer of 4 MiB holds up the others for some 10 ms; 20,000 files take 12 MB of memory for a while."""
