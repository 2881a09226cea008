"""Installs, removes and examines the service: `instantstart service`, and what packages ask for the same files."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Callable
from importlib import resources

import msgspec

from instantstart_fs import __version__
from instantstart_fs.config import load_config
from instantstart_fs.config.places import SYSTEM_RUN_DIRECTORY
from instantstart_fs.errors import InstantStartError, PermissionRefused, UsageError
from instantstart_fs.installation import plan
from instantstart_fs.installation.host import Host, ask

SYSTEMD_RUNS = "/run/systemd/system"
PACKAGED_UNITS = (f"/lib/systemd/system/{plan.UNIT}", f"/usr/lib/systemd/system/{plan.UNIT}")


class ServiceStatus(msgspec.Struct, kw_only=True):
    """`instantstart service status --json`."""

    installed: bool
    unit: str
    """Path of the unit file; empty where there is none."""
    prefix: str
    """The prefix of the environment that the service runs in."""
    current: bool
    """The files are those that this version would put there."""
    enabled: str
    """The word of systemctl: enabled, disabled, …; empty if systemd does not run."""
    active: str
    """The word of systemctl: active, failed, …; empty if systemd does not run."""
    says: str
    """The daemon's own status line."""
    version: str
    """The version of the program that was asked."""
    store: str


def templates() -> dict[str, str]:
    """The files that this distribution carries, by name."""
    directory = resources.files("instantstart_fs.installation") / "systemd"
    return {name: (directory / name).read_text(encoding="utf-8") for name in plan.TEMPLATES}


def own_prefix() -> str:
    """Return the prefix of the environment that this program runs in."""
    return os.path.dirname(sysconfig.get_path("scripts"))


def install(
    say: Callable[[str], None], *, prefix: str | None = None, root: str = "", start: bool = True, dry: bool = False
) -> None:
    """Put the service in place and start it, or go over to this version; idempotent. ``say`` hears each step.

    With ``root`` only the files are written, below it. Raises UsageError (a prefix that no unit can name, no program
    there), PermissionRefused (not root; a program that another user may change), InstantStartError (no systemd, a
    package's service, a step that failed).
    """
    host = Host(say, root=root, dry=dry)
    places = plan.Places(prefix=(prefix or own_prefix()).rstrip("/"))
    if not plan.usable_prefix(places.prefix):
        raise UsageError(
            f"a unit file cannot name {places.prefix!r}: an absolute path of letters, digits and ._+~- it is"
        )
    for path in PACKAGED_UNITS:
        if os.path.exists(host.place(path)):
            raise InstantStartError(f"a package brought the service already ({path}): use that, or remove the package")
    program = f"{places.prefix}/bin/instantstart"
    if not host.root and not dry:
        _check_machine()
        _check_program(program)
    for placement in plan.placements(places, templates()):
        if not (placement.keep and os.path.lexists(host.place(placement.path))):
            host.put(placement.path, placement.text, placement.mode)
    for directory in plan.CONFIG_DIRECTORIES:
        host.directory(directory)
    host.edit(plan.UPDATEDB, plan.pruned)
    if host.root:
        return
    if program != plan.LINK:
        host.link(plan.LINK, program)
    host.run("systemd-sysusers", "instantstart.conf")
    if not os.path.ismount(plan.MOUNT):
        host.run("systemd-tmpfiles", "--create", "--boot", "instantstart.conf")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "-q", plan.UNIT)
    if start:
        try:
            host.run("systemctl", "restart", plan.UNIT)
        except InstantStartError as error:
            raise InstantStartError(
                f"the service is installed and does not start: `journalctl -u instantstart -n 20` says why ({error})"
            ) from error


def uninstall(say: Callable[[str], None], *, root: str = "", purge: bool = False, dry: bool = False) -> list[str]:
    """Stop the service and take its files away; idempotent. What is left, one line each. ``purge``: store and
    configuration go, too. Errors as for ``install``."""
    host = Host(say, root=root, dry=dry)
    unit = f"{plan.Places(prefix='/').units}/{plan.UNIT}"
    text = host.read(unit)
    prefix = (plan.prefix_of_unit(text) if text else None) or own_prefix()
    for path in PACKAGED_UNITS:
        if text is None and os.path.exists(host.place(path)):
            raise InstantStartError(f"a package brought the service ({path}): remove the package")
    if not host.root:
        if not dry:
            _check_machine()
        if text is not None:
            host.run("systemctl", "disable", "-q", "--now", plan.UNIT)
    store = _store(host)
    for placement in reversed(plan.placements(plan.Places(prefix=prefix), templates())):
        if not placement.keep:
            host.remove(placement.path)
    for directory in (
        f"{prefix}/libexec",
        plan.Places(prefix=prefix).sysusers,
    ):  # no package of a distribution makes it
        host.remove_empty(directory)
    host.edit(plan.UPDATEDB, plan.unpruned)
    link = host.place(plan.LINK)
    if os.path.islink(link) and os.readlink(link) == f"{prefix}/bin/instantstart":
        host.remove(plan.LINK)
    if purge:
        host.remove_tree(plan.STORE)
        host.remove_tree("/etc/instantstart")
    if not host.root:
        host.remove_empty(plan.MOUNT)
        if text is not None:
            host.remove_tree(SYSTEM_RUN_DIRECTORY)  # it outlasts a stop
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "reset-failed", plan.UNIT, check=False)
        if purge:
            host.run("userdel", plan.USER, check=False)
    left = [(store, "the cached bytes"), ("/etc/instantstart", "the configuration")]
    return [f"{path} ({what})" for path, what in left if os.path.exists(host.place(path))]


def status() -> ServiceStatus:
    """Return the service's status on this machine; changes nothing and needs no root."""
    host = Host(lambda _: None)
    own = f"{plan.Places(prefix='/').units}/{plan.UNIT}"
    unit = next((path for path in (own, *PACKAGED_UNITS) if os.path.exists(path)), "")
    prefix = plan.prefix_of_unit(host.read(unit) or "") if unit else None
    current = prefix is not None and (
        unit != own
        or all(
            host.read(it.path) == it.text
            for it in plan.placements(plan.Places(prefix=prefix), templates())
            if not it.keep
        )
    )
    shown = {"UnitFileState": "", "ActiveState": "", "StatusText": ""}
    if unit and os.path.isdir(SYSTEMD_RUNS):
        for name in shown:
            shown[name] = ask("systemctl", "show", "--value", "-p", name, plan.UNIT)[1]
    return ServiceStatus(
        installed=bool(unit), unit=unit, prefix=prefix or "", current=current, enabled=shown["UnitFileState"],
        active=shown["ActiveState"], says=shown["StatusText"], version=__version__, store=_store(host),
    )  # fmt: skip


def _store(host: Host) -> str:
    """Return the store's path by the configuration, if that can be read."""
    path = host.place(plan.CONFIG)
    try:
        found = load_config(path).store.path if os.path.exists(path) else plan.STORE
    except InstantStartError:
        found = plan.STORE
    return found


def _check_machine() -> None:
    if not os.path.isdir(SYSTEMD_RUNS):
        raise InstantStartError("systemd does not run this machine; `instantstart serve` is the program to supervise")
    if os.geteuid() != 0:
        raise PermissionRefused(
            "a service of the machine is root's to change: call this with sudo (for yourself alone no service is "
            "needed: `instantstart mount SOURCE DIR`)"
        )


def _check_program(program: str) -> None:
    """Root will run it at every boot: nobody else may be able to change it."""
    if not os.access(program, os.X_OK):
        raise UsageError(f"there is no {program}: --prefix names the environment that instantstart is installed in")
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    looked = {os.path.realpath(program)} | (
        {package} if own_prefix() == os.path.dirname(os.path.dirname(program)) else set()
    )
    for path in looked:
        while path != "/":
            found = os.stat(path)
            if found.st_uid != 0 or (found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX):
                raise PermissionRefused(
                    f"root would run what others may change ({path}): install into an environment of root's, as by "
                    "`sudo python3 -m venv /opt/instantstart`, and call its bin/instantstart service install"
                )
            path = os.path.dirname(path)
