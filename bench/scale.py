"""Many pipelines, many files: the eviction planner, opening a large index, listing a large mount.

    scripts/bench scale [--pipelines 10000] [--files 1000000] [--only PART,PART]

Parts: ``planner`` (core/eviction decides over that many pipelines), ``index`` (opens with that many file records: time
and growth of rss, in a fresh process; and once more with every record read), ``ls`` (`ls` of a mount with that many
pipelines, `instantstart ls`, start of the daemon). What is made for it lies in memory (/dev/shm) where that can be had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import run, show_size, summary, table
from instantstart_fs.core.eviction import Budget, Candidate, admit, plan
from instantstart_fs.core.manifest import Manifest, ManifestFile, ModelManifest, ModelSpec, PipelineSpec
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobstore import BlobStore

TARGETS = {"planner": 0.010, "index": 1.0, "ls": 0.5}
"""Seconds."""


def planner(count: int, rounds: int) -> dict[str, Any]:
    generator = random.Random(1)
    candidates = [
        Candidate(
            pipeline=f"p{number:06}",
            bytes=generator.randrange(1, 40) << 30,
            last_request=generator.uniform(0.0, 1e6),
            hot=generator.random() < 0.2,
            pinned=generator.random() < 0.05,
            open=generator.random() < 0.05,
            partial=generator.random() < 0.1,
        )
        for number in range(count)
    ]
    usage = sum(candidate.bytes for candidate in candidates)
    result: dict[str, Any] = {}
    for what, budget in (("some go", Budget(int(usage * 1.02))), ("nearly all go", Budget(usage // 2))):
        seconds, chosen = [], 0
        for _ in range(rounds):
            began = time.perf_counter()
            chosen = len(plan(usage, budget, candidates, 2e6))
            seconds.append(time.perf_counter() - began)
        result[f"{what} ({chosen})"] = summary(seconds)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        admit(usage, Budget(usage), candidates, 2e6, 100 << 30)
        seconds.append(time.perf_counter() - began)
    result["an admission"] = summary(seconds)
    return result


_OPEN = """
import json, os, sys, time
from instantstart_fs.index.environment import Index
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = rss()
began = time.perf_counter()
index = Index.open(sys.argv[1])
opened, after = time.perf_counter() - began, rss()
began = time.perf_counter()
with index.reading() as txn:
    count = sum(1 for pipeline in txn.pipelines() for _ in txn.files(pipeline.spec.id, 1))
print(json.dumps({"open": opened, "open_rss": after - before, "scan": time.perf_counter() - began,
                  "scan_rss": rss() - before, "count": count}))
index.close()
"""


def index(work: Path, files: int, rounds: int) -> dict[str, Any]:
    path, each = work / "index", 1000
    with Index.open(str(path)) as made:

        def fill(txn: WriteTxn, number: int) -> None:
            name = f"p{number:06}"
            txn.put_pipeline(PipelineRecord(PipelineSpec(name, (ModelSpec("file:///x"),)), 1))
            txn.put_generation(GenerationRecord(name, 1, txn.reserve_nodeids(2 * each), each, 8 << 20))
            for file in range(each):
                txn.put_file(name, 1, file, FileRecord("sealed", allocated=5 << 30))

        for number in range(files // each):
            made.write_sync(lambda txn, number=number: fill(txn, number))  # type: ignore[misc]
    size = (path / "data.mdb").stat().st_blocks * 512
    samples = [json.loads(run([sys.executable, "-c", _OPEN, str(path)])[1]) for _ in range(rounds)]
    if samples[0]["count"] != files:
        raise SystemExit("records are missing")
    return {
        "records": files,
        "bytes_on_disk": size,
        "open": summary([sample["open"] for sample in samples]),
        "open_rss": statistics.median(sample["open_rss"] for sample in samples),
        "read every record": summary([sample["scan"] for sample in samples]),
        "read_rss": statistics.median(sample["scan_rss"] for sample in samples),
    }


def fill_store(root: Path, count: int, files: int) -> None:
    """A store of ``count`` cold pipelines, as `add` leaves them."""
    entries = tuple(
        ManifestFile(f"model-{number:05}-of-{files:05}.safetensors", 1 << 30, "x") for number in range(files)
    )
    with BlobStore.open(str(root)) as store, Index.open(str(root / "index")) as made:
        for number in range(count):
            name = f"p{number:06}"
            spec = PipelineSpec(name, (ModelSpec("file:///x"),))
            store.write_pipeline(spec)
            store.write_manifest(Manifest(name, 1, 8 << 20, (ModelManifest("", "file:///x", "r", entries),), 0))

            def record(txn: WriteTxn, name: str = name, spec: PipelineSpec = spec) -> None:
                base = txn.reserve_nodeids(2)
                txn.put_pipeline(PipelineRecord(spec, 1, 2, directory_nodeids={"": base}, created_at_ns=1))
                txn.put_generation(GenerationRecord(name, 1, txn.reserve_nodeids(2 * (files + 1)), files, 8 << 20))

            made.write_sync(record)


def listing(work: Path, count: int, files: int, rounds: int) -> dict[str, Any]:
    fill_store(work / "scale-store", count, files)
    with daemon.daemon(work, name="scale") as served:
        result: dict[str, Any] = {
            "pipelines": count,
            "files_each": files,
            "start": served.ready_after,
            "rss": daemon.memory(served.child.pid)["rss"],
        }
        first = run(["ls", str(served.mount)])[0]
        result["ls, first"] = summary([first])
        for what, command in (
            ("ls", lambda: run(["ls", str(served.mount)])[0]),
            ("ls -l", lambda: run(["ls", "-l", str(served.mount)])[0]),
            ("ls .cold", lambda: run(["ls", str(served.mount / ".cold")])[0]),
            ("instantstart ls --json", lambda: served.cli("ls", "--json")[0]),
        ):
            result[what] = summary([command() for _ in range(rounds)])
        if len(os.listdir(served.mount)) < count:
            raise SystemExit("pipelines are missing")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--files-each", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="planner,index,ls")
    parser.add_argument("--dir", default="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    options = parser.parse_args()
    parts = set(options.only.split(","))
    result: dict[str, Any] = {"targets": TARGETS}
    with common.workspace(options.dir) as work:
        if "planner" in parts:
            result["planner"] = planner(options.pipelines, 10 * options.rounds)
        if "index" in parts:
            result["index"] = index(work, options.files, options.rounds)
        if "ls" in parts:
            result["ls"] = listing(work, options.pipelines, options.files_each, options.rounds)
    rows = []
    for part, values in result.items():
        for key, value in values.items():
            if isinstance(value, dict):
                rows.append([part, key, f"{value['median'] * 1000:.1f} ms"])
            else:
                rows.append([part, key, show_size(value) if "rss" in key or "bytes" in key else f"{value:g}"])
    print(table(["part", "", "median"], rows), flush=True)
    common.write_result("scale", result)


if __name__ == "__main__":
    main()
