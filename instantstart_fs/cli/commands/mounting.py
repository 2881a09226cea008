"""Commands for one model without configuration: mount, unmount, stop."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated

import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import ConfigFile, Json, Socket
from instantstart_fs.control import client as control
from instantstart_fs.core.readable import readable_id
from instantstart_fs.errors import InstantStartError, PipelineExists, UsageError

commands = typer.Typer()


@commands.command()
def mount(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What `add` takes: org/repo, a web address, …", show_default=False)
    ],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Empty, or not there yet.", show_default=False)],
    warm: Annotated[bool, typer.Option("--warm", help="Start filling at once.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only what is cached whole; ask no origin.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C; then undo it all.")] = False,
    config: ConfigFile = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show a model in DIR; starts the daemon if need be."""
    from instantstart_fs.cli import mounting
    from instantstart_fs.cli.specification import specification

    spec = specification("model", source)
    place = os.path.abspath(directory)
    mounting.check_free(place)
    client, started = mounting.connect(socket, config)
    with client:
        try:
            pipeline, there = mounting.pipeline_of(client, spec.models[0])
            if offline:
                _check_cached(client, pipeline, there)
            elif not there:
                try:
                    client.add(specification(pipeline, source), warm=warm)
                except PipelineExists:  # somebody else's, whom this user may not see
                    pipeline = readable_id(spec.models[0], {pipeline})
                    client.add(specification(pipeline, source), warm=warm)
            elif warm:
                client.warm(pipeline)
            mounted = client.ping().mount
            mounting.link(place, os.path.join(mounted, pipeline))
            status = client.status(pipeline, brief=True)
            if json:
                print(show.as_json({"pipeline": pipeline, "path": place, "started": started, "state": status.state}))
            else:
                print(f"{place}: {pipeline}, {status.state}", flush=True)
            if foreground:
                try:
                    mounting.stay(client, pipeline)
                finally:
                    with contextlib.suppress(UsageError):  # `unmount` was there before
                        mounting.unlink(place, mounted)
        finally:
            if foreground and started:
                mounting.stop(client)


def _check_cached(client: control.Client, pipeline: str, there: bool) -> None:
    if not there:
        raise InstantStartError("--offline: this source was never added here; mount it once without --offline")
    status = client.status(pipeline, brief=True)
    if status.cached_bytes < status.total_bytes:
        raise InstantStartError(
            f"--offline: of {pipeline} only {show.percent(status)} % are cached; `instantstart warm {pipeline} --wait` "
            "fetches the rest"
        )


@commands.command()
def unmount(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What `mount` was given.", show_default=False)],
    forget: Annotated[bool, typer.Option("--forget", help="Remove the pipeline and its bytes, too.")] = False,
    socket: Socket = None,
) -> None:
    """Undo `mount`; what is cached stays."""
    from instantstart_fs.cli import mounting

    place = os.path.abspath(directory)
    if forget or socket is not None:
        with control.Client(socket) as client:
            pipeline = mounting.unlink(place, client.ping().mount)
            if forget:
                client.remove(pipeline)
    else:
        pipeline = mounting.unlink(place)
    print(f"{place}: unmounted" + (f", {pipeline} removed" if forget else f"; {pipeline} stays cached"))


@commands.command()
def stop(socket: Socket = None) -> None:
    """Stop the daemon that `mount` or `serve` started."""
    from instantstart_fs.cli import mounting

    with control.Client(socket) as client:
        mounting.stop(client)
    print("stopped")
