"""Describes a pipeline's weights to the prefetch helper. Pure values, part of the control protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.loadset import LoadSet, sort_files
from instantstart_fs.core.manifest import FileEntry, Manifest

_SHARDED_STATE = late(r"model-rank-(\d{1,5})-part-(\d{1,7})\.safetensors")


class WeightFile(msgspec.Struct, frozen=True):
    """``path`` within the pipeline; ``model``: its name ("" = unnamed); ``size`` in bytes; ``digest``: what proves it,
    as the mount shows it, None where the origin offers nothing."""

    path: str
    model: str
    size: int
    digest: str | None = None

    @property
    def is_safetensors(self) -> bool:
        return self.path.endswith(".safetensors")

    @property
    def rank(self) -> int | None:
        """The tensor-parallel rank that this file belongs to; None where every rank needs a part of it."""
        match = _SHARDED_STATE.fullmatch(self.path.rpartition("/")[2])
        return int(match[1]) if match else None


class WeightSet(msgspec.Struct, frozen=True):
    """The weight files of a generation's load set, in load order."""

    pipeline: str
    generation: int
    files: tuple[WeightFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names in load order."""
        return tuple(dict.fromkeys(file.model for file in self.files))


def weight_entries(files: Sequence[FileEntry], known: LoadSet) -> tuple[FileEntry, ...]:
    """The weight files that an engine loads, in load order."""
    return tuple(files[index] for index in known.order if index in known.weights)


def weight_set(manifest: Manifest, known: LoadSet | None = None) -> WeightSet:
    """Return the weight files of a manifest. ``known``: the generation's load set; without it, names and sizes
    decide."""
    entries = weight_entries(manifest.files, known or sort_files(manifest.files))
    return WeightSet(manifest.pipeline, manifest.generation, _described(manifest, entries))


def schedule(weights: WeightSet, deadlines: Mapping[str, float]) -> list[str]:
    """The models in the order that they are wanted in: earliest deadline first (seconds; a model without one comes
    last), and then the smaller one, which is ready sooner and delays the others least."""
    sizes = dict.fromkeys(weights.models, 0)
    for file in weights.files:
        sizes[file.model] += file.size
    return sorted(sizes, key=lambda model: (deadlines.get(model, float("inf")), sizes[model], model))


def scheduled(weights: WeightSet, deadlines: Mapping[str, float]) -> list[WeightFile]:
    """Return all files, model by model as in ``schedule``, each model's in load order."""
    place = {model: position for position, model in enumerate(schedule(weights, deadlines))}
    return sorted(weights.files, key=lambda file: place[file.model])


def _described(manifest: Manifest, entries: Iterable[FileEntry]) -> tuple[WeightFile, ...]:
    return tuple(_described_one(manifest, entry) for entry in entries)


def _described_one(manifest: Manifest, entry: FileEntry) -> WeightFile:
    digest = entry.file.digest
    return WeightFile(
        entry.path, manifest.models[entry.model].name, entry.file.size, None if digest is None else str(digest)
    )


def may_read(uid: int, groups: Iterable[int], *, owner: int, group: int, mode: int) -> bool:
    """Whether the kernel would let this user read files below a directory of that owner and mode (rwx bits; files have
    the same without x), as open(2) decides: the first class that matches counts, and root may."""
    if uid == 0:
        return True
    if uid == owner:
        bits = mode >> 6
    elif group in frozenset(groups):
        bits = mode >> 3
    else:
        bits = mode
    return bits & 0o5 == 0o5
