"""The scrub of a real daemon under a real mount."""

from __future__ import annotations

import os
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_generations import FIRST
from tests.harness import MIB, Daemon, wait_for
from tests.servers.hub import HubServer

SECOND = "model-00002-of-00002.safetensors"
pytestmark = pytest.mark.timeout(120)


def test_what_was_exchanged_under_its_seal_is_found_and_never_read_again(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    """One shard gets a bit flipped in place with its times restored, the other is replaced whole, with seal and times,
    while the daemon is down. The next one finds both; by then nobody has read them; log, status and metrics say so."""
    hub.publish("org/model", model)
    settings = {
        "fill": {"chunk_size": "1MiB"},
        "store": {"scrub": "1s", "scrub_rate": "1GB"},
        "http": {"listen": "127.0.0.1:0"},
        "origins": {"huggingface": {"endpoint": hub.endpoint}},
    }
    daemon = make_daemon(config=settings, allow=[r"\[p\].*: dropped: "])
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    daemon.stop()
    files = daemon.store / "slots/p/1/files"
    before = (files / FIRST).stat()
    with (files / FIRST).open("r+b") as file:
        file.seek(5 * MIB)
        byte = file.read(1)
        file.seek(5 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(files / FIRST, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = files / "other"
    other.write_bytes(os.urandom((files / SECOND).stat().st_size))
    shutil.copystat(files / SECOND, other)
    other.rename(files / SECOND)
    hub.forget_requests()
    daemon.start()
    assert daemon.status("p")["last_request"] is None
    wait_for(lambda: daemon.text().count(": dropped: ") == 2, "the scrub", 30)
    daemon.warm("p")
    # Over bind the store's files are watched for opens: those of the scrub are no requests.
    assert daemon.status("p")["last_request"] is None
    for name in (FIRST, SECOND):
        assert daemon.path("p", name).read_bytes() == (model / name).read_bytes()
        assert (files / name).read_bytes() == (model / name).read_bytes()
    sent = sum(request.sent for request in hub.requests("cdn"))
    assert sent == sum((model / name).stat().st_size for name in (FIRST, SECOND)), "each is fetched once, and no other"
    status = daemon.status("p")
    assert (status["state"], status["error"]) == ("warm", None)
    assert set(status["scrub"]) == {"proven", "state"}
    assert "scrubbed" in daemon.ok("status", "p")
    page = re.findall(r"page (http://\S+)", daemon.text())[-1].rstrip("/")
    with urllib.request.urlopen(f"{page}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert 'instantstart_damaged_files_total{found_by="scrub"} 2.0' in metrics
    assert "instantstart_scrub_overdue_seconds" in metrics


@pytest.mark.soak  # for half a minute it only waits
def test_scrubbing_is_no_request(make_daemon: Callable[..., Daemon], model: Path) -> None:
    """Pass after pass, also over bind, where the daemon watches the store's files for others' opens."""
    daemon = make_daemon(config={"mount": {"transport": "bind"}, "store": {"scrub": "1s", "scrub_rate": "1GB"}})
    daemon.ok("add", "p", f"file://{model}")
    daemon.warm("p")
    daemon.restart()  # the fill was demand: the scrub would rest for half a minute
    proven: set[str] = set()

    def passes() -> int:
        found = daemon.status("p")["scrub"]["proven"]
        proven.update([found] if found else [])
        return len(proven)

    wait_for(lambda: passes() >= 3, "three passes", 40)
    assert daemon.status("p")["last_request"] is None
    assert daemon.status("p")["hot_until"] is None
