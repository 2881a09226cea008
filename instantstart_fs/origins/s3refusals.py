"""Turns an S3 engine's refusals and botocore's exceptions into errors that say what to do.

It sends one request only: a GET for the reason of a refused HEAD. Codes that have nothing to do with credentials are in
``core/refusals.py``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import botocore.exceptions
import botocore.parsers

from instantstart_fs.core.faults import Fault
from instantstart_fs.core.refusals import Word, s3_advice, s3_word
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
    printable,
)
from instantstart_fs.origins.common import retry_after
from instantstart_fs.origins.s3access import BAD_CREDENTIALS, S3Access
from instantstart_fs.origins.s3http import WIRE_STATUS, Answered

_THROTTLED = frozenset({"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"})


class Refusals:
    """The refusals of one prefix, asked through ``access``. ``endpoint`` and ``profile`` are named in messages;
    ``timeout`` is what a request had, in seconds."""

    def __init__(
        self, source: S3Source, access: S3Access, endpoint: str, *, profile: str | None, timeout: float
    ) -> None:
        self._source = source
        self._access = access
        self._endpoint = endpoint
        self._profile = profile
        self._timeout = timeout

    def expect(
        self, answer: Answered, path: str, right: str, *, key: str | None = None, denied_only: bool = False
    ) -> Answered:
        """The answer, if it is one. A HEAD's refusal has no body: ``key``'s first byte is asked for to hear the reason.
        ``denied_only``: only a refusal of access is raised."""
        if answer.status in (200, 206) or (denied_only and answer.status not in (401, 403)):
            return answer
        if key is not None and answer.status in (400, 403):
            told = self._access.get(key, "", "", last=0)
            if told.status == answer.status:
                answer = told
        raise self.refused(answer, path, right)

    def refused(self, answer: Answered, path: str, right: str) -> OriginError:
        word = s3_word(answer.body)
        wait = retry_after(answer.headers.get("Retry-After"), time.time())
        return self._error(f"{self._source}: {path}", answer.status, word, right, wait)

    def _error(self, what: str, status: int, word: Word, right: str, wait: float | None) -> OriginError:
        """Return the error for an answer with ``status`` to a request that needs the permission ``right``."""
        whose = f"the AWS profile {self._profile!r}" if self._profile else "the machine's AWS credentials"
        code, said = word.code, f" ({word})" if str(word) else ""
        if code == "NoSuchBucket":
            return OriginNotFound(f"{what}: there is no bucket {self._source.bucket!r}")
        if code in _THROTTLED or status in (429, 503):
            return OriginThrottled(f"{what}: the origin answers {code or status}", retry_after=wait)
        if code in BAD_CREDENTIALS:
            return AccessRefused(f"{what}: {whose} are refused{said}; check them, or pass --aws-profile")
        known = s3_advice(word) if (code and code != "AccessDenied") or "kms:" in word.message.lower() else None
        if known is not None:
            kind, advice = known
            return kind(f"{what}: the origin answers {status}{said}: {advice}", retry_after=wait)
        if status in (401, 403):
            pays = "" if self._access.requester_pays else "; a bucket whose requester pays: --requester-pays"
            if self._access.unsigned and not self._access.anonymous:
                return CredentialsUnusable(
                    f"{what}: there are no usable credentials, and without any the origin answers {status}{said}; set "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the daemon, or pass --aws-profile"
                )
            if self._access.unsigned:
                return AccessRefused(f"{what}: not open to everybody{said}; add it without --anonymous{pays}")
            return AccessRefused(f"{what}: access denied for {whose}{said}; they need {right} there{pays}")
        if status == 404:
            return OriginNotFound(f"{what}: not found ({code or status})")
        if status >= 500 or status == 408:
            return OriginUnavailable(f"{what}: the origin answers {status}{said}")
        if status == 400 and not code:
            return OriginUnsupported(f"{what}: the origin answers 400: encrypted with a customer's own key (SSE-C)?")
        return OriginUnsupported(f"{what}: the origin answers {status}{said}")

    @contextlib.contextmanager
    def translated(self, what: str, right: str) -> Iterator[None]:
        """The seam: botocore's exceptions become ours. Messages name the profile, never a key. ``right``: what is
        needed inside."""
        whose = f"the AWS profile {self._profile!r} gives" if self._profile else "the machine's AWS settings give"
        where = self._endpoint
        try:
            yield
        except botocore.exceptions.ClientError as error:
            raise self._from_response(what, right, error) from None
        except botocore.exceptions.ProfileNotFound:
            raise CredentialsUnusable(f"{what}: there is no AWS profile {self._profile!r}; see --aws-profile") from None
        except (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
        ):
            raise CredentialsUnusable(
                f"{what}: {whose} no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the "
                "daemon, or pass --aws-profile"
            ) from None
        except (botocore.exceptions.ReadTimeoutError, botocore.exceptions.ConnectTimeoutError):
            raise OriginUnavailable(f"{what}: {where} did not answer within {self._timeout:g} s") from None
        except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
            raise OriginUnavailable(f"{what}: {where} cannot be reached ({type(error).__name__})") from None
        except botocore.exceptions.PaginationError:
            raise OriginMisbehaved(f"{what}: the pages of its listing repeat themselves: it has no end") from None
        except ValueError as error:
            # An endpoint that can be none (a profile's) was never asked: nobody refused.
            kind = OriginUnavailable if str(error).startswith("Invalid endpoint") else CredentialsUnusable
            raise kind(f"{what}: the S3 settings are unusable: {error}") from None
        except botocore.exceptions.ParamValidationError:
            raise OriginNotFound(f"{what}: not a valid bucket or key name") from None
        except (botocore.parsers.ResponseParserError, KeyError) as error:
            raise OriginMisbehaved(
                f"{what}: {where} gave an answer that cannot be understood ({type(error).__name__}); is it S3?"
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise OriginUnavailable(f"{what}: {type(error).__name__}") from None

    def _from_response(self, what: str, right: str, error: botocore.exceptions.ClientError) -> OriginError:
        told = error.response.get("Error", {})
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        code = str(told.get("Code", ""))
        word = Word("" if code.isdigit() else code, printable(str(told.get("Message", "")))[:300])
        wait = retry_after(metadata.get("HTTPHeaders", {}).get("retry-after"), time.time())
        if status >= 500 and not word.code and metadata.get("HTTPHeaders", {}).get(WIRE_STATUS) == "200":
            return OriginMisbehaved(
                f"{what}: {self._endpoint} answers with XML that cannot be read; is it S3?", fault=Fault.ANSWER
            )
        return self._error(what, status, word, right, wait)
