"""What `instantstart run` was asked for, understood without typer: its imports take longer than a warm start may.

``plain`` takes every line that is right; whatever is not (--help, a mistake) goes the long way, by cli/app.py, which
knows the same options (a test compares).
"""

from __future__ import annotations

from collections.abc import Sequence

VALUES = {
    "--engine": "engine",
    "--ready-url": "ready_url",
    "--ready-log": "ready_log",
    "--ready-file": "ready_file",
    "--ready-timeout": "ready_timeout",
    "--probe": "probe",
    "--cache-dir": "cache_dir",
    "--report": "report",
    "--requested-at": "requested_at",
    "--socket": "socket",
}
LISTS = {"--cache": "caches"}
FLAGS = {
    "--no-restore": "no_restore",
    "--no-save": "no_save",
    "--no-stage": "no_stage",
    "--prefetch": "prefetch",
    "--quiet": "quiet",
    "-q": "quiet",
}


class Options:
    """See docs/COLDSTART.md. Strings as they were given, "" where they were not."""

    def __init__(self, pipeline: str, command: Sequence[str]) -> None:
        self.pipeline = pipeline
        self.command = list(command)
        self.engine = ""
        self.ready_url = ""
        self.ready_log = ""
        self.ready_file = ""
        self.ready_timeout = ""
        self.probe = ""
        self.cache_dir = ""
        self.report = ""
        self.requested_at = ""
        self.socket = ""
        self.caches: list[str] = []
        self.no_restore = False
        self.no_save = False
        self.no_stage = False
        self.prefetch = False
        self.quiet = False


def plain(arguments: Sequence[str]) -> Options | None:
    """The options of a `run` line (its first word included); None where it is not one that is surely right."""
    if arguments[:1] != ["run"]:
        return None
    found = Options("", [])
    words = list(arguments[1:])
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word == "--" or not word.startswith("-"):
            if word != "--" and not found.pipeline:
                found.pipeline = word
                continue
            found.command = words if word == "--" else [word, *words]
            break
        if name in FLAGS and not equals:
            setattr(found, FLAGS[name], True)
        elif name in VALUES or name in LISTS:
            if not equals:
                if not words or words[0] == "--":
                    return None
                value = words.pop(0)
            if name in LISTS:
                getattr(found, LISTS[name]).append(value)
            else:
                setattr(found, VALUES[name], value)
        else:
            return None
    return found if found.pipeline and found.command and found.command[0] else None
