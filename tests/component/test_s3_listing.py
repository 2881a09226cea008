"""An endpoint that is no S3, or a bad one: its listing is refused with the reason, and never held in memory."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.source import S3Source
from instantstart_fs.errors import AccessRefused, OriginError, OriginMisbehaved, OriginUnavailable, OriginUnsupported
from instantstart_fs.origins import s3http
from instantstart_fs.origins.bounds import IN_THE_DAEMON, WHOLE, Bounds, TooLarge
from instantstart_fs.origins.s3 import S3Origin
from tests.servers.handler import serving

ROOT = b"<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
PART = b" " * 65536
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def endpoint(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers listings so, and shows an object of one byte at every other address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if "list-type" in self.path:
                with contextlib.suppress(OSError):
                    answer(self)
                return
            self.send_response(200)
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", "1")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"x")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


def origin(url: str | None, bounds: Bounds = WHOLE) -> S3Origin:
    return S3Origin(
        S3Source("bucket", "p"),
        ModelSpec("s3://bucket/p"),
        endpoint_url=url,
        region_name=None,
        profile=None,
        timeout=5.0,
        bounds=bounds,
        anonymous=True,
    )


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def page(*entries: bytes, more: bytes = b"") -> bytes:
    listed = b"".join(b"<Contents>%s</Contents>" % entry for entry in entries)
    return b"<?xml version='1.0'?>" + ROOT + more + listed + b"</ListBucketResult>"


GOOD = b"<Key>p/a</Key><Size>1</Size><ETag>e</ETag>"
WRONG = {
    "a login page": (b"<html><body>please log in</body></html>", "the answer to its listing is none; is the endpoint"),
    "json": (b'{"error": "no such route"}', "the answer to its listing is none"),
    "nothing": (b"", "the answer to its listing is none"),
    "another document": (b"<?xml version='1.0'?><Listing/>", "the answer to its listing is none"),
    "no xml": (ROOT + b"<Contents>", "answers with XML that cannot be read; is it S3"),
    "a control character": (page(b"<Key>p/&#1;</Key><Size>1</Size>"), "XML that cannot be read"),
    "entities that unfold": (
        b"<!DOCTYPE l [<!ENTITY a 'xxxxxxxxxx'>"
        + b"".join(b"<!ENTITY a%d '%s'>" % (at, (b"&a%d;" % (at - 1) if at else b"&a;") * 10) for at in range(9))
        + b"]>" + ROOT + b"<Contents><Key>&a8;</Key></Contents></ListBucketResult>",
        "XML that cannot be read",
    ),
    "a local file": (
        b"<!DOCTYPE l [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + page(b"<Key>p/&x;</Key><Size>1</Size>")[21:],
        "XML that cannot be read",
    ),
    "no size": (page(b"<Key>p/a</Key>"), "cannot be understood"),
    "no key": (page(b"<Size>1</Size>"), "cannot be understood"),
    "a size of letters": (page(b"<Key>p/a</Key><Size>many</Size>"), "its listing says what cannot be understood"),
    "a size of 5,000 digits": (page(b"<Key>p/a</Key><Size>%s</Size>" % (b"9" * 5000)), "cannot be understood"),
    "a time that is none": (page(GOOD + b"<LastModified>soon</LastModified>"), "its listing says what cannot be"),
    "another's keys": (page(GOOD, b"<Key>q/a</Key><Size>1</Size>"), "names 'q/a', which is not below the prefix"),
    "a key twice": (page(GOOD, GOOD), "twice"),
    "the same page for ever": (
        page(GOOD, more=b"<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"),
        "the pages of its listing repeat themselves",
    ),
    "a page that is cut": (page(GOOD, more=b"<IsTruncated>true</IsTruncated>"), "is cut after 1 keys"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_listing_that_is_none_is_refused_with_its_reason(what: str) -> None:
    body, says = WRONG[what]
    with endpoint(lambda handler: send(handler, body)) as url, pytest.raises(OriginMisbehaved) as caught:
        origin(url).resolve()
    assert says in caught.value.message


def test_a_good_page_is_read() -> None:
    with endpoint(lambda handler: send(handler, page(GOOD))) as url:
        assert [file.path for file in origin(url, IN_THE_DAEMON).resolve().files] == ["a"]


OTHER_WORDS = (
    b"<s3-x:ListBucketResult xmlns:s3-x='http://s3.amazonaws.com/doc/2006-03-01/'><s3-x:Contents><s3-x:Key>p/a</s3-x:Key>"
    b"<s3-x:Size>1</s3-x:Size><s3-x:ETag>e</s3-x:ETag></s3-x:Contents></s3-x:ListBucketResult>"
)


@pytest.mark.parametrize(
    ("body", "path"), [(b"<ListBucketResult/>", "p"), (OTHER_WORDS, "a")], ids=["nothing", "a prefix with a hyphen"]
)
def test_a_page_in_other_words_is_read(body: bytes, path: str) -> None:
    """Where nothing is below the prefix, it is taken for the name of one object."""
    with endpoint(lambda handler: send(handler, body)) as url:
        assert [file.path for file in origin(url).resolve().files] == [path]


@pytest.mark.parametrize(
    ("variable", "value", "without"),
    [("https_proxy", "socks5://127.0.0.1:9", ""), ("http_proxy", "socks5://127.0.0.1:9", "127.0.0.1:{port}")],
    ids=["for another scheme", "not for this host"],
)
def test_a_proxy_that_is_not_asked_is_in_nobodys_way(
    variable: str, value: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(lambda handler: send(handler, page(GOOD))) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv(variable, value)
        monkeypatch.setenv("no_proxy", without.format(port=url.rpartition(":")[2]))
        assert [file.path for file in origin(None).resolve().files] == ["a"]


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_the_proxy_that_would_be_asked_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example")
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    reason = f"s3.example is asked through the proxy of {variable.upper()}, which is not an http"
    with pytest.raises(OriginUnavailable, match=reason):
        origin(None).resolve()


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_proxy_is_asked_though_blanks_surround_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of variables leave them. What a proxy is asked for has the whole address."""
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        send(handler, page(GOOD))

    with endpoint(answer) as url:
        monkeypatch.setenv(variable, f" {url}\n")
        monkeypatch.setenv("no_proxy", "")
        assert [file.path for file in origin("http://s3.example").resolve().files] == ["a"]
    assert asked[0].startswith("http://s3.example/bucket?")


def test_a_profile_whose_endpoint_can_be_none_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket was not asked."""
    (tmp_path / "config").write_text("[default]\nendpoint_url = s3.example\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(OriginUnavailable, match="the S3 settings are unusable: Invalid endpoint"):
        origin(None).resolve()


BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.mark.parametrize("variable", BUNDLES)
def test_a_listing_believes_the_authorities_that_fetches_believe(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def session(*, verify: object, **_: object) -> None:
        seen.append(verify)
        raise OriginUnavailable("enough")

    monkeypatch.setattr(s3http, "URLLib3Session", session)
    for name in BUNDLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/etc/ours.pem")
    with pytest.raises(OriginUnavailable, match="enough"):
        origin("https://s3.example").resolve()
    assert seen == ["/etc/ours.pem"]


def _endless(status: int) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(ROOT)
        for _ in range(4000):
            handler.wfile.write(PART)

    return answer


BOMB = gzip.compress(ROOT + b" " * (64 << 20))


def _bomb(handler: BaseHTTPRequestHandler) -> None:
    send(handler, BOMB, Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("answer", "bounds", "error"),
    [
        (_endless(200), IN_THE_DAEMON, TooLarge),
        (_endless(200), Bounds(body=4 << 20), OriginUnsupported),
        (_endless(403), IN_THE_DAEMON, AccessRefused),
        (_endless(503), IN_THE_DAEMON, OriginUnavailable),
        (_bomb, IN_THE_DAEMON, OriginMisbehaved),
    ],
    ids=["in the daemon", "in its process", "a refusal", "an error", "a bomb"],
)
def test_a_page_that_unfolds_takes_no_memory(answer: Answer, bounds: Bounds, error: type[Exception]) -> None:
    with endpoint(answer) as url:
        asked = origin(url, bounds)
        tracemalloc.start()
        try:
            with pytest.raises(error):
                asked.resolve()
            assert tracemalloc.get_traced_memory()[1] < 48 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("status", [200, 403])
def test_a_page_that_drips_is_given_up(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3http, "PAGE_SECONDS", 0.3)
    monkeypatch.setattr(s3http, "ERROR_SECONDS", 0.3)
    done = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.send_response(status)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not done.wait(0.05):
            handler.wfile.write(b" ")

    began = time.monotonic()
    try:
        with endpoint(drip) as url, pytest.raises(OriginError):
            origin(url).resolve()
    finally:
        done.set()
    assert time.monotonic() - began < 20  # all of it would take half a day


def test_pages_without_end_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instantstart_fs.origins.s3pages.LISTING_SECONDS", 0.5)
    numbers = itertools.count()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        token = b"<NextContinuationToken>%d</NextContinuationToken>" % next(numbers)
        send(handler, page(more=b"<IsTruncated>true</IsTruncated>" + token))

    with endpoint(answer) as url, pytest.raises(OriginUnavailable, match="and 0 keys its listing goes on"):
        origin(url).resolve()


def test_a_body_that_is_cut_is_no_whole_page() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        send(handler, page(GOOD), Content_Length="9999")

    with endpoint(answer) as url, pytest.raises(OriginUnavailable, match="cannot be reached"):
        origin(url).resolve()
