"""Staging by the real daemon, seen by mincore: which opens bring what into the page cache, and what brings nothing.

mincore opens the store's own file, which is nobody's request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common import evict, resident_bytes
from instantstart_fs.control.client import Client
from instantstart_fs.system import mountinfo
from tests import harness
from tests.e2e.test_generations import config, holding, sha256
from tests.harness import MIB, Daemon, alive, children, memory_cgroup, model_directory, must, run, wait_for
from tests.servers.hub import HubServer
from tests.supervisor import Supervised

pytestmark = [pytest.mark.timeout(120), pytest.mark.alone]  # what is in the page cache is the whole machine's
SHARD = 24 * MIB


def names(count: int) -> list[str]:
    return [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]


def stored(daemon: Daemon, count: int) -> list[Path]:
    return [next(daemon.store.glob(f"slots/p/*/files/{name}")) for name in names(count)]


def staging(daemon: Daemon) -> dict[str, int]:
    with Client(str(daemon.socket)) as client:
        return client.ping().staging


def warmed(daemon: Daemon, source: Path, count: int) -> list[Path]:
    daemon.ok("add", "p", f"file://{source}")
    daemon.warm("p")
    wait_bound(daemon, names(count))
    os.sync()
    files = stored(daemon, count)
    evict(files)
    return files


def wait_bound(daemon: Daemon, shards: list[str]) -> None:
    if harness.TRANSPORT == "bind":
        paths = [str(daemon.path("p", name)) for name in shards]
        wait_for(lambda: all(mountinfo.find_mount(path) for path in paths), "the binds", 15)


def staging_pids(daemon: Daemon) -> list[int]:
    return [pid for pid in children(daemon.pid) if b"mount.readahead" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_holding_the_first_shard_brings_all_of_them(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 3)
    daemon = make_daemon("d")
    files = warmed(daemon, source, 3)
    others = [next(daemon.store.glob(f"slots/p/*/files/{name}")) for name in ("tokenizer.json", "config.json")]
    evict(others)
    with holding(daemon.path("p", names(3)[0])):
        for file in files:
            wait_for(lambda file=file: resident_bytes(file) == SHARD, "the shards in the page cache", 15)
        wait_for(lambda: staging(daemon)["files"] == 3, "the count of files")
        assert staging(daemon) == {"active": 0, "sessions": 1, "bytes": 3 * SHARD, "files": 3}
        assert [resident_bytes(path) for path in others] == [0, 0], "weights only"


def test_listing_attributes_configuration_and_tokenizer_stage_nothing(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 2)
    daemon = make_daemon("d")
    files = warmed(daemon, source, 2)
    root = daemon.path("p")
    must("ls", "-lR", root, timeout=20)
    must("find", root, "-type", "f", "-size", "+1", timeout=20)
    for path in (root, *(root / name for name in names(2))):
        must("getfattr", "-d", "-m-", "--", path, timeout=20)
    reader = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; files = [open(p, 'rb') for p in sys.argv[1:]]; [f.read() for f in files]; sys.stdin.read()",
            *(str(root / name) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")),
        ],
        stdin=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 2.0  # twice what a held weight file would need
        while time.monotonic() < deadline:
            assert [resident_bytes(file) for file in files] == [0, 0]
            time.sleep(0.1)
        assert staging(daemon) == {"active": 0, "sessions": 0, "bytes": 0, "files": 0}
    finally:
        reader.kill()
        reader.wait(10)
        assert reader.stdin is not None
        reader.stdin.close()


def test_what_reads_the_store_itself_stages_nothing(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Neither verifying nor a backup of the store is a request, or an engine's loading."""
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 2)
    daemon = make_daemon("d")
    files = warmed(daemon, source, 2)
    before = daemon.status("p")["last_request"]
    daemon.ok("verify", "p")
    held = [file.open("rb") for file in files]
    try:
        deadline = time.monotonic() + 2.0  # twice what a held weight file would need
        while time.monotonic() < deadline:
            assert [resident_bytes(file) for file in files] == [0, 0]
            time.sleep(0.1)
    finally:
        for file in held:
            file.close()
    assert staging(daemon) == {"active": 0, "sessions": 0, "bytes": 0, "files": 0}
    assert daemon.status("p")["last_request"] == before


def test_the_next_daemon_goes_on_staging(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """An engine loads while the daemon is killed and started again: nobody opens anything anew."""
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 3)
    daemon = make_daemon("d", Daemon if harness.TRANSPORT == "bind" else Supervised)
    files = warmed(daemon, source, 3)
    with holding(daemon.path("p", names(3)[0])):
        wait_for(lambda: staging(daemon)["files"] == 3, "the shards in the page cache", 15)
        before = daemon.status("p")["last_request"]
        daemon.kill()
        evict(files[1:])
        daemon.start()
        for file in files:
            wait_for(lambda file=file: resident_bytes(file) == SHARD, "the shards in the page cache", 15)
        assert daemon.status("p")["last_request"] in (before, None), "no request; the last one may be lost with SIGKILL"
        assert "open" in daemon.refused(1, "evict", "p")
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the end of its holder")


def test_turned_off_it_stages_nothing(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 2)
    daemon = make_daemon("d", config={"staging": {"enabled": False}})
    files = warmed(daemon, source, 2)
    assert staging_pids(daemon) == []
    with holding(daemon.path("p", names(2)[0])), holding(daemon.path("p", names(2)[1])):
        time.sleep(1.5)
        assert [resident_bytes(file) for file in files] == [0, 0]


def test_a_checkpoint_larger_than_the_budget_moves_its_window(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 4)
    daemon = make_daemon("d", config={"staging": {"max_memory": "60MiB"}})
    files = warmed(daemon, source, 4)
    with holding(daemon.path("p", names(4)[0])):
        wait_for(lambda: [resident_bytes(file) for file in files[:2]] == [SHARD, SHARD], "the first two", 15)
        time.sleep(1.5)  # the budget is looked at again each second
        assert [resident_bytes(file) for file in files[2:]] == [0, 0]
    with holding(daemon.path("p", names(4)[1])):
        wait_for(lambda: resident_bytes(files[2]) == SHARD, "the third, once the first was released", 15)
        assert resident_bytes(files[3]) == 0


def value(place: Path, name: str) -> int:
    return int((place / name).read_text())


def test_inside_a_memory_cgroup_the_budget_is_what_it_has_left(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 5)
    daemon = make_daemon("d")
    files = warmed(daemon, source, 5)
    with memory_cgroup(f"isfs-test-{os.getpid()}", 100 * MIB) as place:
        for pid in (daemon.pid, *staging_pids(daemon)):
            (place / "cgroup.procs").write_text(str(pid))
        with holding(daemon.path("p", names(5)[0])):
            # Later the kernel may take some of the pages back (DAMON): they are nobody's yet.
            wait_for(lambda: [resident_bytes(file) for file in files[:2]] == [SHARD, SHARD], "the first shards", 15)
            time.sleep(2.5)
            assert sum(resident_bytes(file) for file in files) <= 0.8 * 100 * MIB, "80 % of what is left"
            assert staging(daemon)["bytes"] <= 0.8 * 100 * MIB
            assert value(place, "memory.failcnt") == 0, "nothing had to be reclaimed"
            assert value(place, "memory.max_usage_in_bytes") <= 100 * MIB


def test_shards_that_are_sealed_are_staged_while_the_rest_is_fetched(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 3)
    hub.publish("org/model", source)
    daemon = make_daemon("d", config=config(hub), allow=["."])
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("stall", port="cdn", path=sha256(source / names(3)[2]), after=0)
    daemon.ok("warm", "p")

    def sealed(name: str) -> bool:
        return any(f["path"] == name and f["state"] == "sealed" for f in daemon.status("p")["files"])

    wait_for(lambda: sealed(names(3)[0]) and sealed(names(3)[1]), "two sealed shards", 30)
    files = [next(daemon.store.glob(f"slots/p/*/files/{name}")) for name in names(3)[:2]]
    wait_bound(daemon, names(3)[:2])
    os.sync()
    evict(files)
    with holding(daemon.path("p", names(3)[0])):
        for file in files:
            wait_for(lambda file=file: resident_bytes(file) == SHARD, "the sealed ones", 15)
        assert not sealed(names(3)[2])
        hub.clear()


def test_a_background_fill_leaves_no_pages_and_one_with_a_reader_does(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 2)
    daemon = make_daemon("d", config={"staging": {"enabled": False}})
    daemon.ok("add", "p", f"file://{source}")
    daemon.warm("p")
    assert sum(map(resident_bytes, stored(daemon, 2))) == 0
    daemon.ok("evict", "p")
    with holding(daemon.path("p", names(2)[0])):
        daemon.warm("p")
        assert sum(map(resident_bytes, stored(daemon, 2))) == 2 * SHARD


def test_eviction_frees_the_space_of_what_is_staged(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", weights=(SHARD,) * 3)
    daemon = make_daemon("d")
    warmed(daemon, source, 3)
    (pid,) = staging_pids(daemon)
    os.kill(pid, signal.SIGSTOP)  # it holds its files for as long as it likes
    with holding(daemon.path("p", names(3)[0])), holding(daemon.path("p", names(3)[1])):
        time.sleep(0.3)
    wait_for(lambda: daemon.cli("evict", "p").returncode == 0, "the eviction, staged or not")
    os.kill(pid, signal.SIGCONT)

    def held() -> list[str]:
        return [
            link for fd in os.listdir(f"/proc/{pid}/fd") if "slots" in (link := os.readlink(f"/proc/{pid}/fd/{fd}"))
        ]

    wait_for(lambda: not held(), "the descriptors' end", 10)


def test_the_staging_process_dies_with_a_killed_daemon(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("d")
    (pid,) = staging_pids(daemon)
    daemon.kill()
    wait_for(lambda: not alive(pid), "its end", 10)


def test_the_bytes_are_in_memory_once_and_none_in_the_daemon(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """A reader in a cgroup of its own is charged for each page that it brings in: as many as the file has, no more; the
    daemon sees no READ and grows by nothing."""
    source = model_directory(tmp_path / "model", weights=(4 * SHARD,))
    daemon = make_daemon("d", config={"staging": {"enabled": False}})
    (file,) = warmed(daemon, source, 1)
    must("md5sum", daemon.path("p", file.name), timeout=20)
    evict([file])
    before, reads = rss(daemon.pid), requests(daemon)
    with memory_cgroup(f"isfs-once-{os.getpid()}", 1 << 30) as place:
        code = (
            "import mmap, os, sys\n"
            f"open({str(place / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "file = open(sys.argv[1], 'rb')\n"
            "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
            "print(sum(mapped[offset] for offset in range(0, len(mapped), 4096)))\n"
        )
        done = run(sys.executable, "-c", code, daemon.path("p", file.name), timeout=60)
        assert done.returncode == 0, done.stderr
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        cached = int(stat["total_cache"])
    assert resident_bytes(file) == 4 * SHARD
    assert 4 * SHARD <= cached <= 4 * SHARD + 4 * MIB
    assert rss(daemon.pid) - before < 2 * MIB
    assert requests(daemon).get("read", 0) == reads.get("read", 0)


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def requests(daemon: Daemon) -> dict[str, Any]:
    with Client(str(daemon.socket)) as client:
        return dict(client.ping().requests)
