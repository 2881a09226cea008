"""Keeps one lease from the daemon for each published pipeline, and takes it again after a restart of the daemon."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from instantstart_fs.control.client import Client, Lease
from instantstart_fs.csi.patience import closed_after
from instantstart_fs.errors import InstantStartError

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Seconds between two checks whether the daemon still holds the leases."""
ASK_SECONDS = 5.0
"""Seconds for the daemon to answer when a lease is taken again."""


class LeaseKeeper:
    """Keeps the leases. Thread-safe; ``run`` needs a thread of its own.

    ``lost`` is called in that thread for each pipeline whose lease has ended, before the lease is taken again. It adds
    the pipeline if that is missing, and mounts again what the daemon has mounted anew. When it raises InstantStartError
    it is called again later.
    """

    def __init__(self, socket: str, lost: Callable[[str], None]) -> None:
        self._socket = socket
        self._lost = lost
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._held: dict[str, Lease] = {}
        self._ended = threading.Event()

    def want(self, pipeline: str) -> None:
        """Keep a lease of the pipeline from now on. ``run`` takes it."""
        with self._lock:
            self._wanted.add(pipeline)

    def take(self, pipeline: str, seconds: float) -> None:
        """Take a lease now, and keep it from now on. After an error the pipeline is not wanted. Raises
        InstantStartError."""
        with self._lock:
            if pipeline in self._held:
                self._wanted.add(pipeline)
                return
        lease = _leased(self._socket, pipeline, seconds)
        with self._lock:
            self._wanted.add(pipeline)
            spare = self._held.get(pipeline)
            self._held[pipeline] = lease
        if spare is not None:
            spare.close()

    def give_up(self, pipeline: str) -> None:
        """End the lease. A pipeline without a lease is no error."""
        with self._lock:
            self._wanted.discard(pipeline)
            lease = self._held.pop(pipeline, None)
        if lease is not None:
            lease.close()

    def run(self) -> None:
        """Check the leases until ``end`` is called."""
        pause = CHECK_SECONDS
        while not self._ended.wait(pause):
            failed = self._look()
            pause = min(2 * pause, 15.0) if failed else CHECK_SECONDS

    def end(self) -> None:
        self._ended.set()
        with self._lock:
            held, self._held = self._held, {}
            self._wanted.clear()
        for lease in held.values():
            lease.close()

    def _look(self) -> bool:
        """Take every missing lease again. Returns whether one of them failed."""
        with self._lock:
            held = dict(self._held)
        for pipeline, lease in held.items():
            if self._ended.is_set():
                return False
            if lease.wait_ended(0.001):
                with self._lock:
                    if self._held.get(pipeline) is lease:
                        del self._held[pipeline]
                lease.close()
        with self._lock:
            missing = sorted(self._wanted - self._held.keys())
        failed = False
        for pipeline in missing:
            if self._ended.is_set():
                return False
            try:
                self._lost(pipeline)
                lease = _leased(self._socket, pipeline, ASK_SECONDS)
            except InstantStartError as error:
                log.warning("%s: no lease, tried again: %s", pipeline, error)
                failed = True
                continue
            except Exception:  # the other pipelines' leases and mounts depend on this thread
                log.exception("%s: no lease, tried again", pipeline)
                failed = True
                continue
            with self._lock:
                kept = pipeline in self._wanted and pipeline not in self._held
                if kept:
                    self._held[pipeline] = lease
            if not kept:
                lease.close()
        return failed


def _leased(socket: str, pipeline: str, seconds: float) -> Lease:
    """Return a lease, which keeps its client open. Raises InstantStartError after ``seconds`` at most."""
    client = Client(socket, deadline=seconds)
    try:
        with closed_after(client, seconds):
            return client.lease(pipeline)
    except BaseException:
        client.close()
        raise
