"""The protocol that every origin implements.

An Origin lists and pins (``resolve``) and says where a pinned file's bytes can be fetched by ranged GETs (``locate``).
It never moves weight bytes: the fetch workers do that in one way for all origins. Its methods block, and the library
and the filler call them in threads. They must be thread-safe, honour their own network time-outs (``timeout`` seconds
without an answer), and translate every foreign exception into ``errors.OriginError``'s family.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from instantstart_fs.core.manifest import ManifestFile, ModelManifest
from instantstart_fs.core.refusals import Service


class OriginKey(msgspec.Struct, frozen=True):
    """Identity for connection pools and circuit breakers: which service, asked with which credentials.

    ``credentials`` is a short fingerprint (never a secret; "" for anonymous).
    """

    scheme: str
    endpoint: str
    credentials: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.endpoint}" + (f" as {self.credentials}" if self.credentials else "")


class Location(msgspec.Struct, frozen=True):
    """Where a file's bytes can be had for a while, by ranged GETs.

    ``url``: http, https or file. ``headers``: what every GET must carry (If-Match, an Authorization for
    that host only: never carried across a redirect).
    ``etag``: what each response's ETag must equal, None where the origin does not bind it. ``expires_at``: seconds of
    the wall clock after which to locate again, None = does not expire. ``identity`` (file URLs): what ``fstat`` must
    say, as ``directory.identity_of`` writes it, checked around every read.
    ``trusted``: whether the way there protects the bytes (TLS, loopback, a local file).
    ``named``: hosts, addresses and networks that the configuration names: only these may lie inside this machine or its
    network, there or behind a redirect (core/addresses.py).
    ``service``: who answers there, "" = somebody on the source's behalf (a CDN), whose refusals are not the source's.
    ``foreseen``: nobody was asked; if the answer is not as expected, the origin is (``Origin.locate``). ``commit``:
    what each response's X-Repo-Commit must equal, None where nothing is expected.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    etag: str | None = None
    expires_at: float | None = None
    identity: str | None = None
    trusted: bool = True
    service: Service = ""
    named: tuple[str, ...] = ()
    foreseen: bool = False
    commit: str | None = None


class Origin(Protocol):
    """One model's source with one pipeline's credentials."""

    @property
    def key(self) -> OriginKey: ...

    def resolve(self) -> ModelManifest:
        """List and pin all files (include/exclude applied), and prove what ``check`` does. Names are validated. Raises
        OriginError, InvalidName."""
        ...

    def locate(self, file: ManifestFile) -> Location:
        """Return the address of a pinned file now. Called once per file and signature lifetime. Raises OriginError."""
        ...

    def check(self) -> None:
        """Prove that the source may be fetched with these credentials, cheaply: it is there, and files
        that stand for all are given to them. Raises OriginError."""
        ...


@runtime_checkable
class Foresight(Protocol):
    """An origin that knows of some files where they will be found: one request for them, without a question first."""

    def foresee(self, file: ManifestFile) -> Location | None:
        """Asks nobody, but may read a token's file. None where only asking tells. Raises OriginError."""
        ...
