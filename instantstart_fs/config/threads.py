"""Makes blocking calls work where no thread can be started (a limit of processes or of memory).

``trio.to_thread`` starts threads as it needs them. If the kernel refuses one, the caller fails, and one such failure
can end the daemon. So a few threads are started early and take over: calls then are slower, but they do not fail.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import outcome
import trio

log = logging.getLogger(__name__)

SPARE = 4
"""Several, since some of what runs in threads takes a while: a filesystem that hangs, a server that does not answer."""
TELL_SECONDS = 60.0

_Job = tuple[Callable[[], Any], Callable[[outcome.Outcome[Any]], object]]
_Start = Callable[..., None]


class _Spare:
    def __init__(self, start: _Start) -> None:
        self._start = start
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._told_at = 0.0
        for number in range(SPARE):
            threading.Thread(target=self._work, name=f"spare-{number}", daemon=True).start()

    def start(
        self, fn: Callable[[], Any], deliver: Callable[[outcome.Outcome[Any]], object], name: str | None = None
    ) -> None:
        """Replace trio.lowlevel.start_thread_soon: falls back to the spare threads."""
        try:
            self._start(fn, deliver, name)
        except RuntimeError as error:  # "can't start new thread": CPython has no class of its own for it
            now = time.monotonic()
            if now >= self._told_at + TELL_SECONDS:
                self._told_at = now
                log.warning("%s: the work goes on in %d threads; raise TasksMax= (pids.max)", error, SPARE)
            self._jobs.put((fn, deliver))

    def _work(self) -> None:
        while True:
            fn, deliver = self._jobs.get()
            found = outcome.capture(fn)
            try:
                deliver(found)
            except Exception:
                log.exception("a result could not be delivered")
            del fn, deliver, found


def keep_spare_threads() -> None:
    """Start the spare threads. Call it once, before trio runs. Raises RuntimeError if they cannot be started."""
    module: Any = trio._threads  # it offers no hook
    if not isinstance(getattr(module.start_thread_soon, "__self__", None), _Spare):
        module.start_thread_soon = _Spare(module.start_thread_soon).start
