"""Every error that this project raises on purpose, under one base.

    InstantStartError
    ├── UsageError                 the caller asked for something malformed (exit 2 on the command line)
    │   ├── ConfigError            a configuration file, key or value
    │   ├── InvalidName            a pipeline id, model name or origin path that may not touch a filesystem
    │   └── InvalidSource          a source address that cannot be parsed, or an unknown scheme
    ├── NoSuchEntry                no file of that name, or a node that is gone (ENOENT, ESTALE)
    ├── PipelineNotFound           no such pipeline
    ├── PipelineExists             the id is taken
    ├── PipelineBusy               an operation that excludes this one is under way, or the pipeline is in use
    ├── VariantNotChosen           a source holds several quantisations of one model: somebody has to say which
    ├── NoColdStart                a mark for a cold start that nobody has seen
    ├── OriginError                where bytes are born
    │   ├── OriginUnavailable      could not be reached, timed out, 5xx: worth trying again
    │   │   ├── OriginThrottled    429/503 with or without Retry-After
    │   │   ├── OriginMisbehaved   a body cut short, a wrong Content-Range: not what was asked for
    │   │   └── LocationExpired    a signed address ran out, or somebody on the way refused it: resolve it again
    │   ├── OriginBroken           the breaker is open: nothing is sent until the next probe
    │   ├── AccessRefused          the source's own 401/403: no, bad or insufficient credentials
    │   │   └── CredentialsUnusable  found out here, before anybody was asked: unreadable, malformed, not kept private
    │   ├── OriginNotFound         repository, revision, bucket or key is not there
    │   │   └── OriginHidden       the whole source is not there, or not shown to these credentials: nobody can tell
    │   ├── OriginChanged          the pinned object was replaced at the origin: `update` is needed
    │   ├── OriginIncompatible     a server, or a redirect, that will not do: final until `warm` or `update`
    │   └── OriginUnsupported      what the origin holds cannot be served (a manifest with hostile names, say)
    ├── StoreError                 the NVMe side
    │   ├── StoreFull              no space, or no quota
    │   ├── StoreReadOnly          the filesystem refuses writes
    │   ├── StoreLocked            another daemon has this store
    │   ├── StoreUnsupported       overlayfs, FUSE, a newer format
    │   ├── StoreDamaged           an I/O error, or a record that cannot be read
    │   │   └── StoreLost          a file that the store had is not there any more, or something else is in its place
    │   ├── OutOfResources         descriptors or threads are used up for the moment: what was asked for is not wrong
    │   │   └── OutOfMemory        the same of the kernel's memory
    │   ├── IndexFull              the LMDB map has no space left
    │   └── IndexStuck             no commit comes to an end; what was to be written may still happen
    ├── DigestMismatch             bytes came whole and are not those of the manifest
    ├── ReadDeadline               no progress within the read deadline
    ├── FillCancelled              the pipeline was removed or evicted while somebody waited
    ├── FetchWorkersFailed         no fetch process can be started
    ├── MountFailed                the mount could not be made, or is held by somebody else
    ├── PrefetchError              weights could not be staged to a device
    │   ├── BadWeights             a file is not what its header says
    │   └── OutOfBudget            the device, or the machine, has no memory for them
    └── ControlError               between the command line and the daemon
        ├── DaemonUnreachable      no daemon answers on the socket
        ├── WaitDeadline           the time-out that a caller gave its own wait; what was waited for goes on
        ├── ControlProtocolError   a message that cannot be understood
        └── PermissionRefused      the caller may not do this

``code`` is stable and appears in `--json` (``error.code``) and in logs; the message is one printable line, says what
happened and, where somebody can do something, what to do. Messages never hold credentials or signed query strings.
Foreign exceptions (OSError, botocore, huggingface_hub, lmdb, urllib3) are translated at the seam where they enter.
"""

from __future__ import annotations

import functools
import re

MAX_MESSAGE = 4000
"""Characters of a message: what an origin said may be part of it, and goes into packets, logs and attributes."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` as a log or a terminal may show it: control characters, direction marks and what is no Unicode as
    escapes, so that a name which an origin made up is one line, and is obeyed by nobody."""
    if _UNPRINTABLE.search(text) is None:
        return text
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


_AT = "[@\ufe6b\uff20]"
"""The others are those that urllib takes for one, and repeats the address for it."""
_SLASH = r"\\?/"
"""JSON may escape it."""
_BEFORE = r"""(?<![^\s"'(<=,;|&{\[])"""
_PAIR = r"""[^\s/:@"'(<=,;|&{\[]{1,512}:(?!/|\d{1,5}/)"""
_USER = (
    rf"(https?:(?:{_SLASH})*)[^\s/?#]*{_AT}"
    rf"|((?<!/){_SLASH}{_SLASH})"
    rf"(?:[^\s/?#:]*:[^\s/?#]*|[^\s/?#:@\[\]]*:(?!\d{{0,5}}(?:[\s/?#\"'<>,;:.)}}\]]|\Z))[^\n]{{0,512}}){_AT}"
    rf"|({_BEFORE}(?!hf:)(?:[a-z][a-z0-9+.-]*:)?{_SLASH}{_SLASH})[^\s/?#:@]+{_AT}"
    rf"|((?:prox(?:y|ies)|ur[li]s?|address|endpoint|parse|server|host)[\s\"'=:(<\[]{{1,6}})(?!hf:){_PAIR}\S{{1,512}}{_AT}"
    rf"|((?<!owner)=[\"']?)(?!hf:){_PAIR}\S{{1,512}}{_AT}"
    rf"|{_BEFORE}{_PAIR}\S{{1,512}}{_AT}(?=\[|[\w.-]+:\d)"
    rf"|{_BEFORE}(?!hf:){_PAIR}\S{{1,512}}{_AT}(?=[\w.-]+/)"
    r"|(%3a(?:%2f){2})[^\s/?#\"'<>&]*%40"
)
"""User and password of an address, in this order: of http; behind `//` of any scheme or none (where the password has a
slash or the like unescaped, what stands in the port's place is no port, and all up to the last @ goes); a token in a
user's place, but for hf, where a revision may stand, as hf://org@main; without any slash, as me:password@proxy:3128,
where a word or a port tells that it is an address (an owner may be root:users@corp.example); of one that is quoted as
part of another. A quote is no end: it may be part of a password."""


@functools.cache
def _users() -> re.Pattern[str]:
    """Late: it takes 4 ms, and hardly any line needs it."""
    return re.compile(_USER, re.IGNORECASE)


_QUERY = re.compile(r"""(://[^\s"'<>?#]*)[?#][^\s"'<>]+|[?#&][^\s"'<>?#&=]+=[^\s"'<>]*""")
_KNOWN_SECRETS = re.compile(r"\b([Bb]earer|Basic) +[^\s,;\"']+|\bhf_[A-Za-z0-9]{16,}")
_NAMED_SECRETS = re.compile(
    r"""\b((?:aws_?)?(?:secret_?access_?key|session_?token)|client_?secret|x-amz-(?:security-token|signature))"""
    r"""(["']?\s*[=:]\s*)["']?[^\s"',;&<>]+""",
    re.IGNORECASE,
)
"""As programs that hand out keys print them, in JSON or as variables, and servers name them: what such a program said
last is part of an error."""


def without_secrets(text: str) -> str:
    """``text`` without what may be a secret in it: user and password of http addresses, queries (signatures live
    there), tokens. For whatever is shown, logged or handed on: other people's exceptions hold whole addresses."""
    if "@" in text or "%40" in text or not text.isascii():
        text = _users().sub(lambda found: found[found.lastindex] if found.lastindex else "", text)
    if "=" in text or "://" in text:
        text = _QUERY.sub(r"\1?…", text)
    if "=" in text or ":" in text:
        text = _NAMED_SECRETS.sub(r"\1\2…", text)
    return _KNOWN_SECRETS.sub("…", text)


class InstantStartError(Exception):
    """Base of all errors raised on purpose. ``retry_after`` is in seconds, where the other side named one. ``fault``:
    what a server did wrong (core/faults.py), "" where that is not known."""

    code = "error"

    def __init__(self, message: str, *, retry_after: float | None = None, fault: str = "") -> None:
        message = without_secrets(message)
        message = printable(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…")
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.fault = fault


class UsageError(InstantStartError):
    code = "usage"


class ConfigError(UsageError):
    code = "config"


class InvalidName(UsageError):
    code = "invalid-name"


class InvalidSource(UsageError):
    code = "invalid-source"


class NoSuchEntry(InstantStartError):
    code = "no-such-entry"


class PipelineNotFound(InstantStartError):
    code = "pipeline-not-found"


class PipelineExists(InstantStartError):
    code = "pipeline-exists"


class PipelineBusy(InstantStartError):
    code = "pipeline-busy"


class VariantNotChosen(InstantStartError):
    code = "variant-not-chosen"


class NoColdStart(InstantStartError):
    code = "no-cold-start"


class OriginError(InstantStartError):
    code = "origin"


class OriginUnavailable(OriginError):
    code = "origin-unavailable"


class OriginThrottled(OriginUnavailable):
    code = "origin-throttled"


class OriginMisbehaved(OriginUnavailable):
    code = "origin-misbehaved"


class LocationExpired(OriginUnavailable):
    code = "location-expired"


class OriginBroken(OriginError):
    code = "origin-broken"


class AccessRefused(OriginError):
    code = "access-refused"


class CredentialsUnusable(AccessRefused):
    code = "credentials-unusable"


class OriginNotFound(OriginError):
    code = "origin-not-found"


class OriginHidden(OriginNotFound):
    code = "origin-hidden"


class OriginChanged(OriginError):
    code = "origin-changed"


class OriginIncompatible(OriginError):
    code = "origin-incompatible"


class OriginUnsupported(OriginError):
    code = "origin-unsupported"


class StoreError(InstantStartError):
    code = "store"


class StoreFull(StoreError):
    code = "store-full"


class StoreReadOnly(StoreError):
    code = "store-read-only"


class StoreLocked(StoreError):
    code = "store-locked"


class StoreUnsupported(StoreError):
    code = "store-unsupported"


class StoreDamaged(StoreError):
    code = "store-damaged"


class StoreLost(StoreDamaged):
    code = "store-lost"


class OutOfResources(StoreError):
    code = "out-of-resources"


class OutOfMemory(OutOfResources):
    code = "out-of-memory"


class IndexFull(StoreError):
    code = "index-full"


class IndexStuck(StoreError):
    code = "index-stuck"


class DigestMismatch(InstantStartError):
    code = "digest-mismatch"


class ReadDeadline(InstantStartError):
    code = "read-deadline"


class FillCancelled(InstantStartError):
    code = "fill-cancelled"


class FetchWorkersFailed(InstantStartError):
    code = "fetch-workers-failed"


class MountFailed(InstantStartError):
    code = "mount-failed"


class PrefetchError(InstantStartError):
    code = "prefetch"


class BadWeights(PrefetchError):
    code = "bad-weights"


class OutOfBudget(PrefetchError):
    code = "out-of-budget"


class ControlError(InstantStartError):
    code = "control"


class DaemonUnreachable(ControlError):
    code = "daemon-unreachable"


class WaitDeadline(ControlError):
    code = "wait-deadline"


class ControlProtocolError(ControlError):
    code = "control-protocol"


class PermissionRefused(ControlError):
    code = "permission-refused"


def _tree(base: type[InstantStartError]) -> list[type[InstantStartError]]:
    found = [base]
    for child in base.__subclasses__():
        found.extend(_tree(child))
    return found


def all_errors() -> tuple[type[InstantStartError], ...]:
    """Return every class of the tree, so that tables over it (errno, exit status) can be tested for completeness."""
    return tuple(_tree(InstantStartError))


def from_code(code: str, message: str, *, retry_after: float | None = None, fault: str = "") -> InstantStartError:
    """The error of that ``code``, for messages that crossed a process boundary; an unknown code gives the base."""
    for cls in all_errors():
        if cls.code == code:
            return cls(message, retry_after=retry_after, fault=fault)
    return InstantStartError(message, retry_after=retry_after, fault=fault)
