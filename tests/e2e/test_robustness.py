"""What an operator, a full machine or many clients at once do to a daemon: it goes on, or ends with a clear line."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError
from instantstart_fs.mount import kernel
from tests.harness import Daemon, mounted, must, run, unmount
from tests.servers.hub import HubServer


def test_500_clients_at_once_are_all_answered(make_daemon: Callable[..., Daemon], model: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    start = threading.Barrier(500)
    failed: list[InstantStartError] = []

    def ask(number: int) -> None:
        start.wait(60)
        try:
            with Client(str(daemon.socket)) as client:
                if number % 2:
                    assert client.status("m").pipeline == "m"
                else:
                    client.touch("m")
        except InstantStartError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed, f"{len(failed)} of 500: {failed[0]}"


def ended(daemon: Daemon) -> int:
    """Its exit status, once it has ended by itself."""
    process, daemon._process = daemon._process, None
    assert process is not None
    return process.wait(20)


@pytest.mark.parametrize("transport", ["pyfuse3", "passthrough", "bind"], indirect=True)
@pytest.mark.parametrize("way", ["umount -l", "abort"])
def test_an_unmount_under_open_files_ends_the_daemon(
    make_daemon: Callable[..., Daemon], model: Path, transport: None, way: str
) -> None:
    """It would serve nobody new, and nothing would start it again."""
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    with contextlib.suppress(OSError), daemon.path("m", "config.json").open("rb") as held:  # the close tells of it
        held.read(1)
        if way == "abort":
            mount = kernel.find_mount(str(daemon.mount))
            assert mount is not None
            kernel.abort_connection(mount)
        else:
            must("umount", "-l", daemon.mount)
        assert ended(daemon) == 1
    assert "was unmounted by somebody else; the next start" in daemon.text().splitlines()[-1]
    assert not mounted(daemon.mount)
    daemon.start()
    assert json.loads(daemon.path("m", "config.json").read_bytes())


@pytest.mark.parametrize("transport", ["pyfuse3", "passthrough"], indirect=True)
def test_what_is_mounted_over_it_or_in_its_place_is_left_alone(
    make_daemon: Callable[..., Daemon], model: Path, transport: None
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    must("mount", "-t", "tmpfs", "over", daemon.mount)
    try:
        must("mount", "-o", "remount,size=1m", daemon.mount)
        daemon.ok("status", "m")
        assert daemon.running
        must("umount", daemon.mount)
        with daemon.path("m", "config.json").open("rb") as held:
            held.read(1)
            must("umount", "-l", daemon.mount)
            must("mount", "-t", "tmpfs", "instead", daemon.mount)
            assert ended(daemon) == 1
        found = kernel.find_mount(str(daemon.mount))
        assert found is not None and found.source == "instead"
    finally:
        unmount(daemon.mount)


def test_an_error_outlives_restarts_until_a_fetch_succeeds(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    endpoint = {"origins": {"huggingface": {"endpoint": hub.endpoint}}}
    daemon = make_daemon("forget", config=endpoint, allow=["access-refused", "refused"])
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("status", status=403, path="/resolve/")
    assert daemon.cli("warm", "p", "--wait", timeout=60).returncode == 1
    error = daemon.status("p")["error"]
    assert error["code"] == "access-refused"
    daemon.restart()
    daemon.kill()
    daemon.start()
    status = daemon.status("p")
    assert (status["state"], status["error"]) == ("error", error)
    assert run("getfattr", "-n", "user.instantstart.error", daemon.path("p")).stdout.count("access-refused") == 1
    hub.clear()
    daemon.warm("p")
    assert daemon.status("p")["error"] is None
    daemon.kill()
    daemon.start()
    assert (daemon.status("p")["state"], daemon.status("p")["error"]) == ("warm", None)
