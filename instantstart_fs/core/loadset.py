"""The load set: which files an engine loads, and in which order. Pure: it looks at names and sizes, never at contents.
A repository with safetensors, PyTorch and ONNX weights must not cost all of them; a pipeline that is called warm must
have every file that its engine opens.

What one file is for says core/roles.py; which of several with the same weights is kept, core/twins.py. An
uncertain file is fetched: a byte too much costs seconds, a byte too few an outage.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.manifest import FileEntry
from instantstart_fs.core.roles import Role, role_of

if TYPE_CHECKING:
    from instantstart_fs.core.twins import Choice, Weights

RULES = 2
"""Version of the rules of this module and those it uses. Raise it with every change of what they say: summaries of
generations, which hold counts of the load set, are then made anew."""

READAHEAD_ALLOWANCE = 1024 * 1024
"""The kernel reads ahead up to this much (the bdi's read_ahead_kb that the mount sets), so a READ below it may be
nobody's wish beyond the header."""


class LoadSet(msgspec.Struct, frozen=True):
    """The load set of a generation, by indices in the manifest.

    ``order``: those that an engine loads, in load order. ``weights``: whose open is a request, also outside the load
    set. ``left_out``: the others, and why. ``choices``: between variants. ``open``: those of them that somebody has to
    make before an engine could start.
    """

    order: tuple[int, ...]
    weights: frozenset[int]
    left_out: dict[int, str]
    choices: tuple[Choice, ...]
    open: tuple[Choice, ...]
    useless: int = 0
    """How many of ``left_out`` hold no weights: nothing that an engine could load."""

    @property
    def undecided(self) -> int:
        """Number of variants to choose from; 0: there is nothing to choose."""
        return sum(len(choice.variants) for choice in self.open)


class Hints(msgspec.Struct, frozen=True):
    """Knowledge beside the names. ``include``: model (its position) → the globs that it was added with. ``wanted``:
    paths within the pipeline that belong to the load set whatever the rules say. ``order``: of weight files, as an
    engine was seen to open them."""

    include: Mapping[int, Sequence[str]] = {}
    wanted: Collection[str] = ()
    order: Sequence[str] = ()


_NO_HINTS = Hints()


def sort_files(files: Sequence[FileEntry], hints: Hints = _NO_HINTS) -> LoadSet:
    """Model by model; within one, configuration and tokenizer first (small, and read first), then the weights in
    the order in which an engine was seen to open them, else in natural order.

    Where this finds no weights (a repository of unknown formats), every file counts.
    """
    by_model: dict[int, list[FileEntry]] = {}
    for entry in files:
        by_model.setdefault(entry.model, []).append(entry)
    order: list[int] = []
    weights: set[int] = set()
    left_out: dict[int, str] = {}
    choices: list[Choice] = []
    open_ones: list[Choice] = []
    for model in sorted(by_model):
        entries = by_model[model]
        found = _Model(entries, hints.include.get(model, ()), frozenset(hints.wanted))
        order += [entry.index for entry in found.in_order()]
        weights |= found.weights
        left_out.update(found.left_out)
        choices += found.choices
        open_ones += found.open
    useless = len(left_out.keys() - weights)
    known = LoadSet(tuple(order), frozenset(weights), left_out, tuple(choices), tuple(open_ones), useless)
    return in_seen_order(known, files, hints.order)


def in_seen_order(known: LoadSet, files: Sequence[FileEntry], order: Sequence[str]) -> LoadSet:
    """A copy whose weight files come in this order of paths. Those that it does not name, and all other files, keep
    their places."""
    rank = {path: at for at, path in enumerate(order)}
    places = [at for at, index in enumerate(known.order) if index in known.weights and files[index].path in rank]
    if not places:
        return known
    found = list(known.order)
    for at, index in zip(places, sorted((found[at] for at in places), key=lambda i: rank[files[i].path]), strict=True):
        found[at] = index
    return msgspec.structs.replace(known, order=tuple(found))


def with_wanted(known: LoadSet, indices: Collection[int]) -> LoadSet:
    """A copy with these files (all of a variant's, where one belongs to it) at the end of its order. Other files stay
    left out: ``sort_files`` with these files in its hints gives the same result."""
    more = dict.fromkeys(index for index in indices)
    choices = []
    for choice in known.choices:
        newly = [at for at, variant in enumerate(choice.variants) if not more.keys().isdisjoint(variant.files)]
        for at in newly:
            more.update(dict.fromkeys(choice.variants[at].files))
        choices.append(choice._replace(chosen=tuple(sorted({*choice.chosen, *newly}))) if newly else choice)
    inside = frozenset(known.order)
    left_out = {index: reason for index, reason in known.left_out.items() if index not in more}
    return LoadSet(
        order=known.order + tuple(index for index in more if index not in inside),
        weights=known.weights,
        left_out=left_out,
        choices=tuple(choices),
        open=tuple(_open(choices)),
        useless=len(left_out.keys() - known.weights),
    )


def _open(choices: Iterable[Choice]) -> list[Choice]:
    """The variants that are still to be chosen: once one of a model is chosen, its others are not offered, but those of
    its other parts are."""
    choices = list(choices)
    begun = {(choice.model, choice.kind, choice.whole) for choice in choices if choice.chosen and choice.whole}
    decided = {(choice.model, choice.kind) for choice in choices if choice.chosen}
    return [
        choice
        for choice in choices
        if not (choice.optional or choice.chosen)
        and ((choice.model, choice.kind) not in decided or (choice.model, choice.kind, choice.whole) in begun)
    ]


def load_set(files: Sequence[FileEntry]) -> tuple[int, ...]:
    """The indices of the files that an engine loads, in load order, as far as names and sizes tell."""
    return sort_files(files).order


class _Model:
    """One model's files, sorted."""

    def __init__(self, entries: Sequence[FileEntry], include: Sequence[str], wanted: Collection[str]) -> None:
        from instantstart_fs.core.twins import Weights, sort_out  # late: a start reads summaries, and sorts no files

        self._entries = entries
        self.weights: set[int] = set()
        self.left_out: dict[int, str] = {}
        unknown: list[int] = []
        names: dict[str, list[str]] = {}
        found: list[Weights] = []
        for entry in entries:
            file = entry.file
            if _of_git(file.path):
                self.left_out[entry.index] = "git's own"
                continue
            role = role_of(file.path, file.size)
            if role is Role.WEIGHTS:
                found.append(Weights(entry.index, file.path, file.size))
                continue
            if role is Role.UNKNOWN:
                unknown.append(entry.index)
            elif role is not Role.CONFIG:
                self.left_out[entry.index] = role.value
            directory, _, name = file.path.rpartition("/")
            names.setdefault(directory, []).append(name)
        for entry in entries:
            directory, _, name = entry.file.path.rpartition("/")
            if name == "README.md" and "modules.json" in names.get(directory, ()):
                self.left_out.pop(entry.index, None)  # sentence-transformers reads it
        self.choices: tuple[Choice, ...] = ()
        self.open: list[Choice] = []
        self.weights.update(file.index for file in found)
        if not found:
            # What it is made of is not known here: all of it, then.
            self.left_out = {index: why for index, why in self.left_out.items() if why == "git's own"}
            self.weights.update(unknown)
            return
        kept = {entry.index for entry in entries if entry.path in wanted} if wanted else frozenset()
        twins = sort_out(found, names, include, kept)
        self.left_out.update(twins.left_out)
        self._leave_out_companions()
        for index in kept:
            self.left_out.pop(index, None)
        self.choices = tuple(choice._replace(model=entries[0].model) for choice in twins.choices)
        self.open = _open(self.choices)

    def _leave_out_companions(self) -> None:
        """``pytorch_model.bin.index.json`` and ``openvino_model.xml`` go with the weights that they describe."""
        if not self.left_out.keys() & self.weights:
            return
        reasons: dict[str, str | None] = {}
        for entry in self._entries:
            if entry.index in self.weights:
                described = _described(entry.file.path)
                reason = self.left_out.get(entry.index)
                # One of the weights that is kept keeps it.
                reasons[described] = reason if described not in reasons or reasons[described] else reasons[described]
        for entry in self._entries:
            path = entry.file.path
            if path.endswith((".index.json", ".xml")):
                reason = reasons.get(path.removesuffix(".index.json").removesuffix(".xml"))
                if reason is not None:
                    self.left_out[entry.index] = reason

    def in_order(self) -> list[FileEntry]:
        chosen = [entry for entry in self._entries if entry.index not in self.left_out]
        chosen.sort(key=lambda entry: f"{entry.index in self.weights:d}{natural_key(entry.file.path)}")
        return chosen


_SHARD_NUMBER = late(r"[-_.]\d{1,6}-of-\d{1,6}")


def _described(path: str) -> str:
    """The name, without suffix, that an index or graph beside these weights has: ``pytorch_model.bin`` for its shards,
    ``openvino_model`` for ``openvino_model.bin``."""
    if path.rpartition("/")[2].startswith("openvino_"):
        return path.removesuffix(".bin")
    return _SHARD_NUMBER.sub("", path)


def _of_git(path: str) -> bool:
    return ".git/" in path or ".cache/huggingface/" in path


def natural_key(path: str) -> str:
    """Return a key that sorts ``shard-2`` before ``shard-10``, as vLLM and transformers do. It is a string: a hundred
    thousand tuples of parts would keep the garbage collector busy."""
    return _NUMBER.sub(_with_length, path)


_NUMBER = late(r"\d+")


def _with_length(number: re.Match[str]) -> str:
    """Longer numbers sort after shorter ones, and all of them before text, which has no NUL."""
    digits = str(int(number[0]))
    return f"\0{len(digits):03}{digits}"


def fill_threshold(size: int, header: int | None, *, weights: bool) -> int:
    """The offset in bytes at which a READ of a file of ``size`` bytes means that its weights are wanted, not only its
    header.

    ``header``: the length of a safetensors header (with its 8-byte length field) where it is known. A READ that starts
    below the threshold starts no fill of the load set. For a file that holds no weights that is every READ.
    """
    if not weights:
        return size
    return min(max(header or 0, READAHEAD_ALLOWANCE), max(size // 2, 1))


def safetensors_header_length(prefix: bytes) -> int | None:
    """The length of the header that begins with these ≥ 8 bytes; None where that cannot be one (over 100 MB, as the
    safetensors format itself limits it)."""
    if len(prefix) < 8:
        return None
    length = int.from_bytes(prefix[:8], "little")
    return 8 + length if 2 <= length <= 100_000_000 else None
