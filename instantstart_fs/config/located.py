"""Reports problems of a configuration with their place: FILE: KEY: reason. It does not know what the keys mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from instantstart_fs.core.humanize import did_you_mean
from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.urls import s3_url_problem, url_problem
from instantstart_fs.errors import ConfigError, UsageError

_V = TypeVar("_V")
_R = TypeVar("_R")
_T = TypeVar("_T")


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A TOML table; unknown keys are errors."""


_VALIDATION = late(r"(?P<reason>.*?)(?: - at `(?:key in )?\$(?P<key>.*)`)?\Z", re.S)
_UNKNOWN = late(r"Object contains unknown field `(?P<field>.*)`\Z", re.S)


def convert(data: Any, kind: type[_T], path: str, prefix: str = "") -> _T:
    """``data`` as ``kind``; msgspec's messages become "FILE: KEY: reason"."""
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        match = _VALIDATION.match(str(error))
        reason, key = (match["reason"], (match["key"] or "").lstrip(".")) if match else (str(error), "")
        unknown = _UNKNOWN.match(reason)
        if unknown:
            field = unknown["field"]
            key, reason = f"{key}.{field}".lstrip("."), f"unknown key{did_you_mean(field, _keys(kind))}"
        key = f"{prefix}{key}".rstrip(".")
        raise ConfigError(f"{path}: {key}: {reason}" if key else f"{path}: {reason}") from error


def _keys(kind: type[Any]) -> list[str]:
    """The names of all keys of ``kind`` and of the tables within."""
    _, parts = msgspec.json.schema_components([kind])
    return sorted({key for part in parts.values() for key in part.get("properties", {})})


class At:
    """Raises ConfigErrors that name the place: a key in ``file`` (None: in no file, but an option or a default)."""

    def __init__(self, file: str | None) -> None:
        self.where = file or "configuration"

    def fail(self, key: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: {reason}" if key else f"{self.where}: {reason}")

    def require(self, holds: bool, key: str, reason: str) -> None:
        if not holds:
            raise self.fail(key, reason)

    def path(self, key: str, value: str) -> str:
        expanded = os.path.expanduser(value)
        self.require("\0" not in value, key, "a path cannot hold a NUL")
        self.require(os.path.isabs(expanded), key, f"{value!r} is not an absolute path")
        return os.path.normpath(expanded)

    def secret_file(self, key: str, value: str | None) -> str | None:
        """Return the path of a secret, unread: warm pipelines start with no credentials at hand. `doctor`, and the
        first request to the origin, say what is wrong with it."""
        return None if value is None else self.path(key, value)

    def url(self, key: str, value: str | None) -> None:
        problem = url_problem(value) if value is not None else None
        self.require(problem is None, key, problem or "")

    def s3_url(self, key: str, value: str | None) -> None:
        problem = s3_url_problem(value) if value is not None else None
        self.require(problem is None, key, problem or "")

    def parsed(self, key: str, parse: Callable[[_V], _R], value: _V) -> _R:
        """Return ``parse(value)``. Its UsageError is raised with the place."""
        try:
            return parse(value)
        except UsageError as error:
            raise self.fail(key, error.message) from error
