"""AWS Signature Version 4 for the few requests that a tier needs: presigned URLs, and signed headers.

boto3 takes half a millisecond for a presigned URL, 8 s of a processor for 140 GB in chunks of 8 MiB; this takes some
microseconds (docs/decisions/regional.md), since the day's key is kept. Headers of a conditional write are signed.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

import msgspec

UNSIGNED = "UNSIGNED-PAYLOAD"


class Secrets(msgspec.Struct, frozen=True):
    """Credentials as of now. ``token``: of a session, "" = none."""

    access_key: str
    secret_key: str
    token: str = ""


class Signer:
    """Signs for one region of one service (s3). Thread-safe: what it keeps is replaced as a whole."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._day: tuple[str, str, bytes] = ("", "", b"")

    def _key(self, secrets: Secrets, day: str) -> bytes:
        known_day, known_secret, key = self._day
        if (known_day, known_secret) != (day, secrets.secret_key):
            key = f"AWS4{secrets.secret_key}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._day = (day, secrets.secret_key, key)
        return key

    def _signature(self, secrets: Secrets, stamp: str, canonical: str) -> str:
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        return hmac.digest(self._key(secrets, stamp[:8]), text.encode(), "sha256").hex()

    def presigned(self, secrets: Secrets, url: str, seconds: int, now: float | None = None) -> str:
        """Return ``url`` (without a query) with a signature for GET that holds for ``seconds``."""
        stamp = _stamp(now)
        parts = urlsplit(url)
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{secrets.access_key}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": "host",
        }
        if secrets.token:
            query["X-Amz-Security-Token"] = secrets.token
        text = _query(query)
        canonical = f"GET\n{parts.path}\n{text}\nhost:{parts.netloc}\n\nhost\n{UNSIGNED}"
        return f"{url}?{text}&X-Amz-Signature={self._signature(secrets, stamp, canonical)}"

    def headers(
        self,
        secrets: Secrets,
        method: str,
        url: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        now: float | None = None,
    ) -> dict[str, str]:
        """Return ``headers`` and those that sign them. ``query`` is sent as ``query_text`` writes it."""
        stamp = _stamp(now)
        parts = urlsplit(url)
        signed = {name.lower(): value for name, value in headers.items()}
        signed |= {"host": parts.netloc, "x-amz-content-sha256": UNSIGNED, "x-amz-date": stamp}
        if secrets.token:
            signed["x-amz-security-token"] = secrets.token
        names = ";".join(sorted(signed))
        lines = "".join(f"{name}:{signed[name].strip()}\n" for name in sorted(signed))
        canonical = f"{method}\n{parts.path}\n{_query(query)}\n{lines}\n{names}\n{UNSIGNED}"
        signature = self._signature(secrets, stamp, canonical)
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        del signed["host"]
        signed["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={secrets.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return signed


def query_text(query: Mapping[str, str]) -> str:
    """Return the query as it has to be sent."""
    return _query(query)


def _query(query: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='-_.~')}={quote(query[name], safe='-_.~')}" for name in sorted(query))


def _stamp(now: float | None) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() if now is None else now))
