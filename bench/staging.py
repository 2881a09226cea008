"""Loading with an empty page cache, by an unmodified engine: the mount (which stages) against a plain directory.

    scripts/bench staging [--size 3GiB] [--shards 4] [--pairs 9] [--transformers 1.5GiB]
                          [--transport passthrough|bind] [--dir DIR]

Both sides lie on one filesystem. Before each load the files' pages, and only theirs, are dropped by posix_fadvise and
mincore must find none; the O_DIRECT rate of the disk is measured beside each pair, since a shared disk swings. The load
is stock `safetensors.safe_open` and a copy of each tensor into one buffer (what a loader does on the way to a device),
in a process of its own, timed from the first open to the last byte; then, with ``--transformers``, `from_pretrained` of
a made-up Llama. ``--copies N`` loads N times at once (tensor-parallel ranks). The daemon's memory is looked at around a
load that finds all bytes in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import GIB, MIB, ratios, summary, table

SAFE_OPEN = """
import sys, time
import torch
from safetensors import safe_open
buffer = torch.empty({tensor}, dtype=torch.uint8)
sys.stdin.readline()
started, total = time.monotonic(), 0
for path in sys.argv[1:]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name).view(-1)
            buffer[: tensor.numel()].copy_(tensor)
            total += tensor.numel()
print(time.monotonic() - started, total)
"""

FROM_PRETRAINED = f"""
import sys, time
import torch
from transformers import LlamaForCausalLM
{common.DTYPE}
sys.stdin.readline()
started = time.monotonic()
model = LlamaForCausalLM.from_pretrained(sys.argv[1], **dtype)
total = 0
for parameter in model.parameters():
    total += parameter.numel() * parameter.element_size()
    parameter.view(-1)[::2048].sum()
print(time.monotonic() - started, total)
"""

TENSOR = 32 * MIB


def make_shards(directory: Path, total: int, shards: int) -> list[Path]:
    """safetensors shards of 32 MiB tensors, as a model of several gigabytes has them, and their index."""
    import numpy
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    block = numpy.frombuffer(os.urandom(TENSOR), dtype=numpy.uint8)
    paths, weight_map = [], {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"layer.{number}.{k}": numpy.roll(block, 4099 * (number * 100 + k))
            for k in range(total // shards // TENSOR)
        }
        save_file(tensors, directory / name)
        weight_map.update(dict.fromkeys(tensors, name))
        paths.append(directory / name)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def make_llama(directory: Path, total: int) -> list[Path]:
    """A randomly initialised Llama of about that many bytes in bf16, in at least 4 shards."""
    code = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.bfloat16)
layer = 2 * (4 * 2048**2 + 3 * 2048 * 8192)
config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=16,
    vocab_size=8192, num_hidden_layers=max(1, {total} // layer), tie_word_embeddings=False)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = model.to_empty(device="cpu")
for number, parameter in enumerate(model.parameters()):
    parameter.data.fill_(1.0 + number / 256)
model.save_pretrained({str(directory)!r}, max_shard_size="{total // 4 // 10**6 + 1}MB")
"""
    common.run([sys.executable, "-c", code], timeout=600)
    return sorted(directory.glob("*.safetensors"))


def load(code: str, arguments: Sequence[Path], copies: int) -> tuple[float, int]:
    """(seconds of the slowest, bytes of each) of that many loads at once, imports not counted."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    crew = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=loader_environment())
        for _ in range(copies)
    ]
    time.sleep(3.0 + copies)  # the imports, beside each other; then all begin at once
    for child in crew:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    seconds, total = 0.0, 0
    for child in crew:
        out, _ = child.communicate(timeout=600)
        if child.returncode:
            raise RuntimeError(f"a load ended with {child.returncode}")
        took, counted = out.split()
        seconds, total = max(seconds, float(took)), int(counted)
    return seconds, total


def loader_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TRANSFORMERS_VERBOSITY": "error"}


@contextlib.contextmanager
def quiet(served: daemon.Daemon) -> Iterator[None]:
    """Nothing is held or staged any more: evicting would meet mapped pages or a new readahead."""
    time.sleep(5.5)
    yield


def measure(
    title: str,
    pairs: int,
    sides: dict[str, Callable[[], tuple[float, int]]],
    evicted: dict[str, list[Path]],
    served: daemon.Daemon,
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {side: [] for side in sides}
    ceilings: list[float] = []
    total = 0
    for number in range(pairs):
        ceilings.append(common.direct_ceiling(evicted["plain"]))
        for side in list(sides)[:: 1 if number % 2 else -1]:
            with quiet(served):
                common.evict([path for paths in evicted.values() for path in paths])
            seconds, total = sides[side]()
            samples[side].append(seconds)
        rates = {side: total / values[-1] / 1e9 for side, values in samples.items()}
        print(
            f"  {title}, pair {number + 1}: mount {rates['mount']:.2f} GB/s, plain {rates['plain']:.2f} GB/s, "
            f"ratio {samples['plain'][-1] / samples['mount'][-1]:.2f}, O_DIRECT {ceilings[-1]:.2f} GB/s",
            flush=True,
        )
    return {
        "bytes": total,
        "mount_seconds": summary(samples["mount"]),
        "plain_seconds": summary(samples["plain"]),
        "mount_times_faster": ratios(samples["mount"], samples["plain"]),
        "direct_gb_per_s": summary(ceilings),
    }


def memory(served: daemon.Daemon, mounted: list[Path], stored: list[Path], code: str) -> dict[str, Any]:
    """What a load that finds every byte in the page cache adds to the daemon."""
    load(code, mounted, 1)
    total = sum(path.stat().st_size for path in stored)
    before = daemon.memory(served.child.pid)["rss"]
    load(code, mounted, 1)
    found = {
        "bytes": total,
        "daemon_rss_before": before,
        "daemon_rss_grew": daemon.memory(served.child.pid)["rss"] - before,
        "store_resident": sum(map(common.resident_bytes, stored)),
    }
    print(
        f"  warm load of {total / 1e9:.2f} GB, {found['store_resident'] / 1e9:.2f} GB of the store in the page cache: "
        f"daemon RSS {before / 1e6:.1f} MB {found['daemon_rss_grew'] / 1e6:+.2f} MB"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=3 * GIB + 256 * MIB)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4, help="[staging] threads")
    parser.add_argument("--transformers", type=common.size, default=0, help="bytes of the Llama (0: leave it out)")
    parser.add_argument("--dir", help="where both sides lie (default: the temporary directory)")
    parser.add_argument("--transport", choices=("passthrough", "bind"), default="passthrough")
    parser.add_argument("--name", help="of the result file (default: staging, staging-TRANSPORT)")
    options = parser.parse_args()
    code = SAFE_OPEN.format(tensor=TENSOR)
    result: dict[str, Any] = {"pairs": options.pairs, "copies": options.copies, "threads": options.threads}
    result["transport"] = options.transport
    config = f'[staging]\nthreads = {options.threads}\n[mount]\ntransport = "{options.transport}"\n'
    rows: list[list[str]] = []
    with common.workspace(options.dir) as work:
        plain = {"safe_open": make_shards(work / "plain", options.size, options.shards)}
        if options.transformers:
            plain["from_pretrained"] = make_llama(work / "llama", options.transformers)
        with daemon.daemon(work, config=config) as served:
            for name, paths in plain.items():
                served.cli("add", name.replace("_", "-"), f"file://{paths[0].parent}")
                served.cli("warm", name.replace("_", "-"), "--wait")
            common.let_writes_end()
            for name, paths in plain.items():
                pipeline = name.replace("_", "-")
                mounted = [served.mount / pipeline / path.name for path in paths]
                stored = [next(served.store.glob(f"slots/{pipeline}/*/files/{path.name}")) for path in paths]
                if options.transport == "bind":
                    common.wait_for(lambda both=(mounted, stored): all(map(os.path.samefile, *both)), "the binds", 10.0)
                knobs = {"plain": common.read_ahead_kb(paths[0]), "store": common.read_ahead_kb(stored[0])}
                print(f"{name}: {options.transport}, read_ahead_kb {knobs}")
                if knobs["plain"] != knobs["store"]:
                    raise RuntimeError("the two sides do not read ahead alike")
                if name == "safe_open":
                    sides = {
                        "mount": lambda files=mounted: load(code, files, options.copies),
                        "plain": lambda files=paths: load(code, files, options.copies),
                    }
                else:
                    sides = {
                        "mount": lambda where=mounted[0].parent: load(FROM_PRETRAINED, [where], options.copies),
                        "plain": lambda where=paths[0].parent: load(FROM_PRETRAINED, [where], options.copies),
                    }
                found = measure(name, options.pairs, sides, {"plain": paths, "mount": stored}, served)
                result[name] = {"read_ahead_kb": knobs, "shards": len(paths), **found}
                if name == "safe_open":
                    result["memory"] = memory(served, mounted, stored, code)
                median = {
                    side: found["bytes"] / statistics.median(found[f"{side}_seconds"]["values"]) / 1e9 for side in sides
                }
                share = found["mount_times_faster"]
                rows.append(
                    [
                        name,
                        f"{found['bytes'] / 1e9:.2f} GB in {len(paths)}",
                        f"{median['mount']:.2f}",
                        f"{median['plain']:.2f}",
                        f"{share['median']:.2f} ({share['min']:.2f}–{share['max']:.2f})",
                        f"{found['direct_gb_per_s']['median']:.2f}",
                    ]
                )
    print()
    print(table(["load", "size", "mount GB/s", "plain GB/s", "times faster (range)", "O_DIRECT GB/s"], rows))
    passed = options.transport == "passthrough"
    common.write_result(options.name or ("staging" if passed else f"staging-{options.transport}"), result)


if __name__ == "__main__":
    main()
