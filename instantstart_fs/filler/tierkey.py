"""The key of a file's second entry in the fill plan: in the pool of the regional tier."""

from __future__ import annotations

from instantstart_fs.filler.target import FileKey


class TierKey(FileKey, frozen=True):
    """A file's entry in the tier's pool."""

    @property
    def file(self) -> FileKey:
        return FileKey(self.pipeline, self.generation, self.index)


def file_key(key: FileKey) -> FileKey:
    """The file of either entry."""
    return key.file if isinstance(key, TierKey) else key
