"""`doctor` beside a real daemon: whether that daemon can fetch, not whether this shell can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, model_directory
from tests.servers.hub import HubServer

NOWHERE = "http://127.0.0.1:9"


def findings(daemon: Daemon, env: dict[str, str] | None = None) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "instantstart_fs.cli", "doctor", "--json"],
        env={**os.environ, **daemon.env, **(env or {})},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done
    return [found for found in json.loads(done.stdout) if found["name"] in ("origin", "origins")]


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path) -> Daemon:
    hub.publish("org/m", model_directory(tmp_path / "source", weights=(2 * MIB, MIB)))
    daemon = make_daemon(env={"HF_ENDPOINT": hub.endpoint})
    daemon.ok("add", "m", "hf://org/m")
    daemon.ok("add", "again", "hf://org/m")
    daemon.ok("add", "local", f"file://{tmp_path / 'source'}")
    return daemon


def test_it_asks_the_daemon_and_not_this_shell(daemon: Daemon, hub: HubServer) -> None:
    told = findings(daemon, {"HF_ENDPOINT": NOWHERE, "HTTPS_PROXY": NOWHERE, "HF_TOKEN": "hf_not_the_daemons"})
    assert [found["outcome"] for found in told] == ["ok", "ok", "ok"], told
    assert sorted(found["found"].split(":")[0] for found in told) == [
        "1 more sources share an origin and credentials with these, and were not asked one by one",
        "again",
        "local",
    ]
    assert not [request for request in hub.requests() if request.token == "hf_not_the_daemons"]


@pytest.mark.parametrize("kind", ["reset", "blackhole"])
def test_a_cdn_that_is_shut_off_is_found_and_named(daemon: Daemon, hub: HubServer, kind: str) -> None:
    hub.fault(kind, port="cdn", status=503)  # type: ignore[arg-type]
    began = time.monotonic()
    told = findings(daemon)
    assert time.monotonic() - began < 45
    (failed,) = [found for found in told if found["outcome"] == "fail"]
    assert f"its files come from 127.0.0.1:{hub.cdn_port}, and that fails: " in failed["found"], failed
    assert "firewall" in failed["advice"]
    hub.clear()


def test_without_a_daemon_it_says_that_it_tries_from_here(daemon: Daemon, hub: HubServer) -> None:
    daemon.stop()
    hub.fault("reset", port="cdn")
    config = daemon.config.read_text()
    daemon.config.write_text(f'{config}\n[pipelines.m]\nsource = "hf://org/m"\n')
    daemon.env["INSTANTSTART_CONFIG"] = str(daemon.config)
    done = daemon.cli("doctor", "--config", str(daemon.config), "--json")
    told = [found for found in json.loads(done.stdout) if found["name"] in ("origin", "origins")]
    assert told[0]["found"].startswith("no daemon could be asked: tried from here, with this shell's environment")
    assert told[1]["outcome"] == "fail" and str(hub.cdn_port) in told[1]["found"], told
    hub.clear()
