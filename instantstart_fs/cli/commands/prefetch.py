"""Commands about weights in GPU (or CPU) memory: prefetch, and status and release of what it holds."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from instantstart_fs.cli import completion, show
from instantstart_fs.cli.options import Json, Socket
from instantstart_fs.cli.verbs import Unnamed, VerbOrPipeline

commands = typer.Typer(cls=VerbOrPipeline, help="Bring a pipeline's weights into GPU (or CPU) memory.")


@commands.command(
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
    from instantstart_fs.cli import prefetch_run
    from instantstart_fs.config.units import option, parse_duration

    prefetch_run.run(
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
            show.as_json([report._asdict() for report in stage.progress()]) if json else prefetch_run.table(stage),
            flush=True,
        ),
    )


@commands.command("status")
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
    from instantstart_fs.cli import prefetch_run

    if pipeline is not None:
        found = prefetch_run.hold_status(pipeline)
        print(show.as_json(prefetch_run.plain(found)) if json else prefetch_run.show_hold(found))
        return
    every, silent = prefetch_run.hold_statuses()
    if json:
        print(show.as_json([prefetch_run.plain(found) for found in every]))
    else:
        print("\n".join(map(prefetch_run.show_hold, every)) or "nothing is held")
    for error in silent:
        print(f"instantstart: {error.message}", file=sys.stderr)
    if silent:
        raise typer.Exit(1)


@commands.command("release")
def hold_release(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="The pipeline's id.", show_default=False, autocompletion=completion.held
        ),
    ],
) -> None:
    """End what `prefetch --hold` keeps of a pipeline; returns when its memory is free."""
    from instantstart_fs.cli import prefetch_run

    prefetch_run.release(pipeline)
    print(f"{pipeline}: released")
