"""A security token service: AssumeRoleWithWebIdentity and AssumeRole, as far as boto3 asks for them.

It lends access keys to an S3Gate, which takes them until the test ends them (``gate.keys``)."""

from __future__ import annotations

import re
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs

from tests.servers.s3_gate import S3Gate

_KEY = re.compile(r"Credential=([^/,]+)")


class StsServer:
    """``tokens``: web identities that it knows. ``sources``: access keys that may assume a role. ``lifetime``: seconds
    of what it lends. ``fault``: (status, code) of every answer, or None. ``hung``: an Event that answers wait for. A
    context manager."""

    def __init__(self, gate: S3Gate) -> None:
        self.gate = gate
        self.tokens: set[str] = set()
        self.sources: set[str] = set()
        self.lifetime = 3600.0
        self.fault: tuple[int, str] | None = None
        self.hung = threading.Event()
        self.hung.set()
        self.asked: list[str] = []
        """What was shown at each request: a token, or an access key."""
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> StsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hung.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, sts: StsServer) -> None:
        self.sts = sts
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        sts = self.server.sts
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        action = form["Action"][0]
        if action == "AssumeRoleWithWebIdentity":
            shown, known = form["WebIdentityToken"][0], sts.tokens
        else:
            found = _KEY.search(self.headers.get("Authorization", ""))
            shown, known = found[1] if found else "", sts.sources
        sts.asked.append(shown)
        sts.hung.wait(30)
        if sts.fault is not None:
            return self.answer(sts.fault[0], _error(sts.fault[1]))
        if shown not in known:
            web = action == "AssumeRoleWithWebIdentity"
            return self.answer(
                *((400, _error("InvalidIdentityToken")) if web else (403, _error("InvalidClientTokenId")))
            )
        key = f"lent{len(sts.asked)}"
        sts.gate.keys = (sts.gate.keys or set()) | {key}
        end = datetime.fromtimestamp(time.time() + sts.lifetime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return self.answer(
            200,
            f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
            f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
            f"<SessionToken>session-of-{key}</SessionToken><Expiration>{end}</Expiration></Credentials>"
            "<AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/reader/s</Arn>"
            f"<AssumedRoleId>R:s</AssumedRoleId></AssumedRoleUser></{action}Result></{action}Response>",
        )

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def _error(code: str) -> str:
    return f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>No.</Message></Error></ErrorResponse>"
