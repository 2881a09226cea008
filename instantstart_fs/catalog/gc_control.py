"""Keeps Python's garbage collector from walking over large generations.

The objects of 100,000 files are made in a second and stay for hours. A full collection walks over all of them: for
35 ms nobody is served, and it happens several times while they are made. So the collector is paused meanwhile, and the
new objects are frozen (gc.freeze). Generation.end therefore has to break a generation's reference cycles itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = 10_000
"""Files: a walk over those of a smaller generation takes less than 4 ms."""

_mutex = threading.Lock()
_making = 0
_was_on = True


@contextmanager
def gc_paused(files: int) -> Iterator[None]:
    """Pause the collector while objects of so many files are made, in any thread."""
    global _making, _was_on
    if files < LARGE:
        yield
        return
    with _mutex:
        if not _making:
            _was_on = gc.isenabled()
            gc.disable()
        _making += 1
    try:
        yield
    finally:
        with _mutex:
            gc.freeze()
            _making -= 1
            if not _making and _was_on:
                gc.enable()
