"""Encodes and decodes large manifests in slices, so that other threads run in between: msgspec holds the interpreter
lock, 60 ms for the 100,000 files of one call.

This daemon writes JSON without blanks, so ``},{"path":`` occurs between two files of one model and nowhere else: in a
JSON string a quotation mark has a backslash before it. All but a few files are cut out there, decoded slice by slice,
and put back. A manifest that was reformatted is decoded at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import msgspec

from instantstart_fs.core.manifest import Manifest, ManifestFile, ModelManifest

SLICE = 1000
"""Files in one slice: under a millisecond."""
_BETWEEN = b'},{"path":'
_FILE = b'{"path":'
_MODEL = b'"files":['

_NO_FILES = b'"files":[]'
_NO_MODELS = b'"models":[]'
"""The key and the empty value of a manifest without models. It cannot be part of a string, where quotation marks have a
backslash before them."""

_encode = msgspec.json.encode
_files = msgspec.json.Decoder(list[ManifestFile])


def encode(frame: bytes, models: Iterable[ModelManifest]) -> bytes:
    """Encode a manifest. ``frame``: its JSON without models, which are inserted slice by slice."""
    written: list[bytes] = []
    for model in models:
        before, _, after = _encode(msgspec.structs.replace(model, files=())).partition(_NO_FILES)
        files = model.files
        pieces = (_encode(files[start : start + SLICE])[1:-1] for start in range(0, len(files), SLICE))
        written.append(before + _MODEL + b",".join(pieces) + b"]" + after)
    before, _, after = frame.partition(_NO_MODELS)
    return before + _NO_MODELS[:-1] + b",".join(written) + b"]" + after


def cut(raw: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Cut slices out; what is left, and each slice: (number of remaining files before it, its files as JSON without
    brackets)."""
    left: list[bytes] = []
    out: list[tuple[int, bytes]] = []
    before = start = 0
    for end in itertools.chain(_cuts(raw), (len(raw),)):
        piece = raw[start:end]
        if start and end < len(raw) and _MODEL not in piece:
            out.append((before, piece[1:]))
        else:
            left.append(piece)
            before += piece.count(_FILE)
        start = end
    return b"".join(left), out


def _cuts(raw: bytes) -> Iterator[int]:
    """Yield the offset of the comma before every SLICE-th file."""
    found, position = 0, raw.find(_BETWEEN)
    while position >= 0:
        if found % SLICE == 0:
            yield position + 1
        found += 1
        position = raw.find(_BETWEEN, position + 1)


def put_back(manifest: Manifest, out: list[tuple[int, bytes]]) -> Manifest:
    """Insert the slices into ``manifest``, the decoded rest. Raises msgspec.MsgspecError, UnicodeDecodeError."""
    models, passed, pieces = [], 0, list(reversed(out))
    for model in manifest.models:
        files: list[ManifestFile] = []
        for file in model.files:
            files.append(file)
            passed += 1
            while pieces and pieces[-1][0] == passed:
                files += _files.decode(b"[" + pieces.pop()[1] + b"]")
        models.append(msgspec.structs.replace(model, files=tuple(files)))
    return msgspec.structs.replace(manifest, models=tuple(models))
