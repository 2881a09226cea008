"""A program that starts as an engine does, for tests of `run`: it compiles what its cache lacks, serves /health and
/v1/completions, and says what happened in a file. Real bytes, a real port; only the model is none.

    python engine_stub.py DIRECTORY [--port N] [--log-ready] [--ready-file PATH] [--exit N] [--grow]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KERNELS = 5


def compile_kernels(cache: Path, count: int) -> dict[str, list[str]]:
    """What torch's inductor does: a temporary file, then a rename; a kernel that is there is used if it is right."""
    found: dict[str, list[str]] = {"compiled": [], "used": [], "wrong": []}
    for number in range(count):
        kernel = cache / f"k{number}" / "kernel.so"
        expected = hashlib.sha256(f"kernel {number}".encode()).digest() * 3000
        if kernel.exists():
            found["used" if kernel.read_bytes() == expected else "wrong"].append(kernel.parent.name)
            continue
        kernel.parent.mkdir(parents=True, exist_ok=True)
        temporary = kernel.with_suffix(".tmp")
        temporary.write_bytes(expected)
        temporary.rename(kernel)
        found["compiled"].append(kernel.parent.name)
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "toy"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"choices": [{"text": "x"}], "model": request["model"]})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log-ready", action="store_true")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--exit", type=int)
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--weights", type=Path)
    arguments, _ = parser.parse_known_args()
    own = Path(os.environ.get("STUB_RESULT", os.devnull)).parent / "own"  # its directory where nobody names another
    cache = Path(os.environ.get("TRITON_CACHE_DIR", own))
    found = compile_kernels(cache, KERNELS + 2 * arguments.grow)
    result = {**found, "cache": str(cache)}
    if arguments.weights is not None:
        result["weights"] = hashlib.sha256(arguments.weights.read_bytes()).hexdigest()
    Path(os.environ.get("STUB_RESULT", "/dev/null")).write_text(json.dumps(result))
    if arguments.exit is not None:
        return int(arguments.exit)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if arguments.port:
        server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("Loading weights took 0.25 seconds", flush=True)
    print("torch.compile took 1.50 s in total", file=sys.stderr, flush=True)
    if arguments.log_ready:
        time.sleep(0.05)
        print("the engine is up", flush=True)
    if arguments.ready_file is not None:
        arguments.ready_file.write_text("")
    ended.wait(60)
    print("bye", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
