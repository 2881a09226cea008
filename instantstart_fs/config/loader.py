"""Reads TOML files into a Config, or raises a ConfigError that names the file, the key and the reason.

It has every default. It uses no network and creates nothing. docs/CONFIGURATION.md is the contract.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, cast

import msgspec

from instantstart_fs.config.located import At, Table, convert
from instantstart_fs.config.pipelines import PipelineTable, read_pipeline
from instantstart_fs.config.places import default_mount, default_store, find_config
from instantstart_fs.config.sections import (
    Config,
    ControlConfig,
    EvictionConfig,
    FillConfig,
    HttpConfig,
    HuggingFaceConfig,
    MountConfig,
    OnRefusal,
    OriginsConfig,
    RegionalConfig,
    S3Config,
    ServeUnsealed,
    StagingConfig,
    StoreConfig,
    Transport,
    UpstreamConfig,
)
from instantstart_fs.config.units import (
    parse_capacity,
    parse_duration,
    parse_floor,
    parse_group,
    parse_interval,
    parse_rate,
    parse_size,
)
from instantstart_fs.core.addresses import is_named, split_address
from instantstart_fs.core.chunks import DEFAULT_CHUNK_SIZE
from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.errors import ConfigError
from instantstart_fs.system.mountinfo import mounts

PAGE = 4096
MAX_CHUNK_SIZE = 1 << 30
MAX_FILE = 16 * 1024**2
"""The most bytes of a configuration file: a pipeline takes some 300."""


class _Mount(Table):
    path: str | None = None
    transport: str = "auto"


class _Store(Table):
    path: str | None = None
    capacity: str | int = "80%"
    low_watermark: float = 0.85
    high_watermark: float = 0.95
    min_free: str | int = "2%"
    scrub: str | int | float = "off"
    scrub_rate: str | int = 50_000_000


class _Fill(Table):
    workers: str | int = "auto"
    connections: int = 16
    chunk_size: str | int = DEFAULT_CHUNK_SIZE
    read_deadline: str | int | float = 60
    serve_unsealed: ServeUnsealed = "auto"


class _Eviction(Table):
    keep_hot: str | int | float = "48h"
    max_idle: str | int | float | None = None


class _Control(Table):
    group: str | int | None = None
    group_access: bool = False


class _Staging(Table):
    enabled: bool = True
    threads: int = 4
    max_memory: str | int = "50%"


class _Http(Table):
    listen: str = "127.0.0.1:9847"
    allow_remote: bool = False
    details: bool = False
    hosts: tuple[str, ...] = ()
    metrics_pipelines: int = 200
    public: bool = False
    token_file: str | None = None
    api_token_file: str | None = None
    socket: str | None = None


class _HuggingFace(Table):
    endpoint: str | None = None
    token_file: str | None = None


class _S3(Table):
    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    etags_are_md5: bool = True


class _Origins(Table):
    recheck_access: str | int | float = "off"
    on_refusal: OnRefusal = "hide"
    allow_private: tuple[str, ...] = ()
    huggingface: _HuggingFace = msgspec.field(default_factory=_HuggingFace)
    s3: _S3 = msgspec.field(default_factory=_S3)


class _Upstream(Table):
    url: str
    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    key_file: str | None = None


class _Regional(Table):
    url: str
    key_file: str
    host: str | None = None
    endpoint_url: str | None = None
    region_name: str | None = None
    profile: str | None = None
    upstream: tuple[str | _Upstream, ...] = ()
    write_back: bool = True
    startup_caches: tuple[str | int, ...] = ()
    rate: str | int | None = None
    capacity: str | int | None = None
    verify: Literal["chunks", "origin"] = "chunks"
    rack: str | None = None
    rack_listen: str | None = None
    rack_rate: str | int | None = None


class _File(Table):
    region: str = "local"
    mount: _Mount = msgspec.field(default_factory=_Mount)
    store: _Store = msgspec.field(default_factory=_Store)
    fill: _Fill = msgspec.field(default_factory=_Fill)
    eviction: _Eviction = msgspec.field(default_factory=_Eviction)
    staging: _Staging = msgspec.field(default_factory=_Staging)
    http: _Http = msgspec.field(default_factory=_Http)
    control: _Control = msgspec.field(default_factory=_Control)
    origins: _Origins = msgspec.field(default_factory=_Origins)
    regional: _Regional | None = None
    pipelines: dict[str, PipelineTable] = msgspec.field(default_factory=dict)


def load_config(file: str | None = None, *, mount: str | None = None, store: str | None = None) -> Config:
    """Read and check the configuration. Raises ConfigError (file, key, reason).

    ``file``, else $INSTANTSTART_CONFIG, else the one of ``places.find_config``, else defaults alone;
    ``pipelines.d/*.toml`` beside the file are read too, one pipeline each. ``mount`` and ``store`` win over the file.
    """
    named = file or os.environ.get("INSTANTSTART_CONFIG") or None
    if named is None:
        named = find_config()
    if named is None:
        return _build(_File(), None, {}, mount, store)
    path = os.path.abspath(os.path.expanduser(named))
    raw = convert(_read_toml(path), _File, path)
    return _build(raw, path, _drop_ins(path), mount, store)


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors. It knows keys and types; ``load_config`` knows more."""
    return msgspec.json.schema(_File)


def load_pipelines(file: str | None) -> tuple[PipelineSpec, ...]:
    """The pipelines of the configuration at ``file`` (``Config.file``) alone, for SIGHUP. Raises ConfigError."""
    return () if file is None else load_config(file).pipelines


def _read_toml(path: str) -> dict[str, Any]:
    try:
        # A pipe is refused, not waited for: SIGHUP reads the file again. /dev/null is one without keys.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            kind = os.fstat(fd).st_mode
            if stat.S_ISFIFO(kind) or os.isatty(fd):
                what = "pipe" if stat.S_ISFIFO(kind) else "terminal"
                raise ConfigError(f"{path}: is a {what}; a configuration is a file, since it is read again")
            with open(fd, "rb", closefd=False) as stream:
                text = stream.read(MAX_FILE + 1)
        finally:
            os.close(fd)
        if len(text) > MAX_FILE:
            raise ConfigError(f"{path}: has more than {MAX_FILE // 1024**2} MiB: is it a configuration?")
        return tomllib.loads(text.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also what tomllib does not foresee: numbers of 5,000 digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _drop_ins(path: str) -> dict[str, tuple[str, PipelineTable]]:
    """The pipelines of ``pipelines.d`` beside ``path``: id → (file, table)."""
    directory = os.path.join(os.path.dirname(path), "pipelines.d")
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}") from error
    found: dict[str, tuple[str, PipelineTable]] = {}
    for name in names:
        if name.endswith(".toml") and not name.startswith("."):
            file = os.path.join(directory, name)
            found[name.removesuffix(".toml")] = (file, convert(_read_toml(file), PipelineTable, file))
    return found


def _build(
    raw: _File,
    file: str | None,
    drop_ins: Mapping[str, tuple[str, PipelineTable]],
    mount: str | None,
    store: str | None,
) -> Config:
    at = At(file)
    # Relative --mount/--store are relative to where the person stands; those of a file must be absolute.
    mount_path = os.path.abspath(mount) if mount else at.path("mount.path", raw.mount.path or default_mount())
    store_path = os.path.abspath(store) if store else at.path("store.path", raw.store.path or default_store())
    at.require(
        raw.mount.transport in ("auto", "pyfuse3", "passthrough", "bind"),
        "mount.transport",
        f"{raw.mount.transport!r} is none of auto, passthrough, bind, pyfuse3",
    )
    for key, here, other in (("mount.path", mount_path, store_path), ("store.path", store_path, mount_path)):
        at.require(
            here != other and not other.startswith(here.rstrip("/") + "/"),
            key,
            f"the mount ({mount_path}) and the store ({store_path}) may not lie in one another",
        )
    for key, value in (
        ("store.low_watermark", raw.store.low_watermark),
        ("store.high_watermark", raw.store.high_watermark),
    ):
        at.require(0 < value <= 1, key, f"{value} is not between 0 and 1")
    at.require(
        raw.store.low_watermark <= raw.store.high_watermark,
        "store.low_watermark",
        f"{raw.store.low_watermark} is above high_watermark ({raw.store.high_watermark})",
    )
    for key, path in (("mount.path", mount_path), ("store.path", store_path)):
        problem = _path_problem(path)
        at.require(problem is None, key, problem or "")
    hub = raw.origins.huggingface
    at.url("origins.huggingface.endpoint", hub.endpoint)
    at.s3_url("origins.s3.endpoint_url", raw.origins.s3.endpoint_url)
    for entry in raw.origins.allow_private:
        at.require(is_named(entry), "origins.allow_private", f"{entry[:80]!r} is no host, address or network ")
    specs: dict[str, PipelineSpec] = {}
    for name, table in raw.pipelines.items():
        specs[name] = read_pipeline(name, table, file or "configuration", f"pipelines.{name}")
    for name, (drop_in, table) in drop_ins.items():
        if name in specs:
            raise ConfigError(f"{drop_in}: the pipeline {name!r} is already in {file}")
        specs[name] = read_pipeline(name, table, drop_in, "")
    return Config(
        mount=MountConfig(mount_path, cast(Transport, raw.mount.transport)),
        store=StoreConfig(
            store_path,
            at.parsed("store.capacity", parse_capacity, raw.store.capacity),
            raw.store.low_watermark,
            raw.store.high_watermark,
            at.parsed("store.min_free", parse_floor, raw.store.min_free),
            at.parsed("store.scrub", parse_interval, raw.store.scrub),
            at.parsed("store.scrub_rate", parse_rate, raw.store.scrub_rate),
        ),
        fill=_fill(at, raw.fill),
        regional=_regional(at, raw.regional) if raw.regional is not None else None,
        eviction=_eviction(at, raw.eviction),
        staging=_staging(at, raw.staging),
        http=_http(at, raw.http),
        origins=OriginsConfig(
            HuggingFaceConfig(hub.endpoint, at.secret_file("origins.huggingface.token_file", hub.token_file)),
            S3Config(
                raw.origins.s3.endpoint_url,
                raw.origins.s3.region_name,
                raw.origins.s3.profile,
                raw.origins.s3.anonymous,
                raw.origins.s3.requester_pays,
                raw.origins.s3.etags_are_md5,
            ),
            at.parsed("origins.recheck_access", parse_interval, raw.origins.recheck_access),
            raw.origins.on_refusal,
            raw.origins.allow_private,
        ),
        control=ControlConfig(
            None if raw.control.group is None else at.parsed("control.group", parse_group, raw.control.group),
            raw.control.group_access,
        ),
        pipelines=tuple(specs.values()),
        region=raw.region,
        file=file,
    )


def _fill(at: At, raw: _Fill) -> FillConfig:
    workers: int | Literal["auto"] = "auto"
    if raw.workers != "auto":
        if not isinstance(raw.workers, int) or not 1 <= raw.workers <= 256:
            raise at.fail("fill.workers", f'{raw.workers!r} is neither "auto" nor a number from 1 to 256')
        workers = raw.workers
    at.require(1 <= raw.connections <= 1024, "fill.connections", f"{raw.connections} is not from 1 to 1024")
    chunk_size = at.parsed("fill.chunk_size", parse_size, raw.chunk_size)
    at.require(
        PAGE <= chunk_size <= MAX_CHUNK_SIZE and chunk_size % PAGE == 0,
        "fill.chunk_size",
        f"{raw.chunk_size!r} is not a multiple of 4 KiB from 4 KiB to 1 GiB",
    )
    deadline = at.parsed("fill.read_deadline", parse_duration, raw.read_deadline)
    at.require(
        deadline >= 0.1, "fill.read_deadline", f"{raw.read_deadline!r} is less than 100ms: every cold read fails"
    )
    return FillConfig(workers, raw.connections, chunk_size, deadline, raw.serve_unsealed)


def _eviction(at: At, raw: _Eviction) -> EvictionConfig:
    keep_hot = at.parsed("eviction.keep_hot", parse_duration, raw.keep_hot)
    max_idle = None if raw.max_idle is None else at.parsed("eviction.max_idle", parse_duration, raw.max_idle)
    at.require(
        max_idle is None or max_idle >= max(keep_hot, 1.0),
        "eviction.max_idle",
        "must be at least keep_hot and a second: a hot pipeline is never evicted",
    )
    return EvictionConfig(keep_hot, max_idle)


def _staging(at: At, raw: _Staging) -> StagingConfig:
    at.require(1 <= raw.threads <= 64, "staging.threads", f"{raw.threads} is not from 1 to 64")
    return StagingConfig(raw.enabled, raw.threads, at.parsed("staging.max_memory", parse_capacity, raw.max_memory))


def _http(at: At, raw: _Http) -> HttpConfig:
    at.require(
        0 <= raw.metrics_pipelines <= 10_000,
        "http.metrics_pipelines",
        f"{raw.metrics_pipelines} is not from 0 to 10000",
    )
    more: dict[str, Any] = {
        "details": raw.details,
        "metrics_pipelines": raw.metrics_pipelines,
        "public": raw.public,
        "token_file": at.secret_file("http.token_file", raw.token_file),
        "api_token_file": at.secret_file("http.api_token_file", raw.api_token_file),
        "socket": None if raw.socket is None else at.path("http.socket", raw.socket),
    }
    at.require(
        more["api_token_file"] is None or more["api_token_file"] != more["token_file"],
        "http.api_token_file",
        "is the page's token_file, too: who may look would administer; make another one",
    )
    if raw.listen == "off":
        return HttpConfig(port=None, hosts=raw.hosts, **more)
    host, _, port = raw.listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(host)
        number = int(port[:10])
    except ValueError:
        raise at.fail("http.listen", f'{raw.listen!r} is neither "off" nor an IP address and a port') from None
    at.require(0 <= number <= 65535, "http.listen", f"{number} is no port")
    at.require(
        address.is_loopback or raw.allow_remote,
        "http.listen",
        f"{host} can be reached from other machines, without TLS; set http.allow_remote = true if that is wanted",
    )
    hosts = raw.hosts or (() if address.is_loopback else ("*",))
    return HttpConfig(str(address), number, hosts=hosts, **more)


def _is_our_mount(path: str) -> bool:
    """Whether our mount is at that path. By /proc, since a mount whose daemon restarts does not answer."""
    resolved = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return any(mount.path == resolved and mount.filesystem == "fuse.instantstart" for mount in mounts())


def _path_problem(path: str) -> str | None:
    """Return why ``path`` can be neither used nor made, or None. A stale mount counts as absent: the daemon clears
    it."""
    if _is_our_mount(path):
        return None
    probe = path
    while not os.path.lexists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        return f"{probe} is not a directory"
    if probe != path and os.statvfs(probe).f_flag & os.ST_RDONLY:
        return f"{path} cannot be made: the filesystem of {probe} is read-only"
    if not os.access(probe, os.X_OK | (os.W_OK if probe != path else 0)):
        return f"this user may not use {path}" if probe == path else f"this user may not create {path} in {probe}"
    return None


_TIER = late(r"(s3://[a-z0-9][a-z0-9._-]{1,254}(/[^?#]*)?|file:///[^?#]+)\Z")
_HOST = late(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_USER = late(r"[0-9]{1,10}\Z|[A-Za-z_][A-Za-z0-9_.@-]{0,62}\$?\Z")


def _regional(at: At, raw: _Regional) -> RegionalConfig:
    upstream = [_Upstream(one) if isinstance(one, str) else one for one in raw.upstream]
    for key, url in (("regional.url", raw.url), *(("regional.upstream", one.url) for one in upstream)):
        at.require(
            _TIER.match(url) is not None, key, f"{url[:200]!r} is neither s3://bucket/prefix nor file:///directory"
        )
    at.s3_url("regional.endpoint_url", raw.endpoint_url)
    for one in upstream:
        at.s3_url("regional.upstream.endpoint_url", one.endpoint_url)
    host = raw.host if raw.host is not None else os.uname().nodename
    at.require(_HOST.match(host) is not None, "regional.host", f"{host[:80]!r} is no host's name")
    return RegionalConfig(
        url=raw.url,
        key_file=at.path("regional.key_file", raw.key_file),
        host=host,
        endpoint_url=raw.endpoint_url,
        region_name=raw.region_name,
        profile=raw.profile,
        upstream=tuple(
            UpstreamConfig(
                one.url,
                one.endpoint_url or raw.endpoint_url,
                one.region_name or raw.region_name,
                one.profile or raw.profile,
                at.path("regional.upstream.key_file", one.key_file) if one.key_file is not None else None,
            )
            for one in upstream
        ),
        write_back=raw.write_back,
        startup_caches=_users(at, raw.startup_caches),
        rate=at.parsed("regional.rate", parse_rate, raw.rate) if raw.rate is not None else None,
        verify=raw.verify,
        capacity=at.parsed("regional.capacity", parse_size, raw.capacity) if raw.capacity is not None else None,
        **_rack(at, raw),
    )


def _users(at: At, given: tuple[str | int, ...]) -> tuple[str, ...]:
    """As they are written: hosts that name a user otherwise do not meet."""
    found = tuple(str(one) for one in given)
    for user in found:
        at.require(
            _USER.match(user) is not None, "regional.startup_caches", f"{user[:80]!r} is no user's name or number"
        )
    return found


def _rack(at: At, raw: _Regional) -> dict[str, Any]:
    if raw.rack is None:
        given = [key for key in ("rack_listen", "rack_rate") if getattr(raw, key) is not None]
        at.require(not given, f"regional.{given[0]}" if given else "", "it says nothing without regional.rack")
        return {}
    at.require(_HOST.match(raw.rack) is not None, "regional.rack", f"{raw.rack[:80]!r} is no rack's name")
    found: dict[str, Any] = {"rack": raw.rack}
    if raw.rack_rate is not None:
        found["rack_rate"] = at.parsed("regional.rack_rate", parse_rate, raw.rack_rate)
    if raw.rack_listen is not None:
        place = split_address(raw.rack_listen)
        if place is None or ipaddress.ip_address(place[0]).is_unspecified:
            raise at.fail(
                "regional.rack_listen", f"{raw.rack_listen[:80]!r} is no IP address, as the rack knows it, and a port"
            )
        found["rack_listen"] = place
    return found
