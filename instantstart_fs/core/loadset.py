"""Which files an engine loads, and in which order. A repository that carries safetensors and PyTorch and ONNX weights
must not cost four times the bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from instantstart_fs.core.manifest import FileEntry

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".engine", ".ckpt")
"""Opening one of these is a request for the pipeline."""

_SECONDARY_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")
"""Loaded only where no safetensors exist in the same model."""

_ALWAYS = (".gguf", ".engine")

_SMALL_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".tiktoken",
    ".jinja",
    ".py",
    ".vocab",
    ".merges",
    ".yaml",
    ".yml",
    ".spm",
)
"""Configuration, tokenizers, chat templates and remote code: what engines read beside the weights."""

_SKIPPED_DIRECTORIES = frozenset({"onnx", "openvino", "original", "coreml", "tflite", "flax", "docs", "images", ".git"})

_SKIPPED_SUFFIXES = (
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".tflite",
    ".md",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
    ".pdf",
)

_SKIPPED_NAMES = frozenset({"LICENSE", "license", ".gitattributes", ".gitignore", "USE_POLICY.md", "training_args.bin"})

_NOT_WEIGHTS = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth"}
)

READAHEAD_ALLOWANCE = 1024 * 1024
"""The kernel reads ahead up to this much (the bdi's read_ahead_kb that the mount sets), so a READ below it may be
nobody's wish beyond the header."""


def is_weight_file(path: str) -> bool:
    """Whether opening ``path`` counts as a request for its pipeline."""
    name = path.rpartition("/")[2]
    return name.endswith(WEIGHT_SUFFIXES) and name not in _NOT_WEIGHTS


def natural_key(path: str) -> str:
    """Sorts ``shard-2`` before ``shard-10``, as vLLM and transformers do. A string, and no tuple of parts: a hundred
    thousand of those would keep the garbage collector busy."""
    return _NUMBER.sub(_with_length, path)


_NUMBER = re.compile(r"\d+")


def _with_length(number: re.Match[str]) -> str:
    """Longer numbers sort after shorter ones, and all of them before text, which has no NUL."""
    digits = str(int(number[0]))
    return f"\0{len(digits):03}{digits}"


def _wanted(path: str, has_safetensors: bool) -> bool:
    name = path.rpartition("/")[2]
    if _in_skipped_directory(path):
        return False
    if name in _SKIPPED_NAMES or name in _NOT_WEIGHTS or name.lower().endswith(_SKIPPED_SUFFIXES):
        return False
    if name.startswith("consolidated"):
        return not has_safetensors
    if name.endswith(".safetensors") or name.endswith(_ALWAYS):
        return True
    if name.endswith(_SECONDARY_WEIGHTS):
        return not has_safetensors
    if name.endswith(".index.json"):
        # model.safetensors.index.json or pytorch_model.bin.index.json: only that of the weights that are loaded
        return ".safetensors." in name or not has_safetensors
    return name.lower().endswith(_SMALL_SUFFIXES) or "." not in name


def load_set(files: Sequence[FileEntry]) -> tuple[int, ...]:
    """The indices of the files that an engine loads, in load order: model by model, configuration and tokenizer first
    (small, and read first), then the weights in natural order.

    Where this finds nothing (a repository of unknown formats), every file counts.
    """
    by_model: dict[int, list[FileEntry]] = {}
    for entry in files:
        by_model.setdefault(entry.model, []).append(entry)
    ordered: list[int] = []
    for model in sorted(by_model):
        entries = by_model[model]
        has_safetensors = any(
            entry.file.path.endswith(".safetensors") and not _in_skipped_directory(entry.file.path) for entry in entries
        )
        chosen = [entry for entry in entries if _wanted(entry.file.path, has_safetensors)]
        if not any(is_weight_file(entry.file.path) for entry in chosen):
            chosen = entries
        chosen.sort(key=lambda entry: f"{is_weight_file(entry.file.path):d}{natural_key(entry.file.path)}")
        ordered.extend(entry.index for entry in chosen)
    return tuple(ordered)


def _in_skipped_directory(path: str) -> bool:
    return any(part in _SKIPPED_DIRECTORIES for part in path.rpartition("/")[0].split("/"))


def fill_threshold(path: str, size: int, header: int | None) -> int:
    """The offset in bytes at which a READ of ``path`` means that its weights are wanted, not only its header.

    ``header``: the length of a safetensors header (with its 8-byte length field) where it is known. A READ that starts
    below the threshold starts no fill of the load set. For a file that is no weight file that is every READ.
    """
    if not is_weight_file(path):
        return size
    return min(max(header or 0, READAHEAD_ALLOWANCE), max(size // 2, 1))


def safetensors_header_length(prefix: bytes) -> int | None:
    """The length of the header that begins with these ≥ 8 bytes; None where that cannot be one (over 100 MB, as the
    safetensors format itself limits it)."""
    if len(prefix) < 8:
        return None
    length = int.from_bytes(prefix[:8], "little")
    return 8 + length if 2 <= length <= 100_000_000 else None
