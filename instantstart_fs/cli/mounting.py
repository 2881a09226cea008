"""Runs `mount`, `unmount` and `stop`: finds or starts the user's own daemon, and links a directory to a pipeline.

DIR becomes a symbolic link to the pipeline's directory under the daemon's one mount. A link needs no rights, survives
the daemon's restart, and cannot be left as a dead mount. The daemon's log lies beside its socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from instantstart_fs.config.places import default_mount, default_socket, make_run_directory
from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.readable import readable_id
from instantstart_fs.core.source import parse_source
from instantstart_fs.errors import DaemonUnreachable, InstantStartError, PermissionRefused, UsageError

START_DEADLINE = 60.0
"""Seconds from the daemon's start to its answer: it may have to make its index anew."""
STOP_DEADLINE = 40.0
SHOWN_DEADLINE = 20.0
UNIT = "/etc/systemd/system/instantstart.service"


def connect(socket: str | None, config: str | None) -> tuple[Client, bool]:
    """A connection to the daemon, started if there is none; and whether it was. Raises InstantStartError."""
    with contextlib.suppress(DaemonUnreachable):
        try:
            return Client(socket), False
        except PermissionRefused:
            if socket is not None or os.environ.get("INSTANTSTART_SOCKET"):
                raise  # else it is the machine's daemon, which is not for this user: one of its own
    if os.geteuid() == 0 and socket is None and not config and os.path.exists(UNIT):
        raise DaemonUnreachable("the service is installed but does not run: `systemctl start instantstart`")
    path = socket or default_socket()
    directory = os.path.dirname(os.path.abspath(path))
    try:
        make_run_directory(directory)
        with _only_one(os.path.join(directory, "start.lock")):
            with contextlib.suppress(DaemonUnreachable):
                return Client(path), False  # another `mount` has just started it
            return _start(path, config, os.path.join(directory, "daemon.log")), True
    except OSError as error:
        raise DaemonUnreachable(f"{directory}: no daemon can be started: {error.strerror or error}") from error


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
    command = [sys.executable, "-m", "instantstart_fs.cli", "serve", "--socket", path]
    if config is not None:
        command += ["--config", os.path.abspath(config)]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    finally:
        os.close(out)
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline:
        with contextlib.suppress(DaemonUnreachable):
            return Client(path)
        if child.poll() is not None:
            raise DaemonUnreachable(f"the daemon ended at once: {_last_line(log)} (log: {log})")
        time.sleep(0.02)
    child.terminate()
    raise DaemonUnreachable(f"the daemon did not answer within {START_DEADLINE:g} s (log: {log})")


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


def check_free(directory: str) -> None:
    """Raises UsageError unless DIR may become a link: it is absent, an empty directory, or a link of `mount`."""
    if os.path.islink(directory):
        if not _is_ours(directory, None):
            raise UsageError(f"{directory} is a link to somewhere else; name another directory")
    elif os.path.lexists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise UsageError(f"{directory} is not empty; name a directory that is empty or not there yet")
    elif not os.path.isdir(os.path.dirname(directory)):
        raise UsageError(f"there is no directory {os.path.dirname(directory)}")


def _is_ours(directory: str, mount: str | None) -> bool:
    target = os.path.dirname(os.readlink(directory))
    if target in (mount, default_mount()):
        return True
    with contextlib.suppress(InstantStartError), Client() as client:
        return client.ping().mount == target
    return False


def link(directory: str, target: str) -> None:
    """Make DIR a link to ``target``, once that is shown. Raises InstantStartError."""
    deadline = time.monotonic() + SHOWN_DEADLINE
    while not os.path.isdir(target):
        if time.monotonic() > deadline:
            raise InstantStartError(f"{target} is not shown after {SHOWN_DEADLINE:g} s: `instantstart doctor`")
        time.sleep(0.05)
    beside = f"{directory}.instantstart-{os.getpid()}"
    try:
        if os.path.isdir(directory) and not os.path.islink(directory):
            os.rmdir(directory)
        os.symlink(target, beside)
        os.rename(beside, directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise InstantStartError(f"{directory}: {error.strerror or error}") from error


def unlink(directory: str, mount: str | None = None) -> str:
    """Take DIR's link away; the pipeline's id. Raises UsageError where it is none of `mount`'s."""
    if not os.path.islink(directory) or not _is_ours(directory, mount):
        raise UsageError(f"{directory} was not made by `instantstart mount`")
    pipeline = os.path.basename(os.readlink(directory))
    try:
        os.unlink(directory)
    except OSError as error:
        raise InstantStartError(f"{directory}: {error.strerror or error}") from error
    return pipeline


def stay(client: Client, pipeline: str) -> None:
    """Until SIGINT or SIGTERM, with a lease. Raises DaemonUnreachable when the daemon ends before."""
    client.lease(pipeline)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(KeyboardInterrupt):
        while not client.wait_ended(3600.0):
            pass
        raise DaemonUnreachable("the daemon has ended; its log says why")


def stop(client: Client) -> None:
    """End the daemon at the other end, and return when it has. Raises InstantStartError."""
    pid = client.peer_pid()
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            if "/instantstart.service" in file.read():
                raise UsageError("systemd runs this daemon and would start it again: `systemctl stop instantstart`")
        process = os.pidfd_open(pid)
        if client.wait_ended(0.001):  # it has ended already, and the number may be somebody else's by now
            os.close(process)
            return
    except OSError as error:
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
