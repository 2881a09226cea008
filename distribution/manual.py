"""Writes what packages carry beside the program: manual page and shell completions, both from the command line itself.

    python -m distribution.manual DIRECTORY

makes below DIRECTORY what lies below /usr/share: man/man1, bash-completion, zsh, fish.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from instantstart_fs import __version__
from instantstart_fs.cli import completion_scripts
from instantstart_fs.cli.app import app

NAME = "instantstart"
FILES = (
    ("/etc/instantstart/config.toml", "The configuration; every key has a default."),
    ("/etc/instantstart/pipelines.d/*.toml", "One pipeline each."),
    ("~/.config/instantstart/config.toml", "The same for a user's own daemon."),
    ("/var/lib/instantstart", "The store: cached bytes. A user's own daemon has it in ~/.cache/instantstart."),
    ("/run/instantstart/control.sock", "Where the daemon listens."),
    ("/models", "Where pipelines are shown."),
)
ENVIRONMENT = (
    ("INSTANTSTART_CONFIG", "The configuration file."),
    ("INSTANTSTART_SOCKET", "The daemon's socket."),
    ("NO_COLOR", "If set, nothing is coloured."),
)
STATUSES = (
    ("0", "Done."),
    ("1", "Failed; one line on stderr says what happened and what to do."),
    ("2", "The command line or the configuration cannot be used."),
)
COMPLETIONS = (
    ("bash", f"bash-completion/completions/{NAME}"),
    ("zsh", f"zsh/vendor-completions/_{NAME}"),
    ("fish", f"fish/vendor_completions.d/{NAME}.fish"),
)


def roff(text: str) -> str:
    """``text`` as roff shows it unchanged: no escapes, no requests, hyphens that can be copied."""
    lines = text.replace("\\", "\\(rs").replace("-", "\\-").splitlines()
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def bold(text: str) -> str:
    return f"\\fB{roff(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{roff(text)}\\fR"


def option(parameter: Any) -> tuple[str, str]:
    """Its names, and what it does."""
    names = ", ".join(bold(name) for name in [*parameter.opts, *parameter.secondary_opts])
    if not getattr(parameter, "is_flag", False):
        names += f" {italic(parameter.metavar or parameter.name.upper())}"
    return names, roff(parameter.help or "")


def sections(command: Any, words: list[str]) -> list[str]:
    """What is said of ``command``, and of those below it."""
    below = getattr(command, "commands", None)
    shown = [it for it in command.params if it.param_type_name == "option" and not getattr(it, "hidden", False)]
    lines: list[str] = []
    if below is None or any(it.param_type_name == "argument" for it in command.params):
        arguments = [it for it in command.params if it.param_type_name == "argument"]
        usage = [bold(" ".join(words)), *(["[options]"] if shown else [])]
        usage += [italic(it.metavar or it.name.upper()) for it in arguments]
        lines += [".TP", " ".join(usage), roff((command.help or "").replace("\n\n", "\n").strip())]
        if shown:
            lines.append(".RS")
            for names, text in map(option, shown):
                lines += [".TP", names, text]
            lines.append(".RE")
    for name, child in (below or {}).items():
        lines += sections(child, words if child.hidden else [*words, name]) if shows(child) else []
    return lines


def shows(command: Any) -> bool:
    """Whether a user is told of it. A group's unnamed command is hidden from the list and is the group's own line."""
    return not command.hidden or type(command).__name__ == "Unnamed"


def table(rows: tuple[tuple[str, str], ...]) -> list[str]:
    return [line for name, text in rows for line in (".TP", bold(name), roff(text))]


def page() -> str:
    """instantstart(1)."""
    command = typer.main.get_command(app)
    lines = [
        f'.TH {NAME.upper()} 1 "" "Instant Start FS {__version__}" "User Commands"',
        ".SH NAME",
        f"{NAME} \\- model weights on NVMe, read through a mount",
        ".SH SYNOPSIS",
        f"{bold(NAME)} {italic('COMMAND')} [{italic('ARGUMENTS')}]",
        ".SH DESCRIPTION",
        roff(
            "Shows the weights of each pipeline as read-only files. What is not there yet is fetched from\n"
            "Hugging Face, S3 or a directory when it is first read, proven by its digest, and kept on the disk."
        ),
        ".SH COMMANDS",
    ]
    lines += sections(command, [NAME])
    everywhere = tuple(option(it) for it in command.params if not getattr(it, "hidden", False))
    lines += [".SH OPTIONS", *(line for names, text in everywhere for line in (".TP", names, text))]
    lines += [".SH EXIT STATUS", *table(STATUSES), ".SH FILES", *table(FILES), ".SH ENVIRONMENT", *table(ENVIRONMENT)]
    lines += [".SH SEE ALSO", bold("systemctl") + "(1), " + bold("fusermount3") + "(1)"]
    return "\n".join(lines) + "\n"


def write(directory: Path) -> None:
    """All of it below ``directory``."""
    texts = {f"man/man1/{NAME}.1": page()}
    for shell, path in COMPLETIONS:
        texts[path] = completion_scripts.script(shell)
    for path, text in texts.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
