"""Tells how much memory there is to stage into: /proc/meminfo and every memory cgroup around this process, v1 and v2.

Staging into the page cache and the prefetch helper both ask here. Only files are read; ``root`` replaces / in tests.
What cannot be read is taken as no limit.
"""

from __future__ import annotations

import os

import msgspec

from instantstart_fs.system.mountinfo import parse_mountinfo

_UNLIMITED = 1 << 60
"""Bytes from which a limit counts as none: version 1 of cgroups writes a number near 2^63. Also the answer where
nothing can be read."""


class Memory(msgspec.Struct, frozen=True):
    """Free memory, in bytes. ``available``: MemAvailable. ``cgroups_left``: for each enclosing memory cgroup with a
    limit, how much it may still take without reclaiming memory in use: its limit less its usage. Inactive page cache
    does not count as usage; on request, no page cache does."""

    available: int
    cgroups_left: tuple[int, ...] = ()


def read_memory(root: str = "/", *, active: bool = False) -> Memory:
    """Read the memory state now: a few small reads of /proc and /sys, without a wait. ``active``: page cache that is in
    use counts as free in the cgroups too, as it does in MemAvailable."""
    available = _UNLIMITED
    names = ("inactive_file", "active_file") if active else ("inactive_file",)
    for line in _text(root, "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    left = []
    for version, top, path in _memory_cgroups(root):
        while True:
            found = (_left_v2 if version == 2 else _left_v1)(root, os.path.join(top, path) if path else top, names)
            if found is not None:
                left.append(found)
            if not path:
                break
            path = path.rpartition("/")[0]
    return Memory(available, tuple(left))


def _memory_cgroups(root: str) -> list[tuple[int, str, str]]:
    """Return (version, mountpoint, path below it) of this process's cgroup in each hierarchy that may limit memory."""
    paths: dict[int, str] = {}
    for line in _text(root, "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    found = []
    for mount in parse_mountinfo(_text(root, "proc/self/mountinfo")):
        version = {"cgroup": 1, "cgroup2": 2}.get(mount.filesystem)
        if version is None or version not in paths or (version == 1 and "memory" not in mount.options.split(",")):
            continue
        # In a container the hierarchy is mounted from somewhere below its root; the path is told from its root or, in
        # a cgroup namespace, from the namespace's. A path that leads out of what is mounted means its top.
        origin, path = mount.root.rstrip("/"), paths[version]
        if path == origin or path.startswith(origin + "/"):
            path = path[len(origin) :]
        path = path.strip("/")
        if ".." in path.split("/") or not os.path.isdir(os.path.join(root, mount.path.lstrip("/"), path)):
            path = ""
        found.append((version, mount.path, path))
    return found


def _left_v1(root: str, directory: str, names: tuple[str, ...]) -> int | None:
    limit, usage = _number(root, directory, "memory.limit_in_bytes"), _number(root, directory, "memory.usage_in_bytes")
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    return max(0, limit - usage + _cached(root, directory, tuple(f"total_{name}" for name in names)))


def _left_v2(root: str, directory: str, names: tuple[str, ...]) -> int | None:
    limits = [_number(root, directory, name) for name in ("memory.max", "memory.high")]
    usage = _number(root, directory, "memory.current")
    limited = [limit for limit in limits if limit is not None]
    if not limited or usage is None:
        return None
    return max(0, min(limited) - usage + _cached(root, directory, names))


def _cached(root: str, directory: str, names: tuple[str, ...]) -> int:
    found = 0
    for line in _text(root, directory, "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key in names:
            found += int(value)
    return found


def _number(root: str, directory: str, name: str) -> int | None:
    text = _text(root, directory, name).strip()
    return int(text) if text.isdigit() else None


def _text(root: str, *names: str) -> str:
    try:
        with open(
            os.path.join(root, *(name.lstrip("/") for name in names)), encoding="utf-8", errors="replace"
        ) as file:
            return file.read()
    except OSError:
        return ""
