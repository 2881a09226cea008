"""Commands for one model without configuration, and for the daemon that shows it: mount, unmount, start, stop, logs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated

import msgspec
import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import ConfigFile, Exclude, Include, Json, Socket
from instantstart_fs.control import client as control
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.core.readable import readable_id
from instantstart_fs.errors import DaemonUnreachable, InstantStartError, PipelineExists, UsageError

commands = typer.Typer()


@commands.command()
def mount(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What `add` takes: org/repo, a web address, …", show_default=False)
    ],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Empty, or not there yet.", show_default=False)],
    warm: Annotated[bool, typer.Option("--warm", help="Start filling at once.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only what is cached whole; asks no origin.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C; then undo it all.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", metavar="FILE", help="The hub token, if it is gated.")
    ] = None,
    aws_profile: Annotated[
        str | None, typer.Option("--aws-profile", metavar="PROFILE", help="The AWS profile, if it is S3.")
    ] = None,
    endpoint_url: Annotated[
        str | None, typer.Option("--endpoint-url", metavar="URL", help="The S3 endpoint, if it is not AWS.")
    ] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Ask without credentials.")] = False,
    config: ConfigFile = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show a model in DIR; starts the daemon if need be."""
    from instantstart_fs.cli import links, own_daemon
    from instantstart_fs.control.specification import specification

    if foreground:
        signal.signal(signal.SIGTERM, _interrupt)
    spec = specification(
        "model",
        source,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        token_file=token_file,
        aws_profile=aws_profile,
        endpoint_url=endpoint_url,
        anonymous=anonymous,
    )
    with links.Place(os.path.abspath(os.path.expanduser(directory))) as place:
        place.check_free()
        client, started = own_daemon.connect(socket, config)
        with client:
            try:
                pipeline, there = own_daemon.pipeline_of(client, spec.models[0])
                if offline:
                    _check_cached(client, pipeline, there)
                elif not there:
                    try:
                        client.add(msgspec.structs.replace(spec, id=pipeline), warm=warm)
                    except PipelineExists:  # somebody else's, whom this user may not see
                        pipeline = readable_id(spec.models[0], {pipeline})
                        client.add(msgspec.structs.replace(spec, id=pipeline), warm=warm)
                elif warm:
                    client.warm(pipeline)
                info = client.ping()
                place.link(os.path.join(info.mount, pipeline))
                place.close()  # a process that stays keeps no filesystem from being unmounted
                try:
                    _tell(client, pipeline, place.path, info, started, json)
                    if foreground:
                        own_daemon.stay(client, pipeline)
                finally:
                    if foreground:
                        with contextlib.suppress(UsageError), links.Place(place.path) as now:  # `unmount` was first
                            now.unlink(info.mount)
            finally:
                if foreground and started:
                    if own_daemon.is_used_by_others(client.path):
                        print("the daemon goes on, since others use it; `instantstart stop` ends it", file=sys.stderr)
                    else:
                        own_daemon.stop(client)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _tell(client: control.Client, pipeline: str, place: str, info: DaemonInfo, started: bool, json: bool) -> None:
    status = client.status(pipeline, brief=True)
    if json:
        found = {"pipeline": pipeline, "path": place, "started": started, "state": status.state}
        print(show.as_json({**found, "mount": info.mount, "transport": info.transport}), flush=True)
        return
    size = human_bytes(status.total_bytes)
    print(f"{place}: {pipeline}, {status.state}, {size}", flush=True)
    if status.skipped is not None:
        print(f"  skipped   {show.skipped(status.skipped)}", flush=True)
    if started and (notes := slower(info, os.geteuid())):
        print("\n".join(notes), file=sys.stderr, flush=True)


def slower(info: DaemonInfo, uid: int) -> list[str]:
    """Return what an ordinary user's own daemon cannot do, and why; [] as root. For people, 80 columns wide."""
    if uid == 0 or not info.transport.startswith("pyfuse3"):
        return []
    return [
        "note: as an ordinary user, warm files are read through the daemon, at a fraction of",
        "      the disk's speed; as root (sudo) the kernel reads them itself",
        *(
            [f"note: the mount is at {info.mount}, since the default place is in use"]
            if not info.mount.startswith(os.path.expanduser("~/models"))
            else []
        ),
    ]


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
    json: Json = False,
) -> None:
    """Undo `mount`; what is cached stays."""
    from instantstart_fs.cli import links

    held: list[str] = []
    path = os.path.abspath(os.path.expanduser(directory))
    with links.Place(path) as place:
        if forget or socket is not None:
            with control.Client(socket) as client:
                mount = client.ping().mount
                pipeline = place.pipeline(mount, only=forget)
                if forget:  # first: it may be refused, and then nothing is done
                    held = client.remove(pipeline)
                place.unlink(mount)
        else:
            pipeline = place.unlink()
    if json:
        print(show.as_json({"pipeline": pipeline, "path": path, "removed": forget, "open_by": held}))
        return
    print(f"{path}: unmounted" + (f", {pipeline} removed" if forget else f"; {pipeline} stays cached"))
    if held:
        print(f"  {show.still_open(held)}")


@commands.command()
def start(config: ConfigFile = None, socket: Socket = None, json: Json = False) -> None:
    """Start this user's daemon in the background, if none answers."""
    from instantstart_fs.cli import own_daemon

    client, started = own_daemon.connect(socket, config)
    with client:
        info = client.ping()
    if json:
        print(show.as_json({"started": started, "mount": info.mount, "transport": info.transport}))
        return
    print(f"{'started' if started else 'it runs already'}: {show.mounted(info)}")
    if started and (notes := slower(info, os.geteuid())):
        print("\n".join(notes), file=sys.stderr)


@commands.command()
def stop(socket: Socket = None, json: Json = False) -> None:
    """Stop the daemon that `mount` or `serve` started."""
    from instantstart_fs.cli import own_daemon

    try:
        client = control.Client(socket)
    except DaemonUnreachable:
        print(show.as_json({"stopped": False}) if json else "there is no daemon to stop")
        return
    with client:
        own_daemon.stop(client)
    said = "stopped; what `mount` showed is back with the next `instantstart mount`"
    print(show.as_json({"stopped": True}) if json else said)


@commands.command()
def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="The last N lines.")] = 50,
    socket: Socket = None,
) -> None:
    """Show the daemon's log: of `mount` and `start`, or the service's."""
    from instantstart_fs.cli import own_daemon

    command = own_daemon.log_command(socket, follow, lines)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise InstantStartError(f"{command[0]} cannot be run: {error.strerror or error}") from error
