"""A soak: everything that changes pipelines, and every fault of an origin, at once; then all must be as it was.

    scripts/bench soak [--minutes 30] [--idle 60] [--seed 1] [--trust]

Adds, fills, reads, staging, prefetches and leases, evictions by pressure and by hand, updates, scrubs, access checks:
several actors work on a handful of pipelines of one hub until the time is up, each choosing what to do at random (the
seed repeats the choices, not their timing). Every byte that is read is compared. Then the hub is healed, the pipelines
are removed, and when all is quiet again the daemon's RSS, descriptors, threads, workers, nodeids and files are
compared with what they were after a first round of the same work (a daemon that has never worked has loaded less). The
log may hold warnings and errors about what was provoked, and no other. At the end: CPU while idle.

The hub corrupts bodies, too, and no reader may see it: nothing is served unproven (serve_unsealed = "never").
--trust: it does not, and what is not proven yet is served, also straight from the hub while there is no room.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import MIB, show_size
from tests.servers.hub import HubServer

FIRST_ROUND = 60.0
"""Seconds, until all pools of buffers have their size."""
RSS_SLACK = 32 * MIB
IDLE_TARGET = 0.1
FAULTS = ("status", "reset", "cut", "latency", "throttle", "blackhole", "none", "none")
TAKE_PART = ("staged_bytes", "scrubbed_bytes", "evictions")
"""Counters of what the daemon does by itself: a soak in which it did not has shown nothing of it."""
PROVOKED = (
    r"origin-(unavailable|throttled|misbehaved|broken|changed|not-found)|location-expired|read-deadline|digest-mismatch",
    r"fill-cancelled|access-refused|no-such-entry|is down|answers again|the manifest says",
    r"wrong bytes were served before the digest proved it",
    r"not evicted",
    r"store full: needs|store-full: \S+ there is no room to keep it",
)
"""Log lines of these are what the faults are meant to bring about."""


class World:
    """The hub's repositories, by the content that each commit has."""

    def __init__(self, work: Path, hub: HubServer, seed: int, faults: Sequence[str]) -> None:
        self.work, self.hub = work, hub
        self.chance = random.Random(seed)
        self.faults = faults
        self.lock = threading.Lock()
        self.publishing = threading.Lock()
        self.known: set[str] = set()
        """Digests of every shard that was ever published: what a read may give."""
        self.done: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        """What a prefetch said that failed."""
        self.problems: list[str] = []
        self.began = time.monotonic()
        self.end = 0.0
        self.rss: dict[int, int] = {}
        """By minute, the most."""

    def publish(self, name: str, salt: int) -> None:
        """The same salt is the same content. One at a time, and never written again: the hub serves these files."""
        directory = self.work / "source" / f"{name}-{salt}"
        with self.publishing:
            if not directory.exists():
                directory.mkdir(parents=True)
                for shard in range(2):
                    data = random.Random(f"{name} {salt} {shard}").randbytes(12 * MIB + shard * 4096 + 17)
                    tensor = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
                    header = json.dumps({f"layer.{shard}": tensor}).encode()
                    header = header.ljust(-len(header) % 8 + len(header))
                    content = len(header).to_bytes(8, "little") + header + data
                    (directory / f"model-{shard + 1:05}-of-00002.safetensors").write_bytes(content)
                    with self.lock:
                        self.known.add(hashlib.sha256(content).hexdigest())
                (directory / "config.json").write_text(json.dumps({"salt": salt}))
            self.hub.publish(f"soak/{name}", directory)

    def wrong(self, name: str, digest: str, served: daemon.Daemon) -> None:
        """A read gave what was never published."""
        status = cli(served, "status", name, "--json").stdout
        files = json.loads(status)["files"] if status.startswith("{") else []
        self.problem(f"wrong bytes in {name}: {digest}, now {[file['digest'] for file in files]}")

    def count(self, what: str) -> None:
        with self.lock:
            self.done[what] += 1

    def problem(self, what: str) -> None:
        with self.lock:
            self.problems.append(what)
        print(f"PROBLEM: {what}", flush=True)


def cli(served: daemon.Daemon, *arguments: str, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "instantstart_fs.cli", *arguments],
        env=served.env, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def reader(world: World, served: daemon.Daemon, names: list[str]) -> None:
    """Reads whole shards in a process of its own; errors are allowed (origins fail), wrong bytes and hangs are not."""
    name = world.chance.choice(names)
    shard = world.chance.choice((1, 2))
    path = served.mount / name / f"model-{shard:05}-of-00002.safetensors"
    try:
        done = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        world.problem(f"a read of {name} took longer than a minute")
        return
    if done.returncode:
        world.count("reads that failed")
    elif (digest := done.stdout.split()[0].lstrip("\\")) not in world.known:
        world.wrong(name, digest, served)
    else:
        world.count("reads")


def mapper(world: World, served: daemon.Daemon, names: list[str]) -> None:
    """Maps a file and leaves in the middle: what is open at a bad moment."""
    name = world.chance.choice(names)
    code = (
        "import mmap,sys,signal\nsignal.alarm(40)\nf=open(sys.argv[1],'rb')\n"
        "m=mmap.mmap(f.fileno(),0,access=mmap.ACCESS_READ)\nprint(m[len(m)//2])"
    )
    path = served.mount / name / "model-00001-of-00002.safetensors"
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60)
        world.count("maps" if done.returncode == 0 else "maps that failed")


def administrator(world: World, served: daemon.Daemon, names: list[str]) -> None:
    name = world.chance.choice(names)
    what = world.chance.choice(("warm", "evict", "update", "touch", "again", "status", "explain", "verify", "ls"))
    match what:
        case "again":
            cli(served, "remove", name)
            done = cli(served, "add", name, f"hf://soak/{name}")
        case "update":
            world.publish(name, world.chance.randrange(4))
            done = cli(served, "update", name)
        case "ls":
            done = cli(served, "ls", "--json")
        case _:
            done = cli(served, what, name)
    if "Traceback" in done.stderr:
        world.problem(f"{what}: {done.stderr[-500:]}")
    world.count(what if done.returncode == 0 else f"{what} refused")


def tenant(world: World, served: daemon.Daemon, names: list[str]) -> None:
    """Takes a lease for a while: to bring the weights into memory, or for a program that reads them."""
    name = world.chance.choice(names)
    if world.chance.random() < 0.5:
        done = cli(served, "prefetch", name, "--devices", "cpu")
        world.count("prefetch" if done.returncode == 0 else "prefetch that failed")
        if done.returncode:
            world.refusals[re.sub(r"soak-\d|[\d.]+", "…", done.stderr.strip().splitlines()[-1][:100])] += 1
    else:
        path = served.mount / name / "model-00002-of-00002.safetensors"
        done = cli(served, "lease", name, "--", "sha256sum", str(path))
        digest = done.stdout.split()[0] if done.returncode == 0 else ""
        if digest and digest not in world.known:
            world.wrong(name, digest, served)
        world.count("lease" if digest else "lease whose reader failed")
    if "Traceback" in done.stderr:
        world.problem(f"a tenant: {done.stderr[-500:]}")


def saboteur(world: World) -> None:
    """One fault at a time, for a while."""
    what = world.chance.choice(world.faults)
    match what:
        case "status":
            world.hub.fault("status", port="cdn", status=503, count=world.chance.randrange(1, 20))
        case "throttle":
            world.hub.fault("status", port="cdn", status=429, headers={"Retry-After": "1"}, count=3)
        case "corrupt":
            world.hub.fault("corrupt", port="cdn", count=1)
        case "reset" | "cut":
            world.hub.fault(what, port="cdn", count=world.chance.randrange(1, 8))
        case "latency":
            world.hub.fault("latency", port="cdn", seconds=0.3, count=30)
        case "blackhole":
            world.hub.fault("blackhole", port="cdn", count=4)
    world.count(f"fault: {what}")
    time.sleep(world.chance.uniform(0.5, 3))
    world.hub.clear()
    time.sleep(world.chance.uniform(0.5, 3))


def watcher(world: World, served: daemon.Daemon, page: str) -> None:
    for path in ("", "metrics", "healthz", "api/pipelines"):
        try:
            with urllib.request.urlopen(page + path, timeout=20) as answer:
                answer.read()
            world.count("pages")
        except OSError as error:
            world.problem(f"/{path}: {error}")
    minute = int(time.monotonic() - world.began) // 60
    world.rss[minute] = max(world.rss.get(minute, 0), daemon.memory(served.child.pid)["rss"])
    time.sleep(2)


def work_for(seconds: float, world: World, served: daemon.Daemon, names: list[str], page: str) -> None:
    world.end = time.monotonic() + seconds
    actors: list[Callable[[], None]] = [
        *(lambda: reader(world, served, names) for _ in range(2)),
        lambda: mapper(world, served, names),
        *(lambda: administrator(world, served, names) for _ in range(2)),
        lambda: tenant(world, served, names),
        lambda: saboteur(world),
        lambda: watcher(world, served, page),
    ]

    def loop(actor: Callable[[], None]) -> None:
        while time.monotonic() < world.end:
            try:
                actor()
            except Exception as error:
                world.problem(f"{type(error).__name__}: {error}")
                time.sleep(1)

    threads = [threading.Thread(target=loop, args=(actor,)) for actor in actors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.hub.reset()


def metrics_of(page: str) -> dict[str, float]:
    with urllib.request.urlopen(page + "metrics", timeout=20) as answer:
        lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def measure(served: daemon.Daemon, page: str) -> dict[str, int]:
    pid = served.child.pid
    metrics = metrics_of(page)
    descriptors, threads = [], []
    for _ in range(24):
        # What the page and the watchdog take for a moment is no growth; an idle thread ends after 10 s.
        time.sleep(0.5)
        descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        threads.append(len(os.listdir(f"/proc/{pid}/task")))
    return {
        "rss": daemon.memory(pid)["rss"],
        "descriptors": min(descriptors),
        "threads": min(threads),
        "workers": len(served.workers()),
        "open files": int(metrics["instantstart_open_files"]),
        "nodes": int(metrics["instantstart_nodes"]),
        "files in the store": sum(len(files) for _, _, files in os.walk(served.mount.parent / "soak-store" / "slots")),
    }


def open_descriptors(served: daemon.Daemon) -> Counter[str]:
    """By what they lead to, sockets and pipes without their numbers."""
    found: Counter[str] = Counter()
    directory = f"/proc/{served.child.pid}/fd"
    for fd in os.listdir(directory):
        with contextlib.suppress(OSError):
            found[re.sub(r"\[\d+\]", "", os.readlink(f"{directory}/{fd}"))] += 1
    return found


def settle(served: daemon.Daemon, names: list[str], page: str) -> dict[str, int]:
    """No pipelines, no readers; the quiet that lets cold-start records and idle descriptors end."""
    for name in names:
        for _ in range(30):
            if cli(served, "remove", name).returncode == 0 or cli(served, "status", name).returncode:
                break
            time.sleep(1)
    time.sleep(35)
    return measure(served, page)


def unprovoked(log: str) -> list[str]:
    found = []
    for line in log.splitlines():
        trouble = re.match(r"(\S+ )?(warning|error|critical) ", line) or line.startswith("Traceback")
        if trouble and not any(re.search(pattern, line) for pattern in PROVOKED):
            found.append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pipelines", type=int, default=4)
    parser.add_argument("--trust", action="store_true", help="an origin that fails, but does not lie: see above")
    parser.add_argument("--keep-log", metavar="FILE", help="copy the daemon's log there")
    parser.add_argument("--work", help="a directory on a real disk (default: a temporary one)")
    options = parser.parse_args()
    names = [f"soak-{number}" for number in range(options.pipelines)]
    with common.workspace(options.work) as work, HubServer() as hub:
        world = World(work, hub, options.seed, FAULTS if options.trust else (*FAULTS, "corrupt"))
        for name in names:
            world.publish(name, 0)
        config = (
            '[http]\nlisten = "127.0.0.1:0"\n[fill]\nchunk_size = "1MiB"\nread_deadline = "8s"\n'
            f'serve_unsealed = "{"auto" if options.trust else "never"}"\n'
            f'[store]\ncapacity = "{options.pipelines * 24 * 3 // 4}MiB"\nscrub = "10s"\nscrub_rate = "200MB"\n'
            '[eviction]\nkeep_hot = "2s"\n[origins]\nrecheck_access = "10s"\n'
        )
        with daemon.daemon(work, config=config, env={"HF_ENDPOINT": hub.endpoint}, name="soak") as served:
            page = re.findall(r"page (http://\S+)", served.log.read_text())[-1]

            def add_all() -> None:
                for name in names:
                    done = cli(served, "add", name, f"hf://soak/{name}")
                    assert done.returncode == 0, done.stderr

            add_all()
            # What is made once and kept: the read-only view for handed descriptors.
            cli(served, "warm", names[0], "--wait")
            cli(served, "prefetch", names[0], "--devices", "cpu")
            work_for(FIRST_ROUND, world, served, names, page)
            start = settle(served, names, page)
            print("after the first round:", start, flush=True)
            held = open_descriptors(served)
            add_all()
            work_for(options.minutes * 60, world, served, names, page)
            # The scrub rests for 30 s after the last demand.
            cli(served, "warm", names[0], "--wait")
            scrubbed = "instantstart_scrubbed_bytes_total"
            common.wait_for(lambda: metrics_of(page)[scrubbed] > 10 * MIB, "the scrub", 120, interval=2)
            end = settle(served, names, page)
            print("at the end:           ", end, flush=True)
            print("descriptors that were not there before:", dict(open_descriptors(served) - held), flush=True)
            took_part = {what: int(metrics_of(page)[f"instantstart_{what}_total"]) for what in TAKE_PART}
            clock = daemon.Clock([served.child.pid, *served.workers()])
            time.sleep(options.idle)
            idle = 100 * sum(clock.spent().values()) / (time.monotonic() - clock.started)
            lines = unprovoked(served.log.read_text(errors="replace"))
            if options.keep_log:
                shutil.copy(served.log, options.keep_log)
    grown = {key: end[key] - start[key] for key in start}
    verdicts = {
        "no wrong byte, hang or crash": not world.problems,
        f"RSS within {show_size(RSS_SLACK)}": grown["rss"] <= RSS_SLACK,
        "descriptors, threads, workers, nodeids, files as before": not any(
            grown[key] > 0 for key in ("descriptors", "threads", "workers", "open files", "nodes", "files in the store")
        ),
        "no unprovoked line in the log": not lines,
        "everything took part": all(took_part.values()) and bool(world.done["prefetch"] and world.done["lease"]),
        f"idle ≤ {IDLE_TARGET} %": idle <= IDLE_TARGET,
    }
    for what, ok in verdicts.items():
        print(f"{'met   ' if ok else 'MISSED'}  {what}")
    print(f"idle {idle:.3f} % of a core; did {dict(sorted(world.done.items()))}; {took_part}")
    print(f"RSS, the most of each minute, MiB: {[rss // MIB for rss in world.rss.values()]}")
    for what, count in world.refusals.most_common(10):
        print(f"{count} prefetches: {what}")
    for line in lines[:20]:
        print(f"unprovoked: {line}")
    result: dict[str, Any] = {
        "minutes": options.minutes, "trust": options.trust, "seed": options.seed, "pipelines": options.pipelines,
        "start": start, "end": end, "rss_by_minute": list(world.rss.values()),
        "idle_percent": idle, "did": dict(sorted(world.done.items())), "took_part": took_part,
        "problems": world.problems, "unprovoked": lines,
        "verdicts": verdicts,
    }  # fmt: skip
    common.write_result("soak-trust" if options.trust else "soak", result)
    sys.exit(0 if all(verdicts.values()) else 1)


if __name__ == "__main__":
    main()
