"""A generation's load set as it looks from outside: what is left out and why, which variants there are, what was
learned. Decides nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.manifest import FileEntry, matcher
from instantstart_fs.core.status import VariantStatus
from instantstart_fs.errors import UsageError

if TYPE_CHECKING:
    from instantstart_fs.core.twins import Choice

MOST_EXPLAINED = 10_000
"""Up to so many files, each file is explained. In a larger generation only weight files are, since an answer has a
bound."""


class Explained:
    """Tells of each file of a generation why it is in the load set, or not."""

    def __init__(self, generation: Generation) -> None:
        files, learned = generation.manifest.files, generation.pipeline.learned
        self._known = generation.known
        self._all = len(files) <= MOST_EXPLAINED
        self._learned = frozenset(learned.wanted)
        weights = (files[index].path for index in self._known.order if index in self._known.weights)
        self._untouched = frozenset(learned.untouched(weights))

    def left_out(self, entry: FileEntry) -> str | None:
        reason = self._known.left_out.get(entry.index)
        return reason if self._all or entry.index in self._known.weights else None

    def learned(self, entry: FileEntry) -> bool:
        return entry.path in self._learned

    def untouched(self, entry: FileEntry) -> bool:
        return entry.path in self._untouched


def variants(generation: Generation) -> tuple[VariantStatus, ...] | None:
    """Return all variants, chosen or not; None if there are none."""
    return tuple(_variants(generation.known.choices)) or None


def _variants(choices: Iterable[Choice]) -> Iterable[VariantStatus]:
    for choice in choices:
        for at, variant in enumerate(choice.variants):
            label = variant.label or variant.paths[0].rpartition("/")[2]
            yield VariantStatus(choice.kind, label, choice.glob(at), variant.size, at in choice.chosen)


def included(pipeline: str, files: Sequence[FileEntry], globs: Sequence[str]) -> list[int]:
    """Return the indices of a manifest's files that match any of the globs, by their path within the model, as `add`
    does. Raises UsageError for a glob that matches nothing. Slow for many files: call it in a thread."""
    found: set[int] = set()
    for glob in globs:
        wanted = matcher(glob)
        matching = [index for index, entry in enumerate(files) if wanted(entry.file.path)]
        if not matching:
            raise UsageError(f"--include {glob!r}: no file of {pipeline} matches")
        found.update(matching)
    return sorted(found)


def question(generation: Generation) -> str:
    """Return the sentence that asks the user to choose a variant, and how to do so."""
    first = generation.known.open[0]
    # One model at a time, and one part of it.
    offered = list(_variants(choice for choice in generation.known.open if choice.model == first.model))
    model = generation.manifest.models[first.model].name
    of_model = f" of its model {model}" if model else ""
    named = ", ".join(variant.label for variant in offered)
    kind, example, name = offered[0].kind, offered[len(offered) // 2].include, generation.pipeline.id
    return (
        f"{name}: {len(offered)} {kind} variants{of_model}, of which an engine loads one, and none is chosen: "
        f"`instantstart warm {name} --include '{example}'` takes that one, `--all` takes every file; there are {named}"
    )
