"""Commands about the daemon and its machine: serve, fsck, doctor. Only ``serve`` runs the daemon."""

from __future__ import annotations

import itertools
import os
from typing import Annotated, Any

import typer

from instantstart_fs.cli import serve as daemon_process
from instantstart_fs.cli import show
from instantstart_fs.cli.options import ConfigFile, Json, MountOption, Socket, StoreOption
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.errors import InstantStartError

commands = typer.Typer()


@commands.command()
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
        typer.Option("--log-format", metavar="FORMAT", envvar=daemon_process.LOG_FORMAT, help="console or json."),
    ] = "console",
) -> None:
    """Run the daemon in the foreground until SIGTERM."""
    daemon_process.run(config, mount, store, socket, log_level, log_format)


@commands.command()
def fsck(
    config: ConfigFile = None,
    store: StoreOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Hash every sealed file again.")] = False,
    json: Json = False,
) -> None:
    """Rebuild the index from the store (daemon stopped)."""
    from instantstart_fs.cli.long_commands import fsck_progress
    from instantstart_fs.config import load_config
    from instantstart_fs.upkeep.fsck import repair

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


@commands.command()
def doctor(
    config: ConfigFile = None,
    mount: MountOption = None,
    store: StoreOption = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Check machine, store and origins; say what to do."""
    from instantstart_fs.doctor import Check, diagnose, diagnose_configuration
    from instantstart_fs.prefetch.gpus import check_gpus

    loaded, checks = diagnose_configuration(config, mount, store)
    if not json:
        _show_checks(checks)
    if loaded is not None:
        gpus = (Check(*finding) for finding in check_gpus())
        for check in itertools.chain(diagnose(loaded, socket, adopt=not (config or mount or store)), gpus):
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
