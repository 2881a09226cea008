"""Default paths of configuration, store, mount and socket, by user, so that nothing has to be configured."""

from __future__ import annotations

import os
import stat

from instantstart_fs.config.directories import make_directory, open_up

SYSTEM_CONFIG = "/etc/instantstart/config.toml"
SYSTEM_RUN_DIRECTORY = "/run/instantstart"
SOCKET_NAME = "control.sock"


def _home(variable: str, fallback: str) -> str:
    given = os.environ.get(variable, "")
    return given if os.path.isabs(given) else os.path.expanduser(fallback)


def default_mount() -> str:
    """/models for root, ~/models for anybody else."""
    return "/models" if os.geteuid() == 0 else os.path.expanduser("~/models")


def spare_mount() -> str:
    """Return where the daemon that `mount` starts mounts if something else lies at ``default_mount``."""
    return os.path.join(run_directory(), "models")


def default_store() -> str:
    """/var/lib/instantstart for root; $XDG_CACHE_HOME/instantstart/store (~/.cache/instantstart/store) for others,
    since all of it can be fetched again. A store of release 0.1, in $XDG_DATA_HOME/instantstart, is used on."""
    if os.geteuid() == 0:
        return "/var/lib/instantstart"
    earlier = os.path.join(_home("XDG_DATA_HOME", "~/.local/share"), "instantstart")
    if os.path.isdir(os.path.join(earlier, "slots")):
        return earlier
    return os.path.join(_home("XDG_CACHE_HOME", "~/.cache"), "instantstart", "store")


def own_config() -> str:
    """An ordinary user's own configuration: $XDG_CONFIG_HOME/instantstart/config.toml."""
    return os.path.join(_home("XDG_CONFIG_HOME", "~/.config"), "instantstart", "config.toml")


def find_config() -> str | None:
    """The configuration where none is named: an ordinary user's own one, else the machine's; None: there is none."""
    places = [SYSTEM_CONFIG] if os.geteuid() == 0 else [own_config(), SYSTEM_CONFIG]
    return next((path for path in places if os.path.exists(path)), None)


def is_own(directory: str) -> bool:
    """Whether nobody but this user puts anything there."""
    try:
        found = os.stat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def run_directory() -> str:
    """/run/instantstart for root; $XDG_RUNTIME_DIR/instantstart, else $XDG_CACHE_HOME/instantstart, for others. A
    runtime directory of somebody else (`su` keeps the variable), or for all (/tmp), is not used: who writes there
    first would be believed to be this user's daemon."""
    if os.geteuid() == 0:
        return SYSTEM_RUN_DIRECTORY
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and is_own(runtime):
        return os.path.join(runtime, "instantstart")
    return os.path.join(_home("XDG_CACHE_HOME", "~/.cache"), "instantstart")


def make_run_directory(directory: str) -> None:
    """Make ``directory``, below which sockets lie, passable for all. If it is the default one and this user's own, and
    was made too private, it is opened, unless systemd made it: its modes are the unit's. Raises OSError."""
    make_directory(directory)
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")
    if directory == run_directory() and directory not in given:
        open_up(directory)


def default_socket() -> str:
    """The path on which `serve` listens by default."""
    return os.environ.get("INSTANTSTART_SOCKET") or os.path.join(run_directory(), SOCKET_NAME)


def machine_socket() -> str:
    """The socket of the daemon that runs as a service."""
    return os.path.join(SYSTEM_RUN_DIRECTORY, SOCKET_NAME)


def find_socket(given: str | None = None) -> str:
    """Return ``given``, else $INSTANTSTART_SOCKET, else this user's socket, else the machine's if only that one is
    there."""
    if given or os.environ.get("INSTANTSTART_SOCKET"):
        return given or os.environ["INSTANTSTART_SOCKET"]
    own = default_socket()
    machine = machine_socket()
    return machine if not os.path.exists(own) and os.path.exists(machine) else own
