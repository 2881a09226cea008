"""What may lie over the mount's files, and when it must be gone: the library's side of the bind transport.

A cover shows a complete file of the current generation to readers without the mount. Whoever lays covers
(mount/bind.py) asks here which files may have one, and takes them away when told to: everything that changes a complete
file (update, evict, remove, a dropped file) does it inside ``uncovered``, so that no cover ever shows what the library
no longer means.

An open of a covered file counts as one through the mount, from when it is told of until the kernel says that nobody has
the store's file open or mapped any more, by whichever mount: it is a request, its generation is in use, it is staged.

All methods but ``descriptor`` belong on the trio thread.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
import trio

from instantstart_fs.config import descriptors
from instantstart_fs.core.coldstart_tracker import Starts
from instantstart_fs.errors import InstantStartError, PipelineBusy, StoreError
from instantstart_fs.index.access_log import AccessLog
from instantstart_fs.library import present
from instantstart_fs.library.observing import FoundBy, Observer
from instantstart_fs.library.openfiles import OpenFiles
from instantstart_fs.library.shelf import Shelf
from instantstart_fs.library.state import CachedFile, Pipeline, counts_as_request
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import Proof

MOST_FILES = 1024
"""Of one pipeline with more weight files none is covered: each costs an entry in every mount table that sees it."""

BUSY_SECONDS = 30.0
"""For as long the evictor takes a pipeline for open after it found it so: only trying tells, and trying takes covers
away for a moment."""

TakeAway = Callable[[str, bool], Awaitable[None]]
"""(pipeline, only if nobody has them open). Raises PipelineBusy, MountFailed."""


class Discard(Protocol):
    """See reports.Reports.discard."""

    async def __call__(
        self, file: CachedFile, problem: InstantStartError, *, wanted: bool, found_by: FoundBy
    ) -> None: ...


class Coverable(msgspec.Struct, frozen=True):
    """One incarnation of a complete weight file. ``path`` within the pipeline; ``key``: its index in the manifest."""

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


class Covering:
    """Owned by the Library. ``keep_hot`` in seconds."""

    def __init__(
        self, shelf: Shelf, access: AccessLog, open_files: OpenFiles, observer: Observer, keep_hot: float
    ) -> None:
        self._shelf = shelf
        self._access = access
        self._open_files = open_files
        self._observer = observer
        self._keep_hot = keep_hot
        self._uncovered: Counter[str] = Counter()
        self._held: dict[Coverable, CachedFile] = {}
        self._starts: dict[Coverable, Starts] = {}
        """The cold starts that those opens belong to."""
        """What somebody was seen to open and not yet found to have let go of; also where its cover is gone by now."""
        self._changed: set[str] = set()
        self._wake = trio.Event()
        self._busy_until: dict[str, float] = {}
        self._take_away: TakeAway | None = None
        self.discard: Discard | None = None
        shelf.uncovered = self.uncovered
        shelf.on_complete = lambda file: self.nudge(file.generation.pipeline.id)

    # -- the library's side ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def uncovered(self, pipeline: Pipeline, *, idle_only: bool = False) -> AsyncIterator[None]:
        """Meanwhile no file of the pipeline is covered. Raises PipelineBusy (``idle_only``: somebody has one open),
        MountFailed; then nothing has changed."""
        self._uncovered[pipeline.id] += 1
        try:
            if self._take_away is not None:
                try:
                    await self._take_away(pipeline.id, idle_only)
                except PipelineBusy:
                    self._busy_until[pipeline.id] = trio.current_time() + BUSY_SECONDS
                    raise
            yield
        finally:
            self._uncovered[pipeline.id] -= 1
            self.nudge(pipeline.id)

    def found_busy(self, pipeline: str) -> bool:
        """Whether somebody was found to have a covered file of it open a moment ago."""
        until = self._busy_until.get(pipeline)
        if until is not None and until < trio.current_time():
            del self._busy_until[pipeline]
            return False
        return until is not None

    def nudge(self, pipeline: str) -> None:
        """What may be covered of it has changed."""
        if self._take_away is not None:
            self._changed.add(pipeline)
            self._wake.set()

    # -- the side of who covers ------------------------------------------------------------------------------------

    def attach(self, take_away: TakeAway | None) -> None:
        """None: nobody covers any more, nor tells of opens."""
        self._take_away = take_away
        if take_away is None:
            for covered in list(self._held):
                self._let_go(covered)
        for pipeline in self._shelf.pipelines:
            self.nudge(pipeline)

    async def wait_changed(self, timeout: float) -> set[str]:
        """The pipelines that ``files`` may say something new of; empty after ``timeout`` seconds without any."""
        with trio.move_on_after(timeout):
            await self._wake.wait()
        self._wake = trio.Event()
        changed, self._changed = self._changed, set()
        return changed

    async def look_into(self, pipeline: str) -> None:
        """So that ``files`` need not read what is not in memory."""
        found = self._shelf.pipelines.get(pipeline)
        if found is not None and found.outline is not None and found.outline.counts.finished:
            await self._shelf.look_into(found)

    def files(self, pipeline: str) -> dict[str, Coverable]:
        """What may be covered of that pipeline now, by path."""
        found = self._shelf.pipelines.get(pipeline)
        if found is None or found.removed or found.hidden or self._uncovered[pipeline]:
            return {}
        spec = found.spec
        outline = found.outline
        if outline is None or not outline.counts.finished:
            return {}
        generation = found.current
        if generation is None:
            return {}
        files = [file for file in generation.files if file.passable and counts_as_request(file)]
        if len(files) > MOST_FILES:
            return {}
        return {
            file.entry.path: Coverable(
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

    def descriptor(self, wanted: Coverable) -> BlobFile:
        """The store's file, which must be the one that was sealed; in a thread. Raises StoreError."""
        return self._shelf.store.open_sealed(wanted.pipeline, wanted.generation, wanted.path, wanted.proof)

    async def lost(self, covered: Coverable, problem: InstantStartError) -> None:
        """The store has lost it: it is dropped, and fetched again. Nothing else of the binder's may be under way."""
        file = self._file(covered)
        if file is not None and self.discard is not None:
            await self.discard(file, problem, wanted=True, found_by="open")

    def opened(self, covered: Coverable) -> None:
        """Somebody opened the covered file: a request, and an access. ``look_into`` first, as before ``found_open``,
        ``used`` and ``shown``."""
        file = self._file(covered)
        if file is None:
            return
        now = self._shelf.now_ns()
        self._access.record_request(covered.pipeline, now)
        self._access.record_read(covered.pipeline, covered.generation, covered.key, now)
        if covered in self._held:
            self._observer.closed(self._observer.opened(file, passthrough=True, mode="bind"))
        else:
            self._hold(covered, file)

    def found_open(self, covered: Coverable) -> None:
        """Somebody has had it open since before it was covered: no request."""
        file = self._file(covered)
        if file is not None and covered not in self._held:
            self._hold(covered, file)

    def held(self, covered: Coverable) -> bool:
        """Whether somebody had it open when it was last asked for."""
        return covered in self._held

    def look(self, covered: Coverable) -> bool:
        """Somebody may have let go of it: ask. True when it was held, and is not any more."""
        file = self._held.get(covered)
        if file is None:
            return False
        self._keep_reader(file)
        if self._open_files.used_elsewhere(file):
            return False
        self._let_go(covered)
        return True

    def look_again(self, pipeline: str | None = None) -> set[str]:
        """Ask of all that was open (of that pipeline); the pipelines of which something is not any more."""
        asked = [covered for covered in self._held if pipeline in (None, covered.pipeline)]
        return {covered.pipeline for covered in asked if self.look(covered)}

    def used(self, covered: Coverable) -> bool:
        """Whether anybody but the daemon has it open or mapped now."""
        file = self._file(covered)
        return file is not None and self._open_files.used_elsewhere(file)

    def _hold(self, covered: Coverable, file: CachedFile) -> None:
        self._keep_reader(file)
        self._starts[covered] = self._observer.opened(file, passthrough=True, mode="bind")
        self._open_files.hold(file)
        self._held[covered] = file

    def _keep_reader(self, file: CachedFile) -> None:
        """To ask of this one, whatever lies at its path later; without opening it each time, which would be told of as
        an open that ended, and asked about again. Another time where that cannot be now."""
        if file.gone is None and (file.reader is not None or descriptors.room(spare=True)):
            with contextlib.suppress(StoreError):
                self._open_files.reader(file)

    def _let_go(self, covered: Coverable) -> None:
        file = self._held.pop(covered)
        self._observer.closed(self._starts.pop(covered))
        self._open_files.let_go(file)

    def last_request(self, pipeline: str) -> int | None:
        """ns of the wall clock."""
        return self._access.last_request(pipeline)

    def shown(self, covered: Coverable) -> tuple[int, dict[str, str]] | None:
        """(st_atime in ns, user.instantstart.* without the prefix) as the mount would show them; None: it is gone."""
        file = self._file(covered)
        if file is None:
            return None
        values = present.file_xattrs(file, "warm", self._access, self._keep_hot)
        accessed = self._access.last_access(*file.triple)
        return (covered.mtime_ns if accessed is None else accessed), values

    def _file(self, covered: Coverable) -> CachedFile | None:
        pipeline = self._shelf.pipelines.get(covered.pipeline)
        generation = pipeline.current if pipeline is not None else None
        if generation is None or generation.number != covered.generation:
            return None
        file = generation.files[covered.key]
        return file if file.incarnation == covered.incarnation and file.complete else None
