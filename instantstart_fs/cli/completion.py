"""Offers pipelines to the shell after TAB. Typer talks to the shells (bash, zsh, fish); this module asks the daemon.

A shell waits for the answer in the middle of a line. It comes soon or not at all, and never with an error message.
"""

from __future__ import annotations

import typer

from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError

DEADLINE = 0.5
"""Seconds to be accepted, and again to be answered."""


def pipelines(context: typer.Context, incomplete: str) -> list[str]:
    """Ids that begin so, of those that this user may ask for; none where no daemon answers in time."""
    given = context.params.get("socket")
    try:
        with Client(given if isinstance(given, str) else None, deadline=DEADLINE) as client:
            return client.names(incomplete, deadline=DEADLINE)
    except (InstantStartError, OSError, ValueError):
        return []


def verbs_and_pipelines(context: typer.Context, incomplete: str) -> list[str]:
    """Return the words that may follow `prefetch`."""
    return [verb for verb in ("status", "release") if verb.startswith(incomplete)] + pipelines(context, incomplete)


def held(incomplete: str) -> list[str]:
    """Ids that begin so, of those that this user holds in memory. No daemon is asked."""
    from instantstart_fs.prefetch.hold_protocol import held_pipelines

    try:
        return [pipeline for pipeline in held_pipelines() if pipeline.startswith(incomplete)]
    except InstantStartError:
        return []
