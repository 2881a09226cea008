"""Parses source addresses, by which users name a model's place. Pure; nothing is looked up.

    hf://org/repo            hf://org/repo@revision        hf://gpt2@refs/pr/1     (a revision may hold slashes)
    s3://bucket              s3://bucket/prefix            (the prefix is a directory, or names one object)
    file:///absolute/path    (percent-encoding is decoded, as in any file URL)

This is the one spelling that is kept and sent. What people paste is made into it by ``core/pasted.py``.
``str(source)`` gives the address back in one spelling. Messages never repeat what may hold a password.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.errors import InvalidSource

_REPO_PART = late(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z")
_REVISION = late(r"[A-Za-z0-9._/+-]{1,255}\Z")
_BUCKET = late(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]\Z")
_REPO = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_BARE_REPO = late(rf"{_REPO}(?:@[A-Za-z0-9._+-]+)?")
_COLON_REVISION = late(
    r"([A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?):([A-Za-z0-9][A-Za-z0-9._/+-]{0,254})"
)
_USUAL_REVISION = late(r"main|master|v?[0-9][0-9.]*|[0-9a-f]{40}|refs/pr/[0-9]+")
_EXAMPLES = "write hf://org/repo@revision, s3://bucket/prefix or file:///directory"


class HubSource(msgspec.Struct, frozen=True):
    """A model repository on a Hugging Face hub; ``revision`` is a branch, tag, ref or commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}"


class S3Source(msgspec.Struct, frozen=True):
    """``prefix`` without leading or trailing slash; "" = the whole bucket."""

    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


class DirectorySource(msgspec.Struct, frozen=True):
    """An absolute path, without ``.`` and ``..``."""

    path: str

    def __str__(self) -> str:
        return "file://" + quote(self.path)


Source = HubSource | S3Source | DirectorySource


def _meant(text: str) -> str:
    """A guess at what was meant by an invalid address, as the end of a message; "" where there is none. Only harmless
    text is repeated: there may be a password in it."""
    if _BARE_REPO.fullmatch(text):
        return f"; did you mean hf://{text}?"
    if text.startswith(("s3:", "file:")) and "://" not in text:
        return "; after the colon come two slashes"
    if colon := _with_colon(text):
        return colon
    if text.startswith(("/", "./", "../", "~")):
        return "; did you mean a directory? Write file:// and its absolute path"
    return ""


def _with_colon(text: str) -> str:
    """Make the same guess for repo:revision."""
    found = _COLON_REVISION.fullmatch(text)
    if found is None:
        return ""
    if "/" in found[1] or _USUAL_REVISION.fullmatch(found[2]):
        return f"; did you mean hf://{found[1]}@{found[2]}?"
    return "; a revision follows @ and not a colon"  # user:password looks the same


def parse_source(text: str) -> Source:
    """The source that ``text`` names. Raises InvalidSource saying what is wrong and what would be right."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise InvalidSource(f"a source needs a scheme, or is a hub's org/repo: {_EXAMPLES}{_meant(text)}")
    if "\0" in text or "\n" in text:
        raise InvalidSource("a source may not hold control characters")
    if scheme == "hf":
        return _parse_hub(rest)
    if scheme == "s3":
        return _parse_s3(rest)
    if scheme == "file":
        return _parse_directory(rest)
    if scheme.lower() in ("hf", "s3", "file"):
        raise InvalidSource(f"unknown scheme {scheme!r}: write it in small letters, {scheme.lower()}://")
    raise InvalidSource(f"unknown scheme {scheme[:40]!r}: {_EXAMPLES}{_meant(text)}")


def _parse_hub(rest: str) -> HubSource:
    repo, at, revision = rest.partition("@")
    parts = repo.split("/")
    if not 1 <= len(parts) <= 2 or not all(_REPO_PART.match(part) and ".." not in part for part in parts):
        hint = " (choose files of a repository by include/exclude globs)" if len(parts) > 2 else ""
        raise InvalidSource(
            f"not a hub repository: write hf://org/repo or hf://org/repo@revision{hint}{_with_colon(rest)}"
        )
    if at and (not _REVISION.match(revision) or ".." in revision or revision.startswith("/")):
        raise InvalidSource(f"hf://{repo}@…: the revision must be a branch, a tag, refs/pr/N or a commit")
    return HubSource(repo, revision or "main") if at else HubSource(repo)


def _parse_s3(rest: str) -> S3Source:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.match(bucket):
        raise InvalidSource(
            "not an S3 bucket: write s3://bucket/prefix, with the credentials in an AWS profile (3 to 63 letters, "
            "digits, '.', '-' and '_' name a bucket)"
        )
    prefix = prefix.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise InvalidSource(f"s3://{bucket}/…: the prefix holds an empty, '.' or '..' component")
    return S3Source(bucket, prefix)


def _parse_directory(rest: str) -> DirectorySource:
    path = unquote(rest, errors="surrogateescape")
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    if not path.startswith("/") or "\0" in path:
        raise InvalidSource("a directory needs an absolute path with three slashes: file:///data/model")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidSource("a directory's path may not hold '..'")
    return DirectorySource("/" + "/".join(parts))
