"""Disk to memory without a GPU: the prefetch helper's CPU device against fio's O_DIRECT ceiling, load_file and rivals.

    python -m bench.prefetch [--size 3GiB] [--shards 4] [--rounds 5] [--readers 8] [--dir DIR]

The page cache is proven empty before each measurement. Interleaved: each round runs every way once, in a turning order.
Seconds are of loading alone (process start left out), for all of them; `prefetch, whole` adds the helper's start.
fastsafetensors and the run:ai streamer take part where they are installed (`pip install fastsafetensors
runai-model-streamer`, beside torch); what is missing is listed. Rates are GB/s of 10**9 bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from bench import common
from instantstart_fs.prefetch.backends.direct import CPU_READERS

LOADERS = {
    "load_file": """
        from safetensors.torch import load_file
        import torch
        def load(paths):
            # As an engine uses it: load_file maps, and the pages are read when the parameters are filled.
            return [tensor.clone() for path in paths for tensor in load_file(path).values()]
    """,
    "fastsafetensors": """
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup
        def load(paths):
            loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
            loader.add_filenames({0: paths})
            buffers = loader.copy_files_to_device()
            return loader, buffers, [buffers.get_tensor(name) for name in loader.get_keys()]
    """,
    "runai_model_streamer": """
        from runai_model_streamer import SafetensorsStreamer
        def load(paths):
            with SafetensorsStreamer() as streamer:
                streamer.stream_files(paths)
                return [tensor for _, tensor in streamer.get_tensors()]
    """,
}


def load_in_process(name: str, paths: list[str]) -> dict[str, float]:
    """Seconds of ``load`` itself in a fresh interpreter that has imported what it needs."""
    program = textwrap.dedent(LOADERS[name]) + textwrap.dedent("""
        import sys, time
        started = time.monotonic()
        kept = load(sys.argv[1:])
        print("SECONDS", time.monotonic() - started)
    """)
    _, out = common.run([sys.executable, "-c", program, *paths])
    return {"seconds": float(out.rpartition("SECONDS")[2])}


FIO = {"fio, depth 4": (1, 4), "fio, depth 8": (1, 8), "fio, depth 16": (1, 16), "fio, a job a shard, depth 4": (0, 4)}
"""(jobs, 0: one for each shard; io_uring's depth in each): the ceiling is what fio does best with, in the same run."""


def fio(files: list[Path], jobs: int, depth: int) -> dict[str, float]:
    """The same files, each once, O_DIRECT, 8 MiB at a time."""
    command = [
        "fio", "--rw=read", "--bs=8M", "--direct=1", "--ioengine=io_uring", "--readonly", f"--iodepth={depth}",
        "--group_reporting", "--output-format=json", "--file_service_type=sequential",
    ]  # fmt: skip
    paths = [str(path) for path in files]
    for number, names in enumerate(paths if jobs == 0 else [":".join(paths)]):
        command += [f"--name=ceiling{number}", f"--filename={names}"]
    _, out = common.run(command)
    report = json.loads(out[out.index("{") :])["jobs"][0]["read"]
    assert report["io_bytes"] == sum(path.stat().st_size for path in files), report["io_bytes"]
    return {"seconds": report["runtime"] / 1000}


def prefetch(directory: Path, backend: str, readers: int) -> dict[str, float]:
    from instantstart_fs.prefetch import DirectorySource, Stager, plan

    source = DirectorySource(str(directory))
    with Stager(source, backend=backend, readers=readers).start(plan(source.weights, None, ["cpu"])) as stage:
        stage.wait(600)
        (report,) = stage.progress()
    assert report.backend == backend
    return {"seconds": report.loading, "whole": report.seconds, "cached_share": report.cached / report.bytes}


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=3 * common.GIB)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--readers", type=counts, default=[CPU_READERS], help="of the helper, such as 4,8,16")
    parser.add_argument("--only", default="", help="ways whose names begin with one of these: fio,prefetch")
    parser.add_argument("--dir", help="where the checkpoint lies (default: the temporary directory)")
    parser.add_argument("--name", default="prefetch", help="of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isfs-bench-", dir=options.dir) as work:
        model = common.make_model(Path(work) / "model", options.size, options.shards)
        total = model.weight_bytes
        paths = [str(path) for path in model.shards]
        missing = [name for name in LOADERS if name != "load_file" and importlib.util.find_spec(name) is None]
        ways: dict[str, Any] = {
            **{name: lambda way=way: fio(model.shards, *way) for name, way in FIO.items()},
            **{
                f"prefetch direct, {count} readers": lambda count=count: prefetch(model.directory, "direct", count)
                for count in options.readers
            },
            "prefetch mmap": lambda: prefetch(model.directory, "mmap", 0),
        }
        for name in LOADERS:
            if name not in missing:
                ways[name] = lambda name=name: load_in_process(name, paths)

        wanted = tuple(options.only.split(","))
        ways = {name: way for name, way in ways.items() if name.startswith(wanted)}

        def emptied(way: Any) -> Any:
            def run() -> dict[str, float]:
                common.drop_caches()
                common.evict(model.shards)  # and proves that nothing stayed
                found: dict[str, float] = way()
                return found

            return run

        rounds = common.Rounds({name: emptied(way) for name, way in ways.items()}, options.rounds)
        rounds.run()
    result: dict[str, Any] = {"bytes": total, "shards": options.shards, "rounds": options.rounds, "missing": missing}
    ceilings = [name for name in ways if name.startswith("fio")]
    best = min(ceilings, key=lambda name: common.summary(rounds.seconds(name))["median"])
    rows = []
    for name in ways:
        seconds = rounds.seconds(name)
        share = common.ratios(seconds, rounds.seconds(best))
        result[name] = {"samples": rounds.samples[name], "seconds": common.summary(seconds), "share_of_ceiling": share}
        rates = sorted(total / value / 1e9 for value in seconds)
        rows.append(
            [
                name,
                f"{rates[len(rates) // 2]:.2f} ({rates[0]:.2f}–{rates[-1]:.2f})",
                f"{share['median']:.2f} ({share['min']:.2f}–{share['max']:.2f})",
            ]
        )
    print()
    print(common.table(["way", "GB/s (range)", f"share of {best} (range)"], rows))
    print("not run: " + (", ".join(f"{name} (is not installed)" for name in missing) or "nothing"))
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
