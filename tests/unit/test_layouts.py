"""What is kept of real repositories (tests/layouts.json: their names and sizes), against what engines open of them.

``needs`` of a layout: by engine, the files that it opens to start. Names and sizes are from knowledge of the
repositories, not downloaded. Only transformers' own search for weights is run on its layouts (below); of vLLM the
loader's source was read; all other needs are from knowledge of how these engines load, and were not run.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.core.loadset import Hints, LoadSet, sort_files
from instantstart_fs.core.manifest import FileEntry, Manifest, ManifestFile, ModelManifest

LAYOUTS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "layouts.json").read_text())
CASES = [(layout, engine) for layout in LAYOUTS for engine in layout["needs"]]
UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}
FAMILIES = (
    *("language", "mixture of experts", "vision-language", "embedding", "ASR", "TTS", "diffusion, image"),
    *("diffusion, video", "adapter", "GGUF", "ONNX", "NeMo", "TensorRT", "Triton", "mistral-format"),
)


def size(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([kMG]?)", text).groups()  # type: ignore[union-attr]
    return round(float(number) * UNITS[unit])


def entries(layout: dict[str, Any]) -> tuple[FileEntry, ...]:
    files = tuple(ManifestFile(path, size(text), path) for path, text in sorted(layout["files"].items()))
    return Manifest("p", 1, 8 << 20, (ModelManifest("", "hf://a/b", "r", files),), 0).files


def sorted_for(files: tuple[FileEntry, ...], needed: list[str]) -> LoadSet:
    """As it is once the engine has begun to read a variant, where there are some to choose from."""
    known, wanted = sort_files(files), []
    while known.open:
        of_variants = {path for choice in known.open for variant in choice.variants for path in variant.paths}
        wanted.append(next(path for path in needed if path in of_variants))
        known = sort_files(files, Hints(wanted=wanted))
    return known


def names(case: tuple[dict[str, Any], str]) -> str:
    return f"{case[0]['name']}: {case[1]}"


def ratio(layout: dict[str, Any], engine: str) -> float:
    files, needed = entries(layout), layout["needs"][engine]
    kept = sorted_for(files, needed).order
    return sum(files[index].file.size for index in kept) / sum(size(layout["files"][path]) for path in needed)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_nothing_that_an_engine_opens_is_missing(case: tuple[dict[str, Any], str]) -> None:
    layout, engine = case
    files, needed = entries(layout), layout["needs"][engine]
    kept = {files[index].path for index in sorted_for(files, needed).order}
    assert set(needed) <= kept


def test_in_the_median_hardly_a_byte_too_much_is_fetched() -> None:
    assert len(LAYOUTS) >= 25
    assert all(any(family in layout["kind"] for layout in LAYOUTS) for family in FAMILIES)
    assert statistics.median(ratio(*case) for case in CASES) <= 1.1


def test_weights_and_nothing_else_are_requests() -> None:
    """By size, whatever they are called: all that is large, but for tokenizers and what nobody loads."""
    for layout in LAYOUTS:
        files = entries(layout)
        known = sort_files(files)
        for entry in files:
            quiet = re.search(
                r"\.(json|jsonl|txt|md|jpe?g|png|gif|mp4|py|ya?ml|model|dat)\Z|optimizer", entry.path, re.IGNORECASE
            )
            if entry.file.size >= 16 << 20 and not quiet:
                assert entry.index in known.weights, (layout["name"], entry.path)
            if re.search(r"\.(json|jinja|py|ya?ml|pbtxt|md|png|txt)\Z|tokenizer\.model", entry.path):
                assert entry.index not in known.weights, (layout["name"], entry.path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout["name"]))
def test_every_file_left_out_has_a_reason_that_names_what_is_kept(layout: dict[str, Any]) -> None:
    files = entries(layout)
    known = sort_files(files)
    assert sorted([*known.order, *known.left_out]) == list(range(len(files)))
    kept = {files[index].file.path.rpartition("/")[2] for index in known.order}
    for reason in known.left_out.values():
        beside = re.match(r"(?:twin|\S+ variant|copy|training checkpoint beside) (?:of )?(\S+)", reason)
        assert beside is None or beside[1] in kept, reason


def test_what_transformers_opens_is_what_the_table_says(tmp_path: Path) -> None:
    """Its own search for weights, on each layout that it is said to load."""
    pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.modeling_utils")
    asked = 0
    for layout in LAYOUTS:
        needed = layout["needs"].get("transformers")
        if needed is None:
            continue
        root = tmp_path / layout["name"].replace("/", "--")
        for path in layout["files"]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"{}")
        shards = [path for path in needed if path.endswith(".safetensors")]
        (root / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {f"w{number}": path for number, path in enumerate(shards)}})
        )
        found, _ = modeling._get_resolved_checkpoint_files(
            pretrained_model_name_or_path=str(root),
            variant=None,
            gguf_file=None,
            use_safetensors=None,
            user_agent={},
            is_remote_code=False,
            transformers_explicit_filename=None,
            download_kwargs={},
        )
        assert sorted(str(Path(path).relative_to(root)) for path in found) == sorted(shards), layout["name"]
        asked += 1
    assert asked >= 8
