"""What serving a neighbour costs: the rack's own process (sendfile, a ticket for each request) beside nginx.

    scripts/bench rack [--size 1GiB] [--clients 4] [--rounds 5] [--chunk 8MiB]

Each client is a process that asks for chunk after chunk over one connection and throws the bytes away, all over
loopback. GB/s, and processor seconds per GB of the serving side alone. Rounds are interleaved. On two cores the clients
take most of them: the processor seconds tell, the GB/s do not.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.common import Rounds, size, summary, table, workspace, write_result
from bench.daemon import children, cpu_seconds
from bench.origins import nginx
from instantstart_fs.core.rack import rack_key, ticket

PATH = "slot/generation/0"
KEY = rack_key(b"bench" * 8)


@contextlib.contextmanager
def rack_server(file: Path) -> Iterator[tuple[int, int]]:
    """(port, pid) of the rack's process, which may serve ``file``."""
    listener = socket.create_server(("127.0.0.1", 0))
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-m", "instantstart_fs.regional.rack_server"]
    child = subprocess.Popen(
        [*words, str(theirs.fileno()), str(listener.fileno())], pass_fds=(theirs.fileno(), listener.fileno())
    )
    port: int = listener.getsockname()[1]
    theirs.close()
    listener.close()
    control.send(json.dumps({"key": KEY.hex(), "connections": 64, "streams": 64, "rate": 0}).encode())

    def answer() -> None:
        while data := control.recv(65536):
            message = json.loads(data)
            if "ask" in message:
                with file.open("rb") as opened:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [opened.fileno()]))]
                    said = {"answer": message["ask"], "path": PATH, "size": file.stat().st_size, "whole": True}
                    control.sendmsg([json.dumps(said).encode()], rights)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield port, child.pid
    finally:
        control.shutdown(socket.SHUT_RDWR)
        thread.join()
        control.close()
        child.wait(10)


def client(port: int, path: str, first: int, stop: int, chunk: int, ticketed: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    buffer = memoryview(bytearray(1 << 20))
    epoch, clock = "", 0.0
    if ticketed:
        connection.request("GET", "/v1/clock")
        told = json.loads(connection.getresponse().read())
        epoch, clock = told["epoch"], told["clock"]
    while first < stop:
        headers = {"Range": f"bytes={first}-{min(first + chunk, stop) - 1}"}
        if ticketed:
            headers["Authorization"] = f"Ticket {ticket(KEY, path, epoch, int(clock + 30))}"
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        if answer.status != 206:
            raise RuntimeError(f"{path}: {answer.status}")
        while count := answer.readinto(buffer):
            first += count
    connection.close()


def measured(
    port: int, path: str, pids: list[int], total: int, options: argparse.Namespace, ticketed: bool
) -> dict[str, float]:
    before = sum(map(cpu_seconds, pids))
    started = time.monotonic()
    share = total // options.clients
    context = multiprocessing.get_context("fork")
    crew = [
        context.Process(target=client, args=(port, path, share * number, share * (number + 1), options.chunk, ticketed))
        for number in range(options.clients)
    ]
    for each in crew:
        each.start()
    for each in crew:
        each.join()
    if any(each.exitcode for each in crew):
        raise RuntimeError("a client failed")
    seconds = time.monotonic() - started
    moved = share * options.clients / 1e9
    return {
        "seconds": seconds,
        "gb_per_s": moved / seconds,
        "cpu_per_gb": (sum(map(cpu_seconds, pids)) - before) / moved,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default=size("1GiB"))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=size, default=size("8MiB"))
    options = parser.parse_args()
    with workspace(None) as directory, contextlib.ExitStack() as closing:
        root = directory / "root"
        root.mkdir()
        file = root / "blob"
        with file.open("wb") as out:
            block = os.urandom(1 << 20)
            for _ in range(options.size >> 20):
                out.write(block)
        total = file.stat().st_size
        ours, pid = closing.enter_context(rack_server(file))
        url = closing.enter_context(nginx(directory / "nginx", root))
        port = int(url.rpartition(":")[2])
        master = int((directory / "nginx" / "nginx.pid").read_text())
        pids = [master, *children(master)]
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "the rack's process": lambda: measured(ours, f"/v1/{PATH}", [pid], total, options, True),
            "nginx, 2 processes": lambda: measured(port, "/blob", pids, total, options, False),
        }
        rounds = Rounds(contenders, options.rounds)
        rounds.run()
    found = {
        name: {key: summary(rounds.seconds(name, key)) for key in ("gb_per_s", "cpu_per_gb")} for name in contenders
    }
    rows = [
        (name, *(f"{values[key]['median']:.2f} ({values[key]['min']:.2f}–{values[key]['max']:.2f})" for key in values))
        for name, values in found.items()
    ]
    print(table(("", "GB/s", "CPU s/GB of the server"), rows))
    write_result("rack", {"size": total, "clients": options.clients, "chunk": options.chunk, "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
