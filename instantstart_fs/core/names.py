"""Validates the names that may reach a filesystem: everything from a user or an origin passes here first. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from instantstart_fs.errors import InvalidName

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
MAX_COMPONENT_BYTES = 255
"""NAME_MAX of ext4 and xfs."""
MAX_PATH_BYTES = 3072
"""Leaves space for the store's own prefix under PATH_MAX (4096)."""
MAX_DEPTH = 64


def validate_pipeline_id(value: str) -> str:
    """``value`` unchanged if it may name a pipeline: letters, digits, ``._-``, at most 128, not starting with a dot.

    Raises InvalidName otherwise. A leading dot is reserved for ``.warm``, ``.filling`` and ``.cold``.
    """
    if not _ID.match(value):
        raise InvalidName(
            f"{value!r} cannot be a pipeline id: use letters, digits, '.', '_' and '-' (at most 128), "
            "beginning with a letter or digit"
        )
    return value


def validate_model_name(value: str) -> str:
    """Check a model's name, as a pipeline id; the empty string is the one unnamed model. Raises InvalidName."""
    if value and not _ID.match(value):
        raise InvalidName(
            f"{value!r} cannot be a model name: use letters, digits, '.', '_' and '-' (at most 128), "
            "beginning with a letter or digit"
        )
    return value


def validate_origin_path(path: str) -> str:
    """``path`` unchanged if it is a plain relative POSIX path that stays below its root. Raises InvalidName."""
    problem = _path_problem(path)
    if problem:
        raise InvalidName(f"the origin names a file {path[:200]!r}, which {problem}; it is refused")
    return path


def _path_problem(path: str) -> str | None:
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL"
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if len(encoded) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    components = path.split("/")
    if len(components) > MAX_DEPTH:
        return f"is deeper than {MAX_DEPTH} directories"
    for component in components:
        if component == "":
            return "is absolute, or holds an empty component"
        if component in (".", ".."):
            return f"holds the component {component!r}"
        if len(component.encode("utf-8")) > MAX_COMPONENT_BYTES:
            return f"holds a component longer than {MAX_COMPONENT_BYTES} bytes"
    return None


def unservable(paths: Sequence[str]) -> dict[int, str]:
    """The paths of an origin that no filesystem can show beside the others, by position, and why ("holds a NUL", say).

    Where one is a file and another needs a directory of that name, the file gives way: what lies below it is more.
    """
    problems: dict[int, str] = {}
    files: dict[str, int] = {}
    for position, path in enumerate(paths):
        problem = _path_problem(path)
        if problem:
            problems[position] = problem
        else:
            files[path] = position
    below: set[str] = set()
    for path in files:
        parent, _, _ = path.rpartition("/")
        while parent and parent not in below:
            below.add(parent)
            parent, _, _ = parent.rpartition("/")
    problems.update((files[path], "is the name of a directory, too") for path in below & files.keys())
    return problems


def validate_origin_paths(paths: Iterable[str]) -> None:
    """Validate each path, and that no two collide: neither twice the same, nor a file where another has a directory.

    Raises InvalidName.
    """
    files: set[str] = set()
    for path in paths:
        validate_origin_path(path)
        if path in files:
            raise InvalidName(f"the origin names the file {path!r} twice; it is refused")
        files.add(path)
    for path in files:
        parent, _, _ = path.rpartition("/")
        while parent:
            if parent in files:
                raise InvalidName(f"the origin names {parent!r} both as a file and as a directory; it is refused")
            parent, _, _ = parent.rpartition("/")
