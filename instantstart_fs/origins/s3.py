"""``s3://bucket/prefix`` through boto3: any S3-compatible engine.

The prefix is a directory; where nothing lies below it, it may name one object. Objects are pinned by VersionId where
the bucket keeps versions, and always by ETag: If-Match is signed into every GET, so that a replaced object answers 412
and never other bytes. Digests come from HEAD with ChecksumMode: SHA256, CRC64NVME, SHA1, CRC32C, CRC32, whole or
composite; else from the ETag, where that is an MD5 (one part, not SSE-KMS or SSE-C, no directory bucket) or a multipart
composite whose parts are of one size (HEAD PartNumber tells). What fits none of these has no digest.

``locate`` signs a URL here, without asking anybody (but once for the bucket's region, on AWS itself).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import botocore.parsers
from botocore.config import Config

from instantstart_fs.core.manifest import Algorithm, Digest, ManifestFile, ModelManifest, ModelSpec
from instantstart_fs.core.source import S3Source
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    OriginError,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.common import finish_manifest, is_trusted, refuse_endless, retry_after, selected
from instantstart_fs.origins.credentials import require_private

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

SIGNATURE_LIFETIME = 3600
"""Seconds that a presigned URL is good for; temporary credentials may end it sooner."""
HEAD_THREADS = 16
_CHECKSUMS: tuple[tuple[str, Algorithm], ...] = (
    ("ChecksumSHA256", "sha256"),
    ("ChecksumCRC64NVME", "crc64nvme"),
    ("ChecksumSHA1", "sha1"),
    ("ChecksumCRC32C", "crc32c"),
    ("ChecksumCRC32", "crc32"),
)
_MD5 = re.compile(r"[0-9a-f]{32}\Z")
_COMPOSITE = re.compile(r"([0-9a-f]{32})-([0-9]{1,5})\Z")
_BAD_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "AuthorizationHeaderMalformed",
    }
)
_THROTTLED = frozenset({"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"})


class S3Origin:
    """One prefix of one bucket, asked with one pipeline's credentials. Thread-safe.

    ``profile`` names a section of the AWS files; when it is given, neither AWS_ACCESS_KEY_ID nor the machine's own role
    is used in its place. Without it, boto3's usual chain applies.
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
    ) -> None:
        self._source = source
        self._model = model
        self._endpoint_url = endpoint_url
        self._region_name = region_name
        self._profile = profile
        self._timeout = timeout
        self._lock = threading.Lock()
        self._session: boto3.Session | None = None
        self._cached_client: S3Client | None = None
        endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        host = urlsplit(endpoint).netloc.rpartition("@")[2]
        self._key = OriginKey("s3", host or "aws", f"profile {profile}" if profile else "machine credentials")

    @property
    def key(self) -> OriginKey:
        return self._key

    def resolve(self) -> ModelManifest:
        with self._translated(str(self._source)):
            found = self._list()
            wanted = [(path, key) for path, key in found if selected(path, self._model)]
            with ThreadPoolExecutor(HEAD_THREADS, thread_name_prefix="s3-head") as pool:
                try:
                    files = list(pool.map(lambda pair: self._pin(*pair), wanted))
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        return finish_manifest(self._model, "", files, len(found))

    def locate(self, file: ManifestFile) -> Location:
        version, etag = _unpack(file.version)
        parameters = {"Bucket": self._source.bucket, "Key": file.address, "IfMatch": etag}
        if version:
            parameters["VersionId"] = version
        with self._translated(f"{self._source}: {file.path}"):
            client = self._client()
            expires_at = time.time() + self._lifetime()
            url = client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=SIGNATURE_LIFETIME)
        return Location(
            url=url,
            headers=(("If-Match", etag),),
            etag=etag,
            expires_at=expires_at,
            trusted=is_trusted(url),
            service="s3",
        )

    def check(self) -> None:
        with self._translated(str(self._source)):
            client = self._client()
            for prefix in self._prefixes():
                page = client.list_objects_v2(Bucket=self._source.bucket, Prefix=prefix, MaxKeys=20)
                for entry in page.get("Contents", []):
                    key = entry["Key"]
                    if not key.endswith("/") and (prefix.endswith("/") or key == prefix or not prefix):
                        client.head_object(Bucket=self._source.bucket, Key=key)
                        return
        finish_manifest(self._model, "", [], 0)

    def _prefixes(self) -> tuple[str, ...]:
        """Where to look: below the prefix as a directory, then at it as an object."""
        prefix = self._source.prefix
        return (prefix + "/", prefix) if prefix else ("",)

    def _list(self) -> list[tuple[str, str]]:
        """(path within the model, key) of every object."""
        client = self._client()
        directory = self._prefixes()[0]
        found: list[tuple[str, str]] = []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._source.bucket, Prefix=directory):
            for entry in page.get("Contents", []):
                key = entry["Key"]
                if key.endswith("/") and entry["Size"] == 0:
                    continue  # what consoles make to show an empty directory
                found.append((key[len(directory) :], key))
            refuse_endless(str(self._source), 0, len(found))
        if not found and self._source.prefix:
            with contextlib.suppress(botocore.exceptions.ClientError):
                client.head_object(Bucket=self._source.bucket, Key=self._source.prefix)
                found.append((self._source.prefix.rpartition("/")[2], self._source.prefix))
        return found

    def _pin(self, path: str, key: str) -> ManifestFile:
        try:
            head = self._client().head_object(Bucket=self._source.bucket, Key=key, ChecksumMode="ENABLED")
        except botocore.exceptions.ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                raise OriginUnavailable(f"{self._source}: {path!r} vanished while it was listed; try again") from None
            raise
        etag = head.get("ETag", "")
        if not etag:
            raise OriginUnsupported(f"{self._source}: {path!r} has no ETag, so that it cannot be pinned")
        if head.get("StorageClass") in ("GLACIER", "DEEP_ARCHIVE") and 'ongoing-request="false"' not in head.get(
            "Restore", ""
        ):
            raise OriginUnsupported(f"{self._source}: {path!r} lies in {head.get('StorageClass')}; restore it first")
        version = head.get("VersionId", "")
        modified = head.get("LastModified")
        return ManifestFile(
            path=path,
            size=head["ContentLength"],
            address=key,
            version=_pack("" if version == "null" else version, etag),  # "null": may be overwritten in place
            digest=self._digest(key, head),
            mtime_ns=int(modified.timestamp()) * 1_000_000_000 if modified else 0,
        )

    def _digest(self, key: str, head: HeadObjectOutputTypeDef) -> Digest | None:
        size = head["ContentLength"]
        fields: dict[str, Any] = dict(head)
        for field, algorithm in _CHECKSUMS:
            value = fields.get(field)
            if not value:
                continue
            encoded, dash, parts = value.partition("-")
            try:
                raw = base64.b64decode(encoded, validate=True).hex()
            except (binascii.Error, ValueError):
                continue
            if not dash and fields.get("ChecksumType") != "COMPOSITE":
                return Digest(algorithm, raw)
            part_size = self._part_size(key, fields["ETag"], size, int(parts) if parts.isdigit() else 0)
            if part_size:
                return Digest(algorithm, raw, part_size)
        etag = fields["ETag"].strip('"')
        opaque = str(fields.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in fields
        if opaque or self._source.bucket.endswith("--x-s3"):
            return None
        if _MD5.match(etag):
            return Digest("md5", etag)
        composite = _COMPOSITE.match(etag)
        if composite:
            part_size = self._part_size(key, fields["ETag"], size, int(composite[2]))
            if part_size:
                return Digest("md5", composite[1], part_size)
        return None

    def _part_size(self, key: str, etag: str, size: int, parts: int) -> int:
        """The size of each part but the last, 0 if unknown or if the parts are not of one size.

        The first and the last part are asked for: with the count right and the last one what the others leave over,
        parts of mixed sizes would have to balance out exactly.
        """

        def length(number: int) -> int:
            part = self._client().head_object(Bucket=self._source.bucket, Key=key, PartNumber=number, IfMatch=etag)
            return part["ContentLength"] if part.get("PartsCount", parts) == parts else 0

        if parts < 1:
            return 0
        try:
            first = length(1)
            if first <= 0 or -(-size // first) != parts:
                return 0
            if parts > 1 and length(parts) != size - (parts - 1) * first:
                return 0
        except botocore.exceptions.ClientError:
            return 0
        return first

    def _client(self) -> S3Client:
        with self._lock:
            if self._cached_client is None:
                try:
                    self._cached_client = self._new_client()
                except ValueError as error:
                    raise AccessRefused(f"{self._source}: the S3 settings are unusable: {error}") from None
            return self._cached_client

    def _new_client(self) -> S3Client:
        session = boto3.Session(profile_name=self._profile, region_name=self._region_name)
        credentials = session.get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError
        if credentials.method == "shared-credentials-file":
            path = os.path.expanduser(str(session._session.get_config_variable("credentials_file")))
            with contextlib.suppress(OSError):
                require_private(path, os.stat(path), "AWS credentials file")
        if self._profile and credentials.method in ("iam-role", "container-role", "env"):
            # slots are walls: a profile without keys must not borrow the machine's role
            raise CredentialsUnusable(f"the AWS profile {self._profile!r} holds no credentials")
        self._session = session
        config = Config(
            connect_timeout=min(self._timeout, 10.0),
            read_timeout=self._timeout,
            retries={"total_max_attempts": 2, "mode": "standard"},
            max_pool_connections=HEAD_THREADS,
            signature_version="s3v4",
            user_agent_extra="instantstart-fs",
        )

        def make(region: str | None) -> S3Client:
            return session.client("s3", endpoint_url=self._endpoint_url, region_name=region, config=config)

        client = make(session.region_name or "us-east-1")
        if not client.meta.endpoint_url.rstrip("/").endswith(".amazonaws.com"):
            return client
        # signatures name the bucket's region; HEAD tells it even where it answers 301 or 403
        try:
            region = client.head_bucket(Bucket=self._source.bucket)["ResponseMetadata"]["HTTPHeaders"].get(
                "x-amz-bucket-region"
            )
        except botocore.exceptions.ClientError as error:
            region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return make(region) if region and region != client.meta.region_name else client

    def _lifetime(self) -> float:
        """Seconds that a URL signed now is good for: temporary credentials take it with them when they end."""
        credentials = self._session.get_credentials() if self._session else None
        ends = getattr(credentials, "_expiry_time", None)
        left = ends.timestamp() - time.time() if ends is not None else SIGNATURE_LIFETIME
        return float(max(30.0, min(left, SIGNATURE_LIFETIME)))

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The seam: botocore's exceptions become ours. Messages name the profile, never a key."""
        whose = f"the AWS profile {self._profile!r}" if self._profile else "the machine's AWS credentials"
        where = self._key.endpoint
        try:
            yield
        except botocore.exceptions.ClientError as error:
            raise self._from_response(what, whose, error) from None
        except botocore.exceptions.ProfileNotFound:
            raise CredentialsUnusable(f"{what}: there is no AWS profile {self._profile!r}; see --aws-profile") from None
        except (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
        ):
            raise CredentialsUnusable(
                f"{what}: no usable credentials from {whose}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the "
                "daemon, or pass --aws-profile"
            ) from None
        except (botocore.exceptions.ReadTimeoutError, botocore.exceptions.ConnectTimeoutError):
            raise OriginUnavailable(f"{what}: {where} did not answer within {self._timeout:g} s") from None
        except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
            raise OriginUnavailable(f"{what}: {where} cannot be reached ({type(error).__name__})") from None
        except botocore.exceptions.ParamValidationError:
            raise OriginNotFound(f"{what}: not a valid bucket or key name") from None
        except (botocore.parsers.ResponseParserError, KeyError) as error:
            raise OriginMisbehaved(
                f"{what}: {where} gave an answer that cannot be understood ({type(error).__name__}); is it S3?"
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise OriginUnavailable(f"{what}: {type(error).__name__}") from None

    def _from_response(self, what: str, whose: str, error: botocore.exceptions.ClientError) -> OriginError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            return OriginNotFound(f"{what}: there is no bucket {self._source.bucket!r}")
        if code == "RequestTimeTooSkewed":
            return CredentialsUnusable(f"{what}: this machine's clock is too far from the origin's: set it")
        if code in _BAD_CREDENTIALS:
            return AccessRefused(f"{what}: {whose} are refused ({code}); check them, or pass --aws-profile")
        if code in _THROTTLED or status in (429, 503):
            wait = retry_after(metadata.get("HTTPHeaders", {}).get("retry-after"), time.time())
            return OriginThrottled(f"{what}: the origin answers {code or status}", retry_after=wait)
        if status in (401, 403):
            return AccessRefused(f"{what}: access denied for {whose}; they need s3:ListBucket and s3:GetObject there")
        if status == 404:
            return OriginNotFound(f"{what}: not found ({code or status})")
        if status >= 500:
            return OriginUnavailable(f"{what}: the origin answers {status} {code}")
        return OriginUnsupported(f"{what}: the origin answers {status} {code}")


def _pack(version: str, etag: str) -> str:
    """``version-id=… etag="…"``: what ManifestFile.version says of an S3 object. VersionIds hold no blanks."""
    return f"version-id={version} etag={etag}" if version else f"etag={etag}"


def _unpack(packed: str) -> tuple[str, str]:
    before, _, etag = packed.partition("etag=")
    return before.removeprefix("version-id=").strip(), etag
