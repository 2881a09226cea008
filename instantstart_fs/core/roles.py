"""Decides what a single file of a model is for, by its name and size. Pure; core/loadset.py looks at all files.

*Weights*: opening them is a request for the pipeline. *Config*: configuration, tokenizers, templates, remote code,
voice prompts: what engines read beside the weights, and what backups and indexers read of everything. *Docs* and
*training* state: nothing that an engine loads.
"""

from __future__ import annotations

import re
from enum import Enum

from instantstart_fs.core.late_pattern import late

SMALL = 16 * 1024 * 1024
"""Bytes. A larger file that is neither a tokenizer nor documentation is weights, whatever its name."""
UNKNOWN_WEIGHTS = 1024 * 1024
"""Bytes. A larger file of an unknown kind is weights: configuration is smaller."""


class Role(Enum):
    WEIGHTS = "weights"
    CONFIG = "configuration"
    UNKNOWN = "small, of an unknown kind"
    DOCS = "documentation, image or video"
    TRAINING = "training state"


SAFETENSORS = frozenset({".safetensors"})
TORCH = frozenset({".bin", ".pt", ".pth", ".ckpt"})
GGML = frozenset({".gguf", ".ggml", ".llamafile"})
WEIGHTS = (
    SAFETENSORS
    | TORCH
    | GGML
    | frozenset(
        {
            *(".engine", ".plan", ".trt", ".onnx", ".onnx_data", ".nemo", ".npz", ".npy", ".pt2", ".ptl", ".pte"),
            *(".tflite", ".task", ".litertlm", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".pb", ".pdparams"),
            *(".pdiparams", ".pkl", ".pickle", ".joblib", ".mar", ".mlmodel", ".mnn", ".ncnn", ".rknn", ".hef", ".dlc"),
            *(".caffemodel", ".ftz", ".vec", ".arpa", ".kenlm", ".fst", ".tensors", ".ubj", ".zip", ".tar", ".tgz"),
        }
    )
)
"""Known to hold weights, of whatever size."""
_PLAIN_WEIGHTS = WEIGHTS - {".bin", ".pt", ".pth", ".pkl"}
"""Suffixes of weights that are never a training state."""

_CONFIG_OF_ANY_SIZE = frozenset({".py", ".jinja", ".jinja2", ".yaml", ".yml", ".toml", ".tiktoken", ".pbtxt"})
_CONFIG = _CONFIG_OF_ANY_SIZE | frozenset(
    {
        *(".json", ".jsonl", ".txt", ".model", ".vocab", ".merges", ".spm", ".ini", ".cfg", ".conf", ".xml", ".csv"),
        *(".tsv", ".proto", ".lst", ".list", ".dict", ".codes", ".tokens", ".sh", ".lock", ".sha256", ".properties"),
        *(".index", ".meta"),  # of TensorFlow's checkpoints
    }
)
_PROMPTS = frozenset(
    {
        *(".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"),
        *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    }
)
"""Voice prompts, masks, reference pictures, as far as they are small."""
_DOCS = frozenset(
    {
        *(".md", ".rst", ".pdf", ".html", ".htm", ".ipynb", ".tex", ".bib", ".cff", ".log"),
        *(".gif", ".svg", ".ico", ".psd", ".avif"),
        *(".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v"),
    }
)
_DOC_NAMES = ("license", "licence", "notice", "copying", "readme", "changelog", "use_policy")
_DOCUMENTATION = late(r"(?:\A|/)(?:docs?|images|figures)/", re.IGNORECASE)
"""A directory of such a name is above it."""
_NOBODYS = frozenset({".gitattributes", ".gitignore", ".gitkeep", ".gitmodules", ".ds_store", ".dockerignore"})
_TOKENIZER = ("tokenizer", "vocab", "merges", "tekken", "spiece", "sentencepiece", "added_tokens", "special_tokens")
"""Prefixes of the names of tokenizers' files."""

_TRAINING_NAMES = frozenset(
    {
        *("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt"),
        *("rng_state.pth", "random_states.pkl"),
    }
)
_TRAINING = late(
    r"(rng_state|random_states)_\d+\.\w+|events\.out\.tfevents\..*|.*_optim_states\.pt|optimizer[-_]\d.*|.*imatrix.*"
)

_DATA_OF = late(r"\.(?:onnx[._-]data|onnx\.data|gguf|safetensors|ggml|bin|pth?|nemo)[-._](?:part|split|data)?\w*")
"""Matches pieces of weights: ``model.onnx_data_1``, ``model.onnx.data``, ``x.gguf-split-a``,
``x.safetensors.part1``."""
_TF_DATA = late(r"\.data-\d+-of-\d+\Z")


def suffix_of(name: str) -> str:
    """The last suffix with its dot, in lower case; "" without one."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def is_tokenizer(name: str) -> bool:
    return name.lower().startswith(_TOKENIZER)


def role_of(path: str, size: int) -> Role:
    """The role of the file at ``path`` with ``size`` bytes, by itself: whether an engine loads it depends on what lies
    beside it. ``UNKNOWN`` is read beside the weights, or is the weights where nothing else is."""
    name = path[path.rfind("/") + 1 :]
    suffix = suffix_of(name)
    # What there are a hundred thousand of comes first.
    if suffix == ".json" and size < SMALL and _DOCUMENTATION.search(path) is None:
        return Role.CONFIG
    if suffix in _PLAIN_WEIGHTS:
        return Role.TRAINING if "imatrix" in name else Role.WEIGHTS
    lowered = name.lower()
    if lowered in _TRAINING_NAMES or _TRAINING.fullmatch(lowered):
        return Role.TRAINING
    if suffix in WEIGHTS:
        return Role.WEIGHTS
    if suffix in _DOCS or lowered in _NOBODYS or lowered.startswith(_DOC_NAMES):
        return Role.DOCS
    documentation = _DOCUMENTATION.search(path) is not None
    if suffix in _PROMPTS:
        return Role.DOCS if documentation or size >= SMALL else Role.CONFIG
    if suffix in _CONFIG or is_tokenizer(name):
        if size < SMALL or suffix in _CONFIG_OF_ANY_SIZE or is_tokenizer(name) or name.endswith(".index.json"):
            return Role.DOCS if documentation else Role.CONFIG
        return Role.WEIGHTS
    if size >= UNKNOWN_WEIGHTS or _DATA_OF.search(lowered) or _TF_DATA.search(lowered):
        return Role.WEIGHTS
    return Role.DOCS if documentation else Role.UNKNOWN
