"""Decides which labels a node gets for its warm pipelines, and what has to change for that. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Final

from instantstart_fs.core.status import PipelineStatus

DOMAIN: Final = "instantstart.io/"
PREFIX: Final = f"{DOMAIN}warm."
MAX_NAME: Final = 63
"""Characters of a label's name after its domain, and of its value (Kubernetes)."""
_LEGAL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


def label(pipeline: str) -> str:
    """The label's key for that pipeline. An id that cannot be part of one is cut, and told apart by a digest."""
    name = f"warm.{pipeline}"
    if len(name) > MAX_NAME or not _LEGAL.match(name):
        digest = hashlib.sha256(pipeline.encode()).hexdigest()[:8]
        cut = re.sub(r"[^A-Za-z0-9._-]", "-", name)[: MAX_NAME - len(digest) - 1].rstrip("._-")
        name = f"{cut}-{digest}"
    return DOMAIN + name


def wanted_labels(pipelines: Iterable[PipelineStatus], limit: int) -> dict[str, str]:
    """Return labels for the warm pipelines, at most ``limit``: those in use first, then by their last request, newest
    first."""
    warm = [status for status in pipelines if status.state in ("warm", "unverified")]
    warm = [status for status in warm if status.cached_bytes >= status.total_bytes]
    warm.sort(key=lambda status: status.pipeline)
    warm.sort(key=lambda status: (status.leases > 0, status.last_request or ""), reverse=True)
    return {label(status.pipeline): "true" for status in warm[:limit]}


def changes(present: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str | None]:
    """Return what a merge patch has to say; None removes a label. Labels that are not ours are left alone."""
    removed: dict[str, str | None] = {key: None for key in present if key.startswith(PREFIX) and key not in wanted}
    return removed | {key: value for key, value in wanted.items() if present.get(key) != value}
