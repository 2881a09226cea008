"""A gate before SeaweedFS that refuses as an S3 policy would: each right by itself, by access key, or not without one.

It signs what it passes on with the administrator's key, so what a caller's own signature is worth is the gate's to say:
``keys`` are those that it knows, ``public`` whether it wants none. Real requests, real bytes; only the refusals, and
what engines are known to say otherwise (ETags that are no MD5s), are made here.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.servers.seaweed import SeaweedServer

_OWN = ("x-amz-", "authorization", "host", "connection", "content-length")
_KEY = re.compile(r"Credential=([^/%]+)")


class S3Gate:
    """``denied``: rights by their names in a policy. ``renamed``: (is, shown as) in
    listings. ``fault(method, query)``: a status to answer instead, or None.
    ``seen``: (right, access key or "") of each request. A context manager."""

    def __init__(self, seaweed: SeaweedServer) -> None:
        self.seaweed = seaweed
        self.denied: set[str] = set()
        self.keys: set[str] | None = None
        self.public = False
        self.requester_pays = False
        self.fake_etags: bool | str = False
        """Of all objects, or of those whose keys end so; without any other checksum."""
        self.renamed = (b"", b"")
        self.code = "AccessDenied"
        self.fault: Callable[[str, dict[str, list[str]]], int | None] = lambda method, query: None
        self.seen: list[tuple[str, str]] = []
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> S3Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, gate: S3Gate) -> None:
        self.gate = gate
        super().__init__(("127.0.0.1", 0), _Handler)


def _right(path: str, query: dict[str, list[str]]) -> str:
    if "/" not in path.strip("/"):
        return "s3:ListBucketVersions" if "versions" in query else "s3:ListBucket"
    if "attributes" in query:
        return "s3:GetObjectAttributes"
    return "s3:GetObjectVersion" if "versionId" in query else "s3:GetObject"


def _disguise(etag: bytes) -> bytes:
    """Another 32 digits, of which this is its own inverse."""
    return etag.translate(bytes.maketrans(b"0123456789abcdef", b"fedcba9876543210"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        gate = self.server.gate
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        right = _right(url.path, query)
        found = _KEY.search(
            self.headers.get("Authorization", "") + " " + self.path.replace("-Credential", " Credential")
        )
        key = found[1] if found else ""
        gate.seen.append((right, key))
        status = gate.fault(self.command, query)
        if status is not None:
            return self.refuse(status, "SlowDown" if status == 503 else "InternalError")
        if not key and not gate.public:
            return self.refuse(403, "AccessDenied")
        if key and gate.keys is not None and key not in gate.keys:
            return self.refuse(403, "InvalidAccessKeyId")
        if gate.requester_pays and "requester" not in (self.headers.get("x-amz-request-payer") or ""):
            return self.refuse(403, "AccessDenied")
        if right in gate.denied:
            return self.refuse(403, gate.code)
        return self.pass_on(url.path, query, url.query)

    do_HEAD = do_GET

    def pass_on(self, path: str, query: dict[str, list[str]], raw: str) -> None:
        gate = self.server.gate
        kept = "&".join(part for part in raw.split("&") if part and not part.startswith("X-Amz-"))
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith(_OWN)}
        if checksums := self.headers.get("x-amz-checksum-mode"):
            headers["x-amz-checksum-mode"] = checksums
        fake = path.endswith(gate.fake_etags) if isinstance(gate.fake_etags, str) else gate.fake_etags
        if fake and "If-Match" in headers:
            headers["If-Match"] = _disguise(headers["If-Match"].encode()).decode()
        request = AWSRequest(self.command, f"{gate.seaweed.endpoint_url}{path}{'?' + kept if kept else ''}", headers)
        S3SigV4Auth(Credentials(gate.seaweed.access_key, gate.seaweed.secret_key), "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", gate.seaweed.port, timeout=20)
        try:
            connection.request(self.command, path + ("?" + kept if kept else ""), headers=dict(request.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if gate.renamed[0] and "list-type" in query:
            body = body.replace(*gate.renamed)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() in ("connection", "transfer-encoding"):
                continue
            if fake and name.lower() in ("etag", "seaweed-x-amz-etag"):
                value = _disguise(value.encode()).decode()
            if gate.fake_etags and name.lower().startswith("x-amz-checksum"):
                continue
            if name.lower() == "content-length" and self.command == "GET":
                continue
            self.send_header(name, value)
        if self.command == "GET":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
