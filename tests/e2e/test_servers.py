"""Servers that do not do what they should, under a real daemon and a real mount: bytes come, or it is said why not."""

from __future__ import annotations

import base64
import errno
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.harness import MIB, Daemon, must, probe, run
from tests.servers.hub import HubServer
from tests.servers.ports import free_ports
from tests.servers.seaweed import SeaweedServer

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], hub: HubServer, model: Path) -> Iterator[Daemon]:
    hub.publish("org/model", model)
    running = make_daemon(
        config={"fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}}
    )
    running.ok("add", "p", "hf://org/model")
    yield running
    hub.reset()


def test_a_server_that_ignores_ranges_fills_a_pipeline(daemon: Daemon, hub: HubServer, model: Path) -> None:
    hub.fault("whole", port="cdn")
    hub.forget_requests()
    size = (model / FIRST).stat().st_size
    tail = must("sh", "-c", f"tail -c 1000 {daemon.path('p', FIRST)} | sha256sum", timeout=60)
    assert tail == must("sh", "-c", f"tail -c 1000 {model / FIRST} | sha256sum")
    daemon.warm("p", "--all")
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5
    # What was asked for at once with the stream is let go: it brings no more than the sockets hold.
    assert [request.sent for request in hub.requests("cdn") if request.sent > size * 0.9] == [size]


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({"Location": "/loop"}, 302, "redirects"),
        ({"Location": "http://169.254.169.254/latest/meta-data/"}, 302, "no public address"),
        ({"Content-Encoding": "gzip"}, 200, "encoded"),
        ({}, 418, "answers 418"),
    ],
)
def test_what_never_mends_ends_the_wait_and_is_said_once(
    daemon: Daemon, hub: HubServer, model: Path, headers: dict[str, str], status: int, reason: str
) -> None:
    hub.fault("status", port="cdn", status=status, headers=headers)
    before = time.monotonic()
    waited = daemon.cli("warm", "p", "--wait", timeout=60)
    assert waited.returncode == 1 and reason in waited.stderr and time.monotonic() - before < 40
    shown = daemon.status("p")
    assert shown["state"] == "error" and shown["error"]["code"] == "origin-incompatible"
    # The next reader is told at once, and nobody is asked again for it.
    digest = sha256((model / FIRST).read_bytes()).hexdigest()

    def asked() -> int:
        return sum(digest in request.path for request in hub.requests("cdn"))

    before_reading = asked()
    before = time.monotonic()
    read = run("cat", daemon.path("p", FIRST), timeout=30)
    assert read.returncode != 0 and os.strerror(errno.EIO) in read.stderr and time.monotonic() - before < 5
    time.sleep(0.1)
    assert asked() - before_reading <= 8, "what was in flight, and nothing more"
    lines = daemon.text().splitlines()
    final = [line.partition("[p] origin-incompatible: ")[2] for line in lines if "[p] origin-incompatible: " in line]
    assert final and len(final) == len(set(final)), "said once for each file"
    hub.clear()
    daemon.warm("p", "--all")
    assert probe("tree", model, daemon.path("p"), timeout=60)["files"] > 5


PASSWORD = "PlantedPassword77"


@pytest.mark.timeout(240)
def test_planted_secrets_are_nowhere(make_daemon: Callable[..., Daemon], hub: HubServer, model: Path) -> None:
    """A password in the hub's endpoint, an AWS secret, and the signatures of addresses: through success and failure
    they are neither in what commands say, nor in log (at debug), attributes, page, metrics and slots."""
    signed_in = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    hub.publish("org/model", model, tokens=[signed_in])
    (page,) = free_ports(1)
    with SeaweedServer() as store:
        store.client().create_bucket(Bucket="models")
        store.client().put_object(Bucket="models", Key="m/model.safetensors", Body=b"x" * MIB)
        daemon = make_daemon(
            config={
                "fill": {"chunk_size": "1MiB", "read_deadline": "2s"},
                "http": {"listen": f"127.0.0.1:{page}", "details": True},
                "origins": {
                    "huggingface": {"endpoint": hub.endpoint.replace("//", f"//me:{PASSWORD}@")},
                    "s3": {"endpoint_url": store.endpoint_url, "region_name": "us-east-1"},
                },
            },
            env={"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key},
            log_level="debug",
            allow=["."],
        )
        said: list[str] = []

        def tell(*arguments: str | Path) -> int:
            done = daemon.cli(*arguments)
            said.extend((done.stdout, done.stderr))
            return int(done.returncode)

        def look() -> None:
            for arguments in (("status", "p"), ("status", "p", "--json"), ("ls", "--json")):
                tell(*arguments)
            said.append(
                run("getfattr", "-d", "-m-", "--absolute-names", daemon.path("p"), daemon.path("p", FIRST)).stdout
            )
            for path in ("/", "/metrics", "/healthz", "/api/pipelines", "/api/cold-starts/p"):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{page}{path}", timeout=10) as answer:
                        said.append(answer.read().decode())
                except urllib.error.HTTPError as error:
                    with error:
                        said.append(error.read().decode())

        assert tell("add", "p", "hf://org/model") == 0
        assert tell("add", "s", "s3://models/m", "--warm") == 0
        assert tell("warm", "s", "--wait") == 0
        assert any(request.token == signed_in for request in hub.requests("hub")), "the password was never used"
        for kind, status in (("status", 403), ("cut", 0)):
            hub.fault(kind, status=status)  # type: ignore[arg-type]
            run("cat", daemon.path("p", FIRST), timeout=60)
            tell("update", "p")
            tell("add", "q", "hf://org/other")
            look()
            hub.clear()
        hub.fault(
            "status", port="cdn", status=302, headers={"Location": "http://me:hidden99@127.0.0.9/x?Signature=hidden99"}
        )
        tell("warm", "p", "--wait")
        look()
        for arguments in (("ls",), ("doctor",), ("explain", "p")):
            tell(*arguments)
        hub.clear()
        assert tell("add", "t", "s3://nowhere/m") == 1
        assert tell("add", "u", "s3://models/m", "--endpoint-url", f"http://me:{PASSWORD}@127.0.0.1:1") == 2
        look()
        secret = store.secret_key
    hub.kill()
    tell("update", "p")
    assert tell("add", "t", "s3://models/m") == 1
    run("cat", daemon.path("p", FIRST), timeout=60)
    look()
    hub.restart()

    hidden = (PASSWORD, secret, "hidden99", "Signature=", signed_in.removeprefix("Basic "))
    for planted in hidden:
        assert not [text for text in said if planted in text], planted
        assert planted not in daemon.text(), planted
    for pid in (daemon.pid, *daemon.workers()):
        assert PASSWORD.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    looked = 0
    for parent, directories, names in os.walk(daemon.directory):
        directories[:] = [name for name in directories if name != daemon.mount.name]
        for name in names:
            path = Path(parent, name)
            if not path.is_file() or path.suffix == ".toml" or path.stat().st_size > 4 * MIB:
                continue
            looked += 1
            data = path.read_bytes()
            assert not [planted for planted in hidden if planted.encode() in data], path
    assert looked > 5
    assert json.loads(daemon.ok("status", "p", "--json"))["pipeline"] == "p"
