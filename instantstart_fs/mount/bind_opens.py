"""Collects what fanotify tells of bound files: which of them were opened and closed. The Binder acts on it.

The kernel merges the events of one process that nobody has read yet, so they say that a file was opened or closed, and
never how often.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from instantstart_fs.mount import kernel
from instantstart_fs.serving.bindings import BindableFile

log = logging.getLogger(__name__)


class BindEvents:
    """A fanotify group and the files marked in it. ``fd``: the group, -1 until ``start``."""

    def __init__(self) -> None:
        self.fd = -1
        self._files: dict[tuple[int, int], BindableFile] = {}
        """(st_dev, st_ino) → the file that is bound."""
        self._seen: list[tuple[BindableFile, kernel.FanEvent]] = []
        self._early: list[kernel.FanEvent] | None = None
        """Events of inodes that are not in ``_files`` (yet). They are kept only while files are being bound."""
        self._failing = False

    def start(self) -> None:
        """Begin to receive the kernel's events. Raises OSError."""
        self.fd = kernel.fanotify()

    def close(self) -> None:
        os.close(self.fd)

    def watch(self, inode: tuple[int, int], file: BindableFile) -> None:
        """Count the events of this inode, which is marked already, as those of ``file``."""
        self._files[inode] = file

    def unwatch(self, inode: tuple[int, int], store_path: str | None = None) -> None:
        """Forget the inode. ``store_path``: where its mark is to be removed, too."""
        self._files.pop(inode, None)
        if store_path is not None:
            with contextlib.suppress(OSError):  # the kernel ends the mark of a deleted file itself
                kernel.fan_mark(self.fd, store_path, add=False)

    @contextlib.contextmanager
    def keeping_early(self) -> Iterator[None]:
        """Keep events of inodes that are only named by ``watch`` before the end: the first file of a batch is bound,
        and may be opened, while the last is not bound yet."""
        self._early = []
        try:
            yield
        finally:
            early, self._early = self._early, None
            self._sort(early)

    def read(self) -> bool:
        """Take what the kernel has to tell. False: it could not tell of all; what is open is found by the lease then,
        when it is to be taken away."""
        events: list[kernel.FanEvent] | None = None
        while events is None or len(events) == kernel.FAN_MOST:
            try:
                events = kernel.fan_events(self.fd)
            except OSError as error:
                if not self._failing:
                    log.error("opens of bound files are not seen, trying on: %s", error.strerror)
                self._failing = True
                return False
            self._sort(events)
        self._failing = False
        return True

    def _sort(self, events: list[kernel.FanEvent]) -> None:
        for event in events:
            file = self._files.get(event.inode)
            if file is not None:
                self._seen.append((file, event))
            elif self._early is not None:
                self._early.append(event)

    @property
    def next_pipeline(self) -> str | None:
        """The pipeline of the oldest event that was not taken."""
        return self._seen[0][0].pipeline if self._seen else None

    def take(self, pipeline: str) -> list[tuple[BindableFile, kernel.FanEvent]]:
        """Return the events of a file, each once."""
        taken = [(file, event) for file, event in self._seen if file.pipeline == pipeline]
        self._seen = [(file, event) for file, event in self._seen if file.pipeline != pipeline]
        return taken
