"""Turns an HTTP refusal (status, the service's error code and message) into an error. Pure: nothing is read here.

An S3 service says why in its body (``<Error><Code>…``), the hub in its headers (X-Error-Code, X-Error-Message). A CDN
or a proxy on the way says something too, but the decision is not theirs: what it refuses is asked for anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from instantstart_fs.core.faults import Fault
from instantstart_fs.core.late_pattern import late
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    LocationExpired,
    OriginChanged,
    OriginError,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
    without_secrets,
)

Service = Literal["s3", "hub", "rack", ""]
"""The party that answers at an address: the source's own service, whose refusal is the source's; "rack": a host beside
this one; "" = somebody on its behalf."""

MOST_ERROR_BODY = 16 * 1024
"""The bytes of a refusal's body that are looked at."""
_MOST_SHOWN = 300
_CODE = late(rb"<Code>\s*([A-Za-z0-9_.\-]{1,100})\s*</Code>")
_MESSAGE = late(rb"<Message>([^<]{1,2000})</Message>")


class Word(msgspec.Struct, frozen=True):
    """The code and message of a refusal; both may be empty."""

    code: str = ""
    message: str = ""

    def __str__(self) -> str:
        if self.code and self.message and self.message != self.code:
            return f"{self.code}: {self.message}"
        return self.code or self.message


NO_WORD = Word()


def s3_word(body: bytes) -> Word:
    """The ``<Code>`` and ``<Message>`` of an S3 error's body; empty where it is none."""
    body = body[:MOST_ERROR_BODY]
    code = _CODE.search(body)
    if code is None or b"<Error" not in body:
        return Word()
    message = _MESSAGE.search(body)
    return Word(code[1].decode("ascii"), _shown(message[1].decode("utf-8", "replace")) if message else "")


def hub_word(headers: Mapping[str, str]) -> Word:
    """The hub's X-Error-Code and X-Error-Message. ``headers`` is a mapping that ignores case."""
    return Word(_shown(headers.get("X-Error-Code") or ""), _shown(headers.get("X-Error-Message") or ""))


def _shown(text: str) -> str:
    """Return one line of a service's message, without signatures and passwords of addresses in it."""
    import html  # late: no start needs it

    line = without_secrets(" ".join(html.unescape(text).split()))
    return line if len(line) <= _MOST_SHOWN else line[:_MOST_SHOWN] + "…"


_S3_ADVICE: dict[str, tuple[type[OriginError], str]] = {
    # What nobody's credentials are to blame for.
    "InvalidObjectState": (OriginUnsupported, "the object is archived: restore it, then `warm`"),
    "KMS.DisabledException": (OriginUnsupported, "the key that encrypts it is disabled: enable it, then `warm`"),
    "KMS.KMSInvalidStateException": (OriginUnsupported, "the key that encrypts it is not usable: see its state in KMS"),
    "KMS.NotFoundException": (OriginUnsupported, "the key that encrypts it is gone: encrypt the object anew"),
    "KMS.AccessDeniedException": (AccessRefused, "allow these credentials kms:Decrypt for the key that encrypts it"),
    "KMS.ThrottlingException": (OriginThrottled, "KMS asks to slow down"),
    "InvalidRequest": (OriginUnsupported, "the request does not fit the object (encrypted with a customer's key?)"),
    "UserKeyMustBeSpecified": (OriginUnsupported, "it is encrypted with a customer's own key (SSE-C): not served"),
    # The credentials, or how they are used.
    "AccessDenied": (AccessRefused, "these credentials need s3:GetObject there (s3:GetObjectVersion for a version)"),
    "AllAccessDisabled": (AccessRefused, "the provider has disabled all access to it: ask its support"),
    "AccountProblem": (AccessRefused, "there is a problem with the account: ask the provider"),
    "InvalidAccessKeyId": (AccessRefused, "the access key is not known there: check the credentials"),
    "SignatureDoesNotMatch": (AccessRefused, "the secret key is wrong, or a proxy changes the request"),
    "ExpiredToken": (AccessRefused, "the session token has expired: renew the credentials"),
    "InvalidToken": (AccessRefused, "the session token is not valid: renew the credentials"),
    "TokenRefreshRequired": (AccessRefused, "the session token must be renewed"),
    "AuthorizationHeaderMalformed": (AccessRefused, "the region is wrong: set [origins.s3] region_name"),
    "AuthorizationQueryParametersError": (AccessRefused, "the signature does not fit: check the region and the clock"),
    "RequestTimeTooSkewed": (CredentialsUnusable, "this machine's clock is too far from the service's: set it"),
    "RequestExpired": (LocationExpired, "the signed address ran out"),
    # What is not there, or not that any more.
    "NoSuchKey": (OriginNotFound, "the object is gone; `update` pins what is there now"),
    "NoSuchVersion": (OriginNotFound, "the pinned version is gone; `update` pins what is there now"),
    "NoSuchBucket": (OriginNotFound, "there is no such bucket"),
    "MethodNotAllowed": (OriginNotFound, "the pinned version is a delete marker; `update` pins what is there now"),
    "PreconditionFailed": (OriginChanged, "the pinned object was replaced; `update` pins the new one"),
    "InvalidRange": (OriginChanged, "the object is shorter than the pinned one; `update` pins the new one"),
    "PermanentRedirect": (OriginUnsupported, "the bucket lives elsewhere: set its region_name or endpoint_url"),
    # What passes.
    "SlowDown": (OriginThrottled, "asked to slow down"),
    "Throttling": (OriginThrottled, "asked to slow down"),
    "ThrottlingException": (OriginThrottled, "asked to slow down"),
    "TooManyRequests": (OriginThrottled, "asked to slow down"),
    "RequestLimitExceeded": (OriginThrottled, "asked to slow down"),
    "ServiceUnavailable": (OriginThrottled, "asked to slow down"),
    "InternalError": (OriginUnavailable, "it has a fault of its own"),
    "RequestTimeout": (OriginUnavailable, "it did not get the request in time"),
}


def s3_advice(word: Word) -> tuple[type[OriginError], str] | None:
    """The error for an S3 service's code, and advice; None for an unknown code.

    AccessDenied has several causes that only its message tells apart.
    """
    said = word.message.lower()
    if word.code == "AccessDenied":
        if "expired" in said:
            return LocationExpired, "the signed address ran out"
        if "kms:" in said:
            return _S3_ADVICE["KMS.AccessDeniedException"]
        if "requester" in said and "pay" in said:
            return AccessRefused, "the bucket's requester pays: add the pipeline with --requester-pays"
    if word.code == "InvalidRequest" and "server-side encryption" in said:
        return _S3_ADVICE["UserKeyMustBeSpecified"]
    if word.code.startswith("KMS.") and word.code not in _S3_ADVICE:
        return OriginUnsupported, "the key that encrypts it cannot be used"
    return _S3_ADVICE.get(word.code)


def refusal(
    status: int, where: str, *, service: Service = "", word: Word = NO_WORD, retry_after: float | None = None
) -> OriginError:
    """The error of an answer with ``status`` (not 200 or 206) from ``where`` (an address as it may be shown).

    A 401 or 403 is AccessRefused only where the source's own service says so; elsewhere, and from S3 without a code of
    S3's, it is LocationExpired: somebody on the way refused, and a fresh address may be served. So is a CDN's 404: what
    there is, is the source's to say, and an edge may be ill.
    """
    said = f" ({word})" if str(word) else ""
    answers = f"{where} answers {status}{said}"
    if service == "s3" and word.code:
        known = s3_advice(word)
        if known is not None:
            kind, advice = known
            return kind(f"{answers}: {advice}", retry_after=retry_after)
    if status in (401, 403):
        if service == "hub":
            return AccessRefused(f"{answers}: the hub refuses this token, or wants one; pass --token-file")
        if service == "s3" and word.code:
            return AccessRefused(f"{answers}: refused for these credentials")
        return LocationExpired(f"{answers}: refused on the way, or the signed address ran out")
    if status == 402:
        return AccessRefused(f"{answers}: it wants to be paid for this; see the account's plan")
    if status == 451:
        return AccessRefused(f"{answers}: withheld for legal reasons")
    if status in (404, 410):
        if not service:
            return LocationExpired(f"{answers}: it is not there, although the source gave this address")
        return OriginNotFound(f"{answers}: it is not there; `update` pins what is there now")
    if status in (412, 416):
        return OriginChanged(f"{answers}: the pinned object was replaced; `update` pins the new one")
    if status in (429, 503):
        return OriginThrottled(f"{answers}: asked to slow down", retry_after=retry_after)
    if status == 407:
        return OriginUnsupported(f"{answers}: the proxy wants credentials; put them into HTTPS_PROXY")
    if status >= 500 or status == 408:
        return OriginUnavailable(answers, retry_after=retry_after)
    return OriginMisbehaved(answers, fault=Fault.ANSWER)
