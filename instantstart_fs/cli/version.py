"""The version, as `--version` prints it. It imports nothing else."""

from __future__ import annotations

from instantstart_fs import __version__


def version_line() -> str:
    """Return what ``--version`` prints."""
    return f"instantstart {__version__}"
