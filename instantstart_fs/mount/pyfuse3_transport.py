"""Serves a mount by pyfuse3: the transport for machines without FUSE passthrough.

It also takes pyfuse3's own edges off (``_steadied_loop``): a request that is withdrawn between poll and read must not
block the whole event loop, and no exception from inside pyfuse3 may end the mount. pyfuse3 keeps its session in module
globals, so a process can serve one such mount at a time.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping

import pyfuse3
import trio

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel
from instantstart_fs.mount.operations import Operations
from instantstart_fs.mount.transport import MountSettings
from instantstart_fs.vfs import Invalidation, Vfs

log = logging.getLogger(__name__)


class Pyfuse3Transport:
    """A ``Transport``. See the module."""

    name = "pyfuse3"

    def __init__(self, view: Vfs, settings: MountSettings) -> None:
        self._operations = Operations(view)
        self._settings = settings
        self._open = False

    @property
    def requests(self) -> Mapping[str, int]:
        return self._operations.requests

    def mount(self, path: str, *, fsname: str, subtype: str, allow_other: bool) -> None:
        options = {"ro", "nosuid", "nodev", "default_permissions", f"fsname={fsname}", f"subtype={subtype}"}
        if allow_other:
            options.add("allow_other")
        before = kernel.fuse_descriptors()
        try:
            pyfuse3.init(self._operations, path, options)
        except RuntimeError as error:
            if "fuse_session_mount" in str(error):
                pyfuse3.close(unmount=False)  # libfuse holds a session; there is no mount
            raise MountFailed(f"cannot mount at {path}: {error} ({why_not_mounted()})") from error
        self._open = True
        for descriptor in kernel.fuse_descriptors() - before:
            # See _steadied_loop.
            os.set_blocking(descriptor, False)

    async def main(self) -> None:
        _steady_pyfuse3()
        await pyfuse3.main(min_tasks=self._settings.idle_tasks, max_tasks=self._settings.max_tasks)

    def send(self, invalidation: Invalidation) -> None:
        if invalidation.name is not None:
            pyfuse3.invalidate_entry(invalidation.parent, invalidation.name.encode("utf-8", "surrogateescape"))
        if invalidation.nodeid is not None:
            pyfuse3.invalidate_inode(invalidation.nodeid, attr_only=not invalidation.listing)

    def close(self) -> None:
        if self._open:
            self._open = False
            # It was unmounted before; libfuse would unmount by its path what somebody else may have mounted there.
            pyfuse3.close(unmount=False)


_session_loop = pyfuse3._session_loop  # type: ignore[attr-defined]  # private: see _steadied_loop


async def _steadied_loop(nursery: trio.Nursery, min_tasks: int, max_tasks: int) -> None:
    """pyfuse3's loop of one task, so that nothing but the end of the mount ends it.

    pyfuse3 polls /dev/fuse, then reads it. When the reader that made the request is killed in between, the request is
    gone and a blocking read would stop the whole event loop until the next one comes. So the descriptor does not block,
    and the EAGAIN that pyfuse3 would die of sends the task back to its poll. Such a turn loses libfuse's receive buffer
    (1 MiB of address space, of which one request's pages were touched); it is rarer than a killed process.
    """
    while True:
        try:
            await _session_loop(nursery, min_tasks, max_tasks)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            log.debug("a request was withdrawn before it was read")
        except trio.Cancelled:
            raise
        except Exception:
            log.exception("a request ended in an exception outside its handler")
        await trio.lowlevel.checkpoint()


def _steady_pyfuse3() -> None:
    pyfuse3._session_loop = _steadied_loop  # type: ignore[attr-defined]  # main() and the loop itself look it up here


class _Interrupted(logging.Filter):
    """Drops pyfuse3's error line for each reply to a reader that was killed meanwhile: that is no error."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not ("fuse_reply_" in str(record.msg) and os.strerror(errno.ENOENT) in record.getMessage())


logging.getLogger("pyfuse3").addFilter(_Interrupted())


def why_not_mounted() -> str:
    """Return what keeps this user from mounting, and what to do about it, as far as that shows."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse: modprobe fuse; a container needs --device /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not open /dev/fuse: as root, chmod 666 /dev/fuse, as udev has it"
    return "may this user mount? `instantstart doctor` looks"
