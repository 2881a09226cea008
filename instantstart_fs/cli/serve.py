"""Runs ``instantstart serve``: this process becomes the daemon.

Readers wait while a daemon restarts. So the usual arguments are parsed here, without importing typer and the other
commands (40 ms). Anything unusual (--help, a mistake) is left to app.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence

from instantstart_fs.errors import UsageError

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import NoReturn

OPTIONS = {
    f"--{name.replace('_', '-')}": name for name in ("config", "mount", "store", "socket", "log_level", "log_format")
}
"""All that app.py's ``serve`` takes, each with a value: tests/unit/test_cli.py compares."""
LOG_FORMAT = "INSTANTSTART_LOG_FORMAT"


def parse(arguments: Sequence[str]) -> dict[str, str] | None:
    """``serve``'s parameters from a command that is written as units and scripts write it; None: it is another one."""
    if arguments[:1] != ["serve"]:
        return None
    found: dict[str, str] = {}
    words = list(arguments[:0:-1])
    while words:
        name, equals, value = words.pop().partition("=")
        if name not in OPTIONS or not (equals or words):
            return None
        found[OPTIONS[name]] = value = value if equals else words.pop()
        if value.startswith("-"):
            return None
    return found


def run(
    config: str | None = None,
    mount: str | None = None,
    store: str | None = None,
    socket: str | None = None,
    log_level: str = "info",
    log_format: str = "",
) -> NoReturn:
    """Be the daemon until it is stopped, and end the process. Raises UsageError and what ``daemon.run`` raises."""
    # Imports leave nothing for the collector, which would look through all they made again and again (8 of 160 ms).
    gc.disable()
    from instantstart_fs import daemon
    from instantstart_fs.config import load_config

    gc.freeze()
    gc.enable()
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level: {log_level!r} is none of debug, info, warning, error")
    log_format = log_format or os.environ.get(LOG_FORMAT) or "console"
    if log_format not in ("console", "json"):
        raise UsageError(f"--log-format: {log_format!r} is neither console nor json")
    daemon.run(
        load_config(config, mount=mount, store=store),
        socket_path=socket,
        log_level=log_level,
        log_format="json" if log_format == "json" else "console",
    )
    # All is flushed, closed and given back. The interpreter would take 50 ms to take itself apart, and the next daemon
    # is started when this process has ended.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None: it was closed when this process began
            stream.flush()
    os._exit(0)
