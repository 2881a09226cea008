"""A manifest is the same whether it is decoded at once or in slices."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.manifest import Digest, Manifest, ManifestFile, ModelManifest
from instantstart_fs.store import manifest_json

_HOSTILE = st.sampled_from(
    ['},{"path":', '"files":[', '"files":[]', '"models":[]', "\\", '\\"},{"path":"', '{"path":', "a", "é\n", "]},{"]
)
_TEXT = st.lists(_HOSTILE, max_size=4).map("".join)
_FILES = st.builds(
    ManifestFile,
    path=_TEXT,
    size=st.integers(0, 9),
    address=_TEXT,
    version=_TEXT,
    digest=st.none() | st.builds(Digest, algorithm=st.just("sha256"), value=_TEXT),
)
_MODELS = st.builds(
    ModelManifest, name=_TEXT, source=_TEXT, revision=_TEXT, files=st.lists(_FILES, max_size=12).map(tuple)
)
_MANIFESTS = st.builds(
    Manifest,
    pipeline=_TEXT,
    generation=st.integers(1, 9),
    chunk_size=st.just(4096),
    models=st.lists(_MODELS, max_size=4).map(tuple),
    resolved_at_ns=st.integers(0, 9),
)


@given(_MANIFESTS, st.integers(1, 5))
def test_in_slices_is_at_once(manifest: Manifest, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_json, "SLICE", size)
        left, out = manifest_json.cut(msgspec.json.encode(manifest))
        assert manifest_json.put_back(msgspec.json.decode(left, type=Manifest), out) == manifest


def test_nearly_all_of_a_large_one_is_cut_out_and_nothing_of_one_that_was_laid_out_anew() -> None:
    files = tuple(ManifestFile(f"f{number}", 1, "x") for number in range(10 * manifest_json.SLICE))
    raw = msgspec.json.encode(Manifest("p", 1, 4096, (ModelManifest("", "file:///x", "r", files),), 0))
    left, out = manifest_json.cut(raw)
    assert len(out) == 9
    assert len(left) < len(raw) / 5
    laid_out = msgspec.json.format(raw)
    assert manifest_json.cut(laid_out) == (laid_out, [])


@given(_MANIFESTS, st.integers(1, 5))
def test_encoded_in_slices_is_at_once(manifest: Manifest, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_json, "SLICE", size)
        frame = msgspec.json.encode(msgspec.structs.replace(manifest, models=()))
        assert manifest_json.encode(frame, manifest.models) == msgspec.json.encode(manifest)
