"""Warm files are read by the kernel itself: no byte passes the daemon; what is cold becomes warm under its readers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.mount import kernel
from tests.e2e.test_generations import FIRST, config, holding, sha256
from tests.harness import Daemon, model_directory, must, probe, wait_for
from tests.servers.hub import HubServer

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(kernel.why_no_passthrough() is not None, reason="no FUSE passthrough here"),
]


def passing(hub: HubServer, **more: Any) -> dict[str, Any]:
    return config(hub, mount={"transport": "passthrough"}, **more)


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """Whatever asks the daemon meanwhile hangs."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def inode(path: Path) -> str:
    return must("stat", "-c", "%i", path, timeout=10).strip()


def test_the_log_says_which_transport(make_daemon: Callable[..., Daemon], hub: HubServer) -> None:
    assert "transport passthrough\n" in make_daemon("d", config=passing(hub)).text()
    slow = make_daemon("e", config=config(hub, mount={"transport": "pyfuse3"}))
    assert "transport pyfuse3\n" in slow.text()


@pytest.mark.alone
def test_warm_files_are_read_and_mapped_while_the_daemon_is_stopped(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=passing(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    path = daemon.path("p", FIRST)
    with holding(path) as ask:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        with stopped(daemon):
            assert ask("hash-map") == sha256(model / FIRST)
            assert ask("hash-fd") == sha256(model / FIRST)
    for kind in ("read", "pread", "mmap-private", "mmap-shared", "sendfile"):
        assert probe("compare", kind, model / FIRST, path, timeout=60) > 0
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5


@pytest.mark.alone
def test_a_file_that_is_sealed_under_its_reader(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    """Who opened it cold goes on through the daemon; who opens it now does not need the daemon; both see one inode."""
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=passing(hub))
    daemon.ok("add", "p", "hf://org/model")
    path = daemon.path("p", FIRST)
    with holding(path) as cold:
        before = inode(path)
        daemon.warm("p")
        assert cold("hash-map") == sha256(model / FIRST)
        with holding(path) as warm:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            with stopped(daemon):
                assert warm("hash-map") == sha256(model / FIRST)
                assert warm("hash-fd") == sha256(model / FIRST)
            assert inode(path) == before
            assert cold("hash-fd") == sha256(model / FIRST)
            assert cold("hash-new") == sha256(model / FIRST)
        assert cold("hash-map") == sha256(model / FIRST)
    assert must("ls", "-i", path, timeout=10).split()[0] == before


def test_after_evict_and_refill_and_after_update(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    old, new = model_directory(tmp_path / "old", seed=61), model_directory(tmp_path / "new", seed=62)
    hub.publish("org/model", old)
    daemon = make_daemon("d", config=passing(hub))
    daemon.ok("add", "p", "hf://org/model")
    path = daemon.path("p", FIRST)
    for _ in range(2):
        daemon.warm("p")
        with holding(path) as ask:
            assert ask("hash-map") == sha256(old / FIRST)
            assert "open" in daemon.refused(1, "evict", "p")
        wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the kernel's release of the file")
        assert probe("compare", "read", old / FIRST, path, timeout=60) > 0
    daemon.warm("p")
    with holding(path) as ask:
        hub.publish("org/model", new)
        daemon.ok("update", "p")
        assert ask("hash-new") == sha256(new / FIRST)
        daemon.warm("p")
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(old / FIRST),) * 2
        assert ask("hash-new") == sha256(new / FIRST)
    wait_for(lambda: not (daemon.store / "slots/p/1").exists(), "the old generation's end")
    daemon.restart()
    assert probe("tree", new, daemon.path("p"), timeout=60)["files"] > 5


def test_a_warm_file_that_is_gone_from_the_store_is_fetched_again_by_its_open(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=passing(hub), allow=["dropped"])
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    (lost,) = daemon.store.glob(f"slots/p/*/files/{FIRST}")
    lost.unlink()
    assert probe("compare", "read", model / FIRST, daemon.path("p", FIRST), timeout=60) > 0


def test_killing_the_daemon_leaves_open_warm_files(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=passing(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    with holding(daemon.path("p", FIRST)) as ask:
        daemon.kill()
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(model / FIRST),) * 2
        assert ask("hash-new") == "ENOTCONN"
    daemon.start()
    assert probe("compare", "read", model / FIRST, daemon.path("p", FIRST), timeout=60) > 0


def deleted_files(daemon: Daemon) -> list[str]:
    """What the daemon holds open though it was deleted: its bytes are still on the disk."""
    links = (os.readlink(path) for path in Path(f"/proc/{daemon.pid}/fd").iterdir())
    return [link for link in links if link.endswith("(deleted)") and str(daemon.store) in link]


@pytest.mark.parametrize("how", ["evict", "update", "remove"])
def test_a_file_that_was_open_leaves_nothing_on_the_disk(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, how: str
) -> None:
    """The descriptor of a file that was open is kept for its next open, but not beyond the file's end."""
    old, new = model_directory(tmp_path / "old", seed=63), model_directory(tmp_path / "new", seed=64)
    hub.publish("org/model", old)
    daemon = make_daemon("d", config=passing(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    assert probe("compare", "read", old / FIRST, daemon.path("p", FIRST), timeout=60) > 0
    (stored,) = daemon.store.glob(f"slots/p/*/files/{FIRST}")
    assert any(os.readlink(path) == str(stored) for path in Path(f"/proc/{daemon.pid}/fd").iterdir())
    hub.publish("org/model", new)
    wait_for(lambda: daemon.cli(how, "p").returncode == 0, "the kernel's release of the file")
    wait_for(lambda: not stored.exists(), "the file's deletion")
    assert deleted_files(daemon) == []
