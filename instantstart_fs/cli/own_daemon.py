"""Finds, starts and stops the daemon that `mount` uses: the one that answers this user, or the user's own.

The user's own daemon needs no configuration: it takes the default places (config/places.py), and another mountpoint
where the default one is in use for something else. Its log lies beside its socket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from instantstart_fs.config.places import (
    default_mount,
    default_socket,
    find_config,
    find_socket,
    is_own,
    machine_socket,
    make_run_directory,
    own_config,
    run_directory,
    spare_mount,
)
from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.readable import readable_id
from instantstart_fs.core.source import parse_source
from instantstart_fs.errors import DaemonUnreachable, InstantStartError, PermissionRefused, UsageError
from instantstart_fs.ipc.attempts import within
from instantstart_fs.system import mountinfo

START_DEADLINE = 60.0
"""Seconds from the daemon's start to its answer: it may have to make its index anew."""
STOP_DEADLINE = 40.0
PROBE_DEADLINE = 3.0
"""Seconds in which a mount that is already there has to answer, or it counts as somebody's."""
LOG_NAME = "daemon.log"
USED_NAME = "daemon.used"
UNITS = ("/etc/systemd/system/instantstart.service", "/lib/systemd/system/instantstart.service")
"""The places of the unit: an administrator's, and a package's."""


def connect(socket: str | None, config: str | None) -> tuple[Client, bool]:
    """A connection to the daemon, started if there is none; and whether it was. Raises InstantStartError."""
    if (found := _running(socket)) is not None:
        _note_use(found.path)
        return found, False
    if os.geteuid() == 0 and socket is None and not config and any(map(os.path.exists, UNITS)):
        raise DaemonUnreachable("the service is installed but does not run: `systemctl start instantstart`")
    path = socket or default_socket()
    directory = os.path.dirname(os.path.abspath(path))
    try:
        make_run_directory(directory)
        make_run_directory(os.path.dirname(_kept(path, LOG_NAME)))
        with _only_one(_kept(path, "start.lock")):
            with contextlib.suppress(DaemonUnreachable):
                found = Client(path)
                _note_use(path)
                return found, False  # another `mount` has just started it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_kept(path, USED_NAME))
            return _start(path, config, _kept(path, LOG_NAME)), True
    except OSError as error:
        raise DaemonUnreachable(f"{directory}: no daemon can be started: {error.strerror or error}") from error


def _kept(socket: str, name: str) -> str:
    """Return the path of a file about the daemon of that socket. It lies beside the socket. If others may write there,
    who could lock it or replace it by a link, it lies in this user's own directory."""
    path = os.path.abspath(socket)
    directory = os.path.dirname(path)
    if directory == run_directory() or is_own(directory):
        return os.path.join(directory, name)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return os.path.join(run_directory(), f"{digest}.{name}")


def _note_use(socket: str) -> None:
    """Note that the daemon is used: a --foreground that started it leaves it running then."""
    with contextlib.suppress(OSError):
        if os.path.exists(_kept(socket, LOG_NAME)):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(_kept(socket, USED_NAME), flags, 0o600))


def is_used_by_others(socket: str) -> bool:
    """Whether another `mount` or `start` has found that daemon since `connect` started it."""
    return os.path.exists(_kept(socket, USED_NAME))


def _running(socket: str | None) -> Client | None:
    """A daemon that this user may add pipelines to: the named one, the user's own, or the machine's."""
    named = socket or os.environ.get("INSTANTSTART_SOCKET")
    for path in [named] if named else [default_socket(), machine_socket()]:
        client = None
        try:
            client = Client(path)
            if named:
                return client
            client.specs()
            return client
        except (DaemonUnreachable, PermissionRefused) as error:
            if client is not None:  # the machine's, which is not for this user: one of its own
                client.close()
            if named and isinstance(error, PermissionRefused):
                raise
    return None


@contextlib.contextmanager
def _only_one(path: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DaemonUnreachable(
                        f"another command has been starting the daemon for {START_DEADLINE:g} s"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _start(path: str, config: str | None, log: str) -> Client:
    command = [sys.executable, "-m", "instantstart_fs.cli", "serve", "--socket", path, *_places(config)]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # "/": a daemon that stands in a directory keeps its filesystem from being unmounted.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/"
        )
    finally:
        os.close(out)
    deadline = time.monotonic() + START_DEADLINE
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(DaemonUnreachable):
                return Client(path)
            if child.poll() is not None:
                raise DaemonUnreachable(f"the daemon ended at once: {_last_line(log)} (log: {log})")
            time.sleep(0.02)
    except KeyboardInterrupt:
        child.terminate()
        raise
    child.terminate()
    raise DaemonUnreachable(f"the daemon did not answer within {START_DEADLINE:g} s (log: {log})")


def _places(config: str | None) -> list[str]:
    """Options of `serve`. A configuration that somebody wrote is followed to the letter; without one, a mountpoint that
    is in use gives way to the spare one. The machine's configuration is not an ordinary user's: its store, owners and
    tokens are the service's."""
    named = config or os.environ.get("INSTANTSTART_CONFIG")
    if named:
        return ["--config", os.path.abspath(os.path.expanduser(named))]
    if find_config() is not None and (os.geteuid() == 0 or os.path.exists(own_config())):
        return []
    options = ["--config", os.devnull]
    return options if mountpoint_is_free(default_mount()) else [*options, "--mount", spare_mount()]


def mountpoint_is_free(path: str) -> bool:
    """Whether a daemon could mount there: nothing is there, or an empty directory, or what a killed daemon left."""
    if any(mount.path == path for mount in mountinfo.mounts()):
        return _is_dead(path)
    try:
        return not os.listdir(path)
    except FileNotFoundError:
        return os.access(os.path.dirname(path), os.W_OK | os.X_OK)
    except OSError:
        return False


def _is_dead(path: str) -> bool:
    try:
        within(PROBE_DEADLINE, lambda: os.statvfs(path))
    except OSError as error:  # TimeoutError among them: a mount whose daemon hangs never answers
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def log_command(socket: str | None, follow: bool, lines: int) -> list[str]:
    """The program that shows the log of the daemon of that socket. Raises InstantStartError where nobody keeps one."""
    path = find_socket(socket)
    log = _kept(path, LOG_NAME)
    if path != machine_socket() or not any(map(os.path.exists, UNITS)):
        if os.path.exists(log):
            return ["tail", "-n", str(lines), *(["-F"] if follow else []), log]
        raise InstantStartError(f"there is no {log}; `mount` and `start` keep it there, `serve` writes to its terminal")
    return ["journalctl", "-u", "instantstart", "-n", str(lines), *(["-f"] if follow else ["--no-pager"])]


def _last_line(log: str) -> str:
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file.read()[-4000:].splitlines() if line.strip()]
        return lines[-1].removeprefix("instantstart: ") if lines else "it said nothing"
    return "it said nothing"


def pipeline_of(client: Client, model: ModelSpec) -> tuple[str, bool]:
    """The id of the pipeline that is of exactly this model, or a free one for it; whether it is there already."""
    wanted = str(parse_source(model.source)), model.include, model.exclude
    specs = client.specs()
    for spec in specs:
        if len(spec.models) == 1 and not spec.models[0].name:
            there = spec.models[0]
            if (str(parse_source(there.source)), there.include, there.exclude) == wanted:
                return spec.id, True
    return readable_id(model, {spec.id for spec in specs} | set(client.names())), False


def stay(client: Client, pipeline: str) -> None:
    """Hold a lease until KeyboardInterrupt (SIGINT, SIGTERM). Raises DaemonUnreachable when the daemon ends before."""
    with contextlib.suppress(KeyboardInterrupt):  # it may come while the lease is being asked for
        held = client.lease(pipeline)
        while not held.wait_ended(3600.0):
            pass
        raise DaemonUnreachable("the daemon has ended; its log says why")


def stop(client: Client) -> None:
    """End the daemon at the other end, and return when it has. Raises InstantStartError."""
    pid = client.peer_pid()
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            if is_service(file.read()):
                raise UsageError("systemd runs this daemon and would start it again: `systemctl stop instantstart`")
        process = os.pidfd_open(pid)
        if client.wait_ended(0.001):  # it has ended already, and the number may be somebody else's by now
            os.close(process)
            return
    except OSError as error:
        if isinstance(error, FileNotFoundError | ProcessLookupError) and client.wait_ended(STOP_DEADLINE):
            return  # it has ended already
        raise InstantStartError(f"the daemon's process is not to be found here: {error.strerror or error}") from error
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_DEADLINE)[0]:
            raise InstantStartError(f"the daemon (pid {pid}) did not end within {STOP_DEADLINE:g} s")
    except PermissionError as error:
        raise PermissionRefused(f"the daemon (pid {pid}) is another user's; ask as its owner (sudo)") from error
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(process)


def is_service(cgroups: str) -> bool:
    """Whether the process of this /proc/PID/cgroup is the unit's."""
    return any(line.rpartition("/")[2] == "instantstart.service" for line in cgroups.splitlines())
