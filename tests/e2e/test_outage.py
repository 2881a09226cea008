"""An origin that is gone, or silent, touches only cold bytes, and only its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, must, probe, run, safetensors_file, wait_for
from tests.servers.hub import HubServer

FIRST = "model-00001-of-00002.safetensors"
pytestmark = pytest.mark.timeout(180)


def config(endpoint: str, **fill: object) -> dict[str, object]:
    return {"fill": {"chunk_size": "1MiB", **fill}, "origins": {"huggingface": {"endpoint": endpoint}}}


class Stuck:
    """A process with ``count`` threads in page faults (or O_DIRECT reads) of one file each waits for; killed in the
    end."""

    def __init__(self, count: int, path: Path, how: str = "stuck") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.probe", how, str(count), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == "ready"

    def kill(self) -> float:
        """Seconds until it was gone."""
        before = time.monotonic()
        self.process.kill()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return time.monotonic() - before


def memory_of(daemon: Daemon) -> str:
    """Resident memory of its process."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("VmRSS"))


def waiting_requests(mount: Path) -> int:
    """Requests of this mount that the kernel waits for."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(mount):
            return int(Path(f"/sys/fs/fuse/connections/{fields[2].split(':')[1]}/waiting").read_text())
    return 0


def test_a_warm_pipeline_needs_neither_origin_nor_credentials(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("hf_secret\n")
    with HubServer() as hub:
        hub.publish("org/gated", model, gated=True, tokens=["hf_secret"])
        daemon = make_daemon("d", config=config(hub.endpoint))
        daemon.ok("add", "p", "hf://org/gated", "--token-file", token)
        daemon.warm("p", "--all")
        hub.kill()
    token.unlink()
    daemon.restart()
    assert daemon.status("p")["state"] == "warm"
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5
    assert "p" in must("ls", daemon.mount / ".warm", timeout=5)


def test_metadata_never_waits_for_a_dead_origin(make_daemon: Callable[..., Daemon], model: Path) -> None:
    with HubServer() as hub:
        hub.publish("org/model", model)
        daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="5s"))
        daemon.ok("add", "p", "hf://org/model")
        hub.kill()
        must("ls", "-lR", daemon.mount, timeout=5)
        must("getfattr", "-d", "-m-", daemon.path("p", FIRST), timeout=5)
        assert daemon.status("p")["state"] == "cold"
        assert probe("read-error", daemon.path("p", "config.json"), 0, timeout=30)["errno"] == "EIO"
        # Now the origin is known to be down: readers are told at once, and engines at open.
        wait_for(
            lambda: probe("read-error", daemon.path("p", FIRST), 0, timeout=30)["seconds"] < 1.0, "the breaker", 40
        )
        must("ls", "-lR", daemon.mount, timeout=5)


def test_64_stuck_faults_of_a_black_hole_starve_nobody(
    make_daemon: Callable[..., Daemon], model: Path, hub: HubServer, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    safetensors_file(big / "model.safetensors", 128 * MIB, 77)
    with HubServer() as hole:
        hole.publish("org/big", big)
        daemon = make_daemon("d", config=config(hole.endpoint, read_deadline="120s"))
        daemon.ok("add", "dead", "hf://org/big")
        hub.publish("org/model", model)
        source = tmp_path / "healthy"
        safetensors_file(source / "model.safetensors", 8 * MIB, 78)
        daemon.ok("add", "healthy", f"file://{source}")
        hole.fault("blackhole")
        stuck = Stuck(64, daemon.path("dead", "model.safetensors"))
        try:
            wait_for(lambda: waiting_requests(daemon.mount) >= 32, "the faults", 20)
            seconds = probe("first-byte", daemon.path("healthy", "model.safetensors"), 5 * MIB, timeout=30)
            stat = probe("timed-stat", 2, daemon.path("healthy", "model.safetensors"), daemon.mount, timeout=30)
            print(f"healthy cold fault: {seconds * 1000:.0f} ms; stat: {stat}")
            assert seconds <= 1.0
            assert stat["median"] <= 50
            assert stat["max"] <= 500  # on two shared cores; the aim is 50
        finally:
            gone = stuck.kill()
        assert gone <= 2.0
        hole.clear()
    assert run("cmp", daemon.path("healthy", "model.safetensors"), source / "model.safetensors").returncode == 0


def test_a_stuck_read_ends_with_its_deadline(make_daemon: Callable[..., Daemon], model: Path, hub: HubServer) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="2s"))
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("blackhole")
    found = probe("read-error", daemon.path("p", FIRST), 20 * MIB, timeout=30)
    assert found["errno"] == "EIO"
    assert 1.5 <= found["seconds"] <= 8
    hub.clear()


BAD_SERVERS: dict[str, dict[str, Any]] = {
    "accepts and is silent": {"kind": "blackhole"},
    "closes at once": {"kind": "reset"},
    "falls silent after the headers": {"kind": "stall"},
    "falls silent in the body": {"kind": "stall", "after": 300_000},
    "ends its body early": {"kind": "cut", "after": 300_000},
    "drips": {"kind": "bandwidth", "rate": 20},
    "answers 500": {"kind": "status", "status": 500},
    "answers 503": {"kind": "status", "status": 503},
    "answers 429 without Retry-After": {"kind": "status", "status": 429},
    "answers late": {"kind": "latency", "seconds": 100.0},
    "lies about ranges": {"kind": "range"},
    "redirects in a loop": {"kind": "status", "status": 302, "headers": {"Location": "/again"}},
}


@pytest.mark.alone
def test_a_read_of_whatever_bad_server_ends_at_its_deadline_once(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    """Also where the kernel asks twice: for a page whose readahead failed it sends a READ of its own."""
    deadline = 4.0
    daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="4s"))
    paths = {}
    for number, (name, fault) in enumerate(BAD_SERVERS.items()):
        file = safetensors_file(tmp_path / f"s{number}" / "model.safetensors", 3 * MIB, 900 + number)
        hub.publish(f"org/bad{number}", file.parent)
        daemon.ok("add", f"p{number}", f"hf://org/bad{number}")
        hub.fault(port="cdn", path=hashlib.sha256(file.read_bytes()).hexdigest(), **fault)
        paths[name] = daemon.path(f"p{number}", "model.safetensors")
    found = probe("read-errors", 2 * MIB, *paths.values(), timeout=60)
    took = dict(zip(paths, found, strict=True))
    print({name: round(result["seconds"], 2) for name, result in took.items()})
    assert {name: result["errno"] for name, result in took.items()} == dict.fromkeys(paths, "EIO")
    assert {name: result["seconds"] for name, result in took.items() if result["seconds"] > deadline + 2} == {}


@pytest.mark.alone
@pytest.mark.parametrize("status", [403, 404])
def test_access_is_the_hubs_to_refuse_and_not_its_cdns(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, status: int
) -> None:
    """Nor is it the CDN's to say that there is no such file."""
    daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="4s"))
    files = [safetensors_file(tmp_path / name / "model.safetensors", 3 * MIB, ord(name)) for name in "abc"]
    for file in files:
        hub.publish(f"org/{file.parent.name}", file.parent)
        daemon.ok("add", file.parent.name, f"hf://org/{file.parent.name}")
    burst, ill, _ = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    hub.fault("status", port="cdn", path=burst, status=status, count=4)
    hub.fault("status", port="cdn", path=ill, status=status)
    hub.fault("status", port="hub", path="/org/c/", status=403)
    found = probe("read-errors", 2 * MIB, *(daemon.path(name, "model.safetensors") for name in "abc"), timeout=60)
    assert [result["errno"] for result in found] == ["", "EIO", "EACCES"], found
    assert found[1]["seconds"] >= 3.5 and found[2]["seconds"] < 3
    assert run("cmp", daemon.path("a", "model.safetensors"), files[0]).returncode == 0


@pytest.mark.alone  # it measures, and its 8,000 readers would be in everybody's way
@pytest.mark.parametrize("fault", [pytest.param("drips", marks=pytest.mark.soak), "is silent"])
def test_a_slow_file_of_one_pipeline_leaves_others_of_the_same_hub_quick(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, fault: str
) -> None:
    daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="60s"))
    sick = safetensors_file(tmp_path / "sick" / "model.safetensors", 64 * MIB, 41)
    well = [
        safetensors_file(tmp_path / f"well{number}" / "model.safetensors", 3 * MIB, 42 + number) for number in (0, 1)
    ]
    for file in (sick, *well):
        hub.publish(f"org/{file.parent.name}", file.parent)
        daemon.ok("add", file.parent.name, f"hf://org/{file.parent.name}")
    rule: dict[str, Any] = {"kind": "bandwidth", "rate": 2} if fault == "drips" else {"kind": "blackhole"}
    hub.fault(port="cdn", path=hashlib.sha256(sick.read_bytes()).hexdigest(), **rule)
    count = 20 if fault == "drips" else 8000
    stuck = Stuck(count, daemon.path("sick", sick.name), "stuck" if fault == "drips" else "stuck-direct")
    try:
        wait_for(lambda: waiting_requests(daemon.mount) >= count * 0.99, "the readers", 60)
        for number, file in enumerate(well):
            if number:
                time.sleep(16)  # now the first of the stuck requests have failed, and counted
            before = time.monotonic()
            assert run("cmp", daemon.path(file.parent.name, file.name), file, timeout=60).returncode == 0
            took = time.monotonic() - before
            print(f"{count} readers of a file that {fault}: a healthy pipeline's cold {3} MB took {took:.2f} s")
            assert took < (3 if number or count < 100 else 20)  # at first 8,000 reads are taken up, on two shared cores
        stat = probe("timed-stat", 1, daemon.mount, timeout=30)
        print(stat, memory_of(daemon))
        assert stat["max"] <= 500
    finally:
        stuck.kill()


def test_one_event_is_one_line_however_many_reads_meet_it(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    daemon = make_daemon("d", config=config(hub.endpoint, read_deadline="4s"))
    file = safetensors_file(tmp_path / "sick" / "model.safetensors", 32 * MIB, 71)
    hub.publish("org/sick", file.parent)
    daemon.ok("add", "sick", "hf://org/sick")
    hub.fault("reset", port="cdn")
    paths = [daemon.path("sick", file.name)] * 20
    assert {found["errno"] for found in probe("read-errors", 20 * MIB, *paths, timeout=60)} == {"EIO"}
    hub.clear()
    wait_for(lambda: run("cmp", paths[0], file, timeout=60).returncode == 0, "the origin's answers", 40)
    lines = [line for line in daemon.text().splitlines() if "origin-unavailable" in line]
    print(*lines, sep="\n")
    assert len([line for line in lines if "warning" in line]) == 1
    assert any("is over: " in line and " times in " in line for line in lines)
