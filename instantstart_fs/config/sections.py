"""The configuration's frozen values. Sizes are bytes and durations seconds from here on; paths are absolute.

Everybody below the command line gets a ``Config`` or one of its sections; nobody below reads TOML or the environment.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from instantstart_fs.core.chunks import DEFAULT_CHUNK_SIZE
from instantstart_fs.core.manifest import PipelineSpec

ServeUnsealed = Literal["auto", "always", "never"]
Transport = Literal["auto", "passthrough", "bind", "pyfuse3"]
MAX_AUTO_WORKERS = 4
"""Four fetch processes saturate 16 connections of a 10 Gbit/s line with hashing; more only cost memory."""


class Capacity(msgspec.Struct, frozen=True):
    """An amount given either in bytes or as a fraction (0 < fraction ≤ 1) of some whole; one of the two is set."""

    bytes: int | None = None
    fraction: float | None = None

    def of(self, total: int) -> int:
        """Return the capacity in bytes, given the whole."""
        return self.bytes if self.bytes is not None else int(total * (self.fraction or 0.0))


class MountConfig(msgspec.Struct, frozen=True):
    path: str
    transport: Transport = "auto"


class StoreConfig(msgspec.Struct, frozen=True):
    """The [store] section. ``capacity``: how much of the filesystem the store may use. Watermarks are fractions of the
    capacity.

    ``min_free``: how much of the filesystem stays free for its other users. ``scrub``: seconds within which every
    complete file is read again and compared, None = never; ``scrub_rate``: bytes a second at most.
    """

    path: str
    capacity: Capacity = Capacity(fraction=0.8)
    low_watermark: float = 0.85
    high_watermark: float = 0.95
    min_free: Capacity = Capacity(fraction=0.02)
    scrub: float | None = None
    scrub_rate: int = 50_000_000


class FillConfig(msgspec.Struct, frozen=True):
    """``connections`` in total over all workers; ``chunk_size`` in bytes; ``read_deadline`` in seconds."""

    workers: int | Literal["auto"] = "auto"
    connections: int = 16
    chunk_size: int = DEFAULT_CHUNK_SIZE
    read_deadline: float = 60.0
    serve_unsealed: ServeUnsealed = "auto"

    @property
    def worker_count(self) -> int:
        """Return how many fetch processes to run: as configured, or one per core, at least 2 and at most
        MAX_AUTO_WORKERS."""
        if self.workers == "auto":
            return min(MAX_AUTO_WORKERS, max(2, len(os.sched_getaffinity(0))))
        return self.workers


class EvictionConfig(msgspec.Struct, frozen=True):
    """Seconds. ``keep_hot``: a pipeline requested within it is never evicted. ``max_idle``: one that was not requested
    for so long is evicted though there is space; None = it stays."""

    keep_hot: float = 48 * 3600.0
    max_idle: float | None = None


class ControlConfig(msgspec.Struct, frozen=True):
    """The users of the control socket beside root and the daemon's user. ``group``: the gid whose members administer;
    ``group_access``: members of a pipeline's own group may do what its owner may."""

    group: int | None = None
    group_access: bool = False


class StagingConfig(msgspec.Struct, frozen=True):
    """Page-cache staging (mount/staging.py). ``max_memory``: of what the machine has available (MemAvailable)."""

    enabled: bool = True
    threads: int = 4
    max_memory: Capacity = Capacity(fraction=0.5)


class HttpConfig(msgspec.Struct, frozen=True):
    """Page, metrics and health. ``host`` and ``port``: where; port 0 takes a free one, None serves nothing.

    ``public``: every caller sees every pipeline; else each caller what the mount would show him. ``token_file``:
    the file of a token, the bearer of which sees every pipeline. ``api_token_file``: that of another one, the bearer of
    which may ask for the API's verbs here; None: only the control socket has them. ``socket``: a unix socket to be
    served on as well.
    ``details``: show sources, revisions and error messages too. ``hosts``: names by which browsers may call it, beside
    the loopback ones; ("*",) = any. ``metrics_pipelines``: how many pipelines get metrics of their own.
    """

    host: str = "127.0.0.1"
    port: int | None = 9847
    details: bool = False
    hosts: tuple[str, ...] = ()
    metrics_pipelines: int = 200
    public: bool = False
    token_file: str | None = None
    socket: str | None = None
    api_token_file: str | None = None


class HuggingFaceConfig(msgspec.Struct, frozen=True):
    """The settings of Hugging Face. None leaves a setting to HF_ENDPOINT, HF_TOKEN and huggingface_hub's own files."""

    endpoint: str | None = None
    token_file: str | None = None


class S3Config(msgspec.Struct, frozen=True):
    """The settings of S3. None leaves a setting to boto3: AWS_* and ~/.aws. ``anonymous``: no credentials are looked
    for; ``requester_pays``: the owner of the credentials pays for the requests; ``etags_are_md5``: False if the
    server's ETags only look like MD5."""

    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    etags_are_md5: bool = True


OnRefusal = Literal["hide", "report"]


class OriginsConfig(msgspec.Struct, frozen=True):
    """The settings of all origins. ``recheck_access``: seconds between two checks whether a pipeline's credentials may
    still fetch its source, None = no checks; ``on_refusal``: whether a refused pipeline is hidden or only reported.
    ``allow_private``: private hosts, addresses and networks, beside the endpoints, that an origin may redirect the
    daemon to."""

    huggingface: HuggingFaceConfig = HuggingFaceConfig()
    s3: S3Config = S3Config()
    recheck_access: float | None = None
    on_refusal: OnRefusal = "hide"
    allow_private: tuple[str, ...] = ()


RACK_PORT = 9848
RACK_RATE = 2 << 30


class UpstreamConfig(msgspec.Struct, frozen=True):
    """Another region's tier. None means the same as in RegionalConfig."""

    url: str
    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    key_file: str | None = None


class RegionalConfig(msgspec.Struct, frozen=True):
    """The regional tier. ``url``: s3://bucket/prefix or file:///directory; ``upstream``: other regions' tiers, asked
    before the origin; ``key_file``: of the region's secret; ``host``: this host's name; ``verify``: "chunks" believes a
    file whose every chunk is what the region's seal says, "origin" hashes it here as well; ``rate``: bytes a second
    that are written back, None = any; ``startup_caches``: users, by name or number, who are the same on all hosts of
    the region: what their engines compiled travels, too; ``capacity``:
    bytes that the tier may hold, which `regional gc` sees to; ``rack``: hosts behind one uplink that take chunks from
    each other, None = off; ``rack_listen``: where this one answers them, ("", port) = the address that its default
    route has; ``rack_rate``: bytes a second that it gives them at most."""

    url: str
    key_file: str
    host: str
    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    upstream: tuple[UpstreamConfig, ...] = ()
    write_back: bool = True
    rate: int | None = None
    verify: Literal["chunks", "origin"] = "chunks"
    startup_caches: tuple[str, ...] = ()
    capacity: int | None = None
    rack: str | None = None
    rack_listen: tuple[str, int] = ("", RACK_PORT)
    rack_rate: int = RACK_RATE


class Config(msgspec.Struct, frozen=True):
    """The whole. ``file``: where it was read from, None for defaults. ``pipelines``: those of the file(s), by id."""

    mount: MountConfig
    store: StoreConfig
    fill: FillConfig = FillConfig()
    eviction: EvictionConfig = EvictionConfig()
    staging: StagingConfig = StagingConfig()
    http: HttpConfig = HttpConfig()
    origins: OriginsConfig = OriginsConfig()
    control: ControlConfig = ControlConfig()
    pipelines: tuple[PipelineSpec, ...] = ()
    region: str = "local"
    regional: RegionalConfig | None = None
    file: str | None = None
