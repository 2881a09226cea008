"""What gives chunks to a neighbour in the rack at the least price: nginx, the page's server, or the kernel's sendfile.

    scripts/bench rack [--seconds 4] [--connections 4]

Chunks of 8 MiB of one file in the page cache, over loopback, to a client that throws them away (one thread for each
connection). Processor seconds are the server's own, user and system. The rack level's server checks a ticket for each
chunk, and paces; the others do not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from bench import common
from bench.common import MIB, table
from instantstart_fs.core import rack
from instantstart_fs.core.rack import Asked

CHUNK, CHUNKS = 8 * MIB, 24
KEY, HOST, NOW = b"k" * 32, "owner", 1_000_000.0
SLOT, PIN = "ab" * 16, "cd" * 16


# -- servers, each a process of its own --------------------------------------------------------------------------------


def serve_level(path: str, rate: str = str(100 << 30)) -> None:
    import trio

    from instantstart_fs.core.fillplan import FillPlan
    from instantstart_fs.filler.region_follow import RegionSettings
    from instantstart_fs.filler.region_rack import RackLevel
    from instantstart_fs.filler.table import FillTable
    from instantstart_fs.regional.keys import RegionKey
    from instantstart_fs.serving.rack_chunks import Part, RackChunks
    from instantstart_fs.serving.rack_server import RackServer

    class Chunks:
        async def find(self, asked: Asked) -> Part:
            return Part(os.open(path, os.O_RDONLY), asked.chunk * CHUNK, CHUNK, bytes(32))

    async def run() -> None:
        level = RackLevel(RegionSettings(HOST, RegionKey(KEY), (), (), rack="r"), FillPlan(1), cast(FillTable, None))
        level.clock = lambda: NOW
        server = RackServer(("127.0.0.1", 0), int(rate), HOST, KEY, level, cast(RackChunks, Chunks()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            while not server.address:
                await trio.sleep(0.01)
            print(server.address.rpartition(":")[2], flush=True)

    trio.run(run)


def serve_page(path: str) -> None:
    import trio
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route

    from instantstart_fs.core.sight import EVERYTHING
    from instantstart_fs.web.listener import bind
    from instantstart_fs.web.server import serve
    from instantstart_fs.web.visitors import Visitor

    async def chunk(request: Request) -> Response:
        return FileResponse(path)

    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    app = Starlette(routes=[Route("/blob", chunk)])
    trio.run(serve, app, [listener], lambda stream: Visitor(EVERYTHING, "bench"))


@contextlib.contextmanager
def own(kind: str, path: Path, *more: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of one of the two above. ``more``: what it takes beside the path."""
    command = [sys.executable, "-m", "bench.rack", "--serve", kind, str(path), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def nginx(path: Path) -> Iterator[tuple[int, int]]:
    from tests.servers.nginx import NginxServer

    with NginxServer(path.parent) as server:
        yield server.pid, server.port


# -- the client --------------------------------------------------------------------------------------------------------


def level_request(chunk: int) -> bytes:
    asked = Asked(SLOT, PIN, chunk, 1.0, True)
    ticket = rack.make_ticket(KEY, HOST, asked, NOW)
    return f"GET {rack.path_of(asked)} HTTP/1.1\r\nHost: x\r\nAuthorization: {ticket}\r\n\r\n".encode()


def range_request(chunk: int) -> bytes:
    return f"GET /blob HTTP/1.1\r\nHost: x\r\nRange: bytes={chunk * CHUNK}-{(chunk + 1) * CHUNK - 1}\r\n\r\n".encode()


def take(port: int, request: Callable[[int], bytes], until: float, first: int) -> int:
    """Chunk after chunk over one connection; the bytes that came."""
    buffer, total, chunk = bytearray(MIB), 0, first
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while time.monotonic() < until:
            connection.sendall(request(chunk % CHUNKS))
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            assert b" 206 " in head.partition(b"\r\n")[0], head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            left = int(length.partition(b":")[2]) - len(head.partition(b"\r\n\r\n")[2])
            while left:
                count = connection.recv_into(buffer, min(left, MIB))
                assert count
                left -= count
            total += CHUNK
            chunk += 1
    return total


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pid: int, port: int, request: Callable[[int], bytes], seconds: float, connections: int) -> dict[str, float]:
    take(port, request, time.monotonic() + 0.3, 0)
    before, began = cpu_seconds(pid), time.monotonic()
    totals = [0] * connections

    def run(number: int) -> None:
        totals[number] = take(port, request, began + seconds, number * CHUNKS // connections)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken, spent = sum(totals) / 1e9, time.monotonic() - began
    return {"gb_per_s": taken / spent, "cpu_s_per_gb": (cpu_seconds(pid) - before) / taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        servers: dict[str, Callable[..., None]] = {"level": serve_level, "page": serve_page}
        servers[given.serve[0]](*given.serve[1:])
        return
    ways: dict[str, tuple[Callable[[Path], Any], Callable[[int], bytes]]] = {
        "nginx": (nginx, range_request),
        "the page's server (hypercorn, starlette)": (lambda path: own("page", path), range_request),
        "h11 and sendfile, tickets checked": (lambda path: own("level", path), level_request),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "blob"
        path.write_bytes(os.urandom(CHUNK * CHUNKS))
        path.chmod(0o644)
        Path(directory).chmod(0o755)
        for _ in range(given.rounds):
            for name, (server, request) in ways.items():
                with server(path) as (pid, port):
                    found[name].append(measure(pid, port, request, given.seconds, given.connections))

    def shown(rounds: list[dict[str, float]], what: str) -> str:
        values = sorted(one[what] for one in rounds)
        return f"{values[len(values) // 2]:.2f} ({values[0]:.2f}–{values[-1]:.2f})"

    rows = [[name, shown(rounds, "cpu_s_per_gb"), shown(rounds, "gb_per_s")] for name, rounds in found.items()]
    print(table(["server", "processor seconds per GB", "GB/s"], rows))
    common.write_result("rack", {"seconds": given.seconds, "connections": given.connections, "rounds": found})


if __name__ == "__main__":
    main()
