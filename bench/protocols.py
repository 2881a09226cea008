"""One question to the daemon by each of its doors: the control socket's lines, HTTP on the same socket, and the page.

    scripts/bench protocols [--rounds 300]

All on unix sockets, on a connection that is kept, about one pipeline: `status` in brief by lines and by /v1, and the
page's `/api/cold-starts/ID`, whose answer is smaller. What is left is the price of the doors themselves, client
included (control.client; http.client).
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


def _get(path: str, target: str) -> Callable[[], None]:
    connection = _Unix(path)

    def get() -> None:
        connection.request("GET", target)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200

    return get


def measure(work: Path, rounds: int) -> dict[str, list[float]]:
    model = common.make_model(work / "model", 4 * MIB, 1)
    page = work / "page.sock"
    with daemon.daemon(work, config=f'[http]\nlisten = "off"\nsocket = "{page}"\n') as served:
        served.cli("add", "p", f"file://{model.directory}")
        control = served.env["INSTANTSTART_SOCKET"]
        by_page = _get(str(page), "/api/cold-starts/p")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                by_page()
                break
            except OSError:
                by_page = _get(str(page), "/api/cold-starts/p")
                time.sleep(0.1)
        with Client(control) as client:
            # The lines first: nobody has asked the control socket over HTTP yet.
            return {
                "lines": _timed(lambda: client.status("p", brief=True), rounds),
                "HTTP": _timed(_get(control, "/v1/pipelines/p?brief=true"), rounds),
                "the page": _timed(by_page, rounds),
                "lines again": _timed(lambda: client.status("p", brief=True), rounds),
            }


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
