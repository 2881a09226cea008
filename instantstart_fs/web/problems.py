"""Says what to run about a pipeline's error, for the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from instantstart_fs.core.status import PipelineStatus

SHOWN = 5
COMMANDS = {
    "access-refused": "instantstart verify {} --access",
    "credentials-unusable": "instantstart verify {} --access",
    "origin-not-found": "instantstart verify {} --access",
    "origin-hidden": "instantstart verify {} --access",
    "origin-changed": "instantstart update {}",
    "origin-unavailable": "instantstart doctor",
    "origin-throttled": "instantstart status {}",
    "digest-mismatch": "instantstart verify {}",
    "store-full": "instantstart doctor",
    "store-read-only": "instantstart doctor",
    "store-damaged": "instantstart doctor",
    "variant-not-chosen": "instantstart status {}",
}
"""Error code → the command to run. None of them changes anything but ``update`` and ``verify``, which their errors call
for."""


class Problem(msgspec.Struct, frozen=True):
    """An error as the page shows it. ``command`` is to be run on the node."""

    pipeline: str
    text: str
    command: str
    since: str


def problems(statuses: Sequence[PipelineStatus], *, details: bool) -> tuple[tuple[Problem, ...], int]:
    """Return the first SHOWN pipelines that have an error, and how many have one."""
    found = [status for status in statuses if status.state == "error" and status.error is not None]
    return tuple(one for status in found[:SHOWN] if (one := problem(status, details=details))), len(found)


def problem(status: PipelineStatus, *, details: bool) -> Problem | None:
    """Return the pipeline's last error. Messages name sources, so they need ``details``."""
    error = status.error
    if error is None:
        return None
    text = f"{error.code}: {error.message}" if details else error.code
    command = COMMANDS.get(error.code, "instantstart status {}").format(status.pipeline)
    return Problem(status.pipeline, text, command, error.since)
