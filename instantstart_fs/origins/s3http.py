"""Sends requests to one S3 bucket that are signed already, and reads the answers: bodies are bounded in size and time.
It knows no credentials, and repeats nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

import botocore.exceptions
import urllib3
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.httpsession import URLLib3Session

from instantstart_fs.core.faults import Fault
from instantstart_fs.core.refusals import MOST_ERROR_BODY
from instantstart_fs.errors import OriginMisbehaved
from instantstart_fs.origins.proxies import Proxies, ca_bundle
from instantstart_fs.origins.s3pages import PageJudge

AT_ONCE = 32
READ_SECONDS = 60.0
PAGE_SECONDS = 60.0
ERROR_SECONDS = 10.0
"""Seconds for the whole of a body: a time-out for each read says nothing of one that drips."""
BLOCK = 1024 * 1024
WIRE_STATUS = "x-instantstart-status"
"""A header of ours, in answers to listings alone."""


class Answered:
    """An answer of S3 to one request. ``body``: the first MOST_ERROR_BODY bytes of a GET's."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class _Read:
    """A body that has been read, in the place of one that comes over a connection."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self) -> Iterator[bytes]:
        yield self._body


def _read(response: AWSResponse, body: bytes) -> AWSResponse:
    """Return the answer with its body. WIRE_STATUS tells the status that came: botocore makes a 500 of a 200 that it
    cannot parse."""
    headers = {**response.headers, WIRE_STATUS: str(response.status_code)}
    return AWSResponse(response.url, response.status_code, headers, _Read(body))  # type: ignore[arg-type]


def _beginning(response: AWSResponse) -> bytes:
    """Return the first MOST_ERROR_BODY bytes that come within ERROR_SECONDS, and close the answer: it says enough."""
    body = bytearray()
    end = time.monotonic() + ERROR_SECONDS
    try:
        while len(body) < MOST_ERROR_BODY and time.monotonic() < end:
            block = response.raw.read1(MOST_ERROR_BODY - len(body), decode_content=False)
            if not block:
                break
            body += block
    except urllib3.exceptions.HTTPError:
        pass  # the status says enough
    finally:
        response.raw.close()
    return bytes(body)


class S3Http:
    """Thread-safe. ``timeout``: seconds without a byte; ``judge``: of the listings' pages."""

    def __init__(self, bucket: str, timeout: float, judge: PageJudge) -> None:
        self._bucket = bucket
        self._timeout = timeout
        self._judge = judge
        self._lock = threading.Lock()
        self._session: URLLib3Session | None = None

    def send(self, method: str, url: str, headers: dict[str, str]) -> Answered:
        """Send a request that is asked for its status. Raises botocore's HTTPClientError."""
        response = self._connections(url).send(_request(method, url, headers).prepare())
        return Answered(response.status_code, response.headers, _beginning(response) if method == "GET" else b"")

    def read(self, url: str, headers: dict[str, str], size: int, take: Callable[[bytes], None]) -> int:
        """Give all bytes of an object of ``size`` to ``take``; how many came within READ_SECONDS."""
        count, end = 0, time.monotonic() + READ_SECONDS
        response = self._connections(url).send(_request("GET", url, headers).prepare())
        try:
            if response.status_code != 200:
                return 0
            while count <= size and time.monotonic() < end:
                block = response.raw.read1(BLOCK, decode_content=False)
                if not block:
                    break
                take(block)
                count += len(block)
        except urllib3.exceptions.HTTPError:
            return 0  # cut short, or silent
        finally:
            response.raw.close()
        return count

    def send_listing(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        """Send a request for a page in the place of botocore, which would read a body of any length, in any time, and
        unfold it."""
        request.stream_output = True
        response = self._connections(request.url).send(request)
        if response.status_code >= 300:
            return _read(response, _beginning(response))
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        whole = False
        body = bytearray()
        end = time.monotonic() + PAGE_SECONDS
        try:
            if encoding not in ("", "identity"):
                raise OriginMisbehaved(
                    f"s3://{self._bucket}: a listing in {encoding[:20]!r}, which nobody asked for", fault=Fault.ENCODED
                )
            while block := response.raw.read1(BLOCK, decode_content=False):
                body += block
                self._judge.allow(len(body))
                if time.monotonic() > end:
                    raise botocore.exceptions.ReadTimeoutError(
                        endpoint_url=request.url, error=f"not whole after {PAGE_SECONDS:g} s"
                    )
            if response.headers.get("Content-Length", str(len(body))) != str(len(body)):
                raise botocore.exceptions.ConnectionClosedError(endpoint_url=request.url, request=request, error="cut")
            whole = True
        except urllib3.exceptions.HTTPError as error:
            raise botocore.exceptions.ConnectionClosedError(
                endpoint_url=request.url, request=request, error=error
            ) from error
        finally:
            if not whole:
                response.raw.close()
        found = bytes(body)
        self._judge.check(found)
        return _read(response, found)

    def _connections(self, url: str) -> URLLib3Session:
        with self._lock:
            if self._session is None:
                proxy = Proxies().of(url)
                self._session = URLLib3Session(
                    verify=ca_bundle() or True,  # type: ignore[arg-type]
                    proxies={urlsplit(url).scheme: proxy} if proxy else {},
                    timeout=(min(self._timeout, 10.0), self._timeout),  # type: ignore[arg-type]
                    max_pool_connections=AT_ONCE,
                )
            return self._session


def _request(method: str, url: str, headers: dict[str, str]) -> AWSRequest:
    return AWSRequest(
        method,
        url,
        headers={**headers, "Accept-Encoding": "identity", "User-Agent": "instantstart-fs"},
        stream_output=method == "GET",
    )
