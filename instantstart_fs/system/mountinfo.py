"""Reads this process's mount table (/proc/self/mountinfo, proc(5)). It mounts nothing.

The table never asks a mount, so it answers even while a mount's daemon does not.
"""

from __future__ import annotations

import os
import re
import select
from typing import Final

import msgspec

TABLE_PAUSE: Final = 0.2
"""Seconds between two looks at a mount table that changes all the time."""


class Mount(msgspec.Struct, frozen=True):
    """A line of mountinfo. ``device`` is "major:minor", ``options`` the mount's and the superblock's, with commas;
    ``root``: the directory of its filesystem that is shown there."""

    mount_id: int
    device: str
    path: str
    filesystem: str
    source: str
    options: str
    root: str = "/"


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Lines as proc(5) describes them; later lines are mounted over earlier ones of the same path."""
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 6:
            continue
        filesystem, source, super_options = [*after.split(" "), "", ""][:3]
        found.append(
            Mount(
                mount_id=int(fields[0]),
                device=fields[2],
                path=_unescape(fields[4]),
                filesystem=filesystem,
                source=_unescape(source),
                options=f"{fields[5]},{super_options}",
                root=_unescape(fields[3]),
            )
        )
    return tuple(found)


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal."""
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field.encode("utf-8", "surrogateescape"))
    return raw.decode("utf-8", "surrogateescape")


def mounts() -> tuple[Mount, ...]:
    """Return all mounts of this process's namespace, in the kernel's order."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return parse_mountinfo(lines.read())


def find_mount(path: str) -> Mount | None:
    """The topmost mount whose mountpoint is exactly ``path`` (absolute, without symlinks)."""
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def is_mounted(mount: Mount) -> bool:
    """Whether that very mount is still there, at whatever path and under whatever else."""
    with open("/proc/self/mountinfo", "rb") as table:
        # Not parsed: a host of containers has thousands of lines, and changes them all the time.
        return re.search(rb"^%d \d+ %s " % (mount.mount_id, mount.device.encode()), table.read(), re.M) is not None


def wait_unmounted(mount: Mount, end: int) -> bool:
    """Block until that very mount has left the mount table (True), or nobody holds the other end of the pipe ``end``,
    which is closed here (False). Where its connection lives on, since files of it are open, nothing else tells.

    The kernel tells of changes; nothing is asked again and again. Raises OSError.
    """
    try:
        with open("/proc/self/mountinfo", "rb", buffering=0) as table:
            changes, ending = select.poll(), select.poll()
            changes.register(table, select.POLLPRI | select.POLLERR)
            for poll in (changes, ending):
                poll.register(end, 0)  # POLLHUP
            while True:
                # An older kernel may skip a line while others go: what is missing is looked for twice.
                if not is_mounted(mount) and not is_mounted(mount):
                    return True
                changes.poll()
                if ending.poll(TABLE_PAUSE * 1000):
                    return False
    finally:
        os.close(end)
