"""What mistakes answer on a terminal of 80 columns, word for word, as a text that is kept beside its test.

Lines are broken by length, so a mistake is made in a directory whose name is as long as HOME, which the text shows.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from unittest import mock

from instantstart_fs.cli import run

HOME = "/home/charlie"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Make one, short enough for sockets; it goes at the end."""
    name = tempfile.mkdtemp(prefix="", dir="/tmp")
    assert len(name) == len(HOME)
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name)


def answers(mistakes: Iterable[str], place: Path, env: Mapping[str, str], *, shown: Mapping[str, str]) -> str:
    """Make them in ``place``; each as its command line, what is said, and its exit status. ``shown``: what stands in
    the text for what differs from run to run."""
    found, before = [], Path.cwd()
    os.chdir(place)
    try:
        for words in mistakes:
            out, err = Terminal(), Terminal()
            with (
                mock.patch.dict(os.environ, {"HOME": str(place), "COLUMNS": "80", "NO_COLOR": "1", **env}),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                status = run(shlex.split(words))
            said = (out.getvalue() + err.getvalue()).rstrip()
            for actual, instead in {str(place): HOME, **shown}.items():
                said = said.replace(actual, instead)
            found.append(f"$ instantstart {words}\n{said}\n(exit {status})\n")
    finally:
        os.chdir(before)
    return "\n".join(found)


def too_wide(text: str) -> list[str]:
    """The lines of answers that would be broken where no word ends."""
    lines = [line for line in text.splitlines() if len(line) > 80 and not line.startswith("$ ")]
    return [line for line in lines if len(max(line.split(), key=len)) <= 60]
