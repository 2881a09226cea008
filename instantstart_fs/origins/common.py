"""What the origins share: choosing files by globs, finishing a manifest, reading HTTP's small print."""

from __future__ import annotations

import datetime
import email.utils
import fnmatch
import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl, urlsplit

from instantstart_fs.core.manifest import ManifestFile, ModelManifest, ModelSpec
from instantstart_fs.core.names import validate_origin_paths
from instantstart_fs.errors import OriginNotFound

DEFAULT_LIFETIME = 300.0
"""Seconds that an address of unknown expiry is used. Short: to locate again costs one HEAD, a stale address a 403."""


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether any glob matches, in huggingface_hub's way: fnmatch over the whole path, so that ``*`` crosses ``/``;
    a glob that ends with ``/`` means everything below it."""
    return any(fnmatch.fnmatchcase(path, glob + "*" if glob.endswith("/") else glob) for glob in globs)


def selected(path: str, model: ModelSpec) -> bool:
    """Whether a model's include and exclude globs choose ``path``. No include = everything; exclude wins."""
    return (not model.include or matches(path, model.include)) and not matches(path, model.exclude)


def finish_manifest(model: ModelSpec, revision: str, files: Sequence[ManifestFile], held: int) -> ModelManifest:
    """The manifest of already chosen ``files`` (of ``held`` at the origin): names validated, sorted by path.

    Raises InvalidName for a hostile name, and OriginNotFound where nothing is left to serve.
    """
    validate_origin_paths(file.path for file in files)
    if not files:
        if held:
            raise OriginNotFound(
                f"{model.source}: none of its {held} files is chosen by the include and exclude globs; loosen them"
            )
        raise OriginNotFound(f"{model.source}: there are no files; check the address")
    return ModelManifest(model.name, model.source, revision, tuple(sorted(files, key=lambda file: file.path)))


def without_query(url: str) -> str:
    """``url`` as messages may show it: no query (signatures live there), no user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


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
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError):
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
