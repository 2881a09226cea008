"""Commands about cold starts: explain shows where the time went, mark adds what only the outside knows."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import Json, Pipeline, Socket
from instantstart_fs.control import client as control

commands = typer.Typer()


@commands.command()
def mark(
    pipeline: Pipeline,
    moment: Annotated[str, typer.Argument(metavar="MOMENT", help="requested, ready or first-token.")],
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="When it was: RFC 3339, or seconds since 1970 (default: now)."),
    ] = None,
    socket: Socket = None,
) -> None:
    """Record a moment of a cold start that only you know."""
    from instantstart_fs.cli.timeline import marked, parse_moment
    from instantstart_fs.config.units import parse_time

    found = parse_moment(moment)
    at_ns = None if at is None else parse_time(at)
    with control.Client(socket) as client:
        client.mark(pipeline, found, at_ns)
        note = marked(client.cold_starts(pipeline), found) if found != "requested" else ""
    if note:
        print(f"instantstart: {note}", file=sys.stderr)


@commands.command()
def explain(
    pipeline: Pipeline,
    count: Annotated[int, typer.Option("--last", "-n", metavar="N", min=1, help="How many cold starts.")] = 5,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show the last cold starts: where the time went."""
    from instantstart_fs.cli import timeline
    from instantstart_fs.core.coldstart import as_plain

    with control.Client(socket) as client:
        every = client.cold_starts(pipeline)
    found = every[:count]
    if json:
        print(show.as_json([as_plain(record) for record in found]))
    else:
        timeline.draw(pipeline, found)
        timeline.draw_spreads(every)
