"""`instantstart regional`: the region's tier, looked at and cleaned from any host. Asks the tier itself; of the daemon
it wants the pipelines' names, and does without where none runs."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from instantstart_fs.cli import completion
from instantstart_fs.cli.options import ConfigFile, Json, Pipeline, Socket
from instantstart_fs.errors import InstantStartError, PipelineNotFound, UsageError

if TYPE_CHECKING:
    from instantstart_fs.core.manifest import PipelineSpec
    from instantstart_fs.filler.region_follow import RegionSettings

commands = typer.Typer(help="The region's tier of weights ([regional]).", no_args_is_help=True)


def _region(config: str | None) -> tuple[RegionSettings, float, tuple[PipelineSpec, ...]]:
    from instantstart_fs.config import load_config
    from instantstart_fs.filler.region_settings import region_settings

    loaded = load_config(config)
    if loaded.regional is None:
        raise UsageError("there is no [regional] in the configuration; see docs/CONFIGURATION.md")
    return region_settings(loaded.regional), loaded.eviction.keep_hot, loaded.pipelines


def _specs(configured: tuple[PipelineSpec, ...], socket: str | None) -> dict[str, PipelineSpec]:
    from instantstart_fs.control.client import Client

    found = {spec.id: spec for spec in configured}
    with contextlib.suppress(InstantStartError), Client(socket) as client:  # no daemon: what the file says is known
        found |= {spec.id: spec for spec in client.specs()}
    return found


def _slot(region: RegionSettings, specs: dict[str, PipelineSpec], pipeline: str) -> str:
    if pipeline not in specs:
        raise PipelineNotFound(f"{pipeline}: neither the configuration nor a running daemon knows it")
    return region.key.slot(specs[pipeline])


@commands.command("ls")
def regional_ls(config: ConfigFile = None, socket: Socket = None, json: Json = False) -> None:
    """List what the tier holds: slots, their files and bytes, when they were last used."""
    from datetime import UTC, datetime

    from instantstart_fs.cli import show
    from instantstart_fs.core.humanize import human_bytes
    from instantstart_fs.regional import hygiene

    region, _, configured = _region(config)
    names = {region.key.slot(spec): name for name, spec in _specs(configured, socket).items()}
    found = hygiene.summaries(region.stores[0], names)
    if json:
        print(show.as_json(found))
        return
    for slot in found:
        used = datetime.fromtimestamp(slot.used, UTC).strftime("%Y-%m-%d %H:%M")
        print(
            f"{slot.pipeline or slot.slot:<32}  {human_bytes(slot.bytes):>10}  "
            f"{slot.sealed}/{slot.files} files sealed  {slot.claims} claims  last used {used} UTC"
        )


@commands.command("status")
def regional_status(
    pipeline: Annotated[
        str | None,
        typer.Argument(metavar="[PIPELINE]", help="List the hosts that hold it.", autocompletion=completion.pipelines),
    ] = None,
    config: ConfigFile = None,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Say whether the tier can be used from here (exit 1 if not), or which hosts hold a pipeline."""
    from instantstart_fs.cli import show
    from instantstart_fs.regional.probe import WRITERS, probe

    region, _, configured = _region(config)
    store = region.stores[0]
    if pipeline is not None:
        _show_hosts(region, _slot(region, _specs(configured, socket), pipeline), pipeline, socket, json=json)
        return
    found = probe(store)
    if json:
        print(show.as_json({"endpoint": store.endpoint, "single_winner": found.winners == 1, "skew": found.skew}))
    else:
        claims = "one pull" if found.winners == 1 else f"{found.winners} of {WRITERS} writers win: hosts may pull twice"
        print(f"{store.scheme}://{store.endpoint}: reads and writes; {claims}")


def _show_hosts(region: RegionSettings, slot: str, pipeline: str, socket: str | None, *, json: bool) -> None:
    from instantstart_fs.cli import show
    from instantstart_fs.control.client import Client
    from instantstart_fs.core.humanize import human_bytes, human_seconds
    from instantstart_fs.regional.heartbeats import HeartbeatReader
    from instantstart_fs.regional.hygiene import now_of

    store, revision = region.stores[0], None
    with contextlib.suppress(InstantStartError), Client(socket) as client:  # no daemon: nobody knows what is current
        revision = region.key.revision(slot, client.status(pipeline, brief=True).revision)
    now: float | None = None
    with contextlib.suppress(InstantStartError):  # one that takes no writes: the newest heartbeat tells the time
        now = now_of(store)
    reader = HeartbeatReader(store, region.key)
    look = reader.look(now)
    hosts = reader.holding(slot, look.now, revision)
    if json:
        print(
            show.as_json(
                {
                    "pipeline": pipeline,
                    "hosts": [msgspec.to_builtins(host) for host in hosts],
                    "live_hosts": look.hosts,
                    "unread": look.unread,
                }
            )
        )
        return
    for host in hosts:
        amount = f"{human_bytes(host.cached_bytes)} of {human_bytes(host.total_bytes)}"
        other = "  another revision" if host.current is False else ""
        print(
            f"{host.host:<32}  {show.coloured(host.state, f'{host.state:<10}')}  {host.percent:>3} %  {amount:<22}  "
            f"seen {human_seconds(host.age)} ago{other}"
        )
    whole = sum(host.percent == 100 for host in hosts)
    unread = f"; {look.unread} could not be read" if look.unread else ""
    print(f"{pipeline}: whole on {whole} of {look.hosts} hosts, in part on {len(hosts) - whole}{unread}")


@commands.command("warm")
def regional_warm(pipeline: Pipeline, config: ConfigFile = None, socket: Socket = None, json: Json = False) -> None:
    """Have this host's daemon fill a pipeline and, through it, the tier; wait until the tier has it. Exit 1 if not."""
    from instantstart_fs.cli import long_commands, show
    from instantstart_fs.control.client import Client

    _region(config)
    with Client(socket) as client:
        long_commands.wait_warm(client, pipeline, True, quiet=json)
        with long_commands.verify_progress(f"{pipeline}: to the tier", quiet=json) as report:
            state = long_commands.wait_written(client, pipeline, report)
    if json:
        print(show.as_json(state))
    else:
        print(f"{pipeline}: the tier has {state.sealed} of {state.files} files whole")
    if (state.sealed or 0) < state.files:
        why = state.tier.why or "this host had them before it had a tier; `instantstart evict` and this command again"
        print(f"instantstart: what is missing was not written to the tier ({why})", file=sys.stderr)
        raise typer.Exit(1)


@commands.command("verify")
def regional_verify(
    pipeline: Pipeline,
    config: ConfigFile = None,
    socket: Socket = None,
    json: Json = False,
    drop_unproven: Annotated[
        bool,
        typer.Option(
            "--drop-unproven", help="Delete chunks of files that no host has proven, unless one fills the file now."
        ),
    ] = False,
) -> None:
    """Read a pipeline's files in the tier again; delete what is damaged. Exit 1 if anything was."""
    from instantstart_fs.cli import show
    from instantstart_fs.cli.long_commands import verify_progress
    from instantstart_fs.core.humanize import human_bytes
    from instantstart_fs.regional import hygiene

    region, _, configured = _region(config)
    slot = _slot(region, _specs(configured, socket), pipeline)
    with verify_progress(pipeline, quiet=json) as report:
        found = hygiene.verify(region.stores[0], region.key, slot, report, drop_unproven=drop_unproven)
    if json:
        print(show.as_json(found))
    else:
        print(f"{pipeline}: {found.chunks} chunks read again, {human_bytes(found.bytes)}; {len(found.damaged)} damaged")
        for name in found.damaged:
            print(f"  damaged  {name} (deleted)")
        if found.dropped:
            print(f"  {found.dropped} chunks of files that no host had proven were deleted")
        if found.unproven:
            print(f"  {found.unproven} chunks are of files that no host has proven yet (see --drop-unproven)")
    if found.damaged:
        raise typer.Exit(1)


@commands.command("gc")
def regional_gc(
    config: ConfigFile = None,
    json: Json = False,
    keep_hot: Annotated[
        str | None, typer.Option("--keep-hot", metavar="TIME", help="Instead of [eviction] keep_hot.")
    ] = None,
    capacity: Annotated[
        str | None, typer.Option("--capacity", metavar="SIZE", help="Instead of [regional] capacity.")
    ] = None,
) -> None:
    """Remove what was not used for [eviction] keep_hot: all of it, or with a capacity, above the store's high watermark
    of that, what was used longest ago, down to the low one. And what dead hosts left."""
    from instantstart_fs.cli import show
    from instantstart_fs.cli.long_commands import verify_progress
    from instantstart_fs.config import load_config
    from instantstart_fs.config.units import parse_duration, parse_size
    from instantstart_fs.core.humanize import human_bytes
    from instantstart_fs.regional import hygiene
    from instantstart_fs.regional.heartbeats import HeartbeatReader

    region, hot, _ = _region(config)
    loaded = load_config(config)
    assert loaded.regional is not None
    store = region.stores[0]
    reader = HeartbeatReader(store, region.key)
    reader.look(hygiene.now_of(store))
    rules = hygiene.Rules(
        parse_duration(keep_hot) if keep_hot is not None else hot,
        parse_size(capacity) if capacity is not None else loaded.regional.capacity,
        loaded.store.low_watermark,
        loaded.store.high_watermark,
        frozenset(reader.filling()),
    )
    with verify_progress("regional gc", quiet=json) as report:
        found = hygiene.collect(store, rules, report)
    if json:
        print(show.as_json(found))
    else:
        print(
            f"{found.slots} slots removed, {human_bytes(found.bytes)}; {found.claims} dead claims, {found.left} left "
            f"half-written, {found.hosts} hosts long gone; {found.kept_in_use} in use"
        )


@commands.command("remove")
def regional_remove(pipeline: Pipeline, config: ConfigFile = None, socket: Socket = None, json: Json = False) -> None:
    """Remove all that the tier holds of a pipeline. Hosts keep what they have."""
    from instantstart_fs.cli import show
    from instantstart_fs.cli.long_commands import verify_progress
    from instantstart_fs.core.humanize import human_bytes
    from instantstart_fs.regional import hygiene

    region, _, configured = _region(config)
    slot = _slot(region, _specs(configured, socket), pipeline)
    with verify_progress(pipeline, quiet=json) as report:
        found = hygiene.remove(region.stores[0], slot, report)
    print(show.as_json(found) if json else f"{pipeline}: {found.objects} objects, {human_bytes(found.bytes)} removed")
