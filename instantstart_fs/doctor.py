"""`instantstart doctor`: checks what a daemon needs, and says how to correct what is wrong.

It changes nothing except for a probe of xattrs where the store will be. Every check has a deadline, and none raises: an
error inside a check is its finding. It works with and without a running daemon.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Literal

import msgspec

from instantstart_fs.admin.access_proof import prove_access
from instantstart_fs.admin.origin_checks import MOST_CHECKS, choose
from instantstart_fs.config import Config, load_config
from instantstart_fs.config.places import find_socket
from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.control.client import Client
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.access import asks_somebody
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.urls import url_problem, without_user
from instantstart_fs.errors import (
    AccessRefused,
    ConfigError,
    ControlProtocolError,
    DaemonUnreachable,
    InstantStartError,
    OriginBroken,
    OriginUnavailable,
    PermissionRefused,
    from_code,
)
from instantstart_fs.ipc.attempts import Attempt, within
from instantstart_fs.mount import kernel
from instantstart_fs.origins.proxies import Proxies
from instantstart_fs.origins.registry import OriginSettings, open_origin
from instantstart_fs.store import filesystem
from instantstart_fs.system import mountinfo

if TYPE_CHECKING:
    from instantstart_fs.regional.keys import RegionKey
    from instantstart_fs.regional.store import TierStore

Outcome = Literal["ok", "warn", "fail"]
ORIGIN_DEADLINE = 20.0
HUB = "https://huggingface.co"
SKEW_LIMIT = 300.0
"""Seconds that the clock may be off. S3 refuses signatures at 15 minutes."""
LOW_SPACE = 20 * 10**9
MINIMUM_KERNEL = (5, 4)


class Check(msgspec.Struct, frozen=True):
    """One finding. ``advice`` says what to do; "" if nothing."""

    name: str
    outcome: Outcome
    found: str
    advice: str = ""


def diagnose_configuration(file: str | None, mount: str | None, store: str | None) -> tuple[Config | None, list[Check]]:
    """Read the configuration: the Config (None if it cannot be read) and the finding."""
    try:
        config = load_config(file, mount=mount, store=store)
    except ConfigError as error:
        return None, [Check("config", "fail", error.message, "correct it; docs/CONFIGURATION.md has every key")]
    source = config.file or "no file: defaults"
    return config, [Check("config", "ok", f"{source}; {len(config.pipelines)} pipelines configured")]


def diagnose(config: Config, socket: str | None = None, *, adopt: bool = False) -> Iterator[Check]:
    """Run all checks in order and yield each finding. ``adopt``: the user named neither store nor mount, so those of a
    running daemon are checked."""
    yield check_kernel(kernel.kernel_release())
    yield check_fuse_device("/dev/fuse")
    yield check_privileges()
    yield check_libfuse(kernel.libfuse_version())
    running, specs, info = check_daemon(config, socket, adopt=adopt)
    yield running
    transport = info.transport if info is not None else ""
    yield check_transport(config.mount.transport, transport, kernel.why_no_passthrough(), binds=kernel.has_sys_admin())
    if adopt and info is not None:
        store = msgspec.structs.replace(config.store, path=info.store)
        mount = msgspec.structs.replace(config.mount, path=info.mount)
        config = msgspec.structs.replace(config, store=store, mount=mount)
    yield from check_store(config)
    yield check_mountpoint(config, running.outcome == "ok")
    if config.http.api_token_file is not None:
        yield check_api(config.http.api_token_file, config.http.port is not None or config.http.socket is not None)
    known = {spec.id for spec in specs}
    wanted = [*specs, *(spec for spec in config.pipelines if spec.id not in known)]
    skew: list[float] = []
    if not any(model.source.startswith("hf://") for spec in wanted for model in spec.models):
        yield check_hub(config.origins.huggingface.endpoint or os.environ.get("HF_ENDPOINT") or HUB, skew)
    asked, found = ask_daemon(socket) if info is not None else (False, [])
    yield from found
    mine = [spec for spec in wanted if not asked or spec.id not in known]
    if mine:
        found_by = "the daemon does not know these pipelines yet" if asked else "no daemon could be asked"
        yield Check("origins", "ok", f"{found_by}: tried from here, with this shell's environment and credentials")
    origins = config.origins
    settings = OriginSettings(origins.huggingface, origins.s3, timeout=10.0, allow_private=origins.allow_private)
    yield from check_origins(mine, settings)
    if config.regional is not None:
        yield check_region(config.regional, info)
        yield from check_upstream(config.regional)
        if config.regional.rack is not None:
            yield check_rack(config.regional, info is not None)
    yield check_clock(skew[0] if skew else None)


# ---------------------------------------------------------------- the machine


def check_kernel(release: tuple[int, int]) -> Check:
    found = f"Linux {release[0]}.{release[1]}"
    if release < MINIMUM_KERNEL:
        return Check("kernel", "warn", f"{found}: older than anything this was tried on", "use Linux 5.4 or newer")
    note = "" if release >= kernel.PASSTHROUGH_RELEASE else " (FUSE passthrough needs 6.9)"
    return Check("kernel", "ok", found + note)


def check_transport(wanted: str, running: str, refusal: str | None, *, binds: bool) -> Check:
    """Check which transport serves the mount.

    Args:
        wanted: as configured.
        running: what the daemon says; "" if none runs.
        refusal: why passthrough cannot work here, if that is known.
        binds: whether this process may make bind mounts."""
    if running:
        slow = running.startswith("pyfuse3 (")
        advice = "warm reads go through FUSE, at a fraction of the disk's speed" if slow else ""
        return Check("transport", "warn" if slow else "ok", running, advice)
    if wanted == "pyfuse3":
        return Check("transport", "ok", "pyfuse3, as configured")
    if wanted == "bind" or (wanted == "auto" and refusal is not None and binds):
        if binds:
            why = f" ({refusal})" if wanted == "auto" else ""
            return Check("transport", "ok", f"bind{why}: complete weight files are read from the store itself")
        return Check("transport", "fail", "bind needs CAP_SYS_ADMIN", 'run as root, or transport = "auto"')
    if refusal is None:
        return Check("transport", "ok", "passthrough, if the store's filesystem takes it (tried at the start)")
    outcome: Outcome = "fail" if wanted == "passthrough" else "warn"
    found = f"no passthrough: {refusal}"
    return Check(
        "transport", outcome, found, "warm reads go through FUSE; CAP_SYS_ADMIN makes them native (passthrough, bind)"
    )


def check_fuse_device(path: str) -> Check:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        advice = "`modprobe fuse`; in a container: --device /dev/fuse (Kubernetes: a device plugin or privileged)"
        return Check("fuse", "fail", f"there is no {path}", advice)
    except PermissionError:
        advice = f"run as root, or allow this user: chmod 0666 {path} (a container also needs the device cgroup)"
        return Check("fuse", "fail", f"this user may not open {path}", advice)
    except OSError as error:
        return Check("fuse", "fail", f"{path}: {error.strerror}", "load the kernel module: `modprobe fuse`")
    return Check("fuse", "ok", f"{path} can be opened")


def check_privileges(
    *, root: bool | None = None, sys_admin: bool | None = None, allow_other: bool | None = None
) -> Check:
    """Check what this process may do. Arguments that are None are found out."""
    is_root = os.geteuid() == 0 if root is None else root
    if kernel.has_sys_admin() if sys_admin is None else sys_admin:
        return Check("privileges", "ok", "CAP_SYS_ADMIN: can mount, and raise readahead and queue limits")
    if is_root:
        advice = "in a container: --cap-add SYS_ADMIN (and --security-opt apparmor=unconfined where AppArmor runs)"
        return Check("privileges", "fail", "root without CAP_SYS_ADMIN cannot mount", advice)
    if shutil.which("fusermount3") is None:
        return Check("privileges", "fail", "an ordinary user needs fusermount3 to mount", "as root: apt install fuse3")
    if kernel.user_allow_other() if allow_other is None else allow_other:
        return Check("privileges", "ok", "an ordinary user; /etc/fuse.conf has user_allow_other")
    return Check(
        "privileges",
        "warn",
        "an ordinary user, and /etc/fuse.conf lacks user_allow_other: only you will see the mount",
        "as root: echo user_allow_other >> /etc/fuse.conf",
    )


def check_libfuse(version: str | None) -> Check:
    if version is None:
        return Check(
            "libfuse", "fail", "libfuse3 was not found", "apt install fuse3 (Debian, Ubuntu), or your system's"
        )
    return Check("libfuse", "ok", f"libfuse {version}")


def check_clock(skew: float | None) -> Check:
    """Check the clock. ``skew``: seconds that it is ahead of a server's; None if none was asked."""
    if skew is not None and abs(skew) > SKEW_LIMIT:
        return Check("clock", "fail", f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}", "run an NTP client")
    if time.time() < 1_735_689_600:
        return Check("clock", "fail", "it says a year before 2025", "set it; signatures and certificates need it")
    return Check("clock", "ok", "plausible" if skew is None else f"within {abs(skew) + 1:.0f} s of the hub's")


# ---------------------------------------------------------------- daemon, store, mount


def check_daemon(
    config: Config, socket: str | None, *, adopt: bool = False
) -> tuple[Check, list[PipelineSpec], DaemonInfo | None]:
    """Ask the daemon. Returns the finding, its pipelines, and what it says of itself."""
    path = find_socket(socket)
    try:
        with Client(path) as client:
            info = client.ping()
            specs: list[PipelineSpec] = []
            with contextlib.suppress(PermissionRefused):  # an owner of some pipelines, or nobody it knows
                specs = client.specs()
    except DaemonUnreachable as error:
        found = f"none runs ({error.message.partition(';')[0]})"
        advice = "start it: `systemctl start instantstart` or `instantstart start`"
        return Check("daemon", "warn", found, advice), [], None
    except InstantStartError as error:
        return Check("daemon", "warn", error.message, "ask as the user that runs it"), [], None
    found = f"pid {info.pid}, version {info.version}, {info.pipelines} pipelines, up {info.uptime:.0f} s"
    if not adopt and (info.store, info.mount) != (config.store.path, config.mount.path):
        found += f"; its store is {info.store}, its mount {info.mount}"
        advice = "this configuration names others: name the daemon's file with --config, or restart it"
        return Check("daemon", "warn", found, advice), specs, info
    return Check("daemon", "ok", found), specs, info


def check_store(config: Config) -> Iterator[Check]:
    path = config.store.path
    directory = path
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    made = "" if directory == path else f"{path} will be made in {directory}; "
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            warning = filesystem.judge(filesystem.filesystem_type(fd), path)
        finally:
            os.close(fd)
        yield Check("store", "warn" if warning else "ok", made + (warning or f"{directory}: a filesystem that fits"))
        yield _check_xattrs(directory, path)
        yield _check_space(directory)
    except InstantStartError as error:
        yield Check("store", "fail", made + error.message, "another [store] path, or --store")
    except OSError as error:
        advice = "give the store to the daemon's user, or choose another [store] path"
        yield Check("store", "fail", f"{made}{directory}: {error.strerror}", advice)


def _check_xattrs(directory: str, store: str) -> Check:
    with tempfile.TemporaryFile(dir=directory) as probe:
        filesystem.probe_xattrs(probe.fileno(), store)
    return Check("xattrs", "ok", "user xattrs can be written")


def _check_space(directory: str) -> Check:
    status = os.statvfs(directory)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free"
    if status.f_favail < 1000 and status.f_files:
        return Check("space", "fail", f"{found}, {status.f_favail} inodes left", "delete small files there")
    if free < LOW_SPACE:
        return Check("space", "warn", found, "little for model weights: a larger disk, or evict pipelines")
    return Check("space", "ok", found)


def check_mountpoint(config: Config, running: bool) -> Check:
    path = os.path.realpath(config.mount.path)
    mount = mountinfo.find_mount(path)
    if mount is None:
        if running:
            return Check("mount", "fail", f"a daemon runs, but nothing is mounted at {path} here", _NAMESPACE)
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return Check("mount", "ok", f"{path} will be made")
        except OSError as error:
            return Check("mount", "fail", f"{path}: {error.strerror}", "choose another [mount] path")
        if names:
            return Check("mount", "fail", f"{path} is not empty", "empty it, or choose another [mount] path")
        return Check("mount", "ok", f"{path} is free")
    if mount.filesystem != "fuse.instantstart":
        return Check("mount", "fail", f"{path} holds a {mount.filesystem} mount", "unmount it, or choose another path")
    try:
        within(5.0, lambda: os.statvfs(path))
    except TimeoutError:
        return Check("mount", "fail", f"{path} does not answer", f"restart the daemon; then umount -l {path}")
    except OSError as error:
        if running:
            return Check("mount", "fail", f"{path}: {error.strerror}", "restart the daemon")
        return Check("mount", "warn", f"{path}: left by a killed daemon", "the next `serve` clears it")
    return Check("mount", "ok", f"{path} answers")


_NAMESPACE = "it may run in another mount namespace (container): look from there, or share the mount (rshared)"


# ---------------------------------------------------------------- origins


def ask_daemon(socket: str | None) -> tuple[bool, list[Check]]:
    """Have the daemon fetch a byte from each of its origins, and return its findings; False if it does not say."""
    try:
        with Client(find_socket(socket)) as client:
            answers = client.check_origins()
    except ControlProtocolError:
        return False, []  # of an earlier version
    except InstantStartError as error:
        advice = "look at its log, and ask once more"
        return False, [Check("origins", "warn", f"the daemon does not say what it can fetch: {error.message}", advice)]
    checks = [
        _origin_check(answer.pipeline, answer.model, answer.source, from_code(answer.code, answer.message))
        if answer.code
        else _origin_check(answer.pipeline, answer.model, answer.source, None)
        for answer in answers
    ]
    unasked = sum(answer.unasked for answer in answers)
    if unasked:
        note = f"{unasked} more sources share an origin and credentials with these, and were not asked one by one"
        checks.append(Check("origins", "ok", note))
    return True, checks


def check_origins(specs: Sequence[PipelineSpec], settings: OriginSettings) -> Iterator[Check]:
    """Fetch a byte of each source from this process, all at once, within ORIGIN_DEADLINE."""
    deadline = time.monotonic() + ORIGIN_DEADLINE
    started = [
        (spec, model, Attempt(functools.partial(_fetch_a_byte, spec, model, settings)))
        for spec, model, _ in choose(specs, MOST_CHECKS)
    ]
    for spec, model, attempt in started:
        yield _judged(spec, model, functools.partial(_result, attempt, deadline))


def _result(attempt: Attempt[None], deadline: float) -> None:
    attempt.result(deadline - time.monotonic())


def check_origin(spec: PipelineSpec, model: ModelSpec, settings: OriginSettings) -> Check:
    """Fetch a byte of one source from this process."""
    return _judged(spec, model, lambda: within(ORIGIN_DEADLINE, lambda: _fetch_a_byte(spec, model, settings)))


def _fetch_a_byte(spec: PipelineSpec, model: ModelSpec, settings: OriginSettings) -> None:
    origin = open_origin(spec, model, settings)
    origin.check()
    if asks_somebody([model.source]):
        prove_access(origin, origin.resolve().files, settings.timeout)


def _judged(spec: PipelineSpec, model: ModelSpec, work: Callable[[], None]) -> Check:
    try:
        work()
    except TimeoutError:
        error: InstantStartError | None = OriginUnavailable(f"no answer within {ORIGIN_DEADLINE:g} s")
    except InstantStartError as found:
        error = found
    except Exception as found:
        name = f"{spec.id}/{model.name}" if model.name else spec.id
        return Check("origin", "fail", f"{name}: {type(found).__name__}: {found}", "this is a defect: please report it")
    else:
        error = None
    return _origin_check(spec.id, model.name, model.source, error)


def _origin_check(pipeline: str, model: str, source: str, error: InstantStartError | None) -> Check:
    name = f"{pipeline}/{model}" if model else pipeline
    if error is None:
        return Check("origin", "ok", f"{name}: {source} can be read")
    said = source.partition("://")[2] in error.message
    reason = error.message if said else f"{source}: {error.message}"
    if isinstance(error, AccessRefused):
        advice = "give the pipeline a token file or an AWS profile that may read it (--token-file, --aws-profile)"
    elif isinstance(error, OriginUnavailable | OriginBroken):
        advice = "open the way to that host: firewall, DNS, the daemon's HTTPS_PROXY; warm pipelines work without it"
    else:
        advice = "correct the source, or mend the way to it"
    return Check("origin", "fail", f"{name}: {reason}", advice)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect as the answer: root must not be led to an internal address only to learn the time."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def check_hub(endpoint: str, skew: list[float]) -> Check:
    """Check that the hub answers. Appends to ``skew`` the seconds that this clock is ahead of the hub's."""
    if (problem := url_problem(endpoint)) is not None:
        return Check(
            "hub", "warn", f"the hub's endpoint is {problem}", "correct [origins.huggingface] endpoint, or HF_ENDPOINT"
        )
    endpoint, authorization = without_user(endpoint)

    def ask() -> str | None:
        request = urllib.request.Request(f"{endpoint.rstrip('/')}/api/models?limit=1", method="GET")
        if authorization is not None:
            request.add_header("Authorization", authorization)
        Proxies().of(endpoint)  # urllib's complaint would hold a part of a password
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=ORIGIN_DEADLINE / 2) as response:
                date: str | None = response.headers.get("Date")
                return date
        except urllib.error.HTTPError as error:
            with error:
                return error.headers.get("Date")

    advice = "fine where no pipeline uses hf://; else HTTPS_PROXY, or a mirror ([origins.huggingface] endpoint)"
    try:
        date = within(ORIGIN_DEADLINE, ask)
    except TimeoutError:
        return Check("hub", "warn", f"{endpoint}: no answer within {ORIGIN_DEADLINE:g} s", advice)
    except (OSError, ValueError, HTTPException, InstantStartError) as error:
        told = OriginUnavailable(f"{endpoint}: {getattr(error, 'reason', error)}")  # printable, whatever it holds
        return Check("hub", "warn", told.message, advice)
    if date is not None:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            skew.append(time.time() - email.utils.parsedate_to_datetime(date).timestamp())
    return Check("hub", "ok", f"{endpoint} answers")


def check_api(token_file: str, listens: bool) -> Check:
    """Check what the HTTP API needs beyond the control socket. ``listens``: whether the page is served at all."""
    from instantstart_fs.web.visitors import read_long_token

    try:
        read_long_token(token_file)
    except InstantStartError as error:
        return Check("http api", "fail", error.message, "one token of 16 characters or more, mode 0600")
    if not listens:
        return Check("http api", "warn", "there is a token, and [http] listen is off", "set it, or use the socket")
    return Check("http api", "ok", "its token's bearer administers over TCP")


def check_region(config: RegionalConfig, info: DaemonInfo | None = None) -> Check:
    """Check the regional tier: a round trip, a race, its key, and that no other host has this one's name."""
    from instantstart_fs.regional.probe import own_finding

    where = f"{config.url} as {config.host}"
    warning = (info.tier.warning if info.tier is not None else "") if info is not None else None
    try:
        found = within(2 * ORIGIN_DEADLINE, lambda: own_finding(*_tier(config, 0), config.host, warning))
    except (TimeoutError, InstantStartError) as error:
        return Check("region", "fail", f"{where}: {_said(error)}", "files come from their origins until this is right")
    return Check("region", found.outcome, f"{where}: {found.found}", found.advice)


def check_upstream(config: RegionalConfig) -> Iterator[Check]:
    """Check that each tier of another region can be read from here, and this host's key of it. Nothing is written."""
    from instantstart_fs.regional.probe import upstream_finding

    advice = "it is passed over until this is right; drop it from regional.upstream if it is gone for good"
    for number, upstream in enumerate(config.upstream, 1):
        try:
            found = within(ORIGIN_DEADLINE, functools.partial(upstream_finding, *_tier(config, number)))
            yield Check("upstream", found.outcome, f"{upstream.url}: {found.found}", found.advice)
        except (TimeoutError, InstantStartError) as error:
            yield Check("upstream", "fail", f"{upstream.url}: {_said(error)}", advice)


def _tier(config: RegionalConfig, number: int) -> tuple[TierStore, RegionKey]:
    from instantstart_fs.filler.region_settings import region_settings

    settings = region_settings(config)
    return settings.stores[number], settings.keys[number]


def _said(error: Exception) -> str:
    return error.message if isinstance(error, InstantStartError) else "no answer in time"


def check_rack(config: RegionalConfig, running: bool) -> Check:
    """Check the rack level: whether neighbours find this host, and which of them answer it. ``running``: the daemon."""
    from instantstart_fs.serving.rack_probe import finding, probe_rack

    where = f"{config.rack} as {config.host}"
    try:
        outcome, found, advice = finding(config, within(2 * ORIGIN_DEADLINE, lambda: probe_rack(config)), running)
    except (TimeoutError, InstantStartError) as error:
        outcome, found, advice = "warn", _said(error), "chunks come from the tier, or the origin, until this is right"
    return Check("rack", outcome, f"{where}: {found}", advice)
