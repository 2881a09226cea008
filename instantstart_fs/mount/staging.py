"""Reads the shards of a pipeline into the page cache ahead of the engine that is loading it: staging.

core/staging.py decides which shards, when and how much; this follows the engines. The library tells of weight files
opened and released, sealed and retired (serving.open_notifications.OpenListener); a session follows each pipeline from
its first open until 5 s after its last release; a process of its own does the reading ahead (staging_process), through
descriptors of the store's own files (readahead(2) on a passed-through file would come to the daemon as READs).

Whatever goes wrong here is logged and costs speed, never a read. A retired file's descriptor is closed within a block,
so that eviction frees its space. All of it lives on the trio thread.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from instantstart_fs.config import StagingConfig
from instantstart_fs.config.memory import Memory, read_memory
from instantstart_fs.core.staging import (
    LINGER_SECONDS,
    Shard,
    plan_window,
    staging_budget,
    start_time,
)
from instantstart_fs.errors import InstantStartError, OutOfResources
from instantstart_fs.filler.target import FileKey
from instantstart_fs.mount import readahead
from instantstart_fs.mount.staging_process import StagingProcess

log = logging.getLogger(__name__)

BUDGET_SECONDS = 1.0
"""Seconds between two looks at the budget while something waits for memory: the budget changes as the engine grows."""


class StagingHost(Protocol):
    """The library, as staging needs it."""

    def shards(self, pipeline: str, generation: int) -> tuple[Shard, ...]:
        """The shards of that generation as they are now, in the natural order of their names; empty when it was
        dropped."""
        ...

    async def load_order(self, pipeline: str, generation: int) -> tuple[int, ...]:
        """The file indices of its shards in the order in which an engine reads them. Raises InstantStartError."""
        ...

    def open_stored(self, key: FileKey) -> int:
        """A descriptor of the store's own file, which the caller closes; it does not count as an open file. Raises
        InstantStartError."""
        ...

    def staged(self, pipeline: str, count: int, *, file_done: bool) -> None:
        """``count`` more bytes are in the page cache; ``file_done``: with them, all of a file that was to be."""
        ...


class ReadAhead(Protocol):
    """The staging process, as Staging uses it. Reports (``readahead.STAGED`` and ``DONE``, job, bytes) go to the
    callback it was made with; a job that is lost with its process gets its DONE too."""

    def stage(self, job: int, fd: int, length: int) -> None:
        """Queue it behind the others. Takes ``fd`` over."""
        ...

    def drop(self, job: int) -> None: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...


class Statistics(msgspec.Struct, frozen=True):
    """Counters of staging. ``active``: pipelines that are being staged now. Since the daemon's start: ``sessions``, how
    often staging began; ``bytes`` that were brought into the page cache or found there; ``files``, shards that were
    finished."""

    active: int
    sessions: int
    bytes: int
    files: int


class _Session:
    """The staging of one pipeline's generation while it is open. ``open``: file index → incarnations open; ``staged``:
    index → counted bytes that are staged or being staged; ``jobs``: index → job under way."""

    def __init__(self, pipeline: str, generation: int) -> None:
        self.pipeline = pipeline
        self.generation = generation
        self.open: collections.Counter[int] = collections.Counter()
        self.seen: set[int] = set()
        self.held_since = trio.current_time()
        self.closed_at = math.inf
        self.last_opened: int | None = None
        self.done: set[int] = set()
        self.staged: dict[int, int] = {}
        self.jobs: dict[int, int] = {}
        self.started = False
        self.order: dict[int, int] | None = None
        self.short = False
        """Whether it was logged that there are too few descriptors."""
        self.wakeup = trio.Event()
        self.scope = trio.CancelScope()


class _Job:
    """The staging of one file. ``left``: bytes that are not yet in the page cache."""

    __slots__ = ("index", "left", "session")

    def __init__(self, session: _Session, index: int, length: int) -> None:
        self.session = session
        self.index = index
        self.left = length


class Staging:
    """See the module. A serving.open_notifications.OpenListener. ``read_ahead``: makes who does the reading."""

    def __init__(
        self,
        host: StagingHost,
        config: StagingConfig,
        *,
        read_ahead: Callable[[Callable[[int, int, int], None]], ReadAhead] | None = None,
        memory: Callable[[], Memory] = read_memory,
    ) -> None:
        self._host = host
        self._config = config
        self._memory = memory
        self._read_ahead = (read_ahead or (lambda report: StagingProcess(config.threads, report)))(self._on_report)
        self._sessions: dict[str, _Session] = {}
        self._resting: collections.Counter[str] = collections.Counter()
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count(1)
        self._nursery: trio.Nursery | None = None
        self._started = self._bytes = self._files = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stage until cancelled. Started when opens may be told."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._read_ahead.run)
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def statistics(self) -> Statistics:
        active = sum(bool(session.jobs) for session in self._sessions.values())
        return Statistics(active, self._started, self._bytes, self._files)

    # -- serving.open_notifications.OpenListener ---------------------------------------------------------------

    def opened(self, key: FileKey) -> None:
        if self._nursery is None:
            return
        session = self._sessions.get(key.pipeline)
        if session is not None and session.generation < key.generation:
            # After an update: what held the old generation loads no more. One session at a time for a pipeline.
            self._end(session)
            session = None
        if session is None:
            session = self._sessions[key.pipeline] = _Session(key.pipeline, key.generation)
            self._nursery.start_soon(self._follow, session)
        elif session.generation != key.generation:
            return
        if not session.open:
            session.held_since = trio.current_time()
        session.open[key.index] += 1
        session.seen.add(key.index)
        session.last_opened = key.index
        session.done.discard(key.index)
        session.wakeup.set()

    def released(self, key: FileKey) -> None:
        session = self._session_of(key)
        if session is None or not session.open[key.index]:
            return
        session.open[key.index] -= 1
        if not session.open[key.index]:
            del session.open[key.index]
            self._give_up(session, key.index)
            session.done.add(key.index)
        if not session.open:
            session.closed_at = trio.current_time()
        session.wakeup.set()

    def sealed(self, key: FileKey) -> None:
        session = self._session_of(key)
        if session is not None:
            session.wakeup.set()

    def retired(self, key: FileKey) -> None:
        session = self._session_of(key)
        if session is not None:
            self._give_up(session, key.index)
            session.wakeup.set()

    def rest(self, pipeline: str, resting: bool) -> None:
        self._resting[pipeline] += 1 if resting else -1
        if not self._resting[pipeline]:
            del self._resting[pipeline]
        session = self._sessions.get(pipeline)
        if session is not None:
            if resting:
                self._give_up_all(session)
            session.wakeup.set()

    def _session_of(self, key: FileKey) -> _Session | None:
        session = self._sessions.get(key.pipeline)
        return session if session is not None and session.generation == key.generation else None

    # -- a session -------------------------------------------------------------------------------------------------

    async def _follow(self, session: _Session) -> None:
        try:
            with session.scope:
                await self._follow_until_closed(session)
        except Exception:
            log.exception("staging failed", extra={"pipeline": session.pipeline})
        finally:
            self._end(session)

    async def _follow_until_closed(self, session: _Session) -> None:
        while True:
            session.wakeup = trio.Event()
            now, again = trio.current_time(), math.inf
            if not session.open:
                again = session.closed_at + LINGER_SECONDS
                if now >= again:
                    return
            if not session.started:
                start = start_time(session.seen, session.held_since if session.open else None)
                if start is not None and start <= now:
                    session.started = True
                elif start is not None:
                    again = min(again, start)
            if session.started and not self._resting[session.pipeline] and not await self._stage(session):
                again = min(again, trio.current_time() + BUDGET_SECONDS)
            with trio.move_on_at(again):
                await session.wakeup.wait()

    async def _stage(self, session: _Session) -> bool:
        """Move the window; False where the budget left something out."""
        if session.order is None:
            try:
                order = await self._host.load_order(session.pipeline, session.generation)
            except InstantStartError as error:
                log.warning("staging in the order of names: %s", error.message, extra={"pipeline": session.pipeline})
                order = ()
            session.order = {index: position for position, index in enumerate(order)}
        try:
            memory = await trio.to_thread.run_sync(self._memory)
        except OSError as error:
            log.debug("staging waits: the memory that is left cannot be read: %s", error)
            return False
        if session.wakeup.is_set():
            return True  # something was opened, released, retired or put to rest in the meantime: decide again
        budget = staging_budget(memory.available, self._config.max_memory.of(memory.available), memory.cgroups_left)
        order_of, last = session.order, len(session.order)
        shards = sorted(
            self._host.shards(session.pipeline, session.generation),
            key=lambda shard: order_of.get(shard.index, last),
        )
        window = plan_window(
            shards,
            opened=session.open.keys(),
            last_opened=session.last_opened,
            done=session.done,
            staged=session.staged,
            budget=budget,
        )
        for index in window.drop:
            self._give_up(session, index)
        for index, length in window.stage:
            key = FileKey(session.pipeline, session.generation, index)
            try:
                fd = self._host.open_stored(key)
            except OutOfResources as error:
                # Readers come first. What is left is staged when some of them have closed theirs.
                if not session.short:
                    log.warning("not all is staged: %s", error.message, extra={"pipeline": session.pipeline})
                session.short = True
                return False
            except InstantStartError as error:
                log.warning("not staged: %s", error.message, extra={"pipeline": session.pipeline})
                session.done.add(index)
                continue
            if not session.jobs and not session.staged:
                self._started += 1
            job = next(self._numbers)
            session.staged[index], session.jobs[index] = length, job
            self._jobs[job] = _Job(session, index, length)
            self._read_ahead.stage(job, fd, length)
        left_out = (
            shard
            for shard in shards
            if shard.ready and shard.size and shard.index not in session.staged and shard.index not in session.done
        )
        return next(left_out, None) is None

    def _give_up(self, session: _Session, index: int) -> None:
        session.staged.pop(index, None)
        job = session.jobs.pop(index, None)
        if job is not None:
            self._read_ahead.drop(job)

    def _give_up_all(self, session: _Session) -> None:
        for index in list(session.staged):
            self._give_up(session, index)

    def _end(self, session: _Session) -> None:
        self._give_up_all(session)
        session.scope.cancel()
        if self._sessions.get(session.pipeline) is session:
            del self._sessions[session.pipeline]

    def _on_report(self, kind: int, job: int, count: int) -> None:
        found = self._jobs.get(job)
        if found is None:
            return
        session = found.session
        if kind == readahead.STAGED:
            found.left -= count
            self._bytes += count
            self._files += found.left <= 0
            self._host.staged(session.pipeline, count, file_done=found.left <= 0)
            return
        del self._jobs[job]
        if session.jobs.get(found.index) == job:
            del session.jobs[found.index]
