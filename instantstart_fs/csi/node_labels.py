"""Writes which pipelines are warm on this node into its labels, by the Kubernetes API and the pod's service account."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from instantstart_fs.control.client import Client
from instantstart_fs.core.nodelabels import changes, wanted_labels
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InstantStartError,
    OriginMisbehaved,
    OriginUnavailable,
    UsageError,
)

log = logging.getLogger(__name__)

ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
REQUEST_SECONDS: Final = 15.0
MAX_ANSWER: Final = 8 * 1024 * 1024
"""The most bytes of a node object that are read."""


class NodeApi:
    """One node in the Kubernetes API. The token is read again for each request, because it is rotated."""

    def __init__(self, node: str, *, server: str | None = None, account: str = ACCOUNT) -> None:
        """Raises UsageError where the API's address is unknown. ``server`` is the address; None takes it from the pod's
        environment."""
        if server is None:
            host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise UsageError("this is no pod (KUBERNETES_SERVICE_HOST is not set): name the API with --server")
            server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        if urllib.parse.urlsplit(server).scheme not in ("https", "http"):
            raise UsageError("--server must be an https:// address")
        self._url = f"{server.rstrip('/')}/api/v1/nodes/{urllib.parse.quote(node, safe='')}"
        self._account = account

    def labels(self) -> dict[str, str]:
        """Return the node's labels. Raises OriginError."""
        found = self._ask("GET", None).get("metadata", {}).get("labels") or {}
        return {str(key): str(value) for key, value in found.items()}

    def patch(self, labels: dict[str, str | None]) -> None:
        """Change these labels; None removes one. Raises OriginError."""
        self._ask("PATCH", {"metadata": {"labels": labels}})

    def _ask(self, method: str, body: Any) -> dict[str, Any]:
        request = urllib.request.Request(self._url, method=method)
        request.add_header("Accept", "application/json")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/merge-patch+json")
        try:
            with open(f"{self._account}/token", encoding="ascii") as file:
                request.add_unredirected_header("Authorization", f"Bearer {file.read().strip()}")
            context = (
                ssl.create_default_context(cafile=f"{self._account}/ca.crt") if self._url[:6] == "https:" else None
            )
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsUnusable(f"the service account in {self._account} cannot be read ({error})") from None
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _NoRedirect(), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=REQUEST_SECONDS) as answer:
                found = json.loads(answer.read(MAX_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):
                    raise AccessRefused(
                        f"the Kubernetes API refuses {method} of the node ({error.code}): see RBAC"
                    ) from None
                raise OriginUnavailable(f"the Kubernetes API answers {method} of the node with {error.code}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise OriginUnavailable(f"the Kubernetes API does not answer: {error}") from None
        if not isinstance(found, dict):
            raise OriginMisbehaved("the Kubernetes API's answer is no object")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def update_once(socket: str, api: NodeApi, limit: int) -> dict[str, str | None]:
    """Write the labels that differ. Returns what was changed. Raises InstantStartError.

    Without a daemon nothing changes: what it held is warm again when it comes back.
    """
    with Client(socket) as client:
        wanted = wanted_labels(client.pipelines(), limit)
    found = changes(api.labels(), wanted)
    if found:
        api.patch(found)
    return found


def follow(socket: str, api: NodeApi, limit: int, seconds: float, ended: threading.Event) -> None:
    """Call ``update_once`` every ``seconds`` until ``ended``, then remove the labels."""
    while True:
        try:
            found = update_once(socket, api, limit)
            if found:
                log.info(
                    "labels changed: %s", ", ".join(f"{key}={value or '(removed)'}" for key, value in found.items())
                )
        except InstantStartError as error:
            log.warning("labels are as they were: %s", error)
        if ended.wait(seconds * random.uniform(0.8, 1.2)):  # a fleet does not ask at the same moment
            break
    try:
        removed = changes(api.labels(), {})
        if removed:
            api.patch(removed)
    except InstantStartError as error:
        log.warning("the labels stay: %s", error)
