"""Decides who asks for the page, and therefore what that caller sees.

HTTP does not say who asks, but the kernel does: SO_PEERCRED on a unix socket, the uid of the peer's socket for a TCP
connection on this machine (tcppeer.py). A token stands for the operator; with `public = true` the operator has opened
the page to all. Any other caller sees what everybody on the machine may see.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Callable, Mapping

import trio

from instantstart_fs.config import HttpConfig
from instantstart_fs.config.unixsocket import peer_of
from instantstart_fs.core.sight import ANYBODY, EVERYTHING, Sight
from instantstart_fs.errors import CredentialsUnusable, InstantStartError
from instantstart_fs.origins.credentials import read_token
from instantstart_fs.web.tcppeer import uid_of_peer

log = logging.getLogger(__name__)

LEAST_TOKEN = 16
"""The fewest characters of a token. A shorter one could be guessed."""
PROXIES = (
    "forwarded",
    "via",
    "x-forwarded",
    "x-real-ip",
    "x-client-ip",
    "x-original-",
    "x-envoy-",
    "cf-",
    "true-client-ip",
)
"""Prefixes of headers by which a proxy says that it asks for somebody else. Not every proxy names its caller's address:
Envoy by default sends `X-Forwarded-Proto` alone."""

SightOf = Callable[[int | None, frozenset[int] | None], Sight]


class Visitor:
    """The party at the other end of one connection. ``sight`` follows from its identity alone; ``share`` says whose
    places and requests it uses."""

    __slots__ = ("share", "sight")

    def __init__(self, sight: Sight, share: str) -> None:
        self.sight = sight
        self.share = share


STRANGER = Visitor(ANYBODY, "unknown")


class Visitors:
    """Tells who visits. ``sight_of`` says what a uid with these groups may see; None: that is not known."""

    def __init__(self, config: HttpConfig, sight_of: SightOf) -> None:
        self._config = config
        self._sight_of = sight_of
        self._token = TokenFile("http.token_file", config.token_file)
        self._api_token = TokenFile("http.api_token_file", config.api_token_file)

    def identify(self, stream: trio.SocketStream) -> Visitor:
        """Find out who is at the other end of an accepted connection."""
        connection = stream.socket
        if connection.family == socket.AF_UNIX:
            peer = peer_of(connection)
            return Visitor(self._sight_of(peer.uid, peer.groups), f"uid {peer.uid}")
        with socket.socket(fileno=os.dup(connection.fileno())) as plain:
            uid = uid_of_peer(plain)
        if uid is None:
            return Visitor(ANYBODY, _address(connection))
        return Visitor(self._sight_of(uid, None), f"uid {uid}")

    def sight(self, visitor: Visitor, headers: Mapping[str, str]) -> Sight | None:
        """Return what a request may see; None if its token is wrong."""
        if self._config.public:
            return EVERYTHING
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._config.token_file is not None and scheme.lower() == "bearer":
            return EVERYTHING if self._token.matches(given.strip()) else None
        # Somebody else than who is connected: behind a proxy, or a page of another site in this user's browser.
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere or any(name.lower().startswith(PROXIES) for name in headers):
            return ANYBODY
        return visitor.sight

    def may_ask_api(self, headers: Mapping[str, str]) -> bool | None:
        """Whether the request bears the API's token; None where none is configured."""
        if self._config.api_token_file is None:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._api_token.matches(given.strip())


class TokenFile:
    """A token, read again when its file has changed. ``path`` is None where there is none; ``setting`` names it in
    messages."""

    def __init__(self, setting: str, path: str | None) -> None:
        self._setting = setting
        self._path = path
        self._token: str | None = None
        self._token_of: tuple[int, int, int] | None = None
        """(inode, mtime, ctime) of the file that the token was read from."""

    def matches(self, given: str) -> bool:
        wanted = self._read()
        return wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())

    def _read(self) -> str | None:
        """Return the token; None if there is none to be had, as the log says."""
        path = self._path
        if path is None:
            return None
        try:
            found = os.stat(path)
            version = found.st_ino, found.st_mtime_ns, found.st_ctime_ns
            if version != self._token_of:
                self._token, self._token_of = None, version
                self._token = read_long_token(path)
        except OSError as error:
            self._token, self._token_of = None, None
            log.error("%s: %s: %s: nobody gets in", self._setting, path, error.strerror)
        except InstantStartError as error:
            log.error("%s: %s: nobody gets in", self._setting, error.message)
        return self._token


def read_long_token(path: str) -> str:
    """Return the token in the file. Raises CredentialsUnusable, also for a token that could be guessed."""
    token = read_token(path)
    if len(token) < LEAST_TOKEN:
        raise CredentialsUnusable(f"the token in {path} has less than {LEAST_TOKEN} characters")
    return token


def _address(connection: trio.socket.SocketType) -> str:
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return STRANGER.share
