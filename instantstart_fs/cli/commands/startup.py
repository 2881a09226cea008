"""Commands of a replica's start: run, and the startup caches that it restores and saves."""

from __future__ import annotations

from typing import Annotated

import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import Json, Pipeline, Socket
from instantstart_fs.cli.verbs import command_after
from instantstart_fs.control import client as control
from instantstart_fs.errors import printable

commands = typer.Typer()


@commands.command(context_settings={"allow_interspersed_args": False})
def run(
    pipeline: Pipeline,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="vllm, sglang, tensorrt-llm or none (else by the command).")
    ] = "",
    ready_url: Annotated[str, typer.Option("--ready-url", metavar="URL", help="Ready once this says 200.")] = "",
    ready_log: Annotated[
        str, typer.Option("--ready-log", metavar="REGEX", help="Ready once a line of its output matches.")
    ] = "",
    ready_file: Annotated[str, typer.Option("--ready-file", metavar="PATH", help="Ready once it is written.")] = "",
    ready_timeout: Annotated[
        str, typer.Option("--ready-timeout", metavar="TIME", help="Watch no longer than this (1h; 0s: no limit).")
    ] = "",
    probe: Annotated[
        str, typer.Option("--probe", metavar="URL", help="Once ready, ask this for a first token; auto: the engine's.")
    ] = "",
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache", metavar="NAME", help="Keep one more cache: a variable that names a directory, or its path."
        ),
    ] = None,
    cache_dir: Annotated[
        str, typer.Option("--cache-dir", metavar="DIR", help="Below which the engine's private directory is made.")
    ] = "",
    no_restore: Annotated[bool, typer.Option("--no-restore", help="Restore no startup cache.")] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Save none.")] = False,
    no_stage: Annotated[bool, typer.Option("--no-stage", help="Do not read the weights ahead.")] = False,
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="Hold the weights in GPU memory meanwhile (prefetch --hold).")
    ] = False,
    report: Annotated[
        str, typer.Option("--report", metavar="FILE", help="Write where the time went there, as JSON.")
    ] = "",
    requested_at: Annotated[
        str, typer.Option("--requested-at", metavar="TIME", help="When this replica was asked for: as `mark --at`.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what went wrong.")] = False,
    socket: Socket = None,
) -> None:
    """Start a replica: lease, startup caches, its command."""
    from instantstart_fs.startup.options import FLAGS, LISTS, VALUES, Options
    from instantstart_fs.startup.run import run as run_command

    wanted = Options(pipeline, command_after(command, "run", [*FLAGS, *LISTS, *VALUES]))
    wanted.engine, wanted.ready_url, wanted.ready_log, wanted.ready_file = engine, ready_url, ready_log, ready_file
    wanted.ready_timeout, wanted.probe, wanted.caches, wanted.cache_dir = ready_timeout, probe, cache or [], cache_dir
    wanted.no_restore, wanted.no_save, wanted.no_stage, wanted.prefetch = no_restore, no_save, no_stage, prefetch
    wanted.report, wanted.requested_at, wanted.quiet, wanted.socket = report, requested_at, quiet, socket or ""
    raise typer.Exit(run_command(wanted))


caches = typer.Typer(help="What engines compiled at earlier starts.", no_args_is_help=True)


@caches.command("ls")
def startup_ls(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """List the versions of a pipeline's startup cache."""
    from instantstart_fs.cli import startupcaches

    with control.Client(socket) as client:
        found = client.startup_caches(pipeline)
    print(show.as_json(found) if json else startupcaches.table(pipeline, found))


@caches.command("explain", context_settings={"allow_interspersed_args": False})
def startup_explain(
    pipeline: Pipeline,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Compare with what this would need.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", metavar="NAME", help="As for `run`.")] = "",
    cache: Annotated[list[str] | None, typer.Option("--cache", metavar="NAME", help="As for `run`.")] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Say what each version depends on; with a command, which one its start would restore, and why not the others."""
    from instantstart_fs.cli import startupcaches

    wanted = command[1:] if command and command[0] == "--" else command or []
    with control.Client(socket) as client:
        found = client.startup_caches(pipeline)
        key = startupcaches.key_for(client, pipeline, wanted, engine, cache or []) if wanted else None
    document = startupcaches.explained(found, key)
    print(show.as_json(document) if json else startupcaches.in_words(pipeline, document))


@caches.command("verify")
def startup_verify(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Read a pipeline's startup caches again; delete what is damaged."""
    with control.Client(socket) as client:
        found = client.startup_verify(pipeline)
    if json:
        print(show.as_json(found))
    else:
        print(f"{pipeline}: {found.read} versions read again")
        for number, reason in found.damaged.items():
            print(f"  damaged  {number}: {printable(reason)} (deleted)")
    if found.damaged:
        raise typer.Exit(1)


@caches.command("rm")
def startup_rm(
    pipeline: Pipeline,
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="[NUMBER]...", help="All of them if left out.", show_default=False)
    ] = None,
    socket: Socket = None,
) -> None:
    """Delete versions of a pipeline's startup cache."""
    with control.Client(socket) as client:
        count = client.startup_remove(pipeline, numbers or [])
    print(f"{pipeline}: {count} startup {'cache' if count == 1 else 'caches'} removed")
