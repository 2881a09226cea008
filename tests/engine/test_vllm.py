"""vLLM's CPU build, unmodified, on the mount: the same token ids and embeddings as from a plain directory, cold and
warm. Opt-in, since its environment is 3.4 GB: `scripts/test --vllm` makes that and runs these."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_transformers import minilm
from tests.harness import Daemon, must
from tests.servers.hub import HubServer

__all__ = ["minilm"]

PYTHON = os.environ.get("INSTANTSTART_VLLM_PYTHON", "")
ENGINE = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    if not PYTHON:
        pytest.skip("needs vLLM's environment: `scripts/test --vllm` makes it")


def engine(path: Path, kind: str, load_format: str = "auto") -> tuple[Any, str]:
    """What vLLM computes, and all that it logged."""
    text = must(PYTHON, ENGINE, path, kind, load_format, timeout=280, env=ENVIRONMENT)
    line = next(line for line in reversed(text.splitlines()) if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    print(f"{load_format} from {path}: engine ready in {found['seconds']} s")
    return found["found"], text


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated decoder of four shards. Its weights are random, and that suffices: a wrong byte changes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="3MB")
    assert len(list(path.glob("*.safetensors"))) == 4
    return path


@pytest.mark.parametrize("kind", ["generate", "embed"])
def test_same_results_from_the_mount_cold_and_warm(
    kind: str, make_daemon: Callable[..., Daemon], request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue("sharded" if kind == "generate" else "minilm")
    expected, _ = engine(model, kind)
    with HubServer() as hub:
        hub.publish("org/model", model)
        daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}})
        daemon.ok("add", "served", "hf://org/model")
        assert daemon.status("served")["state"] == "cold"
        assert engine(daemon.path("served"), kind)[0] == expected
        daemon.warm("served")
        hub.kill()
        assert engine(daemon.path("served"), kind)[0] == expected
        assert daemon.status("served")["state"] == "warm"
