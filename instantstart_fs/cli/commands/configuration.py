"""`instantstart config`: show what holds, check a file, write one, print its schema. No daemon is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from instantstart_fs.cli import show
from instantstart_fs.cli.options import ConfigFile, Json, MountOption, StoreOption
from instantstart_fs.config import load_config
from instantstart_fs.core.humanize import number_of
from instantstart_fs.errors import InstantStartError, UsageError, printable, without_secrets

config = typer.Typer(
    help="The configuration: show, check, init, schema.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@config.command("show")
def show_config(
    file: ConfigFile = None, mount: MountOption = None, store: StoreOption = None, json: Json = False
) -> None:
    """Print every setting as the next start of the daemon would have it. Sizes in bytes, durations in seconds."""
    import msgspec

    loaded = msgspec.to_builtins(load_config(file, mount=mount, store=store))
    loaded["pipelines"] = sorted(spec["id"] for spec in loaded["pipelines"])
    if json:
        print(show.as_json(_shown(loaded)))
        return
    print(f"# {loaded.pop('file') or 'no file: these are the defaults'}")
    for key, value in _settings(loaded):
        print(without_secrets(printable(f"{key} = {value}")))


def _shown(value: Any) -> Any:
    """Return ``value`` with each text in it as it may be shown: an endpoint may hold a password."""
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def _settings(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    import json

    for key, value in table.items():
        if isinstance(value, dict) and set(value) == {"bytes", "fraction"}:
            shown = value["bytes"] if value["bytes"] is not None else f"{value['fraction']:.0%}"
            yield f"{prefix}{key}", json.dumps(shown)
        elif isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "not set" if value is None else json.dumps(value, ensure_ascii=False)


@config.command()
def check(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Default: the one in use.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say whether a file would be taken; if not, which key and why (exit 2)."""
    loaded = load_config(file)
    if json:
        print(show.as_json({"file": loaded.file, "pipelines": len(loaded.pipelines)}))
    else:
        what = number_of(len(loaded.pipelines), "pipeline")
        print(f"{printable(loaded.file)}: good, {what}" if loaded.file else "there is no file: the defaults hold")


@config.command()
def init(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Default: where the daemon looks.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if it is there: replaces it.")] = False,
) -> None:
    """Write a file with every key at its default, commented out."""
    from instantstart_fs.config.places import SYSTEM_CONFIG, default_mount, default_store, own_config
    from instantstart_fs.config.template import commented

    path = os.path.abspath(os.path.expanduser(file or (SYSTEM_CONFIG if os.geteuid() == 0 else own_config())))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w" if force else "x", encoding="utf-8") as out:
            out.write(commented(default_mount(), default_store()))
    except FileExistsError:
        raise UsageError(f"{printable(path)} is there already; --force replaces it") from None
    except OSError as error:
        raise InstantStartError(f"{printable(path)}: {error.strerror or error}") from error
    print(f"{printable(path)}: written; `instantstart config check` tests it after you change it")


@config.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors."""
    from instantstart_fs.config.loader import schema as of_file

    print(show.as_json(of_file()))
