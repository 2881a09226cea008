"""Reading the last byte of a cold file while it fills: it must wait for about one chunk, not for the file.

    scripts/bench demand [--size 1GiB] [--rate 1gbit] [--rounds 5]

Everything runs in a network namespace of its own whose loopback is limited by tc (tbf): the whole origin has that
bandwidth, over all connections. Each round: a cold pipeline, `warm`, 1.5 s later a pread of the file's last 4 KiB, and
then one in the middle of what is still missing. Against: the time that one chunk takes alone on that line (curl, idle
line), and the same request by curl while the bare client fetches with 16 connections that nobody holds back.
Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import common, daemon, origins
from bench.common import GIB, MIB, run, show_size, summary, table

CHUNK = 8 * MIB
HEAD_START = 1.5


def parse_rate(text: str) -> float:
    """Bytes per second of a tc rate (``1gbit``, ``400mbit``)."""
    number = float(text.rstrip("bitgmk"))
    return number * {"g": 1e9, "m": 1e6, "k": 1e3}[text[len(text.rstrip("bitgmk"))]] / 8


def limit(rate: str) -> None:
    # Packets as on Ethernet: loopback's of 64 KiB would fill the queue with a few connections' first windows.
    run(["ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1"])
    run(["ip", "link", "set", "lo", "up"])
    # A queue of 50 ms, as a router has: what is already under way delays whoever comes next.
    run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])


def measure(work: Path, size: int, rounds: int) -> dict[str, list[float]]:
    model = common.make_model(work / "model", size, 1)
    shard = model.shards[0]
    length = shard.stat().st_size
    samples: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        samples.setdefault(what, []).append(seconds)
        print(f"  {what:<58} {seconds:.3f}", flush=True)

    with (
        origins.hub(work / "hub", {"bench/model": model}) as (hub, cdn),
        daemon.daemon(work, env={"HF_ENDPOINT": hub.endpoint}) as served,
    ):
        url = f"{cdn}/bench/model/{shard.name}"
        last_chunk = (length - 1) // CHUNK * CHUNK
        curl = ["curl", "-s", "-f", "-o", "/dev/null", "-r", f"{last_chunk - CHUNK}-{last_chunk - 1}", url]
        for number in range(rounds):
            print(f"round {number + 1}/{rounds}", flush=True)
            note("one chunk alone on the line (curl)", run(curl)[0])
            name = f"demand-{number}"
            served.cli("add", name, "hf://bench/model")
            served.cli("warm", name)
            time.sleep(HEAD_START)
            with open(served.mount / name / shard.name, "rb", buffering=0) as file:
                started = time.monotonic()
                got = os.pread(file.fileno(), 4096, length - 4096)
                note("ours: the last 4 KiB during the fill", time.monotonic() - started)
                with shard.open("rb") as truth:
                    if os.pread(truth.fileno(), 4096, length - 4096) != got:
                        raise SystemExit("WRONG BYTES")
                at = length * 3 // 4
                started = time.monotonic()
                os.pread(file.fileno(), 4096, at)
                note("ours: 4 KiB at three quarters", time.monotonic() - started)
                started = time.monotonic()
                os.stat(served.mount / name / "config.json")
                note("ours: a stat meanwhile", time.monotonic() - started)
            state = served.status(name)
            note("ours: share of the file that was here by then", state["cached_bytes"] / max(1, state["total_bytes"]))
            served.cli("remove", name)
            job = [{"url": url, "size": length, "sha256": model.digests[shard.name], "path": str(work / "bare")}]
            (work / "job.json").write_text(json.dumps(job))
            command = [sys.executable, "-m", "bench.bare_client", str(work / "job.json")]
            with common.process(command, log=work / "bare.log"):
                time.sleep(HEAD_START)
                note("the same chunk by curl beside 16 greedy connections", run(curl)[0])
            (work / "bare").unlink()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=GIB)
    parser.add_argument("--rate", default="1gbit", help="of the whole origin, in tc's words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    parser.add_argument("--name", default="demand", help="of the result file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        arguments = [word for word in sys.argv[1:] if word != "--inside"]
        sys.exit(subprocess.call(["unshare", "-n", sys.executable, "-m", "bench.demand", "--inside", *arguments]))
    limit(options.rate)
    bandwidth = parse_rate(options.rate)
    ideal = CHUNK / bandwidth
    with common.workspace(options.dir) as work:
        samples = measure(work, options.size, options.rounds)
    rows = [
        [
            what,
            f"{statistics.median(values):.3f}",
            f"{min(values):.3f}–{max(values):.3f}",
            f"{statistics.median(values) / ideal:.2f}",
        ]
        for what, values in samples.items()
        if "share" not in what
    ]
    whole = options.size / bandwidth
    print(f"\n{show_size(options.size)} at {options.rate}: the file takes {whole:.2f} s, one chunk {ideal:.3f} s")
    print(table(["", "seconds: median", "range", "÷ one chunk's time"], rows))
    result: dict[str, Any] = {
        "bytes": options.size,
        "bytes_per_second": bandwidth,
        "chunk_seconds": ideal,
        "file_seconds": whole,
        "samples": {what: summary(values) for what, values in samples.items()},
    }
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
