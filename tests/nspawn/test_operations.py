"""docs/OPERATIONS.md as a new user goes through it: its commands are read out of it, and run in a machine.

Stand-ins, since a machine has no network: ``git pull`` fetches nothing, pip takes wheels from a directory, and a hub in
the machine publishes the first pipeline's repository.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness import REPOSITORY, wait_for
from tests.nspawn.machine import Machine, why_no_machine
from tests.nspawn.test_service import GOES_ON, UNIT, check_bytes, mounts

MISSING = [program for program in ("rsync", "fuser") if shutil.which(program) is None]
REASON = why_no_machine() or (
    f"the document's {MISSING} are not installed (Debian: rsync, psmisc)" if MISSING else None
)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]
DOCUMENT = (REPOSITORY / "docs/OPERATIONS.md").read_text()
PYTHON = "/usr/bin/python3"
HUB = """
import sys
from tests.servers.hub import HubServer
with HubServer() as hub:
    hub.publish("Qwen/Qwen3-8B", sys.argv[1])
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""
CONFIG = "/etc/instantstart/config.toml"


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/OPERATIONS.md has no section {title!r}"
    return found[1]


def commands(title: str) -> list[tuple[str, str]]:
    """Each indented line of that section: command, remark."""
    lines = re.findall(r"^    (\S.*)$", section(title), re.MULTILINE)
    parts = (re.split(r"\s{2,}# ", line, maxsplit=1) for line in lines)
    return [(part[0], part[1] if len(part) > 1 else "") for part in parts]


def symptom(words: str) -> str:
    """What to do, of the row that begins with these words."""
    rows = [line.split(" | ") for line in section("By symptom").splitlines() if line.startswith("| ")]
    found = [row[2].removesuffix(" |") for row in rows if row[0].removeprefix("| ").replace("`", "").startswith(words)]
    assert len(found) == 1, f"{len(found)} rows about {words!r}"
    return found[0]


class User:
    """Root at the machine's shell, in the checkout."""

    def __init__(self, machine: Machine, checkout: Path, wheels: Path) -> None:
        self.machine = machine
        self._prelude = (
            'sudo() { "$@"; }; git() { :; }; '
            f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={wheels} PYTHON={PYTHON} HOME=/root; cd /root/checkout; "
        )
        machine.run("cp", "-r", checkout, "/root/checkout")

    def types(self, command: str, *, timeout: float = 200, check: bool = True) -> str:
        """stdout and stderr."""
        environment = ["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        return self.machine.run(
            *environment, "sh", "-c", f"exec 2>&1; {self._prelude}{command}", timeout=timeout, check=check
        )

    def finds(self, pipeline: str) -> dict[str, Any]:
        """What of its status no passing of time changes."""
        status = json.loads(self.types(f"instantstart status {pipeline} --json"))
        return {key: status[key] for key in ("state", "cached_bytes", "total_bytes", "revision", "files")}

    def follow(self, instructions: Sequence[tuple[str, str]]) -> dict[str, str]:
        """One after another; what each said."""
        said = {}
        for command, remark in instructions:
            if command.startswith("sudoedit "):
                table, setting = re.findall(r"(\[\w+\]) (\w+ = .*)", remark)[0]
                command = f"printf '%s\\n' '{table}' '{setting}' >> {command.removeprefix('sudoedit ')}"
            said[command] = self.types(command)
        return said


@pytest.fixture
def user(tmp_path: Path, source: Path) -> Iterator[User]:
    """At a machine where nothing is installed."""
    wheels, checkout = tmp_path / "wheels", tmp_path / "checkout"
    made = subprocess.run([PYTHON, "-m", "venv", tmp_path / "venv"], capture_output=True, text=True, timeout=120)
    if made.returncode == 0:
        pip = [str(tmp_path / "venv/bin/pip"), "wheel", "-q", "-w", str(wheels), ".", "setuptools>=77", "wheel"]
        made = subprocess.run(pip, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    if made.returncode != 0:
        pytest.skip(f"no wheels for {PYTHON}: {made.stderr.strip().splitlines()[-1:]}")
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, checkout / name)
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    with Machine(tmp_path / "machine", binds=[source, wheels, checkout], writable={"/mnt/nvme": nvme}, bare=True) as it:
        # /usr is the host's and read-only here; the command's link goes into a directory of the machine's own.
        it.run("mount", "-t", "tmpfs", "tmpfs", "/usr/local/bin")
        yield User(it, checkout, wheels)


@contextlib.contextmanager
def hub(machine: Machine, directory: Path) -> Iterator[str]:
    """The endpoint of one that publishes ``directory`` in the machine."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = machine.enter(sys.executable, "-c", HUB, directory)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.communicate(timeout=30)


def test_from_the_first_install_to_the_last_uninstall(user: User, source: Path) -> None:
    machine, config = user.machine, user.machine.etc / "config.toml"
    with hub(machine, source / "warm") as endpoint:
        config.write_text(f'[origins.huggingface]\nendpoint = "{endpoint}"\n')
        said = user.follow(commands("Install"))
        assert "Active: active (running)" in said["systemctl status instantstart"]
        assert 'Status: "ready: 0 pipelines at /models' in said["systemctl status instantstart"]
        assert machine.run("systemctl", "is-enabled", UNIT).strip() == "enabled"

        said = user.follow(commands("The first pipeline"))
        assert "model-00001-of" in said["ls -ls /models/my-llm"]
        check_bytes(machine, source / "warm", "my-llm")
        warm = user.finds("my-llm")
        assert warm["state"] == "warm" and {file["state"] for file in warm["files"]} == {"sealed"}

        before = machine.main_pid()
        added = f'[pipelines.more]\nsource = "file://{source}/cold"\nowner = "instantstart-engine"\n'
        config.write_text(config.read_text() + added)
        reload, _ = commands("The first pipeline")[-1]
        user.types(reload)
        wait_for(lambda: "more" in user.types("instantstart ls"), "the new pipeline", 20)
        assert machine.main_pid() == before
        backed_up(user, warm["revision"])

    before = machine.main_pid()
    configured = config.read_text()
    user.follow(commands("Upgrade and restart"))
    machine.wait_active()
    assert machine.main_pid() != before and config.read_text() == configured
    assert machine.journal().count(GOES_ON) == 1, "an upgrade unmounted"
    assert user.finds("my-llm") == warm

    served(user)
    by_symptom(user, source)
    moved(user, source)

    uninstall, purge = (command for command, _ in commands("Uninstall"))
    for _ in range(2):
        user.types(uninstall)
    assert mounts(machine) == ""
    assert not (machine.units / UNIT).exists() and config.exists()
    assert (machine.store / "slots/my-llm").exists()
    user.types(purge, check=False)  # /var/lib/instantstart is a mount here: emptied, and not removable
    assert not list(machine.store.glob("slots/*"))


def served(user: User) -> None:
    """vllm@.service: the engine has its lease, also over a restart of the filesystem, and until it ends."""
    machine = user.machine
    engine = r"#!/bin/sh\nsha256sum $2/*.safetensors && exec sleep 1000\n"
    user.types(f"mkdir -p /opt/vllm/bin; printf '{engine}' > /opt/vllm/bin/vllm; chmod 755 /opt/vllm/bin/vllm")

    def leases() -> int:
        return int(json.loads(user.types("instantstart status more --json"))["leases"])

    user.types("systemctl start vllm@more")
    wait_for(lambda: machine.journal("-u", "vllm@more").count("/models/more/model") == 2, "the engine's reads", 30)
    assert leases() == 1
    assert "1 lease(s) hold it" in user.types("instantstart evict more", check=False)
    before = machine.property("MainPID", "vllm@more")
    user.types("systemctl restart instantstart")
    wait_for(lambda: leases() == 1, "the lease to be taken again", 30)
    assert machine.property("MainPID", "vllm@more") == before
    user.types("systemctl stop vllm@more")
    wait_for(lambda: leases() == 0, "the end of the lease", 20)


def by_symptom(user: User, source: Path) -> None:
    """Each that can be brought about; what the document tells to do mends it."""
    machine = user.machine

    reads = "exec 3< /models/my-llm/config.json; touch /run/reading; exec sleep 1000"
    machine.run("systemd-run", "--unit=reader", "sh", "-c", reads)
    machine.run("timeout", "20", "sh", "-c", "until [ -e /run/reading ]; do sleep 0.1; done")
    refusal = "somebody has files of it open"
    assert refusal in user.types("instantstart evict my-llm", check=False)
    (names_readers,) = re.findall("`(.*?)`", symptom(f"instantstart evict: *{refusal}*"))
    assert "sleep" in user.types(names_readers)
    machine.run("systemctl", "stop", "reader")

    second = user.types("instantstart serve --mount /root/other --socket /root/other.sock", check=False)
    assert re.search(r"the store .* is in use by pid", second), second
    assert symptom("*the store … is in use by pid*").startswith("`systemctl status`")

    machine.run("cp", "-r", source / "cold", "/root/lost")
    user.types("instantstart add lost file:///root/lost; mv /root/lost /root/away")
    assert "Input/output error" in user.types("cat /models/lost/*.safetensors", check=False)
    (shows_error,) = re.findall("`(.*?)`", symptom("EIO when opening a weight file"))
    assert "error" in user.types(shows_error.replace("PIPELINE", "lost"))
    user.types("mv /root/away /root/lost")
    (tries_again,) = re.findall("`(.*?)`", symptom("error in the status"))
    user.types(tries_again.replace("PIPELINE", "lost") + " --wait")
    check_bytes(machine, source / "cold", "lost")
    user.types("instantstart remove lost")

    before = machine.main_pid()
    machine.run("systemctl", "kill", "-s", "ABRT", "--kill-whom=main", UNIT)
    wait_for(lambda: machine.main_pid() not in (0, before) and machine.job_done(), "another daemon", 60)
    assert "Fatal Python error: Aborted" in symptom("the journal says *the mount did not answer within*")
    assert re.search(r"Fatal Python error: Aborted\n(.*\n)*?.*Thread 0x", machine.journal())

    config = (machine.etc / "config.toml").read_text()
    (machine.etc / "config.toml").write_text("[mount]\npath = 3\n")
    user.types("systemctl restart instantstart", check=False)
    assert symptom("exit status 2, no restarts, nothing mounted").endswith("the journal names file, key and reason")
    assert machine.property("ExecMainStatus") == "2" and machine.property("ActiveState") == "failed"
    assert re.search(rf"{CONFIG}.*mount\.path", machine.journal())

    (machine.etc / "config.toml").write_text(config)
    user.types("systemctl start instantstart")

    # Killed, and its store is where none can be: after twenty starts systemd gives up and lets go of the mount.
    (machine.etc / "config.toml").write_text('[store]\npath = "/proc/nothing"\n')
    machine.run("systemctl", "kill", "-s", "KILL", UNIT)
    wait_for(lambda: machine.property("ActiveState") == "failed", "systemd's giving up", 90)
    often, dead = "Start request repeated too quickly", "Transport endpoint is not connected"
    assert often in machine.journal()
    assert dead in user.types("ls /models", check=False)
    assert "stop-post: " not in machine.journal(), "it complains where there is nothing to do"
    (machine.etc / "config.toml").write_text(config)
    (resets,) = re.findall("`(.*?)`", symptom(f"*{often}*"))
    clears = re.findall("`(.*?)`", symptom(dead))[0]
    user.types(f"{resets}; {clears}")
    check_bytes(machine, source / "warm", "my-llm")


def backed_up(user: User, revision: str) -> None:
    """The descriptions alone come back, cold and at the same revision."""
    machine = user.machine
    before = user.types("instantstart ls --json")
    (back_up, _), *restore = commands("Back up")
    user.types(back_up)
    machine.run("systemctl", "stop", UNIT)
    user.types("find /var/lib/instantstart -mindepth 1 -delete")
    for command, _ in restore:
        user.types(command)
    names = [
        [status["pipeline"] for status in json.loads(said)] for said in (before, user.types("instantstart ls --json"))
    ]
    assert names == [["more", "my-llm"]] * 2
    found = user.finds("my-llm")
    assert (found["state"], found["revision"]) == ("cold", revision)
    user.types("instantstart warm my-llm --wait --all")


def moved(user: User, source: Path) -> None:
    """With its index and without, everything is as warm as before. Nothing can have been fetched: there is no hub."""
    machine, config = user.machine, user.machine.etc / "config.toml"
    warm = user.finds("my-llm")
    *move, (rsync, _), (fsck, _) = commands("Move a store")
    user.follow(move)
    machine.wait_active()
    assert "/mnt/nvme/instantstart" in user.types("instantstart doctor", check=False)
    assert user.finds("my-llm") == warm
    user.types("instantstart verify my-llm")
    # The other machine is this one, and its store another directory.
    machine.run("systemctl", "stop", UNIT)
    user.types(rsync.replace("other-host:/var/lib/instantstart", "/mnt/nvme/other"))
    config.write_text(config.read_text().replace("/mnt/nvme/instantstart", "/mnt/nvme/other"))
    user.types(fsck)
    machine.run("systemctl", "start", UNIT)
    assert user.finds("my-llm") == warm
    user.types("instantstart verify my-llm")
    check_bytes(machine, source / "warm", "my-llm")
