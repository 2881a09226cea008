"""What the environment says of the way to an origin: its proxies (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, and NO_PROXY for
hosts that need none), and the certificates of authorities that are believed."""

from __future__ import annotations

import os
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from instantstart_fs.core.urls import url_problem
from instantstart_fs.errors import OriginUnavailable

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest

_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def ca_bundle() -> str | None:
    """Return the file of authorities that the environment names, None for those that the machine believes."""
    return next((os.environ[name] for name in _CA_VARIABLES if os.environ.get(name)), None)


class Proxies:
    """Read once: the environment does not change under a process."""

    def __init__(self) -> None:
        self._named = urllib.request.getproxies()

    def of(self, url: str) -> str | None:
        """Return the address of the proxy that ``url`` is asked through, with its user and password; None for none.

        Raises:
            OriginUnavailable: What the environment names cannot be one. Nobody was asked, so nobody refused. The reason
                does not repeat it.
        """
        parts = urlsplit(url)
        kind = parts.scheme if self._named.get(parts.scheme) else "all"
        proxy = self._named.get(kind, "").strip()  # files of variables leave blanks and line ends
        hosts = (parts.hostname or "", parts.netloc.rpartition("@")[2])  # NO_PROXY may name a port
        if not proxy or any(urllib.request.proxy_bypass(host) for host in hosts):
            return None
        address = proxy if "//" in proxy else f"http://{proxy}"
        problem = url_problem(address)
        if problem is not None:
            raise OriginUnavailable(
                f"{parts.hostname} is asked through the proxy of {kind.upper()}_PROXY, which is {problem}"
            )
        return address


def judge_proxy(request: AWSPreparedRequest, **_: object) -> None:
    """Refuse a proxy that can be none, before botocore complains of it with a part of its password."""
    Proxies().of(request.url)
