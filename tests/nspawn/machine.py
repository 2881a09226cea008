"""A machine with a real systemd in it: this system's /usr booted by systemd-nspawn, everything else fresh.

    with Machine(tmp_path, store=…, binds=[…]) as machine:
        machine.run("systemctl", "start", "instantstart")

/etc/systemd/system, /etc/instantstart and /opt/instantstart are directories of the host, so that they outlive a reboot,
as do the store and the journal; the rest is a tmpfs. There is no network. Commands enter by nsenter, each with a
deadline.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

from instantstart_fs.installation import service
from tests.harness import REPOSITORY, Hung, wait_for

OPT_IN = "INSTANTSTART_NSPAWN"
BOOT_DEADLINE = 60.0
REBOOTS = 133
"""systemd-nspawn's exit status when the machine asked for a reboot; systemd-nspawn@.service then starts it again."""
MASKED = ("systemd-firstboot", "systemd-networkd-wait-online", "systemd-networkd", "fio", "nginx", "ssh", "cron")
"""Units of this system that have no business in there: no network to wait for, nothing of the host's own."""


def why_no_machine() -> str | None:
    """Why none can be booted here; None if it can."""
    if os.environ.get(OPT_IN) != "1":
        return "boots a real systemd in a container: run scripts/nspawn-test"
    if os.geteuid() != 0:
        return "systemd-nspawn needs root"
    for program in ("systemd-nspawn", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: systemd-container)"
    return None if os.path.exists("/dev/fuse") else "there is no /dev/fuse"


class Machine:
    """``directory``: takes what outlives a reboot. ``binds``: host directories visible inside, read-only, at the same
    path. ``writable``: others, by where they are inside. ``bare``: nothing is installed, and /opt is the machine's own.
    The directory's ``store`` is behind /var/lib/instantstart.

    ``root``: a whole system of its own in that directory, in the place of this one's /usr; all of it is writable and
    outlives a reboot, and nothing is installed."""

    def __init__(
        self,
        directory: Path,
        *,
        binds: Sequence[Path] = (),
        writable: Mapping[str, Path] = MappingProxyType({}),
        bare: bool = False,
        root: Path | None = None,
    ) -> None:
        bare = bare or root is not None
        self._root = root
        self.directory = directory
        self.units = directory / "units"
        self.etc = directory / "etc"
        self.opt = directory / "opt"
        self.store = directory / "store"
        self.log = directory / "console.log"
        self.logs = directory / "journal"
        for path in (self.units, self.etc, self.opt / "bin", self.store, self.logs):
            path.mkdir(parents=True, exist_ok=True)
        self._bare = bare
        self._writable = writable
        if not bare:
            self._install()
        self._binds = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), *binds]
        self._process: subprocess.Popen[bytes] | None = None
        self._name = f"instantstart-{os.getpid()}"
        self._uuid = uuid.uuid4()

    def _install(self) -> None:
        """The files of `instantstart service install`, and this environment in the place of one of its own."""
        files = self.directory / "files"
        service.install(lambda _: None, prefix="/opt/instantstart", root=str(files))
        shutil.copytree(files / "etc/systemd/system", self.units, dirs_exist_ok=True)
        shutil.copytree(files / "opt/instantstart", self.opt, dirs_exist_ok=True)
        program = self.opt / "bin/instantstart"
        program.write_text(
            "#!/bin/sh\n"
            f'PYTHONPATH={REPOSITORY} PYTHONDONTWRITEBYTECODE=1 exec {sys.executable} -m instantstart_fs.cli "$@"\n'
        )
        program.chmod(0o755)
        # As pip does when it installs: a start that compiles is another start.
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", REPOSITORY / "instantstart_fs"], check=True, timeout=120
        )

    def __enter__(self) -> Machine:
        command = ["systemd-nspawn", "--boot", "--private-network", "--quiet"]
        command += ["--register=no", "--keep-unit", "--console=pipe", f"--machine={self._name}"]
        command += [f"--uuid={self._uuid}", f"--bind={self.logs}:/var/log/journal"]
        if self._root is not None:
            command += [f"--directory={self._root}", f"--bind={self._fuse_device()}:/dev/fuse"]
        else:
            command += ["--directory=/", "--volatile=yes", "--bind=/dev/fuse"]
            command += [f"--bind={self.store}:/var/lib/instantstart"]
            command += [f"--bind={self.units}:/etc/systemd/system", f"--bind={self.etc}:/etc/instantstart"]
        command += [f"--bind={path}:{place}" for place, path in self._writable.items()]
        if not self._bare:
            command += [f"--bind-ro={self.opt}:/opt/instantstart"]
        command += [f"--bind-ro={path}" for path in dict.fromkeys(self._binds)]
        command += ["systemd.unit=multi-user.target", *(f"systemd.mask={unit}.service" for unit in MASKED)]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            self.wait_booted()
        except BaseException:
            self.close()
            raise
        return self

    def _fuse_device(self) -> Path:
        """As udev makes it, for everybody; the host's may be root's alone."""
        node = self.directory / "fuse"
        if not node.exists():
            os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
            node.chmod(0o666)
        return node

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(AssertionError, OSError):
                print(self.run("journalctl", "-u", "instantstart", "--no-pager", "-n", "80", check=False))
        self.close()

    def close(self) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        leader = self._leader(process)
        process.send_signal(signal.SIGTERM)  # an orderly power-off
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            if leader is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(leader, signal.SIGKILL)
            process.kill()
            process.wait(10)

    # -- inside ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _leader(process: subprocess.Popen[bytes]) -> int | None:
        """The container's first process, by its pid out here."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        return None

    @property
    def leader(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, f"the machine ended:\n{self.log.read_text(errors='replace')[-2000:]}"
        return int(wait_for(lambda: self._leader(self._process) if self._process else None, "the machine", 20))

    def enter(self, *command: str | os.PathLike[str]) -> list[str]:
        """The command line that runs ``command`` inside."""
        words = [os.fspath(word) for word in command]
        return ["nsenter", "--target", str(self.leader), "--mount", "--pid", "--uts", "--ipc", "--net", "--", *words]

    def run(self, *command: str | os.PathLike[str], timeout: float = 30.0, check: bool = True) -> str:
        """Its stdout. Must exit 0 if ``check``; Hung when it takes longer."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            self.enter(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Hung(f"{command} took longer than {timeout:g} s in the machine") from None
        assert not check or process.returncode == 0, f"{command}: exit {process.returncode}\n{out}\n{err}"
        return out

    def python(self, *arguments: str, timeout: float = 30.0) -> str:
        return self.run(sys.executable, *arguments, timeout=timeout)

    def instantstart(self, *arguments: str, timeout: float = 60.0) -> str:
        return self.run("/opt/instantstart/bin/instantstart", *arguments, timeout=timeout)

    def property(self, name: str, unit: str = "instantstart") -> str:
        """Of `systemctl show`."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def journal(self, *more: str, boot: int = 0) -> str:
        """What the service said and systemd said of it, or what ``more`` finds. ``boot``: -1 is the one before."""
        which = more or ("-u", "instantstart")
        return self.run("journalctl", "-b", str(boot), "--no-pager", "-o", "cat", *which)

    def boot_id(self) -> str:
        return self.run("cat", "/proc/sys/kernel/random/boot_id").strip()

    def main_pid(self) -> int:
        """As the machine numbers it."""
        return int(self.property("MainPID"))

    def wait_booted(self) -> None:
        def booted() -> bool:
            with contextlib.suppress(AssertionError, Hung, OSError):
                state = self.run("systemctl", "is-system-running", timeout=5, check=False).strip()
                return state in ("running", "degraded")
            return False

        wait_for(booted, "the machine's boot", BOOT_DEADLINE)

    def job_done(self, unit: str = "instantstart") -> bool:
        return self.property("ActiveState", unit) == "active" and self.property("Job", unit) in ("", "0")

    def wait_active(self, unit: str = "instantstart", timeout: float = 60.0) -> None:
        wait_for(lambda: self.property("ActiveState", unit) == "active", f"{unit}'s start", timeout)

    def reboot(self) -> None:
        """`systemctl reboot`, and the boot after it: only what the host's directories hold is left."""
        process = self._process
        assert process is not None
        before = self.boot_id()
        self.run("systemctl", "reboot", check=False)
        status = process.wait(BOOT_DEADLINE)
        assert status == REBOOTS, f"the machine ended with {status}:\n{self.log.read_text(errors='replace')[-2000:]}"
        self._process = None
        self.__enter__()
        assert self.boot_id() != before
