"""One question to the daemon by each of its doors: the control socket's lines, and HTTP through the page's server.

    scripts/bench protocols [--rounds 300]

Both on a unix socket, on a connection that is kept, about one pipeline: `status` in brief, and `/api/cold-starts/ID`,
whose answer is smaller. What is left is the price of the doors themselves, client included (control.client;
http.client).
"""

from __future__ import annotations

import argparse
import http.client
import socket
import time
from collections.abc import Callable
from pathlib import Path

from bench import common, daemon
from bench.common import MIB, summary, table
from instantstart_fs import Client


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def _timed(ask: Callable[[], object], rounds: int) -> list[float]:
    for _ in range(20):
        ask()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began)
    return found


def measure(work: Path, rounds: int) -> dict[str, list[float]]:
    model = common.make_model(work / "model", 4 * MIB, 1)
    page = work / "page.sock"
    with daemon.daemon(work, config=f'[http]\nlisten = "off"\nsocket = "{page}"\n') as served:
        served.cli("add", "p", f"file://{model.directory}")
        connection = _Unix(str(page))

        def get() -> None:
            connection.request("GET", "/api/cold-starts/p")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200

        with Client(served.env["INSTANTSTART_SOCKET"]) as client:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    get()
                    break
                except OSError:
                    connection.close()
                    time.sleep(0.1)
            lines = _timed(lambda: client.status("p", brief=True), rounds)
            return {"control socket": lines, "HTTP": _timed(get, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    parser.add_argument("--name", default="protocols", help="of the result file")
    options = parser.parse_args()
    with common.workspace(options.dir) as work:
        samples = measure(work, options.rounds)
    found = {name: summary([1000 * value for value in values]) for name, values in samples.items()}
    rows = [[name, f"{one['median']:.2f}", f"{one['min']:.2f}–{one['max']:.2f}"] for name, one in found.items()]
    print(table(["", "ms: median", "range"], rows))
    common.write_result(options.name, {"samples_ms": found})


if __name__ == "__main__":
    main()
