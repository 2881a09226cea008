"""Arguments and options that several commands share. What only one command takes stands at that command."""

from __future__ import annotations

from typing import Annotated

import typer

from instantstart_fs.cli import completion

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
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these files; may be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these files; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (see docs/CONFIGURATION.md).")]
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help="Configuration file.")]
MountOption = Annotated[str | None, typer.Option("--mount", metavar="DIR", help="Where to mount; wins over the file.")]
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="Where cached bytes lie; wins over the file.")
]
