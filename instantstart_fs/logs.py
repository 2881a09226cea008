"""The log: to stderr, a line per event for people (console) or a JSON object per line for machines (json).

Whoever logs about one pipeline passes ``extra={"pipeline": id}``; both formats show it on every such line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Literal

log = logging.getLogger(__name__)

LogFormat = Literal["console", "json"]


class ConsoleFormatter(logging.Formatter):
    """One line: time (not under systemd, whose journal has it), level, pipeline, message."""

    def __init__(self) -> None:
        super().__init__()
        self._timed = "JOURNAL_STREAM" not in os.environ

    def format(self, record: logging.LogRecord) -> str:
        pipeline = getattr(record, "pipeline", None)
        message = record.getMessage().replace("\n", " ")
        line = f"{record.levelname.lower():<7} {f'[{pipeline}] ' if pipeline else ''}{message}"
        if self._timed:
            line = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} {line}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, and ``pipeline`` and ``traceback`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        pipeline = getattr(record, "pipeline", None)
        if pipeline:
            found["pipeline"] = str(pipeline)
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=True)


def configure_logging(level: str, form: LogFormat = "console") -> None:
    """To stderr, for our own modules at ``level``; others' at warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("instantstart_fs").setLevel(level.upper())


def announce(line: str) -> None:
    """The daemon's one line on stdout: that it serves. With JSON logs it is one of them."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.info("%s", line)
    else:
        print(line, flush=True)
