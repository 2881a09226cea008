"""A host of a region whose clock is an hour off (libfaketime), against the storage's and the other host's."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from tests.e2e.test_rack import neighbours
from tests.e2e.test_regional import MIB, Site, hub, model, right, site
from tests.harness import Daemon, must, wait_for
from tests.servers.ports import free_ports

__all__ = ["hub", "site"]  # fixtures
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
FILES = {"config.json": 700, "model.safetensors": 24 * MIB + 13}


def off(hours: int) -> dict[str, str]:
    """The environment of processes whose clocks are so far ahead. Times of files stay what their storage says.
    Monotonic clocks move as far: where they do not, libfaketime 0.9.10 lets no time.sleep() be."""
    if not LIBRARIES:
        pytest.skip("libfaketime is not installed")
    return {"LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME": f"{hours:+d}h", "NO_FAKE_STAT": "1"}


def regional(daemon: Daemon, *arguments: str) -> dict[str, object]:
    words = ("regional", *arguments, "--config", str(daemon.config), "--json")
    found: dict[str, object] = json.loads(daemon.ok(*words))
    return found


def all_sealed(daemon: Daemon, pipeline: str) -> bool:
    found = regional(daemon, "warm", pipeline, "--socket", str(daemon.socket))
    return found["sealed"] == found["files"]


RACK = """
import sys
from instantstart_fs.config import load_config
from instantstart_fs.doctor import check_rack
found = check_rack(load_config(sys.argv[1]).regional, True)
print(found.outcome, found.found)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("shared", [False, True], ids=["s3", "file"])
def test_a_host_whose_clock_is_an_hour_off(site: Site, tmp_path: Path, hours: int, shared: bool) -> None:
    made, other = model(tmp_path / "model", FILES), model(tmp_path / "other", {"b.safetensors": 12 * MIB})
    site.hub.publish("org/model", made)
    site.hub.publish("org/other", other)
    (tmp_path / "tier").mkdir()
    tier = {"url": f"file://{tmp_path}/tier", "endpoint_url": None} if shared else {}

    def host(name: str, env: dict[str, str] | None = None) -> Daemon:
        return site.host(name, env=env, rack="r1", rack_listen=f"127.0.0.1:{free_ports(1)[0]}", **tier)

    wrong, correct = host("wrong", off(hours)), host("correct")
    hosts = [wrong, correct]
    said = must(sys.executable, "-c", "import time; print(time.time())", env=wrong.env)
    assert abs(float(said) - time.time() - hours * 3600) < 60, "libfaketime works here"
    wait_for(lambda: all(neighbours(one) == 1 for one in hosts), "the rack", 90)

    # Tickets: each asks the other with one.
    for one in hosts:
        assert must(sys.executable, "-c", RACK, str(one.config), env=one.env).startswith("ok "), one.text()[-2000:]

    # Claims: both pull at once, and neither takes the other's for dead.
    threads = [threading.Thread(target=site.warm, args=(one,)) for one in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.sent() <= 1.5 * sum(FILES.values()), "as with right clocks"
    for one in hosts:
        right(one, made)

    # Seals, signed addresses: what one has pulled alone the other takes from the tier.
    for giver, taker in ((wrong, correct), (correct, wrong)):
        pipeline = f"by-{giver.directory.name}"
        for one in hosts:
            with Client(str(one.socket)) as client:
                client.add(PipelineSpec(pipeline, (ModelSpec("hf://org/other"),)))
        assert all_sealed(giver, pipeline)
        before = site.sent()
        with Client(str(taker.socket)) as client:
            client.wait_warm(pipeline, everything=True)
        assert (taker.path(pipeline) / "b.safetensors").read_bytes() == (other / "b.safetensors").read_bytes()
        assert site.sent() - before < 20_000

    # Heartbeats and use markers: both live, and nothing that is hot goes, whoever cleans up.
    slots = {name.split("/")[1] for name in used(site, tmp_path, shared=shared)}
    assert len(slots) == 3
    for one in hosts:
        status = ("status", "p", "--socket", str(one.socket))
        wait_for(lambda one=one, status=status: regional(one, *status)["live_hosts"] == 2, "both to live", 60)  # type: ignore[misc]
        found = regional(one, "gc", "--keep-hot", "30m")
        assert (found["slots"], found["hosts"], found["left"]) == (0, 0, 0), found
    assert {name.split("/")[1] for name in used(site, tmp_path, shared=shared)} == slots
    wait_for(lambda: regional(wrong, "gc", "--keep-hot", "1s")["slots"], "what is not hot to go", 90)


def used(site: Site, directory: Path, *, shared: bool) -> list[str]:
    """The names of the use markers, from v1/ on."""
    if shared:
        return [str(path.relative_to(directory / "tier")) for path in (directory / "tier").rglob("used/*")]
    return [name.partition("/")[2] for name in site.objects() if "/used/" in name]
