"""Says which pipeline a path belongs to, as an engine sees it: by the mount table, in a container too."""

from __future__ import annotations

import os
from collections.abc import Callable

from instantstart_fs.system.mountinfo import mounts, parse_mountinfo


def pipeline_of(path: str, mountinfo: Callable[[], str] | None = None) -> tuple[str, str] | None:
    """Return (pipeline, path within it) of a path on an instantstart mount, in a container's bind too; None elsewhere.

    ``mountinfo``: gives the text of another mount table, for tests.
    """
    real = os.path.realpath(path)
    best: tuple[int, str] | None = None
    for mount in parse_mountinfo(mountinfo()) if mountinfo else mounts():
        if mount.filesystem != "fuse.instantstart":
            continue
        inside = os.path.relpath(real, mount.path)
        if inside.split(os.sep)[0] == ".." or (best and len(mount.path) < best[0]):
            continue
        best = len(mount.path), os.path.normpath(os.path.join(mount.root, inside)).strip("/")
    if best is None or best[1] in ("", "."):
        return None
    pipeline, _, rest = best[1].partition("/")
    return pipeline, rest
