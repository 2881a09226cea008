"""Decides whether bytes of a file may be served before its digest is verified (``fill.serve_unsealed``). Pure."""

from __future__ import annotations

import ipaddress
from typing import Literal
from urllib.parse import urlsplit

ServeUnsealed = Literal["auto", "always", "never"]


def may_serve_unsealed(setting: ServeUnsealed, trusted: bool) -> bool:
    """Return whether bytes may be served before their file is proven. ``trusted``: the way to the origin protects them
    (TLS, loopback, a local file). "auto" serves such bytes only."""
    return setting == "always" or (setting == "auto" and trusted)


def endpoint_trusted(scheme: str, endpoint: str) -> bool:
    """Judge an origin by its address, while no Location is known (chunks of an earlier run).

    ``endpoint`` is a URL, or a host with or without a port; anything that is not surely protected counts as open.
    """
    if scheme == "file":
        return True
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    if parts.scheme in ("https", "file"):
        return True
    host = parts.hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
