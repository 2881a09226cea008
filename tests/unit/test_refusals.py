"""What an answer without bytes means."""

from __future__ import annotations

import pytest

from instantstart_fs.core.refusals import MOST_ERROR_BODY, Service, Word, hub_word, refusal, s3_word
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    LocationExpired,
    OriginChanged,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)


def _xml(code: str, message: str = "") -> bytes:
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


@pytest.mark.parametrize(
    ("status", "code", "message", "error", "advice"),
    [
        (403, "AccessDenied", "Access Denied", AccessRefused, "s3:GetObject"),
        (403, "AccessDenied", "Request has expired", LocationExpired, "ran out"),
        (403, "AccessDenied", "no identity-based policy allows the kms:Decrypt action", AccessRefused, "kms:Decrypt"),
        (403, "AccessDenied", "The bucket is Requester Pays", AccessRefused, "--requester-pays"),
        (403, "InvalidObjectState", "not valid for the object's storage class", OriginUnsupported, "restore it"),
        (400, "KMS.DisabledException", "arn:… is disabled", OriginUnsupported, "enable it"),
        (400, "KMS.SomethingNew", "", OriginUnsupported, "key"),
        (403, "KMS.AccessDeniedException", "", AccessRefused, "kms:Decrypt"),
        (400, "InvalidRequest", "stored using a form of Server Side Encryption", OriginUnsupported, ""),
        (403, "RequestTimeTooSkewed", "", CredentialsUnusable, "clock"),
        (403, "InvalidAccessKeyId", "", AccessRefused, "access key"),
        (400, "ExpiredToken", "", AccessRefused, "renew"),
        (404, "NoSuchKey", "", OriginNotFound, "`update`"),
        (404, "NoSuchVersion", "", OriginNotFound, "`update`"),
        (412, "PreconditionFailed", "", OriginChanged, "`update`"),
        (503, "SlowDown", "", OriginThrottled, ""),
        (500, "InternalError", "", OriginUnavailable, ""),
        (403, "SomethingNew", "why", AccessRefused, "SomethingNew: why"),
        (418, "SomethingNew", "why", OriginMisbehaved, "SomethingNew: why"),
    ],
)
def test_an_s3_code_is_named_with_what_to_do(
    status: int, code: str, message: str, error: type[InstantStartError], advice: str
) -> None:
    found = refusal(status, "http://s3/b/k", service="s3", word=s3_word(_xml(code, message)))
    assert type(found) is error
    assert code in found.message and advice in found.message and "http://s3/b/k" in found.message


@pytest.mark.parametrize("service", ["s3", ""])
def test_a_403_that_is_not_the_services_own_word_is_asked_for_anew(service: Service) -> None:
    for body in (b"", b"<html>Forbidden by the proxy</html>", b"<Code>AccessDenied</Code>"):
        assert type(refusal(403, "x", service=service, word=s3_word(body))) is LocationExpired
    # A CDN speaks S3's language too, and refuses for reasons of its own.
    assert type(refusal(403, "x", service="", word=s3_word(_xml("AccessDenied")))) is LocationExpired


def test_what_the_hub_says_is_told() -> None:
    word = hub_word({"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model\n is restricted."})
    found = refusal(403, "http://hub/x", service="hub", word=word)
    assert type(found) is AccessRefused and "Access to model is restricted." in found.message
    for status in (402, 451):
        found = refusal(status, "http://hub/x", service="hub", word=Word(message="because"))
        assert type(found) is AccessRefused and "because" in found.message


def test_a_body_is_looked_at_in_part_and_holds_no_secrets() -> None:
    assert s3_word(b" " * MOST_ERROR_BODY + _xml("NoSuchKey")) == Word()
    assert s3_word(b"\xff<Error><Code>A</Code><Message>\xff&lt;b&gt;</Message>") == Word("A", "\ufffd<b>")
    long = s3_word(_xml("A", "m" * 1000))
    assert len(long.message) < 400
    told = str(s3_word(_xml("A", "see https://me:pw@host/x?X-Amz-Signature=sig now")))
    assert told == "A: see https://host/x?… now"


@pytest.mark.parametrize("status", [404, 410])
def test_what_a_cdn_does_not_have_is_asked_for_anew(status: int) -> None:
    assert type(refusal(status, "http://cdn/x")) is LocationExpired
    assert type(refusal(status, "http://hub/x", service="hub")) is OriginNotFound
