"""How many files a process may have open."""

from __future__ import annotations

import contextlib
import resource

NO_MORE = "this process may not open more files (ulimit -n)"


def raise_file_limit() -> None:
    """The soft limit to the hard one: the usual 1024 is too few for a descriptor of each file and chunk in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
