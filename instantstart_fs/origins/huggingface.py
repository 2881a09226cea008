"""``hf://org/repo@revision`` through the real huggingface_hub client.

A revision is resolved to its commit once; everything later names the commit, so nothing changes under a manifest. LFS
files are proven by their sha256, the others by git's blob sha1. ``locate`` asks the hub's resolve address (HEAD) at the
pinned commit: big files live on a CDN behind a signed address that gets no Authorization; what the hub serves itself
gets the token, and only there.

Only calls that take a time-out and do not sleep are used: list_repo_tree waits through a Retry-After by itself, five
times, without any time-out, while callers here have their own deadlines and breakers. Nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
from huggingface_hub.utils._http import default_client_factory

from instantstart_fs.core.manifest import Digest, ManifestFile, ModelManifest, ModelSpec
from instantstart_fs.core.refusals import Word, hub_word, refusal
from instantstart_fs.core.source import HubSource
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InvalidSource,
    OriginChanged,
    OriginError,
    OriginHidden,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.common import (
    DEFAULT_LIFETIME,
    finish_manifest,
    is_trusted,
    redirect_refusal,
    refuse_endless,
    retry_after,
    selected,
    signature_expiry,
    without_query,
)
from instantstart_fs.origins.credentials import read_token

MAX_BODY = 1 << 30
"""Bytes of one answer: the list of a repository with a million files has 300 MB."""
BODY_SECONDS = 240.0


class _Bounded(httpx2.SyncByteStream):
    """A body as long as one may be, and no longer under way than it may be."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        count, end = 0, time.monotonic() + BODY_SECONDS
        for part in self._stream:
            count += len(part)
            if count > MAX_BODY:
                raise httpx2.RemoteProtocolError(f"an answer of more than {MAX_BODY} bytes")
            if time.monotonic() > end:
                raise httpx2.ReadTimeout(f"an answer that is not whole after {BODY_SECONDS:g} s")
            yield part

    def close(self) -> None:
        self._stream.close()


def _ask_plain(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


def _bound(response: httpx2.Response) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # A few kilobytes of it may be gigabytes.
        raise httpx2.RemoteProtocolError(f"an answer in {encoding[:20]!r}, which nobody asked for")
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _Bounded(response.stream)


def _client() -> httpx2.Client:
    """huggingface_hub's own, which reads whatever comes: what a hub answers must not take all memory."""
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _ask_plain], "response": [*hooks["response"], _bound]}
    return client


set_client_factory(_client)


class HuggingFaceOrigin:
    """One repository at one revision, asked with one pipeline's token. Thread-safe.

    ``token_file`` is read at each request (tokens are rotated under running daemons); when it is given, no other token
    is ever used. Without it, huggingface_hub's own look-up applies (HF_TOKEN, `hf auth login`), else anonymous.
    """

    def __init__(
        self, source: HubSource, model: ModelSpec, *, endpoint: str | None, token_file: str | None, timeout: float
    ) -> None:
        self._source = source
        self._model = model
        # HF_ENDPOINT is read when huggingface_hub is imported, hence passed on explicitly
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token_file = token_file
        self._timeout = timeout
        self._api = HfApi(endpoint=self._endpoint, token=False, library_name="instantstart-fs")
        whose = "machine token" if token_file is None else f"token-file {token_file}"
        self._key = OriginKey("hf", urlsplit(self._endpoint).netloc.rpartition("@")[2], whose)

    @property
    def key(self) -> OriginKey:
        return self._key

    def resolve(self) -> ModelManifest:
        info = self._info(files_metadata=True)
        commit = self._commit(info)
        siblings = info.siblings or []
        refuse_endless(str(self._source), len(siblings))
        modified = info.last_modified
        mtime_ns = int(modified.timestamp()) * 1_000_000_000 if modified else 0
        with self._translated(str(self._source)):  # what the list holds is the hub's to say
            files = [
                self._pin(sibling, commit, mtime_ns) for sibling in siblings if selected(sibling.rfilename, self._model)
            ]
        manifest = finish_manifest(self._model, commit, files, len(siblings))
        # a gated repository shows its list to everybody: prove that the bytes may be had, too
        self.locate(manifest.files[0])
        return manifest

    def locate(self, file: ManifestFile) -> Location:
        commit = file.version
        token = self._token()
        url = hf_hub_url(self._source.repo, file.address, revision=commit, endpoint=self._endpoint)
        with self._translated(f"{self._source}: {file.path}"):
            found = get_hf_file_metadata(
                url,
                token=token or False,
                timeout=self._timeout,
                endpoint=self._endpoint,
                library_name="instantstart-fs",
            )
        if found.commit_hash is None:
            raise OriginMisbehaved(
                f"{self._endpoint} answers for {file.path} without X-Repo-Commit: not a Hugging Face hub, or a proxy "
                "that drops its headers"
            )
        if found.commit_hash != commit:
            raise OriginChanged(f"{file.path}: the hub answers for commit {found.commit_hash}, pinned was {commit}")
        if file.digest is not None and found.etag != file.digest.value:
            raise OriginChanged(f"{file.path}: the hub now names other content for commit {commit}; run update")
        if found.size is not None and file.size >= 0 and found.size != file.size:
            raise OriginChanged(f"{file.path}: the hub now says {found.size} bytes, pinned were {file.size}")
        refusal = redirect_refusal(found.location, self._endpoint)
        if refusal is not None:
            raise OriginMisbehaved(f"{file.path}: {self._endpoint} {refusal}")
        headers: tuple[tuple[str, str], ...] = ()
        expires_at = signature_expiry(found.location, time.time())
        own = _same_host(found.location, self._endpoint)
        if own:
            if token:
                headers = (("Authorization", f"Bearer {token}"),)
        elif expires_at is None:
            expires_at = time.time() + DEFAULT_LIFETIME
        return Location(
            url=found.location,
            headers=headers,
            expires_at=expires_at,
            trusted=is_trusted(found.location),
            service="hub" if own else "",
        )

    def check(self) -> None:
        info = self._info(files_metadata=False)
        commit = self._commit(info)
        for sibling in info.siblings or []:
            if selected(sibling.rfilename, self._model):
                self.locate(ManifestFile(sibling.rfilename, -1, sibling.rfilename, commit))
                return
        finish_manifest(self._model, commit, [], len(info.siblings or []))

    def _info(self, *, files_metadata: bool) -> ModelInfo:
        token = self._token()
        with self._translated(str(self._source)):
            return self._api.model_info(
                self._source.repo,
                revision=self._source.revision,
                files_metadata=files_metadata,
                timeout=self._timeout,
                token=token or False,
            )

    def _commit(self, info: ModelInfo) -> str:
        if not info.sha:
            raise OriginMisbehaved(f"{self._endpoint} does not say which commit {self._source} is")
        return info.sha

    def _pin(self, sibling: RepoSibling, commit: str, mtime_ns: int) -> ManifestFile:
        size = sibling.size if sibling.size is not None else sibling.lfs.size if sibling.lfs else None
        if size is None:
            raise OriginMisbehaved(f"{self._endpoint} does not say how long {sibling.rfilename!r} is")
        digest = None
        if sibling.lfs:
            digest = Digest("sha256", sibling.lfs.sha256.lower())
        elif sibling.blob_id:
            digest = Digest("git-sha1", sibling.blob_id.lower())
        return ManifestFile(
            path=sibling.rfilename,
            size=size,
            address=sibling.rfilename,
            version=commit,
            digest=digest,
            mtime_ns=mtime_ns,
        )

    def _token(self) -> str | None:
        if self._token_file is None:
            token = get_token()
            if token and not all("!" <= character <= "~" for character in token):
                raise CredentialsUnusable("the machine's hub token (HF_TOKEN, or `hf auth login`) is no token")
            return token
        return read_token(self._token_file)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The seam: huggingface_hub's and httpx2's exceptions become ours, without tokens and signed queries."""
        try:
            yield
        except HfHubHTTPError as error:
            raise self._from_response(what, error) from None
        except HFValidationError as error:
            raise InvalidSource(f"{self._source}: {_one_line(str(error))}") from None
        except OfflineModeIsEnabled:
            raise OriginUnavailable(f"{what}: HF_HUB_OFFLINE is set for the daemon; unset it") from None
        except httpx2.TimeoutException:
            raise OriginUnavailable(f"{what}: {self._endpoint} did not answer within {self._timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise OriginUnavailable(
                f"{what}: {self._endpoint} cannot be reached ({type(error).__name__}: {_one_line(str(error))})"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, httpx2.InvalidURL) as error:
            # a body that is no JSON, or JSON of another shape: a captive portal, a proxy's error page
            raise OriginMisbehaved(
                f"{what}: {self._endpoint} gave an answer that cannot be understood ({type(error).__name__})"
            ) from None

    def _from_response(self, what: str, error: HfHubHTTPError) -> OriginError:
        response = error.response
        status = response.status_code
        headers = response.headers
        who = f"with the token of {self._token_file}" if self._token_file else "with the machine's token, or none,"
        message = hub_word(headers).message
        said = f" (it says: {message})" if message else ""
        if isinstance(error, GatedRepoError):
            return AccessRefused(
                f"{what}: the repository is gated, and {who} it may not be fetched{said}; request access "
                f"at {without_query(self._endpoint)}/{self._source.repo} and pass --token-file with a token of that "
                "account"
            )
        if isinstance(error, DisabledRepoError):
            return AccessRefused(f"{what}: the hub has disabled this repository{said}")
        if isinstance(error, RevisionNotFoundError):
            return OriginNotFound(f"{what}: the repository has no revision {self._source.revision!r}{said}")
        if isinstance(error, RemoteEntryNotFoundError):
            return OriginNotFound(
                f"{what}: there is no such file at the pinned commit{said}; `update` pins what is there now"
            )
        if isinstance(error, RepositoryNotFoundError):
            return OriginHidden(
                f"{what}: no such repository, or it is private and {who} it is not shown{said}; check the name, or "
                "pass --token-file"
            )
        if status in (429, 503):
            wait = retry_after(headers.get("Retry-After"), time.time())
            limit = parse_ratelimit_headers(headers)
            if wait is None and limit is not None and limit.remaining == 0:
                wait = float(limit.reset_in_seconds)
            told = f"; it asks to wait {wait:g} s" if wait is not None else ""
            return OriginThrottled(f"{what}: the hub answers {status}{said}{told}", retry_after=wait)
        if status in (401, 403):
            return AccessRefused(
                f"{what}: the hub refuses access {who} ({status}){said}; pass --token-file with a valid one"
            )
        where = without_query(str(response.url))
        if status in (404, 410):
            return OriginNotFound(f"{what}: not found at {where}{said}")
        if status in (402, 408, 451) or status >= 500:
            return refusal(status, f"{what}: the hub", word=Word(message=message))
        return OriginUnsupported(f"{what}: the hub answers {status} at {where}{said}")


def _same_host(url: str, endpoint: str) -> bool:
    """Whether both have one origin in the browser's sense; the token goes nowhere else."""
    one, other = urlsplit(url), urlsplit(endpoint)
    ports = {"http": 80, "https": 443}
    return (one.scheme, one.hostname, one.port or ports.get(one.scheme)) == (
        other.scheme,
        other.hostname,
        other.port or ports.get(other.scheme),
    )


def _one_line(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first.partition("?")[0][:200]
