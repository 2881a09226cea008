"""What the node driver does for a kubelet: publishes volumes, unpublishes them, tells how they are. It knows no gRPC.

Every call may come twice, after a crash of anybody, and for what is gone. What is published is in ``records``, what is
mounted in the mount table, what is cached with the daemon: nothing else is remembered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import msgspec

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.core.volumes import MAX_TOKEN, VolumeRequest, volume_request
from instantstart_fs.csi import targets
from instantstart_fs.csi.leases import LeaseKeeper
from instantstart_fs.csi.records import Records, Volume
from instantstart_fs.errors import (
    DaemonUnreachable,
    InstantStartError,
    MountFailed,
    PipelineBusy,
    PipelineExists,
    PipelineNotFound,
    ReadDeadline,
    UsageError,
)
from instantstart_fs.system import mountinfo
from instantstart_fs.system.mountinfo import Mount

log = logging.getLogger(__name__)
_T = TypeVar("_T")

TOKEN_KEYS = ("token", "HF_TOKEN", "hf_token")
"""Of the secret: where its token lies."""
MAX_VOLUME_ID = 256
POLL_SECONDS = 0.5
"""Between two looks at a pipeline that is waited for."""
BIND_SECONDS = 20.0
"""For a mount: opening a directory of a mount whose daemon hangs never ends by itself."""
REPAIR_SECONDS = 60.0
"""For what is done again after the daemon's restart, of one pipeline."""


class Condition(msgspec.Struct, frozen=True):
    """``used`` and ``total`` in bytes; ``abnormal`` with the reason in ``message``."""

    total: int
    used: int
    files: int
    abnormal: bool
    message: str


class Deadline:
    """A moment until which a call may last. ``alive``: whether somebody still waits for its answer."""

    def __init__(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        self._end = time.monotonic() + seconds
        self._alive = alive

    def left(self) -> float:
        """Seconds; at least a little. Raises ReadDeadline."""
        left = self._end - time.monotonic()
        if left <= 0.05 or not self._alive():
            raise ReadDeadline("the call's deadline has passed; what it began goes on, ask again")
        return left


class Driver:
    """Thread-safe. ``kubelet``: the kubelet's directory, below which targets lie."""

    def __init__(self, socket: str, state: str, kubelet: str, *, node_credentials: bool = False) -> None:
        """Raises OSError."""
        self._socket = socket
        self._kubelet = os.path.normpath(kubelet)
        self._node_credentials = node_credentials
        self._records = Records(os.path.abspath(state))
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self.leases = LeaseKeeper(socket, self._restore)

    def recover(self) -> None:
        """Take up what a driver before this one left: leases of what is published, no token of what is not."""
        for volume in self._records.all():
            # A kubelet removes a pod's directory when all its volumes are unpublished: nobody will ask again.
            if not os.path.isdir(os.path.dirname(volume.target)):
                log.warning("%s: its pod's directory has gone; the volume is forgotten", volume.target)
                self._records.delete(volume.volume_id)
            else:
                self.leases.want(volume.spec.id)
        self._records.sweep_tokens()

    def ready(self, seconds: float) -> None:
        """Raises InstantStartError unless the daemon answers and its mount is to be seen here."""
        self._daemon_mount(Deadline(seconds))

    # -- publish ---------------------------------------------------------------------------------------------------

    def publish(
        self,
        volume_id: str,
        target: str,
        context: Mapping[str, str],
        secrets: Mapping[str, str],
        group: str,
        deadline: Deadline,
    ) -> None:
        """Raises InstantStartError, OSError. What failed for good leaves nothing behind."""
        _check_id(volume_id)
        targets.check_target(target, self._kubelet)
        token = _token(secrets)
        request = volume_request(
            context,
            group=group,
            token_file=None if token is None else self._records.tokens,
            node_credentials=self._node_credentials,
        )
        pipeline = request.spec.id
        # One at a time for each pipeline: its token is exchanged, proven, and put back if it proves wrong.
        with self._alone(volume_id), self._alone(pipeline, "another volume of it is being published; ask again"):
            known = self._records.get(volume_id)
            if known is not None and (known.target != target or known.spec.id != pipeline):
                raise PipelineExists(f"volume {volume_id} is published as {known.spec.id} at {known.target}")
            try:
                self._provide(request, token, deadline)
                self._records.put(Volume(volume_id, target, request.spec))
                self.leases.take(pipeline, deadline.left())
                self._warm(request, deadline)
                self._show(pipeline, target, deadline)
            except (ReadDeadline, DaemonUnreachable, PipelineBusy):
                raise  # a kubelet asks again, or unpublishes
            except (InstantStartError, OSError):
                if known is None:
                    self._forget(volume_id, pipeline)
                raise
        log.info("published %s at %s", pipeline, target)

    def _provide(self, request: VolumeRequest, token: str | None, deadline: Deadline) -> None:
        """The pipeline is added, and what the pod brought opens its source."""
        spec = request.spec
        before = self._records.token(spec.id) if token is not None else None
        if token is not None and token != before:
            self._records.put_token(spec.id, token)
        try:
            with self._client(deadline) as client:
                added = _add(client, spec)
                if token is not None and not self._records.accepted(spec.id, token):
                    if not added:  # what is cached is not for everybody who names it
                        client.check_access(spec.id)
                    self._records.accept(spec.id, token)
        except InstantStartError:
            if token is not None and token != before:
                self._records.put_token(spec.id, before)
            raise

    def _warm(self, request: VolumeRequest, deadline: Deadline) -> None:
        pipeline = request.spec.id
        if request.warm == "no":
            return
        with self._client(deadline) as client:
            status = client.warm(pipeline)
            if request.warm == "start":
                return
            while status.cached_bytes < status.total_bytes or status.state not in ("warm", "unverified"):
                if status.state == "error":
                    raise InstantStartError(
                        f"{pipeline}: {status.error.message if status.error else 'its fill failed'}"
                    )
                time.sleep(min(POLL_SECONDS, deadline.left()))
                status = client.status(pipeline, brief=True)

    def _show(self, pipeline: str, target: str, deadline: Deadline) -> None:
        where = self._daemon_mount(deadline)
        if not targets.shows(target, pipeline, where):
            seconds = min(BIND_SECONDS, deadline.left())
            _within(seconds, lambda: targets.bind(f"{where.path}/{pipeline}", target, self._kubelet))

    def _daemon_mount(self, deadline: Deadline) -> Mount:
        with self._client(deadline) as client:
            info = client.ping()
        if not info.ready:
            raise DaemonUnreachable("the daemon's mount does not answer yet; ask again")
        found = mountinfo.find_mount(info.mount)
        if found is None:
            raise DaemonUnreachable(
                f"the daemon's mount {info.mount} cannot be seen here: mount its parent directory into this "
                "container at the same path, with mountPropagation: HostToContainer"
            )
        return found

    # -- unpublish -------------------------------------------------------------------------------------------------

    def unpublish(self, volume_id: str, target: str, deadline: Deadline) -> None:
        """What is not there is no error. Raises InstantStartError, OSError."""
        _check_id(volume_id)
        targets.check_target(target, self._kubelet)
        with self._alone(volume_id):
            seconds = min(BIND_SECONDS, deadline.left())
            _within(seconds, lambda: targets.unbind(target, self._kubelet))
            known = self._records.get(volume_id)
            if known is not None and known.target == target:
                self._forget(volume_id, known.spec.id)
                log.info("unpublished %s at %s", known.spec.id, target)

    def _forget(self, volume_id: str, pipeline: str) -> None:
        """The last volume of a pipeline takes its lease and its token along; what is cached stays."""
        self._records.delete(volume_id)
        if not any(volume.spec.id == pipeline for volume in self._records.all()):
            self.leases.give_up(pipeline)
            self._records.put_token(pipeline, None)

    # -- how it is -------------------------------------------------------------------------------------------------

    def condition(self, volume_id: str, path: str, deadline: Deadline) -> Condition:
        """Raises PipelineNotFound for a volume that is not published at ``path``."""
        _check_id(volume_id)
        known = self._records.get(volume_id)
        if known is None or known.target != path:
            raise PipelineNotFound(f"volume {volume_id[:80]!r} is not published there")
        pipeline = known.spec.id
        try:
            with self._client(deadline) as client:
                status = client.status(pipeline, brief=True)
            where = self._daemon_mount(deadline)
        except (DaemonUnreachable, PipelineNotFound) as error:
            return Condition(0, 0, 0, True, str(error))
        if not targets.shows(path, pipeline, where):
            return _condition(status, True, "the mount that the pod sees is dead: the daemon made a new one")
        if status.error is not None and status.state == "error":
            return _condition(status, True, f"{status.error.code}: {status.error.message}")
        if status.access is not None and status.access.verdict == "refused":
            return _condition(status, True, "the source refuses the pipeline's credentials")
        return _condition(
            status, False, f"{status.state}: {status.cached_bytes} of {status.total_bytes} bytes are here"
        )

    # -- the daemon ------------------------------------------------------------------------------------------------

    def _restore(self, pipeline: str) -> None:
        """After the daemon's restart: the pipeline is there, and mounted wherever it is published."""
        volumes = [volume for volume in self._records.all() if volume.spec.id == pipeline]
        if not volumes:
            self.leases.give_up(pipeline)
            return
        deadline = Deadline(REPAIR_SECONDS)
        with self._client(deadline) as client:
            _add(client, volumes[0].spec)
        for volume in volumes:
            with self._alone(volume.volume_id):
                if self._records.get(volume.volume_id) is None:
                    continue
                try:
                    self._show(pipeline, volume.target, deadline)
                except OSError as error:
                    raise MountFailed(f"{volume.target}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _client(self, deadline: Deadline) -> Iterator[Client]:
        """A connection that ends at the deadline, whoever waits on it. Raises ReadDeadline then."""
        left = deadline.left()
        with Client(self._socket, deadline=min(left, 20.0)) as client:
            timer = threading.Timer(left, client.close)
            timer.daemon = True
            timer.start()
            try:
                yield client
            except DaemonUnreachable:
                deadline.left()
                raise
            finally:
                timer.cancel()

    @contextlib.contextmanager
    def _alone(
        self, what: str, reason: str = "another call about this volume is under way; ask again"
    ) -> Iterator[None]:
        """Raises PipelineBusy while another call has it."""
        with self._lock:
            if what in self._busy:
                raise PipelineBusy(f"{what[:128]}: {reason}")
            self._busy.add(what)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(what)


def _add(client: Client, spec: PipelineSpec) -> bool:
    """Whether it was not there. An id says all of its specification, so one of the same id is the same."""
    try:
        client.status(spec.id, brief=True)
        return False
    except PipelineNotFound:
        pass
    try:
        client.add(spec)
    except PipelineExists:  # another call was first, or is at it
        client.status(spec.id, brief=True)
        return False
    return True


def _condition(status: PipelineStatus, abnormal: bool, message: str) -> Condition:
    files = status.listed.count if status.listed is not None else 0
    return Condition(status.total_bytes, status.cached_bytes, files, abnormal, message)


def _check_id(volume_id: str) -> None:
    if not volume_id or len(volume_id) > MAX_VOLUME_ID:
        raise UsageError(f"volume_id must have 1 to {MAX_VOLUME_ID} characters")


def _token(secrets: Mapping[str, str]) -> str | None:
    """Messages hold nothing of its content."""
    if not secrets:
        return None
    found = next((secrets[key] for key in TOKEN_KEYS if key in secrets), None)
    if found is None:
        raise UsageError(f"the secret of nodePublishSecretRef holds none of the keys {', '.join(TOKEN_KEYS)}")
    found = found.strip()
    if not found or len(found) > MAX_TOKEN or not all("!" <= character <= "~" for character in found):
        raise UsageError("the secret of nodePublishSecretRef does not hold one token")
    return found


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """``work``, in a thread that is abandoned after ``seconds``. Raises ReadDeadline, and what ``work`` raises."""
    result: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="csi-mount")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ReadDeadline(f"the mount did not answer within {seconds:.0f} s")
    if errors:
        raise errors[0]
    return result[0]
