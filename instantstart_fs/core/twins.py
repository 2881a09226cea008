"""Finds files that carry the same weights as others beside them: which are kept, which are left out, and which a user
has to choose between. Pure; one model at a time.

Left out is only what is a *twin* of something that is kept: in the same directory, of the same stem after the renamings
that libraries make, in a format that loaders take second; or a whole copy for another runtime, in a directory that is
called after it. Quantisations of one model in single files are *variants*: an engine reads one of them.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.manifest import matches
from instantstart_fs.core.roles import GGML, SAFETENSORS, TORCH, suffix_of

MOST_TIMES = 8
"""Two files that merely have one stem are twins only while neither is so many times larger than the other."""
FEWEST_WITH_DEFAULT = 3
"""ONNX files of one stem: an export and its one quantisation are both kept, more are variants."""


class Weights(msgspec.Struct, frozen=True, gc=False):
    """A weight file: ``index`` in the manifest, ``path`` within the model, ``size`` in bytes."""

    index: int
    path: str
    size: int


class Variant(NamedTuple):
    """One of several quantisations. ``label``: the words that tell it from the others ("Q4_K_M"); ``files``: its parts,
    ``paths``: theirs within the model."""

    label: str
    files: tuple[int, ...]
    paths: tuple[str, ...]
    size: int


class Choice(NamedTuple):
    """``variants`` in one format ("GGUF", "ONNX"), of which an engine reads one. ``chosen``: positions of those that
    are kept; none where nobody has said. ``model``: its position in the pipeline. ``optional``: the model is there in
    another format, too, so nobody has to choose. ``whole``: of a model in several parts (two experts, an encoder and a
    decoder) what is common to their names: a choice in one is none in the others."""

    kind: str
    variants: tuple[Variant, ...]
    chosen: tuple[int, ...]
    model: int = 0
    optional: bool = False
    whole: str = ""

    def glob(self, position: int) -> str:
        """A short glob that matches all files of that variant and of no other."""
        variant = self.variants[position]
        others = [path for at, other in enumerate(self.variants) if at != position for path in other.paths]
        prefix = os.path.commonprefix(variant.paths)  # noqa: RUF071  (a glob may begin in the middle of a name)
        for found in (f"*{variant.label}*", f"*{variant.label}.*", f"*{variant.label}-0*", f"{prefix}*"):
            if (
                variant.label
                and _matches_all(found, variant.paths)
                and not any(matches(path, (found,)) for path in others)
            ):
                return found
        return prefix if len(variant.paths) == 1 else f"{prefix}*"


def _matches_all(glob: str, paths: Iterable[str]) -> bool:
    return all(matches(path, (glob,)) for path in paths)


class Sorted(NamedTuple):
    """The result. ``left_out``: index → why. ``choices``: those that are open, and those that were made."""

    left_out: dict[int, str]
    choices: tuple[Choice, ...]


# -- names -------------------------------------------------------------------------------------------------------------

_RENAMED = {
    "pytorch_model": "model",
    "tf_model": "model",
    "flax_model": "model",
    "rust_model": "model",
    "diffusion_flax_model": "diffusion_pytorch_model",
}
_LIBRARY_STEMS = frozenset({"model", "diffusion_pytorch_model", "adapter_model"})
"""Libraries look for these names and take the first format that is there."""
_SHARD = late(r"\A(?P<stem>.*?)[-_.](?P<part>\d{1,6})-of-(?P<parts>\d{1,6})(?P<rest>.*)\Z")
_CONSOLIDATED = late(r"consolidated[-.]\d+\Z")
_SECOND = frozenset({".h5", ".msgpack", ".ot"})
"""TensorFlow's, Flax's and rust-bert's names of a library's model."""
_RUNTIME = late(
    r"(?P<name>onnx|openvino|coreml|tflite|flax|tensorflow|tf|jax|metal|mlx|original|rust)([-_.].*)?", re.IGNORECASE
)
_APPLE = late(r"\.ml(package|modelc)/")
_FEWER_BITS = late(r"(b?fp?|int)\d+", re.IGNORECASE)
"""A variant that engines are told to load ("fp16"), and no state of training ("non_ema")."""
_CHECKPOINT = late(r"(checkpoint-|global_step)\d+\Z")


class _Name(NamedTuple):
    """``stem`` after the renamings; ``variant``: "fp16" in ``model.fp16.safetensors``; ``parts``: how many shards."""

    stem: str
    variant: str
    suffix: str
    parts: int
    standard: bool
    """Whether it is called as a library calls it, so that its twin is known by the name alone."""


def _parse(name: str) -> _Name:
    suffix = suffix_of(name)
    stem = name[: len(name) - len(suffix)]
    parts = 1
    shard = _SHARD.match(stem)
    if shard is not None:
        stem, parts = shard["stem"] + shard["rest"], int(shard["parts"])
    elif _CONSOLIDATED.match(stem):
        stem = "consolidated"
    original = stem
    stem = _RENAMED.get(stem, stem)
    variant = ""
    if stem not in _LIBRARY_STEMS and "." in stem:
        head, _, tail = stem.partition(".")
        renamed = _RENAMED.get(head, head)
        if renamed in _LIBRARY_STEMS:
            original, stem, variant = head, renamed, tail
    standard = stem == "consolidated" or (stem in _LIBRARY_STEMS and (original in _RENAMED or stem != "model"))
    return _Name(stem, variant, suffix, parts, standard)


class _Group:
    """The files of one directory, stem, variant and format."""

    __slots__ = ("files", "name")

    def __init__(self, name: _Name) -> None:
        self.name = name
        self.files: list[Weights] = []

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def whole(self) -> bool:
        """Whether no shard is missing."""
        return len(self.files) >= self.name.parts

    @property
    def shown(self) -> str:
        """A name that stands for it."""
        first = self.files[0].path.rpartition("/")[2]
        return first if len(self.files) == 1 else f"{first} … ({len(self.files)} files)"


class _Directory:
    """``groups``: (stem, variant, suffix) → the files, of one number of shards each."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str, str], list[_Group]] = {}

    def add(self, name: _Name, file: Weights) -> None:
        groups = self.groups.setdefault((name.stem, name.variant, name.suffix), [])
        for group in groups:
            if (group.name.parts, group.name.standard) == (name.parts, name.standard):
                break
        else:
            group = _Group(name)
            groups.append(group)
        group.files.append(file)

    def files(self) -> Iterator[Weights]:
        for groups in self.groups.values():
            for group in groups:
                yield from group.files

    def whole(self, stem: str, variant: str, suffixes: Iterable[str]) -> _Group | None:
        """Return a group that has all its shards. If others use the format too, it must be named as a library names
        it."""
        for suffix in suffixes:
            for group in self.groups.get((stem, variant, suffix), ()):
                if group.whole and (suffix in SAFETENSORS or group.name.standard):
                    return group
        return None

    def model(self) -> _Group | None:
        """The file that a library would load from here."""
        for stem in ("model", "diffusion_pytorch_model", "consolidated"):
            found = self.whole(stem, "", (".safetensors", ".bin", ".pth"))
            if found is not None:
                return found
        return None


# -- sorting -----------------------------------------------------------------------------------------------------------


def sort_out(
    weights: Sequence[Weights], others: Mapping[str, Collection[str]], include: Sequence[str], wanted: Collection[int]
) -> Sorted:
    """``weights``: of one model. ``others``: directory → the names of its other files. ``include``: the globs that the
    model was added with. ``wanted``: indices that are kept whatever the rules say; one of a variant chooses it."""
    directories: dict[str, _Directory] = {}
    single: list[Weights] = []
    onnx: list[Weights] = []
    for file in weights:
        directory, _, name = file.path.rpartition("/")
        if _single_file_model(name):
            single.append(file)
            continue
        if ".onnx" in name:
            onnx.append(file)
        if directory not in directories:
            directories[directory] = _Directory()
        directories[directory].add(_parse(name), file)
    left_out: dict[int, str] = {}
    for directory, found in directories.items():
        pipeline = "model_index.json" in others.get(directory.rpartition("/")[0], ()) if directory else False
        _leave_out_twins(found, others.get(directory, ()), pipeline, left_out)
    for directory, found in directories.items():
        here, originals = found.model(), _originals(directory, directories)
        if here is None and not originals:
            continue
        for file in found.files():
            if file.index not in left_out:
                reason = _copy_of(file, file.path.rpartition("/")[2], here, originals)
                if reason is not None:
                    left_out[file.index] = reason
    choices = [
        *_gguf_choices(single, directories, include, wanted, left_out),
        *_onnx_choices([file for file in onnx if file.index not in left_out], include, wanted, left_out),
    ]
    return Sorted(left_out, tuple(choices))


def _leave_out_twins(here: _Directory, others: Collection[str], pipeline: bool, left_out: dict[int, str]) -> None:
    """Leave out the twins of one directory. ``pipeline``: the directory is a component of a diffusers pipeline."""
    for (stem, variant, suffix), groups in here.groups.items():
        first = here.whole(stem, "", SAFETENSORS)
        same = here.whole(stem, variant, SAFETENSORS) if variant else first
        torch = here.whole(stem, "", (".bin",))
        # vLLM reads every safetensors file that lies there, and the model cards of diffusers ask for variant="fp16".
        of_diffusers = pipeline or stem == "diffusion_pytorch_model"
        on_request = bool(variant) and first is not None and of_diffusers and not _FEWER_BITS.match(variant)
        for group in groups:
            reason = None
            if suffix in SAFETENSORS:
                if on_request and first is not None:
                    reason = f"{variant} variant of {first.shown}"
            elif suffix in TORCH:
                kept = first if on_request else same or first
                if stem == "consolidated":
                    kept = kept or here.whole("model", "", (".safetensors", ".bin"))
                    reason = f"twin of {kept.shown}" if kept is not None else None
                elif kept is not None and (group.name.standard or _alike(group, kept)):
                    reason = None if _is_ctranslate2(group, others) else f"twin of {kept.shown}"
            elif suffix in _SECOND and group.name.standard:
                kept = first or torch
                reason = f"twin of {kept.shown}" if kept is not None else None
            if reason is not None:
                left_out.update((file.index, reason) for file in group.files)


def _is_ctranslate2(group: _Group, others: Collection[str]) -> bool:
    """CTranslate2 calls its own format model.bin, and has its vocabulary beside it."""
    return group.files[0].path.rpartition("/")[2] == "model.bin" and any("vocabulary" in name for name in others)


def _alike(one: _Group, other: _Group) -> bool:
    return max(one.size, other.size) <= MOST_TIMES * max(min(one.size, other.size), 1)


class _Original(NamedTuple):
    """A candidate that the files of a directory may be copies of. ``label``: its name in a message."""

    model: _Group
    label: str


def _originals(directory: str, directories: Mapping[str, _Directory]) -> list[_Original]:
    """Possible originals of a directory that is named after a runtime or a training step."""
    found = []
    parts = directory.split("/") if directory else []
    for position, part in enumerate(parts):
        checkpoint, runtime = _CHECKPOINT.match(part), _RUNTIME.fullmatch(part)
        if checkpoint is None and runtime is None:
            continue
        for place in ("/".join(parts[:position]), "/".join(parts[:position] + parts[position + 1 :])):
            beside = directories.get(place)
            model = beside.model() if beside is not None else None
            if beside is not None and checkpoint is not None and model is None:
                model = beside.whole("adapter_model", "", (".safetensors", ".bin"))
            if model is not None:
                label = "training checkpoint beside {}" if checkpoint else "copy of {} in " + part + "/"
                found.append(_Original(model, label))
    apple = _APPLE.search(directory + "/")
    if apple is not None:
        above = directories.get(directory[: apple.start()].rpartition("/")[0])
        model = above.model() if above is not None else None
        if model is not None:
            found.append(_Original(model, "copy of {} for another runtime"))
    return found


def _copy_of(file: Weights, name: str, here: _Group | None, originals: Sequence[_Original]) -> str | None:
    """``here``: what a library would load from its own directory."""
    if ".onnx" in name and not _EXPORTED_PART.match(name):
        originals = ()  # a vocoder, say, that is there in no other format
    for original in originals:
        if file.size <= MOST_TIMES * max(original.model.size, 1):
            return original.label.format(original.model.shown)
    if here is not None and (name.startswith("openvino_model") or _stem_of_export(name) == "model"):
        return f"copy of {here.shown} for another runtime"
    return None


_EXPORTED_PART = late(
    r"(\w*model|\w*encoder|\w*decoder|embed_tokens|unet|transformer|vae|weights)([-_.].*)?\.onnx", re.IGNORECASE
)
"""Matches the names that exporters give a model and its parts."""
_EXPORTED = late(r"(?P<stem>.+?)\.(onnx([._-]data(_\d+)?)?|tflite|mlmodel(c\.zip)?)\Z")


def _stem_of_export(name: str) -> str | None:
    exported = _EXPORTED.match(name)
    return _without_tags(exported["stem"], _ONNX_TAG)[0] if exported is not None else None


# -- variants ----------------------------------------------------------------------------------------------------------

_GGUF_TAG = late(
    r"(ud|i1|imat|(iq|q|tq)\d\w*|[bf]?f\d{1,2}|b?fp?\d{1,2}|mxfp\d\w*|nvfp\d|moe|int\d|\dbits?|[ksmlxn]|xs|xxs|xl|nl|\d)"
    r"\Z",
    re.IGNORECASE,
)
"""A word of a name that says how a model was quantised. Single digits and letters count behind one that says so."""
_STARTS_TAG = late(
    r"(ud|i1|imat|(iq|q|tq)\d\w*|[bf]f?\d{2}|bf16|fp\d{1,2}|mxfp\d\w*|nvfp\d|int\d|\dbits?)\Z", re.IGNORECASE
)
_ONNX_TAG = late(
    r"(q?u?int\d\w*|q\d\w*|b?fp?\d{2}|bnb4|quantized|quant|quantize|o[1-4]|avx\w*|vnni|arm64|\dbit|w\da\d\w*|dynamic"
    r"|optimized)\Z",
    re.IGNORECASE,
)
_PART = late(r"(high|low)[-_]?noise|encoder|decoder|thinker|talker", re.IGNORECASE)
"""Matches names of parts of one model of which an engine loads all."""
_WORDS = late(r"[-_.]")
_SPLIT = late(r"\.(gguf|ggml)[-.](split|part)[-.]?\w+\Z", re.IGNORECASE)


def _single_file_model(name: str) -> bool:
    """A format in which one file is a whole model."""
    lowered = name.lower()
    if "gg" not in lowered:
        return lowered.endswith(".llamafile")
    return suffix_of(name) in GGML or _SPLIT.search(name) is not None or lowered.startswith("ggml-")


def _without_tags(stem: str, tag: re.Pattern[str]) -> tuple[str, str]:
    """``stem`` without its words that match, and these."""
    words = _WORDS.split(stem)
    kept = [word for word in words if not tag.match(word)]
    return "-".join(kept), "-".join(word for word in words if tag.match(word))


def _quantisation(stem: str) -> tuple[str, str]:
    """Return (base, label): ``("Llama-3-8B", "Q4_K_M")`` of ``Llama-3-8B-Q4_K_M``. The label is the last run of words
    that name a quantisation, as it is written."""
    pieces = re.split(r"([-_.])", stem)
    words, joints = pieces[::2], pieces[1::2]
    end = len(words)
    while end and not _GGUF_TAG.match(words[end - 1]):
        end -= 1
    start = end
    while start and _GGUF_TAG.match(words[start - 1]):
        start -= 1
    while start < end and not _STARTS_TAG.match(words[start]):
        start += 1
    if start >= end:
        return stem.lower(), ""
    label = "".join(
        piece for pair in zip(words[start:end], [*joints[start : end - 1], ""], strict=True) for piece in pair
    )
    return "-".join(words[:start] + words[end:]).lower(), label


def _gguf_choices(
    files: Sequence[Weights],
    directories: Mapping[str, _Directory],
    include: Sequence[str],
    wanted: Collection[int],
    left_out: dict[int, str],
) -> list[Choice]:
    """Variants by model, told apart by their label; what comes in several parts is one. Projectors (``mmproj``) go with
    whichever is chosen."""
    families: dict[tuple[str, str], dict[str, list[Weights]]] = {}
    for file in files:
        directory, _, name = file.path.rpartition("/")
        if "mmproj" in name.lower():
            continue
        stem = _SPLIT.sub("", name)
        suffix = suffix_of(stem)
        stem = stem[: len(stem) - len(suffix)] if suffix in GGML or suffix == ".bin" else stem
        shard = _SHARD.match(stem)
        if shard is not None:
            stem = shard["stem"] + shard["rest"]
        base, label = _quantisation(stem)
        folders = directory.split("/") if directory else []
        above = [folder for folder in folders if not _quantisation(folder)[1]]
        if not label:
            label = next((found for folder in reversed(folders) if (found := _quantisation(folder)[1])), "")
        families.setdefault(("/".join(above), base), {}).setdefault(label, []).append(file)
    choices = []
    for (directory, base), by_label in families.items():
        if len(by_label) < 2:
            continue
        beside = directories[directory].model() if directory in directories else None
        choice = _choice("GGUF", by_label, include, wanted, ())
        for position, variant in enumerate(choice.variants):
            if position not in choice.chosen:
                reason = f"one of {len(choice.variants)} GGUF variants"
                if beside is not None:
                    reason += f" beside {beside.shown}"
                left_out.update(dict.fromkeys(variant.files, reason))
        whole, parts = _PART.subn("", f"{directory}/{base}")
        choices.append(choice._replace(optional=beside is not None, whole=whole if parts else ""))
    return choices


def _onnx_choices(
    files: Sequence[Weights], include: Sequence[str], wanted: Collection[int], left_out: dict[int, str]
) -> list[Choice]:
    """Variants of one exported graph. The one without a tag is what loaders take unless they are told otherwise."""
    families: dict[tuple[str, str], dict[str, list[Weights]]] = {}
    for file in files:
        directory, _, name = file.path.rpartition("/")
        base, label = _without_tags(name[: name.index(".onnx")], _ONNX_TAG)
        families.setdefault((directory, base), {}).setdefault(label, []).append(file)
    choices = []
    for by_label in families.values():
        if len(by_label) < FEWEST_WITH_DEFAULT:
            continue
        choice = _choice("ONNX", by_label, include, wanted, ("",))
        for position, variant in enumerate(choice.variants):
            if position not in choice.chosen:
                left_out.update(dict.fromkeys(variant.files, f"one of {len(choice.variants)} ONNX variants"))
        choices.append(choice)
    return choices


def _choice(
    kind: str,
    by_label: Mapping[str, Sequence[Weights]],
    include: Sequence[str],
    wanted: Collection[int],
    default: Collection[str],
) -> Choice:
    variants = tuple(
        Variant(
            label,
            tuple(file.index for file in files),
            tuple(file.path for file in files),
            sum(file.size for file in files),
        )
        for label, files in sorted(by_label.items())
    )
    chosen = {at for at, variant in enumerate(variants) if any(index in wanted for index in variant.files)}
    for glob in include:
        matching = [at for at, variant in enumerate(variants) if any(matches(path, (glob,)) for path in variant.paths)]
        if len(matching) == 1:
            chosen.add(matching[0])
    if not chosen or default:
        chosen.update(at for at, variant in enumerate(variants) if variant.label in default)
    return Choice(kind, variants, tuple(sorted(chosen)))
