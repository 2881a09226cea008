"""The progress bar of `warm --wait`, `verify` and `prefetch`: two lines at the bottom of the terminal.

The terminal scrolls above them, so whatever else is written to it meanwhile, by this process or another one (a daemon
in the foreground), has lines of its own: it neither lands in the bar nor wipes it away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

from instantstart_fs.core.humanize import human_bytes

LINES = 2
LEAST_ROWS, LEAST_COLUMNS = 6, 24
"""Smaller terminals, and those whose size nobody knows, get plain lines."""
BAR = 24
NAME = 20


def lines(name: str, done: int, total: int, rate: str, reason: str, width: int) -> tuple[str, str]:
    """Return what is drawn in ``width`` columns: how far it is, how fast, how long it will take; below, what is wrong
    ("": nothing).

    On a narrow terminal the bar shrinks first, then the amount disappears, then the end of the name. Pure.
    """
    from rich.cells import cell_len

    share = 100 if total <= 0 or done >= total else done * 100 // total
    ends = [f"{share:>3} %", *([rate] if rate else [])]
    amount = f"{human_bytes(done)} of {human_bytes(total)}"
    left = width - len(amount) - sum(len(end) + 2 for end in ends) - min(cell_len(name), NAME) - 2
    if left >= 0:
        ends.insert(1, amount)
    else:
        left += len(amount)
    size = min(BAR, left - 2)
    filled = size * share // 100
    drawn = ["█" * filled + "░" * (size - filled)] if size >= 5 else []
    tail = "  ".join([*drawn, *ends])
    shown = cut(name, max(width - cell_len(tail) - 2, 4))
    return cut(f"{shown}  {tail}", width), cut(reason, width)


def cut(text: str, width: int) -> str:
    """Return at most ``width`` columns of ``text``, with a sign that there is more."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)) + "…"


def fits(stream: TextIO) -> bool:
    """Whether a bar may be drawn there."""
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return False
    columns, rows = _size(stream)
    return columns >= LEAST_COLUMNS and rows >= LEAST_ROWS


def _size(stream: TextIO) -> os.terminal_size:
    try:
        return os.get_terminal_size(stream.fileno())
    except OSError:
        return shutil.get_terminal_size((0, 0))


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
"""The signals that end or stop a command without an exception."""


class Bar:
    """A context manager. The lines are taken from the terminal while it is entered, and given back however it ends, but
    by SIGKILL. A job in the background takes none: the terminal is somebody else's."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = sys.stderr if stream is None else stream
        self._rows = 0
        self._last: tuple[int, int, str, str] = (0, 0, "", "")
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Bar:
        self._take()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._handlers[number] = handler
                    signal.signal(number, self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def report(self, done: int, total: int, rate: str, reason: str) -> None:
        self._last = (done, total, rate, reason)
        if self._rows_needed() != self._rows:
            self._give_back()
            self._take()
        if self._rows:
            shown, below = lines(self._name, done, total, rate, reason, _size(self._stream).columns - 1)
            top = self._rows - LINES + 1
            # One write: nobody else's comes in between. The cursor goes back to where it was.
            self._write(f"\x1b7\x1b[{top};1H{shown}\x1b[K\x1b[{top + 1};1H{below}\x1b[K\r\x1b8")

    def _rows_needed(self) -> int:
        """The terminal's rows; 0 where no bar may be drawn now."""
        with contextlib.suppress(OSError):  # it is not this session's terminal: no shell runs jobs on it
            if os.tcgetpgrp(self._stream.fileno()) != os.getpgrp():
                return 0
        rows = _size(self._stream).lines
        return rows if rows >= LEAST_ROWS else 0

    def _take(self) -> None:
        self._rows = rows = self._rows_needed()
        if rows:
            self._write("\n" * LINES + f"\x1b[{LINES}A\x1b7\x1b[1;{rows - LINES}r\x1b8")

    def _give_back(self) -> None:
        if self._rows:
            top = self._rows - LINES + 1
            self._write(f"\x1b7\x1b[r\x1b[{top};1H\x1b[J\r\x1b8")
            self._rows = 0

    def _write(self, text: str) -> None:
        """Write at once, past the stream's buffer: a signal may have interrupted that, and it cannot be entered
        twice."""
        with contextlib.suppress(OSError, ValueError):
            data = text.encode(self._stream.encoding or "ascii", self._stream.errors or "replace")
            while data:
                data = data[os.write(self._stream.fileno(), data) :]

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """The signal does what it does without a bar; after SIGTSTP the bar comes back."""
        self._give_back()
        signal.signal(number, self._handlers[number])
        os.kill(os.getpid(), number)
        if number == signal.SIGTSTP:
            signal.signal(number, self._leave)
            self._take()
            self.report(*self._last)
