"""The proxies that the environment names: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, and NO_PROXY for hosts that need none."""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

from instantstart_fs.core.urls import url_problem
from instantstart_fs.errors import CredentialsUnusable


class Proxies:
    """Read once: the environment does not change under a process."""

    def __init__(self) -> None:
        self._named = urllib.request.getproxies()

    def of(self, url: str) -> str | None:
        """Return the address of the proxy that ``url`` is asked through, with its user and password; None for none.

        Raises:
            CredentialsUnusable: What the environment names cannot be one. The reason does not repeat it.
        """
        parts = urlsplit(url)
        kind = parts.scheme if self._named.get(parts.scheme) else "all"
        proxy = self._named.get(kind)
        if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
            return None
        address = proxy if "//" in proxy else f"http://{proxy}"
        problem = url_problem(address)
        if problem is not None:
            raise CredentialsUnusable(
                f"{parts.hostname} is asked through the proxy of {kind.upper()}_PROXY, which is {problem}"
            )
        return address
