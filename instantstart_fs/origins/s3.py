"""``s3://bucket/prefix`` through boto3: any S3-compatible engine.

The prefix is a directory; where nothing lies below it, it may name one object. Objects are pinned by VersionId where
the bucket keeps versions and these may be read, and always by ETag: If-Match is signed into every GET, so that a
replaced object answers 412 and never other bytes. Digests come from HEAD with ChecksumMode: SHA256, CRC64NVME, SHA1,
CRC32C, CRC32, whole or composite; else from the ETag, where that is an MD5 (one part, not SSE-KMS or SSE-C, no
directory bucket) or a multipart composite whose parts are of one size (HEAD PartNumber tells). That an engine's ETags
are MD5s is tried with the smallest object. What fits none of these has no digest.

``resolve`` ends with a byte of an object, fetched just as the reads are: what lists and heads need proves nothing about
GET with a VersionId. ``locate`` signs a URL here, without asking anybody (but once for the bucket's region, on AWS
itself, and once whether it is public, where there are no credentials). Credentials: origins/s3access.py.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from instantstart_fs.core.addresses import host_of
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.manifest import Algorithm, Digest, ManifestFile, ModelManifest, ModelSpec, rests_on_etag
from instantstart_fs.core.source import S3Source
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    OriginError,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.bounds import WHOLE, Bounds
from instantstart_fs.origins.common import (
    Skips,
    finish_manifest,
    is_trusted,
    leave_out,
    refuse_endless,
    selected,
)
from instantstart_fs.origins.s3access import S3Access
from instantstart_fs.origins.s3http import AT_ONCE, Answered
from instantstart_fs.origins.s3pages import MD5, Listed, PageJudge, objects
from instantstart_fs.origins.s3refusals import Refusals

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

_CHECKSUMS: tuple[tuple[str, Algorithm], ...] = (
    ("x-amz-checksum-sha256", "sha256"),
    ("x-amz-checksum-crc64nvme", "crc64nvme"),
    ("x-amz-checksum-sha1", "sha1"),
    ("x-amz-checksum-crc32c", "crc32c"),
    ("x-amz-checksum-crc32", "crc32"),
)
_COMPOSITE = re.compile(r"([0-9a-f]{32})-([0-9]{1,5})\Z")
TRIED_WHOLE = 64 * 1024 * 1024
"""Bytes of the largest object by which it is tried whether ETags are MD5s: the smallest there is. Beyond, the first
fetch tells (`digest-mismatch`)."""
REMEMBERED = 4096
"""Addresses that were handed out, the latest: one that is asked for again before its end was refused."""
EARLY = 60.0
"""Seconds before its end."""
MANY = 64
"""Objects; so many are asked about one by one."""
SAMPLES = 16
CANNOT_TELL = frozenset({400, 404, 405, 416, 501})
"""The statuses of servers that do not know HEAD with a part's number."""


class S3Origin:
    """One prefix of one bucket, asked with one pipeline's credentials. Thread-safe. All but three of its
    parameters are settings.

    ``profile`` names a section of the AWS files; when it is given, neither AWS_ACCESS_KEY_ID nor the machine's own role
    is used in its place. Without it, boto3's usual chain applies, and where that finds nothing the bucket may be a
    public one. ``anonymous``: it is, and no credentials are looked for. ``requester_pays``: its owner does not pay.
    The settings of ``[origins.s3]`` and of the pipeline are its many parameters; it works through ``S3Access``.
    """

    def __init__(
        self,
        source: S3Source,
        model: ModelSpec,
        *,
        endpoint_url: str | None,
        region_name: str | None,
        profile: str | None,
        timeout: float,
        bounds: Bounds = WHOLE,
        anonymous: bool = False,
        requester_pays: bool = False,
        etags_are_md5: bool = True,
        allow_private: tuple[str, ...] = (),
    ) -> None:
        self._source = source
        self._model = model
        self._bounds = bounds
        self._etags_are_md5 = etags_are_md5
        self._allow_private = allow_private
        self._access = S3Access(
            source.bucket,
            endpoint_url=endpoint_url,
            region_name=region_name,
            profile=profile,
            timeout=timeout,
            anonymous=anonymous,
            requester_pays=requester_pays,
            judge=PageJudge(source, bounds),
        )
        self._lock = threading.Lock()
        self._given: OrderedDict[str, float] = OrderedDict()
        endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        host = urlsplit(endpoint).netloc.rpartition("@")[2]
        whose = "anonymous" if anonymous else f"profile {profile}" if profile else "machine credentials"
        self._key = OriginKey("s3", host or "aws", whose)
        self._refusals = Refusals(source, self._access, self._key.endpoint, profile=profile, timeout=timeout)

    @property
    def key(self) -> OriginKey:
        return self._key

    def resolve(self) -> ModelManifest:
        with self._refusals.translated(str(self._source), "s3:ListBucket"):
            wanted, held = self._access.ask(self._list, self._client)
            if not held and self._source.prefix:
                found = self._single()
                wanted, held = [listed for listed in found if selected(listed.path, self._model)], len(found)
        skips = Skips()
        files = self._pin_all(leave_out(self._model, wanted, skips))
        files = self._without_false_digests(self._readable(files))
        return finish_manifest(self._model, "", files, held, skips)

    def locate(self, file: ManifestFile) -> Location:
        version, etag = _unpack(file.version)
        with self._refusals.translated(f"{self._source}: {file.path}", "s3:GetObject"):
            if self._is_early(file.address):
                self._access.renew()
            access = self._access
            url, expires_at = access.sign(file.address, version, etag)
            if access.unsigned and not access.anonymous and not access.proved_public:
                self._refusals.expect(access.head(file.address, etag=etag), file.path, "s3:GetObject", denied_only=True)
        with self._lock:
            self._given[file.address] = expires_at
            self._given.move_to_end(file.address)
            while len(self._given) > REMEMBERED:
                self._given.popitem(last=False)
        return Location(
            url=url,
            headers=tuple(access.signed_headers(etag=etag).items()),
            etag=etag,
            expires_at=expires_at,
            trusted=is_trusted(url),
            service="s3",
            # The address is made here, from what the administrator configured; where it redirects to is not.
            named=(host_of(url), *self._allow_private),
        )

    def _is_early(self, address: str) -> bool:
        """Whether an address of it was given out and should still be good: then somebody was refused there."""
        with self._lock:
            return self._given.get(address, 0.0) > time.time() + EARLY

    def check(self) -> None:
        with self._refusals.translated(str(self._source), "s3:ListBucket"):
            found = self._access.ask(self._first, self._client)
            if found is None and self._source.prefix:
                found = next(iter(self._single()), None)
        if found is None:
            finish_manifest(self._model, "", [], 0)
            return
        head = self._refusals.expect(self._head(found), found.path, "s3:GetObject", key=found.key)
        self._readable([self._pinned(found, head, None)])

    # -- listing -----------------------------------------------------------------------------------------------------

    def _objects(self, client: S3Client) -> Iterator[Listed]:
        return objects(client, self._source, self._access.parameters())

    def _client(self) -> S3Client:
        return self._access.client()

    def _list(self, client: S3Client) -> tuple[list[Listed], int]:
        """The chosen ones, and how many there are."""
        chosen: list[Listed] = []
        held = 0
        for held, listed in enumerate(self._objects(client), 1):
            if selected(listed.path, self._model):
                chosen.append(listed)
            if held % 100 == 0:
                refuse_endless(self._model.source, len(chosen), held)
                self._bounds.allow(str(self._source), files=held)
        return chosen, held

    def _first(self, client: S3Client) -> Listed | None:
        """Return samples from the first page that has a chosen object; preferably one with bytes."""
        empty = None
        for count, listed in enumerate(self._objects(client)):
            if selected(listed.path, self._model) and leave_out(self._model, [listed], Skips()):
                if listed.size:
                    return listed
                empty = empty or listed
            if empty is not None and count > 1000:
                break
        return empty

    def _single(self) -> list[Listed]:
        """The prefix as the name of one object."""
        key = self._source.prefix
        listed = Listed(key.rpartition("/")[2], key, -1, "", 0, "", strong=False)
        return [listed] if self._head(listed).status == 200 else []

    # -- pinning -----------------------------------------------------------------------------------------------------

    def _pin_all(self, wanted: Sequence[Listed]) -> list[ManifestFile]:
        """A HEAD of each; of small ones among many, where samples say that it would tell nothing more than the listing,
        none."""
        told = [listed for listed in wanted if listed.tells_enough] if len(wanted) > MANY else []
        samples = told[:: max(1, len(told) // SAMPLES)]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="s3-head") as pool:
            try:
                if told and all(pool.map(self._tells_no_more, samples)):
                    enough = {listed.key for listed in told}
                    small = [
                        ManifestFile(
                            path=listed.path,
                            size=listed.size,
                            address=listed.key,
                            version=_pack("", listed.etag),
                            digest=Digest("md5", listed.etag.strip('"')),
                            mtime_ns=listed.mtime_ns,
                        )
                        for listed in told
                    ]
                    return small + list(pool.map(self._pin, (one for one in wanted if one.key not in enough)))
                return list(pool.map(self._pin, wanted))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _tells_no_more(self, listed: Listed) -> bool:
        """Whether HEAD says of it what the listing does, and nothing that matters beside."""
        answer = self._head(listed)
        head = answer.headers
        return (
            answer.status == 200
            and head.get("ETag") == listed.etag
            and head.get("x-amz-version-id", "null") == "null"
            and not self._is_opaque(head)
            and head.get("x-amz-checksum-sha256") is None
        )

    def _head(self, listed: Listed) -> Answered:
        with self._refusals.translated(f"{self._source}: {listed.path}", "s3:GetObject"):
            answer = self._access.head(listed.key)
            if answer.status == 403:
                # Checksums of what KMS encrypts need kms:Decrypt; the object itself may be had without them.
                plain = self._access.head(listed.key, checksums=False)
                answer = plain if plain.status == 200 else answer
            return answer

    def _pin(self, listed: Listed) -> ManifestFile:
        path, key = listed.path, listed.key
        answer = self._head(listed)
        if answer.status == 404:
            raise OriginUnavailable(f"{self._source}: {path!r} vanished while it was listed; try again")
        self._refusals.expect(answer, path, "s3:GetObject", key=key)
        head = answer.headers
        storage = head.get("x-amz-storage-class", "")
        archived = storage in ("GLACIER", "DEEP_ARCHIVE") or head.get("x-amz-archive-status")
        if archived and 'ongoing-request="false"' not in head.get("x-amz-restore", ""):
            raise OriginUnsupported(f"{self._source}: {path!r} lies in {storage} (archived); restore it first")
        with self._refusals.translated(f"{self._source}: {path}", "s3:GetObject"):
            digest = self._digest(path, key, head)
        return self._pinned(listed, answer, digest)

    def _pinned(self, listed: Listed, answer: Answered, digest: Digest | None) -> ManifestFile:
        path, head = listed.path, answer.headers
        etag = head.get("ETag", "")
        if not etag:
            raise OriginUnsupported(f"{self._source}: {path!r} has no ETag, so that it cannot be pinned")
        version = head.get("x-amz-version-id", "")
        return ManifestFile(
            path=path,
            size=_length(head),
            address=listed.key,
            version=_pack("" if version == "null" else version, etag),  # "null": may be overwritten in place
            digest=digest,
            mtime_ns=_moment(head.get("Last-Modified", "")),
        )

    def _digest(self, path: str, key: str, head: Mapping[str, str]) -> Digest | None:
        size, etag = _length(head), head.get("ETag", "")
        for field, algorithm in _CHECKSUMS:
            value = head.get(field)
            if not value:
                continue
            encoded, dash, parts = value.partition("-")
            try:
                raw = base64.b64decode(encoded, validate=True).hex()
            except (binascii.Error, ValueError):
                continue
            if not dash and head.get("x-amz-checksum-type") != "COMPOSITE":
                return Digest(algorithm, raw)
            part_size = self._part_size(path, key, etag, size, int(parts) if parts.isdigit() else 0)
            if part_size:
                return Digest(algorithm, raw, part_size)
        if self._is_opaque(head):
            return None
        bare = etag.strip('"')
        if MD5.match(bare):
            return Digest("md5", bare)
        composite = _COMPOSITE.match(bare)
        if composite:
            part_size = self._part_size(path, key, etag, size, int(composite[2]))
            if part_size:
                return Digest("md5", composite[1], part_size)
        return None

    def _is_opaque(self, head: Mapping[str, str]) -> bool:
        """Whether the ETag is known to be no MD5."""
        return (
            head.get("x-amz-server-side-encryption", "").startswith("aws:kms")
            or "x-amz-server-side-encryption-customer-algorithm" in head
            or self._source.bucket.endswith("--x-s3")
            or not self._etags_are_md5
        )

    def _part_size(self, path: str, key: str, etag: str, size: int, parts: int) -> int:
        """The size of each part but the last, 0 where the engine does not tell or if the parts are not of one size.

        The first and the last part are asked for: with the count right and the last one what the others leave over,
        parts of mixed sizes would have to balance out exactly. Raises OriginError for what passes: a throttled HEAD
        must not make a file unverified for good.
        """

        def length(number: int) -> int:
            answer = self._access.head(key, etag=etag, part=number)
            if answer.status in CANNOT_TELL:
                return 0
            if answer.status == 412:
                raise OriginUnavailable(f"{self._source}: {path!r} was replaced while it was listed; try again")
            self._refusals.expect(answer, path, "s3:GetObject", key=key)
            count = answer.headers.get("x-amz-mp-parts-count", str(parts))
            return _length(answer.headers) if count == str(parts) else 0

        if parts < 1:
            return 0
        first = length(1)
        if first <= 0 or -(-size // first) != parts:
            return 0
        if parts > 1 and length(parts) != size - (parts - 1) * first:
            return 0
        return first

    # -- proving -----------------------------------------------------------------------------------------------------

    def _readable(self, files: list[ManifestFile]) -> list[ManifestFile]:
        """Prove the objects readable by a byte of one; drop their versions if these may not be read."""
        versioned = [file for file in files if _unpack(file.version)[0]]
        candidates = versioned or files
        sample = min(candidates, key=lambda file: (file.size == 0, file.size), default=None)
        if sample is None:
            return files
        error = self._fetch_byte(sample)
        if isinstance(error, AccessRefused) and not isinstance(error, CredentialsUnusable) and versioned:
            plain = _without_version(sample)
            if self._fetch_byte(plain) is None:
                log.warning(
                    "%s: versions of its objects may not be read (s3:GetObjectVersion is refused): they are pinned by "
                    "ETag alone, and one that is replaced fails until `update`",
                    self._source,
                )
                return [_without_version(file) for file in files]
        if error is not None:
            raise error
        return files

    def _fetch_byte(self, file: ManifestFile) -> OriginError | None:
        version, etag = _unpack(file.version)
        with self._refusals.translated(f"{self._source}: {file.path}", "s3:GetObject"):
            answer = self._access.get(file.address, version, etag, last=0 if file.size else None)
        if answer.status in (200, 206) or (answer.status == 416 and not file.size):
            return None
        if answer.status in (301, 302, 303, 307, 308):  # let in; where it sends us is the fetch's to judge
            return None
        if answer.status == 412:
            return OriginUnavailable(f"{self._source}: {file.path!r} was replaced while it was listed; try again")
        right = "s3:GetObjectVersion" if version else "s3:GetObject"
        return self._refusals.refused(answer, file.path, right)

    def _without_false_digests(self, files: list[ManifestFile]) -> list[ManifestFile]:
        """Drop MD5 digests if the engine's ETags are none: the smallest object with one is fetched and compared."""
        resting = [file for file in files if 0 < file.size <= TRIED_WHOLE and rests_on_etag(file)]
        if not resting:
            return files
        sample = min(resting, key=lambda file: (file.size, file.path))
        assert sample.digest is not None
        version, etag = _unpack(sample.version)
        hasher = new_hasher(sample.digest, sample.size)
        with self._refusals.translated(f"{self._source}: {sample.path}", "s3:GetObject"):
            count = self._access.read(sample.address, version, etag, sample.size, hasher.update)
        if count != sample.size or hasher.hexdigest() == sample.digest.value:
            return files
        log.warning(
            "%s: the ETag of %r is not the MD5 of its bytes: what has no other digest there is served unverified",
            self._source,
            sample.path,
        )
        return [msgspec.structs.replace(file, digest=None) if rests_on_etag(file) else file for file in files]


def _length(head: Mapping[str, str]) -> int:
    return int(head.get("Content-Length") or -1)


def _moment(stamp: str) -> int:
    try:
        return int(parsedate_to_datetime(stamp).timestamp()) * 1_000_000_000
    except (ValueError, TypeError, OverflowError):
        return 0


def _pack(version: str, etag: str) -> str:
    """Return ``version-id=… etag="…"``, the ManifestFile.version of an S3 object. VersionIds hold no blanks."""
    return f"version-id={version} etag={etag}" if version else f"etag={etag}"


def _unpack(packed: str) -> tuple[str, str]:
    before, _, etag = packed.partition("etag=")
    return before.removeprefix("version-id=").strip(), etag


def _without_version(file: ManifestFile) -> ManifestFile:
    return msgspec.structs.replace(file, version=_pack("", _unpack(file.version)[1]))
