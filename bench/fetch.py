"""The fetch path by itself, without library and mount: what docs/decisions/ say of chunk size, client and workers.

    python -m bench.fetch clients|chunks|workers|hash|demand [--size 1GiB] [--rounds 5]

clients: one process, threads, ranged GETs of 8 MiB from nginx into a sparse file: who reads into the buffer.
chunks:  the whole filler (fetch, sha256, commit, seal), chunks of 1 to 64 MiB, beside a bare client of the same work.
workers: the whole filler with 1 to 4 fetch processes, on 4 files; the bare client takes them one after the other.
hash:    sha256 of what is in a buffer (inline) against reading it back from the page cache (behind the write head).
demand:  the last byte of a cold file while it fills, on a link of --link bytes/s, with and without a pause of the rest.
All sides of a table are measured in turn, round by round; medians are printed and go to bench/results/fetch-WHAT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import trio
import urllib3

from bench.common import GIB, MIB, RESULTS, size
from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.manifest import Digest, FileEntry, ManifestFile
from instantstart_fs.filler.body import reading
from instantstart_fs.filler.scheduler import Filler, FillSettings
from instantstart_fs.filler.target import COMPLETE, FileKey, FillTarget
from instantstart_fs.index.environment import Index
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.store.blobstore import BlobStore
from tests.component.byteserver import Recorder, byte_server
from tests.servers.nginx import NginxServer

PIECE = MIB


class _Origin:
    def __init__(self, url: str) -> None:
        self.key = OriginKey("bench", url, "")
        self._url = url

    def locate(self, file: ManifestFile) -> Location:
        return Location(f"{self._url}/{file.address}", named=("127.0.0.1",))


def _cpu() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


# -- clients -----------------------------------------------------------------------------------------------------------


def _by_http_client(url: str) -> Callable[[int, int, memoryview, int], None]:
    parts = urlsplit(url)
    local = threading.local()

    def get(start: int, stop: int, buffer: memoryview, fd: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        local.connection.request("GET", parts.path, headers={"Range": f"bytes={start}-{stop - 1}"})
        _drain(local.connection.getresponse().readinto, start, stop, buffer, fd)

    return get


def _by_urllib3(url: str, way: str) -> Callable[[int, int, memoryview, int], None]:
    manager = urllib3.PoolManager(maxsize=32)

    def get(start: int, stop: int, buffer: memoryview, fd: int) -> None:
        response = manager.urlopen(
            "GET",
            url,
            headers={"Range": f"bytes={start}-{stop - 1}"},
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
        )
        if way == "data":
            os.pwrite(fd, response.read(), start)
        elif way == "stream":
            for piece in response.stream(PIECE):
                os.pwrite(fd, piece, start)
                start += len(piece)
        elif way == "socket":
            with reading(response, getattr(response.connection, "sock", None), 60.0) as read:
                _drain(read, start, stop, buffer, fd)
        else:
            source = response._fp if way == "inner" else response  # type: ignore[attr-defined]
            _drain(source.readinto, start, stop, buffer, fd)
        response.release_conn()

    return get


def _drain(readinto: Callable[[memoryview], int], start: int, stop: int, buffer: memoryview, fd: int) -> None:
    while start < stop:
        filled = 0
        limit = min(len(buffer), stop - start)
        while filled < limit:
            count = readinto(buffer[filled:limit])
            if not count:
                raise RuntimeError("cut short")
            filled += count
        os.pwrite(fd, buffer[:filled], start)
        start += filled
    readinto(buffer[:1])


def _client(get: Callable[[int, int, memoryview, int], None], total: int, where: Path) -> dict[str, float]:
    chunk, threads = 8 * MIB, 16
    starts = iter(range(0, total, chunk))
    lock = threading.Lock()
    fd = os.open(where, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def work() -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            get(start, min(start + chunk, total), buffer, fd)

    cpu, begun = _cpu(), time.perf_counter()
    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    seconds = time.perf_counter() - begun
    cpu = _cpu() - cpu
    os.close(fd)
    where.unlink()
    return {"GB/s": total / seconds / 1e9, "CPU s/GB": cpu / (total / 1e9)}


# -- the filler --------------------------------------------------------------------------------------------------------


def _target(
    store: BlobStore, origin: _Origin, name: str, total: int, digest: Digest | None, chunk: int, number: int = 0
) -> FillTarget:
    file = ManifestFile(name, total, "model", "", digest)
    return FillTarget(
        FileKey("p", 1, number),
        FileEntry(number, 0, name, file),
        0,
        ChunkMap(total, chunk),
        origin,  # type: ignore[arg-type]
        lambda: store.blob("p", 1, name, total),
    )


@contextmanager
def _house(work: Path) -> Iterator[tuple[BlobStore, Index]]:
    with (
        tempfile.TemporaryDirectory(dir=work) as root,
        BlobStore.open(root + "/store") as store,
        Index.open(store.root + "/index", map_size=64 * MIB) as index,
    ):
        yield store, index


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def _filler(
    url: str, total: int, digest: Digest, work: Path, chunk: int, workers: int, files: int = 1
) -> dict[str, float]:
    figures: dict[str, float] = {}

    async def run() -> None:
        with _house(work) as (store, index):
            origin = _Origin(url)
            targets = [_target(store, origin, f"model{n}", total, digest, chunk, n) for n in range(files)]
            filler = Filler(store, index, FillSettings(workers=workers), Recorder())
            async with trio.open_nursery() as nursery:
                await nursery.start(filler.run)
                while len(filler.worker_pids()) < workers:
                    await trio.sleep(0.01)
                begun = time.perf_counter()
                filler.fill("p", targets)
                present = 0.0
                while any(target.state not in COMPLETE for target in targets):
                    if any(target.failed for target in targets):
                        raise RuntimeError("the fill failed")
                    if not present and all(target.present.complete for target in targets):
                        present = time.perf_counter()
                    await trio.sleep(0.002)
                ended = time.perf_counter()
                figures["GB/s sealed"] = files * total / (ended - begun) / 1e9
                figures["s last byte to seal"] = ended - (present or ended)
                figures["MiB RSS of a worker"] = max(_rss_mib(pid) for pid in filler.worker_pids())
                nursery.cancel_scope.cancel()
            for target in targets:
                if target.blob is not None:
                    target.blob.close()

    cpu = _cpu()
    trio.run(run)
    figures["CPU s/GB"] = (_cpu() - cpu) / (files * total / 1e9)
    return figures


def _bare(url: str, total: int, digest: Digest, work: Path) -> dict[str, float]:
    """Fetch, sha256 behind, fsync, with as many threads: what the filler's figure is held against."""
    starts = iter(range(0, total, 8 * MIB))
    get = _by_http_client(url + "/model")
    lock = threading.Lock()
    with tempfile.NamedTemporaryFile(dir=work) as file:
        fd = file.fileno()
        done: set[int] = set()
        changed = threading.Condition()

        def fetch() -> None:
            buffer = memoryview(bytearray(PIECE))
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                get(start, min(start + 8 * MIB, total), buffer, fd)
                with changed:
                    done.add(start)
                    changed.notify()

        cpu, begun = _cpu(), time.perf_counter()
        running = [threading.Thread(target=fetch) for _ in range(16)]
        for thread in running:
            thread.start()
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(PIECE))
        for start in range(0, total, 8 * MIB):
            with changed:
                while start not in done:
                    changed.wait()
            for offset in range(start, min(start + 8 * MIB, total), PIECE):
                count = os.preadv(fd, [buffer[: min(PIECE, total - offset)]], offset)
                hasher.update(buffer[:count])
        os.fsync(fd)
        seconds = time.perf_counter() - begun
        for thread in running:
            thread.join()
        if hasher.hexdigest() != digest.value:
            raise RuntimeError("the bare client has other bytes")
    return {"GB/s sealed": total / seconds / 1e9, "CPU s/GB": (_cpu() - cpu) / (total / 1e9)}


# -- hash, demand ------------------------------------------------------------------------------------------------------


def _hash(path: Path, total: int, behind: bool) -> dict[str, float]:
    fd = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(PIECE))
    os.preadv(fd, [buffer], 0)
    hasher = hashlib.sha256()
    cpu, begun = _cpu(), time.perf_counter()
    for offset in range(0, total, PIECE):
        if behind:
            os.preadv(fd, [buffer], offset)
        hasher.update(buffer)
    seconds = time.perf_counter() - begun
    os.close(fd)
    return {"GB/s": total / seconds / 1e9, "CPU s/GB": (_cpu() - cpu) / (total / 1e9)}


def _demand(work: Path, data: bytes, link: float, chunk: int, settings: FillSettings) -> dict[str, float]:
    figures: dict[str, float] = {}

    async def run(url: str) -> None:
        with _house(work) as (store, index):
            target = _target(store, _Origin(url), "model", len(data), None, chunk)
            filler = Filler(store, index, settings, Recorder())
            async with trio.open_nursery() as nursery:
                await nursery.start(filler.run)
                filler.fill("p", [target])
                while target.present.count < settings.connections:
                    await trio.sleep(0.001)
                wanted = ByteRange(len(data) - 1, len(data))
                begun = time.perf_counter()
                filler.demand(target, wanted)
                await target.wait_readable(wanted, 60)
                figures["s to the last byte"] = time.perf_counter() - begun
                nursery.cancel_scope.cancel()
            if target.blob is not None:
                target.blob.close()

    with byte_server() as server:
        server.files["model"] = data
        server.bytes_per_second = link
        trio.run(run, server.url)
    figures["s for a chunk alone"] = chunk / link
    figures["s for the file"] = len(data) / link
    return figures


# -- the tables --------------------------------------------------------------------------------------------------------


def _table(what: str, rounds: int, sides: dict[str, Callable[[], dict[str, float]]]) -> None:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            samples[name].append(sides[name]())
    medians: dict[str, dict[str, float]] = {}
    for name, taken in samples.items():
        medians[name] = {column: statistics.median(sample[column] for sample in taken) for column in taken[0]}
    columns = list(dict.fromkeys(column for row in medians.values() for column in row))
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |")
    RESULTS.mkdir(exist_ok=True)
    report = {"command": _without_directory(sys.argv[1:]), "rounds": rounds, "medians": medians, "samples": samples}
    (RESULTS / f"fetch-{what}.json").write_text(json.dumps(report, indent=1) + "\n")


def _without_directory(arguments: list[str]) -> list[str]:
    """Where somebody's disk is says nothing to others."""
    if "--dir" not in arguments:
        return arguments
    at = arguments.index("--dir")
    return arguments[:at] + arguments[at + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["clients", "chunks", "workers", "hash", "demand"])
    parser.add_argument("--size", type=size, default=GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", type=size, default=64 * MIB, help="demand: bytes per second")
    parser.add_argument("--dir", type=Path, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        work = Path(directory)
        total = options.size // 4 if options.what == "workers" else options.size
        if options.what == "demand":
            data = os.urandom(total)
            chunk = 8 * MIB
            usual = FillSettings(workers=1)
            unpaused = msgspec.structs.replace(usual, demand_pause=0.0)
            in_turn = msgspec.structs.replace(unpaused, demand_headroom=0)
            _table(
                "demand",
                options.rounds,
                {
                    "headroom, others pause": lambda: _demand(work, data, options.link, chunk, usual),
                    "headroom": lambda: _demand(work, data, options.link, chunk, unpaused),
                    "neither": lambda: _demand(work, data, options.link, chunk, in_turn),
                },
            )
            return
        block = os.urandom(4 * MIB)
        hasher = hashlib.sha256()
        (work / "www").mkdir()
        with (work / "www/model").open("wb") as file:
            for number in range(total // len(block)):
                cut = (number * 61_681) % len(block)
                piece = block[cut:] + block[:cut]
                hasher.update(piece)
                file.write(piece)
        digest = Digest("sha256", hasher.hexdigest())
        if options.what == "hash":
            sides = {
                "inline": lambda: _hash(work / "www/model", total, False),
                "behind": lambda: _hash(work / "www/model", total, True),
            }
            _table("hash", options.rounds, sides)
            return
        with NginxServer(work / "www") as server:
            url = server.url
            if options.what == "clients":
                ways = {
                    "http.client readinto": _by_http_client(url + "/model"),
                    "urllib3, inner readinto": _by_urllib3(url + "/model", "inner"),
                    "urllib3, the socket itself": _by_urllib3(url + "/model", "socket"),
                    "urllib3 readinto": _by_urllib3(url + "/model", "own"),
                    "urllib3 stream": _by_urllib3(url + "/model", "stream"),
                    "urllib3 read()": _by_urllib3(url + "/model", "data"),
                }
                _table(
                    "clients",
                    options.rounds,
                    {name: lambda get=get: _client(get, total, work / "out") for name, get in ways.items()},
                )
            elif options.what == "chunks":
                sides = {"bare client, 8 MiB": lambda: _bare(url, total, digest, work)}
                for mib in (1, 2, 4, 8, 16, 32, 64):
                    sides[f"{mib} MiB"] = lambda mib=mib: _filler(url, total, digest, work, mib * MIB, 2)
                _table("chunks", options.rounds, sides)
            else:

                def four_bare() -> dict[str, float]:
                    taken = [_bare(url, total, digest, work) for _ in range(4)]
                    return {
                        "GB/s sealed": 4 / sum(1 / figures["GB/s sealed"] for figures in taken),
                        "CPU s/GB": statistics.mean(figures["CPU s/GB"] for figures in taken),
                    }

                sides = {"bare client": four_bare}
                for workers in (1, 2, 4):
                    sides[f"{workers} workers"] = lambda n=workers: _filler(url, total, digest, work, 8 * MIB, n, 4)
                _table("workers", options.rounds, sides)


if __name__ == "__main__":
    main()
