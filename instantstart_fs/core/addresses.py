"""Decides which network addresses an origin may send the daemon to. Pure: it resolves and connects to nothing.

The daemon runs as root in the middle of a network: it reaches services of this machine, a cloud's metadata and the
neighbours, which the author of a redirect or of a DNS record may not reach. So an address that is chosen elsewhere must
be a public one, unless the configuration names it (``Permit``). What counts is the address that is connected to, never
how it was written: origins/guard.py resolves a name once, and connects to what was judged here.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_INSIDE_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT; Alibaba's metadata is 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host, in public space
        "169.254.0.0/16",  # link-local: most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols' own; Oracle's metadata is 192.0.0.192
        "192.0.2.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_INSIDE_6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocols' own, Teredo among them
        "2001:db8::/32",
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)
LOOPBACK = ("127.0.0.1", "::1")


def is_public(address: Address) -> bool:
    """Whether ``address`` lies in the public Internet. An IPv6 address that carries an IPv4 one is judged by that."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _INSIDE_4)
    number = int(address)
    if address in _NAT64 or address.ipv4_mapped is not None:
        return is_public(ipaddress.IPv4Address(number & 0xFFFFFFFF))
    if address not in _PUBLIC_6 or any(address in network for network in _INSIDE_6):
        return False
    if address.sixtofour is not None and not is_public(address.sixtofour):
        return False
    isatap = (number >> 32) & 0xFFFFFFFF in _ISATAP
    return not isatap or is_public(ipaddress.IPv4Address(number & 0xFFFFFFFF))


def parse_address(text: str) -> Address | None:
    """The address that ``text`` is as getaddrinfo writes it; None for a name."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def split_address(text: str) -> tuple[str, int] | None:
    """The IP address and the port of ``address:port``; None where it is anything else."""
    host, _, port = text.rpartition(":")
    address = parse_address(host.removeprefix("[").removesuffix("]"))
    if address is None or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        return None
    return str(address), int(port)


def plain_host(host: str) -> str:
    """``host`` as hosts are compared: lower case, without brackets and the root's dot."""
    return host.strip("[]").lower().rstrip(".")


def host_of(url: str) -> str:
    """The host of a URL, or of ``host:port``, as ``plain_host`` writes it; "" where there is none."""
    try:
        return plain_host(urlsplit(url if "//" in url else f"//{url}").hostname or "")
    except ValueError:
        return ""


class Permit:
    """The non-public hosts, addresses and networks that the configuration allows connections to.

    A host that is named may be wherever its name leads; an address, or a network, by whatever name it is reached. What
    a named host resolves to is not named by that: another name, or a bare address, does not lead there.
    """

    def __init__(self, named: Iterable[str]) -> None:
        self._hosts: set[str] = set()
        self._networks: list[_Network] = []
        for text in named:
            host = plain_host(text)
            try:
                self._networks.append(ipaddress.ip_network(host, strict=False))
            except ValueError:
                self._hosts.add(host)
                if host == "localhost" or host.endswith(".localhost"):
                    self._networks += [ipaddress.ip_network(text) for text in LOOPBACK]

    def allows(self, host: str, address: Address) -> bool:
        """Whether a connection to ``address``, which ``host`` was resolved to, may be made."""
        if is_public(address) or plain_host(host) in self._hosts:
            return True
        mapped = getattr(address, "ipv4_mapped", None)
        return any(
            candidate in network
            for candidate in (address, mapped)
            if candidate is not None
            for network in self._networks
            if network.version == candidate.version
        )


def is_named(text: str) -> bool:
    """Whether ``text`` can name something in a Permit."""
    try:
        ipaddress.ip_network(plain_host(text), strict=False)
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", text) is not None
    return True


@functools.lru_cache(maxsize=256)
def permit(named: tuple[str, ...]) -> Permit:
    return Permit(named)
