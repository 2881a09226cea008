"""The command line's entry: the program's own options, and the commands of ``cli/commands/`` under one name."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command_name
from typer.models import CommandInfo

from instantstart_fs.cli.commands import (
    cold_starts,
    configuration,
    installation,
    kubernetes,
    listing,
    mount,
    pipelines,
    prefetch,
    regional,
    service,
    startup,
)
from instantstart_fs.cli.options import Socket
from instantstart_fs.cli.verbs import ALIASES, Verbs
from instantstart_fs.cli.version import version_line

app = typer.Typer(
    name="instantstart",
    cls=Verbs,
    help="Model weights on NVMe, read through a mount: add a pipeline, point the engine at its directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(version_line())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    socket: Socket = None,
) -> None:
    """Model weights on NVMe, read through a mount: add a pipeline, point the engine at its directory."""
    if socket is not None:
        os.environ["INSTANTSTART_SOCKET"] = socket  # as if it were said there; --socket after the verb wins


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    print(version_line())


@app.command("help", hidden=True)
def help_(
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", show_default=False)] = None,
) -> None:
    """Show the help of a command."""
    app(args=[*(words or ()), "--help"], prog_name="instantstart", standalone_mode=True)


# In the order of `instantstart --help`.
for task in (mount, service, pipelines, startup, cold_starts, listing, kubernetes):
    app.add_typer(task.commands)
app.add_typer(startup.caches, name="startup-cache")
app.add_typer(prefetch.commands, name="prefetch")
app.add_typer(regional.commands, name="regional")
app.add_typer(installation.service, name="service")
app.add_typer(configuration.config, name="config")


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """Return the program with only the command that ``arguments`` begin with, or all of it if they begin otherwise.

    typer builds every command that it knows before it runs one: 20 of the 150 ms that ``instantstart ls`` takes.
    """
    word = arguments[0] if arguments else ""
    narrowed = copy.copy(app)
    narrowed.registered_commands = []
    for name in (word, ALIASES.get(word)):
        for group in app.registered_groups:
            if isinstance(group.name, str):
                if group.name == name:
                    narrowed.registered_groups = [group]
                    return narrowed
                continue
            task = copy.copy(group.typer_instance)
            assert task is not None
            task.registered_commands = [one for one in task.registered_commands if _name(one) == name]
            if task.registered_commands:
                narrowed.registered_groups = [copy.copy(group)]
                narrowed.registered_groups[0].typer_instance = task
                return narrowed
    return app


def _name(command: CommandInfo) -> str | None:
    return command.name or (get_command_name(command.callback.__name__) if command.callback is not None else None)
