"""Asks one S3 bucket: credentials and their renewal, signed addresses, heads and small reads.

Credentials rotate under a running daemon. Before a client is used, the files that boto3 reads them from are checked by
stat, and read again if they changed. Other credentials (a credential_process, an assumed role) are read again when the
service refuses them, at most once in RENEW_SECONDS. Sessions that end are renewed before they do: an error of the
service that lends them is no answer of the bucket.

HEADs and proofs use an address signed here, as reads do. That takes a quarter of the CPU time of boto3's own call, and
what it proves holds for the reads. Temporary errors are retried, then raised. Requests are sent by ``s3http.py``; what
a refusal means is in ``s3refusals.py``.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.exceptions
from botocore import UNSIGNED
from botocore.config import Config

from instantstart_fs.core.urls import s3_url_problem
from instantstart_fs.errors import (
    CredentialsUnusable,
    OriginThrottled,
    OriginUnavailable,
    printable,
)
from instantstart_fs.origins.common import retry_after
from instantstart_fs.origins.credentials import require_private
from instantstart_fs.origins.proxies import judge_proxy
from instantstart_fs.origins.s3http import AT_ONCE, Answered, S3Http
from instantstart_fs.origins.s3pages import PageJudge

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SIGNATURE_LIFETIME = 3600
"""Seconds that a presigned URL is good for; temporary credentials may end it sooner."""
RENEW_SECONDS = 5.0
TRIES = 4
FIRST_PAUSE = 0.2
LAST_PAUSE = 5.0
"""Seconds; tripled after each try. A Retry-After within it is believed."""
PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""The statuses after which a request is repeated."""
BAD_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "AuthorizationHeaderMalformed",
    }
)
_THROTTLED = frozenset({"Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"})
_FILES = (
    ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    ("AWS_CONFIG_FILE", "~/.aws/config"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", ""),
)
_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")

_T = TypeVar("_T")
Stamp = tuple[object, ...]


def _stamp() -> Stamp:
    """Return a value that changes when credential files are replaced."""
    found: list[object] = [os.environ.get(name) for name in _VARIABLES]
    for variable, default in _FILES:
        path = os.path.expanduser(os.environ.get(variable) or default)
        if not path:
            continue
        try:
            status = os.stat(path)
            found.append((path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            found.append((path, None))
    return tuple(found)


class S3Access:
    """Thread-safe. ``anonymous``: ask without a signature. Without credentials at all that is tried by itself."""

    def __init__(
        self,
        bucket: str,
        *,
        endpoint_url: str | None,
        region_name: str | None,
        profile: str | None,
        timeout: float,
        anonymous: bool,
        requester_pays: bool,
        judge: PageJudge,
    ) -> None:
        self.bucket = bucket
        self.profile = profile
        self.timeout = timeout
        self.anonymous = anonymous
        self.requester_pays = requester_pays
        self._http = S3Http(bucket, timeout, judge)
        self.unsigned = anonymous
        """Whether requests now go without a signature."""
        self.proved_public = False
        """Whether the bucket has answered a request without one."""
        self._endpoint_url = endpoint_url
        self._region_name = region_name
        self._lock = threading.RLock()
        self._session: boto3.Session | None = None
        self._client: S3Client | None = None
        self._secrets: tuple[object, ...] = ()
        self._stamp: Stamp = ()
        self._renewed_at = -RENEW_SECONDS

    def client(self) -> S3Client:
        """Return a client with current credentials. Raises botocore's exceptions, ValueError, CredentialsUnusable, and
        OriginUnavailable if a service that lends credentials is down."""
        with self._lock:
            stamp = _stamp()
            if self._client is None or stamp != self._stamp:
                self._make()
                self._stamp = stamp
            else:
                self._renew_what_ends()
            assert self._client is not None
            return self._client

    def renew(self) -> bool:
        """The service refuses: read the credentials anew. Whether there are others now."""
        with self._lock:
            if self.anonymous or time.monotonic() < self._renewed_at + RENEW_SECONDS:
                return False
            self._renewed_at = time.monotonic()
            before = self._secrets
            self._make()
            return self._secrets != before

    def ask(self, call: Callable[[S3Client], _T], client: Callable[[], S3Client]) -> _T:
        """Return ``call(client())``; once more with other credentials, if these are refused and there are others."""
        try:
            found = call(client())
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if (code not in BAD_CREDENTIALS and status not in (401, 403)) or not self.renew():
                raise
            found = call(client())
        self.proved_public = self.proved_public or self.unsigned
        return found

    def parameters(self, key: str | None = None, **more: Any) -> dict[str, Any]:
        """Return the parameters of every call, and those of ``more`` that are set."""
        found: dict[str, Any] = {"Bucket": self.bucket} | {name: value for name, value in more.items() if value}
        if key is not None:
            found["Key"] = key
        if self.requester_pays:
            found["RequestPayer"] = "requester"
        return found

    def signed_headers(self, *, etag: str = "") -> dict[str, str]:
        """Return the headers that must be sent to an address that was signed for the same."""
        headers = {"If-Match": etag} if etag else {}
        if self.requester_pays:
            headers["x-amz-request-payer"] = "requester"
        return headers

    def sign(self, key: str, version: str, etag: str) -> tuple[str, float]:
        """The address of an object's bytes, and until when it is good."""
        client = self.client()
        expires_at = time.time() + self._lifetime()
        url = client.generate_presigned_url(
            "get_object",
            Params=self.parameters(key, IfMatch=etag, VersionId=version),
            ExpiresIn=SIGNATURE_LIFETIME,
        )
        return url, expires_at

    def head(self, key: str, *, etag: str = "", part: int = 0, checksums: bool = True) -> Answered:
        """HEAD of an object. Passing troubles are waited out; what is left of them is answered, or raised."""

        def once() -> Answered:
            parameters = self.parameters(
                key, IfMatch=etag, PartNumber=part, ChecksumMode="ENABLED" if checksums else ""
            )
            url = self.client().generate_presigned_url("head_object", Params=parameters, ExpiresIn=SIGNATURE_LIFETIME)
            headers = self.signed_headers(etag=etag)
            if checksums:
                headers["x-amz-checksum-mode"] = "ENABLED"
            return self._http.send("HEAD", url, headers)

        return self._patiently(once)

    def get(self, key: str, version: str, etag: str, *, last: int | None) -> Answered:
        """Fetch bytes 0 to ``last`` (None: no range; at most MOST_ERROR_BODY) of an object, as the reads ask for
        them."""

        def once() -> Answered:
            url, _ = self.sign(key, version, etag)
            headers = self.signed_headers(etag=etag)
            if last is not None:
                headers["Range"] = f"bytes=0-{last}"
            return self._http.send("GET", url, headers)

        return self._patiently(once)

    def read(self, key: str, version: str, etag: str, size: int, take: Callable[[bytes], None]) -> int:
        """Give all bytes of an object of ``size`` to ``take``; how many came within READ_SECONDS."""
        url, _ = self.sign(key, version, etag)
        return self._http.read(url, self.signed_headers(etag=etag), size, take)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _patiently(self, once: Callable[[], Answered]) -> Answered:
        renewed = False
        tried = 0
        while True:
            tried += 1
            pause = FIRST_PAUSE * 3.0 ** (tried - 1) * (0.5 + random.random())
            try:
                answer = once()
            except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError):
                if tried >= TRIES // 2:  # each may have waited for a time-out
                    raise
            else:
                if answer.status in (401, 403) and not renewed and self.renew():
                    renewed = True
                    continue
                if answer.status not in PASSING or tried >= TRIES:
                    self.proved_public = self.proved_public or (self.unsigned and answer.status < 300)
                    return answer
                asked = retry_after(answer.headers.get("Retry-After"), time.time())
                if asked is not None and asked > LAST_PAUSE:
                    return answer
                pause = max(pause, asked or 0.0)
            time.sleep(min(pause, LAST_PAUSE))

    def _make(self) -> None:
        for endpoint in (self._endpoint_url, *map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))):
            if endpoint and (problem := s3_url_problem(endpoint)) is not None:
                raise OriginUnavailable(f"the endpoint of s3://{self.bucket}: {problem}")
        session = boto3.Session(profile_name=self.profile, region_name=self._region_name)
        # for the services that lend credentials, too: boto3's own patience is many minutes
        session._session.set_default_client_config(self._patience())
        with self._borrowing():
            credentials = None if self.anonymous else session.get_credentials()
        if credentials is None and not self.anonymous and self.profile:
            raise botocore.exceptions.NoCredentialsError
        if credentials is not None:
            if credentials.method == "shared-credentials-file":
                path = os.path.expanduser(str(session._session.get_config_variable("credentials_file")))
                with contextlib.suppress(OSError):
                    require_private(path, os.stat(path), "AWS credentials file")
            if self.profile and credentials.method in ("iam-role", "container-role", "env"):
                # slots are walls: a profile without keys must not borrow the machine's role
                raise CredentialsUnusable(f"the AWS profile {self.profile!r} holds no credentials")
        with self._borrowing():
            frozen = credentials.get_frozen_credentials() if credentials is not None else None
        client = self._new_client(session, signed=credentials is not None)
        self._session = session
        self._client = client
        self.unsigned, self.proved_public = credentials is None, False
        self._secrets = (frozen.access_key, frozen.secret_key, frozen.token) if frozen is not None else ()

    def _renew_what_ends(self) -> None:
        """A session at its end gets a successor here; signing would ask for one, too, and know nobody by name."""
        credentials = self._session.get_credentials() if self._session and not self.unsigned else None
        if credentials is None:
            return
        try:
            with self._borrowing():
                credentials.get_frozen_credentials()
        except CredentialsUnusable:
            if not self.renew():  # what they are borrowed with may have been replaced
                raise

    @contextlib.contextmanager
    def _borrowing(self) -> Iterator[None]:
        """The seam to what lends credentials (STS, above all): none of its answers is a refusal of the bucket."""
        whose = f"the AWS profile {self.profile!r}" if self.profile else "the machine"
        what = f"s3://{self.bucket}: the credentials of {whose} cannot be had now"
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            message = str(error.response.get("Error", {}).get("Message", ""))[:300]
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            said = f"{error.operation_name} answers {status} ({printable(f'{code}: {message}')})"
            if status in (429, 503) or code in _THROTTLED:
                raise OriginThrottled(f"{what}: {said}") from None
            if status in PASSING or status >= 500 or code == "IDPCommunicationError":
                raise OriginUnavailable(f"{what}: {said}") from None
            raise CredentialsUnusable(f"{what}: {said}; check the role, and the token or the keys it is for") from None
        except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
            raise OriginUnavailable(f"{what}: {printable(str(error))}") from None
        except botocore.exceptions.ParamValidationError:
            raise CredentialsUnusable(
                f"{what}: the role's name or its token is not a valid one (half written?)"
            ) from None
        except OSError as error:
            if error.filename is None:
                raise
            raise CredentialsUnusable(f"{what}: {error.filename}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CredentialsUnusable(f"{what}: the token is no text") from None
        except RuntimeError as error:
            if "expired" not in str(error):
                raise
            raise CredentialsUnusable(
                f"{what}: they have ended when they come; is this machine's clock right?"
            ) from None

    def _patience(self) -> Config:
        return Config(
            connect_timeout=min(self.timeout, 10.0),
            read_timeout=self.timeout,
            retries={"total_max_attempts": 2, "mode": "standard"},
        )

    def _new_client(self, session: boto3.Session, *, signed: bool) -> S3Client:
        config = Config(
            max_pool_connections=AT_ONCE,
            signature_version="s3v4" if signed else UNSIGNED,
            user_agent_extra="instantstart-fs",
        )

        def make(region: str | None) -> S3Client:
            made = session.client("s3", endpoint_url=self._endpoint_url, region_name=region, config=config)
            made.meta.events.register("before-send.s3.HeadBucket", judge_proxy)
            made.meta.events.register("before-send.s3.ListObjectsV2", self._http.send_listing)  # type: ignore[arg-type]
            return made

        client = make(session.region_name or "us-east-1")
        if not client.meta.endpoint_url.rstrip("/").endswith(".amazonaws.com"):
            return client
        # signatures name the bucket's region; HEAD tells it even where it answers 301 or 403
        try:
            region = client.head_bucket(Bucket=self.bucket)["ResponseMetadata"]["HTTPHeaders"].get(
                "x-amz-bucket-region"
            )
        except botocore.exceptions.ClientError as error:
            region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return make(region) if region and region != client.meta.region_name else client

    def _lifetime(self) -> float:
        """Seconds that a URL signed now is good for: temporary credentials take it with them when they end."""
        if self.unsigned:
            return SIGNATURE_LIFETIME
        credentials = self._session.get_credentials() if self._session else None
        ends = getattr(credentials, "_expiry_time", None)
        left = ends.timestamp() - time.time() if ends is not None else SIGNATURE_LIFETIME
        return float(max(30.0, min(left, SIGNATURE_LIFETIME)))
