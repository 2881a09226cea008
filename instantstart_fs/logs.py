"""Formats the log on stderr: a line for each event for people (console), or a JSON object for machines (json).

Code that logs about one pipeline passes ``extra={"pipeline": id}``; both formats show it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from instantstart_fs.errors import printable, without_secrets

log = logging.getLogger(__name__)

PER_WINDOW = 50
WINDOW = 30.0
KINDS = 1000
"""Kinds of lines that are told apart at a time."""

LogFormat = Literal["console", "json"]


class ConsoleFormatter(logging.Formatter):
    """Formats an event as one line: time (not under systemd, whose journal has it), level, pipeline, message."""

    def __init__(self) -> None:
        super().__init__()
        self._timed = "JOURNAL_STREAM" not in os.environ

    def format(self, record: logging.LogRecord) -> str:
        pipeline = getattr(record, "pipeline", None)
        message = printable(without_secrets(record.getMessage()))
        line = f"{record.levelname.lower():<7} {f'[{pipeline}] ' if pipeline else ''}{message}"
        if self._timed:
            line = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} {line}"
        if record.exc_info:
            line += "\n" + without_secrets(self.formatException(record.exc_info))
        return line


class JsonFormatter(logging.Formatter):
    """Formats an event as ``{"time", "level", "logger", "message"}``, with ``pipeline`` and ``traceback`` if there is
    one."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
        }
        pipeline = getattr(record, "pipeline", None)
        if pipeline:
            found["pipeline"] = str(pipeline)
        if record.exc_info:
            found["traceback"] = without_secrets(self.formatException(record.exc_info))
        import json  # late: a start that logs for people does without

        return json.dumps(found, ensure_ascii=True)


class FloodGate(logging.Filter):
    """Lets PER_WINDOW lines of one kind through in WINDOW seconds, and counts the others: a reader that asks for a
    broken file again and again must not drown what else there is to say. Of one kind: logger, template, pipeline."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str, str | None], list[float]] = {}
        """Kind → when its window began, lines in it."""

    def __len__(self) -> int:
        return len(self._kinds)

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, str(record.msg), getattr(record, "pipeline", None))
        now = self._clock()
        with self._lock:
            known = self._kinds.pop(kind, None)
            if known is None or now >= known[0] + WINDOW:
                held_back = 0 if known is None else int(known[1]) - PER_WINDOW
                self._kinds[kind] = [now, 1]
                while len(self._kinds) > KINDS:
                    del self._kinds[next(iter(self._kinds))]
            else:
                self._kinds[kind] = known
                known[1] += 1
                return known[1] <= PER_WINDOW
        if held_back > 0:
            record.msg, record.args = f"{record.getMessage()} (and {held_back} more like it since)", ()
        return True


def configure_logging(level: str, form: LogFormat = "console") -> None:
    """Log to stderr: our own modules at ``level``, others' at warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(FloodGate())
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("instantstart_fs").setLevel(level.upper())


def announce(line: str) -> None:
    """The daemon's one line on stdout: that it serves. With JSON logs it is one of them."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.info("%s", line)
    else:
        print(line, flush=True)
