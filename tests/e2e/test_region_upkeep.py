"""What a region's operator sees and does: where a pipeline is warm, refusals of access, gc, warm."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError
from tests.e2e.test_regional import FILES, MIB, Site, hub, model, right, site
from tests.harness import Daemon, wait_for

__all__ = ["hub", "site"]  # fixtures


def page(daemon: Daemon, path: str) -> Any:
    with Client(str(daemon.socket)) as client:
        url = client.ping().http
    with urllib.request.urlopen(url + path, timeout=20) as answer:
        return json.load(answer) if path.startswith("v1") else answer.read().decode()


def metric(daemon: Daemon, name: str) -> float:
    (line,) = [line for line in page(daemon, "metrics").splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_the_region_tells_where_a_pipeline_is_warm(site: Site, tmp_path: Path) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    one, two = site.host("one"), site.host("two")
    site.warm(one)

    def placed() -> dict[str, int]:
        return {host["host"]: host["percent"] for host in page(two, "v1/placement/p")["hosts"]}

    wait_for(lambda: placed() == {"one": 100}, "the first host's heartbeat", 90)
    told = json.loads(
        two.ok("regional", "status", "p", "--config", str(two.config), "--socket", str(two.socket), "--json")
    )
    assert [(host["host"], host["state"], host["current"]) for host in told["hosts"]] == [("one", "warm", True)]
    assert told["live_hosts"] in (1, 2)
    shown = two.ok("regional", "status", "p", "--config", str(two.config), "--socket", str(two.socket))
    assert "whole on 1 of" in shown
    assert "one " in shown
    assert json.loads(two.ok("ls", "--json"))[0]["tier"]["state"] == "ok"
    assert json.loads(two.ok("status", "p", "--json"))["tier"]["why"] == ""
    assert "regional tier: ok" in two.ok("status")
    assert "Regional tier" in page(two, "")


def test_who_is_refused_by_the_origin_gets_nothing_from_the_tier_until_it_is_let_in_again(
    site: Site, tmp_path: Path
) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    first = site.host("one")
    second = site.host("two", origins={"recheck_access": "1s", "on_refusal": "report"})
    site.warm(first)
    site.wait_seals(len(FILES))
    site.hub.publish("org/model", made, gated=True, tokens=["hf_somebody_else"])
    with Client(str(second.socket)) as client:
        try:
            client.wait_warm("p", everything=True)
            raise AssertionError("it was filled though its source refuses it")
        except InstantStartError as error:
            assert error.code == "access-refused"
    assert metric(second, "instantstart_regional_taken_bytes_total") == 0
    tier = json.loads(second.ok("status", "p", "--json"))["tier"]
    assert tier["state"] == "refused", tier
    site.hub.publish("org/model", made)

    def let_in() -> bool:
        try:
            site.warm(second)  # what was refused in the middle is its origin's to give
        except InstantStartError:
            return False
        return True

    wait_for(let_in, "the source lets it in again", 60)
    with Client(str(second.socket)) as client:
        client.evict("p", force=True)
    taken, before = metric(second, "instantstart_regional_taken_bytes_total"), site.sent()
    site.warm(second)
    right(second, made)
    assert metric(second, "instantstart_regional_taken_bytes_total") - taken == sum(FILES.values())
    assert site.sent() - before < 40_000
    assert json.loads(second.ok("status", "p", "--json"))["tier"]["state"] != "refused"


def regional(daemon: Daemon, *arguments: str) -> tuple[str, ...]:
    return ("regional", *arguments, "--config", str(daemon.config))


def test_gc_leaves_a_fill_alone_that_runs(site: Site, tmp_path: Path) -> None:
    """The shortest keep_hot, again and again, while a host fills: its slot stays, and the fill ends well."""
    made = model(tmp_path / "model", {"a.safetensors": 24 * MIB})
    site.hub.publish("org/model", made)
    host = site.host("one", rate="4MB")
    filling = threading.Thread(target=site.warm, args=(host,))
    filling.start()
    wait_for(lambda: [name for name in site.objects() if "/c/" in name], "the first chunks in the tier")
    runs, later = [], []
    end = time.monotonic() + 40  # where a put failed, on a busy machine, no seal comes
    while not (sealed := any(name.endswith("/seal") for name in site.objects())) and time.monotonic() < end:
        found = json.loads(host.ok(*regional(host, "gc", "--keep-hot", "0s", "--json")))
        (runs if filling.is_alive() else later).append((found["slots"], found["kept_in_use"]))
    filling.join()
    if sealed:
        runs += later[:-1]  # the last one may have begun after the end of the fill
    assert runs and set(runs) == {(0, 1)}
    right(host, made)


def test_regional_warm_waits_until_the_tier_has_it_all(site: Site, tmp_path: Path) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    host = site.host("one", rate="8MB")  # slower than the hub: write-back lags behind
    done = host.cli(*regional(host, "warm", "p", "--socket", str(host.socket)))
    assert done.returncode == 0, done.stderr
    assert f"the tier has {len(FILES)} of {len(FILES)} files whole" in done.stdout
    assert "p: to the tier: 100 %" in done.stderr
    assert sum(name.endswith("/seal") for name in site.objects()) == len(FILES)
    # Where nothing can be written that is said, and is no success.
    host.ok(*regional(host, "remove", "p", "--socket", str(host.socket)))
    refused = host.cli(*regional(host, "warm", "p", "--socket", str(host.socket)))
    assert refused.returncode == 1
    assert "not written to the tier" in refused.stderr


def test_add_warm_on_one_host_warms_the_region(site: Site, tmp_path: Path) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    first = site.host("one")
    first.ok("add", "another", "hf://org/model", "--warm")
    site.wait_seals(len(FILES))
    before = site.sent()
    second = site.host("two")
    second.ok("add", "another", "hf://org/model")
    second.warm("another")
    for path in made.iterdir():
        assert (second.path("another") / path.name).read_bytes() == path.read_bytes()
    assert site.sent() - before < 20_000
