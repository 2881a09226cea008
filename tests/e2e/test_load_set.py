"""Warm means that an engine can start: layouts of real repositories, served warm with their origin gone; variants; and
the 48-hour promise for pipelines of every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.control.specification import specification
from tests.harness import MIB, Daemon, must, random_file, wait_for

LAYOUTS = {layout["name"]: layout for layout in json.loads((Path(__file__).parents[1] / "layouts.json").read_text())}
SHOWN = (
    "FunAudioLLM/CosyVoice2-0.5B",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "a fine-tuned Stable Diffusion of mixed formats",
    "ResembleAI/chatterbox",
)
"""Those of the table that an earlier rule called warm although they could not start."""
LLAMA = {f"Llama-{label}.gguf": 2 * MIB for label in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")}
FORMATS = (
    *("parakeet.nemo", "model.onnx", "1/model.plan", "rank0.engine", "voices.npz", "model.ckpt", "model.pt2"),
    *("model.tflite", "ggml-base.bin", "gemma.task", "model.bin", "llm.pt", "model-Q4_K_M.gguf", "weights.unheard_of"),
)


def make(root: Path, files: dict[str, int]) -> Path:
    for seed, (path, size) in enumerate(sorted(files.items())):
        random_file(root / path, size, seed)
    return root


def complete(daemon: Daemon, pipeline: str) -> set[str]:
    return {file["path"] for file in daemon.status(pipeline)["files"] if file["state"] in ("sealed", "unverified")}


def test_what_is_warm_starts_without_its_origin(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon()
    names = dict(zip((f"p{number}" for number in range(len(SHOWN))), SHOWN, strict=True))
    kept = {}
    for pipeline, name in names.items():
        sizes = {path: 3000 + len(path) for path in LAYOUTS[name]["files"]}
        source = make(tmp_path / "sources" / pipeline, sizes)
        daemon.ok("add", pipeline, f"file://{source}")
        daemon.warm(pipeline)
        kept[pipeline] = make(tmp_path / "kept" / pipeline, sizes)
    shutil.rmtree(tmp_path / "sources")
    for pipeline, name in names.items():
        for engine, needed in LAYOUTS[name]["needs"].items():
            for path in needed:
                here = daemon.path(pipeline, path).read_bytes()
                assert here == (kept[pipeline] / path).read_bytes(), (name, engine, path)


def test_of_a_repository_of_variants_one_is_fetched(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = make(tmp_path / "source", {**LLAMA, "mmproj-F16.gguf": MIB})
    daemon = make_daemon()
    added = daemon.ok("add", "llama", f"file://{source}")
    for expected in ("7 (F16, Q2_K,", "chosen: none", "--include"):
        assert expected in added
    message = daemon.refused(1, "warm", "llama", "--wait")
    for expected in ("7 GGUF variants", *("F16", "Q2_K", "Q8_0"), "instantstart warm llama --include '*Q4_K_M*'"):
        assert expected in message
    assert daemon.status("llama")["undecided"] == 7
    assert "7 variants, none chosen" in daemon.ok("ls")
    must("sha256sum", daemon.path("llama", "Llama-Q5_K_M.gguf"))
    wait_for(lambda: daemon.status("llama")["state"] == "unverified", "the variant that is read", 20)
    assert complete(daemon, "llama") == {"Llama-Q5_K_M.gguf", "mmproj-F16.gguf"}
    daemon.warm("llama")
    daemon.ok("warm", "llama", "--wait", "--include", "*Q4_K_M*")
    assert complete(daemon, "llama") == {"Llama-Q5_K_M.gguf", "Llama-Q4_K_M.gguf", "mmproj-F16.gguf"}
    status = daemon.status("llama")
    assert [variant["label"] for variant in status["variants"] if variant["chosen"]] == ["Q4_K_M", "Q5_K_M"]
    reasons = {file["path"]: file.get("left_out") for file in status["files"]}
    assert reasons["Llama-F16.gguf"] == "one of 7 GGUF variants"
    shown = daemon.ok("status", "llama")
    assert "(left out: one of 7 GGUF variants)" in shown and "chosen: Q4_K_M, Q5_K_M" in shown
    daemon.ok("evict", "llama")
    daemon.restart()
    daemon.warm("llama")
    assert complete(daemon, "llama") == {"Llama-Q5_K_M.gguf", "Llama-Q4_K_M.gguf", "mmproj-F16.gguf"}
    daemon.ok("warm", "llama", "--wait", "--all")
    assert len(complete(daemon, "llama")) == 8


def test_what_an_engine_read_whole_is_warmed_the_next_time(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = make(
        tmp_path / "source", {"config.json": 10, "foo.safetensors": 3 * MIB, "foo.pt": 3 * MIB, "README.md": 9}
    )
    daemon = make_daemon()
    daemon.ok("add", "tts", f"file://{source}")
    daemon.warm("tts")
    assert complete(daemon, "tts") == {"config.json", "foo.safetensors"}
    must("sha256sum", daemon.path("tts", "foo.pt"))
    learned = [file["path"] for file in daemon.status("tts")["files"] if file.get("learned")]
    assert learned == ["foo.pt"]
    for killed in (False, True):
        if killed:
            wait_for(lambda: (daemon.store / "slots/tts/learned.json").exists(), "what was learned, in its slot", 10)
            daemon.kill()
            daemon.start()
        # What the kernel has open it closes a moment later.
        wait_for(lambda: daemon.cli("evict", "tts").returncode == 0, "the eviction", 20)
        daemon.warm("tts")
        assert complete(daemon, "tts") == {"config.json", "foo.safetensors", "foo.pt"}


@pytest.mark.parametrize(
    ("transport", "formats"),
    [("auto", FORMATS), ("bind", FORMATS[::4]), ("pyfuse3", FORMATS[1::4])],
    indirect=["transport"],
    ids=["auto", "bind", "pyfuse3"],
)
def test_a_pipeline_in_daily_use_stays_whatever_its_format(
    make_daemon: Callable[..., Daemon], tmp_path: Path, formats: Sequence[str]
) -> None:
    """A store that has room for three: one that was read, of each format in turn, and two that nobody asks for. A
    newcomer takes the place of one of these."""
    daemon = make_daemon(
        config={
            "store": {"capacity": "14MiB", "high_watermark": 0.99, "low_watermark": 0.95},
            "fill": {"chunk_size": "1MiB"},
        }
    )
    unused = make(tmp_path / "unused", {"model.safetensors": 4 * MIB})
    with Client(str(daemon.socket)) as client:
        for path in formats:
            source = make(tmp_path / "daily", {path: 4 * MIB, "config.json": 10})
            client.add(specification("daily", f"file://{source}"))
            client.wait_warm("daily")
            must("sha256sum", daemon.path("daily", path))
            wait_for(lambda: client.status("daily").hot_until, f"{path}: the request", 10)
            assert client.cold_starts("daily"), f"{path}: no cold start is recorded"
            for name in ("unused1", "unused2", "newcomer"):
                client.add(specification(name, f"file://{unused}"))
                client.wait_warm(name)
            states = {name: client.status(name).state for name in ("daily", "unused1", "unused2", "newcomer")}
            assert (states["daily"], states["newcomer"]) == ("unverified", "unverified"), path
            assert "cold" in (states["unused1"], states["unused2"]), path
            for name in states:
                client.remove(name)
            shutil.rmtree(source)
