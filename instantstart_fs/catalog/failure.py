"""The last error of a pipeline, as `status` shows it, and what lifts it."""

from __future__ import annotations

from typing import Protocol

from instantstart_fs.errors import InstantStartError


class FailedFile(Protocol):
    """The part of catalog.model.CachedFile that is used here. ``triple``: pipeline, generation, index."""

    @property
    def triple(self) -> tuple[str, int, int]: ...


class Failure:
    """The last error of a pipeline.

    ``final``: filling has stopped because of it. ``file``: the file that it is about. ``recalled``: it is from an
    earlier daemon, about the file of that index (-1: about none)."""

    __slots__ = ("error", "file", "final", "index", "recalled", "since_ns")

    def __init__(
        self,
        error: InstantStartError,
        since_ns: int,
        *,
        final: bool,
        file: FailedFile | None = None,
        index: int = -1,
        recalled: bool = False,
    ) -> None:
        self.error = error
        self.since_ns = since_ns
        self.final = final
        self.file = file
        self.index = index if file is None else file.triple[2]
        self.recalled = recalled

    def lifted_by(self, file: FailedFile) -> bool:
        """Whether new bytes of that file show that the error is over."""
        if self.recalled:
            return self.index in (-1, file.triple[2])
        return self.final and self.file is file
