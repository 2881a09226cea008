"""`[origins] recheck_access` on a real mount: out of view, for those who are inside already too, and back again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_generations import FIRST, holding, sha256
from tests.harness import Daemon, must, run, wait_for
from tests.servers.hub import HubServer

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("transport", ["auto", "bind"])
def test_what_the_hub_refuses_goes_out_of_view_and_comes_back(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, tmp_path: Path, transport: str
) -> None:
    hub.publish("org/recheck", model, gated=True, tokens=["hf_first"])
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("hf_first\n")
    settings = {
        "mount": {"transport": transport},
        "http": {"listen": "127.0.0.1:0"},
        "origins": {"recheck_access": "1s", "huggingface": {"endpoint": hub.endpoint}},
    }
    daemon = make_daemon(config=settings, allow=[r"\[p\].*: out of view, since"])
    daemon.ok("add", "p", "hf://org/recheck", "--token-file", token)
    daemon.warm("p")
    shown = set(daemon.status("p"))
    assert daemon.status("p")["access"]["verdict"] == "allowed" and "scrub" not in shown
    must("cksum", daemon.path("p", FIRST))

    def listed() -> list[str]:
        return must("ls", daemon.mount, timeout=10).split()

    # As a container that has the directory bound: it does not come by the name any more.
    inside = subprocess.Popen(
        ["sh", "-c", f"read go; ls .; cat {FIRST} | wc -c"],
        cwd=daemon.path("p"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with holding(daemon.path("p", FIRST)) as ask:
            hub.publish("org/recheck", model, gated=True, tokens=["hf_second"])
            wait_for(lambda: "p" not in listed(), "the refusal", 20)
            for directory in (".warm", ".filling", ".cold"):
                assert must("ls", daemon.mount / directory, timeout=10) == ""
            for command in (["stat", daemon.path("p")], ["cat", daemon.path("p", FIRST)]):
                done = run(*command, timeout=10)
                assert done.returncode != 0 and "No such file" in done.stderr
            out, err = inside.communicate("go\n", timeout=20)
            assert (out, err.count("Permission denied")) == ("0\n", 2), (out, err)
            assert ask("hash-fd") == sha256(model / FIRST), "an open file cannot be taken back"
    finally:
        inside.kill()
        inside.wait(10)

    status = daemon.status("p")
    assert (status["state"], status["error"]["code"]) == ("error", "access-refused")
    assert status["access"]["verdict"] == "refused" and "org/recheck" in status["access"]["trouble"]
    assert "hf_" not in json.dumps(status) + daemon.text()
    assert "out of view" in daemon.refused(1, "warm", "p")
    assert "org/recheck" in daemon.refused(1, "verify", "p", "--access")
    page = re.findall(r"page (http://\S+)", daemon.text())[-1].rstrip("/")
    with urllib.request.urlopen(f"{page}/metrics", timeout=10) as answer:
        assert 'instantstart_pipelines_access{verdict="refused"} 1.0' in answer.read().decode()

    hub.forget_requests()
    token.write_text("hf_second\n")
    wait_for(lambda: "p" in listed(), "access again", 20)
    assert daemon.status("p")["state"] == "warm"
    assert daemon.path("p", FIRST).read_bytes() == (model / FIRST).read_bytes()
    assert sorted(os.listdir(daemon.path("p"))) == sorted(os.listdir(model))
    assert not [request for request in hub.requests("cdn") if request.sent], "nothing was lost"
