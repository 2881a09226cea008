"""A proxy before a tier's S3 that fails in one way: it answers in the engine's place, late, or only what it likes."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "slow", "412", "full", "none"]


class TierFaults:
    """``fault``: "503" to everything, "slow" = each answer 5 s late, "412" to every PUT, "full" = 507 to every PUT. The
    caller's Host goes on, so that his signature holds. A context manager."""

    def __init__(self, upstream: str, fault: Fault) -> None:
        self.fault: Fault = fault
        self.asked = 0
        self.requests: list[str] = []
        """Method and target of each request, as it came."""
        outer, there = self, urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def any(self) -> None:
                with contextlib.suppress(OSError):  # who asked has gone
                    self._any()

            def _any(self) -> None:
                outer.asked += 1
                outer.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if outer.fault == "slow":
                    time.sleep(5)
                refused = {"503": 503, "412": 412, "full": 507}.get(outer.fault)
                if refused is not None and (outer.fault == "503" or self.command == "PUT"):
                    self.send_response(refused)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                upstream = http.client.HTTPConnection(there, timeout=20)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        upstream.putheader(name, value)
                    upstream.endheaders(body)
                    answer = upstream.getresponse()
                    data = answer.read()
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                            self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                finally:
                    upstream.close()

            do_GET = do_PUT = do_DELETE = do_HEAD = any

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> TierFaults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
