"""Reads and writes what a slot says of itself: pipeline.json, manifest.json and learned.json, through the store's tree.
It knows nothing about the pipelines' files.
"""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec

from instantstart_fs.core.learned import Learned
from instantstart_fs.core.manifest import Manifest, PipelineSpec
from instantstart_fs.core.names import validate_pipeline_id
from instantstart_fs.errors import NoSuchEntry, StoreDamaged, StoreUnsupported
from instantstart_fs.store import manifest_json
from instantstart_fs.store.layout import FORMAT, LEARNED_FILE, MANIFEST_FILE, PIPELINE_FILE, generation_number
from instantstart_fs.store.os_errors import translated
from instantstart_fs.store.tree import StoreTree, shown

T = TypeVar("T")

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
"""The exceptions of decoding JSON; the second one is for bytes that are not UTF-8."""


class _PipelineFile(msgspec.Struct, frozen=True):
    """pipeline.json"""

    format: int
    created_at_ns: int
    pipeline: PipelineSpec


class _LearnedFile(msgspec.Struct, frozen=True):
    """learned.json"""

    format: int
    learned: Learned


class _ManifestFile(msgspec.Struct, frozen=True):
    """manifest.json"""

    format: int
    manifest: Manifest


class _Format(msgspec.Struct, frozen=True):
    format: int


class SlotMetadata:
    """The slots' own files. Thread-safe."""

    def __init__(self, tree: StoreTree) -> None:
        self._tree = tree

    def write_pipeline(self, spec: PipelineSpec, *, created_at_ns: int | None = None) -> None:
        """Store ``spec``, atomically and durably. ``created_at_ns``: None keeps the stored time, or takes the
        present."""
        validate_pipeline_id(spec.id)
        if created_at_ns is None:
            try:
                created_at_ns = self.pipeline_created_at(spec.id)
            except (NoSuchEntry, StoreDamaged):
                created_at_ns = time.time_ns()
        self._tree.write((spec.id,), PIPELINE_FILE, msgspec.json.encode(_PipelineFile(FORMAT, created_at_ns, spec)))

    def write_learned(self, pipeline: str, learned: Learned) -> None:
        """Store what was learned about a pipeline, atomically and durably."""
        validate_pipeline_id(pipeline)
        self._tree.write((pipeline,), LEARNED_FILE, msgspec.json.encode(_LearnedFile(FORMAT, learned)))

    def load_learned(self, pipeline: str) -> Learned:
        """Load what was learned; empty if there is none or it cannot be read, since it is learned again."""
        validate_pipeline_id(pipeline)
        try:
            return _decode(
                self._tree.read((pipeline,), LEARNED_FILE), _LearnedFile, f"{pipeline}/{LEARNED_FILE}"
            ).learned
        except (NoSuchEntry, StoreDamaged, StoreUnsupported):
            return Learned()

    def write_manifest(self, manifest: Manifest) -> None:
        """Store ``manifest`` under its pipeline and generation, atomically and durably. The caller has validated its
        names.
        """
        validate_pipeline_id(manifest.pipeline)
        directory = (manifest.pipeline, str(manifest.generation))
        frame = msgspec.json.encode(_ManifestFile(FORMAT, msgspec.structs.replace(manifest, models=())))
        self._tree.write(directory, MANIFEST_FILE, manifest_json.encode(frame, manifest.models))

    def load_manifest(self, pipeline: str, generation: int) -> Manifest:
        """Load a manifest. Raises NoSuchEntry, or StoreDamaged if it cannot be read or is another generation's."""
        validate_pipeline_id(pipeline)
        left, out = manifest_json.cut(self._tree.read((pipeline, str(generation)), MANIFEST_FILE))
        where = f"{pipeline}/{generation}/{MANIFEST_FILE}"
        manifest = _decode(left, _ManifestFile, where).manifest
        try:
            manifest = manifest_json.put_back(manifest, out)
        except _UNREADABLE as error:
            raise StoreDamaged(f"{where} cannot be read: {error}") from error
        if (manifest.pipeline, manifest.generation) != (pipeline, generation):
            raise StoreDamaged(
                f"{pipeline}/{generation}/{MANIFEST_FILE} is that of {manifest.pipeline}/{manifest.generation}"
            )
        return manifest

    def load_pipeline(self, pipeline: str) -> PipelineSpec:
        """Load a specification. Raises NoSuchEntry, or StoreDamaged if it cannot be read or is another pipeline's."""
        return self._load_pipeline(pipeline).pipeline

    def pipeline_created_at(self, pipeline: str) -> int:
        """Return when the pipeline was added: wall clock, ns. Raises what ``load_pipeline`` raises."""
        return self._load_pipeline(pipeline).created_at_ns

    def _load_pipeline(self, pipeline: str) -> _PipelineFile:
        validate_pipeline_id(pipeline)
        stored = _decode(self._tree.read((pipeline,), PIPELINE_FILE), _PipelineFile, f"{pipeline}/{PIPELINE_FILE}")
        if stored.pipeline.id != pipeline:
            raise StoreDamaged(f"{pipeline}/{PIPELINE_FILE} is that of {stored.pipeline.id}")
        return stored

    def pipelines(self) -> list[str]:
        """The ids that have a pipeline.json, sorted."""
        return [name for name in self._tree.list_directory() if self.has_pipeline(name)]

    def has_pipeline(self, name: str) -> bool:
        """Whether this entry of slots/ is a slot, that is, has a pipeline.json."""
        return PIPELINE_FILE in self._tree.list_directory(name)

    def generations(self, pipeline: str) -> list[int]:
        """The generations of ``pipeline`` that have a manifest, ascending."""
        validate_pipeline_id(pipeline)
        numbers = (generation_number(name) for name in self._tree.list_directory(pipeline))
        found = (number for number in numbers if number is not None)
        return sorted(number for number in found if MANIFEST_FILE in self._tree.list_directory(pipeline, str(number)))

    def restore_slot(self, spec: PipelineSpec, created_at_ns: int, manifest: Manifest) -> bool:
        """Write pipeline.json and manifest.json again where they were removed or replaced; whether any was. Raises
        StoreError."""
        written = False
        for directory, name in (((spec.id,), PIPELINE_FILE), ((spec.id, str(manifest.generation)), MANIFEST_FILE)):
            if self._tree.is_file(directory, name):
                continue
            with translated(f"clear {shown((*directory, name))}"):
                self._tree.delete_obstacle(directory)
            self._tree.delete((*directory, name))
            if name == PIPELINE_FILE:
                self.write_pipeline(spec, created_at_ns=created_at_ns)
            else:
                self.write_manifest(manifest)
            written = True
        return written


def _decode(raw: bytes, kind: type[T], where: str) -> T:
    try:
        version = msgspec.json.decode(raw, type=_Format).format
        if version > FORMAT:
            raise StoreUnsupported(
                f"{where} has format {version}, this version reads up to {FORMAT}: it was written by a newer version"
            )
        return msgspec.json.decode(raw, type=kind)
    except _UNREADABLE as error:
        raise StoreDamaged(f"{where} cannot be read: {error}") from error
