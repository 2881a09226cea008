"""What a read costs that there is no room for: by the size of a block (one GET), beside the same read when it is kept.

    scripts/bench through [--rounds 3] [--mib 48] [--latency 0.02]

One file, read once by `dd bs=1M` through a cold mount; a local hub that takes ``latency`` seconds for each answer.
Rounds are interleaved. Seconds, GETs, bytes sent by the origin, and the daemon's peak memory, each as median (range).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.harness import MIB, REPOSITORY, Daemon, model_directory, must
from tests.servers.hub import HubServer

BLOCKS = (256 * 1024, MIB, 4 * MIB, 16 * MIB)
WEIGHTS = "model-00001-of-00001.safetensors"
PATCH = "import instantstart_fs.filler.uncached as direct\ndirect.BLOCK = {block}\ndirect.CACHE_BLOCKS = 8\n"


def one(directory: Path, hub: HubServer, block: int | None, latency: float) -> dict[str, float]:
    """``block`` None: there is room, and it is kept."""
    directory.mkdir(parents=True)
    env: dict[str, str] = {}
    if block is not None:
        (directory / "sitecustomize.py").write_text(PATCH.format(block=block))
        env["PYTHONPATH"] = f"{directory}:{REPOSITORY}"
    config: dict[str, Any] = {
        "store": {"capacity": MIB if block is not None else "100%", "min_free": 0},
        "origins": {"huggingface": {"endpoint": hub.endpoint}},
    }
    with Daemon(directory, config=config, env=env) as daemon:
        daemon.ok("add", "p", "hf://org/model")
        hub.forget_requests()
        hub.fault("latency", port="cdn", seconds=latency)
        began = time.monotonic()
        must("dd", f"if={daemon.path('p', WEIGHTS)}", "of=/dev/null", "bs=1M", timeout=300)
        seconds = time.monotonic() - began
        hub.clear()
        requests = hub.requests("cdn")
        assert (daemon.status("p").get("uncached") is not None) == (block is not None)
        peak = Path(f"/proc/{daemon.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        return {
            "seconds": seconds,
            "gets": len(requests),
            "origin_mb": sum(request.sent for request in requests) / 1e6,
            "peak_mb": int(peak) * 1024 / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=48)
    parser.add_argument("--latency", type=float, default=0.02)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, HubServer() as hub:
        root = Path(scratch)
        hub.publish("org/model", model_directory(root / "model", weights=(given.mib * MIB,)))
        for number in range(given.rounds):
            for block in (None, *BLOCKS):
                name = "kept" if block is None else f"through, {block // 1024} KiB"
                found.setdefault(name, []).append(one(root / f"{number}-{block}", hub, block, given.latency))
    summary = {
        name: {
            key: [statistics.median(values), min(values), max(values)]
            for key in runs[0]
            for values in [[run[key] for run in runs]]
        }
        for name, runs in found.items()
    }
    for name, row in summary.items():
        print(f"{name:20}", "  ".join(f"{key} {a:.2f} ({b:.2f}-{c:.2f})" for key, (a, b, c) in row.items()))
    result = {"rounds": given.rounds, "mib": given.mib, "latency": given.latency, "rows": summary}
    (REPOSITORY / "bench/results/through.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
