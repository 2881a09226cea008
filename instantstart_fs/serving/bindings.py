"""Decides which files may be bind-mounted over the FUSE mount, and records their opens. It mounts nothing.

A bind mount lets readers bypass the FUSE mount: they open the store's complete file itself. The binder
(mount/bind_mounts.py) asks here which files may have one. Every change of a complete file (update, evict, remove,
damage) happens inside ``BindGate.withdrawn``, so that no bind mount shows a file that was replaced.

An open of a bound file counts like one through the mount: it is a request, its generation is in use, and staging is
told. It ends when the kernel reports that no process has the store's file open or mapped any more, by any mount.

All methods but ``descriptor`` belong on the trio thread.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import msgspec

from instantstart_fs.catalog.bind_gate import BindGate, Withdraw
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import CachedFile, counts_as_request
from instantstart_fs.config import descriptors
from instantstart_fs.core.coldstart_tracker import Starts
from instantstart_fs.errors import InstantStartError, StoreError
from instantstart_fs.index.access_times import AccessTimes
from instantstart_fs.serving.open_files import OpenFiles
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import Proof
from instantstart_fs.telemetry.telemetry import FoundBy, Telemetry
from instantstart_fs.views import status

MOST_FILES = 1024
"""A pipeline with more weight files gets no bind mounts: each costs an entry in every mount table that sees it."""


class ReplaceDamaged(Protocol):
    """See fill_events.FillEventHandler.replace_damaged."""

    async def __call__(
        self, file: CachedFile, problem: InstantStartError, *, wanted: bool, found_by: FoundBy
    ) -> None: ...


class BindableFile(msgspec.Struct, frozen=True):
    """One incarnation of a complete weight file. ``path``: within the pipeline; ``key``: its index in the manifest."""

    pipeline: str
    generation: int
    key: int
    incarnation: int
    path: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    proof: Proof = Proof(0, None)


class Bindings:
    """Owned by the Library. ``keep_hot`` in seconds."""

    def __init__(
        self,
        catalog: Catalog,
        gate: BindGate,
        access: AccessTimes,
        open_files: OpenFiles,
        telemetry: Telemetry,
        replace_damaged: ReplaceDamaged,
        keep_hot: float,
    ) -> None:
        self._catalog = catalog
        self._access = access
        self._open_files = open_files
        self._telemetry = telemetry
        self._keep_hot = keep_hot
        self._gate = gate
        self._replace_damaged = replace_damaged
        self._held: dict[BindableFile, CachedFile] = {}
        """Bound files that were seen open and not yet seen closed, also where the bind mount was removed meanwhile."""
        self._starts: dict[BindableFile, Starts] = {}
        """The cold starts that those opens belong to."""

    # -- for the binder --------------------------------------------------------------------------------------------

    def attach(self, withdraw: Withdraw | None) -> None:
        """Connect the binder. None disconnects it: no file is bound any more, and all its opens have ended."""
        self._gate.attach(withdraw)
        if withdraw is None:
            for bound in list(self._held):
                self._record_release(bound)
        for pipeline in self._catalog.pipelines:
            self._gate.wake(pipeline)

    async def wait_changed(self, timeout: float) -> set[str]:
        """Return the pipelines for which ``files`` may have changed; empty after ``timeout`` seconds without any."""
        return await self._gate.wait_changed(timeout)

    async def ensure_loaded(self, pipeline: str) -> None:
        """Load the pipeline's metadata if it is complete, so that ``files`` does not read it on the loop."""
        found = self._catalog.pipelines.get(pipeline)
        if found is not None and found.head is not None and found.head.counts.finished:
            await self._catalog.ensure_loaded(found)

    def files(self, pipeline: str) -> dict[str, BindableFile]:
        """Return the files of that pipeline that may be bound now, by path."""
        found = self._catalog.pipelines.get(pipeline)
        if found is None or found.removed or found.hidden or self._gate.is_withdrawn(pipeline):
            return {}
        spec = found.spec
        head = found.head
        if head is None or not head.counts.finished:
            return {}
        generation = found.current
        if generation is None:
            return {}
        files = [file for file in generation.files if file.passthrough_eligible and counts_as_request(file)]
        if len(files) > MOST_FILES:
            return {}
        return {
            file.entry.path: BindableFile(
                pipeline=pipeline,
                generation=generation.number,
                key=file.entry.index,
                incarnation=file.incarnation,
                path=file.entry.path,
                mode=spec.mode & 0o444,
                uid=spec.uid,
                gid=spec.gid,
                mtime_ns=file.entry.file.mtime_ns,
                proof=file.proof,
            )
            for file in files
        }

    def descriptor(self, wanted: BindableFile) -> BlobFile:
        """Open the store's file, which must be the one that was sealed. Blocks. Raises StoreError."""
        return self._catalog.store.open_sealed(wanted.pipeline, wanted.generation, wanted.path, wanted.proof)

    async def lost(self, bound: BindableFile, problem: InstantStartError) -> None:
        """Replace a file that the store has lost, and fetch it again. The binder may do nothing else meanwhile."""
        file = self._file(bound)
        if file is not None:
            await self._replace_damaged(file, problem, wanted=True, found_by="open")

    def opened(self, bound: BindableFile) -> None:
        """Record an open of the bound file: a request, and an access. Call ``ensure_loaded`` first, also before
        ``note_already_open``, ``in_use`` and ``attributes``."""
        file = self._file(bound)
        if file is None:
            return
        now = self._catalog.now_ns()
        self._access.record_request(bound.pipeline, now)
        self._access.record_read(bound.pipeline, bound.generation, bound.key, now)
        if bound in self._held:
            self._telemetry.closed(file, self._telemetry.opened(file, passthrough=True, mode="bind"))
        else:
            self._record_open(bound, file)

    def note_already_open(self, bound: BindableFile) -> None:
        """Record that the file was open before it was bound. It is in use, but this is no request."""
        file = self._file(bound)
        if file is not None and bound not in self._held:
            self._record_open(bound, file)

    def is_open(self, bound: BindableFile) -> bool:
        """Return whether the file was open when that was last checked."""
        return bound in self._held

    def poll_release(self, bound: BindableFile) -> bool:
        """Ask the kernel whether an open file is still in use. True if it was open and is not any more."""
        file = self._held.get(bound)
        if file is None:
            return False
        self._keep_reader(file)
        if self._open_files.used_elsewhere(file):
            return False
        self._record_release(bound)
        return True

    def poll_releases(self, pipeline: str | None = None) -> set[str]:
        """Poll all open files (of that pipeline), and return the pipelines in which one is not in use any more."""
        asked = [bound for bound in self._held if pipeline in (None, bound.pipeline)]
        return {bound.pipeline for bound in asked if self.poll_release(bound)}

    def in_use(self, bound: BindableFile) -> bool:
        """Whether anybody but the daemon has it open or mapped now."""
        file = self._file(bound)
        return file is not None and self._open_files.used_elsewhere(file)

    def _record_open(self, bound: BindableFile, file: CachedFile) -> None:
        self._keep_reader(file)
        self._starts[bound] = self._telemetry.opened(file, passthrough=True, mode="bind")
        self._open_files.acquire(file)
        self._held[bound] = file

    def _keep_reader(self, file: CachedFile) -> None:
        """Keep a descriptor of the file for ``poll_release``, if one can be had now.

        It names this incarnation whatever lies at the path later. Opening the file for each poll would be reported by
        fanotify as an open that ended, and so cause the next poll.
        """
        if file.stale_error is None and (file.reader is not None or descriptors.may_hold_another(spare=True)):
            with contextlib.suppress(StoreError):
                self._open_files.reader(file)

    def _record_release(self, bound: BindableFile) -> None:
        file = self._held.pop(bound)
        self._telemetry.closed(file, self._starts.pop(bound))
        self._open_files.release(file)

    def last_request(self, pipeline: str) -> int | None:
        """Return when the pipeline was last requested: ns of the wall clock, or None."""
        return self._access.last_request(pipeline)

    def attributes(self, bound: BindableFile) -> tuple[int, dict[str, str]] | None:
        """Return (st_atime in ns, user.instantstart.* without the prefix) as the mount would show them; None if the
        file was replaced."""
        file = self._file(bound)
        if file is None:
            return None
        values = status.file_xattrs(file, "warm", self._access, self._keep_hot)
        accessed = self._access.last_access(*file.triple)
        return (bound.mtime_ns if accessed is None else accessed), values

    def _file(self, bound: BindableFile) -> CachedFile | None:
        pipeline = self._catalog.pipelines.get(bound.pipeline)
        generation = pipeline.current if pipeline is not None else None
        if generation is None or generation.number != bound.generation:
            return None
        file = generation.files[bound.key]
        return file if file.incarnation == bound.incarnation and file.complete else None
