"""Index: the LMDB environment and its one writer thread. What records mean is in index/schema.py and
index/transactions.py.

It owns ``<root>/index/`` and the nodeid high-water file beside it. One environment per process and index, opened after
the process was spawned (never carried over a fork). Reads are short transactions in the caller's thread. All writes go
to one thread, which runs what has queued up as one durable transaction, each operation in a child transaction: one that
raises undoes only itself. docs/decisions/one-writer-thread.md has the figures.

The data file is as long as the map, and sparse: a file shorter than its own pages was truncated, and is refused here
instead of killing the process with SIGBUS later. Space is reserved twice, on the disk (``_HEADROOM``, by fallocate) and
in the map (beyond ``map_size``), so that space can still be freed when both are full.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import lmdb
import trio

from instantstart_fs.errors import (
    IndexFull,
    IndexStuck,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnsupported,
)
from instantstart_fs.index import schema
from instantstart_fs.index.nodeids import HighWater, os_error
from instantstart_fs.index.transactions import ReadTxn, WriteTxn

if TYPE_CHECKING:
    from instantstart_fs.index.transactions import Databases, Transaction

T = TypeVar("T")

DEFAULT_MAP_SIZE = 64 << 30
_GROUP = 512
"""Operations in one transaction, at most."""
_HEADROOM = 4 << 20
"""Bytes of disk allocated beyond LMDB's last page."""
_RESERVE = 2 << 20
"""Least space in the map beyond ``map_size``, for deletes."""
_CLOSE_DEADLINE = 60.0
"""Seconds that ``close`` waits for queued operations."""
_STUCK_DEADLINE = 5.0
"""Seconds that ``close`` waits after ``give_up``."""
COMMIT_DEADLINE = 30.0
"""Seconds after which a commit counts as stuck: a healthy disk takes milliseconds, an overloaded one seconds, and a
disk that is gone never answers."""


class _Job(Generic[T]):
    """An operation and its outcome. ``deliver`` is called once, on the writer thread, and must not raise."""

    __slots__ = ("deliver", "ended", "error", "op", "result")

    def __init__(self, op: Callable[[WriteTxn], T]) -> None:
        self.op = op
        self.result: T | None = None
        self.error: BaseException | None = None
        self.ended = False
        self.deliver: Callable[[], None] = lambda: None

    def end(self) -> None:
        self.ended = True
        self.deliver()

    def unwrap(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class Index:
    """Made by ``open``; a context manager. ``read``, ``write_sync`` from any thread, ``write`` from trio."""

    def __init__(self, path: str, environment: lmdb.Environment, databases: Databases, nodeids: HighWater) -> None:
        self.path = path
        self._environment = environment
        self._databases = databases
        self._nodeids = nodeids
        self._page_size = environment.stat()["psize"]
        self._soft_pages = 0
        self._data_fd = -1
        self._allocated_to = 0
        self._no_disk: StoreError | None = None
        self._queue: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._stopped = False
        self._closed = False
        self._failure: BaseException | None = None
        self._watchers: list[Callable[[], None]] = []
        self.commit_deadline = COMMIT_DEADLINE
        self._waiting: set[trio.Event] = set()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="index-writer", daemon=True)

    @classmethod
    def open(cls, path: str, *, map_size: int = DEFAULT_MAP_SIZE, nodeids_path: str | None = None) -> Index:
        """Open the index in directory ``path``, made if it is not there, and start its writer thread.

        ``map_size``: bytes that records may take. ``nodeids_path``: the high-water file, by default ``nodeids`` beside
        ``path``. Raises StoreUnsupported (a newer format), StoreDamaged (`instantstart fsck` mends it), StoreFull,
        StoreReadOnly, StoreError. The caller holds the store's lock.
        """
        path = os.path.abspath(path)
        real_size = map_size + max(map_size // 16, _RESERVE)
        try:
            os.makedirs(path, 0o700, exist_ok=True)
        except OSError as error:
            raise os_error(error, f"make {path}") from error
        try:
            environment = lmdb.open(
                path,
                map_size=real_size,
                max_dbs=len(schema.DATABASES),
                mode=0o600,
                readahead=False,
                max_spare_txns=2,
            )
        except (lmdb.Error, OSError) as error:
            raise _translate(error, f"open the index {path}") from error
        try:
            _check_length(path, environment)
            environment.reader_check()
            databases, is_new = _open_databases(path, environment)
            nodeids = HighWater(nodeids_path or os.path.join(os.path.dirname(path), "nodeids"))
            nodeids.load(index_is_new=is_new)
            index = cls(path, environment, databases, nodeids)
            index._soft_pages = map_size // index._page_size
            index._prepare_disk(real_size)
            if is_new:
                _sync_directories(path)
        except (lmdb.Error, OSError) as error:
            environment.close()
            raise _translate(error, f"open the index {path}") from error
        except BaseException:
            environment.close()
            raise
        index._thread.start()
        return index

    def close(self) -> None:
        """Finish what is queued, then close. Idempotent; nothing may be inside ``read``."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._stopped = True
            self._queue.put(None)
        self._thread.join(_STUCK_DEADLINE if self._given_up else _CLOSE_DEADLINE)
        if self._thread.is_alive():
            raise StoreError(f"the writer of the index {self.path} does not end: an op of it hangs")
        os.close(self._data_fd)
        self._environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- reading and writing ---------------------------------------------------------------------------------------

    def read(self, op: Callable[[ReadTxn], T]) -> T:
        """Run ``op`` on a consistent view and return its result, which must not keep an iterator of the view.

        Keep it short: pages of the view are not reused while it lasts. Raises StoreDamaged, StoreError.
        """
        with self.reading() as txn:
            return op(txn)

    @contextlib.contextmanager
    def reading(self) -> Iterator[ReadTxn]:
        """``read`` as a context manager. No ``await`` inside."""
        if self._closed:
            raise StoreError(f"the index {self.path} is closed")
        try:
            with self._environment.begin() as transaction:
                yield ReadTxn(transaction, self._databases)
        except lmdb.Error as error:
            raise _translate(error, f"read the index {self.path}") from error

    async def write(
        self,
        op: Callable[[WriteTxn], T],
        *,
        patience: float = math.inf,
        late: Callable[[IndexStuck], None] = lambda error: None,
    ) -> T:
        """Run ``op`` on the writer thread and return its result once it is durable.

        Operations run in the order of their calls. One that is cancelled, or given up with IndexStuck, may still take
        effect: callers that must know the outcome pass no ``patience``.

        Args:
            op: Touches nothing but its WriteTxn. It may run twice; only the last run counts.
            patience: Seconds after which to give up.
            late: Called after COMMIT_DEADLINE; the wait goes on.

        Raises:
            IndexFull, StoreFull, StoreDamaged: The write failed.
            IndexStuck: ``patience`` has ended, or ``give_up`` was called.
            StoreError: The writer has stopped.
            Exception: What ``op`` raised, which undoes only this operation.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        job = _Job(op)
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def deliver() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        job.deliver = deliver
        self._submit(job)
        self._waiting.add(done)
        try:
            with trio.move_on_after(patience):
                with trio.move_on_after(self.commit_deadline):
                    await done.wait()
                if not job.ended:
                    late(self._stuck())
                await done.wait()
        finally:
            self._waiting.discard(done)
        if not job.ended:
            raise self._stuck()
        return job.unwrap()

    def give_up(self) -> None:
        """End all waits for commits from now on: for a shutdown with a hanging disk. On the trio thread."""
        self._given_up = True
        for done in self._waiting:
            done.set()

    def _stuck(self) -> IndexStuck:
        return IndexStuck(
            f"the index {self.path} takes no commits: the disk hangs; what was to be written may still be"
        )

    def write_sync(self, op: Callable[[WriteTxn], T], *, patience: float | None = None) -> T:
        """``write`` without trio: blocks the calling thread."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("an op may not wait for another op")
        job = _Job(op)
        done = threading.Event()
        job.deliver = done.set
        self._submit(job)
        # Always set: by the operation's transaction, or by the writer as it stops.
        if not done.wait(patience):
            raise self._stuck()
        return job.unwrap()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the writer thread: raise StoreError if it stops by itself, return when the index is closed.

        Writing works without it, but a stopped writer would go unnoticed.
        """
        stopped = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(stopped.set)

        with self._mutex:
            if self._thread.is_alive() and not self._stopped:
                self._watchers.append(wake)
            else:
                stopped.set()
        try:
            task_status.started()
            await stopped.wait()
        finally:
            with self._mutex, contextlib.suppress(ValueError):
                self._watchers.remove(wake)
        if self._failure is not None:
            raise self._stopped_error()

    def _stopped_error(self) -> StoreError:
        return StoreError(f"the writer of the index {self.path} has stopped: {self._failure or 'it was closed'}")

    def _submit(self, job: _Job[T]) -> None:
        with self._mutex:
            if self._stopped:
                raise self._stopped_error()
            if self._given_up:
                raise self._stuck()
            self._queue.put(job)  # type: ignore[arg-type]

    # -- the writer thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        group: list[_Job[object]] = []
        try:
            last = False
            while not last:
                job: _Job[object] | None = self._queue.get()
                while job is not None and len(group) < _GROUP - 1 and not self._queue.empty():
                    group.append(job)
                    job = self._queue.get()
                if job is None:
                    last = True
                else:
                    group.append(job)
                if group:
                    self._run_group(group)
                    while group:
                        group.pop(0).end()
                job = None  # while waiting it keeps no reference to what an operation uses
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._mutex:
                self._stopped = True
                watchers = list(self._watchers)
            for left in [*group, *self._drain()]:
                if left.error is None:
                    left.error = self._stopped_error()
                left.end()
            for wake in watchers:
                wake()

    def _drain(self) -> list[_Job[object]]:
        jobs: list[_Job[object]] = []
        while not self._queue.empty():
            job = self._queue.get()
            if job is not None:
                jobs.append(job)
        return jobs

    def _run_group(self, group: list[_Job[object]]) -> None:
        """Run all in one transaction. If it fails as a whole, one for each, so that none fails because of another."""
        if self._no_disk is not None:
            self._keep_headroom()
        try:
            with self._environment.begin(write=True) as parent:
                for job in group:
                    self._run_op(job, parent)
        except (lmdb.Error, OSError) as error:
            if len(group) > 1:
                for job in group:
                    self._run_group([job])
                return
            group[0].error = _translate(error, f"write the index {self.path}")
        self._keep_headroom()

    def _run_op(self, job: _Job[object], parent: Transaction) -> None:
        job.result = job.error = None
        try:
            with self._environment.begin(parent=parent, write=True) as child:
                job.result = job.op(WriteTxn(child, self._databases, self._no_space, self._nodeids.take))
        except lmdb.BadTxnError:
            raise
        except lmdb.Error as error:
            job.error = _translate(error, f"write the index {self.path}")
        except BaseException as error:
            # The caller of the operation gets it: the thread serves everybody and goes on.
            job.error = error

    def _no_space(self, transaction: Transaction) -> StoreError | None:
        """The error for a put that would grow the index now; None if there is space."""
        pages = 0
        for database in self._databases.values():
            statistics = transaction.stat(database)
            pages += statistics["branch_pages"] + statistics["leaf_pages"] + statistics["overflow_pages"]
        if pages >= self._soft_pages:
            return _index_full(self.path)
        return self._no_disk

    def _prepare_disk(self, real_size: int) -> None:
        self._data_fd = os.open(os.path.join(self.path, "data.mdb"), os.O_RDWR | os.O_CLOEXEC)
        # Without a limit on file sizes this cannot fail; with one, the file grows as LMDB writes it.
        with contextlib.suppress(OSError):
            if os.fstat(self._data_fd).st_size < real_size:
                os.ftruncate(self._data_fd, real_size)
        self._keep_headroom()

    def _keep_headroom(self) -> None:
        """Keep ``_HEADROOM`` bytes allocated ahead of LMDB. While that fails, puts that grow the index are refused."""
        used = (self._environment.info()["last_pgno"] + 1) * self._page_size
        if self._no_disk is None and used + _HEADROOM // 2 <= self._allocated_to:
            return
        try:
            os.posix_fallocate(self._data_fd, used, _HEADROOM)
        except OSError as error:
            self._no_disk = os_error(error, f"the index {self.path} cannot grow")
        else:
            self._allocated_to = used + _HEADROOM
            self._no_disk = None


def _check_length(path: str, environment: lmdb.Environment) -> None:
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    length = os.stat(os.path.join(path, "data.mdb")).st_size
    if length < wanted:
        raise StoreDamaged(f"the index {path} was cut short ({length} bytes of {wanted}); run `instantstart fsck`")


def _sync_directories(path: str) -> None:
    """Make the entries of the data file and of its directory durable, which LMDB does not."""
    for directory in (path, os.path.dirname(path)):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _open_databases(path: str, environment: lmdb.Environment) -> tuple[Databases, bool]:
    """The databases, made if they are not there, and whether the index knows no nodeid counter yet."""
    with environment.begin(write=True) as transaction:
        meta = environment.open_db(b"meta", txn=transaction)
        stored = transaction.get(schema.META_FORMAT, db=meta)
        if stored is None:
            transaction.put(schema.META_FORMAT, schema.encode_u64(schema.FORMAT), db=meta)
        elif (version := schema.decode_u64(stored)) < schema.FORMAT:
            # Format 1 had no summaries: they are made as pipelines become idle.
            transaction.put(schema.META_FORMAT, schema.encode_u64(schema.FORMAT), db=meta)
        elif version > schema.FORMAT:
            raise StoreUnsupported(
                f"the index {path} has format {version}, this version reads up to {schema.FORMAT}: it was written by a "
                "newer version; use that one, or move the index away and run `instantstart fsck`"
            )
        databases: dict[str, lmdb._Database] = {
            name: environment.open_db(name.encode(), txn=transaction) for name in schema.DATABASES
        }
        return databases, transaction.get(schema.META_NODEIDS, db=meta) is None


def _index_full(path: str) -> IndexFull:
    return IndexFull(f"the index {path} is full: remove pipelines")


def _translate(error: lmdb.Error | OSError, what: str) -> StoreError:
    """The seam where lmdb's errors enter."""
    if isinstance(error, OSError):
        return os_error(error, what)
    match error:
        case lmdb.MapFullError():
            return IndexFull(f"{what}: the map is full; remove pipelines")
        case lmdb.ReadonlyError():
            return StoreReadOnly(f"{what}: {error}")
        case lmdb.DiskError():
            return StoreFull(f"{what}: no space is left on the disk")
        case (
            lmdb.InvalidError()
            | lmdb.CorruptedError()
            | lmdb.PageNotFoundError()
            | lmdb.VersionMismatchError()
            | lmdb.PanicError()
            | lmdb.IncompatibleError()
        ):
            return StoreDamaged(f"{what}: {error}; run `instantstart fsck`")
        case _:
            return StoreError(f"{what}: {error}")


def probe(path: str, map_size: int = DEFAULT_MAP_SIZE) -> None:
    """Read and decode every record; raises, or dies of a signal, if the index is damaged. For a child process."""
    with Index.open(path, map_size=map_size) as index, index.reading() as txn:
        txn.dump()
        for pipeline in txn.pipelines():
            for generation in txn.generations(pipeline.spec.id):
                for _ in txn.files(pipeline.spec.id, generation.number):
                    pass
