"""What a reader on a host notices while the host gives its rack all that it may.

    scripts/bench rack_reader [--size 512MiB] [--rate 2GiB] [--seconds 1.5] [--rounds 5]

A real daemon with a rack, and a warm pipeline in its mount. A neighbour (a process, eight connections) takes chunk
after chunk with tickets, at [regional] rack_rate. The reader is one process with one thread: `read` (pread of 1 MiB),
`mmap` (copies 1 MiB out of a mapping) and `open` (open, fstat, pread of 4 KiB, close: these ask the daemon). By turns:
nobody takes anything (`quiet`), the neighbour takes from the daemon (`served`), and it takes as much from the same
server in a process of its own that has no mount (`apart`): what that costs the reader is the machine's two cores and
memory, which the neighbour, too, uses here; on a real rack it is elsewhere.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common, rack
from bench.common import MIB
from bench.daemon import cpu_seconds
from instantstart_fs.config.units import parse_rate
from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.rack import Asked, make_ticket, path_of
from instantstart_fs.regional.keys import RegionKey
from tests.harness import Daemon
from tests.servers.hub import HubServer
from tests.servers.ports import free_ports

KEY = "ab" * 32
CONNECTIONS = 8
KINDS = ("read", "mmap", "open")
MODES = ("quiet", "served", "apart")


# -- processes ---------------------------------------------------------------------------------------------------------


def read(kind: str, path: str, seconds: float) -> dict[str, float]:
    """Read for so long; GB/s, and milliseconds of a step: half, and 99 of 100, took less."""
    buffer, times, total = bytearray(MIB), [], 0
    size = os.stat(path).st_size // MIB * MIB
    fd = os.open(path, os.O_RDONLY)
    view, mapped = memoryview(buffer), memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    for warm in range(0, size, MIB):  # what a reader pays once is not asked here
        os.preadv(fd, [buffer], warm)
        view[:] = mapped[warm : warm + MIB]
    began, at = time.perf_counter(), 0
    while (now := time.perf_counter()) - began < seconds:
        if kind == "read":
            total += os.preadv(fd, [buffer], at)
        elif kind == "mmap":
            view[:] = mapped[at : at + MIB]
            total += MIB
        else:
            other = os.open(path, os.O_RDONLY)
            os.fstat(other)
            total += len(os.pread(other, 4096, at))
            os.close(other)
        times.append(time.perf_counter() - now)
        at = (at + MIB) % size
    times.sort()
    spent = time.perf_counter() - began
    return {
        "gb_per_s": total / spent / 1e9,
        "steps_per_s": len(times) / spent,
        "p50_ms": times[len(times) // 2] * 1e3,
        "p99_ms": times[len(times) * 99 // 100] * 1e3,
        "max_ms": times[-1] * 1e3,
    }


def take(port: int, host: str, slot: str, pin: str, chunks: int, seconds: float) -> float:
    """Take chunks for so long; GB/s."""
    key = RegionKey(bytes.fromhex(KEY)).tickets if slot != rack.SLOT else rack.KEY

    def request(chunk: int) -> bytes:
        asked = Asked(slot, pin, chunk % chunks, 1.0, True)
        ticket = make_ticket(key, host, asked, time.time() if slot != rack.SLOT else rack.NOW)
        return f"GET {path_of(asked)} HTTP/1.1\r\nHost: x\r\nAuthorization: {ticket}\r\n\r\n".encode()

    began, totals = time.monotonic(), [0] * CONNECTIONS

    def run(number: int) -> None:
        totals[number] = rack.take(port, request, began + seconds, number * chunks // CONNECTIONS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(totals) / (time.monotonic() - began) / 1e9


def spawn(*words: str | int | float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.rack_reader", "--part", json.dumps(words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(out)


# -- the measurement ---------------------------------------------------------------------------------------------------


def turn(kind: str, path: Path, taking: list[str | int | float] | None, pid: int, seconds: float) -> dict[str, float]:
    taker = spawn("take", *taking, seconds + 1.5) if taking is not None else None
    time.sleep(1.0)  # until it takes
    before, began = cpu_seconds(pid), time.monotonic()
    found: dict[str, float] = result(spawn("read", kind, str(path), seconds))
    found["daemon_cores"] = (cpu_seconds(pid) - before) / (time.monotonic() - began)
    if taker is not None:
        found["taken_gb_per_s"] = result(taker)
    return found


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    common.make_model(work / "model", options.size, 1)
    (work / "tier").mkdir()
    key = work / "region.key"
    key.write_text(KEY)
    key.chmod(0o600)
    port = free_ports(1)[0]
    regional = {"url": f"file://{work}/tier", "key_file": str(key), "host": "owner", "rack": "r"}
    regional |= {"rack_listen": f"127.0.0.1:{port}", "rack_rate": options.rate}
    found: dict[str, dict[str, list[dict[str, float]]]] = {kind: {mode: [] for mode in MODES} for kind in KINDS}
    with HubServer() as hub:
        hub.publish("org/m", work / "model")
        origins = {"huggingface": {"endpoint": hub.endpoint}}
        with Daemon(work / "host", config={"regional": regional, "origins": origins}) as daemon:
            with Client(str(daemon.socket)) as client:
                client.add(PipelineSpec("m", (ModelSpec("hf://org/m"),)))
                client.wait_warm("m", everything=True)
            (path,) = [path for path in daemon.path("m").iterdir() if path.stat().st_size > MIB]
            common.wait_for(lambda: len(list((work / "tier").rglob("seal"))) >= 1, "the seal", 60)
            chunks = sorted((work / "tier").glob("v1/*/*/c/*"))
            pin = max((chunk.parent.parent for chunk in chunks), key=lambda one: len(list((one / "c").iterdir())))
            slot, count = pin.parent.name, path.stat().st_size // (8 * MIB)
            assert daemon._process is not None
            pid = daemon._process.pid
            common.wait_for(lambda: f"127.0.0.1:{port}" in daemon.text(), "the rack's server", 30)
            served: list[str | int | float] = [port, "owner", slot, pin.name, count]
            weights, rate = next(iter((work / "model").glob("*.safetensors"))), str(parse_rate(options.rate))
            with rack.own("level", weights, rate) as (_, other):
                apart: list[str | int | float] = [other, rack.HOST, rack.SLOT, rack.PIN, min(count, rack.CHUNKS)]
                for _ in range(options.rounds):
                    for kind in KINDS:
                        for mode in MODES:
                            taking = {"quiet": None, "served": served, "apart": apart}[mode]
                            found[kind][mode].append(turn(kind, path, taking, pid, options.seconds))
    return found


def shown(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    def median(samples: list[dict[str, float]], what: str) -> float:
        return float(common.summary([one.get(what, 0.0) for one in samples])["median"])

    rows = []
    for kind, modes in found.items():
        for mode, samples in modes.items():
            rate = (
                f"{median(samples, 'gb_per_s'):.2f} GB/s"
                if kind != "open"
                else f"{median(samples, 'steps_per_s'):,.0f}/s"
            )
            row = [kind, mode, rate, *(f"{median(samples, what):.3f}" for what in ("p50_ms", "p99_ms", "max_ms"))]
            rows.append([*row, f"{median(samples, 'taken_gb_per_s'):.2f}", f"{median(samples, 'daemon_cores'):.2f}"])
    header = ["reader", "neighbour", "rate", "p50 ms", "p99 ms", "most ms", "taken GB/s", "daemon's cores"]
    return common.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=512 * MIB)
    parser.add_argument("--rate", default="2GiB", help="[regional] rack_rate")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        what, *words = json.loads(options.part)
        parts: dict[str, Callable[..., object]] = {"read": read, "take": take}
        print(json.dumps(parts[what](*words)))
        return
    with tempfile.TemporaryDirectory(prefix="isfs-bench-") as name:
        found = measure(options, Path(name))
    print(shown(found))
    common.write_result("rack_reader", {"rate": options.rate, "bytes": options.size, "samples": found})


if __name__ == "__main__":
    main()
