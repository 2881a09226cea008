"""The commands. Each reads its arguments, asks the daemon (or becomes it), and shows the answer; no policy here."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from instantstart_fs.cli import completion, serving, show
from instantstart_fs.cli.verbs import Unnamed, VerbOrPipeline, Verbs
from instantstart_fs.control.client import Client
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.core.words import human_bytes
from instantstart_fs.errors import InstantStartError, UsageError, printable

app = typer.Typer(
    name="instantstart",
    cls=Verbs,
    help="Model weights on NVMe, read through a mount: add a pipeline, point the engine at its directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NewPipeline = Annotated[str, typer.Argument(metavar="PIPELINE", help="The pipeline's id.", show_default=False)]
Pipeline = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE", help="The pipeline's id.", show_default=False, autocompletion=completion.pipelines
    ),
]
Socket = Annotated[
    str | None,
    typer.Option("--socket", metavar="PATH", help="The daemon's socket (else $INSTANTSTART_SOCKET, else the default)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (see docs/CONFIGURATION.md).")]
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help="Configuration file.")]
MountOption = Annotated[str | None, typer.Option("--mount", metavar="DIR", help="Where to mount; wins over the file.")]
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="Where cached bytes lie; wins over the file.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from instantstart_fs import __version__

        print(f"instantstart {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Model weights on NVMe, read through a mount: add a pipeline, point the engine at its directory."""


# ---------------------------------------------------------------- the daemon


@app.command()
def serve(
    config: ConfigFile = None,
    mount: MountOption = None,
    store: StoreOption = None,
    socket: Socket = None,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
    log_format: Annotated[
        str,
        typer.Option("--log-format", metavar="FORMAT", envvar=serving.LOG_FORMAT, help="console or json."),
    ] = "console",
) -> None:
    """Run the daemon in the foreground; ready when the mount answers."""
    serving.serve(config, mount, store, socket, log_level, log_format)


@app.command()
def fsck(
    config: ConfigFile = None,
    store: StoreOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Hash every sealed file again.")] = False,
    json: Json = False,
) -> None:
    """Rebuild the index from the store (daemon stopped)."""
    from instantstart_fs.cli.waiting import fsck_progress
    from instantstart_fs.config import load_config
    from instantstart_fs.library.fsck import repair

    root = load_config(config, store=store).store.path
    if not os.path.isdir(root):
        raise InstantStartError(f"there is no store at {root}")
    with fsck_progress(quiet=json) as progress:
        found = repair(root, deep, progress)
    if json:
        print(show.as_json(found))
        return
    for problem in found.problems:
        print(f"  {problem}")
    print(
        f"{root}: {found.pipelines} pipelines, {found.sealed + found.unverified} complete files "
        f"({human_bytes(found.bytes)}) restored, {found.dropped} partial ones dropped, {found.orphans} orphans"
    )


@app.command()
def doctor(
    config: ConfigFile = None,
    mount: MountOption = None,
    store: StoreOption = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Check machine, store and origins; say what to do."""
    from instantstart_fs.doctor import diagnose, diagnose_configuration

    loaded, checks = diagnose_configuration(config, mount, store)
    if not json:
        _show_checks(checks)
    if loaded is not None:
        for check in diagnose(loaded, socket, adopt=not (config or mount or store)):
            checks.append(check)
            if not json:
                _show_checks([check])
    if json:
        print(show.as_json(checks))
    if any(check.outcome == "fail" for check in checks):
        raise typer.Exit(1)


def _show_checks(checks: list[Any]) -> None:
    for check in checks:
        print(f"{show.coloured(check.outcome, f'{check.outcome:<4}')}  {check.name:<12}  {check.found}", flush=True)
        if check.advice:
            print(f"      {'':<12}  → {check.advice}", flush=True)


# ---------------------------------------------------------------- pipelines


@app.command()
def add(
    pipeline: NewPipeline,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="hf://org/repo[@revision], s3://bucket/prefix or file:///directory.",
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
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these files; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these files; may be repeated.")
    ] = None,
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
        bool, typer.Option("--anonymous", help="Ask S3 without credentials: the bucket is public.")
    ] = False,
    requester_pays: Annotated[
        bool, typer.Option("--requester-pays", help="The bucket's requester pays: these credentials are charged.")
    ] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Start filling at once.")] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Resolve and pin a source, and show it under the mount."""
    from instantstart_fs.cli.specification import specification

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
    with Client(socket) as client:
        status = client.add(spec, warm=warm)
        _show_pinned(client, status, json, "filling has begun" if warm else "")


@app.command()
def update(pipeline: Pipeline, socket: Socket = None, json: Json = False) -> None:
    """Resolve the source again; switch if it changed."""
    with Client(socket) as client:
        before = client.status(pipeline, brief=True).generation
        status = client.update(pipeline)
        _show_pinned(client, status, json, "nothing has changed" if status.generation == before else "switched")


def _show_pinned(client: Client, status: PipelineStatus, json: bool, note: str) -> None:
    if json:
        print(show.as_json(_without_files(status)))
        return
    full = client.status(status.pipeline, brief=True)
    count, size = (full.listed.count, full.listed.size) if full.listed is not None else (0, 0)
    mounted = os.path.join(client.ping().mount, status.pipeline)
    print(f"{status.pipeline}: pinned generation {status.generation}{f' ({note})' if note else ''}")
    print(f"  source    {printable(' '.join(status.source))}")
    print(f"  revision  {printable(status.revision) or '-'}")
    print(f"  files     {count}, {human_bytes(size)} (an engine loads {human_bytes(status.total_bytes)})")
    if full.skipped is not None:
        print(f"  skipped   {show.skipped(full.skipped)}")
    for name, value in show.variants(full):
        print(f"  {name:<8}  {value}")
    print(f"  path      {mounted}")


@app.command()
def remove(
    pipeline: Pipeline,
    force: Annotated[bool, typer.Option("--force", help="Also while it is leased: the leases end.")] = False,
    socket: Socket = None,
) -> None:
    """Forget the pipeline and its bytes."""
    with Client(socket) as client:
        held = client.remove(pipeline, force=force)
    print(f"{pipeline}: removed")
    _show_held(held)


@app.command()
def evict(
    pipeline: Pipeline,
    force: Annotated[bool, typer.Option("--force", help="Also while it is leased or open: the leases end.")] = False,
    socket: Socket = None,
) -> None:
    """Drop the pipeline's bytes; it stays, cold."""
    with Client(socket) as client:
        held = client.evict(pipeline, force=force)
    print(f"{pipeline}: evicted, cold now")
    _show_held(held)


def _show_held(held: list[str]) -> None:
    if held:
        print(f"  still open  by {printable(', '.join(held))}: that space is free once they close it")


@app.command()
def pin(pipeline: Pipeline, socket: Socket = None) -> None:
    """Never evict it."""
    with Client(socket) as client:
        client.set_pinned(pipeline, True)
    print(f"{pipeline}: pinned")


@app.command()
def unpin(pipeline: Pipeline, socket: Socket = None) -> None:
    """Let it be evicted again when space is needed."""
    with Client(socket) as client:
        client.set_pinned(pipeline, False)
    print(f"{pipeline}: no longer pinned")


@app.command()
def touch(pipeline: Pipeline, socket: Socket = None) -> None:
    """Count a request now: it stays hot."""
    with Client(socket) as client:
        client.touch(pipeline)


@app.command()
def warm(
    pipeline: Pipeline,
    wait: Annotated[bool, typer.Option("--wait", help="Until all is there; shows progress.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every file, not only what an engine loads.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="These files too, from now on; chooses a variant. May repeat."),
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Fetch a pipeline's weights now."""
    from instantstart_fs.cli.waiting import wait_warm

    with Client(socket) as client:
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
        print(show.as_json(_without_files(status)))


@app.command()
def verify(
    pipeline: Pipeline,
    access: Annotated[
        bool, typer.Option("--access", help="Instead: may its credentials still fetch its source?")
    ] = False,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="SIZE", help="Read at most so much a second (200MB).")
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Hash what is cached again; heal what is wrong."""
    from instantstart_fs.cli.waiting import verify_progress
    from instantstart_fs.config.units import option, parse_rate

    if access:
        with Client(socket) as client:
            sources = client.check_access(pipeline)
        listed = printable(" ".join(sources))
        print(show.as_json({"sources": sources}) if json else f"{pipeline}: may be fetched: {listed}")
        return
    limit = None if rate is None else option("--rate", parse_rate, rate)
    with Client(socket) as client, verify_progress(pipeline, quiet=json) as progress:
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


@app.command(context_settings={"allow_interspersed_args": False})
def lease(
    pipeline: Pipeline,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
    socket: Socket = None,
) -> None:
    """Run a command that keeps the pipeline in use."""
    from instantstart_fs.cli.waiting import run_leased

    wanted = command[1:] if command[0] == "--" else command
    if not wanted:
        raise UsageError("lease needs a command: instantstart lease PIPELINE -- COMMAND…")
    with Client(socket) as client:
        status = run_leased(client, pipeline, wanted)
    raise typer.Exit(status)


@app.command()
def mark(
    pipeline: Pipeline,
    moment: Annotated[str, typer.Argument(metavar="MOMENT", help="requested, ready or first-token.")],
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="When it was: RFC 3339, or seconds since 1970 (now).")
    ] = None,
    socket: Socket = None,
) -> None:
    """Add an outside moment to a cold start."""
    from instantstart_fs.cli.timeline import marked, parse_moment, parse_time

    found = parse_moment(moment)
    at_ns = None if at is None else parse_time(at)
    with Client(socket) as client:
        client.mark(pipeline, found, at_ns)
        note = marked(client.cold_starts(pipeline), found) if found != "requested" else ""
    if note:
        print(f"instantstart: {note}", file=sys.stderr)


staging = typer.Typer(cls=VerbOrPipeline, help="Bring a pipeline's weights into GPU (or CPU) memory.")
app.add_typer(staging, name="prefetch")


@staging.command(
    cls=Unnamed,
    hidden=True,
    epilog="""What --hold keeps:

    \b
    instantstart prefetch status [PIPELINE]  Show it.
    instantstart prefetch release PIPELINE   End it, and free its memory.

    A pipeline that has the name of a verb: instantstart prefetch -- status""",
)
def prefetch(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="The pipeline's id.",
            show_default=False,
            autocompletion=completion.verbs_and_pipelines,
        ),
    ],
    devices: Annotated[
        str, typer.Option("--devices", metavar="LIST", help="cuda:0,cuda:1 ... or cpu; auto: every GPU, else the CPU.")
    ] = "auto",
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel", metavar="N", min=1, max=65536, help="Ranks that will load (default: the devices)."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="auto, direct, mmap, or gds (tried first if named).")
    ] = "auto",
    readers: Annotated[
        int,
        typer.Option(
            "--readers", metavar="N", min=0, max=256, help="Reading threads of each device (0: the backend's choice)."
        ),
    ] = 0,
    deadline: Annotated[
        list[str] | None,
        typer.Option("--deadline", metavar="MODEL=SECONDS", help="Wanted by then; earliest first; may be repeated."),
    ] = None,
    what_fits: Annotated[
        bool, typer.Option("--what-fits", help="Leave models out that do not fit, rather than refuse.")
    ] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Keep the weights for engines to take over.")] = False,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="How long to hold at most; 0s: no limit.")
    ] = "1h",
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Bring a pipeline's weights into GPU (or CPU) memory."""
    from instantstart_fs.cli import prefetching
    from instantstart_fs.config.units import option, parse_duration

    prefetching.run(
        pipeline,
        devices=devices,
        tensor_parallel=tensor_parallel,
        backend=backend,
        readers=readers,
        deadlines=deadline or (),
        what_fits=what_fits,
        hold=hold,
        timeout=option("--timeout", parse_duration, timeout),
        socket=socket,
        quiet=json,
        on_staged=lambda stage: print(
            show.as_json([report._asdict() for report in stage.progress()]) if json else prefetching.table(stage),
            flush=True,
        ),
    )


@staging.command("status")
def hold_status(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE",
            help="All that this user holds if left out.",
            show_default=False,
            autocompletion=completion.held,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what `prefetch --hold` keeps, of one pipeline or of all."""
    from instantstart_fs.cli import prefetching

    if pipeline is not None:
        found = prefetching.hold_status(pipeline)
        print(show.as_json(prefetching.plain(found)) if json else prefetching.show_hold(found))
        return
    every, silent = prefetching.hold_statuses()
    if json:
        print(show.as_json([prefetching.plain(found) for found in every]))
    else:
        print("\n".join(map(prefetching.show_hold, every)) or "nothing is held")
    for error in silent:
        print(f"instantstart: {error.message}", file=sys.stderr)
    if silent:
        raise typer.Exit(1)


@staging.command("release")
def hold_release(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="The pipeline's id.", show_default=False, autocompletion=completion.held
        ),
    ],
) -> None:
    """End what `prefetch --hold` keeps of a pipeline; returns when its memory is free."""
    from instantstart_fs.cli import prefetching

    prefetching.release(pipeline)
    print(f"{pipeline}: released")


# ---------------------------------------------------------------- looking


@app.command()
def explain(
    pipeline: Pipeline,
    count: Annotated[int, typer.Option("--last", "-n", metavar="N", min=1, help="How many cold starts.")] = 5,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show the last cold starts as timelines: where the time went."""
    from instantstart_fs.cli import timeline
    from instantstart_fs.core.coldstart import as_plain

    with Client(socket) as client:
        found = client.cold_starts(pipeline)[:count]
    if json:
        print(show.as_json([as_plain(record) for record in found]))
    else:
        timeline.draw(pipeline, found)


@app.command()
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
    socket: Socket = None,
    json: Json = False,
) -> None:
    """List the pipelines and what of them is cached."""
    _ls(pipelines or [], socket, json)


def _ls(wanted: list[str], socket: str | None, json: bool) -> None:
    with Client(socket) as client:
        found = show.chosen(client.pipelines(), wanted)
    print(show.as_json([_without_files(status) for status in found]) if json else show.pipelines(found))


@app.command()
def status(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE",
            help="All of them if left out.",
            show_default=False,
            autocompletion=completion.pipelines,
        ),
    ] = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Show state, rate and last error of one, or of all."""
    if pipeline is None:
        _ls([], socket, json)
        if not json:
            with Client(socket) as client:
                print(f"\n{show.mounted(client.ping())}")
        return
    with Client(socket) as client:
        found = client.status(pipeline)
    print(show.as_json(found) if json else show.pipeline(found))


def _without_files(found: PipelineStatus) -> PipelineStatus:

    return found.brief
