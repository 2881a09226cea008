"""Judges the answer of an origin's server: whether the body holds the requested bytes, and which error a failure is. It
reads headers and exceptions, and opens no connection.
"""

from __future__ import annotations

import http.client
import re
import ssl

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from instantstart_fs.core.chunks import ByteRange
from instantstart_fs.core.faults import Fault
from instantstart_fs.errors import OriginChanged, OriginError, OriginMisbehaved, OriginUnavailable
from instantstart_fs.origins.base import Location

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")


def check_answer(
    response: urllib3.BaseHTTPResponse, location: Location, wanted: ByteRange, size: int, where: str
) -> ByteRange:
    """The range that the body holds: ``wanted``, or the whole file. Raises OriginError for anything else."""
    status = response.status
    length = (response.headers.get("Content-Length") or "").strip() or None
    given = (response.headers.get("Content-Range") or "").strip()
    match = _CONTENT_RANGE.match(given)
    pinned = location.etag
    etag = response.headers.get("ETag")
    body = wanted
    if match is not None and (int(match[1]), int(match[2])) == (wanted.start, wanted.stop - 1):
        # Also with 200, as `rclone serve s3` says it.
        if match[3] != "*" and int(match[3]) != size:
            raise OriginChanged(f"{where}: the object now has {match[3]} bytes, {size} are pinned")
        if length not in (None, str(wanted.length)):
            raise OriginMisbehaved(
                f"{where}: {length} bytes came where {wanted.length} were asked for", fault=Fault.RANGE
            )
    elif status == 206 or given:
        raise OriginMisbehaved(
            f"{where}: Content-Range is {given!r}, asked was {wanted.start}-{wanted.stop - 1}", fault=Fault.RANGE
        )
    elif length not in (None, str(size)) and not _encoded(response):
        if length == "0" or (pinned is not None and (etag is None or _bare(etag) == _bare(pinned))):
            # Not another object: somebody on the way answers in its place.
            raise OriginMisbehaved(
                f"{where}: an answer of {length} bytes that is not the file of {size}", fault=Fault.ANSWER
            )
        raise OriginChanged(f"{where}: the object now has {length} bytes, {size} are pinned")
    else:
        body = ByteRange(0, size)
    encoding = _encoded(response)
    if encoding:
        # Stored so, then range and length speak of the pinned bytes; encoded on the way, then of something else.
        exact = match is not None and match[3] != "*"
        strong = pinned is not None and etag is not None and etag.strip() == pinned.strip() and length == str(size)
        if not exact and not strong:
            raise OriginMisbehaved(
                f"{where}: the body is encoded ({encoding}) on the way, though nobody asked for that",
                fault=Fault.ENCODED,
            )
    if pinned is not None and (etag is None or _bare(etag) != _bare(pinned)):
        raise OriginChanged(f"{where}: the ETag is {etag}, {pinned} is pinned; `update` pins what is there now")
    if location.commit is not None and (commit := response.headers.get("X-Repo-Commit")) != location.commit:
        raise OriginChanged(f"{where}: the answer is of commit {commit}, pinned was {location.commit}")
    return body


def _encoded(response: urllib3.BaseHTTPResponse) -> str:
    """The body's content encoding, "" for none."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()[:40]
    return "" if encoding in ("identity", "aws-chunked") else encoding


def _bare(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')


def unreachable(error: BaseException, where: str) -> OriginError:
    """The error for an exception of the HTTP client, by its innermost cause."""
    cause: BaseException | None = error
    for _ in range(6):
        inner = getattr(cause, "reason", None)
        if not isinstance(inner, BaseException):
            inner = getattr(cause, "__cause__", None)
        if inner is None and isinstance(cause, ProtocolError) and isinstance(cause.args[-1], BaseException):
            inner = cause.args[-1]
        if isinstance(cause, ConnectTimeoutError) and not isinstance(cause, NewConnectionError):
            return OriginUnavailable(f"{where}: no connection within the time-out")
        if isinstance(cause, ReadTimeoutError | TimeoutError):
            return OriginUnavailable(f"{where}: no byte came within the time-out")
        if isinstance(cause, ssl.SSLError):
            return OriginUnavailable(f"{where}: TLS failed ({cause.reason or type(cause).__name__})")
        if isinstance(cause, NewConnectionError | SSLError | HTTPError) and isinstance(inner, BaseException):
            cause = inner
            continue
        break
    if isinstance(cause, InvalidHeader):
        return OriginMisbehaved(f"{where}: {cause}", fault=Fault.RANGE)  # Content-Lengths that contradict each other
    if isinstance(cause, http.client.IncompleteRead):
        return OriginMisbehaved(f"{where}: the body was cut short", fault=Fault.CUT)
    if isinstance(cause, http.client.RemoteDisconnected):
        return OriginUnavailable(f"{where}: it hung up without an answer")
    if isinstance(cause, http.client.HTTPException):  # another protocol, or headers without end
        return OriginMisbehaved(f"{where}: the answer is no HTTP ({type(cause).__name__})", fault=Fault.ANSWER)
    if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause):
        return OriginUnavailable(f"{where}: connection refused")
    if isinstance(cause, OSError) and cause.strerror:
        return OriginUnavailable(f"{where}: {cause.strerror}")
    return OriginUnavailable(f"{where}: {type(cause).__name__}")
