"""Shows a text again every second, until it is interrupted: on a terminal in place, elsewhere one after the other."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import NoReturn

INTERVAL = 1.0
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The terminal's other screen, without a cursor; and back (xterm's control sequences)."""


def watch(
    text: Callable[[], str], *, pause: Callable[[float], None] = time.sleep, seconds: float = INTERVAL
) -> NoReturn:
    """``text()`` every ``seconds``. Ends by KeyboardInterrupt alone (or by an error of ``text``); the screen that was
    there is back then."""
    drawn = sys.stdout.isatty()
    if drawn:
        sys.stdout.write(ENTER)
    try:
        while True:
            found = text()
            sys.stdout.write(frame(found, shutil.get_terminal_size().lines) if drawn else f"{found}\n\n")
            sys.stdout.flush()
            pause(seconds)
    finally:
        if drawn:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()


def frame(text: str, height: int) -> str:
    """``text`` from the top of a screen that is ``height`` lines high, over whatever is there, without flicker: each
    line ends with what clears its rest, the last with what clears all below."""
    lines = text.splitlines()
    if len(lines) > height:
        lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines: `ls PATTERN` shows some"]
    return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J"
