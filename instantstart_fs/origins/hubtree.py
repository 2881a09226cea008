"""Reads a repository's tree from a hub page by page, with a bound, and refuses one that is incomplete.

The tree endpoint lists everything. The ``siblings`` of a repository's description do not: some hubs cut them at 1,000,
some mirrors drop them or their sizes. They serve as a second witness. A file that the description names and the tree
does not, a cursor that repeats, or a full first page without a next one is refused: a repository pinned in part would
fail when an engine starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from instantstart_fs.core.manifest import Digest
from instantstart_fs.errors import OriginMisbehaved, OriginUnavailable
from instantstart_fs.origins.common import refuse_endless

PAGE = 1000
"""Entries of a whole page of a hub's tree."""
MAX_PAGES = 100_000
MAX_BARREN = 100
"""Pages in a row that say nothing new."""
LISTING_SECONDS = 290.0
"""Seconds for all pages together: less than callers wait (admin/lifecycle.py), so that they are told the reason."""


class Lfs(msgspec.Struct, frozen=True):
    """``oid`` in a tree, ``sha256`` in a description: one and the same."""

    size: int | None = None
    oid: str | None = None
    sha256: str | None = None


class Sibling(msgspec.Struct, frozen=True):
    rfilename: str
    size: int | None = None
    blobId: str | None = None  # noqa: N815 (the hub's names)
    lfs: Lfs | None = None


class Description(msgspec.Struct, frozen=True):
    sha: str | None = None
    lastModified: str | None = None  # noqa: N815
    siblings: list[Sibling] | None = None


class Entry(msgspec.Struct, frozen=True):
    path: str
    type: str = "file"
    size: int | None = None
    oid: str | None = None
    lfs: Lfs | None = None


class NoTree(Exception):
    """This hub has no tree endpoint."""


NOT_KNOWN = frozenset({404, 405, 410, 501})
"""The statuses of servers at an endpoint that they do not have."""


class Listed(NamedTuple):
    """A file of the repository. ``size`` None: the hub did not say."""

    path: str
    size: int | None
    digest: Digest | None


class Answer(NamedTuple):
    """An answer of the hub. ``next``: the address that a Link header gives for the next page."""

    body: bytes
    next: str | None


_T = TypeVar("_T")


def decode(body: bytes, kind: type[_T]) -> _T:
    """Decode JSON. Raises ValueError for what is no such JSON."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Half a surrogate pair is one odd name, and no reason to refuse all others; msgspec takes none.
        found: Any = json.loads(body)
        try:
            return msgspec.convert(found, kind)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None


def listed(entry: Entry) -> Listed:
    size = _size(entry.size, entry.lfs)
    strong = (entry.lfs.oid or entry.lfs.sha256) if entry.lfs else None
    return Listed(entry.path, size, _digest(strong, entry.oid, lfs=entry.lfs is not None))


def listed_sibling(sibling: Sibling) -> Listed:
    size = _size(sibling.size, sibling.lfs)
    strong = (sibling.lfs.sha256 or sibling.lfs.oid) if sibling.lfs else None
    return Listed(sibling.rfilename, size, _digest(strong, sibling.blobId, lfs=sibling.lfs is not None))


def _size(blob: int | None, lfs: Lfs | None) -> int | None:
    """Of an LFS file some mirrors give the length of its blob, which is the pointer's."""
    return lfs.size if lfs is not None and lfs.size is not None else blob


def _digest(strong: str | None, blob: str | None, *, lfs: bool) -> Digest | None:
    """An LFS file's own git blob is the pointer: it proves nothing about the bytes."""
    if strong:
        return Digest("sha256", strong.removeprefix("sha256:").lower())
    return Digest("git-sha1", blob.lower()) if blob and not lfs else None


def read_tree(source: str, ask: Callable[[str], Answer]) -> Iterator[tuple[list[Listed], int]]:
    """The files of each page of the recursive tree, and how many entries it had. ``ask(query)`` gets one page.

    Raises OriginMisbehaved for pages without end, OriginUnavailable after LISTING_SECONDS, OriginUnsupported beyond the
    limits, ValueError for what cannot be decoded, and what ``ask`` raises.
    """
    end = time.monotonic() + LISTING_SECONDS
    query = "recursive=true&expand=false"
    asked = {query}
    count = barren = 0
    for _ in range(MAX_PAGES):
        answer = ask(query)
        entries = decode(answer.body, list[Entry])
        files = [listed(entry) for entry in entries if entry.type != "directory"]
        count += len(files)
        refuse_endless(source, 0, count)
        yield files, len(entries)
        if answer.next is None:
            return
        barren = 0 if entries else barren + 1
        # Its host is not taken over: mirrors pass on that of the hub behind them, and a token goes nowhere else.
        query = urlsplit(answer.next).query
        if not query or query in asked or barren > MAX_BARREN:
            raise OriginMisbehaved(f"{source}: the pages of its listing repeat themselves: it has no end")
        asked.add(query)
        if time.monotonic() > end:
            raise OriginUnavailable(
                f"{source}: after {LISTING_SECONDS:g} s and {count} files its listing goes on; try again later"
            )
    raise OriginMisbehaved(f"{source}: its listing has more than {MAX_PAGES} pages")


class Witness:
    """Holds the pages of a tree against the files that the description names (None: none)."""

    def __init__(self, source: str, siblings: Sequence[Sibling] | None) -> None:
        self._source = source
        self._named = len(siblings or ())
        self._missing = dict.fromkeys(sibling.rfilename for sibling in siblings or ())
        self._pages = 0
        self._last = 0
        self.files = 0

    def saw(self, files: Sequence[Listed], entries: int) -> None:
        """The next page: its files, and how many entries it had."""
        self._pages += 1
        self._last = entries
        self.files += len(files)
        for file in files:
            self._missing.pop(file.path, None)

    def add_up(self) -> None:
        """Compare the two after the last page. Raises OriginMisbehaved if they do not speak of the same repository."""
        if self._missing:
            first = next(iter(self._missing))
            raise OriginMisbehaved(
                f"{self._source}: its listing does not add up: {len(self._missing)} of the {self._named} files that "
                f"its description names, {first!r:.150} first, are not in its tree of {self.files}; is there a mirror "
                "that cuts it?"
            )
        if self._pages == 1 and self._last >= PAGE and self._last % PAGE == 0 and self._named != self.files:
            raise OriginMisbehaved(
                f"{self._source}: its listing ends after exactly {self._last} entries, without a next page: it may be "
                "cut; ask the hub itself, or a mirror that passes on Link headers"
            )
