"""Web addresses: how one is shown, which parts are credentials, what is wrong with one as configured. Pure."""

from __future__ import annotations

import base64
from urllib.parse import unquote, urlsplit, urlunsplit


def shown_url(url: str) -> str:
    """``url`` as it may be shown: without user and password, query and fragment, where signatures and tokens live."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # also where what looks like a port is the beginning of a password with a slash in it
        return "an address that is none"
    if not parts.netloc and "@" in parts.path:
        return "an address that is none"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def url_problem(url: str) -> str | None:
    """Return why ``url`` is no address of a server; None if it is one. The reason does not repeat it: it may hold a
    password."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    # An '@' behind a slash: of http://me:12/34@host the password has begun before it.
    if not good or "@" in parts.path or parts.query or parts.fragment or any(character <= " " for character in url):
        return (
            "not an http:// or https:// address of a host, port and path (in a password, '@', '/', ':', '?' and '#' "
            "are written %40, %2F, %3A, %3F and %23)"
        )
    return None


def s3_url_problem(url: str) -> str | None:
    """``url_problem`` for the address of an S3 service, whose requests are signed: a password would never be sent."""
    problem = url_problem(url)
    if problem is None and "@" in urlsplit(url).netloc:
        return (
            "S3 requests are signed, so that user and password of the address would not be sent: remove them, and give "
            "the keys as an AWS profile"
        )
    return problem


def without_user(url: str) -> tuple[str, str | None]:
    """``url`` without user and password, and the Authorization (basic) that they make; None without them."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    name, _, password = user.partition(":")
    secret = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode("ascii")
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment)), f"Basic {secret}"
