"""The log's lines: one each, nothing that a terminal obeys, and no flood."""

from __future__ import annotations

import json
import logging

from instantstart_fs.errors import InstantStartError, printable
from instantstart_fs.logs import KINDS, PER_WINDOW, WINDOW, ConsoleFormatter, FloodGate, JsonFormatter


def record(message: str, *args: object, pipeline: str | None = None, level: int = logging.WARNING) -> logging.LogRecord:
    found = logging.LogRecord("instantstart_fs.x", level, "x.py", 1, message, args, None)
    if pipeline:
        found.pipeline = pipeline
    return found


def test_what_an_origin_says_is_shown_and_not_obeyed() -> None:
    hostile = "a\nb\r\x1b[31mc\x85\u2028\u202ed\udcff"
    assert printable(hostile) == "a\\nb\\r\\x1b[31mc\\x85\\u2028\\u202ed\\udcff"
    assert InstantStartError(hostile).message == printable(hostile)
    line = ConsoleFormatter().format(record("%s", hostile))
    assert line.isprintable() and "\\x1b[31m" in line
    assert json.loads(JsonFormatter().format(record("%s", hostile)))["message"] == hostile
    line.encode()


def test_a_message_has_an_end() -> None:
    assert len(InstantStartError("x" * 1_000_000).message) < 5000


def test_a_flood_of_one_kind_is_counted_and_drowns_no_other() -> None:
    now = 0.0
    gate = FloodGate(lambda: now)
    passed = [gate.filter(record("%s failed", number, pipeline="p")) for number in range(1000)]
    assert sum(passed) == PER_WINDOW
    assert gate.filter(record("%s failed", 1, pipeline="q"))
    assert gate.filter(record("another", pipeline="p"))
    now = WINDOW + 1
    later = record("%s failed", 7, pipeline="p")
    assert gate.filter(later)
    assert f"{1000 - PER_WINDOW} more" in later.getMessage()
    again = record("%s failed", 8, pipeline="p")
    assert gate.filter(again) and again.getMessage() == "8 failed"


def test_the_gate_forgets() -> None:
    gate = FloodGate(lambda: 0.0)
    for number in range(3 * KINDS):
        assert gate.filter(record("x", pipeline=str(number)))
    assert len(gate) <= KINDS
