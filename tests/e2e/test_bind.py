"""transport = "bind": complete weight files lie bound over the mount, and never when they are something else by now."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.mount import kernel
from instantstart_fs.system import mountinfo
from tests.e2e.test_generations import FIRST, asking, config, holding, sha256
from tests.harness import MIB, Daemon, model_directory, must, probe, run, wait_for
from tests.servers.hub import HubServer

SECOND = "model-00002-of-00002.safetensors"
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not kernel.has_sys_admin(), reason="binds need CAP_SYS_ADMIN"),
]


def binding(hub: HubServer, **more: Any) -> dict[str, Any]:
    return config(hub, mount={"transport": "bind"}, **more)


def bound(daemon: Daemon, pipeline: str = "") -> dict[str, mountinfo.Mount]:
    """Path below the mount → its bind."""
    below = f"{daemon.mount}/"
    found = {mount.path.removeprefix(below): mount for mount in mountinfo.mounts() if mount.path.startswith(below)}
    return {path: mount for path, mount in found.items() if path.startswith(pipeline)}


def wait_bound(daemon: Daemon, *paths: str) -> None:
    wait_for(lambda: set(paths) <= set(bound(daemon)), f"binds of {paths}", 15)


def reads(daemon: Daemon) -> int:
    found = json.loads(must(sys.executable, "-c", PING, str(daemon.socket), timeout=20))
    return int(found)


PING = """
import sys
from instantstart_fs.control.client import Client
with Client(sys.argv[1]) as client:
    print(client.ping().requests.get("read", 0))
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub_server: HubServer) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("bind"), config=binding(hub_server), allow=["dropped"]) as running:
        yield running


@pytest.fixture
def p(daemon: Daemon, hub: HubServer, model: Path, request: pytest.FixtureRequest) -> str:
    """The id of a warm pipeline of this test's own, of which the weights of the load set are bound."""
    return bound_pipeline(daemon, hub, model, f"p{abs(hash(request.node.name)) % 10**9}")


def bound_pipeline(daemon: Daemon, hub: HubServer, model: Path, name: str) -> str:
    hub.publish(f"org/{name}", model)
    daemon.ok("add", name, f"hf://org/{name}", "--owner", "12345:23456", "--mode", "0555")
    daemon.warm(name)
    wait_bound(daemon, f"{name}/{FIRST}", f"{name}/{SECOND}")
    return name


def test_complete_weight_files_are_bound_read_only_and_nothing_else(daemon: Daemon, p: str, model: Path) -> None:
    assert "transport bind\n" in daemon.text()
    assert set(bound(daemon, p)) == {f"{p}/{FIRST}", f"{p}/{SECOND}"}
    for mount in bound(daemon, p).values():
        assert {"ro", "nosuid", "nodev"} <= set(mount.options.split(",")[:4])
    assert mountinfo.find_mount(str(daemon.store / "bind")) is None
    before = reads(daemon)
    for kind in ("read", "pread", "mmap-private", "mmap-shared", "sendfile"):
        assert probe("compare", kind, model / FIRST, daemon.path(p, FIRST), timeout=60) > 0
    assert reads(daemon) == before
    # Also what is not complete has its name and its bytes, and becomes bound when it is.
    assert probe("tree", model, daemon.path(p), timeout=60)["files"] > 5
    wait_bound(daemon, f"{p}/pytorch_model.bin")
    assert probe("tree", model, daemon.path(p), timeout=60)["files"] > 5


def test_a_bound_file_cannot_be_changed_by_root_nor_by_its_owner(daemon: Daemon, p: str) -> None:
    path = daemon.path(p, FIRST)
    script = """
import errno, os, sys
path, found = sys.argv[1], []
fd = os.open(path, os.O_RDONLY)
for attempt in (
    lambda: os.open(path, os.O_RDWR), lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY),
    lambda: os.chmod(path, 0o777), lambda: os.truncate(path, 0),
    lambda: os.setxattr(path, "user.x", b"y"), lambda: os.utime(path),
):
    try:
        attempt()
        found.append("done")
    except OSError as error:
        found.append(errno.errorcode[error.errno])
print(" ".join(found))
"""
    assert set(must(sys.executable, "-c", script, path, timeout=20).split()) == {"EROFS"}
    for parent in path.parents:
        if "pytest" in str(parent) and not parent.is_relative_to(daemon.mount):
            os.chmod(parent, stat.S_IMODE(os.stat(parent).st_mode) | 0o011)
    owner = ("setpriv", "--reuid=12345", "--regid=23456", "--clear-groups")
    done = run(*owner, "sh", "-c", f"echo x >> '{path}' || chmod 0777 '{path}'", timeout=20)
    assert done.returncode != 0
    assert "ead-only file system" in done.stderr


def test_owner_mode_times_and_attributes_are_those_of_the_mount(daemon: Daemon, p: str) -> None:
    path = daemon.path(p, FIRST)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 23456, 0o444)
    assert found.st_blocks * 512 >= found.st_size
    assert os.getxattr(path, "user.instantstart.state") == b"sealed"
    assert os.getxattr(path, "user.instantstart.source") == f"hf://org/{p}".encode()
    before = daemon.status(p)["last_request"]
    must("ls", "-lR", daemon.path(p), timeout=20)
    must("getfattr", "-d", path, timeout=20)
    (daemon.path(p) / "config.json").read_bytes()
    assert daemon.status(p)["last_request"] == before, "looking is no request"
    assert found.st_atime_ns == os.stat(path).st_atime_ns
    with open(path, "rb") as file:
        file.read(1)
    wait_for(lambda: daemon.status(p)["last_request"] != before, "the open to be a request", 10)
    wait_for(lambda: os.stat(path).st_atime_ns > found.st_atime_ns, "st_atime after the open", 10)
    assert "last opened at" in daemon.ok("explain", p), "an open of a bound file begins a cold start"
    assert b"last_access" in b" ".join(name.encode() for name in os.listxattr(path))
    seen = daemon.status(p)["last_request"]
    daemon.ok("verify", p)
    assert daemon.status(p)["last_request"] == seen, "verifying is no request"


def test_a_bound_file_does_not_change_beneath_its_reader(daemon: Daemon, p: str) -> None:
    """What an open changes (times, attributes) shows when the file is closed: tar compares st_ctime."""
    path, other = daemon.path(p, FIRST), daemon.path(p, SECOND)
    with open(path, "rb") as reader:
        before = os.fstat(reader.fileno())
        atime = os.stat(other).st_atime_ns
        with open(other, "rb") as sibling:
            sibling.read(1)
        wait_for(lambda: os.stat(other).st_atime_ns > atime, "the times of what was opened and closed", 10)
        assert os.fstat(reader.fileno()) == before
    wait_for(lambda: os.stat(path).st_atime_ns > before.st_atime_ns, "its own, once it is closed", 10)


def test_what_somebody_holds_is_not_evicted_also_from_another_mount_namespace(
    daemon: Daemon, p: str, model: Path
) -> None:
    path = daemon.path(p, FIRST)
    with holding(path) as ask:
        assert "open" in daemon.refused(1, "evict", p)
        assert ask("hash-fd") == sha256(model / FIRST)
    elsewhere = ["unshare", "-m", "--propagation", "private", sys.executable, "-m", "tests.probe", "hold", str(path)]
    wait_bound(daemon, f"{p}/{FIRST}", f"{p}/{SECOND}")
    with asking(elsewhere) as ask:
        assert "open" in daemon.refused(1, "evict", p)
        assert ask("hash-map") == sha256(model / FIRST)
        wait_bound(daemon, f"{p}/{FIRST}", f"{p}/{SECOND}")
    wait_for(lambda: daemon.cli("evict", p).returncode == 0, "the end of its holder")
    assert bound(daemon, p) == {}
    assert daemon.status(p)["state"] == "cold"
    assert probe("compare", "read", model / FIRST, path, timeout=60) > 0


def test_update_detaches_under_open_files_and_in_every_mount_namespace(
    daemon: Daemon, p: str, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    new = model_directory(tmp_path / "new", seed=91)
    path, target = daemon.path(p, FIRST), tmp_path / "in-the-container"
    target.mkdir()
    private = ["unshare", "-m", "--propagation", "private", sys.executable, "-m", "tests.probe"]
    with (
        holding(path) as ask,
        asking([*private, "bound", str(daemon.path(p)), str(target)]) as container,
    ):
        assert container(FIRST) == sha256(model / FIRST)
        hub.publish(f"org/{p}", new)
        daemon.ok("update", p)
        assert ask("hash-new") == sha256(new / FIRST)
        assert container(FIRST) == sha256(new / FIRST)
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(model / FIRST),) * 2
        daemon.warm(p)
        wait_bound(daemon, f"{p}/{FIRST}")
        assert probe("tree", new, daemon.path(p), timeout=60)["files"] > 5
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(model / FIRST),) * 2
    daemon.ok("remove", p)
    assert bound(daemon, p) == {}
    assert not daemon.path(p).exists()


def test_an_update_is_no_request_though_the_daemon_opens_what_is_bound(
    daemon: Daemon, p: str, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    assert daemon.status(p)["last_request"] is None
    new = tmp_path / "new"
    shutil.copytree(model, new)
    (new / "config.json").write_text('{"changed": true}')
    hub.publish(f"org/{p}", new)
    daemon.ok("update", p)
    wait_bound(daemon, f"{p}/{FIRST}", f"{p}/{SECOND}")
    daemon.ok("verify", p)
    assert daemon.status(p)["last_request"] is None
    daemon.path(p, FIRST).open("rb").close()
    wait_for(lambda: daemon.status(p)["last_request"], "a real open counts", 10)


def test_a_bound_file_that_rotted_is_unbound_and_fetched_again(daemon: Daemon, p: str, model: Path) -> None:
    (store_file,) = daemon.store.glob(f"slots/{p}/*/files/{FIRST}")
    with store_file.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"rotten")
    assert daemon.cli("verify", p).returncode == 1
    assert probe("compare", "read", model / FIRST, daemon.path(p, FIRST), timeout=60) > 0
    wait_bound(daemon, f"{p}/{FIRST}", f"{p}/{SECOND}")
    assert probe("compare", "mmap-shared", model / FIRST, daemon.path(p, FIRST), timeout=60) > 0


def test_a_bind_that_somebody_else_unmounts_comes_back(daemon: Daemon, p: str, model: Path) -> None:
    must("umount", daemon.path(p, FIRST), timeout=10)
    assert probe("compare", "read", model / FIRST, daemon.path(p, FIRST), timeout=60) > 0
    wait_bound(daemon, f"{p}/{FIRST}")


@pytest.mark.alone
def test_a_killed_daemon_leaves_binds_that_work_and_the_next_one_clears_them(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    daemon = make_daemon("d", config=binding(hub))
    bound_pipeline(daemon, hub, model, "p")
    path = daemon.path("p", FIRST)
    # Asked for after the seal, the name is kept for a day; else mount/bind_mounts.py asks within seconds.
    later = time.monotonic() + 1.1
    wait_for(lambda: time.monotonic() > later, "the end of the second for which the cold name was kept")
    must("stat", path, timeout=10)
    with holding(path) as ask:
        os.kill(daemon.pid, signal.SIGSTOP)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(model / FIRST),) * 2
        daemon.kill()
        assert (ask("hash-fd"), ask("hash-map")) == (sha256(model / FIRST),) * 2
        assert ask("hash-new") == sha256(model / FIRST)
        daemon.start()
        wait_bound(daemon, f"p/{FIRST}", f"p/{SECOND}")
        assert len(bound(daemon)) == 2
        assert ask("hash-fd") == sha256(model / FIRST)
        assert "open" in daemon.refused(1, "evict", "p")
    daemon.stop()
    assert bound(daemon) == {}


def test_named_models_are_bound_below_their_directories(
    make_daemon: Callable[..., Daemon], tmp_path: Path, hub: HubServer
) -> None:
    asr, llm = (model_directory(tmp_path / name, seed=seed, weights=(MIB,)) for name, seed in (("asr", 5), ("llm", 6)))
    daemon = make_daemon("d", config=binding(hub))
    daemon.ok("add", "agent", "--model", f"asr=file://{asr}", "--model", f"llm=file://{llm}")
    daemon.warm("agent")
    shard = "model-00001-of-00001.safetensors"
    wait_bound(daemon, f"agent/asr/{shard}", f"agent/llm/{shard}")
    for name, source in (("asr", asr), ("llm", llm)):
        assert probe("tree", source, daemon.path("agent", name), timeout=60)["files"] > 5


def test_auto_binds_where_the_kernel_is_too_old_for_passthrough(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    """A process that sees Linux 2.6, by its personality."""
    old = ("setarch", os.uname().machine, "--uname-2.6")
    if run(*old, "true").returncode != 0:
        pytest.skip("setarch cannot pretend an old kernel here")
    daemon = make_daemon("d", config=config(hub, mount={"transport": "auto"}), prefix=old)
    assert "transport bind (no FUSE passthrough: Linux 2.6 is older than 6.9)" in daemon.text()
    daemon.ok("add", "p", f"file://{model}")
    daemon.warm("p")
    wait_bound(daemon, f"p/{FIRST}")
    assert "bind (no FUSE passthrough" in daemon.cli("doctor", "--json").stdout


@pytest.fixture
def full(make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path) -> Iterator[Daemon]:
    store = {"capacity": "64MiB", "low_watermark": 0.5, "high_watermark": 0.8}
    daemon = make_daemon("d", config=binding(hub, store=store, eviction={"keep_hot": "0s"}))
    for position, name in enumerate(("a", "b")):
        source = model_directory(tmp_path / name, seed=70 + position, weights=(14 * MIB, 6 * MIB))
        daemon.ok("add", name, f"file://{source}")
        daemon.warm(name)
        daemon.ok("touch", name)
    wait_bound(daemon, f"a/{FIRST}", f"b/{FIRST}")
    yield daemon


def test_the_evictor_takes_the_next_one_where_the_least_recent_is_bound_and_open(full: Daemon, tmp_path: Path) -> None:
    with holding(full.path("a", FIRST)) as ask:
        full.ok("touch", "b")
        source = model_directory(tmp_path / "c", seed=79, weights=(14 * MIB, 6 * MIB))
        full.ok("add", "c", f"file://{source}")
        full.warm("c")
        wait_for(lambda: full.status("b")["state"] == "cold", "the eviction of the next")
        assert full.status("a")["state"] in ("warm", "unverified")
        assert ask("hash-fd") == sha256(tmp_path / "a" / FIRST)
