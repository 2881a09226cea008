"""Commands that show which pipelines there are and what they do: ls, status. They change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from instantstart_fs.cli import completion, show
from instantstart_fs.cli.options import Json, Socket
from instantstart_fs.control import client as control
from instantstart_fs.errors import DaemonUnreachable, UsageError, printable

commands = typer.Typer()


@commands.command()
def ls(
    pipelines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PIPELINE]...",
            help="Only these; patterns too ('llama-*').",
            show_default=False,
            autocompletion=completion.pipelines,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second, until Ctrl-C.")] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """List the pipelines and how much of each is cached."""
    if watch:
        from instantstart_fs.cli.watch import watch as show_again

        if json:
            raise UsageError("--watch and --json exclude each other")
        show_again(lambda: _listed(socket, pipelines or []))
    with control.Client(socket) as client:
        _list(client, pipelines or [], json)


@commands.command()
def status(
    pipelines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PIPELINE]...",
            help="Several, or patterns ('llama-*'); all of them if left out.",
            show_default=False,
            autocompletion=completion.pipelines,
        ),
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show state, rate and last error of pipelines."""
    wanted = pipelines or []
    with control.Client(socket) as client:
        if not wanted:
            _list(client, [], json)
            if not json:
                print(f"\n{show.mounted(client.ping())}")
        elif len(wanted) == 1 and not show.is_pattern(wanted[0]):
            found = client.status(wanted[0])
            print(show.as_json(found) if json else show.pipeline(found))
        else:
            several = [client.status(one.pipeline) for one in show.chosen(client.pipelines(), wanted)]
            print(show.as_json(several) if json else "\n\n".join(show.pipeline(one) for one in several))


def _listed(socket: str | None, wanted: list[str]) -> str:
    """Return the list for --watch. A daemon that is being restarted does not end the watching."""
    try:
        with control.Client(socket) as client:
            return show.pipelines(show.chosen(client.pipelines(), wanted))
    except DaemonUnreachable as error:
        return printable(error.message)


def _list(client: control.Client, wanted: list[str], json: bool) -> None:
    """Print the pipelines that ``wanted`` names (all if it is empty), as both commands do."""
    found = show.chosen(client.pipelines(), wanted)
    print(show.as_json([status.brief for status in found]) if json else show.pipelines(found))
