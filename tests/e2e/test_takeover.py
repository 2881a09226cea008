"""Restarts under load: the next daemon goes on with the live mount, and its readers see a pause and no error.

tests/supervisor.py stands in for systemd; tests/nspawn repeats the main thing under the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.mount import kernel
from tests.e2e.test_generations import FIRST, config, holding, sha256
from tests.harness import REPOSITORY, Daemon, model_directory, mounted, must, probe, wait_for
from tests.servers.hub import HubServer
from tests.supervisor import Supervised

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(kernel.why_no_passthrough() is not None, reason="no FUSE passthrough here"),
]
GOES_ON = "the mount of the daemon before goes on"


@pytest.fixture
def daemon(tmp_path: Path, hub: HubServer, model: Path) -> Iterator[Supervised]:
    """Serving the pipeline ``p``, cold."""
    hub.publish("org/model", model)
    with Supervised(tmp_path / "d", config=passing(hub)) as daemon:
        daemon.ok("add", "p", "hf://org/model")
        yield daemon


def passing(hub: HubServer, **mount: object) -> dict[str, object]:
    return config(hub, mount={"transport": "passthrough", **mount})


@contextmanager
def black_hole(hub: HubServer) -> Iterator[None]:
    """Requests for FIRST are never answered."""
    hub.fault("blackhole", path=FIRST)
    try:
        yield
    finally:
        hub.clear()


class Readers:
    """Processes of tests/readers.py; ``end`` gives what each of them found."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, kind: str, source: Path, mounted: Path) -> None:
        command = [sys.executable, "-m", "tests.readers", kind, str(source), str(mounted), str(len(self._processes))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"

    def end(self) -> list[dict[str, Any]]:
        """Fails when one of them was ended by a signal: SIGBUS is what it would be."""
        found = []
        for process in self._processes:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"a reader ended with {process.returncode}"
            found.append(json.loads(out))
        return found

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def reading() -> Iterator[Readers]:
    readers = Readers()
    try:
        yield readers
    finally:
        readers.kill()


def test_readers_see_no_restart(daemon: Supervised, hub: HubServer, tmp_path: Path) -> None:
    """Four restarts, half of them SIGKILL, under readers of warm and of cold files that check every byte."""
    cold = model_directory(tmp_path / "cold", seed=77)
    hub.publish("org/cold", cold)
    warm = tmp_path / "warm"
    model_directory(warm, seed=78)
    hub.publish("org/warm", warm)
    daemon.ok("add", "warm", "hf://org/warm")
    daemon.ok("add", "cold", "hf://org/cold")
    daemon.warm("warm", "--all")
    with reading() as readers:
        readers.start("held", warm, daemon.path("warm"))
        readers.start("open", warm, daemon.path("warm"))
        readers.start("held", cold, daemon.path("cold"))
        readers.start("open", cold, daemon.path("cold"))
        for number in range(4):
            daemon.again(kill=number % 2 == 0)
        found = readers.end()
    assert [reader["errors"] for reader in found] == [[]] * 4
    assert all(reader["reads"] > 20 for reader in found), found
    assert daemon.text().count(GOES_ON) == 4


def test_a_read_that_waits_is_answered_by_the_next_daemon(daemon: Supervised, hub: HubServer, model: Path) -> None:
    """Received and not answered when the daemon is killed: the kernel sends it again."""
    command = [sys.executable, "-m", "tests.probe", "compare", "mmap-shared", model / FIRST, daemon.path("p", FIRST)]
    before = len(hub.requests())  # `add` has asked for it, too
    with black_hole(hub):
        reader = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True
        )
        try:
            wait_for(lambda: any(FIRST in request.path for request in hub.requests()[before:]), "the reader's demand")
            daemon.leave(kill=True)
        except BaseException:
            reader.kill()
            raise
    daemon.start()
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert json.loads(out) > 0


def test_opens_that_nobody_received_wait_for_the_next_daemon(daemon: Supervised, model: Path) -> None:
    daemon.warm("p")
    os.kill(daemon.pid, signal.SIGSTOP)
    readers = [
        subprocess.Popen(["sha256sum", str(daemon.path("p", FIRST))], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    daemon.again(kill=True)
    for reader in readers:
        out, _ = reader.communicate(timeout=30)
        assert out.split()[0] == sha256(model / FIRST)


def test_a_file_held_over_a_restart_stays_open(daemon: Supervised, model: Path) -> None:
    """It can be opened again in its mode, counts as open, and stops to count when it is closed."""
    with holding(daemon.path("p", "config.json")) as cold:
        daemon.warm("p")
        with holding(daemon.path("p", FIRST)) as warm:
            for kill in (True, False):
                daemon.again(kill=kill)
                for ask, name in ((warm, FIRST), (cold, "config.json")):
                    for what in ("hash-new", "hash-fd", "hash-map"):
                        assert ask(what) == sha256(model / name), (kill, name, what)
                assert "open" in daemon.refused(1, "evict", "p")
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the release of the last file")
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5


def test_a_lease_is_taken_again_after_a_restart(daemon: Supervised) -> None:
    command = [sys.executable, "-m", "instantstart_fs.cli", "lease", "p", "--", "sleep", "60"]
    leased = subprocess.Popen(command, env={**os.environ, **daemon.env}, cwd=REPOSITORY, start_new_session=True)
    try:
        wait_for(lambda: daemon.status("p")["leases"] == 1, "the lease")
        daemon.again(kill=True)
        wait_for(lambda: daemon.status("p")["leases"] == 1, "the lease once more")
    finally:
        os.killpg(leased.pid, signal.SIGKILL)
        leased.wait(10)


def test_a_generation_held_over_a_restart_stays(daemon: Supervised, hub: HubServer, tmp_path: Path) -> None:
    new = model_directory(tmp_path / "new", seed=79)
    old_sum = sha256(Path(must("readlink", "-f", daemon.path("p", FIRST)).strip()))
    with holding(daemon.path("p", FIRST)) as ask:
        hub.publish("org/model", new)
        daemon.ok("update", "p")
        daemon.again(kill=True)
        assert (daemon.store / "slots/p/1").exists()
        assert ask("hash-fd") == old_sum
        assert ask("hash-new") == sha256(new / FIRST)
    wait_for(lambda: not (daemon.store / "slots/p/1").exists(), "the old generation's end")


def test_names_that_changed_while_no_daemon_lived_are_asked_again(
    daemon: Supervised, hub: HubServer, tmp_path: Path
) -> None:
    """News for the kernel that died with the daemon: the next one makes it ask again."""
    daemon.warm("p")
    must("ls", "-lR", daemon.path("p"))
    daemon.leave(kill=True)
    (daemon.store / "slots/p/1/files" / FIRST).unlink()
    daemon.allow.append("dropped")
    daemon.start()
    new = model_directory(tmp_path / "new", seed=80)
    hub.publish("org/model", new)
    daemon.ok("update", "p")
    assert probe("tree", new, daemon.path("p"), timeout=60)["files"] > 5


def test_stopping_for_good_unmounts_and_ends_who_waits(daemon: Supervised, hub: HubServer) -> None:
    with black_hole(hub):
        before = len(hub.requests())  # `add` has asked for it, too
        reader = subprocess.Popen(["dd", f"if={daemon.path('p', FIRST)}", "of=/dev/null"], stderr=subprocess.PIPE)
        wait_for(lambda: any(FIRST in request.path for request in hub.requests()[before:]), "the reader's demand")
        daemon.stop()
        _, err = reader.communicate(timeout=10)
    assert reader.returncode == 1
    assert b"error" in err
    assert not mounted(daemon.mount)
    daemon.start()
    assert GOES_ON not in daemon.text()


# -- where it cannot be ------------------------------------------------------------------------------------------------


def edit_table(daemon: Supervised, offset: int, data: bytes) -> None:
    """Of the handle table that the supervisor keeps."""
    os.pwrite(daemon.kept.descriptors["instantstart-handles"], data, offset)


def check_made_anew(daemon: Supervised, model: Path, reason: str) -> None:
    assert reason in daemon.text()
    assert GOES_ON not in daemon.text()
    assert probe("compare", "read", model / FIRST, daemon.path("p", FIRST), timeout=60) > 0
    # And the one after it can go on.
    daemon.again(kill=True)
    assert GOES_ON in daemon.text()


def test_a_table_of_another_format_is_refused_and_the_mount_made_anew(daemon: Supervised, model: Path) -> None:
    daemon.warm("p")
    with holding(daemon.path("p", FIRST)) as ask:
        daemon.leave(kill=True)
        edit_table(daemon, 8, (99).to_bytes(4, sys.byteorder))
        daemon.start()
        check_made_anew(daemon, model, "has format 99, and this version reads format 1")
        assert ask("hash-fd") == sha256(model / FIRST)


def test_a_connection_without_its_table_is_made_anew(daemon: Supervised, model: Path) -> None:
    daemon.leave(kill=True)
    os.close(daemon.kept.descriptors.pop("instantstart-handles"))
    daemon.start()
    check_made_anew(daemon, model, "its table of open files is not there")


def test_a_mount_that_was_unmounted_meanwhile_is_made_anew(daemon: Supervised, model: Path) -> None:
    daemon.leave(kill=True)
    must("umount", "-cfl", daemon.mount)
    daemon.start()
    check_made_anew(daemon, model, "it was unmounted or aborted meanwhile")


def test_another_mountpoint_ends_the_old_mount(daemon: Supervised, model: Path, tmp_path: Path) -> None:
    daemon.leave(kill=False)
    old, daemon.mount = daemon.mount, tmp_path / "elsewhere"
    daemon.start()
    check_made_anew(daemon, model, "and the mountpoint is now")
    assert not mounted(old)


def test_without_a_descriptor_store_a_stop_unmounts(tmp_path: Path, hub: HubServer, model: Path) -> None:
    hub.publish("org/model", model)
    with Daemon(tmp_path / "d", config=passing(hub)) as daemon:
        daemon.ok("add", "p", "hf://org/model")
        daemon.restart()
        assert GOES_ON not in daemon.text()


def test_pyfuse3_unmounts_under_a_supervisor_too(tmp_path: Path, hub: HubServer, model: Path) -> None:
    hub.publish("org/model", model)
    with Supervised(tmp_path / "d", config=config(hub, mount={"transport": "pyfuse3"})) as daemon:
        daemon.ok("add", "p", "hf://org/model")
        daemon.leave(kill=False)
        assert not mounted(daemon.mount)
        daemon.start()
        assert probe("compare", "read", model / FIRST, daemon.path("p", FIRST), timeout=60) > 0


# -- what the supervisor is told ---------------------------------------------------------------------------------------


def test_the_watchdog_is_fed_while_the_mount_answers(tmp_path: Path, hub: HubServer) -> None:
    daemon = Supervised(tmp_path / "d", config=passing(hub))
    daemon.env["WATCHDOG_USEC"] = "600000"
    with daemon:
        assert "READY=1" in daemon.told("STATUS=ready: 0 pipelines")
        daemon.told("WATCHDOG=1")
        os.kill(daemon.pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{daemon.pid}/stat").read_text().split()[2] == "T", "the daemon's stop")
        before = len(daemon.kept.messages)
        fed = [text for text in daemon.kept.messages[before:] if "WATCHDOG=1" in text]
        os.kill(daemon.pid, signal.SIGCONT)
        assert fed == []
        wait_for(lambda: any("WATCHDOG=1" in text for text in daemon.kept.messages[before:]), "the next sign of life")
