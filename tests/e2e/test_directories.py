"""Listings that the kernel keeps, names that it knows to be absent, and requests that never reach the daemon."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.mount import kernel
from tests.e2e.test_generations import FIRST, asking, config
from tests.harness import MIB, Daemon, model_directory, probe, wait_for
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(120)
passthrough_only = pytest.mark.skipif(kernel.why_no_passthrough() is not None, reason="no FUSE passthrough here")
PASSING = {"transport": "passthrough"}


def requests(daemon: Daemon) -> dict[str, int]:
    """What the mount has been asked so far, by kind."""
    with Client(str(daemon.socket)) as client:
        return client.ping().requests


def asked(daemon: Daemon, before: dict[str, int]) -> dict[str, int]:
    """The same since ``before``, what was not asked left out."""
    return {
        kind: count - before.get(kind, 0) for kind, count in requests(daemon).items() if count > before.get(kind, 0)
    }


def numbers_agree(directory: Path) -> dict[str, list[int]]:
    """A listing whose inode numbers are those of stat."""
    found: dict[str, list[int]] = probe("listing", directory)
    assert all(entry == stat for entry, stat in found.values()), found
    return found


def new_model(root: Path, seed: int) -> Path:
    """What an engine loads, and nothing beside it: a complete pipeline has no cold file."""
    model = model_directory(root, seed=seed, weights=(2 * MIB, MIB + 5))
    for path in sorted(root.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix not in (".json", ".safetensors"):
            path.unlink()
    return model


@passthrough_only
def test_a_warm_directory_is_listed_by_the_kernel_until_it_changes(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    old, new = new_model(tmp_path / "old", 1), new_model(tmp_path / "new", 2)
    (new / "another.json").write_text("{}")
    hub.publish("org/model", old)
    daemon = make_daemon("d", config=config(hub, mount=PASSING))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p", "--all")
    first = numbers_agree(daemon.path("p"))
    before = requests(daemon)
    assert numbers_agree(daemon.path("p")) == first
    assert asked(daemon, before) == {"opendir": 1, "releasedir": 1}

    hub.publish("org/model", new)
    daemon.ok("update", "p")
    assert sorted(numbers_agree(daemon.path("p"))) == sorted(os.listdir(new))
    daemon.warm("p", "--all")
    numbers_agree(daemon.path("p"))
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the directory")
    assert numbers_agree(daemon.path("p")).keys() == {path.name for path in new.iterdir()}


@passthrough_only
def test_a_healed_file_is_listed_with_its_new_number(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    model = new_model(tmp_path / "model", 3)
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub, mount=PASSING), allow=["dropped"])
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p", "--all")
    before = [numbers_agree(daemon.path("p")) for _ in range(2)][1]
    (stored,) = daemon.store.glob(f"slots/p/*/files/{FIRST}")
    with stored.open("r+b") as file:
        file.write(b"rotten")
    assert daemon.cli("verify", "p").returncode == 1
    wait_for(lambda: daemon.status("p")["state"] == "warm", "the healing")
    after = numbers_agree(daemon.path("p"))
    assert after[FIRST] != before[FIRST]
    assert probe("compare", "read", model / FIRST, daemon.path("p", FIRST)) > 0


@passthrough_only
def test_a_cold_directory_is_listed_by_the_daemon_in_one_go(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    """Its attributes change by themselves: with a kept listing the kernel would ask for each file singly."""
    hub.publish("org/model", new_model(tmp_path / "model", 4))
    daemon = make_daemon("d", config=config(hub, mount=PASSING))
    daemon.ok("add", "p", "hf://org/model")
    numbers_agree(daemon.path("p"))
    before = requests(daemon)
    numbers_agree(daemon.path("p"))
    assert asked(daemon, before)["readdir"] >= 1


@pytest.mark.parametrize("transport", ["passthrough", "pyfuse3"])
def test_absent_names_and_closes_do_not_wait_for_the_daemon(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, transport: str
) -> None:
    """An engine probes for optional files many times, and close(2) sends no FLUSH. Shown by stopping the daemon."""
    if transport == "passthrough" and (reason := kernel.why_no_passthrough()) is not None:
        pytest.skip(f"no FUSE passthrough: {reason}")
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub, mount={"transport": transport}))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    command = [sys.executable, "-m", "tests.probe", "patient", str(daemon.path("p", FIRST))]
    with asking([*command, str(daemon.path("p", "adapter_config.json"))]) as ask:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            assert ask("go") < 5000
        finally:
            os.kill(daemon.pid, signal.SIGCONT)


@passthrough_only
def test_reads_of_warm_files_never_reach_the_daemon(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub, mount=PASSING))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    for kind in ("read", "pread", "mmap-private", "mmap-shared", "sendfile"):
        assert probe("compare", kind, model / FIRST, daemon.path("p", FIRST)) > 0
    found: dict[str, Any] = requests(daemon)
    assert found["open"] >= 5
    assert "read" not in found

    # readahead(2) and WILLNEED do ask the daemon, on the same descriptors: answered, and no harm to what is read.
    assert probe("advise", model / FIRST, daemon.path("p", FIRST)) == (model / FIRST).stat().st_size
    assert requests(daemon)["read"] > 0


@passthrough_only
def test_status_names_the_transport(make_daemon: Callable[..., Daemon], hub: HubServer) -> None:
    fast = make_daemon("d", config=config(hub, mount=PASSING))
    assert fast.ok("status").splitlines()[-1] == f"{fast.mount}: passthrough"
    slow = make_daemon("e", config=config(hub, mount={"transport": "pyfuse3"}))
    assert slow.ok("status").splitlines()[-1] == f"{slow.mount}: pyfuse3"
