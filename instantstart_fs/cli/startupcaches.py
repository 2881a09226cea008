"""`startup-cache ls` and `explain`: what there is, and which of it a start would get."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from instantstart_fs.cli.show import human_time
from instantstart_fs.cli.show import table as columns
from instantstart_fs.control.client import Client
from instantstart_fs.core.enginetable import differences, engine_named, engine_of
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.core.startupcache import StartupRecord, whole_key
from instantstart_fs.errors import printable
from instantstart_fs.startup.surroundings import key_of

SHOWN = 60
"""Characters of a value."""


def table(pipeline: str, records: Sequence[StartupRecord]) -> str:
    if not records:
        return f"{pipeline}: no startup cache; the first `instantstart run {pipeline} -- …` makes one"
    rows = [
        (
            str(record.number),
            _time(record.saved_at_ns),
            record.engine or "-",
            ", ".join(record.layouts),
            str(record.files),
            human_bytes(record.size),
            str(record.uid),
        )
        for record in records
    ]
    return columns(("version", "saved", "engine", "caches", "files", "size", "uid"), rows)


def _time(at_ns: int) -> str:
    return human_time(datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat())


def key_for(
    client: Client, pipeline: str, command: Sequence[str], engine: str, caches: Sequence[str]
) -> dict[str, str]:
    """Return the key that a start of this command, by this user, on this machine, would ask for, as `run` does."""
    found = engine_of(command) if not engine else engine_named(engine)
    status = client.status(pipeline, brief=True)
    return whole_key(
        key_of(command, found, os.environ, caches),
        uid=os.geteuid(),
        generation=status.generation,
        sources=status.source,
        revision=status.revision,
    )


def explained(records: Sequence[StartupRecord], key: Mapping[str, str] | None) -> dict[str, Any]:
    """For `--json`, and what ``in_words`` says."""
    versions = []
    for record in records:
        found: dict[str, Any] = {"number": record.number, "saved_at_ns": record.saved_at_ns, "key": dict(record.key)}
        if key is not None:
            found["differs"] = {
                name: {"start": key.get(name), "version": record.key.get(name)} for name in differences(key, record.key)
            }
        versions.append(found)
    chosen = next((version["number"] for version in versions if version.get("differs") == {}), None)
    return {"restores": chosen, "compared": key is not None, "versions": versions}


def in_words(pipeline: str, document: Mapping[str, Any]) -> str:
    versions = document["versions"]
    if not versions:
        return table(pipeline, ())
    lines = []
    if document["compared"]:
        chosen = document["restores"]
        lines.append(
            f"{pipeline}: this start restores version {chosen}"
            if chosen is not None
            else f"{pipeline}: this start restores none"
        )
    for version in versions:
        lines.append(f"version {version['number']}, saved {_time(version['saved_at_ns'])}")
        if not document["compared"]:
            width = max(len(name) for name in version["key"])
            lines += [f"  {name:<{width}}  {_cut(value)}" for name, value in sorted(version["key"].items())]
        elif not version["differs"]:
            lines.append("  fits")
        for name, values in version.get("differs", {}).items():
            lines.append(f"  {name}: {_cut(values['version'])}; this start has {_cut(values['start'])}")
    return "\n".join(lines)


def _cut(value: str | None) -> str:
    if value is None:
        return "none"
    shown = printable(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
