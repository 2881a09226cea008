"""vLLM's CPU build, unmodified, on the mount: the same token ids and embeddings as from a plain directory, cold and
warm. Opt-in, since its environment is 3.4 GB: `scripts/test --vllm` makes that and runs these."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.errors import PrefetchError
from instantstart_fs.prefetch.hold_client import HoldClient
from tests.engine.test_transformers import minilm
from tests.harness import REPOSITORY, Daemon, must, wait_for
from tests.servers.hub import HubServer

__all__ = ["minilm"]

PYTHON = os.environ.get("INSTANTSTART_VLLM_PYTHON", "")
ENGINE = Path(__file__).with_name("vllm_engine.py")
PREFETCH_DIR = "INSTANTSTART_PREFETCH_DIR"
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


def engine(
    path: Path, kind: str, load_format: str = "auto", env: dict[str, str] | None = None, ranks: int = 1
) -> tuple[Any, str]:
    """What vLLM computes, and all that it logged."""
    command = ["sh", "-c", 'exec "$@" 2>&1', "sh", PYTHON, ENGINE, path, kind, load_format, str(ranks)]
    # By itself vLLM's CPU build wants a NUMA node for each rank.
    cores = sorted(os.sched_getaffinity(0))
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:ranks]))} if ranks > 1 else {}
    text = must(*command, timeout=280, env={**ENVIRONMENT, **binding, **(env or {})})
    line = next(line for line in reversed(text.splitlines()) if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    print(f"{load_format} from {path}, {ranks} rank(s): engine ready in {found['seconds']} s")
    return found["found"], text


def decoder(path: Path, seed: int) -> Path:
    """A generated decoder of four shards. Its weights are random, and that suffices: a wrong byte changes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
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
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="3MB")
    assert len(list(path.glob("*.safetensors"))) == 4
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("sharded"), 0)


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


@contextlib.contextmanager
def held(daemon: Daemon, pipeline: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`instantstart prefetch PIPELINE --hold`, until it holds all of it."""
    log = daemon.directory / "hold.log"
    with log.open("wb") as out:
        holder = subprocess.Popen(
            [
                *(sys.executable, "-m", "instantstart_fs.cli"),
                "prefetch",
                pipeline,
                "--devices",
                "cpu",
                "--hold",
                *options,
            ],
            env={**os.environ, **daemon.env},
            cwd=REPOSITORY,
            stdout=out,
            stderr=out,
        )
    try:

        def whole() -> bool:
            assert holder.poll() is None, log.read_text()
            try:
                with HoldClient(pipeline, os.path.join(daemon.env[PREFETCH_DIR], f"{pipeline}.sock")) as client:
                    return all(device.done for device in client.status().devices)
            except PrefetchError:
                return False

        wait_for(whole, "the hold", 60)
        yield holder
    finally:
        with contextlib.suppress(ProcessLookupError):
            holder.send_signal(signal.SIGTERM)
        holder.wait(20)


@pytest.fixture
def warm(make_daemon: Callable[..., Daemon], sharded: Path) -> Daemon:
    """A daemon with the sharded model, warm."""
    daemon = make_daemon()
    daemon.env[PREFETCH_DIR] = str(daemon.directory / "prefetch")
    daemon.ok("add", "served", f"file://{sharded}")
    daemon.warm("served")
    return daemon


def test_the_plugin_takes_held_weights(warm: Daemon, sharded: Path) -> None:
    expected, _ = engine(sharded, "generate")
    with held(warm, "served") as holder:
        found, text = engine(warm.path("served"), "generate", "instantstart", warm.env)
        assert found == expected
        size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
        assert f"took {size} bytes in 4 files from the prefetch helper" in text
        assert holder.wait(20) == 0  # all was taken and freed: nothing is left to hold


def test_two_ranks_take_held_weights(warm: Daemon, sharded: Path) -> None:
    """Each rank takes every file; a file is freed when both have it, and with the last one the hold ends."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores: vLLM's CPU build binds each rank to its own")
    expected, _ = engine(sharded, "generate", ranks=2)
    with held(warm, "served", "--tensor-parallel", "2") as holder:
        found, text = engine(warm.path("served"), "generate", "instantstart", warm.env, ranks=2)
        assert found == expected
        size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
        assert text.count(f"took {size} bytes in 4 files from the prefetch helper") == 2
        assert holder.wait(20) == 0
    with held(warm, "served") as holder:  # for one engine, by mistake
        found, text = engine(warm.path("served"), "generate", "instantstart", warm.env, ranks=2)
        assert found == expected
        assert text.count(" from the mount: ") == 1  # one of them took all, the other none


HOOK = """
import sys
from types import SimpleNamespace
import torch
from vllm.config import LoadConfig
from instantstart_fs.prefetch import vllm_loader

path, total, free = sys.argv[1], *map(int, sys.argv[2:])
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.mem_get_info = lambda: (free, total)
vllm_loader.place_of = lambda device: {"cuda:0": "cpu"}[device]  # where the weights are held here
config = SimpleNamespace(
    model_config=SimpleNamespace(model=path), cache_config=SimpleNamespace(gpu_memory_utilization=0.5)
)
print("RESULT", vllm_loader.InstantStartLoader(LoadConfig()).get_external_weight_memory(config))
"""


def test_memory_that_is_still_held_is_told_to_the_engine(warm: Daemon, sharded: Path) -> None:
    """By the plugin's hook, on a real hold, with a GPU that is only said to be there: as much as vLLM's own check of
    the free memory lacks, and no more than is held."""

    def told(total: int, free: int) -> int:
        text = must(PYTHON, "-c", HOOK, warm.path("served"), str(total), str(free), timeout=120, env=warm.env)
        return int(text.rpartition("RESULT ")[2])

    kept = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    with held(warm, "served"):
        assert told(1000 * kept, 500 * kept) == 0
        assert told(1000 * kept, 500 * kept - 12345) == 12345
        assert told(1000 * kept, 10 * kept) == kept
    assert told(1000 * kept, 10 * kept) == 0  # nobody holds anything


def test_the_plugin_takes_no_weights_of_another_generation(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """From a source without digests; the update brings other bytes under the same names and sizes."""
    origin = decoder(tmp_path / "origin", 0)
    daemon = make_daemon()
    daemon.env[PREFETCH_DIR] = str(daemon.directory / "prefetch")
    daemon.ok("add", "served", f"file://{origin}")
    with held(daemon, "served") as holder:
        for path in decoder(tmp_path / "again", 1).glob("*.safetensors"):
            os.replace(path, origin / path.name)
        daemon.ok("update", "served")
        expected, _ = engine(origin, "generate")
        found, text = engine(daemon.path("served"), "generate", "instantstart", daemon.env)
        assert found == expected
        assert text.count("is not the file that is held (an update came between)") == 1
        assert holder.poll() is None


def test_the_plugin_falls_back_to_the_mount(warm: Daemon, sharded: Path) -> None:
    """Nobody holds anything; then a holder that is killed while the engine starts."""
    expected, _ = engine(sharded, "generate")
    found, text = engine(warm.path("served"), "generate", "instantstart", warm.env)
    assert found == expected
    assert text.count("loading from the mount: ") == 1
    with held(warm, "served") as holder:
        holder.kill()
        holder.wait(10)
        found, text = engine(warm.path("served"), "generate", "instantstart", warm.env)
    assert found == expected
    assert text.count("loading from the mount: ") == 1
