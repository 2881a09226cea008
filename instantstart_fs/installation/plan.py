"""Plans a service: files with their texts and places, and the edits of other programs' files. All pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

UNIT = "instantstart.service"
EXAMPLE = "vllm@.service"
STOP_POST = "instantstart-stop-post"
TEMPLATES = (UNIT, EXAMPLE, "stop-post", "instantstart.sysusers", "instantstart.tmpfiles")
CONFIG = "/etc/instantstart/config.toml"
CONFIG_DIRECTORIES = ("/etc/instantstart", "/etc/instantstart/pipelines.d")
CONFIG_TEXT = (
    "# Every key has a default: docs/CONFIGURATION.md. Pipelines: here, in pipelines.d/, or by `instantstart add`.\n"
)
STORE = "/var/lib/instantstart"
MOUNT = "/models"
LINK = "/usr/local/bin/instantstart"
UPDATEDB = "/etc/updatedb.conf"
USER = "instantstart-engine"
"""The user that vllm@.service runs as; systemd-sysusers makes it."""
WRITTEN_PREFIX = "/opt/instantstart/"
"""The prefix in the templates."""
_PRUNED = (("PRUNEFS", "fuse.instantstart"), ("PRUNEPATHS", MOUNT), ("PRUNEPATHS", STORE))
_EXEC = re.compile(r"^ExecStart=(/.*)/bin/instantstart serve$", re.MULTILINE)
_PREFIX = re.compile(r"(/[A-Za-z0-9._+~-]+)+")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Absolute directories. ``prefix``: of the environment whose bin/instantstart the unit runs. The defaults are an
    administrator's; a package has its own."""

    prefix: str
    units: str = "/etc/systemd/system"
    sysusers: str = "/etc/sysusers.d"
    tmpfiles: str = "/etc/tmpfiles.d"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A file to be placed. ``keep``: one that is there already stays as it is, and stays when the service goes."""

    path: str
    text: str
    mode: int = 0o644
    keep: bool = False


def usable_prefix(prefix: str) -> bool:
    """Whether a unit file can name it as it is: systemd gives blanks, quotes, `%` and `$` meanings of their own."""
    return _PREFIX.fullmatch(prefix) is not None


def placements(places: Places, templates: Mapping[str, str]) -> list[Placement]:
    """Return all files, in the order in which they are put: the unit after what it names. ``templates``: by
    TEMPLATES."""
    prefix = places.prefix.rstrip("/") + "/"
    texts = {name: text.replace(WRITTEN_PREFIX, prefix) for name, text in templates.items()}
    return [
        Placement(path=f"{prefix}libexec/{STOP_POST}", text=texts["stop-post"], mode=0o755),
        Placement(path=f"{places.sysusers}/instantstart.conf", text=texts["instantstart.sysusers"]),
        Placement(path=f"{places.tmpfiles}/instantstart.conf", text=texts["instantstart.tmpfiles"]),
        Placement(path=CONFIG, text=CONFIG_TEXT, keep=True),
        Placement(path=f"{places.units}/{EXAMPLE}", text=texts[EXAMPLE]),
        Placement(path=f"{places.units}/{UNIT}", text=texts[UNIT]),
    ]


def prefix_of_unit(text: str) -> str | None:
    """Return the prefix of the environment that a unit file runs; None if that file is not one of ours."""
    found = _EXEC.search(text)
    return found[1] if found else None


def pruned(text: str) -> str:
    """updatedb.conf with mount and store left out of the nightly walk, which would list every pipeline."""
    for key, value in _PRUNED:
        line = re.compile(rf'^({key} *= *"[^"]*)"', re.MULTILINE)
        found = line.search(text)
        if found and value not in found[1].replace('"', " ").split():
            text = f"{text[: found.end(1)]} {value}{text[found.end(1) :]}"
    return text


def unpruned(text: str) -> str:
    """The reverse of ``pruned``."""
    for _, value in _PRUNED:
        text = re.sub(rf' {re.escape(value)}([" ])', r"\1", text)
    return text
