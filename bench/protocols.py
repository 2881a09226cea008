"""One question to the daemon by each of its doors: the control socket's lines, HTTP on the same socket, and the page.

    scripts/bench protocols [--rounds 300]
    scripts/bench protocols --against CHECKOUT [--rounds 2000]

All on unix sockets, on a connection that is kept, about one pipeline: `status` in brief by lines and by /v1, and the
page's `/api/cold-starts/ID`, whose answer is smaller. What is left is the price of the doors themselves, client
included (control.client; http.client).

With --against the lines alone, of this daemon and of another checkout's, asked in turn: one pipeline's status, and all
of them, where there is 1 pipeline and where there are 100. The client is this checkout's.
"""

from __future__ import annotations

import argparse
import http.client
import socket
import statistics
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


def compare(work: Path, checkout: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Question → pairs of seconds: here, there. The first of a pair is asked first in every other one."""
    model = common.make_model(work / "model", 4 * MIB, 1)
    theirs = {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}  # or the working directory comes before it
    config = '[http]\nlisten = "off"\n'
    found = {}
    with (
        daemon.daemon(work, config=config, name="here") as here,
        daemon.daemon(work, config=config, name="there", env=theirs) as there,
        Client(here.env["INSTANTSTART_SOCKET"]) as ours,
        Client(there.env["INSTANTSTART_SOCKET"]) as others,
    ):
        run_from = Path(f"/proc/{there.child.pid}/environ").read_bytes()
        assert f"PYTHONPATH={checkout}".encode() in run_from
        clients = (ours, others)
        for number in range(100):
            for client in clients:
                client.add(f"p{number}", f"file://{model.directory}")
            if number + 1 not in (1, 100):
                continue
            for name, ask in QUESTIONS.items():
                for client in clients:
                    _timed(lambda client=client, ask=ask: ask(client), 1)  # type: ignore[misc]
                pairs = []
                for turn in range(rounds):
                    taken = [0.0, 0.0]
                    for which in (0, 1) if turn % 2 else (1, 0):
                        began = time.perf_counter()
                        ask(clients[which])
                        taken[which] = time.perf_counter() - began
                    pairs.append((taken[0], taken[1]))
                found[f"{name}, of {number + 1}"] = pairs
    return found


QUESTIONS: dict[str, Callable[[Client], object]] = {
    "status in brief": lambda client: client.status("p0", brief=True),
    "all statuses": lambda client: client.pipelines(),
}


def show_pairs(found: dict[str, list[tuple[float, float]]]) -> str:
    rows = []
    for name, pairs in found.items():
        here, there = (statistics.median(pair[which] for pair in pairs) * 1000 for which in (0, 1))
        ratios = sorted(mine / other for mine, other in pairs)
        low, middle, high = (ratios[len(ratios) * share // 100] for share in (25, 50, 75))
        rows.append([name, f"{here:.3f}", f"{there:.3f}", f"{middle:.3f}", f"{low:.2f}–{high:.2f}"])
    return table(["", "ms here", "ms there", "ratio of a pair: median", "half of them"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    parser.add_argument("--name", default="protocols", help="of the result file")
    parser.add_argument("--against", metavar="CHECKOUT", type=Path, help="of another version; compares the lines")
    options = parser.parse_args()
    if options.against is not None:
        with common.workspace(options.dir) as work:
            print(show_pairs(compare(work, options.against.absolute(), options.rounds)))
        return
    with common.workspace(options.dir) as work:
        samples = measure(work, options.rounds)
    found = {name: summary([1000 * value for value in values]) for name, values in samples.items()}
    rows = [[name, f"{one['median']:.2f}", f"{one['min']:.2f}–{one['max']:.2f}"] for name, one in found.items()]
    print(table(["", "ms: median", "range"], rows))
    common.write_result(options.name, {"samples_ms": found})


if __name__ == "__main__":
    main()
