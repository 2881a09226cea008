"""Command groups for typer: the program's own, and one whose first word is a verb or a pipeline (`prefetch status`
beside `prefetch PIPELINE`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from typer import Exit
from typer.core import TyperCommand, TyperGroup

from instantstart_fs.cli import completion_scripts, terminal
from instantstart_fs.config import places
from instantstart_fs.core.humanize import did_you_mean
from instantstart_fs.errors import UsageError, printable, without_secrets

TASKS = (
    ("Try a model", ("mount", "unmount")),
    ("Pipelines", ("add", "update", "remove", "evict", "pin", "unpin", "touch", "warm", "verify")),
    ("What is there", ("ls", "status", "explain")),
    ("Start an engine", ("run", "lease", "mark", "prefetch", "startup-cache")),
    ("The daemon", ("start", "stop", "serve", "logs", "doctor", "fsck", "config", "service")),
    ("Kubernetes", ("csi", "node-labels")),
)
"""The tasks of `instantstart --help`, and their commands. What is in none comes last."""
ALIASES = {"rm": "remove", "delete": "remove", "list": "ls", "ps": "ls", "umount": "unmount", "info": "status"}
"""Other names that people type for our commands."""
ANSWERS = {
    "pull": "`add ID SOURCE --warm` fetches a new one, `warm ID --wait` what an added one lacks, `update ID` a newer "
    "revision",
    "get": "`mount SOURCE DIR` shows a model in DIR; `add ID SOURCE` adds it under an id",
    "download": "`add ID SOURCE --warm` fetches a model; `mount SOURCE DIR` shows it in DIR",
    "create": "`add ID SOURCE` makes a pipeline",
    "restart": "`stop`, then `start`; as a service: `systemctl restart instantstart`",
    "login": "`hf auth login` keeps a token that is used here, too; or `add … --token-file FILE`",
    "install": "`service install` makes it a service of systemd",
    "clean": "`evict ID` frees its bytes, `remove ID` forgets it; beyond the watermark the oldest go by themselves",
    "gc": "`evict ID` frees its bytes, `remove ID` forgets it; of the region's tier: `regional gc`",
}
"""Commands that do not exist here, and what to do instead."""
OFFERED_HELP = 80
"""Characters of a command's help that a shell shows after TAB."""


def _epilog() -> str:
    return f"""\
Examples:
  instantstart mount Qwen/Qwen3-8B ./qwen       one command: ./qwen shows it
  instantstart add my-llm hf://Qwen/Qwen3-8B    then {places.default_mount()}/my-llm
  instantstart warm my-llm --wait               fetch it before it is needed
  instantstart run my-llm -- vllm serve {places.default_mount()}/my-llm

Default places for this user:
  mount   {places.default_mount()}
  store   {places.default_store()}
  socket  {places.default_socket()}
"""


class Verbs(TyperGroup):
    """The group of all commands. Errors repeat the words of a line without secrets, since they go into logs of scripts,
    too."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, ALIASES.get(cmd_name, ""))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ANSWERS and args[0] not in self.commands:
            raise UsageError(f"there is no `{args[0]}`: {ANSWERS[args[0]]}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        left = {name: found for name in self.list_commands(ctx) if not (found := self.commands[name]).hidden}
        limit = formatter.width - 6 - max(map(len, left), default=0)
        tasks = [(title, [name for name in names if name in left]) for title, names in TASKS]
        listed = {name for _, names in tasks for name in names}
        tasks.append(("More", [name for name in left if name not in listed]))
        for title, names in tasks:
            if names:
                with formatter.section(title):
                    formatter.write_dl([(name, left[name].get_short_help_str(limit)) for name in names])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n{_epilog()}")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["instantstart.line"] = [*args]
        if not ctx.resilient_parsing and (wanted := completion_scripts.asked(args)) is not None:
            print(completion_scripts.answer(*wanted), end="" if wanted[0] == completion_scripts.SHOW else "\n")
            raise Exit
        with _complaints(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _complaints(ctx):
            return super().invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Offer commands with a help that is hardly ever cut. rich takes what stands in brackets for its markup."""
        offered = super().shell_complete(ctx, incomplete)
        for item in offered:
            if (command := self.commands.get(item.value)) is not None:
                item.help = command.get_short_help_str(OFFERED_HELP).replace("[", r"\[")
        return offered


@contextlib.contextmanager
def _complaints(ctx: Any) -> Iterator[None]:
    """Complaints about a line repeat no secrets of it, and are printed as JSON, too, where it asks for that."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):  # click's, which typer has a copy of
            error.message = without_secrets(error.message)
            if terminal.wants_json(ctx.meta["instantstart.line"]):
                terminal.print_json_error(UsageError.code, error.format_message())
        raise


def command_after(words: list[str], verb: str, options: Iterable[str]) -> list[str]:
    """Return the command of `VERB PIPELINE [--] COMMAND…`. Raises UsageError where there is none, or an option in its
    place: nobody has a program of that name."""
    if words[0] == "--":
        words = words[1:]
    elif words[0].startswith("-"):
        name = words[0].partition("=")[0]
        known = sorted(options)
        wrong = "comes before the pipeline's id" if name in known else f"is no option{did_you_mean(name, known)}"
        raise UsageError(
            f"{printable(name)} {wrong}; the command follows `--`: instantstart {verb} PIPELINE -- COMMAND…"
        )
    if not words or not words[0]:
        raise UsageError(f"{verb} needs a command: instantstart {verb} PIPELINE -- COMMAND…")
    return words


class VerbOrPipeline(TyperGroup):
    """A group with one hidden command, an ``Unnamed``, that takes every line which begins with no verb. Those are also
    lines that begin with options or with `--`, so `prefetch -- status` speaks of a pipeline that is named like a
    verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        verbs = [name for name, command in self.commands.items() if not command.hidden]
        if not args or args[0] not in verbs:
            args = [*(name for name in self.commands if name not in verbs), *args]
        return super().parse_args(ctx, ["--", *args])  # the group itself has no options


class Unnamed(TyperCommand):
    """Stands in its group's place: its usage names the group, and `-h` after the group shows it."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(parent.info_name, args, parent=parent.parent, **extra)
