"""Starts threads of the standard library. Imports neither trio nor anything else that takes time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from instantstart_fs.errors import OutOfResources


def start_thread(target: Callable[[], object], name: str | None = None) -> threading.Thread:
    """Start a daemon thread, and return it. Raises OutOfResources where a limit of pids allows none."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # "can't start new thread": CPython has no class of its own for it
        raise OutOfResources(f"{error}; raise TasksMax= (pids.max)") from None
    return thread
