"""Connects to addresses that an origin names: resolves once, judges the result, and connects to exactly that.

The fetch processes (urllib3) and the hub's client (httpx2) use it below TLS, so certificates and Host headers still
carry the name. It blocks. core/addresses.py decides what is permitted. A proxy (HTTPS_PROXY) resolves and connects
itself; then the name is judged by what this machine resolves it to, if it can.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

from instantstart_fs.core.addresses import Permit, host_of, parse_address, plain_host
from instantstart_fs.core.faults import Fault
from instantstart_fs.errors import OriginIncompatible, OriginMisbehaved

MOST_REDIRECTS = 5
"""Followed for one request."""
HOW_TO_ALLOW = "name it in [origins] allow_private if it is yours"
_DROPPED = str.maketrans("", "", "\t\r\n")
"""urlsplit overlooks these; what connects does not."""


def _refusal(host: str, address: str) -> OriginMisbehaved | OriginIncompatible:
    if plain_host(host) == address:
        return OriginIncompatible(f"{host} is no public address, and no origin may send us there; {HOW_TO_ALLOW}")
    # A name may resolve to something else the next time.
    return OriginMisbehaved(
        f"{host} resolves to {address}, which is no public address, and no origin may send us there; {HOW_TO_ALLOW}",
        fault=Fault.INSIDE,
    )


def resolve(
    host: str, port: int, permit: Permit, *, all_of_them: bool = False
) -> list[tuple[int, int, int, tuple[Any, ...]]]:
    """Return (family, type, protocol, address) of each place where ``host`` may be connected to. Raises OSError if it
    cannot be resolved, OriginMisbehaved or OriginIncompatible if none of its addresses (``all_of_them``: not each) may
    be connected to."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise OriginIncompatible(f"{host[:80]!r} is no host name") from None
    found = socket.getaddrinfo(host.strip("[]"), port, socket.AF_UNSPEC, socket.SOCK_STREAM)
    allowed = []
    for family, kind, protocol, _, place in found:
        address = parse_address(str(place[0]))
        if address is not None and permit.allows(host, address):
            allowed.append((int(family), int(kind), protocol, place))
        elif all_of_them:
            raise _refusal(host, str(place[0]))
    if not allowed:
        raise _refusal(host, str(found[0][4][0]) if found else "nothing")
    return allowed


def check_behind_proxy(host: str, permit: Permit) -> None:
    """Judge a host that a proxy will connect to, by all its addresses. A name that this machine cannot resolve is left
    to the proxy."""
    with contextlib.suppress(OSError):
        resolve(host, 0, permit, all_of_them=True)


def connect(
    host: str,
    port: int,
    permit: Permit,
    timeout: float | None,
    *,
    source_address: tuple[str, int] | None = None,
    options: Iterable[Sequence[Any]] = (),
) -> socket.socket:
    """A connection to the first place of ``host`` that answers; ``timeout``: seconds for each. Raises like resolve."""
    last: OSError | None = None
    for family, kind, protocol, place in resolve(host, port, permit):
        connection = socket.socket(family, kind, protocol)
        try:
            for option in options:
                connection.setsockopt(*option)
            connection.settimeout(timeout)
            if source_address:
                connection.bind(source_address)
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            last = error
    raise last or OSError("nothing to connect to")


def next_address(here: str, location: str) -> str:
    """The address that a redirect from ``here`` names. Raises OriginIncompatible for one that is never followed."""
    try:
        there = urljoin(here, location.strip()).partition("#")[0].translate(_DROPPED)
        parts = urlsplit(there)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise OriginIncompatible("it sends us to an address that is none") from None
    if "\\" in parts.netloc:
        raise OriginIncompatible("it sends us to an address that each program reads in another way")
    if parts.scheme not in ("http", "https") or not host:
        raise OriginIncompatible(f"it sends us to a {parts.scheme[:20] or 'strange'} address")
    return there


def check_text(url: str, permit: Permit) -> None:
    """Judge ``url`` by its text alone; the connection is judged again."""
    host = host_of(url)
    address = parse_address(host)
    if address is not None and not permit.allows(host, address):
        raise _refusal(host, host)


def same_origin(one: str, other: str) -> bool:
    """Whether both are one origin in the browser's sense: credentials for the one may go to the other."""
    ports = {"http": 80, "https": 443}
    first, second = urlsplit(one), urlsplit(other)
    return (first.scheme, plain_host(first.hostname or ""), first.port or ports.get(first.scheme)) == (
        second.scheme,
        plain_host(second.hostname or ""),
        second.port or ports.get(second.scheme),
    )
