"""Understands what people paste where a source is asked for, and says it as a source address. Pure.

    Qwen/Qwen3-8B, hf:Qwen/Qwen3-8B                      hf://Qwen/Qwen3-8B
    https://huggingface.co/Qwen/Qwen3-8B/tree/main       hf://Qwen/Qwen3-8B@main      (hf.co, with and without https)
    …/blob/main/q4.gguf, …/resolve/main/q4.gguf          hf://…@main, only q4.gguf    (also hf://org/repo/q4.gguf)
    https://bucket.s3.eu-west-1.amazonaws.com/a/b        s3://bucket/a/b              (path style, console, ARN, s3a://)
    /data/model, ~/model, ./model                        file:///data/model

What can mean only one thing is translated. What cannot be a model's source is refused with the reason. Messages never
repeat what may hold a password or a signature.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

import msgspec

from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.source import parse_source
from instantstart_fs.errors import InvalidSource

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = rf"{_PART}/{_PART}"
_BARE = late(rf"{_REPO}(?:@[A-Za-z0-9._/+-]{{1,255}})?")
_SCHEME = late(r"(hf|s3|s3a|s3n|file|https?)://", re.IGNORECASE)
_SHORT = late(rf"hf:/?(?=[^/])(?={_PART})", re.IGNORECASE)
_HUB_HOST = late(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)(?:/|\Z)", re.IGNORECASE)
_PAGES = ("spaces", "api", "docs", "collections", "papers", "blog", "models", "organizations", "settings")
_REVISION_FIRST = late(r"(refs/(?:pr/[0-9]+|convert/[A-Za-z0-9._-]+)|[^/]+)(?:/(.*))?", re.DOTALL)
_FILE = late(r".*\.(?:gguf|safetensors|bin|pt|pth|onnx|json|txt|model)", re.IGNORECASE | re.DOTALL)
_SHARD = late(r"(.*)-[0-9]{5}(-of-[0-9]{5}\.gguf)", re.DOTALL)
_HARMLESS = late(r"[A-Za-z0-9._/ +=-]*")
_AWS = r"(?:dualstack\.)?(?:[a-z0-9-]+\.)?amazonaws\.com(?:\.cn)?"
_S3_HOSTED = late(rf"([a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])\.s3[.-]{_AWS}", re.IGNORECASE)
_S3_PATH = late(rf"s3[.-]{_AWS}", re.IGNORECASE)
_CONSOLE = late(r"(?:[a-z0-9-]+\.)?console\.(?:aws\.amazon\.com|amazonaws\.cn)", re.IGNORECASE)
_ARN = late(r"arn:aws[a-z-]*:s3:::(.+)", re.IGNORECASE)


class Pasted(msgspec.Struct, frozen=True):
    """A source as it was understood. ``source``: an address that ``parse_source`` takes. ``include``: globs of the
    files that were meant; () = all."""

    source: str
    include: tuple[str, ...] = ()


def understand(text: str, *, home: str | None = None, directory: str | None = None) -> Pasted:
    """Return what ``text`` means. ``home``: for ``~``; ``directory``: for paths that begin with a dot (None: refused).

    Raises InvalidSource with the reason, and with what is right where that can be told.
    """
    text = text.strip()
    found = _understood(text, home, directory)
    parse_source(found.source)
    return found


def _understood(text: str, home: str | None, directory: str | None) -> Pasted:
    if _HUB_HOST.match(text):
        return _hub_page(text)
    if text.lower().startswith("datasets/"):
        raise _dataset()
    if _BARE.fullmatch(text) and ".." not in text and not text.startswith("."):
        return _hub(text)
    if (short := _SHORT.match(text)) is not None:
        return _hub(text[short.end() :])
    if text.startswith(("/", "~", "./", "../")) or text in (".", ".."):
        return _path(text, home, directory)
    if (arn := _ARN.fullmatch(text)) is not None:
        return Pasted(f"s3://{arn[1].removesuffix('/*').rstrip('*')}")
    if (scheme := _SCHEME.match(text)) is None:
        return Pasted(text)
    rest = text[scheme.end() :]
    match scheme[1].lower():
        case "hf":
            return _hub(rest)
        case "s3" | "s3a" | "s3n":
            return Pasted(f"s3://{rest}")
        case "file":
            return Pasted(f"file://{rest}")
        case _:
            return _web(text)


def _dataset() -> InvalidSource:
    return InvalidSource(
        "this is a dataset: a pipeline is made of a model's repository, hf://org/repo; fetch datasets with "
        "`hf download --repo-type dataset`"
    )


def _hub(rest: str) -> Pasted:
    """Return what follows ``hf://``: a repository, its revision, and perhaps one of its files."""
    if rest.lower().startswith("datasets/"):
        raise _dataset()
    repo, at, tail = rest.partition("@")
    parts = repo.split("/")
    if len(parts) > 2 and not at and _FILE.fullmatch(rest):
        return Pasted(f"hf://{'/'.join(parts[:2])}", _only("/".join(parts[2:])))
    if at and "/" in tail and _FILE.fullmatch(tail):  # revisions hold slashes too, but do not end like files
        revision = _REVISION_FIRST.fullmatch(tail)
        if revision is not None and revision[2]:
            return Pasted(f"hf://{repo}@{revision[1]}", _only(revision[2]))
    return Pasted(f"hf://{rest}")


def _only(path: str) -> tuple[str, ...]:
    """The globs of one file. A part of a split GGUF stands for all of its parts: none is of use alone."""
    if ".." in path.split("/") or "//" in path or path.startswith("/"):
        raise InvalidSource("the file's path holds an empty or a '..' component")
    literal = re.sub(r"([*?[])", r"[\1]", path)
    shard = _SHARD.fullmatch(literal)
    return (f"{shard[1]}-?????{shard[2]}",) if shard is not None else (literal,)


def _hub_page(text: str) -> Pasted:
    address = text if "://" in text else f"https://{text}"
    parts = _split(address)
    if "@" in parts.netloc:
        raise InvalidSource("an address of the hub with a user or a token in it: give the token by --token-file")
    path = parts.path.strip("/").split("/")
    if path[0].lower() == "datasets":
        raise _dataset()
    if path[0].lower() in _PAGES or len(path) < 2:
        raise InvalidSource(
            "a pipeline is made of a model's repository, not of a dataset, a space or a page of the hub: "
            "write hf://org/repo"
        )
    repo, kind, rest = "/".join(path[:2]), path[2] if len(path) > 2 else "", "/".join(path[3:])
    if kind not in ("tree", "blob", "resolve", "raw") or not rest:
        if len(path) > 2 and kind not in ("tree", "discussions", "commits", "blob"):
            return _hub("/".join(path))  # as `hf.co/org/repo/file.gguf`, or refused
        return Pasted(f"hf://{unquote(repo)}")
    found = _REVISION_FIRST.fullmatch(rest)
    revision, below = (unquote(found[1]), unquote(found[2] or "")) if found is not None else ("main", "")
    source = f"hf://{unquote(repo)}@{revision}"
    if not below:
        return Pasted(source)
    return Pasted(source, _only(below) if kind != "tree" else (f"{_only(below)[0]}/",))


def _web(text: str) -> Pasted:
    """An http address that is no hub's: the ways in which S3's are written."""
    parts = _split(text)
    host = parts.hostname or ""
    if _CONSOLE.fullmatch(host):
        return _console(parts.path, parts.query)
    key = unquote(parts.path)
    if (hosted := _S3_HOSTED.fullmatch(host)) is not None:
        meant = f"s3://{hosted[1]}{key}"
    elif _S3_PATH.fullmatch(host) and key.strip("/"):
        meant = f"s3:/{key}"
    else:
        return Pasted(text)  # parse_source refuses it and gives examples
    if parts.query or "@" in parts.netloc:
        right = f"write {meant}" if _HARMLESS.fullmatch(key) else "write s3://bucket/prefix"
        raise InvalidSource(
            f"a link with a query (a signature or a version) ends or pins what S3's own credentials should: {right}, "
            "with an AWS profile or --anonymous"
        )
    return Pasted(meant)


def _console(path: str, query: str) -> Pasted:
    found = re.fullmatch(r"/s3/(?:buckets|object)/([^/]+)/?(.*)", path, re.DOTALL)
    if found is None:
        raise InvalidSource("this page of the AWS console shows no bucket: write s3://bucket/prefix")
    wanted = parse_qs(query).get("prefix") or [unquote(found[2])]
    return Pasted(f"s3://{found[1]}/{wanted[0]}" if wanted[0] else f"s3://{found[1]}")


def _path(text: str, home: str | None, directory: str | None) -> Pasted:
    if text.startswith("~"):
        if home is None or not home.startswith("/") or text[1:2] not in ("", "/"):
            raise InvalidSource("only your own ~ is understood: write file:// and the directory's absolute path")
        path = home.rstrip("/") + text[1:]
    elif text.startswith("/"):
        path = text
    elif directory is None:
        raise InvalidSource("did you mean a directory? Write file:// and its absolute path")
    else:
        path = posixpath.normpath(f"{directory}/{text}")
    folder, _, name = path.rpartition("/")
    if name.lower().endswith(".gguf"):
        return Pasted("file://" + quote(folder or "/", errors="surrogateescape"), _only(name))
    return Pasted("file://" + quote(path, errors="surrogateescape"))


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        raise InvalidSource("not an address: write hf://org/repo, s3://bucket/prefix or file:///directory") from None
