"""Files that are not fetched for now: for a while after several digest mismatches in a row, and until
``reset_failures`` after a server proved incompatible (core/faults.py). Bookkeeping only: on the trio thread, times are
trio.current_time().
"""

from __future__ import annotations

from instantstart_fs.core.manifest import ETAG_HINT, ManifestFile, rests_on_etag
from instantstart_fs.errors import DigestMismatch, OriginIncompatible
from instantstart_fs.filler.target import FileKey

MISMATCHES = 3
QUARANTINE_SECONDS = 60.0
MAX_QUARANTINE_SECONDS = 3600.0
MOST = 10_000
"""Files that are remembered, the latest ones: pipelines come and go for years."""


class Quarantine:
    def __init__(self) -> None:
        self._mismatches: dict[FileKey, int] = {}
        self._until: dict[FileKey, float] = {}
        self._refused: dict[FileKey, OriginIncompatible] = {}

    def refuse(self, key: FileKey, error: OriginIncompatible) -> None:
        """Fetch the file no more before ``reset_failures``: its server is incompatible."""
        self._refused.pop(key, None)
        self._refused[key] = error
        if len(self._refused) > MOST:
            del self._refused[next(iter(self._refused))]

    def mismatch(self, key: FileKey, now: float) -> None:
        """Note a digest mismatch."""
        count = self._mismatches[key] = self._mismatches.pop(key, 0) + 1
        if len(self._mismatches) > MOST:
            self.proven(next(iter(self._mismatches)))
        if count >= MISMATCHES:
            delay = min(QUARANTINE_SECONDS * 2 ** min(count - MISMATCHES, 16), MAX_QUARANTINE_SECONDS)
            self._until[key] = now + delay

    def mismatches(self, key: FileKey) -> int:
        """Digest mismatches in a row."""
        return self._mismatches.get(key, 0)

    def refusal(
        self, key: FileKey, path: str, now: float, hint: str = ""
    ) -> DigestMismatch | OriginIncompatible | None:
        """The error for a demand made now; None if the file may be fetched. ``hint``: further advice for its
        message."""
        refused = self._refused.get(key)
        if refused is not None:
            return refused
        if self._until.get(key, 0.0) <= now:
            return None
        return DigestMismatch(
            f"{path}: the origin's bytes did not match the manifest {self.mismatches(key)} times in a row; "
            f"`warm` tries again, `update` pins what is there now{hint}"
        )

    def __len__(self) -> int:
        return len(self._mismatches)

    def proven(self, key: FileKey) -> None:
        """Note that the digest matched."""
        self._mismatches.pop(key, None)
        self._until.pop(key, None)

    def reset_failures(self, pipeline: str) -> None:
        """Let the pipeline's files be fetched at once."""
        for key in [key for key in (*self._until, *self._mismatches) if key.pipeline == pipeline]:
            self.proven(key)
        self.forget_refusals(pipeline)

    def forget_refusals(self, pipeline: str) -> None:
        """Forget the incompatible servers of the pipeline's files."""
        for key in [key for key in self._refused if key.pipeline == pipeline]:
            del self._refused[key]


def etag_hint(file: ManifestFile) -> str:
    """Advice for messages about a file whose version is pinned by its ETag alone; "" for others."""
    return ETAG_HINT if rests_on_etag(file) else ""
