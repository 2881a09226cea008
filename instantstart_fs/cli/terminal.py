"""Writes safely to whatever stdout and stderr are: a terminal without UTF-8, a closed descriptor, a pipe without a
reader, a full disk. Output degrades where it must; a command never fails because of what it shows.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys
from collections.abc import Sequence

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import Any

HANDLER = "instantstart-plain"
ASCII = "instantstart_ascii"
ENCODING = "_INSTANTSTART_ENCODING"
"""The variable by which ``ensure_utf8_names`` tells the process that it begins which encoding the terminal takes."""
_PLAIN = str.maketrans(
    {
        "●": "*",
        "○": "o",
        "█": "#",
        "▓": "=",
        "▒": ":",
        "░": ".",
        "■": "@",
        "━": "-",
        "╸": "-",
        "╺": " ",
        "→": "->",
        "…": "...",
        "—": "-",
        "–": "-",
        "·": "-",
        "×": "x",
        "÷": "/",
        "≤": "<=",
        "≥": ">=",
        "’": "'",
        "“": '"',
        "”": '"',
        "\u202f": " ",
        "\u00a0": " ",
    }
)
"""Replacements for the characters of our own words and drawings. Other characters of a name or a message are shown as
escapes."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The handler for ``codecs.register_error``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end].translate(_PLAIN)
    return wanted.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _ascii(name: str) -> codecs.CodecInfo | None:
    """The search function for ``codecs.register``: ASCII under another name. Typer takes a stream whose encoding is
    called ascii for misconfigured, and writes UTF-8 to it."""
    if name != ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        known.encode,
        known.decode,
        known.streamreader,
        known.streamwriter,
        known.incrementalencoder,
        known.incrementaldecoder,
        name=ASCII,
    )


def ensure_utf8_names() -> None:
    """Begin anew in Python's UTF-8 mode if the locale is not UTF-8: names of files and arguments are UTF-8, whatever
    the terminal shows. The streams keep the terminal's encoding."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or ENCODING in os.environ or not sys.executable:
        return
    environment = {**os.environ, ENCODING: getattr(sys.stdout, "encoding", None) or "ascii"}
    if sys.argv[1:2] == ["serve"]:
        environment["PYTHONUTF8"] = "1"  # for its worker processes
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)


def prepare() -> None:
    """Make stdout and stderr take everything. Called once, before anything is written."""
    _keep_standard_descriptors()
    codecs.register_error(HANDLER, _plain)
    codecs.register(_ascii)
    encoding = os.environ.pop(ENCODING, None)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed when this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        else:
            with contextlib.suppress(AttributeError, OSError, ValueError, LookupError):
                known = encoding or stream.encoding
                stream.reconfigure(encoding=ASCII if codecs.lookup(known).name == "ascii" else known, errors=HANDLER)


def _keep_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that were closed, on nothing. A socket would get the number of one otherwise, and what
    is printed would go into it. What we start finds them closed, as we did."""
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            while (made := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < number:
                pass
            if made > number:
                os.close(made)


def unicode_capable(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def escaped(text: str) -> str:
    """JSON in ASCII alone: the same values, for streams that take no more."""
    import json

    return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def flush() -> int:
    """Write out what is buffered; the exit status for what kept that from happening, 0 for nothing.

    Python would complain once more while closing the stream, so it is let go.
    """
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or discard_output(stream, 141)
        except (OSError, ValueError) as error:
            status = status or discard_output(stream, 1)
            if stream is sys.stdout:
                with contextlib.suppress(OSError, ValueError):
                    print(f"instantstart: cannot write to stdout: {getattr(error, 'strerror', error)}", file=sys.stderr)
    return status


def discard_output(stream: Any, status: int) -> int:
    """Redirect ``stream`` to /dev/null. Returns ``status``."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return status


def wrapped(text: str, stream: Any, width: int | None = None) -> str:
    """One line as it is for programs; on a terminal in lines of its ``width`` (None: ask it), broken between words and
    going on below the first word, so that what is to be copied stays whole."""
    if not stream.isatty():
        return text
    import shutil
    import textwrap

    columns = max(20, width or shutil.get_terminal_size().columns)
    return textwrap.fill(text, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a line asks for JSON. What follows `lease`, `run` or `--` may be another program's."""
    verb = ""
    words = iter(arguments)
    for word in words:
        if word == "--" or verb in ("lease", "run"):
            return False
        if word == "--json":
            return True
        if word == "--socket":
            next(words, None)
        elif not verb and not word.startswith("-"):
            verb = word
    return False


def print_json_error(code: str, message: str) -> None:
    """The one object that a command with --json prints when it fails."""
    import json

    print(json.dumps({"error": {"code": code, "message": message}}))
