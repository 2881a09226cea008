"""Many pipelines, many files: the eviction planner, opening a large index, starting with and listing a large library.

    scripts/bench scale [--pipelines 10000] [--files 1000000] [--large 100000] [--only PART,PART]

Parts: ``first look`` (the longest that another pipeline's file waits for an answer while somebody looks into a pipeline
of ``--large`` files for the first time), ``planner`` (core/eviction decides over that many pipelines), ``index`` (opens
with that many file records: time and growth of rss, in a fresh process; and once more with every record read), ``ls``
(`ls` of a mount with that many pipelines, `instantstart ls`, start of the daemon), ``library`` (a library of that many
complete files: start, first look into a pipeline, memory). A start is measured from the process's beginning until the
mount answers. What is made for it lies in memory (/dev/shm) where that can be had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bench import common, daemon
from bench.common import run, show_size, summary, table
from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.catalog.summaries import summary_of
from instantstart_fs.core.eviction import Budget, Candidate, admit, plan
from instantstart_fs.core.manifest import Digest, Manifest, ManifestFile, ModelManifest, ModelSpec, PipelineSpec
from instantstart_fs.filler.target import FileState
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, SummaryRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobstore import BlobStore

TARGETS = {"first look": 0.020, "planner": 0.010, "index": 1.0, "ls": 0.5, "start": 1.0}
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


def fill_store(root: Path, count: int, files: int, *, warm: bool = False, first: int = 0) -> None:
    """A store of ``count`` cold pipelines, as `add` leaves them; or of warm ones, as it is a minute after their fill
    (but for the bytes, which nobody reads here)."""
    # Small ones where they count as cached: the evictor would make room at once.
    size = 4096 if warm else 1 << 30
    entries = tuple(
        ManifestFile(name := f"model-{number:05}-of-{files:05}.safetensors", size, name, digest=_SHA256)
        for number in range(files)
    )
    with BlobStore.open(str(root)) as store, Index.open(str(root / "index")) as made:
        for number in range(first, first + count):
            name = f"p{number:06}"
            spec = PipelineSpec(name, (ModelSpec("file:///x"),))
            manifest = Manifest(name, 1, 8 << 20, (ModelManifest("", "file:///x", "r", entries),), 0)
            store.metadata.write_pipeline(spec)
            store.metadata.write_manifest(manifest)

            def record(
                txn: WriteTxn, name: str = name, spec: PipelineSpec = spec, manifest: Manifest = manifest
            ) -> None:
                root_nodeid, base = txn.reserve_nodeids(2), txn.reserve_nodeids(2 * (files + 1))
                directories = {"": root_nodeid}
                pipeline = Pipeline(spec, directories, pinned=False, created_at_ns=1)
                generation = Generation(pipeline, manifest, base, _no_origin)
                generation.set_absent()
                txn.put_pipeline(PipelineRecord(spec, 1, 2, directory_nodeids=directories, created_at_ns=1))
                txn.put_generation(GenerationRecord(name, 1, base, files, 8 << 20))
                for file in generation.files if warm else ():
                    file.state = FileState.SEALED
                    generation.set_allocated(file, size)
                    txn.put_file(name, 1, file.entry.index, FileRecord("sealed", allocated=size))
                generation.invalidate_counts()
                txn.put_summary(name, summary_of(generation))

            made.write_sync(record)


_SHA256 = Digest("sha256", "ab" * 32)


def _no_origin(spec: PipelineSpec, model: ModelSpec) -> NoReturn:
    raise AssertionError("nothing is fetched here")


def summaries(store: Path) -> dict[str, SummaryRecord]:
    with Index.open(str(store / "index")) as index:
        return index.read(lambda txn: dict(txn.summaries()))


def put_summaries(store: Path, found: Mapping[str, SummaryRecord], *, there: bool) -> None:
    def write(txn: WriteTxn) -> None:
        for name, record in found.items():
            txn.delete_summary(name)
            if there:
                txn.put_summary(name, record)

    with Index.open(str(store / "index")) as index:
        index.write_sync(write)


def starts(work: Path, name: str, rounds: int) -> dict[str, Any]:
    """The daemon's start, interleaved: with an empty store, with ``name``'s as it is, and with the same where every
    pipeline has to be read whole (as every start did before there were summaries, and as the first one after does)."""
    store = work / f"{name}-store"
    known = summaries(store)
    seconds: dict[str, list[float]] = {"empty store": [], "start": [], "start, all read whole": []}
    rss: dict[str, list[float]] = {what: [] for what in seconds}
    cpu: dict[str, list[float]] = {what: [] for what in seconds}
    for _ in range(rounds):
        for what, which in (("empty store", "empty"), ("start", name), ("start, all read whole", name)):
            if which == name:
                put_summaries(store, known, there=what == "start")
            with daemon.daemon(work, name=which) as served:
                seconds[what].append(served.ready_after)
                rss[what].append(daemon.memory(served.child.pid)["rss"])
                cpu[what].append(daemon.cpu_seconds(served.child.pid))
    put_summaries(store, known, there=True)
    result: dict[str, Any] = {what: summary(values) for what, values in seconds.items()}
    result.update({f"{what}: processor": summary(values) for what, values in cpu.items()})
    result.update({f"{what}: rss": statistics.median(values) for what, values in rss.items()})
    return result


def listing(work: Path, count: int, files: int, rounds: int) -> dict[str, Any]:
    fill_store(work / "scale-store", count, files)
    result: dict[str, Any] = {"pipelines": count, "files_each": files, **starts(work, "scale", rounds)}
    with daemon.daemon(work, name="scale") as served:
        first = run(["ls", str(served.mount)])[0]
        result["ls, first"] = summary([first])
        for what, command in (
            ("ls", lambda: run(["ls", str(served.mount)])[0]),
            ("ls -l", lambda: run(["ls", "-l", str(served.mount)])[0]),
            ("ls .cold", lambda: run(["ls", str(served.mount / ".cold")])[0]),
            ("instantstart ls --json", lambda: served.cli("ls", "--json")[0]),
        ):
            clock = daemon.Clock([served.child.pid])
            result[what] = summary([command() for _ in range(rounds)])
            result[f"{what}: daemon's processor"] = summary([clock.spent()[served.child.pid] / rounds])
        result["rss after ls"] = daemon.memory(served.child.pid)["rss"]
        if len(os.listdir(served.mount)) < count:
            raise SystemExit("pipelines are missing")
    return result


def library(work: Path, files: int, each: int, rounds: int, rests: float) -> dict[str, Any]:
    """A store of ``files`` complete files: its start, the first look into one pipeline of it, and memory while and
    after all of it is looked into."""
    count = files // each
    fill_store(work / "library-store", count, each, warm=True)
    result: dict[str, Any] = {"files": files, "pipelines": count, **starts(work, "library", rounds)}
    with daemon.daemon(work, name="library") as served:
        names = sorted(name for name in os.listdir(served.mount) if not name.startswith("."))
        if len(names) != count or len(os.listdir(served.mount / ".warm")) != count:
            raise SystemExit("pipelines are missing")
        firsts, again = [], []
        for name in names[: 10 * rounds]:
            for kept in (firsts, again):
                began = time.perf_counter()
                os.stat(served.mount / name / f"model-00000-of-{each:05}.safetensors")
                kept.append(time.perf_counter() - began)
        result["first stat in a pipeline"], result["second stat in it"] = summary(firsts), summary(again)
        result["rss after these"] = daemon.memory(served.child.pid)["rss"]
        began = time.perf_counter()
        found = sum(len(os.listdir(served.mount / name)) for name in names)
        result["all pipelines listed"] = summary([time.perf_counter() - began])
        if found != files:
            raise SystemExit("files are missing")
        result["rss after all"] = daemon.memory(served.child.pid)["rss"]
        # Once nobody looks any more, most of it is let go of (catalog/residency.py).
        time.sleep(rests)
        result[f"rss {rests:.0f} s later"] = daemon.memory(served.child.pid)["rss"]
    return result


_STAT = """
import json, os, sys, time
path, worst, count = sys.argv[1], 0.0, 0
os.stat(path)
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    began = time.perf_counter()
    os.listxattr(path)  # unlike stat, always answered by the daemon
    worst, count = max(worst, time.perf_counter() - began), count + 1
    time.sleep(0.001)
print(json.dumps([worst, count]))
"""


def first_look(work: Path, large: int, rounds: int) -> dict[str, Any]:
    """Interleaved: nobody else about; while a pipeline of ``large`` files is looked into."""
    fill_store(work / "look-store", 1, 10, warm=True)
    fill_store(work / "look-store", 1, large, warm=True, first=1)
    waits: dict[str, list[float]] = {"nobody else": [], "a first look": []}
    looks = []
    for number in range(2 * rounds):
        what, end = list(waits)[number % 2], work / f"end{number}"
        with daemon.daemon(work, name="look") as served:
            small = served.mount / "p000000" / "model-00000-of-00010.safetensors"
            command = [sys.executable, "-c", _STAT, str(small), str(end)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                child.stdout.readline()
                began = time.perf_counter()
                if what == "a first look":
                    os.stat(served.mount / "p000001" / f"model-00000-of-{large:05}.safetensors")
                    looks.append(time.perf_counter() - began)
                else:
                    time.sleep(1.0)
                end.touch()
                worst, count = json.loads(child.stdout.read())
                if count < 10:
                    raise SystemExit(f"too few questions were asked: {count}, {worst:.3f} s, {looks}")
                waits[what].append(worst)
    return {
        "files": large,
        "it takes": summary(looks),
        **{f"longest wait of another, {what}": summary(values) for what, values in waits.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--files-each", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="first look,planner,index,ls,library")
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument(
        "--rests", type=float, default=150.0, help="Seconds after which the library's memory is looked at."
    )
    parser.add_argument("--dir", default="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    options = parser.parse_args()
    parts = set(options.only.split(","))
    result: dict[str, Any] = {"targets": TARGETS}
    with common.workspace(options.dir) as work:
        if "first look" in parts:
            result["first look"] = first_look(work, options.large, options.rounds)
        if "planner" in parts:
            result["planner"] = planner(options.pipelines, 10 * options.rounds)
        if "index" in parts:
            result["index"] = index(work, options.files, options.rounds)
        if "ls" in parts:
            result["ls"] = listing(work, options.pipelines, options.files_each, options.rounds)
        if "library" in parts:
            result["library"] = library(work, options.files, 1000, options.rounds, options.rests)
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
