"""The driver's gRPC server on a unix socket. It turns requests into calls of the driver, and errors into status
codes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Final

import grpc

from instantstart_fs import __version__
from instantstart_fs.csi import messages
from instantstart_fs.csi.driver import Driver
from instantstart_fs.csi.patience import Deadline
from instantstart_fs.errors import (
    AccessRefused,
    DaemonUnreachable,
    InstantStartError,
    OriginHidden,
    OriginNotFound,
    OriginUnavailable,
    PermissionRefused,
    PipelineBusy,
    PipelineExists,
    PipelineNotFound,
    ReadDeadline,
    StoreFull,
    UsageError,
    VariantNotChosen,
    printable,
    without_secrets,
)

log = logging.getLogger(__name__)

NAME: Final = "csi.instantstart.io"
THREADS: Final = 32
PUBLISHES: Final = 24
"""Publishes that run at once. Beyond that a kubelet is told to come again, so that probes and unpublishes find a
thread."""
STATS: Final = 4
"""Stats calls that run at once, each for STATS_SECONDS. A daemon that accepts and says nothing would otherwise hold all
threads by them."""
STATS_SECONDS: Final = 5.0
DEFAULT_DEADLINE: Final = 110.0
"""Seconds for a call whose caller names no deadline or a longer one. A kubelet's own deadline is 120."""
MARGIN: Final = 0.5
"""Seconds before a caller's deadline at which its answer is sent."""
PROBE_SECONDS: Final = 5.0
MAX_MESSAGE: Final = 1024 * 1024

_CODES: Final = (
    (PipelineExists, grpc.StatusCode.ALREADY_EXISTS),
    (VariantNotChosen, grpc.StatusCode.INVALID_ARGUMENT),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (OriginHidden, grpc.StatusCode.PERMISSION_DENIED),
    (AccessRefused, grpc.StatusCode.PERMISSION_DENIED),
    (PermissionRefused, grpc.StatusCode.PERMISSION_DENIED),
    (OriginNotFound, grpc.StatusCode.NOT_FOUND),
    (PipelineNotFound, grpc.StatusCode.NOT_FOUND),
    (PipelineBusy, grpc.StatusCode.ABORTED),
    (ReadDeadline, grpc.StatusCode.DEADLINE_EXCEEDED),
    (StoreFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DaemonUnreachable, grpc.StatusCode.UNAVAILABLE),
    (OriginUnavailable, grpc.StatusCode.UNAVAILABLE),
)
"""Error → status. The first class that fits counts; INTERNAL stands for all others."""


def status_code(error: BaseException) -> Any:
    """Return the gRPC status that tells a kubelet of ``error``."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


class Service:
    """The methods of Identity and Node. Each takes (request, context)."""

    def __init__(self, driver: Driver, node_id: str) -> None:
        self._driver = driver
        self._node_id = node_id
        self._publishes = threading.BoundedSemaphore(PUBLISHES)
        self._stats = threading.BoundedSemaphore(STATS)

    def GetPluginInfo(self, _: Any, __: Any) -> Any:  # noqa: N802 (the specification's names, here and below)
        return messages.message("GetPluginInfoResponse")(name=NAME, vendor_version=__version__)

    def GetPluginCapabilities(self, _: Any, __: Any) -> Any:  # noqa: N802
        return messages.message("GetPluginCapabilitiesResponse")()  # no controller: volumes are inline

    def Probe(self, _: Any, context: Any) -> Any:  # noqa: N802
        """Answer that the driver is ready once the daemon answers. While it does not, no error is returned, because a
        restart of this process would not help."""
        try:
            self._driver.ready(min(PROBE_SECONDS, _seconds(context)))
            ready = True
        except InstantStartError as error:
            log.warning("not ready: %s", error)
            ready = False
        return messages.message("ProbeResponse")(ready=messages.message("BoolValue")(value=ready))

    def NodeGetInfo(self, _: Any, __: Any) -> Any:  # noqa: N802
        return messages.message("NodeGetInfoResponse")(node_id=self._node_id)

    def NodeGetCapabilities(self, _: Any, __: Any) -> Any:  # noqa: N802
        kinds = (messages.GET_VOLUME_STATS, messages.VOLUME_CONDITION, messages.VOLUME_MOUNT_GROUP)
        answer = messages.message("NodeGetCapabilitiesResponse")()
        for kind in kinds:
            answer.capabilities.add().rpc.type = kind
        return answer

    def NodePublishVolume(self, request: Any, context: Any) -> Any:  # noqa: N802
        capability = request.volume_capability
        if capability.WhichOneof("access_type") != "mount":
            raise UsageError("only mounted volumes are served: no volume_capability, or a block device")
        if capability.mount.mount_flags:
            raise UsageError("mount options are not taken")
        with _one_of(self._publishes, f"{PUBLISHES} volumes are being published; ask again"):
            self._driver.publish(
                request.volume_id,
                request.target_path,
                dict(request.volume_context),
                dict(request.secrets),
                capability.mount.volume_mount_group,
                _deadline(context),
            )
        return messages.message("Empty")()

    def NodeUnpublishVolume(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._driver.unpublish(request.volume_id, request.target_path, _deadline(context))
        return messages.message("Empty")()

    def NodeGetVolumeStats(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _one_of(self._stats, f"{STATS} volumes are being looked at; ask again"):
            deadline = _deadline(context, STATS_SECONDS)
            found = self._driver.condition(request.volume_id, request.volume_path, deadline)
        answer = messages.message("NodeGetVolumeStatsResponse")()
        answer.usage.add(total=found.total, used=found.used, unit=messages.BYTES)
        answer.usage.add(total=found.files, used=found.files, unit=messages.INODES)
        answer.volume_condition.abnormal = found.abnormal
        answer.volume_condition.message = printable(found.message)[:1000]
        return answer


def _seconds(context: Any) -> float:
    left = context.time_remaining()
    return min(DEFAULT_DEADLINE, DEFAULT_DEADLINE if left is None else left) - MARGIN


def _deadline(context: Any, most: float = DEFAULT_DEADLINE) -> Deadline:
    return Deadline(min(most, _seconds(context)), context.is_active)


@contextlib.contextmanager
def _one_of(places: threading.BoundedSemaphore, busy: str) -> Iterator[None]:
    """Take one of the places inside the block. Raises PipelineBusy where all are taken."""
    if not places.acquire(blocking=False):
        raise PipelineBusy(busy)
    try:
        yield
    finally:
        places.release()


def _handler(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap ``call`` so that its errors are gRPC's. Requests are never logged, because they hold secrets."""

    def handle(request: Any, context: Any) -> Any:
        try:
            return call(request, context)
        except (InstantStartError, OSError) as error:
            code = status_code(error)
            text = without_secrets(printable(str(error)))[:2000]
        except Exception:
            log.exception("%s failed", call.__name__)
            code, text = grpc.StatusCode.INTERNAL, f"{call.__name__} failed; see the driver's log"
        log.warning("%s: %s: %s", call.__name__, code.name, text)
        return context.abort(code, text)

    return handle


def make_server(driver: Driver, node_id: str, path: str) -> Any:
    """Return a server that is bound to the unix socket ``path`` and not started. Raises OSError, UsageError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is there, and no socket")
        os.unlink(path)  # a driver before this one left it; a kubelet has one driver of a name
    server = grpc.server(
        futures.ThreadPoolExecutor(THREADS, thread_name_prefix="csi"),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.so_reuseport", 0)],
    )
    service = Service(driver, node_id)
    for name, methods in messages.METHODS.items():
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                _handler(getattr(service, method)),
                request_deserializer=messages.message(request).FromString,
                response_serializer=messages.message(response).SerializeToString,
            )
            for method, (request, response) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{messages.PACKAGE}.{name}", handlers),))
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise UsageError(f"{path}: it cannot be listened on ({error})") from error
    finally:
        os.umask(umask)
    return server


def serve(driver: Driver, node_id: str, path: str) -> None:
    """Serve until SIGTERM or SIGINT. Mounts stay."""
    driver.recover()
    server = make_server(driver, node_id, path)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    keeper = threading.Thread(target=driver.leases.run, name="csi-leases", daemon=True)
    keeper.start()
    server.start()
    log.info("ready: %s listens on %s for node %s", NAME, path, node_id)
    ended.wait()
    server.stop(grace=5).wait(6)
    driver.leases.end()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
