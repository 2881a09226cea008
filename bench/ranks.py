"""Eight processes that each map every shard of a cold pipeline, as tensor-parallel ranks do, against one process.

    scripts/bench ranks [--size 1GiB] [--shards 4] [--ranks 8] [--rounds 5] [--transport passthrough|pyfuse3]

The pipeline's source is nginx behind the test hub. Each round evicts it, lets N processes map and copy out every shard
from beginning to end, and stops when the last of them is done; one and eight by turns, and both again on the warm
pipeline: what eight copies of the bytes cost without any fetching. That each chunk is fetched once, and is right, is
shown by tests/e2e/test_many_processes.py.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import GIB, MIB, ratios, summary, table
from bench.origins import hub


def load(paths: list[Path]) -> None:
    buffer = memoryview(bytearray(MIB))
    for path in paths:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
            view = memoryview(area)
            for offset in range(0, len(view), MIB):
                piece = view[offset : offset + MIB]
                buffer[: len(piece)] = piece
                piece.release()
            view.release()


def load_by(count: int, paths: list[Path]) -> float:
    """Seconds until ``count`` forked processes have all loaded ``paths``. Raises RuntimeError if one fails."""
    started = time.monotonic()
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 1
        try:
            load(paths)
            status = 0
        finally:
            os._exit(status)
    if any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids):
        raise RuntimeError("a process failed")
    return time.monotonic() - started


def evict(served: daemon.Daemon) -> None:
    """As soon as the kernel has let go of the files and the last of them is sealed."""
    common.wait_for(lambda: served.status("p")["state"] == "warm", "the seal", 120)
    for attempt in range(50):
        try:
            served.cli("evict", "p")
            return
        except RuntimeError:
            if attempt == 49:
                raise
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=GIB)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the store lies (default: the temporary directory)")
    parser.add_argument("--transport", choices=("passthrough", "pyfuse3"), default="passthrough")
    parser.add_argument("--name", default="ranks", help="of the result file")
    options = parser.parse_args()
    times: dict[str, dict[int, list[float]]] = {"cold": {}, "warm": {}}
    with common.workspace(options.dir) as work:
        model = common.make_model(work / "model", options.size, options.shards)
        with hub(work / "origin", {"bench/model": model}) as (server, _):
            config = (
                f'[mount]\ntransport = "{options.transport}"\n[origins.huggingface]\nendpoint = "{server.endpoint}"\n'
            )
            with daemon.daemon(work, config=config) as served:
                served.cli("add", "p", "hf://bench/model")
                paths = [served.mount / "p" / path.name for path in model.shards]
                for number in range(options.rounds):
                    for count in (1, options.ranks) if number % 2 else (options.ranks, 1):
                        common.let_writes_end()
                        for state, found in times.items():
                            found.setdefault(count, []).append(load_by(count, paths))
                            print(f"  round {number + 1}: {count} on {state}: {found[count][-1]:.2f} s", flush=True)
                        evict(served)
    result: dict[str, Any] = {
        "transport": options.transport,
        "bytes": options.size,
        "shards": options.shards,
        "ranks": options.ranks,
        "rounds": options.rounds,
    }
    rows = []
    for state, found in times.items():
        share = ratios(found[1], found[options.ranks])
        result[state] = {"one": summary(found[1]), "all": summary(found[options.ranks]), "all_divided_by_one": share}
        medians = [f"{statistics.median(values):.2f}" for _, values in sorted(found.items())]
        rows.append([state, *medians, f"{share['median']:.2f} ({share['min']:.2f}–{share['max']:.2f})"])
    print()
    print(table(["pipeline", "one process, s", f"{options.ranks} processes, s", "ratio (range)"], rows))
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
