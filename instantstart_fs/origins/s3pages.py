"""Lists the objects below a prefix of a bucket. Each page is bounded in bytes and time, and has to be a page, before
boto3 parses it: parsing takes ten times its bytes in memory, and holds up the daemon's other threads.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from instantstart_fs.core.faults import Fault
from instantstart_fs.core.source import S3Source
from instantstart_fs.errors import OriginMisbehaved, OriginUnavailable
from instantstart_fs.origins.bounds import Bounds

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MD5 = re.compile(r"[0-9a-f]{32}\Z")
LISTING_SECONDS = 290.0
"""Seconds for all pages together: less than callers wait (admin/lifecycle.py), so that they are told the reason."""
SMALL = 1024 * 1024
"""Size in bytes up to which an object is pinned by the listing: should its ETag be no MD5 after all, it is soon fetched
again."""
_STRONG = frozenset({"SHA256", "SHA1"})
_PAGE = re.compile(rb"<(?:[\w.\-]+:)?(?:ListBucketResult|Error)[\s/>]")
_BEGINNING = 4096
"""Bytes of a page in which its first element must be."""


class Listed(msgspec.Struct, frozen=True):
    """An object as a listing describes it. ``strong``: it has a checksum that is better than an MD5."""

    path: str
    key: str
    size: int
    etag: str
    mtime_ns: int
    storage: str
    strong: bool

    @property
    def tells_enough(self) -> bool:
        """Whether this may be all that there is to be said of it: small, of one part, neither archived nor proven by
        more."""
        plain = self.storage in ("", "STANDARD") and not self.strong
        return plain and self.size <= SMALL and MD5.match(self.etag.strip('"')) is not None


class PageJudge:
    """Judges the answers to requests for pages, for ``S3Access``. ``bounds`` are the listing's."""

    def __init__(self, source: S3Source, bounds: Bounds) -> None:
        self._source = source
        self._bounds = bounds

    def allow(self, size: int) -> None:
        """Check the bytes that have come of one page. Raises OriginUnsupported, TooLarge."""
        self._bounds.allow(str(self._source), body=size)

    def check(self, body: bytes) -> None:
        """Check that a complete answer of status 200 is a page. Raises OriginMisbehaved."""
        if _PAGE.search(body, 0, _BEGINNING) is None:
            raise OriginMisbehaved(
                f"{self._source}: the answer to its listing is none; is the endpoint S3, or does a proxy answer in its "
                "place?",
                fault=Fault.ANSWER,
            )


def objects(client: S3Client, source: S3Source, parameters: dict[str, Any]) -> Iterator[Listed]:
    """Yield every object below the prefix, which is treated as a directory. Raises OriginError, botocore's
    exceptions."""
    directory = source.prefix + "/" if source.prefix else ""
    pages = iter(client.get_paginator("list_objects_v2").paginate(**parameters, Prefix=directory))
    end = time.monotonic() + LISTING_SECONDS
    count = 0
    while True:
        try:
            page = next(pages, None)
        except json.JSONDecodeError:  # what a credential_process prints
            raise
        except ValueError as error:  # a size or a time that is none
            raise _misbehaved(source, f"says what cannot be understood ({str(error)[:100]})") from None
        if page is None:
            return
        for entry in page.get("Contents", []):
            count += 1
            key = entry["Key"]
            if not key.startswith(directory):
                raise _misbehaved(source, f"names {key[:200]!r}, which is not below the prefix")
            if key.endswith("/") and entry["Size"] == 0:
                continue  # consoles make those for directories
            modified = entry.get("LastModified")
            yield Listed(
                path=key[len(directory) :],
                key=key,
                size=entry["Size"],
                etag=entry.get("ETag", ""),
                mtime_ns=int(modified.timestamp()) * 1_000_000_000 if modified else 0,
                storage=entry.get("StorageClass", ""),
                strong=not _STRONG.isdisjoint(entry.get("ChecksumAlgorithm", ())),
            )
        if page.get("IsTruncated") and not page.get("NextContinuationToken"):
            raise _misbehaved(source, f"is cut after {count} keys: more follow, it says, and not how to ask for them")
        if time.monotonic() > end:
            raise OriginUnavailable(
                f"{source}: after {LISTING_SECONDS:g} s and {count} keys its listing goes on; try again later"
            )


def _misbehaved(source: S3Source, what: str) -> OriginMisbehaved:
    return OriginMisbehaved(f"{source}: its listing {what}", fault=Fault.ANSWER)
