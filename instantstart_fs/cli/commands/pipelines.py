"""Commands that change a pipeline or fetch its bytes: add, update, remove, evict, pin, touch, warm, verify, lease."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import msgspec
import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import Exclude, Include, Json, NewPipeline, Pipeline, Socket
from instantstart_fs.cli.verbs import command_after
from instantstart_fs.control import client as control
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import InstantStartError, UsageError, printable

commands = typer.Typer()


@commands.command()
def add(
    pipeline: NewPipeline,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="org/repo or its web address, hf://org/repo/FILE.gguf, s3://bucket/prefix or a directory.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=SOURCE", help="Instead of SOURCE: a named model; may be repeated."),
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="UID:GID", help="Who owns its files (default: you).")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="MODE", help="Mode of its directories.")] = "0555",
    include: Include = None,
    exclude: Exclude = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", metavar="FILE", help="The hub token of this pipeline.")
    ] = None,
    aws_profile: Annotated[
        str | None, typer.Option("--aws-profile", metavar="PROFILE", help="The AWS profile of this pipeline.")
    ] = None,
    endpoint_url: Annotated[
        str | None, typer.Option("--endpoint-url", metavar="URL", help="The S3 endpoint of this pipeline.")
    ] = None,
    quota: Annotated[
        str | None, typer.Option("--quota", metavar="SIZE", help="How much of the disk it may take, such as 50GiB.")
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Ask without credentials: the source is public.")
    ] = False,
    requester_pays: Annotated[
        bool, typer.Option("--requester-pays", help="The bucket's requester pays: these credentials are charged.")
    ] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Start filling at once.")] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Pin a source and show it under the mount."""
    from instantstart_fs.control.specification import specification

    if source is None and not model and "/" in pipeline:
        raise UsageError("the id that you choose comes first, then the source: instantstart add my-llm org/repo")
    spec = specification(
        pipeline,
        source,
        tuple(model or ()),
        owner=owner,
        mode=mode,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        token_file=token_file,
        aws_profile=aws_profile,
        endpoint_url=endpoint_url,
        anonymous=anonymous,
        requester_pays=requester_pays,
        quota=quota,
    )
    with control.Client(socket) as client:
        status = client.add(spec, warm=warm)
        _show_pinned(client, status, json, "filling has begun" if warm else "")


@commands.command()
def update(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Resolve the source again; switch if it changed."""
    with control.Client(socket) as client:
        before = client.status(pipeline, brief=True).generation
        status = client.update(pipeline)
        _show_pinned(client, status, json, "nothing has changed" if status.generation == before else "switched")


def _show_pinned(client: control.Client, status: PipelineStatus, json: bool, note: str) -> None:
    if json:
        print(show.as_json(status.brief))
        return
    print(f"{status.pipeline}: generation {status.generation}{f' ({note})' if note else ''}")
    try:
        full = client.status(status.pipeline, brief=True)
        mounted = os.path.join(client.ping().mount, status.pipeline)
    except InstantStartError as error:  # what was done stays done
        print(f"instantstart: {status.pipeline}: no more can be said of it: {error.message}", file=sys.stderr)
        return
    count, size = (full.listed.count, full.listed.size) if full.listed is not None else (0, 0)
    print(f"  source    {printable(' '.join(status.source))}")
    print(f"  revision  {printable(status.revision) or '-'}")
    print(f"  files     {count}, {human_bytes(size)} (an engine loads {human_bytes(status.total_bytes)})")
    if full.skipped is not None:
        print(f"  skipped   {show.skipped(full.skipped)}")
    for name, value in show.variants(full):
        print(f"  {name:<8}  {value}")
    print(f"  path      {mounted}")


@commands.command()
def remove(
    pipeline: Pipeline,
    force: Annotated[bool, typer.Option("--force", help="Even if it is leased; ends the leases.")] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Remove a pipeline and its bytes."""
    with control.Client(socket) as client:
        held = client.remove(pipeline, force=force)
    _show_freed(pipeline, "removed", held, json)


@commands.command()
def evict(
    pipeline: Pipeline,
    force: Annotated[bool, typer.Option("--force", help="Even if it is leased or open; ends the leases.")] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Evict a pipeline's bytes; it stays, cold."""
    with control.Client(socket) as client:
        held = client.evict(pipeline, force=force)
    _show_freed(pipeline, "evicted, cold now", held, json)


def _show_freed(pipeline: str, done: str, held: list[str], json: bool) -> None:
    """Print what was done. ``held``: who still has files open, whose space is free later."""
    if json:
        print(show.as_json({"pipeline": pipeline, "open_by": held}))
        return
    print(f"{pipeline}: {done}")
    if held:
        print(f"  {show.still_open(held)}")


@commands.command()
def pin(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Never evict a pipeline."""
    _set_pinned(pipeline, True, "pinned", socket, json)


@commands.command()
def unpin(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Let a pipeline be evicted again when space is needed."""
    _set_pinned(pipeline, False, "no longer pinned", socket, json)


def _set_pinned(pipeline: str, pinned: bool, done: str, socket: str | None, json: bool) -> None:
    with control.Client(socket) as client:
        if json:
            before = client.status(pipeline, brief=True)
            client.set_pinned(pipeline, pinned)
            _show_changed(client, msgspec.structs.replace(before, pinned=pinned), done)
        else:
            client.set_pinned(pipeline, pinned)
            print(f"{pipeline}: {done}")


@commands.command()
def touch(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Count a request now, so that the pipeline stays hot."""
    with control.Client(socket) as client:
        if json:
            before = client.status(pipeline, brief=True)
            client.touch(pipeline)
            _show_changed(client, before, "touched")
        else:
            client.touch(pipeline)


def _show_changed(client: control.Client, known: PipelineStatus, done: str) -> None:
    """Print the status after a change; ``known``, where it cannot be had any more: what was done stays done."""
    try:
        status = client.status(known.pipeline, brief=True)
    except InstantStartError as error:
        status = known
        print(f"instantstart: {known.pipeline}: {done}; its status is from before: {error.message}", file=sys.stderr)
    print(show.as_json(status.brief))


@commands.command()
def warm(
    pipeline: Pipeline,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until everything is cached; shows progress.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every file, not only what an engine loads.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="These files too, from now on; chooses a variant. May repeat."),
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Fetch a pipeline's weights now."""
    from instantstart_fs.cli.long_commands import wait_warm

    with control.Client(socket) as client:
        if include:
            client.include(pipeline, include)
        if wait:
            status = wait_warm(client, pipeline, everything, quiet=json)
        else:
            status = client.warm(pipeline, everything=everything)
            if not json:
                print(
                    f"{pipeline}: {status.state}, {human_bytes(status.cached_bytes)} of "
                    f"{human_bytes(status.total_bytes)}"
                )
    if json:
        print(show.as_json(status.brief))


@commands.command()
def verify(
    pipeline: Pipeline,
    access: Annotated[
        bool, typer.Option("--access", help="Check instead whether its credentials may still fetch its source.")
    ] = False,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="SIZE", help="Read at most SIZE a second, such as 200MB.")
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Hash cached files again; repair what is wrong."""
    from instantstart_fs.cli.long_commands import verify_progress
    from instantstart_fs.config.units import option, parse_rate

    if access:
        with control.Client(socket) as client:
            sources = client.check_access(pipeline)
        listed = printable(" ".join(sources))
        print(show.as_json({"sources": sources}) if json else f"{pipeline}: may be fetched: {listed}")
        return
    limit = None if rate is None else option("--rate", parse_rate, rate)
    with control.Client(socket) as client, verify_progress(pipeline, quiet=json) as progress:
        found = client.verify(pipeline, progress, rate=limit)
    if json:
        print(show.as_json(found))
    else:
        print(f"{pipeline}: {found.files} complete files, {human_bytes(found.bytes)} read again")
        if found.unproven:
            print(f"  unproven  {len(found.unproven)} of them: their origin offers nothing to prove them by")
        for path in found.healed:
            print(f"  wrong     {printable(path)} (dropped; it is fetched again)")
    if found.healed:
        wrong = f"{pipeline}: {len(found.healed)} files did not hold the bytes that were sealed"
        if json:
            # stdout holds the report already: one JSON document, not two
            print(f"instantstart: {wrong}", file=sys.stderr)
            raise typer.Exit(1)
        raise InstantStartError(wrong)


@commands.command(context_settings={"allow_interspersed_args": False})
def lease(
    pipeline: Pipeline,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
    socket: Socket = None,
) -> None:
    """Run a command that keeps the pipeline in use."""
    from instantstart_fs.cli.long_commands import run_leased

    wanted = command_after(command, "lease", ("--socket",))
    with control.Client(socket) as client:
        status = run_leased(client, pipeline, wanted)
    raise typer.Exit(status)
