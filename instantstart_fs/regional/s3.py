"""A tier in a bucket of any S3-compatible engine. It uses only GET, PUT, PUT with If-None-Match: *, DELETE and LIST.

Requests are signed here (regional/sigv4.py); boto3 finds the credentials. Where this machine's clock is off, the engine
says so (RequestTimeTooSkewed), and its Date header then gives the difference.
"""

from __future__ import annotations

import email.utils
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import urllib3
from urllib3.exceptions import HTTPError

from instantstart_fs.core.urls import s3_url_problem
from instantstart_fs.errors import (
    AccessRefused,
    ConfigError,
    CredentialsUnusable,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
    printable,
)
from instantstart_fs.regional.sigv4 import Secrets, Signer, query_text
from instantstart_fs.regional.store import Address, Stored, put_seconds

LIFETIME = 3600
SECRETS_SECONDS = 60.0
"""Seconds for which credentials are kept. They rotate."""
CONNECT_SECONDS, READ_SECONDS = 2.0, 4.0
PIECE = 256 * 1024
"""Bytes of a body that are sent at once. Each piece has CONNECT_SECONDS, the whole body ``put_seconds``."""
MOST_LISTING = 4 << 20
"""The most bytes of one page of a listing."""
CONNECTIONS = 32
MOST_ERROR = 65536
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,60})</Code>")
_SKEWED = frozenset({b"RequestTimeTooSkewed", b"AccessDenied", b"SignatureDoesNotMatch"})
_UNSUPPORTED = frozenset({400, 405, 501})
LEAST_SKEW = 60.0


class S3Store:
    """The storage. ``prefix`` has no slashes at its ends; "" is the whole bucket. ``endpoint_url`` None is AWS."""

    scheme = "s3"

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint_url: str | None,
        region_name: str | None,
        profile: str | None,
    ) -> None:
        if endpoint_url and (problem := s3_url_problem(endpoint_url)) is not None:
            raise ConfigError(f"regional.endpoint_url: {problem}")
        self._region = region_name or "us-east-1"
        self._profile = profile
        url = (endpoint_url or f"https://s3.{self._region}.amazonaws.com").rstrip("/")
        self._bucket_url = f"{url}/{bucket}"
        self._prefix = f"{prefix}/" if prefix else ""
        self.endpoint = urlsplit(url).netloc.rpartition("@")[2]
        self._signer = Signer(self._region)
        self._lock = threading.Lock()
        self._secrets: Secrets | None = None
        self._secrets_until = 0.0
        self._skew = 0.0
        self._timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        self._http = urllib3.PoolManager(
            CONNECTIONS,
            maxsize=CONNECTIONS,
            retries=False,
            timeout=self._timeout,
        )

    # -- TierStore -------------------------------------------------------------------------------------------------

    def address(self, name: str) -> Address:
        now = time.time()
        url = self._signer.presigned(self._credentials(), self._url(name), LIFETIME, now + self._skew)
        return Address(url, (), now + LIFETIME)

    def get(self, name: str, most: int) -> bytes:
        return self._ask("GET", name, most=most)[1]

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        self._ask("PUT", name, body=data)

    def put_new(self, name: str, data: bytes) -> bool:
        status, _ = self._ask("PUT", name, body=data, headers={"If-None-Match": "*"}, fine=(200, 201, 204, 409, 412))
        return status < 300

    def delete(self, name: str) -> None:
        self._ask("DELETE", name, fine=(200, 202, 204, 404))

    def interrupted(self, most: int) -> Iterator[Stored]:
        """Return nothing: each object is one PUT, and an engine keeps no half of one."""
        return iter(())

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        query = {"list-type": "2", "prefix": self._prefix + prefix}
        count = pages = 0
        while count < most and pages <= most // 1000 + 1:
            pages += 1
            _, body = self._ask("GET", None, query=query, most=MOST_LISTING)
            entries, token = _listing(body)
            for key, size, modified in entries:
                if key.startswith(self._prefix):
                    yield Stored(key[len(self._prefix) :], size, modified)
                count += 1
                if count >= most:
                    return
            if not token:
                return
            query["continuation-token"] = token

    # -- inside ----------------------------------------------------------------------------------------------------

    def _url(self, name: str | None) -> str:
        return self._bucket_url if name is None else f"{self._bucket_url}/{quote(self._prefix + name, safe='/-_.~')}"

    def _credentials(self) -> Secrets:
        with self._lock:
            if self._secrets is not None and time.monotonic() < self._secrets_until:
                return self._secrets
        if self._profile is None and (found_here := _secrets_in_environment()) is not None:
            return found_here
        import boto3  # late: a second of imports that only a region needs
        import botocore.exceptions

        try:
            found = boto3.Session(profile_name=self._profile).get_credentials()
            frozen = found.get_frozen_credentials() if found is not None else None
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise CredentialsUnusable(f"the tier's credentials cannot be had: {printable(str(error))}") from None
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise CredentialsUnusable("there are no credentials for the tier: set regional.profile, or AWS_*")
        with self._lock:
            self._secrets = Secrets(frozen.access_key, frozen.secret_key, frozen.token or "")
            self._secrets_until = time.monotonic() + SECRETS_SECONDS
            return self._secrets

    def _ask(
        self,
        method: str,
        name: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | bytearray | memoryview | None = None,
        most: int = 65536,
        fine: tuple[int, ...] = (200, 201, 204, 206),
        again: bool = True,
    ) -> tuple[int, bytes]:
        url, query = self._url(name), query or {}
        what = f"{method} {self.endpoint} {name or query.get('prefix', '')}"
        sent = dict(headers or {})
        signed = self._signer.headers(self._credentials(), method, url, query, sent, time.time() + self._skew)
        if body is not None:
            signed["content-length"] = str(len(body))
        try:
            response = self._http.request(
                method,
                f"{url}?{query_text(query)}" if query else url,
                headers=signed,
                body=None if body is None else _pieces(what, body),  # type: ignore[arg-type]
                timeout=self._timeout if body is None else _put_timeout(len(body)),
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                limit = most if response.status in fine else MOST_ERROR
                answer = response.read(limit + 1)
                date = response.headers.get("Date", "")
                retry_after = response.headers.get("Retry-After", "")
                status = response.status
                if len(answer) > limit:
                    response.close()
                    raise OriginMisbehaved(f"{what}: {response.status} with more than {limit} bytes")
                response.drain_conn()
            finally:
                response.release_conn()
        except HTTPError as error:
            raise OriginUnavailable(f"{what}: {type(error).__name__}") from error
        except OSError as error:
            raise OriginUnavailable(f"{what}: {error.strerror or type(error).__name__}") from error
        if status in fine:
            return status, answer
        found = _CODE.search(answer)
        code = found[1] if found is not None else b""
        if again and status in (400, 403) and code in _SKEWED and self._takes_clock(date):
            return self._ask(method, name, query=query, headers=headers, body=body, most=most, fine=fine, again=False)
        said = f"{what}: {status} {code.decode()}".rstrip()
        if status == 404:
            raise OriginNotFound(said)
        if status in (401, 403):
            with self._lock:
                self._secrets_until = 0.0
            raise AccessRefused(said)
        if status in (429, 503):
            raise OriginThrottled(
                said, retry_after=float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
            )
        if "If-None-Match" in sent and status in _UNSUPPORTED and code != b"RequestTimeout":
            raise OriginUnsupported(f"{said}: conditional writes (If-None-Match) are not for this engine")
        raise OriginUnavailable(said)

    def _takes_clock(self, date: str) -> bool:
        """Whether the engine's clock differs from this machine's. If so, requests are signed by the engine's from now
        on."""
        try:
            there = email.utils.parsedate_to_datetime(date).timestamp()
        except (ValueError, TypeError, OverflowError):
            return False
        skew = there - time.time()
        if abs(skew - self._skew) < LEAST_SKEW:
            return False
        self._skew = skew
        return True

    @property
    def skew(self) -> float:
        """Return the seconds that the engine's clock is ahead of this machine's; 0 where the difference does not
        matter."""
        return self._skew


def _put_timeout(size: int) -> urllib3.Timeout:
    """Seconds for one PUT. An engine may answer only after it has written the whole object."""
    return urllib3.Timeout(connect=CONNECT_SECONDS, read=max(READ_SECONDS, put_seconds(size) / 2))


def _pieces(what: str, body: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """Yield the body in pieces. Over plain HTTP a connection's time-out covers all that is sent at once."""
    end = time.monotonic() + put_seconds(len(body))
    view = memoryview(body)
    for at in range(0, len(body), PIECE):
        if time.monotonic() > end:
            raise OriginUnavailable(f"{what}: not {len(body)} bytes within {put_seconds(len(body)):.0f} s")
        yield view[at : at + PIECE]


def _secrets_in_environment() -> Secrets | None:
    """Return the credentials in the environment. boto3 asks there first where no profile is named, but takes a second
    to import."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        return None
    token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
    return Secrets(key, secret, token or "")


def _listing(body: bytes) -> tuple[list[tuple[str, int, float]], str]:
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise OriginMisbehaved("a listing with a document type is not read")
    try:
        root = ElementTree.fromstring(body)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # an encoding that Python lacks, too
        raise OriginMisbehaved(f"a listing cannot be read: {error}") from error
    entries: list[tuple[str, int, float]] = []
    token = truncated = ""
    for element in root:
        tag = element.tag.rpartition("}")[2]
        if tag == "Contents":
            found = {child.tag.rpartition("}")[2]: child.text or "" for child in element}
            entries.append((found.get("Key", ""), _number(found.get("Size", "")), _time(found.get("LastModified", ""))))
        elif tag == "NextContinuationToken":
            token = element.text or ""
        elif tag == "IsTruncated":
            truncated = element.text or ""
    return entries, token if truncated == "true" else ""


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else 0


def _time(text: str) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
