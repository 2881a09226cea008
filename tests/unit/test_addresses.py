"""Which addresses an origin may send the daemon to, and how addresses are shown."""

from __future__ import annotations

import ipaddress
import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from instantstart_fs.core.addresses import Permit, host_of, is_named, is_public, parse_address
from instantstart_fs.core.urls import s3_url_problem, shown_url, url_problem, without_user
from instantstart_fs.errors import InstantStartError, OriginUnavailable, from_code, without_secrets
from instantstart_fs.origins.guard import next_address, same_origin


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.255.0.9",
        "0.0.0.0",
        "0.1.2.3",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "ff02::1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2a00:1450::5efe:127.0.0.1",
        "100::1",
    ],
)
def test_what_is_not_public(text: str) -> None:
    address = parse_address(text)
    assert address is not None and not is_public(address)
    assert not Permit(()).allows("cdn.example", address)


@pytest.mark.parametrize(
    "text",
    [
        "1.1.1.1",
        "168.63.129.17",
        "99.84.1.2",
        "2600:9000:1::1",
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
        "2002:101:101::1",
    ],
)
def test_what_is_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    ("named", "host", "address", "allowed"),
    [
        (("mirror.corp",), "mirror.corp", "10.0.0.1", True),
        (("mirror.corp",), "MIRROR.corp.", "10.0.0.1", True),
        # What a named host resolves to is not named by that.
        (("mirror.corp",), "10.0.0.1", "10.0.0.1", False),
        (("mirror.corp",), "other.corp", "10.0.0.1", False),
        (("mirror.corp",), "a.mirror.corp", "10.0.0.1", False),
        (("10.0.0.1",), "other.corp", "10.0.0.1", True),
        (("10.0.0.1",), "10.0.0.2", "10.0.0.2", False),
        (("10.0.0.0/24",), "10.0.0.2", "10.0.0.2", True),
        (("10.0.0.0/24",), "10.0.0.2", "::ffff:10.0.0.2", True),
        (("127.0.0.1",), "localhost", "127.0.0.1", True),
        (("localhost",), "127.0.0.1", "127.0.0.1", True),
        (("127.0.0.1",), "127.0.0.2", "127.0.0.2", False),
        (("::1",), "localhost", "::1", True),
        ((), "cdn.example", "1.1.1.1", True),
    ],
)
def test_what_the_configuration_names(named: tuple[str, ...], host: str, address: str, allowed: bool) -> None:
    assert Permit(named).allows(host, ipaddress.ip_address(address)) is allowed


def test_what_can_be_named() -> None:
    assert all(map(is_named, ("minio.corp", "10.0.0.0/8", "fd00::/8", "127.0.0.1", "[::1]", "localhost")))
    assert not any(map(is_named, ("", "http://minio.corp", "minio.corp:9000", "10.0.0.0/99", "a b")))


@pytest.mark.parametrize(
    ("here", "told", "there"),
    [
        ("https://hub/a/b", "https://cdn/x?s=1#frag", "https://cdn/x?s=1"),
        ("https://hub/a/b", "/c", "https://hub/c"),
        ("https://hub/a/b", "//cdn/c", "https://cdn/c"),
        ("https://hub/a/b", "file:///etc/shadow", None),
        ("https://hub/a/b", "ftp://x/y", None),
        ("https://hub/a/b", "http:///x", None),
        ("https://hub/a/b", "http://[::1/x", None),
        ("https://hub/a/b", "http://host:99999/x", None),
    ],
)
def test_where_a_redirect_leads(here: str, told: str, there: str | None) -> None:
    if there is None:
        with pytest.raises(InstantStartError, match="sends us to"):
            next_address(here, told)
    else:
        assert next_address(here, told) == there


def test_one_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://hub/a", "https://HUB:443/b")
    assert not same_origin("https://hub/a", "http://hub/a")
    assert not same_origin("https://hub/a", "https://hub:8443/a")
    assert not same_origin("https://hub/a", "https://hub.evil/a")
    assert (
        host_of("http://me:pw@Host.:1/a") == "host"
        and host_of("host:80") == "host"
        and host_of("http://[::1]:1") == "::1"
    )


def test_addresses_are_shown_without_secrets() -> None:
    assert shown_url("https://me:secret@host:1/a/b?Signature=s#f") == "https://host:1/a/b"
    for none in ("http://[::1", "http://me:sec/ret@host", "http://me:sec?ret@host", "me:secret@host:80"):
        assert shown_url(none) == "an address that is none"
    assert shown_url("//me:secret@host/x") == "://host/x"
    told = (
        "HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /b/k?X-Amz-Signature=sig&x=1 (Caused by "
        "http://me:pw@host:1/p?token=t and HTTPS://u@host/, Authorization: Bearer abc.def, hf_abcdefghijklmnopqrst)"
    )
    shown = without_secrets(told)
    for secret in ("sig", "pw", "me:", "u@", "abc.def", "abcdefghijkl", "token=t"):
        assert secret not in shown
    assert "host:1/p" in shown and "Max retries" in shown
    for hidden in (
        "http://me:it'ssecret@host/x",
        'refused: http://me:a"secret<@host',
        "socks5://me:secret@proxy:1",
        "s3://AKIA:secret@bucket/x",
        "http://me:sec/secret@host/x",
        "HTTPS://me:a/b?c#secret@host:1/x is refused",
        "proxy 'http://me:it's/secret@host:3128'",
        "http://me:a secret@host",
        "http:/me:secret@host",
        "//me:secret@host",
        "//me:a/secret@host",
        "s3://AKIA:a/secret@bucket/x",
        "HTTPS_PROXY=me:secret@proxy:3128",
        "me:secret@[::1]:3128",
        "Failed to parse: me:secret@host",
        "{'authorization': 'bearer secret'}",
        "to https://host/path?secret now",
        'a broken {"Version": 1, "SecretAccessKey": "secret+/=", "SessionToken" : "secret"}',
        "AWS_SECRET_ACCESS_KEY=secret aws_session_token = secret",
        "the header X-Amz-Security-Token: secret// is too long",
        "//secret@host",
        "s3://secret@bucket/x",
        "http:////me:secret@host",
        "https:secret@host",
        r"{\"proxy\": \"http:\/\/me:secret@host\"}",
        "a redirect to https://hub/login/http%3A%2F%2Fme%3Asecret%40proxy",
        "netloc 'me:secret\uff20host:80' contains invalid characters under NFKC normalization",
        "http://me:secret\ufe6bhost/x",
        "Unknown scheme for proxy URL URL('me:secret@proxy')",
        "Invalid endpoint: me:secret@minio",
        "proxy=me:a/secret@host:1",
        "no_proxy is x,me:secret@host:1",
        "['me:secret@host:1']",
    ):
        assert "secret" not in without_secrets(hidden), hidden
    for harmless in (
        "hf://org/repo@main",
        "hf://gpt2@main, hf://org/b:c@main",
        "is it there? yes = no",
        "a=b",
        "SessionToken: ",
        "the secret access key is wrong: see aws configure",
        "s3://bucket/prefix",
        "http://host/a@b",
        "http://host:80/a@b",
        "http://host:80: refused, ask a@b",
        "http://[::1]:80/a@b",
        "file:///a:b@c",
        "hf:gpt2@main",
        "/mnt/a:b@c",
        "at 12:30:00 somebody@host",
        "http://host:port",
        "'root:users@corp.example' names a user or group that this machine does not know",
        "--owner=root:users@corp.example",
        'owner = "root:users@corp.example"',
        "is step:100@x there",
        "step:100@x",
        "registry.io:5000/image@sha256:12",
        "git@github",
    ):
        assert without_secrets(harmless) == harmless


SECRET = "S3cr3t"
_user = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="-._~%+!$*"), max_size=8)
_inside = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=6)
_host = st.sampled_from(["host", "proxy.corp", "10.0.0.1", "[::1]", "h"])
_port = st.sampled_from(["", ":80", ":3128"])
_path = st.sampled_from(["", "/", "/a/b", "/a@b", "?x=1", "/v1?Signature=s"])
_around = st.sampled_from(["", "refused: ", "'", '"', "(", "proxy ", "https_proxy=", "url: <", "\n", "a, "])


@given(
    st.sampled_from(["http://", "HTTPS://", "https:/", "http:", "//", "s3://", "socks5h://", "redis://"]),
    _user,
    _inside,
    _inside,
    _host,
    _port,
    _path,
    _around,
)
def test_no_password_of_an_address_is_shown_however_it_is_spelt(
    scheme: str, user: str, before: str, after: str, host: str, port: str, path: str, around: str
) -> None:
    password = before + SECRET + after
    if scheme in ("https:/", "http:"):
        assume(not set("/?#") & set(password))  # then it is a path, for everybody who reads addresses
    # What ends an authority, behind what may be a port, ends it here, too: http://me:80/b@host is the host me.
    assume(re.match(r"\d{0,5}[^\w]", password) is None)
    # Behind an @ a / begins the path, for everybody who reads addresses: http://me:a@b/c@host is the host b.
    assume(re.search(r"@.*[/?#]", password) is None)
    shown = without_secrets(f"{around}{scheme}{user}:{password}@{host}{port}{path} is gone")
    assert SECRET not in shown
    assert "is gone" in shown


@given(_user.filter(bool), _inside, _inside, _host, st.sampled_from([":80", ":3128"]), _around)
def test_no_password_of_a_proxy_without_a_scheme_is_shown(
    user: str, before: str, after: str, host: str, port: str, around: str
) -> None:
    password = before + SECRET + after
    assume(not password.startswith("/") and re.match(r"\d{1,5}/", password) is None)
    assert SECRET not in without_secrets(f"{around}{user}:{password}@{host}{port}")


_word = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="-._"), min_size=1, max_size=9)


@given(_word, _word, _word, st.sampled_from(["", "'", "(", "--owner=", "owner "]))
def test_words_that_are_no_address_stay(user: str, group: str, domain: str, around: str) -> None:
    """As an owner of a directory service, root:users@corp.example, or a step, step:100@x."""
    assume(user.lower() not in ("http", "https"))
    told = f"{around}{user}:{group}@{domain} is not known"
    assert without_secrets(told) == told


@given(st.text(st.characters(codec="utf-8", exclude_characters="@=:%\uff20\ufe6b"), max_size=60))
def test_text_without_an_address_stays(text: str) -> None:
    assume(not any(word in text for word in ("Basic", "earer", "hf_")))
    assert without_secrets(text) == text


def test_a_long_line_is_searched_in_moderate_time() -> None:
    for line in ("a:b" * 4000 + "@", "//" * 5000 + "@", "proxy" * 2000 + "a:" * 2000 + "@", "https:" * 2000 + "@ @"):
        began = time.process_time()
        without_secrets(line)
        assert time.process_time() - began < 2.0, line[:20]


def test_no_error_holds_a_secret() -> None:
    message = "http://me:secret@host/x?sig=secret is gone"
    for error in (OriginUnavailable(message), from_code("store", message)):
        assert "secret" not in str(error) and "secret" not in repr(error) and "secret" not in error.message


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "http://",
        "http://host:no/",
        "http://us er@host",
        "http://h?x=1",
        "http://u:pa/ss@host",
        "http://u:12/ss@host",
    ],
)
def test_a_bad_address_is_refused_without_repeating_it(url: str) -> None:
    assert (problem := url_problem(url)) is not None and "ss@" not in problem


def test_a_password_belongs_to_a_hub_and_not_to_s3() -> None:
    assert url_problem("http://me:pw@host/x") is None
    assert "signed" in str(s3_url_problem("http://me:pw@host/x")) and s3_url_problem("http://host:9000") is None
    assert without_user("http://me:p%40w@host:1/x?q=1") == ("http://host:1/x?q=1", "Basic bWU6cEB3")
    assert without_user("http://host/x") == ("http://host/x", None)
