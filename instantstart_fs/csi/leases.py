"""Holds one lease of the daemon for each pipeline that is published, over the daemon's restarts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from instantstart_fs.control.client import Client, Lease
from instantstart_fs.csi.patience import closed_after
from instantstart_fs.errors import InstantStartError

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Between two looks whether the daemon still holds them."""
ASK_SECONDS = 5.0
"""To be accepted by the daemon, when a lease is taken again."""


class LeaseKeeper:
    """Thread-safe; ``run`` in a thread of its own. ``lost`` is called there for each pipeline whose lease ended, before
    it is taken again: to add the pipeline if it has gone, and to mount again what the daemon mounted anew. It may raise
    InstantStartError: then it is called again, later."""

    def __init__(self, socket: str, lost: Callable[[str], None]) -> None:
        self._socket = socket
        self._lost = lost
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._held: dict[str, Lease] = {}
        self._ended = threading.Event()

    def want(self, pipeline: str) -> None:
        """Keep a lease of it from now on: ``run`` takes it."""
        with self._lock:
            self._wanted.add(pipeline)

    def take(self, pipeline: str, seconds: float) -> None:
        """The same, and it is held when this returns. Raises InstantStartError; then it is not wanted either."""
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
        """Nothing there is no error."""
        with self._lock:
            self._wanted.discard(pipeline)
            lease = self._held.pop(pipeline, None)
        if lease is not None:
            lease.close()

    def run(self) -> None:
        """Until ``end``."""
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
        """Whether one could not be taken again."""
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
    """A lease of it, which keeps its client. Raises InstantStartError after ``seconds`` at most."""
    client = Client(socket, deadline=seconds)
    try:
        with closed_after(client, seconds):
            return client.lease(pipeline)
    except BaseException:
        client.close()
        raise
