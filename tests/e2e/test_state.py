"""Seeing what is warm: ls, stat, du, getfattr, the state directories, `status --json`. None of it heats anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import LOAD_SET_SKIPS, MIB, Daemon, must, probe, tree_files, wait_for
from tests.servers.hub import HubServer

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)\Z")
FIRST = "model-00001-of-00002.safetensors"
STATUS_KEYS = {
    *("pipeline", "state", "cached_bytes", "total_bytes", "source", "generation", "revision", "last_request"),
    *("hot_until", "pinned", "leases", "fill", "error"),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub_server: HubServer, shared_transport: str) -> Iterator[Daemon]:
    config = {
        "mount": {"transport": shared_transport},
        "fill": {"chunk_size": "1MiB"},
        "origins": {"huggingface": {"endpoint": hub_server.endpoint}},
    }
    with Daemon(tmp_path_factory.mktemp("state"), config=config) as running:
        yield running


@pytest.fixture
def commit(hub: HubServer, model: Path) -> str:
    return hub.publish("org/model", model)


def load_set(model: Path) -> set[str]:
    return set(tree_files(model)) - LOAD_SET_SKIPS


def load_bytes(model: Path) -> int:
    return sum((model / name).stat().st_size for name in load_set(model))


def xattrs(path: Path) -> dict[str, str]:
    out = must("getfattr", "-d", "-m-", "--absolute-names", path, timeout=20)
    return dict(re.findall(r'^user\.instantstart\.(\w+)="(.*)"$', out, re.M))


def links(daemon: Daemon, name: str) -> dict[str, str]:
    directory = daemon.mount / name
    return {entry: os.readlink(directory / entry) for entry in os.listdir(directory)}


def test_looking_is_no_request_and_starts_no_fill(daemon: Daemon, hub: HubServer, model: Path, commit: str) -> None:
    daemon.ok("add", "look", "hf://org/model")
    hub.forget_requests()
    root = daemon.path("look")
    must("ls", "-lsR", root)
    must("ls", "-luR", daemon.mount)
    must("find", root, "-ls")
    must("stat", "-L", root / FIRST)
    must("stat", "-f", daemon.mount)
    must("df", daemon.mount)
    assert int(must("du", "--apparent-size", "-sb", root).split()[0]) >= sum(
        (model / name).stat().st_size for name in tree_files(model)
    )
    assert int(must("du", "-s", "--block-size=512", root / FIRST).split()[0]) == 1
    xattrs(root), xattrs(root / FIRST)
    for name in (".warm", ".filling", ".cold"):
        os.listdir(daemon.mount / name)
    daemon.ok("ls")
    daemon.ok("status")
    status = daemon.status("look")
    assert status["state"] == "cold" and status["cached_bytes"] == 0
    assert status["last_request"] is None and status["hot_until"] is None and status["fill"] is None
    assert hub.requests() == [], "looking asked the origin"


def test_config_and_header_reads_start_no_fill(daemon: Daemon, hub: HubServer, commit: str) -> None:
    """What every tool reads of a model: its JSON files, and the header of its weights."""
    daemon.ok("add", "peek", "hf://org/model")
    root = daemon.path("peek")
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        (root / name).read_bytes()
    status = daemon.status("peek")
    assert status["last_request"] is None, "configuration is no request"
    with open(root / FIRST, "rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        assert json.loads(file.read(length))["weight"]["dtype"] == "U8"
    status = daemon.status("peek")
    assert status["last_request"] is not None, "the open of a weight file is a request"
    assert status["state"] == "partial" and status["fill"] is None
    files = {file["path"]: file for file in status["files"]}
    # the header's chunk, and what the kernel reads ahead of it
    assert 0 < files[FIRST]["cached_bytes"] <= 2 * MIB
    assert files["model-00002-of-00002.safetensors"]["cached_bytes"] == 0


def test_a_read_beyond_the_header_fills_the_load_set_and_no_more(
    daemon: Daemon, hub: HubServer, model: Path, commit: str
) -> None:
    daemon.ok("add", "wanted", "hf://org/model")
    with open(daemon.path("wanted", FIRST), "rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, 20 * MIB)
    wait_for(lambda: daemon.status("wanted")["state"] == "warm", "the load set", 40)
    states = {file["path"]: file["state"] for file in daemon.status("wanted")["files"]}
    for name in tree_files(model):
        assert states[name] == ("absent" if name in LOAD_SET_SKIPS else "sealed"), name
    asked = {request.path.rpartition("/")[2] for request in hub.requests("hub") if "/resolve/" in request.path}
    assert not {"pytorch_model.bin", "model.onnx", "tf_model.h5"} & asked
    assert sum(request.sent for request in hub.requests("cdn")) < load_bytes(model) + MIB, "fetched more than once"


def test_what_is_not_in_the_load_set_is_read_through(daemon: Daemon, model: Path, commit: str) -> None:
    daemon.ok("add", "beside", "hf://org/model")
    for name in sorted(LOAD_SET_SKIPS):
        probe("compare", "read", model / name, daemon.path("beside", name))
    states = {file["path"]: file["state"] for file in daemon.status("beside")["files"]}
    assert states[FIRST] == "absent"


def test_status_json_is_what_the_document_says(daemon: Daemon, hub: HubServer, model: Path, commit: str) -> None:
    daemon.ok("add", "schema", "hf://org/model@main")
    status = daemon.status("schema")
    assert set(status) == STATUS_KEYS | {"files"}
    assert status == {
        "pipeline": "schema",
        "state": "cold",
        "cached_bytes": 0,
        "total_bytes": load_bytes(model),
        "source": ["hf://org/model@main"],
        "generation": 1,
        "revision": commit,
        "last_request": None,
        "hot_until": None,
        "pinned": False,
        "leases": 0,
        "fill": None,
        "error": None,
        "files": status["files"],
    }
    for file in status["files"]:
        left_out = {"left_out"} if file["path"] in LOAD_SET_SKIPS else set()
        assert set(file) == {"path", "state", "size", "cached_bytes", "digest"} | left_out
        assert file["size"] == (model / file["path"]).stat().st_size
        assert re.match(r"(sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40})\Z", file["digest"]), file
    assert sorted(file["path"] for file in status["files"]) == tree_files(model)

    hub.fault("bandwidth", port="cdn", rate=MIB)
    daemon.ok("warm", "schema")
    filling = wait_for(lambda: (s := daemon.status("schema"))["fill"] and s, "the fill's rate", 20)
    assert set(filling["fill"]) == {"bytes_per_second", "eta_seconds"}
    assert filling["state"] == "filling"
    hub.clear()
    daemon.ok("touch", "schema")
    daemon.ok("pin", "schema")
    daemon.warm("schema")
    done = daemon.status("schema")
    assert (done["state"], done["cached_bytes"], done["pinned"], done["fill"]) == (
        *("warm", done["total_bytes"], True),
        None,
    )
    assert RFC3339.match(done["last_request"]) and RFC3339.match(done["hot_until"])
    listed = {entry["pipeline"]: entry for entry in json.loads(daemon.ok("ls", "--json"))}
    assert set(listed["schema"]) == STATUS_KEYS
    assert {key: listed["schema"][key] for key in STATUS_KEYS} == {key: done[key] for key in STATUS_KEYS}


def test_blocks_and_state_directories_follow_the_fill(
    daemon: Daemon, hub: HubServer, model: Path, commit: str, shared_transport: str
) -> None:
    daemon.ok("add", "follow", "hf://org/model")
    path, size = daemon.path("follow", FIRST), (model / FIRST).stat().st_size
    assert os.stat(path).st_blocks == 1
    assert links(daemon, ".cold")["follow"] == "../follow"
    hub.fault("bandwidth", port="cdn", rate=MIB)
    daemon.ok("warm", "follow")
    wait_for(lambda: "follow" in os.listdir(daemon.mount / ".filling"), ".filling", 10)
    assert "follow" not in os.listdir(daemon.mount / ".cold")
    wait_for(lambda: 1 < os.stat(path).st_blocks < size // 512, "blocks that grow", 20)
    assert xattrs(daemon.path("follow"))["state"] == "filling"
    hub.clear()
    daemon.warm("follow")
    # A bound file shows the disk's own count: whole pages, and a block for its attributes.
    more = 16 if shared_transport == "bind" else 0
    wait_for(lambda: 0 <= os.stat(path).st_blocks + size // -512 <= more, "all blocks", 5)
    assert links(daemon, ".warm")["follow"] == "../follow"
    assert (daemon.mount / ".warm" / "follow" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert "follow" not in os.listdir(daemon.mount / ".filling")
    assert int(must("du", "-s", "--block-size=1", path).split()[0]) >= size


def test_xattrs(daemon: Daemon, model: Path, commit: str) -> None:
    daemon.ok("add", "attrs", "hf://org/model")
    cold = xattrs(daemon.path("attrs", FIRST))
    assert (cold["state"], cold["cached_bytes"]) == ("absent", "0")
    assert cold["total_bytes"] == str((model / FIRST).stat().st_size)
    assert re.match(r"sha256:[0-9a-f]{64}\Z", cold["digest"])
    assert (cold["source"], cold["generation"]) == ("hf://org/model", "1")
    assert "last_access" not in cold and "error" not in cold
    daemon.warm("attrs")
    probe("compare", "read", model / FIRST, daemon.path("attrs", FIRST))
    # A bound file shows its access when it is closed.
    wait_for(lambda: "last_access" in xattrs(daemon.path("attrs", FIRST)), "the access", 10)
    warm = xattrs(daemon.path("attrs", FIRST))
    assert (warm["state"], warm["cached_bytes"]) == ("sealed", warm["total_bytes"])
    assert RFC3339.match(warm["last_access"]) and RFC3339.match(warm["hot_until"])
    whole = xattrs(daemon.path("attrs"))
    assert whole["state"] == "warm" and whole["cached_bytes"] == whole["total_bytes"] == str(load_bytes(model))
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(daemon.path("attrs", FIRST), "user.instantstart.nonsense")


def test_times(daemon: Daemon, hub: HubServer, model: Path, commit: str) -> None:
    """st_atime is the last access; st_mtime the origin's."""
    daemon.ok("add", "times", f"file://{model}")
    path = daemon.path("times", FIRST)
    assert os.stat(path).st_mtime_ns == (model / FIRST).stat().st_mtime_ns
    before = os.stat(path).st_atime_ns
    with open(path, "rb", buffering=0) as file:
        file.read(10)
    wait_for(lambda: os.stat(path).st_atime_ns > before, "st_atime after a read", 5)


def test_statfs_is_the_store(daemon: Daemon) -> None:
    here, store = os.statvfs(daemon.mount), os.statvfs(daemon.store)
    assert here.f_blocks * here.f_frsize == store.f_blocks * store.f_frsize
    assert here.f_namemax == 255
    assert here.f_flag & os.ST_RDONLY


def test_accesses_survive_a_restart(make_daemon: Callable[..., Daemon], model: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "kept", f"file://{model}")
    with open(daemon.path("kept", FIRST), "rb", buffering=0) as file:
        file.read(10)
    before = daemon.status("kept")
    assert before["last_request"] is not None
    daemon.restart()
    after = daemon.status("kept")
    assert after["last_request"] == before["last_request"]
    assert after["cached_bytes"] == before["cached_bytes"] > 0
