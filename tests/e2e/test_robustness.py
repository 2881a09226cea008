"""What an operator, a full machine or many clients at once do to a daemon: it goes on, or ends with a clear line."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.messages import PAUSE_SIZE, WorkerSettings
from instantstart_fs.mount import kernel
from instantstart_fs.origins import lister
from instantstart_fs.origins.settings import OriginSettings
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.system import mountinfo
from instantstart_fs.upkeep.index_recovery import open_index
from tests import harness
from tests.harness import (
    MIB,
    Daemon,
    loop_ext4,
    model_directory,
    mounted,
    must,
    run,
    safetensors_file,
    unmount,
    wait_for,
)
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
            mount = mountinfo.find_mount(str(daemon.mount))
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
        found = mountinfo.find_mount(str(daemon.mount))
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
    assert (status["state"], status["error"]["code"]) == ("error", error["code"])  # of this file or of another
    assert run("getfattr", "-n", "user.instantstart.error", daemon.path("p")).stdout.count("access-refused") == 1
    hub.clear()
    daemon.warm("p")
    assert daemon.status("p")["error"] is None
    daemon.kill()
    daemon.start()
    assert (daemon.status("p")["state"], daemon.status("p")["error"]) == ("warm", None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with loop_ext4(tmp_path, 64 * MIB) as mountpoint:
        yield mountpoint


def use_up(directory: Path) -> None:
    """Every inode, then every block."""
    directory.mkdir()
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (directory / str(number)).touch()
    with contextlib.suppress(OSError), (directory / "0").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("transport", ["passthrough", "bind"], indirect=True)
def test_a_full_disk_at_the_start_makes_nothing_slow(
    make_daemon: Callable[..., Daemon], model: Path, small_disk: Path, transport: None
) -> None:
    daemon = make_daemon(store=small_disk / "store", allow=["no space is left"], config={"staging": {"enabled": False}})
    chosen = harness.TRANSPORT
    daemon.ok("add", "m", f"file://{model}", "--include", "*.json")
    daemon.warm("m", "--all")
    daemon.stop()
    daemon.configure({"mount": {"transport": "auto" if chosen == "passthrough" else "bind"}})
    use_up(small_disk / "full")
    daemon.start()
    assert f"transport {chosen}" in [line for line in daemon.text().splitlines() if "transport " in line][-1]
    assert json.loads(daemon.path("m", "config.json").read_bytes())


def test_binds_that_could_not_be_tried_at_the_start_begin_later(
    make_daemon: Callable[..., Daemon], model: Path, small_disk: Path
) -> None:
    """A store of an earlier version, without the directory that binds need, and a full disk."""
    if not kernel.has_sys_admin():
        pytest.skip("binds need CAP_SYS_ADMIN")
    daemon = make_daemon(
        store=small_disk / "store", allow=["no space is left"], config={"mount": {"transport": "bind"}}
    )
    daemon.stop()
    (daemon.store / "bind").rmdir()
    use_up(small_disk / "full")
    daemon.start()
    assert "transport pyfuse3 (no binds from" in daemon.text().splitlines()[-1]
    shutil.rmtree(small_disk / "full")
    wait_for(lambda: "complete files are bound from now on" in daemon.text(), "the binds", 30)
    assert daemon.ok("status").splitlines()[-1].endswith("bind")


def spoil(slot: Path, kind: str) -> None:
    """Do something to a warm slot, under its daemon."""
    files = slot / "1/files"
    weights = next(path for path in files.iterdir() if path.name.startswith("model-00001"))
    match kind:
        case "files":
            shutil.rmtree(files)
        case "generation":
            shutil.rmtree(slot / "1")
        case "slot":
            shutil.rmtree(slot)
        case "pipeline.json":
            (slot / "pipeline.json").unlink()
            (slot / "pipeline.json").mkdir()
            weights.unlink()
        case "manifest.json":
            (slot / "1/manifest.json").unlink()
            weights.unlink()
        case "files is a link":
            files.rename(slot.parent.parent / "elsewhere")
            files.symlink_to(slot.parent.parent / "elsewhere")
        case "directory":
            weights.unlink()
            (weights / "x").mkdir(parents=True)
        case "symlink":
            weights.rename(slot.parent.parent / "other")
            weights.symlink_to(slot.parent.parent / "other")
        case "fifo":
            weights.unlink()
            os.mkfifo(weights)
        case "truncated":
            os.truncate(weights, 5)
        case "oversized":
            os.truncate(weights, weights.stat().st_size + 4096)
        case "another sealed file":
            other = next(path for path in files.iterdir() if path.name.startswith("model-00002"))
            must("cp", "--preserve=all", other, f"{weights}.new")
            os.truncate(f"{weights}.new", weights.stat().st_size)
            os.rename(f"{weights}.new", weights)
        case "small file is a directory":
            (files / "config.json").unlink()
            (files / "config.json").mkdir()


SPOILED = (
    "files", "generation", "slot", "pipeline.json", "manifest.json", "files is a link", "directory", "symlink", "fifo",
    "truncated", "oversized", "another sealed file", "small file is a directory",
)  # fmt: skip


@pytest.mark.parametrize("transport", ["pyfuse3", "passthrough", "bind"], indirect=True)
def test_what_somebody_did_to_a_warm_slot_is_mended_within_the_same_read(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, transport: None
) -> None:
    source = model_directory(tmp_path / "source", weights=(2 * MIB, 2 * MIB + 12345))
    hub.publish("org/model", source)
    endpoint = {"origins": {"huggingface": {"endpoint": hub.endpoint}}, "staging": {"enabled": False}}
    daemon = make_daemon(config=endpoint, allow=["dropped", "lost", "wrong bytes were served"])
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    names = [path.name for path in source.iterdir() if path.name.startswith("model-0") or path.name == "config.json"]
    kinds = SPOILED if harness.TRANSPORT != "bind" else ("files", "directory", "truncated", "another sealed file")
    for kind in kinds:
        must("sh", "-c", 'cat "$0"/*.safetensors "$0"/config.json > /dev/null', daemon.path("p"))
        spoil(daemon.store / "slots/p", kind)
        bound = any(mount.path.startswith(str(daemon.path("p"))) for mount in mountinfo.mounts())
        if bound:  # what is bound is the file itself, and right to the end; a new bind is checked
            for mount in mountinfo.mounts():
                if mount.path.startswith(f"{daemon.path('p')}/"):
                    kernel.umount(mount.path, lazily=True)
        for name in names:
            done = run("cmp", daemon.path("p", name), source / name, timeout=60)
            assert done.returncode == 0, f"{kind}: {name}: {done.stdout}{done.stderr}"
        with Client(str(daemon.socket)) as client:
            wait_for(lambda: client.status("p").state == "warm", f"{kind}: warm again", 30)
            assert client.status("p").error is None, kind
        stored = daemon.store / "slots/p/1/files"
        assert all((stored / name).is_file() and not (stored / name).is_symlink() for name in names), kind
    daemon.restart()
    assert daemon.status("p")["state"] == "warm"
    must("cmp", daemon.path("p", names[0]), source / names[0])


def lose_index(store: Path, kind: str, other: Path) -> None:
    index = store / "index"
    match kind:
        case "gone":
            shutil.rmtree(index)
        case "gone with the nodeids and the identity":
            shutil.rmtree(index)
            (store / "nodeids").unlink()
            (store / "id").unlink()
        case "only its lock":
            (index / "data.mdb").unlink()
        case "empty":
            (index / "data.mdb").write_bytes(b"")
        case "garbage":
            (index / "data.mdb").write_bytes(b"not an index" * 1000)
        case "cut short":
            os.truncate(index / "data.mdb", 3 * 4096)
        case "of another store" | "of another store, of an earlier version":
            shutil.rmtree(index)
            must("cp", "-a", "--sparse=always", other / "index", index)
            if "," in kind:
                (store / "id").unlink()


def test_a_lost_index_is_made_anew_at_the_start(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """From the slots alone: the source is gone. Never an empty mount, never a slot that is removed."""
    source = model_directory(tmp_path / "source", weights=(MIB, MIB + 12345))
    kept = tmp_path / "kept"
    shutil.copytree(source, kept)
    stranger = make_daemon("stranger")
    stranger.ok("add", "x", f"file://{source}")
    stranger.stop()
    daemon = make_daemon(allow=["index cannot be used"])
    daemon.ok("add", "m", f"file://{source}", "--owner", "5:6", "--quota", "1GB")
    daemon.ok("pin", "m")
    daemon.ok("add", "cold", f"file://{source}")
    daemon.warm("m")
    (daemon.store / "slots/odd").mkdir()
    (daemon.store / "slots/odd/precious").touch()
    shutil.rmtree(source)
    given: set[int] = {daemon.path("m", "config.json").stat().st_ino}
    daemon.stop()
    for kind in (
        "gone", "gone with the nodeids and the identity", "only its lock", "empty", "garbage", "cut short",
        "of another store", "of another store, of an earlier version",
    ):  # fmt: skip
        lose_index(daemon.store, kind, stranger.store)
        for again in (False, True):
            with BlobStore.open(str(daemon.store)) as store, open_index(store, rest=3600) as index:
                records = {record.spec.id: record for record in index.read(lambda txn: list(txn.pipelines()))}
                clock = index.read(lambda txn: txn.clock())
                complete = index.read(lambda txn: [file.state for _, file in txn.files("m", 1)])
            assert records.keys() == {"m", "cold"} and records["m"].pinned and records["m"].spec.uid == 5, kind
            assert complete == ["unverified"] * 8, kind
            assert clock is not None and clock.rest == 3600, kind
            assert (min(records["m"].directory_nodeids.values()) in given) is again, f"{kind}: a nodeid was given twice"
            given.update(nodeid for record in records.values() for nodeid in record.directory_nodeids.values())
    lose_index(daemon.store, "gone", stranger.store)
    daemon.start()
    assert "the index was made anew" in daemon.text() and "2 pipelines, 8 complete files" in daemon.text()
    assert (daemon.status("m")["state"], daemon.status("cold")["state"]) == ("unverified", "cold")
    for path in kept.iterdir():
        if path.name.startswith("model-0") or path.suffix == ".json":
            assert daemon.path("m", path.name).read_bytes() == path.read_bytes()
    assert (daemon.store / "slots/odd/precious").exists()


def test_a_slot_that_was_removed_while_no_daemon_ran_is_resolved_anew_by_update(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    endpoint = {"origins": {"huggingface": {"endpoint": hub.endpoint}}}
    daemon = make_daemon(config=endpoint, allow=["cannot be served"])
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    daemon.stop()
    shutil.rmtree(daemon.store / "slots/p")
    daemon.start()
    status = daemon.status("p")
    assert (status["state"], status["error"]["code"]) == ("error", "store-lost")
    assert "instantstart update p" in status["error"]["message"]
    daemon.ok("update", "p")
    assert daemon.status("p")["state"] == "cold"
    daemon.warm("p")
    must("cmp", daemon.path("p", "config.json"), model / "config.json")


SHARDS = 300
LIMIT = 256


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many") / "model"
    root.mkdir()
    for number in range(1, SHARDS + 1):
        safetensors_file(root / f"model-{number:05}-of-{SHARDS:05}.safetensors", 5000 + number, number)
    (root / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize("transport", ["pyfuse3", "passthrough"], indirect=True)
def test_more_shards_than_descriptors_harm_nobody_else(
    make_daemon: Callable[..., Daemon], many_shards: Path, model: Path, transport: None
) -> None:
    daemon = make_daemon(
        prefix=["prlimit", f"--nofile={LIMIT}:{LIMIT}"], config={"http": {"listen": "127.0.0.1:0"}, "mount": {}}
    )
    daemon.ok("add", "many", f"file://{many_shards}")
    daemon.ok("add", "other", f"file://{model}")
    daemon.warm("many")
    daemon.warm("other")
    daemon.restart()  # both are read anew
    page = re.findall(r"page (http://\S+)", daemon.text())[-1].rstrip("/")
    held: list[int] = []
    connections: list[socket.socket] = []
    refused = 0
    try:
        for path in sorted(daemon.path("many").glob("*.safetensors")):
            try:
                held.append(os.open(path, os.O_RDONLY))
                assert os.pread(held[-1], 8, 0), path
            except OSError as error:
                assert error.errno == errno.ENFILE, path
                refused += 1
        assert len(held) > LIMIT / 2 and refused, (len(held), refused)
        for _ in range(LIMIT):
            connections.append(socket.socket(socket.AF_UNIX))
            connections[-1].connect(str(daemon.socket))
        time.sleep(0.3)  # they are accepted, as far as they are
        fds = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        assert fds <= LIMIT - LIMIT // 16, f"{fds} descriptors of {LIMIT}"
        for connection in connections:
            connection.close()
        assert wait_for(lambda: daemon.cli("status", "other", "--json").returncode == 0, "an answer", 30)
        assert daemon.status("other")["error"] is None
        assert "instantstart_" in run("curl", "-sf", f"{page}/metrics").stdout
        while held:
            os.close(held.pop())
        for name in ("config.json", "model.safetensors.index.json"):
            assert daemon.path("other", name).read_bytes() == (model / name).read_bytes()
        for path in sorted(daemon.path("many").glob("*.safetensors")):
            assert path.read_bytes() == (many_shards / path.name).read_bytes()
    finally:
        for fd in held:
            os.close(fd)
        for connection in connections:
            connection.close()
    assert (daemon.status("many")["state"], daemon.status("many")["error"]) == ("unverified", None)


@pytest.mark.parametrize("transport", ["bind"], indirect=True)
def test_read_ahead_leaves_descriptors_to_readers(
    make_daemon: Callable[..., Daemon], many_shards: Path, model: Path, transport: None
) -> None:
    """What is bound costs the daemon no descriptor to be read, but one to be read ahead."""
    daemon = make_daemon(prefix=["prlimit", f"--nofile={LIMIT}:{LIMIT}"])
    daemon.ok("add", "many", f"file://{many_shards}")
    daemon.ok("add", "other", f"file://{model}")
    daemon.warm("many")
    daemon.warm("other")
    held: list[int] = []
    try:
        for path in sorted(daemon.path("many").glob("*.safetensors")):
            held.append(os.open(path, os.O_RDONLY))
            assert os.pread(held[-1], 8, 0), path
        assert len(held) > LIMIT
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert daemon.path("other", "config.json").read_bytes() == (model / "config.json").read_bytes()
            time.sleep(0.02)
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("transport", ["pyfuse3", "passthrough"], indirect=True)
def test_a_cold_fill_under_want_of_descriptors_is_no_error(
    make_daemon: Callable[..., Daemon], many_shards: Path, transport: None
) -> None:
    daemon = make_daemon(prefix=["prlimit", f"--nofile={LIMIT}:{LIMIT}"])
    daemon.ok("add", "many", f"file://{many_shards}")
    held = []
    try:
        for path in sorted(daemon.path("many").glob("*.safetensors")):
            with contextlib.suppress(OSError):
                held.append(os.open(path, os.O_RDONLY))
                os.pread(held[-1], 8, 0)
        daemon.ok("warm", "many")
        time.sleep(1.0)
        assert daemon.status("many")["state"] in ("filling", "partial", "unverified")
    finally:
        for fd in held:
            os.close(fd)
    daemon.warm("many")
    for path in sorted(daemon.path("many").glob("*.safetensors")):
        assert path.read_bytes() == (many_shards / path.name).read_bytes()


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pids() -> Iterator[Path]:
    """A control group of our own that limits pids."""
    for root in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        if (root / "cgroup.procs").exists():
            group = root / f"instantstart-test-{os.getpid()}"
            with contextlib.suppress(OSError):
                group.mkdir()
                if (group / "pids.max").exists():
                    break
                group.rmdir()
    else:
        pytest.skip("no control group with pids can be made here")
    yield group
    (group / "pids.max").write_text("max")
    wait_for(lambda: not (group / "cgroup.procs").read_text().strip(), "the group to be empty", 30)
    group.rmdir()


def test_where_no_thread_can_be_started_the_work_goes_on(
    make_daemon: Callable[..., Daemon], many_shards: Path, pids: Path
) -> None:
    prefix = ["sh", "-c", f'echo $$ > {pids}/cgroup.procs; exec "$@"', "sh"]
    daemon = make_daemon(prefix=prefix, allow=["(staging process|fetch worker) cannot be started"])
    try:
        daemon.ok("add", "many", f"file://{many_shards}")
        (pids / "pids.max").write_text((pids / "pids.current").read_text().strip())
        shards = sorted(daemon.path("many").glob("*.safetensors"))[:40]
        with ThreadPoolExecutor(20) as readers:
            found = list(readers.map(Path.read_bytes, shards))
        assert found == [(many_shards / path.name).read_bytes() for path in shards]
        daemon.ok("evict", "many")
        assert daemon.status("many")["error"] is None
        assert "Traceback" not in daemon.text()
    finally:
        (pids / "pids.max").write_text("max")
        daemon.stop()


def alone_in(pids: Path, module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the module where no thread and no process can be started beside it."""
    (pids / "pids.max").write_text("1")
    command = ["sh", "-c", f'echo $$ > {pids}/cgroup.procs; exec "$@"', "sh", sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=harness.REPOSITORY, capture_output=True, timeout=60, **options)


def test_a_fetch_worker_that_may_start_no_thread_says_so(pids: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, (tmp_path / "pause").open("w+b") as pause:
        pause.truncate(PAUSE_SIZE)
        fds = (theirs.fileno(), pause.fileno(), pause.fileno())
        settings = msgspec.json.encode(WorkerSettings()).decode()
        ended = alone_in(pids, "instantstart_fs.filler.worker", *map(str, fds), settings, pass_fds=fds)
    assert ended.returncode == 1
    assert ended.stderr == b"fetch worker: can't start new thread; raise TasksMax= (pids.max)\n"


def test_a_listing_process_that_may_start_no_thread_says_so(pids: Path, model: Path) -> None:
    source = ModelSpec(f"file://{model}")
    order = lister.Order("check", PipelineSpec("m", (source,)), source, OriginSettings(), 60)
    body = msgspec.msgpack.encode(order)
    ended = alone_in(pids, "instantstart_fs.origins.lister", input=len(body).to_bytes(4, "big") + body)
    said = msgspec.msgpack.decode(ended.stdout[4:], type=lister.Failed)
    assert (said.code, said.message) == ("out-of-resources", "can't start new thread; raise TasksMax= (pids.max)")
    assert ended.stderr == b""


@pytest.mark.parametrize("transport", ["pyfuse3"], indirect=True)
@pytest.mark.parametrize("what", ["slots", "."])
def test_a_store_that_is_removed_under_the_daemon_ends_nothing(
    make_daemon: Callable[..., Daemon], model: Path, transport: None, what: str
) -> None:
    """Nothing can be kept any more. It is said, and nobody gets other bytes or waits."""
    daemon = make_daemon(
        config={"http": {"listen": "127.0.0.1:0"}}, allow=["from the store", "removed under", "manifest is gone"]
    )
    daemon.ok("add", "m", f"file://{model}")
    daemon.warm("m")
    page = wait_for(lambda: re.search(r"page (http://\S+)", daemon.text()), "the page")[1]
    whole = (model / "config.json").read_bytes()
    with daemon.path("m", "config.json").open("rb") as held:
        held.read(1)
        shutil.rmtree(daemon.store / what)
        for path in (path for path in model.iterdir() if path.is_file()):
            began = time.monotonic()
            with contextlib.suppress(OSError):
                assert daemon.path("m", path.name).read_bytes() == path.read_bytes()
            assert time.monotonic() - began < 30
        held.seek(0)
        with contextlib.suppress(OSError):
            assert held.read() == whole
    with pytest.raises(urllib.error.HTTPError) as unwell:
        urllib.request.urlopen(page + "healthz", timeout=20)
    with unwell.value as answer:
        assert json.load(answer)["checks"]["store"] == "removed"
    assert daemon.text().count(f"the store {daemon.store}: its directory was removed under the daemon; restart") == 1
    asked = daemon.cli("add", "n", f"file://{model}", timeout=60)
    assert asked.returncode == 1 and "was removed under the daemon; restart" in asked.stderr
    assert daemon.running and "Traceback" not in daemon.text()
    daemon.kill()
    daemon.start()
    if daemon.cli("update", "m", timeout=60).returncode != 0:
        daemon.ok("add", "m", f"file://{model}")
    assert daemon.path("m", "config.json").read_bytes() == whole
