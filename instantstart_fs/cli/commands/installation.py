"""`instantstart service`: the daemon as a service of systemd."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import Json

service = typer.Typer(
    help="The daemon as a service of systemd.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Root = Annotated[
    str, typer.Option("--root", metavar="DIR", help="Only the files, below DIR (for images and packages).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say each step and do none.")]


def _say(step: str) -> None:
    print(step, flush=True)


@service.command()
def install(
    no_start: Annotated[bool, typer.Option("--no-start", help="Enable it and start nothing.")] = False,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="DIR", help="The environment that the service runs (default: this one's)."),
    ] = None,
    root: Root = "",
    dry_run: DryRun = False,
) -> None:
    """Put it in place and start it, or upgrade it.

    What runs is restarted: with passthrough its readers see a pause, else files that are open fail.
    """
    from instantstart_fs.installation import service as installed

    installed.install(_say, prefix=prefix, root=root, start=not no_start, dry=dry_run)
    if not root and not dry_run:
        _show(installed.status())


@service.command()
def uninstall(
    purge: Annotated[bool, typer.Option("--purge", help="The cached bytes and the configuration, too.")] = False,
    root: Root = "",
    dry_run: DryRun = False,
) -> None:
    """Stop it and take its files away. The store and the configuration stay."""
    from instantstart_fs.installation import service as installed

    for left in installed.uninstall(_say, root=root, purge=purge, dry=dry_run):
        print(f"kept    {left}")


@service.command()
def status(json: Json = False) -> None:
    """What is installed, and whether it runs. Exit 1 where it does not."""
    from instantstart_fs.installation import service as installed

    found = installed.status()
    if json:
        print(show.as_json(found))
    else:
        _show(found)
    if found.active != "active":
        raise typer.Exit(1)


def _show(found: Any) -> None:
    if not found.installed:
        print("the service is not installed: `instantstart service install`, as root")
        return
    stale = "" if found.current else "  (of another version, or edited: `instantstart service install` renews it)"
    lines = (
        ("unit", f"{found.unit}{stale}"),
        ("program", f"{found.prefix}/bin/instantstart"),
        ("at boot", found.enabled),
        ("now", found.active),
        ("says", found.says),
        ("store", found.store),
    )
    for name, value in lines:
        if value:
            print(f"{name:<9}{value}")
