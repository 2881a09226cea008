"""Startup caches through a regional tier: the region's first start compiles, the others do not. Two real daemons, a
real SeaweedFS; the second has an empty store."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from instantstart_fs.regional import hygiene, startup
from instantstart_fs.regional.keys import RegionKey, read_key
from instantstart_fs.regional.store import TierStore
from instantstart_fs.regional.stores import open_store
from tests.e2e import test_run
from tests.e2e.test_regional import SPEC, Site, hub, model, site
from tests.harness import Daemon, wait_for

__all__ = ["hub", "site"]
USERS = [pwd.getpwuid(os.geteuid()).pw_name]
FILES = {"config.json": 700, "model-1.safetensors": 3 << 20}


def starts(daemon: Daemon, directory: Path) -> test_run.Site:
    """Starts on that host. Both hosts have their caches at the same path, as two hosts of a fleet have."""
    directory.mkdir(exist_ok=True)
    found = test_run.Site(daemon, directory)
    found.env["INSTANTSTART_STARTUP_DIR"] = str(directory.parent / "views")
    found.pipeline = "p"
    return found


def tier(site: Site) -> tuple[TierStore, RegionKey, str]:
    key = RegionKey(read_key(str(site.key)))
    return open_store(f"s3://{site.bucket}/t", endpoint_url=site.seaweed.endpoint_url), key, key.slot(SPEC)


def entries(site: Site) -> list[str]:
    return [name.removeprefix("t/") for name in site.objects() if "/startup/" in name]


def test_the_regions_first_start_compiles_and_the_others_do_not(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", site.seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", site.seaweed.secret_key)
    site.hub.publish("org/model", model(tmp_path / "model", FILES))
    one = starts(site.host("one", startup_caches=USERS), tmp_path / "runs-1")
    assert len(one.compile()["compiled"]) == 5
    wait_for(lambda: entries(site), "the region's copy", 30)
    one.daemon.close()

    two = starts(site.host("two", startup_caches=USERS), tmp_path / "runs-2")
    other = two.compile("--max-model-len", "1")
    assert other["used"] == [] and "no startup cache yet" in other["said"], (
        "what another command compiled is not restored"
    )
    found = two.compile()
    assert (found["compiled"], found["wrong"], len(found["used"])) == ([], [], 5)
    assert "restored (compiled by one)" in found["said"]
    assert two.versions()[0]["host"] == "one", "it is this host's as well from then on"
    grown = two.compile("--grow")
    assert len(grown["compiled"]) > 0
    wait_for(lambda: len(entries(site)) >= 3, "what two compiled", 30)

    # Whoever may write to the bucket, and has no key, makes a start a cold one.
    store, key, slot = tier(site)
    assert hygiene.verify(store, key, slot).damaged == []
    found_packs = {startup.unpack_entry(key, name, store.get(name, 1 << 20)).pack for name in entries(site)}
    listed = [stored.name for stored in store.list(f"v1/{slot}/", 1000)]
    packs = [name for name in listed if name.split("/")[2] in found_packs and "/c/" in name]
    for name in packs:
        raw = bytearray(store.get(name, 1 << 24))
        raw[40] ^= 1
        store.put(name, bytes(raw))
    two.daemon.close()
    three = starts(site.host("three", startup_caches=USERS, write_back=False), tmp_path / "runs-3")
    cold = three.compile()
    assert (cold["used"], cold["wrong"], len(cold["compiled"])) == ([], [], 5), cold["said"]
    three.daemon.close()
    # A record of one key under another's name is none, and `regional verify` finds what is wrong.
    names = sorted(entries(site))
    store.put(names[0], store.get(names[-1], 1 << 20))
    damaged = hygiene.verify(store, key, slot).damaged
    assert {*packs, *names} == {*damaged} and entries(site) == []

    # The next host mends it; what is removed on one host is removed for those that do not have it yet.
    four = starts(site.host("four", startup_caches=USERS), tmp_path / "runs-4")
    assert len(four.compile()["compiled"]) == 5
    wait_for(lambda: entries(site), "the region's copy", 30)
    four.daemon.ok("startup-cache", "rm", "p")
    assert entries(site) == []


def test_without_a_word_in_the_configuration_startup_caches_stay_on_their_host(site: Site, tmp_path: Path) -> None:
    site.hub.publish("org/model", model(tmp_path / "model", FILES))
    one = starts(site.host("one", startup_caches=USERS), tmp_path / "runs-1")
    one.compile()
    wait_for(lambda: entries(site), "the region's copy", 30)
    one.daemon.close()
    two = starts(site.host("two"), tmp_path / "runs-2")
    found = two.compile()
    assert (found["used"], len(found["compiled"])) == ([], 5) and "no startup cache yet" in found["said"]


def test_a_tier_that_is_gone_costs_a_start_no_more_than_a_moment(site: Site, tmp_path: Path) -> None:
    site.hub.publish("org/model", model(tmp_path / "model", FILES))
    daemon = site.host("one", endpoint_url="http://127.0.0.1:9", startup_caches=USERS)
    found = starts(daemon, tmp_path / "runs").compile()
    assert len(found["compiled"]) == 5 and "no startup cache yet" in found["said"]
