"""Watches the process in which the parts of bench/gpu.py run, and outlives whatever becomes of it.

A call into a driver may hang where no signal reaches it, end its process, or leave it useless. So a parent that imports
no torch starts the process, reads from gpu.json which part is under way and until when, kills what is late, and starts
a fresh one for the parts that are left. The parent prints the table, and decides the exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import gpu_table

FAILED, CUT, NO_GPU, GO_ON = 1, 3, 4, 75
"""Exit statuses; the last is from child to parent alone: the parts that are left want a fresh process."""
GRACE = 10.0
"""Seconds after a deadline until a process that does not heed it is killed."""
TOLD = 10.0
"""Seconds from SIGTERM until it is killed."""
FIRST = 5.0
"""Seconds that a part must have left for a measurement of which nothing is known."""
SLOWER = 1.3
"""Times the longest so far: what the next measurement of a kind may take."""
_PR_SET_PDEATHSIG = 1


def write(out: Path, result: dict[str, Any]) -> None:
    """Replace gpu.json, whole: a kill leaves the one before."""
    out.mkdir(parents=True, exist_ok=True)
    beside = out / ".gpu.json"
    beside.write_text(json.dumps(result, indent=1, default=str) + "\n")
    beside.replace(out / "gpu.json")


def read(out: Path) -> dict[str, Any]:
    """What gpu.json holds; nothing if there is none."""
    try:
        found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def table(result: dict[str, Any]) -> None:
    print("", *gpu_table.lines(result), sep="\n", flush=True)


def end_with_parent() -> None:
    """SIGTERM for this process when the one that watches it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def last_words(text: str) -> str:
    """The last line of what a process said on stderr, which is the error itself of one that Python ended."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


class Skipped(Exception):
    """A part that cannot be run here; its text says why. It is here and not in bench/gpu.py, which is ``__main__`` and
    would be a second module for whoever imports it."""


class Pace:
    """Whether one more measurement ends within the time of its part: what is begun and does not costs the whole part.
    ``left``: the seconds that the part still has."""

    def __init__(self, left: Callable[[], float]) -> None:
        self._left = left
        self._longest: dict[str, float] = {}

    def allows(self, name: str, least: float = FIRST) -> bool:
        """``least``: seconds that have to be left in any case."""
        longest = self._longest.get(name) or max(self._longest.values(), default=0.0)
        return self._left() >= max(least, longest * SLOWER)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A measurement, with what it takes to prepare it."""
        before = self._left()
        try:
            yield
        finally:
            self._longest[name] = max(self._longest.get(name, 0.0), before - self._left())


class Watch:
    def __init__(self, program: Path, arguments: list[str], out: Path, limit: float, work: str) -> None:
        self._command = [sys.executable, "-u", str(program), *arguments, "--child", "--work", work]
        self._out = out
        self._ends = time.monotonic() + limit
        self._work = work
        self._cut = ""

    def run(self) -> int:
        """Let all parts run, print the table, and return the exit status."""
        (self._out / "gpu.json").unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        status = GO_ON
        while status == GO_ON:
            status = self._one_process()
        result = read(self._out)
        result.pop("now", None)
        said = [line.partition(": ")[0] for line in (*result.get("not_run", []), *result.get("failed", []))]
        result.setdefault("not_run", []).extend(
            f"{name}: {self._cut or 'the bench ended'} came first"
            for name in result.get("chosen", [])
            if name not in result.get("ended", []) and name not in said
        )
        if status == NO_GPU:
            result["exit"] = NO_GPU
        elif result.get("failed"):
            result["exit"] = FAILED
        elif self._cut or any("no time left" in line or "came first" in line for line in result["not_run"]):
            result["exit"] = CUT
        else:
            result["exit"] = 0
        write(self._out, result)
        if status != NO_GPU:
            table(result)
        return int(result["exit"])

    def _end(self, number: int, _: object) -> None:
        self._cut = self._cut or ("^C" if number == signal.SIGINT else "SIGTERM")

    def _one_process(self) -> int:
        """Its exit status, or GO_ON where it ended, or was killed, within a part."""
        left = self._ends - time.monotonic()
        with subprocess.Popen([*self._command, "--limit", str(max(0.0, left))], start_new_session=True) as child:
            try:
                told_at: float | None = None
                while child.poll() is None:
                    time.sleep(0.1)
                    now = time.monotonic()
                    if now > self._ends:
                        self._cut = self._cut or "the time was up"
                    if self._cut and told_at is None:
                        told_at = now
                        child.send_signal(signal.SIGTERM)
                    until = read(self._out).get("now", {}).get("until")
                    if (told_at is not None and now > told_at + TOLD) or (until and now > until + GRACE):
                        break
            finally:
                if child.poll() is None:
                    print("    it does not end, and is killed", flush=True)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # and what it has started
                status = child.wait()
                self._unmount()
        if status in (0, GO_ON, NO_GPU):
            return GO_ON if status == GO_ON and not self._cut else 0 if status == GO_ON else status
        return self._after(status)

    def _after(self, status: int) -> int:
        """Note the part within which the process ended."""
        result = read(self._out)
        part = result.pop("now", {}).get("part")
        how = (
            f"its process ended by {signal.Signals(-status).name}" if status < 0 else f"its process ended with {status}"
        )
        if part is None:  # between two parts, or before the first: another one would end so, too
            where = "not_run" if self._cut else "failed"
            result.setdefault(where, []).append(f"the bench itself: {f'{self._cut} came first' if self._cut else how}")
            write(self._out, result)
            return 0
        result.setdefault("ended", []).append(part)
        if self._cut:
            result.setdefault("not_run", []).append(f"{part}: {self._cut} came first")
        else:
            result.setdefault("failed", []).append(f"{part}: {how}")
            result.setdefault("parts", {}).setdefault(part, {})["failed"] = how
        write(self._out, result)
        return 0 if self._cut else GO_ON

    def _unmount(self) -> None:
        """A mount whose daemon was killed stays, and would keep its directory."""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            place = line.split()[4]
            if place.startswith(f"{self._work}/"):
                subprocess.run(["umount", "-l", place], capture_output=True, timeout=10, check=False)
