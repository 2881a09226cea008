"""The manifest: which files a pipeline consists of, their sizes, digests and where to fetch them, pinned at resolve.
Values only.

A Manifest is made once, when a generation is resolved, and never changes. File indices are positions in
``Manifest.files`` and are stable for the life of the generation: presence bitmaps, nodeids and index records use them.

What there is one of for each file is hidden from the garbage collector (``gc=False``; it can be no part of a cycle):
walks over a hundred thousand of them would stop everybody for a tenth of a second.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

Algorithm = Literal["sha256", "sha1", "md5", "crc32", "crc32c", "crc64nvme", "git-sha1"]


class Digest(msgspec.Struct, frozen=True, gc=False):
    """A digest that proves a file. ``value`` is lowercase hex.

    ``git-sha1`` is the sha1 of ``b"blob <size>\\0"`` and the bytes. ``part_size`` > 0 means a composite, as S3 makes
    for multipart uploads: the digest of the concatenated raw digests of consecutive parts of ``part_size`` bytes (the
    last may be shorter).
    """

    algorithm: Algorithm
    value: str
    part_size: int = 0

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}" + (f":parts-of-{self.part_size}" if self.part_size else "")


class ManifestFile(msgspec.Struct, frozen=True, gc=False):
    """One file of a model. ``path`` is relative to the model; ``size`` in bytes; ``mtime_ns`` the origin's time.

    ``address`` and ``version`` mean something to the origin alone: where to fetch it, and which object it must be
    (an S3 ETag or VersionId, say). ``digest`` is None where the origin offers nothing to prove the bytes by.
    """

    path: str
    size: int
    address: str
    version: str = ""
    digest: Digest | None = None
    mtime_ns: int = 0


def rests_on_etag(file: ManifestFile) -> bool:
    """Whether the digest is the origin's ETag taken for an MD5, which some engines' ETags only look like."""
    digest = file.digest
    return digest is not None and digest.algorithm == "md5" and f'etag="{digest.value}' in file.version


ETAG_HINT = (
    "; this digest is the origin's ETag: if that is no MD5 there, set etags_are_md5 = false in [origins.s3], "
    "then `update`"
)
"""The addition to a message that bytes do not match a digest that ``rests_on_etag``."""


_CHECKSUMS = frozenset({"crc32", "crc32c", "crc64nvme"})
"""They find accidents. That two objects with one checksum are the same, they do not say."""


def same_bytes(old: ManifestFile, new: ManifestFile) -> bool:
    """Whether a complete file of ``old`` is one of ``new`` as well: the same proof holds for both or, where there is
    none or only a checksum, the origin says that it is the very same object."""
    if (old.size, old.digest) != (new.size, new.digest):
        return False
    if new.digest is not None and new.digest.algorithm not in _CHECKSUMS:
        return True
    return bool(new.version) and (old.address, old.version) == (new.address, new.version)


class Skipped(msgspec.Struct, frozen=True):
    """Files of the source that cannot be shown: ``count`` of them, the ``first`` as "name: reason"."""

    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return "; ".join(self.first) + (f"; and {more} more" if more > 0 else "")


class ModelManifest(msgspec.Struct, frozen=True):
    """One model: ``name`` ("" = the pipeline's root), ``source`` as the user wrote it, ``revision`` as it was pinned.

    ``files`` is sorted by path and already filtered by the model's include/exclude globs. ``skipped``: what the globs
    chose and no filesystem can show; None: nothing.
    """

    name: str
    source: str
    revision: str
    files: tuple[ManifestFile, ...]
    skipped: Skipped | None = None


class FileEntry(msgspec.Struct, frozen=True, gc=False):
    """A file in its pipeline: ``index`` in the manifest, ``model`` (position), ``path`` within the pipeline."""

    index: int
    model: int
    path: str
    file: ManifestFile


class Manifest(msgspec.Struct, frozen=True, dict=True):
    """All models of one generation of one pipeline. ``chunk_size`` in bytes, fixed for the generation's life."""

    pipeline: str
    generation: int
    chunk_size: int
    models: tuple[ModelManifest, ...]
    resolved_at_ns: int

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of every model, in model order then path order; the position is the file's index. Computed
        once."""
        cached: tuple[FileEntry, ...] | None = self.__dict__.get("_files")
        if cached is None:
            entries: list[FileEntry] = []
            for position, model in enumerate(self.models):
                prefix = f"{model.name}/" if model.name else ""
                for file in model.files:
                    entries.append(FileEntry(len(entries), position, prefix + file.path, file))
            cached = tuple(entries)
            self.__dict__["_files"] = cached
        return cached

    @property
    def total_bytes(self) -> int:
        return sum(file.size for model in self.models for file in model.files)


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as the user asked for it: a source and globs (fnmatch over the path within the model)."""

    source: str
    name: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether any glob matches, in huggingface_hub's way: fnmatch over the whole path, so that ``*`` crosses ``/``;
    a glob that ends with ``/`` means everything below it."""
    return any(fnmatch.fnmatchcase(path, _whole(glob)) for glob in globs)


def matcher(glob: str) -> Callable[[str], object]:
    """``matches`` of one glob, prepared for many paths."""
    return re.compile(fnmatch.translate(_whole(glob))).match


def _whole(glob: str) -> str:
    return glob + "*" if glob.endswith("/") else glob


class PipelineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A pipeline as configured. Holds where credentials lie, never the credentials themselves.

    ``mode`` is the mode of its directories (files have it without the x bits); uid/gid own what the mount shows.
    ``quota``: bytes of disk that its files may take, None = as many as there are. ``anonymous``: its sources are
    asked without credentials, though the machine has some; ``requester_pays``: who asks S3 pays for it.
    """

    id: str
    models: tuple[ModelSpec, ...]
    uid: int = 0
    gid: int = 0
    mode: int = 0o555
    token_file: str | None = None
    aws_profile: str | None = None
    endpoint_url: str | None = None
    pinned: bool = False
    quota: int | None = None
    anonymous: bool = False
    requester_pays: bool = False
