"""Which pipeline a path belongs to, as an engine sees it: from the table of mounts, in a container too."""

from __future__ import annotations

import os
from collections.abc import Callable


def pipeline_of(path: str, mountinfo: Callable[[], str] | None = None) -> tuple[str, str] | None:
    """(pipeline, path within it) of a path on an instantstart mount, in a container's bind too; None elsewhere."""
    real = os.path.realpath(path)
    text = mountinfo() if mountinfo else _read_mountinfo()
    best: tuple[int, str] | None = None
    for line in text.splitlines():
        fields, _, kind = line.partition(" - ")
        if not kind.startswith("fuse.instantstart "):
            continue
        root, point = (_unescaped(word) for word in fields.split()[3:5])
        inside = os.path.relpath(real, point)
        if inside.split(os.sep)[0] == ".." or (best and len(point) < best[0]):
            continue
        best = len(point), os.path.normpath(os.path.join(root, inside)).strip("/")
    if best is None or best[1] in ("", "."):
        return None
    pipeline, _, rest = best[1].partition("/")
    return pipeline, rest


def _read_mountinfo() -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _unescaped(word: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(octal, character)
    return word
