"""The protocol by which staging (mount/staging.py) is told of opens, releases and seals of weight files.

Plain calls on the trio thread that return at once. Only weight files of the load set are reported, never listings,
attributes, configuration or tokenizers.
"""

from __future__ import annotations

from typing import Protocol

from instantstart_fs.filler.target import FileKey


class OpenListener(Protocol):
    def opened(self, key: FileKey) -> None:
        """The first handle of an incarnation of that file."""
        ...

    def released(self, key: FileKey) -> None:
        """The file's last handle was closed. Called as often as ``opened``."""
        ...

    def sealed(self, key: FileKey) -> None:
        """Note that the whole file lies in the store from now on."""
        ...

    def retired(self, key: FileKey) -> None:
        """The incarnation that was there will find no new opens; its bytes may be deleted."""
        ...

    def rest(self, pipeline: str, resting: bool) -> None:
        """Pause or resume staging of that pipeline; calls nest."""
        ...


class NullListener:
    """The watcher of a library that is not watched."""

    def opened(self, key: FileKey) -> None:
        pass

    released = sealed = retired = opened

    def rest(self, pipeline: str, resting: bool) -> None:
        pass
