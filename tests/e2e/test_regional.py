"""A regional tier between real daemons, a real hub and a real SeaweedFS."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from tests.harness import Daemon
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

MIB = 1 << 20
SPEC = PipelineSpec("p", (ModelSpec("hf://org/model"),))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Site:
    """Hosts of one region: a hub, a bucket, a key."""

    def __init__(self, directory: Path, hub: HubServer, seaweed: SeaweedServer) -> None:
        self.directory = directory
        self.hub = hub
        self.seaweed = seaweed
        self.bucket = seaweed.new_bucket(f"tier-{secrets.token_hex(6)}")
        self.key = directory / "region.key"
        self.key.write_text(secrets.token_hex(32))
        self.key.chmod(0o600)
        self.daemons: list[Daemon] = []

    def host(self, name: str, **regional: Any) -> Daemon:
        config = {
            "fill": {"chunk_size": "1MiB"},
            "http": {"listen": "127.0.0.1:0"},
            "origins": {"huggingface": {"endpoint": self.hub.endpoint}},
            "regional": {
                "url": f"s3://{self.bucket}/t",
                "endpoint_url": self.seaweed.endpoint_url,
                "key_file": str(self.key),
                "host": name,
                **regional,
            },
        }
        daemon = Daemon(
            self.directory / name,
            config=config,
            env={"AWS_ACCESS_KEY_ID": self.seaweed.access_key, "AWS_SECRET_ACCESS_KEY": self.seaweed.secret_key},
        )
        self.daemons.append(daemon)
        daemon.start()
        with Client(str(daemon.socket)) as client:
            client.add(SPEC)
        return daemon

    def warm(self, daemon: Daemon) -> None:
        with Client(str(daemon.socket)) as client:
            client.wait_warm("p", everything=True)

    def sent(self) -> int:
        return sum(request.sent for request in self.hub.requests())

    def objects(self) -> dict[str, int]:
        pages = self.seaweed.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

    def wait_seals(self, count: int, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while sum(name.endswith("/seal") for name in self.objects()) < count:
            assert time.monotonic() < end, self.objects()
            time.sleep(0.1)


@pytest.fixture
def site(tmp_path: Path, hub: HubServer, seaweed: SeaweedServer) -> Iterator[Site]:
    made = Site(tmp_path, hub, seaweed)
    try:
        yield made
    finally:
        for daemon in made.daemons:
            daemon.close(check=False)


def model(directory: Path, files: dict[str, int]) -> Path:
    directory.mkdir()
    for name, size in files.items():
        (directory / name).write_bytes(secrets.token_bytes(size))
    return directory


def right(daemon: Daemon, made: Path) -> None:
    for path in made.iterdir():
        assert (daemon.path("p") / path.name).read_bytes() == path.read_bytes(), path.name


FILES = {"config.json": 700, "model-1.safetensors": 20 * MIB + 13, "model-2.safetensors": 5 * MIB}


def test_a_second_host_takes_no_byte_from_the_hub(site: Site, tmp_path: Path) -> None:
    made = model(tmp_path / "model", FILES)
    site.hub.publish("org/model", made)
    first = site.host("one")
    site.warm(first)
    right(first, made)
    site.wait_seals(len(FILES))
    before = site.sent()
    second = site.host("two")
    site.warm(second)
    right(second, made)
    assert site.sent() - before < 20_000, [request for request in site.hub.requests()][-9:]
