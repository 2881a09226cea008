"""The common part of the origins: choosing files by globs, finishing a manifest, reading HTTP headers."""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl, urlsplit

from instantstart_fs.core.manifest import ManifestFile, ModelManifest, ModelSpec, Skipped, matches
from instantstart_fs.core.names import unservable
from instantstart_fs.errors import OriginMisbehaved, OriginNotFound, OriginUnsupported, printable

log = logging.getLogger(__name__)

MAX_FILES = 500_000
"""The most files that one model may have, after its globs. A manifest takes memory in the daemon while it is looked at:
some 1 KB for each file."""
MAX_LISTED = 4_000_000
"""The most files that are looked at for one model. A listing that has no end must come to one."""
SKIPS_TOLD = 10
"""Names that a manifest remembers of what was left out."""
SHOWN_TO_ALL = frozenset({"readme.md", ".gitattributes"})
MAX_SHOWN = 120
"""Characters of such a name."""
MAX_FILE_BYTES = 1 << 62
_HEX = frozenset("0123456789abcdef")
DEFAULT_LIFETIME = 300.0
"""Seconds that an address of unknown expiry is used. Short: to locate again costs one HEAD, a stale address a 403."""


def selected(path: str, model: ModelSpec) -> bool:
    """Whether a model's include and exclude globs choose ``path``. No include = everything; exclude wins."""
    return (not model.include or matches(path, model.include)) and not matches(path, model.exclude)


class Skips:
    """Collects what a source holds and cannot be shown; ``result`` is what a manifest says of it."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self._count

    def add(self, path: object, reason: str) -> None:
        self._count += 1
        if len(self._first) < SKIPS_TOLD:
            self._first.append((_shown(path), reason))

    def result(self) -> Skipped | None:
        if not self._count:
            return None
        return Skipped(self._count, tuple(f"{path}: {reason}" for path, reason in self._first))


def _shown(path: object) -> str:
    text = path if isinstance(path, str) else repr(path)
    return printable(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")


class Named(Protocol):
    @property
    def path(self) -> str: ...


_N = TypeVar("_N", bound=Named)


def leave_out(model: ModelSpec, files: Sequence[_N], skips: Skips) -> Sequence[_N]:
    """Return the files that a filesystem can show; ``skips`` gets the others. Call it before any file is requested: an
    address with ``..`` or ``//`` in it may become another's on the way."""
    below = f"{model.name}/" if model.name else ""
    problems = unservable([below + file.path if file.path else "" for file in files])
    for position, problem in sorted(problems.items()):
        skips.add(files[position].path, problem)
    return [file for position, file in enumerate(files) if position not in problems] if problems else files


def finish_manifest(
    model: ModelSpec, revision: str, files: Sequence[ManifestFile], held: int, skips: Skips | None = None
) -> ModelManifest:
    """The manifest of already chosen ``files`` (of ``held`` at the origin), sorted by path. What no filesystem can show
    is left out, and told in ``skipped`` beside ``skips``.

    Raises OriginMisbehaved for sizes and digests that are none and a name given twice, OriginUnsupported for too many
    and where nothing can be shown, and OriginNotFound where nothing is left to serve.
    """
    refuse_endless(model.source, len(files), held)
    for file in files:
        _check_file(model.source, file)
    if len({file.path for file in files}) != len(files):
        twice = next(path for path, count in Counter(file.path for file in files).items() if count > 1)
        raise OriginMisbehaved(f"{model.source}: lists {_shown(twice)!r} twice: its listing does not add up")
    skips = skips if skips is not None else Skips()
    shown = leave_out(model, files, skips)
    skipped = skips.result()
    if not shown and skipped is not None:
        raise OriginUnsupported(f"{model.source}: none of its files can be shown in a filesystem ({skipped})")
    if not shown:
        if held:
            raise OriginNotFound(
                f"{model.source}: none of its {held} files is chosen by the include and exclude globs; loosen them"
            )
        raise OriginNotFound(f"{model.source}: there are no files; check the address")
    if skipped is not None:
        log.warning("%s: %d file(s) cannot be shown and are left out: %s", model.source, skipped.count, skipped)
    return ModelManifest(model.name, model.source, revision, tuple(sorted(shown, key=lambda file: file.path)), skipped)


def refuse_endless(source: str, chosen: int, listed: int) -> None:
    """Raise OriginUnsupported beyond MAX_FILES chosen, or MAX_LISTED listed."""
    if chosen > MAX_FILES:
        raise OriginUnsupported(
            f"{source}: more than {MAX_FILES} files, which is the limit for one model; choose some of them by "
            "--include and --exclude, or a narrower prefix"
        )
    if listed > MAX_LISTED:
        raise OriginUnsupported(
            f"{source}: its listing goes on beyond {MAX_LISTED} files, which is the limit; choose a narrower prefix, "
            "or another repository"
        )


def _check_file(source: str, file: ManifestFile) -> None:
    """Check the types of what an origin says about a file: it is unchecked JSON."""
    digest = file.digest
    size: object = file.size
    if not isinstance(file.path, str) or not isinstance(size, int) or not 0 <= size < MAX_FILE_BYTES:
        raise OriginMisbehaved(f"{source}: lists {file.path!r:.300} with a size of {size!r:.40}")
    if digest is not None and (not digest.value or len(digest.value) > 128 or not _HEX.issuperset(digest.value)):
        raise OriginMisbehaved(f"{source}: gives {file.path!r:.300} a digest that is none")


def samples(files: Sequence[ManifestFile]) -> list[ManifestFile]:
    """Choose the pinned files that stand for all: the largest of each way in which a hub serves files (by a CDN, by
    itself). Files that a gated repository shows to everybody are left out if there are others."""

    def weight(file: ManifestFile) -> tuple[bool, int]:
        return file.path.lower() not in SHOWN_TO_ALL, file.size

    ways: dict[bool, ManifestFile] = {}
    for file in files:
        way = file.digest is not None and file.digest.algorithm == "sha256"
        if way not in ways or weight(file) > weight(ways[way]):
            ways[way] = file
    found = list(ways.values())
    return [file for file in found if weight(file)[0]] or found


def is_trusted(url: str) -> bool:
    """Whether the way to ``url`` protects the bytes: TLS, this very machine, or a local file."""
    parts = urlsplit(url)
    if parts.scheme in ("https", "file"):
        return True
    host = parts.hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for: a number or an HTTP date; None where it says nothing sensible."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            import email.utils  # late: a date is rare here

            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def signature_expiry(url: str, now: float) -> float | None:
    """When (seconds of the wall clock) the signature in ``url`` ends; None where the URL does not say.

    Knows S3's X-Amz-Date + X-Amz-Expires, GCS's X-Goog-…, and the Expires (epoch seconds) of CloudFront and old S3.
    """
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    try:
        for family in ("x-amz", "x-goog"):
            if f"{family}-expires" in query:
                issued = query.get(f"{family}-date")
                start = now
                if issued:
                    parsed = datetime.datetime.strptime(issued, "%Y%m%dT%H%M%SZ")
                    start = parsed.replace(tzinfo=datetime.UTC).timestamp()
                return start + float(query[f"{family}-expires"])
        if "expires" in query:
            return float(query["expires"])
    except ValueError:
        return None
    return None
