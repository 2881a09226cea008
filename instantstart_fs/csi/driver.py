"""The node driver's work for a kubelet: it publishes volumes, unpublishes them, and tells their condition. It knows no
gRPC.

Every call may come twice, may come after a crash of either side, and may name what no longer exists. ``records`` says
what is published, the mount table what is mounted, the daemon what is cached. The driver remembers nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping

import msgspec

from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.core.volumes import MAX_TOKEN, VolumeRequest, volume_request
from instantstart_fs.csi import targets
from instantstart_fs.csi.leases import LeaseKeeper
from instantstart_fs.csi.patience import Deadline, Patience, closed_after
from instantstart_fs.csi.records import Records, Volume
from instantstart_fs.errors import (
    ControlError,
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

TOKEN_KEYS = ("token", "HF_TOKEN", "hf_token")
"""The keys of a secret under which its token may lie. The first that is there counts."""
MAX_VOLUME_ID = 256
POLL_SECONDS = 0.5
"""Seconds between two looks at a pipeline that is waited for."""
BIND_SECONDS = 20.0
"""Seconds for one mount. An open of a directory in a mount whose daemon hangs never ends by itself."""
REPAIR_SECONDS = 60.0
"""Seconds for restoring one pipeline and its mounts after the daemon's restart."""


class Condition(msgspec.Struct, frozen=True):
    """A volume's condition. ``used`` and ``total`` are in bytes; ``message`` gives the reason where ``abnormal`` is
    set."""

    total: int
    used: int
    files: int
    abnormal: bool
    message: str


class Driver:
    """The driver's state and its calls. Thread-safe. ``kubelet`` is the kubelet's directory; targets lie below it."""

    def __init__(self, socket: str, state: str, kubelet: str, *, node_credentials: bool = False) -> None:
        """Raises OSError when the state directory cannot be made."""
        self._socket = socket
        self._kubelet = os.path.normpath(kubelet)
        self._node_credentials = node_credentials
        self._records = Records(os.path.abspath(state))
        self._patience = Patience()
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._begun: dict[str, str] = {}
        """Volume → pipeline, of the volumes that are being published or that a kubelet will ask for again. They count
        as users of the pipeline before they have a record."""
        self.leases = LeaseKeeper(socket, self._restore)

    def recover(self) -> None:
        """Take over what an earlier driver left: keep leases of what is published, and delete tokens of what is not."""
        for volume in self._records.all():
            # A kubelet removes a pod's directory when all its volumes are unpublished: nobody will ask again.
            if not os.path.isdir(os.path.dirname(volume.target)):
                log.warning("%s: its pod's directory has gone; the volume is forgotten", volume.target)
                self._records.delete(volume.volume_id)
            else:
                self.leases.want(volume.spec.id)
        self._records.sweep_tokens()

    def ready(self, seconds: float) -> None:
        """Return if the daemon answers and its mount can be seen from here. Raises InstantStartError otherwise."""
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
        """Make the volume's pipeline available at ``target``. Raises InstantStartError, OSError.

        A failure that is final leaves nothing behind.
        """
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
        with self._alone(volume_id):
            known = self._records.get(volume_id)
            if known is not None and (known.target != target or known.spec.id != pipeline):
                raise PipelineExists(f"volume {volume_id} is published as {known.spec.id} at {known.target}")
            with self._lock:
                self._begun[volume_id] = pipeline
            try:
                # One at a time for each pipeline, whose token is proven and exchanged; a fill is waited for by all.
                with self._alone(pipeline, "another volume of it is being published; ask again"):
                    self._provide(request, token, deadline)
                    self._records.put(Volume(volume_id, target, request.spec))
                    self.leases.take(pipeline, deadline.left())
                self._warm(request, deadline)
                self._show(pipeline, target, deadline)
            except (ReadDeadline, DaemonUnreachable, PipelineBusy):
                raise  # a kubelet asks again, or unpublishes
            except BaseException:
                # After such an error a kubelet never unpublishes, unless it knows the volume as mounted.
                if known is None or targets.mounted(target) is None:
                    self._forget(volume_id, pipeline)
                else:
                    self._end_call(volume_id)
                raise
            self._end_call(volume_id)
        log.info("published %s at %s", pipeline, target)

    def _provide(self, request: VolumeRequest, token: str | None, deadline: Deadline) -> None:
        """Have the pipeline added, and its source opened by the token that the pod brought."""
        spec = request.spec
        with self._client(deadline) as client:
            if token is None:
                _add(client, spec)
            elif self._records.accepted(spec.id, token):
                if token != self._records.token(spec.id):
                    self._records.put_token(spec.id, token)
                _add(client, spec)
            elif not self._add_with(client, spec, token):
                self._exchange(client, spec.id, token)

    def _add_with(self, client: Client, spec: PipelineSpec, token: str) -> bool:
        """Try to add the pipeline with this token. Returns whether it was added, which proves the token."""
        if _find(client, spec.id) is not None:
            return False
        before = self._records.token(spec.id)
        self._records.put_token(spec.id, token)
        try:
            added = _add(client, spec)
            if added:
                self._records.accept(spec.id, token)
        except (ReadDeadline, ControlError):
            raise  # the daemon goes on with it, and reads the token
        except BaseException:
            self._records.put_token(spec.id, before)
            raise
        if not added:
            self._records.put_token(spec.id, before)
        return added

    def _exchange(self, client: Client, pipeline: str, token: str) -> None:
        """Prove the token at the source, and let it take the place of the one before.

        Naming a cached pipeline is not enough to read it. Until the token has opened the source it lies in
        a file apart, so that fills for other pods never use one that does not work.
        """
        with self._records.brought(pipeline, token) as path:
            client.check_access(pipeline, token_file=path)
        self._records.put_token(pipeline, token)
        self._records.accept(pipeline, token)
        status = _find(client, pipeline)
        if status is not None and status.access is not None and status.access.verdict == "refused":
            client.check_access(pipeline)  # it was out of view with the token before

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
            source = f"{where.path}/{pipeline}"
            seconds = min(BIND_SECONDS, deadline.left())
            shown = self._patience.run(source, seconds, lambda: targets.open_directory(source), os.close)
            try:
                targets.bind(shown, target, self._kubelet)
            finally:
                os.close(shown)

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
        """Unmount the volume and forget it. A volume that does not exist is no error. Raises InstantStartError,
        OSError."""
        _check_id(volume_id)
        targets.check_target(target, self._kubelet)
        with self._alone(volume_id):
            seconds = min(BIND_SECONDS, deadline.left())
            self._patience.run(target, seconds, lambda: targets.unbind(target, self._kubelet))
            known = self._records.get(volume_id)
            if known is None:
                with self._lock:
                    pipeline = self._begun.get(volume_id)
            else:
                pipeline = known.spec.id if known.target == target else None
            if pipeline is not None:
                self._forget(volume_id, pipeline)
                log.info("unpublished %s at %s", pipeline, target)

    def _end_call(self, volume_id: str) -> None:
        """End a call whose volume the records describe completely."""
        with self._lock:
            self._begun.pop(volume_id, None)

    def _forget(self, volume_id: str, pipeline: str) -> None:
        """Delete the volume. The last volume of a pipeline takes its lease and its token along; the cached bytes
        stay."""
        with self._lock:
            self._begun.pop(volume_id, None)
            self._records.delete(volume_id)
            if not self._is_needed(pipeline):
                self.leases.give_up(pipeline)
                self._records.put_token(pipeline, None)

    def _is_needed(self, pipeline: str) -> bool:
        """Whether any volume uses the pipeline. The caller holds the lock."""
        if pipeline in self._begun.values():
            return True
        return any(volume.spec.id == pipeline for volume in self._records.all())

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
        except (DaemonUnreachable, PipelineNotFound, ReadDeadline) as error:
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
        """Add the pipeline again and mount it wherever it is published, after the daemon's restart."""
        volumes = [volume for volume in self._records.all() if volume.spec.id == pipeline]
        if not volumes:
            with self._lock:
                if not self._is_needed(pipeline):
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
        """Open a connection that is closed at the deadline, even under a call that waits on it. That call raises
        ReadDeadline."""
        left = deadline.left()
        with Client(self._socket, deadline=min(left, 20.0)) as client, closed_after(client, left):
            yield client

    @contextlib.contextmanager
    def _alone(
        self, what: str, reason: str = "another call about this volume is under way; ask again"
    ) -> Iterator[None]:
        """Keep other calls about ``what`` out of the block. Raises PipelineBusy while another call is in it."""
        with self._lock:
            if what in self._busy:
                raise PipelineBusy(f"{what[:128]}: {reason}")
            self._busy.add(what)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(what)


def _find(client: Client, pipeline: str) -> PipelineStatus | None:
    try:
        return client.status(pipeline, brief=True)
    except PipelineNotFound:
        return None


def _add(client: Client, spec: PipelineSpec) -> bool:
    """Add the pipeline; return False if it exists. The id stands for the whole specification, so the same id is the
    same pipeline."""
    if _find(client, spec.id) is not None:
        return False
    try:
        client.add(spec)
    except PipelineExists as error:
        if _find(client, spec.id) is None:
            raise PipelineBusy(f"{spec.id} is being added; ask again") from error
        return False
    return True


def _condition(status: PipelineStatus, abnormal: bool, message: str) -> Condition:
    files = status.listed.count if status.listed is not None else 0
    return Condition(status.total_bytes, status.cached_bytes, files, abnormal, message)


def _check_id(volume_id: str) -> None:
    if not volume_id or len(volume_id) > MAX_VOLUME_ID:
        raise UsageError(f"volume_id must have 1 to {MAX_VOLUME_ID} characters")


def _token(secrets: Mapping[str, str]) -> str | None:
    """Return the token of a secret; None where there is no secret. Error messages hold nothing of its content."""
    if not secrets:
        return None
    found = next((secrets[key] for key in TOKEN_KEYS if key in secrets), None)
    if found is None:
        raise UsageError(f"the secret of nodePublishSecretRef holds none of the keys {', '.join(TOKEN_KEYS)}")
    found = found.strip()
    if not found or len(found) > MAX_TOKEN or not all("!" <= character <= "~" for character in found):
        raise UsageError("the secret of nodePublishSecretRef does not hold one token")
    return found
