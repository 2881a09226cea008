"""What the daemon costs: memory while it fills, CPU while it idles, listings, first byte, many pipelines.

    scripts/bench footprint [--size 2GiB] [--idle 60] [--files 10000] [--pipelines 1000] [--only PART,PART]

Parts: ``fill`` (peak memory of daemon and workers during a fill with 16 connections, by `warm` and by `dd`), ``idle``
(CPU over a minute with a mount and a warm pipeline), ``listing`` (`ls -lR` of 10,000 files, against the same tree in a
plain directory), ``first`` (from `add` to the first byte, against `hf download` of one small file and curl),
``many`` (1,000 pipelines of 30 files: start, memory, `ls`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common, daemon, origins
from bench.common import GIB, MIB, run, show_size, summary, table

RSS_TARGET = 200 * MIB
WORKER_TARGET = 120 * MIB
IDLE_TARGET = 0.1


class Sampler:
    """The greatest rss and pss of some processes while it runs (the kernel keeps a peak of rss, none of pss)."""

    def __init__(self, pids: Callable[[], list[int]], interval: float = 0.1) -> None:
        self._pids, self._interval = pids, interval
        self._stop = threading.Event()
        self.peak: dict[int, dict[str, int]] = {}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            for pid in self._pids():
                try:
                    seen = daemon.memory(pid)
                except OSError:
                    continue
                best = self.peak.setdefault(pid, {"rss": 0, "pss": 0, "peak": 0})
                for key, value in seen.items():
                    best[key] = max(best[key], value)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def fill_and_idle(work: Path, size: int, idle: float, parts: set[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    model = common.make_model(work / "model", size, 4)
    with (
        origins.hub(work / "hub", {"bench/model": model}) as (hub, _),
        daemon.daemon(work, env={"HF_ENDPOINT": hub.endpoint}) as served,
    ):
        main = served.child.pid
        before = daemon.memory(main)
        for how in ("warm", "dd"):
            served.cli("add", how, "hf://bench/model")
            with Sampler(lambda: [main, *served.workers()]) as sampler:
                if how == "warm":
                    served.cli("warm", how, "--wait")
                else:
                    for path in model.shards:
                        run(["dd", f"if={served.mount / how / path.name}", "of=/dev/null", "bs=1M", "status=none"])
            workers = [peak for pid, peak in sampler.peak.items() if pid != main]
            mine = sampler.peak[main]
            result[f"fill by {how}"] = {"daemon": mine, "workers": workers, "daemon_at_start": before}
            ok = mine["peak"] <= RSS_TARGET and all(worker["peak"] <= WORKER_TARGET for worker in workers)
            print(
                f"fill of {show_size(size)} by {how}: daemon peak {show_size(mine['peak'])}"
                f" (pss {show_size(mine['pss'])}; {show_size(before['rss'])} at start), workers "
                + ", ".join(f"{show_size(worker['peak'])} (pss {show_size(worker['pss'])})" for worker in workers)
                + f"  target ≤ 200 / ≤ 120 MiB: {'met' if ok else 'MISSED'}",
                flush=True,
            )
        if "idle" in parts:
            served.cli("remove", "dd")
            time.sleep(5)  # what ended must have ended: the access log, the last commit
            pids = [main, *served.workers()]
            start = time.monotonic()
            # From /proc/PID/stat: a sum over the threads' schedstat would lose those that end meanwhile.
            spent = {pid: daemon.cpu_seconds(pid) for pid in pids}
            time.sleep(idle)
            window = time.monotonic() - start
            share = {pid: (daemon.cpu_seconds(pid) - was) / window * 100 for pid, was in spent.items()}
            total = sum(share.values())
            result["idle"] = {
                "seconds": window,
                "percent_of_one_core": total,
                "daemon": share[main],
                "workers": total - share[main],
                "daemon_rss": daemon.memory(main)["rss"],
            }
            print(
                f"idle for {window:.0f} s with one warm pipeline: {total:.3f} % of a core (daemon {share[main]:.3f} %,"
                f" workers {total - share[main]:.3f} %)  target ≤ {IDLE_TARGET} %: "
                f"{'met' if total <= IDLE_TARGET else 'MISSED'}",
                flush=True,
            )
    return result


def listing(work: Path, count: int, rounds: int) -> dict[str, Any]:
    plain = {"flat": work / "flat", "100 directories": work / "deep"}
    plain["flat"].mkdir()
    for number in range(count):
        deep = plain["100 directories"] / f"d{number % 100:02d}"
        deep.mkdir(parents=True, exist_ok=True)
        for parent in (plain["flat"], deep):
            (parent / f"file-{number:05d}.json").write_bytes(b"{}")
    result: dict[str, Any] = {"files": count}
    rows = []
    with daemon.daemon(work, name="listing") as served:
        for shape, directory in plain.items():
            name = "flat" if shape == "flat" else "deep"
            add, _ = served.cli("add", name, f"file://{directory}")
            times: dict[str, list[float]] = {
                "mount, first": [],
                "mount, again": [],
                "plain, first": [],
                "plain, again": [],
            }
            for _ in range(rounds):
                common.drop_caches()  # the kernel's dentries and inodes go too
                times["mount, first"].append(run(["ls", "-lR", served.mount / name])[0])
                times["mount, again"].append(run(["ls", "-lR", served.mount / name])[0])
                common.drop_caches()
                times["plain, first"].append(run(["ls", "-lR", directory])[0])
                times["plain, again"].append(run(["ls", "-lR", directory])[0])
            lines = run(["ls", "-lR", served.mount / name])[1].count(".json")
            if lines != count:
                raise SystemExit(f"{shape}: {lines} files listed of {count}")
            result[shape] = {"add_seconds": add, **{key: summary(values) for key, values in times.items()}}
            rows.append([shape, f"{add:.2f}", *(f"{statistics.median(values):.3f}" for values in times.values())])
    print(f"ls -lR of {count} files, seconds (median of {rounds})")
    print(table(["", "add", "mount, first", "mount, again", "plain, first", "plain, again"], rows), "\n", flush=True)
    return result


def first_byte(work: Path, rounds: int) -> dict[str, Any]:
    model = common.make_model(work / "first", 256 * MIB, 1)
    shard = model.shards[0].name
    samples: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        samples.setdefault(what, []).append(seconds)

    with (
        origins.hub(work / "first-hub", {"bench/model": model}) as (hub, cdn),
        daemon.daemon(work, env={"HF_ENDPOINT": hub.endpoint}, name="first") as served,
    ):
        for number in range(rounds):
            common.let_writes_end()
            name = f"first-{number}"
            started = time.monotonic()
            add, _ = served.cli("add", name, "hf://bench/model")
            opened = time.monotonic()
            with open(served.mount / name / shard, "rb", buffering=0) as file:
                file.read(8)
            weights = time.monotonic()
            (served.mount / name / "config.json").read_bytes()
            config = time.monotonic()
            note("ours: add (whole process)", add)
            note("ours: first read of the weights after it", weights - opened)
            note("ours: config.json after that", config - weights)
            note("ours: from the start of add to the first byte of weights", weights - started)
            note(
                "curl: the first 8 MiB of the weights",
                run(["curl", "-s", "-f", "-o", "/dev/null", "-r", f"0-{8 * MIB - 1}", f"{cdn}/bench/model/{shard}"])[0],
            )
            program = common.tool("hf")
            if program:
                home = work / "first-home"
                env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
                note("hf download of config.json", run([program, "download", "bench/model", "config.json"], env=env)[0])
                shutil.rmtree(home)
                note("hf download of the whole (256 MiB)", run([program, "download", "bench/model"], env=env)[0])
                shutil.rmtree(home)
            served.cli("remove", name)
    rows = [
        [what, f"{statistics.median(values):.3f}", f"{min(values):.3f}–{max(values):.3f}"]
        for what, values in samples.items()
    ]
    print(table(["from nothing to the first byte", "seconds", "range"], rows), "\n", flush=True)
    return {what: summary(values) for what, values in samples.items()}


_ADD_MANY = """
import sys, time
from instantstart_fs.control.specification import specification
from instantstart_fs.control.client import Client
count, source = int(sys.argv[1]), sys.argv[2]
for number in range(count):
    spec = specification(
        f"p{number:05d}", source, (), owner=None, mode="0555", include=(), exclude=(), token_file=None,
        aws_profile=None, endpoint_url=None,
    )
    with Client(None) as client:
        client.add(spec, warm=False)
"""


def many(work: Path, count: int, files: int) -> dict[str, Any]:
    source = work / "small-model"
    source.mkdir()
    for number in range(files):
        name = f"model-{number:05d}-of-{files:05d}.safetensors" if number else "config.json"
        (source / name).write_bytes(b"{}" * 2048)
    result: dict[str, Any] = {"pipelines": count, "files_each": files}
    with daemon.daemon(work, name="many") as served:
        empty = daemon.memory(served.child.pid)["rss"]
        result["start_empty_seconds"] = served.ready_after
        seconds, _ = run(
            [sys.executable, "-c", _ADD_MANY, str(count), f"file://{source}"], env=served.env, timeout=1800
        )
        result["add_each_seconds"] = seconds / count
        filled = daemon.memory(served.child.pid)["rss"]
    with daemon.daemon(work, name="many") as served:
        result["start_seconds"] = served.ready_after
        result["rss_empty"], result["rss_after_adding"] = empty, filled
        result["rss_after_restart"] = daemon.memory(served.child.pid)["rss"]
        for what, command in (
            ("instantstart ls", lambda: served.cli("ls")[0]),
            ("instantstart ls --json", lambda: served.cli("ls", "--json")[0]),
            ("instantstart status of one", lambda: served.cli("status", "p00000")[0]),
            ("ls -l of the mount", lambda: run(["ls", "-l", str(served.mount)])[0]),
            ("ls -lR of the mount", lambda: run(["ls", "-lR", str(served.mount)])[0]),
        ):
            result[f"{what}, seconds"] = summary([command() for _ in range(3)])
        result["rss_after_listing"] = daemon.memory(served.child.pid)["rss"]
        if len(os.listdir(served.mount)) < count:
            raise SystemExit("pipelines are missing after the restart")
    rows = []
    for key, value in result.items():
        if isinstance(value, dict):
            rows.append([key, f"{value['median']:.3f}"])
        elif key.startswith("rss"):
            rows.append([key, show_size(value)])
        else:
            rows.append([key, f"{value:.4g}"])
    print(f"{count} pipelines × {files} files")
    print(table(["", ""], rows), "\n", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=2 * GIB)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--pipelines", type=int, default=1000)
    parser.add_argument("--files-each", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="fill,idle,listing,first,many")
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    parser.add_argument("--name", default="footprint", help="of the result file")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    result: dict[str, Any] = {}
    with common.workspace(options.dir) as work:
        if parts & {"fill", "idle"}:
            result["fill"] = fill_and_idle(work, options.size, options.idle, parts)
        if "listing" in parts:
            result["listing"] = listing(work, options.files, options.rounds)
        if "first" in parts:
            result["first_byte"] = first_byte(work, options.rounds)
        if "many" in parts:
            result["many"] = many(work, options.pipelines, options.files_each)
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
