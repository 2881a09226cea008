"""``hf://org/repo@revision`` through the real huggingface_hub client.

A revision is resolved to its commit once; everything later names the commit, so nothing changes under a manifest. LFS
files are proven by their sha256, the others by git's blob sha1. ``locate`` asks the hub's resolve address (HEAD) at the
pinned commit: big files live on a CDN behind a signed address that gets no Authorization; what the hub serves itself
gets the token, and only there.

The files are those of the tree, page by page (origins/hubtree.py). huggingface_hub's own list_repo_tree waits through a
Retry-After by itself, five times, without any time-out, and holds what comes without a bound, while callers here have
their own deadlines and breakers: so its client and its errors are used, and the pages are read here. Nothing is written
to disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_url,
)
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
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
from huggingface_hub.utils._datetime import parse_datetime
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from instantstart_fs.core.addresses import host_of, permit
from instantstart_fs.core.faults import Fault
from instantstart_fs.core.manifest import Algorithm, Digest, ManifestFile, ModelManifest, ModelSpec
from instantstart_fs.core.refusals import Word, hub_word, refusal
from instantstart_fs.core.source import HubSource
from instantstart_fs.core.urls import shown_url, url_problem, without_user
from instantstart_fs.errors import (
    AccessRefused,
    CredentialsUnusable,
    InvalidSource,
    OriginChanged,
    OriginError,
    OriginHidden,
    OriginIncompatible,
    OriginMisbehaved,
    OriginNotFound,
    OriginThrottled,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.origins.base import Location, OriginKey
from instantstart_fs.origins.bounds import WHOLE, Bounds
from instantstart_fs.origins.common import (
    DEFAULT_LIFETIME,
    Skips,
    finish_manifest,
    is_trusted,
    leave_out,
    refuse_endless,
    retry_after,
    samples,
    selected,
    signature_expiry,
)
from instantstart_fs.origins.credentials import read_token
from instantstart_fs.origins.guard import (
    MOST_REDIRECTS,
    check_text,
    next_address,
    same_origin,
)
from instantstart_fs.origins.hubclient import on_behalf_of
from instantstart_fs.origins.hubtree import (
    LISTING_SECONDS,
    NOT_KNOWN,
    PAGE,
    Answer,
    Description,
    Listed,
    NoTree,
    Witness,
    decode,
    listed_sibling,
    read_tree,
)

HEAD_THREADS = 16
_HEX = frozenset("0123456789abcdef")


class HuggingFaceOrigin:
    """One repository at one revision, asked with one pipeline's token. Thread-safe.

    ``token_file`` is read at each request (tokens are rotated under running daemons); when it is given, no other token
    is ever used. Without it, huggingface_hub's own look-up applies (HF_TOKEN, `hf auth login`), else anonymous.
    ``anonymous``: no token at all, though the machine has one.
    """

    def __init__(
        self,
        source: HubSource,
        model: ModelSpec,
        *,
        endpoint: str | None,
        token_file: str | None,
        timeout: float,
        bounds: Bounds = WHOLE,
        allow_private: tuple[str, ...] = (),
        anonymous: bool = False,
    ) -> None:
        self._source = source
        self._model = model
        # HF_ENDPOINT is read when huggingface_hub is imported, hence passed on explicitly
        address = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._problem = url_problem(address)
        self._endpoint, self._basic = without_user(address) if self._problem is None else (constants.ENDPOINT, None)
        self._named = (host_of(self._endpoint), *allow_private)
        self._token_file = token_file
        self._timeout = timeout
        self._bounds = bounds
        self._anonymous = anonymous
        whose = "nobody" if anonymous else "machine token" if token_file is None else f"token-file {token_file}"
        self._key = OriginKey("hf", urlsplit(self._endpoint).netloc.rpartition("@")[2], whose)

    @property
    def key(self) -> OriginKey:
        return self._key

    def resolve(self) -> ModelManifest:
        description = self._info()
        commit = self._commit(description)
        found, held = self._files(description, commit)
        skips = Skips()
        chosen = leave_out(self._model, found, skips)
        unsized = [file for file in chosen if file.size is None]
        if unsized:
            sized = {file.path: file for file in self._ask_sizes(unsized, commit)}
            chosen = [sized.get(file.path, file) for file in chosen]
        mtime_ns = _nanoseconds(description.lastModified)
        files = [
            ManifestFile(
                path=file.path,
                size=file.size if file.size is not None else -1,
                address=file.path,
                version=commit,
                digest=file.digest,
                mtime_ns=mtime_ns,
            )
            for file in chosen
        ]
        manifest = finish_manifest(self._model, commit, files, held, skips)
        # a gated repository, and a token that may list, show the list to everybody: prove that the bytes may be had
        self._prove(samples(manifest.files))
        return manifest

    def locate(self, file: ManifestFile) -> Location:
        commit = file.version
        token = self._token()
        found = self._head(file.address, commit, token)
        if found.commit_hash is None:
            raise OriginMisbehaved(
                f"{self._endpoint} answers for {file.path} without X-Repo-Commit: not a Hugging Face hub, or a proxy "
                "that drops its headers",
                fault=Fault.ANSWER,
            )
        if found.commit_hash != commit:
            raise OriginChanged(f"{file.path}: the hub answers for commit {found.commit_hash}, pinned was {commit}")
        if file.digest is not None and found.etag != file.digest.value:
            raise OriginChanged(f"{file.path}: the hub now names other content for commit {commit}; run update")
        if found.size is not None and file.size >= 0 and found.size != file.size:
            raise OriginChanged(f"{file.path}: the hub now says {found.size} bytes, pinned were {file.size}")
        location = self._sent_to(file, found.location)
        headers: tuple[tuple[str, str], ...] = ()
        expires_at = signature_expiry(location, time.time())
        own = same_origin(location, self._endpoint)
        if own:
            headers = self._authorization(token)
        elif expires_at is None:
            expires_at = time.time() + DEFAULT_LIFETIME
        return Location(
            url=location,
            headers=headers,
            expires_at=expires_at,
            trusted=is_trusted(location),
            service="hub" if own else "",
            named=self._named,
        )

    def foresee(self, file: ManifestFile) -> Location | None:
        """A file that is no LFS file is served by the hub itself, at its resolve address, whose answer says what a HEAD
        would: the commit, and git's sha1 as the ETag."""
        if file.digest is None or file.digest.algorithm != "git-sha1":
            return None
        with self._translated(f"{self._source}: {file.path}"):
            url = hf_hub_url(self._source.repo, file.address, revision=file.version, endpoint=self._endpoint)
        return Location(
            url=self._sent_to(file, url),
            headers=self._authorization(self._token()),
            etag=file.digest.value,
            trusted=is_trusted(url),
            service="hub",
            named=self._named,
            foreseen=True,
            commit=file.version,
        )

    def _authorization(self, token: str | None) -> tuple[tuple[str, str], ...]:
        authorization = self._basic or (f"Bearer {token}" if token else None)
        return (("Authorization", authorization),) if authorization else ()

    def _sent_to(self, file: ManifestFile, told: str) -> str:
        """Return the address that the hub redirects to. Judged by its text here, and again by the fetch that
        connects."""
        try:
            location = next_address(f"{self._endpoint}/", told)
            check_text(location, permit(self._named))
        except OriginIncompatible as error:
            raise OriginIncompatible(f"{file.path}: {self._endpoint} sends us on: {error.message}") from None
        return location

    def _head(self, path: str, commit: str, token: str | None = None) -> HfFileMetadata:
        url = hf_hub_url(self._source.repo, path, revision=commit, endpoint=self._endpoint)
        with self._translated(f"{self._source}: {path}"):
            return get_hf_file_metadata(
                url,
                token=token or self._token() or False,
                timeout=self._timeout,
                endpoint=self._endpoint,
                library_name="instantstart-fs",
            )

    def check(self) -> None:
        description = self._info()
        commit = self._commit(description)
        self._prove(self._find_samples(commit, description))

    def _find_samples(self, commit: str, description: Description) -> list[ManifestFile]:
        """Return samples from the first page that has a chosen file."""
        held = 0
        for page, _ in self._pages(commit, description):
            held += len(page)
            files = [
                ManifestFile(file.path, -1 if file.size is None else file.size, file.path, commit, file.digest)
                for file in page
                if selected(file.path, self._model)
            ]
            shown = leave_out(self._model, files, Skips())
            if shown:
                return samples(shown)
        finish_manifest(self._model, commit, [], held)
        return []

    def _prove(self, files: Sequence[ManifestFile]) -> None:
        """Ask the hub for these files. Raises what it answers. The place where it sends us for them is not asked: that
        is no hub."""
        for file in files:
            try:
                self.locate(file)
            except CredentialsUnusable:
                raise
            except AccessRefused as error:
                raise AccessRefused(
                    f"{error.message}. Its files are listed, but may not be downloaded: the token needs read access to "
                    "the contents of this repository"
                ) from None

    def _ask(self, path: str, query: str, *, optional: bool = False) -> Answer:
        """Return one answer of the hub's API. Raises OriginError, TooLarge; NoTree if the hub does not know
        ``optional``."""
        headers = build_hf_headers(token=self._token() or False, library_name="instantstart-fs")
        body = bytearray()
        with self._translated(str(self._source)):
            url = f"{self._endpoint}/api/models/{self._source.repo}/{path}"
            with get_session().stream(
                "GET", f"{url}?{query}" if query else url, headers=headers, timeout=self._timeout
            ) as response:
                if optional and response.status_code in NOT_KNOWN and not response.headers.get("X-Error-Code"):
                    raise NoTree
                hf_raise_for_status(response)
                if response.status_code != 200:
                    raise OriginMisbehaved(f"{self._source}: {self._endpoint} answers {response.status_code}")
                for part in response.iter_bytes():
                    body += part
                    self._bounds.allow(str(self._source), body=len(body))
                return Answer(bytes(body), response.links.get("next", {}).get("url"))

    def _info(self, query: str = "") -> Description:
        answer = self._ask(f"revision/{quote(self._source.revision, safe='')}", query)
        with self._translated(str(self._source)):
            return decode(answer.body, Description)

    def _files(self, description: Description, commit: str) -> tuple[list[Listed], int]:
        """Return every chosen file at the commit, and how many files there are."""
        chosen: list[Listed] = []
        witness = Witness(str(self._source), description.siblings)
        for page, entries in self._pages(commit, description):
            witness.saw(page, entries)
            chosen += [file for file in page if selected(file.path, self._model)]
            refuse_endless(self._model.source, len(chosen), witness.files)
            self._bounds.allow(str(self._source), files=witness.files)
        witness.add_up()
        return chosen, witness.files

    def _pages(self, commit: str, description: Description) -> Iterator[tuple[list[Listed], int]]:
        """Yield the tree page by page: files, and the number of entries. Mirrors without a tree: the description's
        list."""

        def ask(query: str) -> Answer:
            return self._ask(f"tree/{quote(commit, safe='')}", query, optional=True)

        try:
            with self._translated(str(self._source)):
                yield from read_tree(str(self._source), ask)
            return
        except NoTree:
            if not description.siblings:
                raise OriginMisbehaved(
                    f"{self._source}: {self._endpoint} has neither a tree of it nor names files; is it a hub?"
                ) from None
        siblings = self._info("blobs=true").siblings or description.siblings
        if len(siblings) >= PAGE and len(siblings) % PAGE == 0:
            raise OriginMisbehaved(
                f"{self._source}: {self._endpoint} has no tree of it, and lists exactly {len(siblings)} files: that "
                "may be cut; ask the hub itself, or a mirror that passes on its tree"
            )
        yield [listed_sibling(sibling) for sibling in siblings], 0

    def _ask_sizes(self, files: Sequence[Listed], commit: str) -> list[Listed]:
        """Return the files with sizes and digests by HEAD of each: some mirrors list only names."""
        end = time.monotonic() + LISTING_SECONDS

        def ask(file: Listed) -> Listed:
            if time.monotonic() > end:
                raise OriginUnavailable(
                    f"{self._source}: {self._endpoint} lists no sizes, and did not tell those of {len(files)} files "
                    f"one by one within {LISTING_SECONDS:g} s"
                )
            found = self._head(file.path, commit)
            if found.size is None:
                raise OriginMisbehaved(f"{self._source}: {self._endpoint} does not say how long {file.path!r:.300} is")
            return Listed(file.path, found.size, file.digest or _digest_of(found.etag))

        with ThreadPoolExecutor(HEAD_THREADS, thread_name_prefix="hub-head") as pool:
            try:
                return list(pool.map(ask, files))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _commit(self, description: Description) -> str:
        if not description.sha:
            raise OriginMisbehaved(f"{self._endpoint} does not say which commit {self._source} is")
        return description.sha

    def _token(self) -> str | None:
        if self._anonymous:
            return None
        if self._basic is not None:
            if self._token_file is not None:
                raise CredentialsUnusable(
                    f"{self._endpoint} is configured with a user and password, and a request can carry those or a "
                    "token, not both: remove the password from the endpoint, or the token file"
                )
            return None
        if self._token_file is None:
            token = get_token()
            if token and not all("!" <= character <= "~" for character in token):
                raise CredentialsUnusable("the machine's hub token (HF_TOKEN, or `hf auth login`) is no token")
            return token
        return read_token(self._token_file)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The seam: huggingface_hub's and httpx2's exceptions become ours, without tokens and signed queries."""
        if self._problem is not None:
            raise OriginUnavailable(f"{what}: the hub's endpoint (HF_ENDPOINT) is {self._problem}")
        try:
            with on_behalf_of(self._endpoint, self._named, self._basic):
                yield
        except (OriginUnavailable, OriginIncompatible) as error:
            if error.message.startswith(str(self._source)):
                raise
            raise type(error)(f"{what}: {error.message}", retry_after=error.retry_after, fault=error.fault) from None
        except HfHubHTTPError as error:
            raise self._from_response(what, error) from None
        except HFValidationError as error:
            raise InvalidSource(f"{self._source}: {_one_line(str(error))}") from None
        except OfflineModeIsEnabled:
            raise OriginUnavailable(f"{what}: HF_HUB_OFFLINE is set for the daemon; unset it") from None
        except httpx2.TimeoutException:
            raise OriginUnavailable(f"{what}: {self._endpoint} did not answer within {self._timeout:g} s") from None
        except httpx2.TooManyRedirects:
            raise OriginMisbehaved(
                f"{what}: {self._endpoint} answers with more than {MOST_REDIRECTS} redirects", fault=Fault.REDIRECTS
            ) from None
        except httpx2.UnsupportedProtocol:
            raise OriginIncompatible(f"{what}: {self._endpoint} sends us to what is not http or https") from None
        except httpx2.HTTPError as error:
            raise OriginUnavailable(
                f"{what}: {self._endpoint} cannot be reached ({type(error).__name__}: {_one_line(str(error))})"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, httpx2.InvalidURL) as error:
            # a body that is no JSON, or JSON of another shape: a captive portal, a proxy's error page
            raise OriginMisbehaved(
                f"{what}: {self._endpoint} gave an answer that cannot be understood ({type(error).__name__})",
                fault=Fault.ANSWER,
            ) from None

    def _missing_part(self) -> str:
        repo = self._source.repo
        return "" if "/" in repo else f" (if {repo!r} is an organization, its repository is missing: hf://{repo}/REPO)"

    def _from_response(self, what: str, error: HfHubHTTPError) -> OriginError:
        response = error.response
        status = response.status_code
        headers = response.headers
        whom = f"the token in {self._token_file}" if self._token_file else "the machine's token (if it has one)"
        whom = "being asked without a token" if self._anonymous else whom
        message = hub_word(headers).message
        said = f" (it says: {message})" if message else ""
        if isinstance(error, GatedRepoError):
            return AccessRefused(
                f"{what}: the repository is gated, and {whom} does not give access to it{said}; request access "
                f"at {self._endpoint}/{self._source.repo} and pass --token-file with a token of that account"
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
                f"{what}: the hub has no such repository, or does not show it with {whom}{said}; check the name"
                f"{self._missing_part()}, or pass --token-file"
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
                f"{what}: the hub refuses access with {whom} ({status}){said}; pass --token-file with a valid token"
            )
        where = shown_url(str(response.url))
        if status in (404, 410):
            return OriginNotFound(f"{what}: not found at {where}{said}")
        if status in (402, 408, 451) or status >= 500:
            return refusal(status, f"{what}: the hub", word=Word(message=message))
        return OriginUnsupported(f"{what}: the hub answers {status} at {where}{said}")


def _digest_of(etag: str | None) -> Digest | None:
    """Return the digest in the ETag of a hub's own answer: an LFS file's sha256, else the git blob's sha1."""
    kinds: dict[int, Algorithm] = {64: "sha256", 40: "git-sha1"}
    kind = kinds.get(len(etag or ""))
    return Digest(kind, etag.lower()) if etag and kind and _HEX.issuperset(etag.lower()) else None


def _nanoseconds(stamp: str | None) -> int:
    try:
        return int(parse_datetime(stamp).timestamp()) * 1_000_000_000 if stamp else 0
    except ValueError:
        return 0


def _one_line(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first.partition("?")[0][:200]
