"""Facts learned about how engines start from a pipeline: files that they read though the rules leave them out, and
files that they never read. Pure values; catalog/loadset_learner.py keeps them.

Paths are those within the pipeline: they outlive an update of the source.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

UNTOUCHED_STARTS = 3
"""After so many starts in a row that did not open a file, it is shown as untouched."""
MOST_TRACKED = 1000
"""Weight files whose opens are counted; a pipeline with more is not watched in this way."""
MOST_WANTED = 10_000
"""Paths that one pipeline may learn."""


class Learned(msgspec.Struct, frozen=True, array_like=True):
    """The facts learned from engines. ``wanted``: paths that belong to the load set whatever the rules say. ``starts``:
    how many were seen. ``touched``: path → the number of the last start that opened it, of those after the start
    ``since``. ``order``: the weight files in the order in which the last start with several of them first opened
    each."""

    wanted: tuple[str, ...] = ()
    starts: int = 0
    touched: dict[str, int] = {}
    since: int = 0
    order: tuple[str, ...] = ()

    def wanting(self, paths: Iterable[str]) -> Learned:
        """A copy with these files as well, oldest first."""
        wanted = tuple(dict.fromkeys([*self.wanted, *paths]))[:MOST_WANTED]
        return self if wanted == self.wanted else msgspec.structs.replace(self, wanted=wanted)

    def without(self, paths: Collection[str]) -> Learned:
        return msgspec.structs.replace(self, wanted=tuple(path for path in self.wanted if path not in paths))

    def after_start(self, opened: Collection[str]) -> Learned:
        """A copy after one more start that opened these weight files."""
        number = self.starts + 1
        if 1 < len(opened) <= MOST_TRACKED:
            self = msgspec.structs.replace(self, order=tuple(opened))
        touched = {**self.touched, **dict.fromkeys(opened, number)}
        if len(touched) > MOST_TRACKED:
            return msgspec.structs.replace(self, starts=number, touched={}, since=number)
        return msgspec.structs.replace(self, starts=number, touched=touched)

    def after_update(self, paths: Collection[str]) -> Learned:
        """The pipeline has these files from now on. What is wanted stays so: a later revision may have it again."""
        touched = {path: at for path, at in self.touched.items() if path in paths}
        return msgspec.structs.replace(self, touched=touched, since=self.starts) if self.starts else self

    def untouched(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the weight files that none of the last UNTOUCHED_STARTS starts opened."""
        latest = self.starts - UNTOUCHED_STARTS
        if latest < 0:
            return ()
        return tuple(path for path in paths if self.touched.get(path, self.since) <= latest)
