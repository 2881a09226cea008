"""fsck: rebuilds the index from the slots. The store must not be in use.

What a slot says by itself: pipeline.json, manifest.json, and on each whole file its seal record. A file is restored
when its record, its size and the manifest agree (``deep``: and when its bytes hash to the manifest's digest). Anything
else under files/ is removed: presence cannot be read off a sparse file, so fsck takes a partial one for worthless even
where an old index could be read. One generation is kept: the current one of an index that can be read, else the newest
whose manifest can. Of an index that can be read the times of requests and reads are kept, too.

The new contents are written in one transaction after everything was looked at, and files are removed only after that:
killed at any moment, fsck leaves the old index or the new one, and can be run again. Incarnations start again at 0, but
with nodeids that nobody ever had.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import msgspec

from instantstart_fs.core.clockwatch import ClockState
from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.manifest import FileEntry, Manifest, PipelineSpec
from instantstart_fs.core.names import validate_origin_paths, validate_pipeline_id
from instantstart_fs.core.tree import NODEIDS_PER_NODE, Tree
from instantstart_fs.errors import InvalidName, NoSuchEntry, StoreDamaged, StoreUnsupported
from instantstart_fs.index.environment import DEFAULT_MAP_SIZE, Index
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, UpkeepRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store import startupcaches
from instantstart_fs.store.blobfile import BlobFile
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.layout import FILES, LEARNED_FILE, MANIFEST_FILE, PIPELINE_FILE, STARTUP, generation_number
from instantstart_fs.upkeep.eviction import boot_identity, boottime

_BLOCK = 4 << 20
_PROBE_DEADLINE = 600.0
"""Seconds for reading every page of an old index: a million records take one or two."""

State = Literal["sealed", "unverified"]


class FsckProgress(msgspec.Struct, frozen=True):
    """The progress of a run. ``files`` of ``total_files`` of this pipeline were looked at; ``bytes`` were hashed so far
    (``deep``)."""

    pipeline: str
    path: str
    files: int
    total_files: int
    bytes: int


class FsckReport(msgspec.Struct, frozen=True):
    """Counts, and a line for each thing that was not as it should be. ``bytes``: of the files restored."""

    pipelines: int
    sealed: int
    unverified: int
    dropped: int
    orphans: int
    bytes: int
    problems: tuple[str, ...]


class _Restored(msgspec.Struct):
    spec: PipelineSpec
    created_at_ns: int
    manifest: Manifest | None
    numbers: list[int]
    files: dict[int, State]


class _Run:
    """One run. ``keep``: useless files are not removed."""

    def __init__(
        self, store: BlobStore, deep: bool, report: Callable[[FsckProgress], None], *, keep: bool = False
    ) -> None:
        self.store = store
        self.deep = deep
        self.keep = keep
        self.fate = "left alone" if keep else "removed"
        self.report = report
        self.restored: list[_Restored] = []
        self.remove: list[tuple[str, ...]] = []
        """Paths below slots/ that are removed once the new index is durable."""
        self.problems: list[str] = []
        self.dropped = 0
        self.orphans = 0
        self.hashed = 0
        self.startup_bytes: Counter[str] = Counter()
        """Pipeline → bytes that its startup caches take."""

    def look(self, current: dict[str, int]) -> None:
        for name in self.store.tree.list_directory():
            try:
                validate_pipeline_id(name)
                spec = self.store.metadata.load_pipeline(name)
            except (StoreDamaged, NoSuchEntry, InvalidName) as error:  # nothing else: a want of ours is no reason
                # Without its pipeline.json nobody knows whose it is; it may hold a gated model: never shown again.
                self._orphan((name,), f"{name}: {self.fate}, its {PIPELINE_FILE} cannot be used ({error.message})")
                continue
            self._look_at_pipeline(spec, current.get(name, 0))

    def _orphan(self, components: tuple[str, ...], problem: str) -> None:
        self.remove.append(components)
        self.problems.append(problem)
        self.orphans += 1

    def _look_at_pipeline(self, spec: PipelineSpec, current: int) -> None:
        pipeline = spec.id
        numbers: list[int] = []
        for name in self.store.tree.list_directory(pipeline):
            number = generation_number(name)
            if number is not None:
                numbers.append(number)
            elif name == STARTUP:
                self._look_at_startup_caches(pipeline)
            elif name not in (PIPELINE_FILE, LEARNED_FILE):
                self._orphan((pipeline, name), f"{pipeline}/{name}: {self.fate}, nothing of this store has that name")
        restored = _Restored(spec, self.store.metadata.pipeline_created_at(pipeline), None, sorted(numbers), {})
        self.restored.append(restored)
        # An update that the daemon did not live to finish may have left a newer manifest than the one in use.
        for number in sorted(restored.numbers, key=lambda number: (number == current, number), reverse=True):
            if restored.manifest is not None:
                self.remove.append((pipeline, str(number)))
                continue
            try:
                manifest = self.store.metadata.load_manifest(pipeline, number)
                validate_origin_paths(entry.path for entry in manifest.files)
            except StoreUnsupported:
                raise
            except (StoreDamaged, InvalidName) as error:
                self._orphan((pipeline, str(number)), f"{pipeline}/{number}: {self.fate}, {error.message}")
            except NoSuchEntry:
                # No manifest: a resolve that the daemon did not live to finish.
                self.remove.append((pipeline, str(number)))
                self.orphans += 1
            else:
                restored.manifest = manifest
                self._look_at_generation(restored, manifest)
        if restored.manifest is None:
            self.problems.append(
                f"{pipeline}: no generation can be used; `instantstart update {pipeline}` resolves anew"
            )

    def _look_at_startup_caches(self, pipeline: str) -> None:
        """Remove startup caches that are not whole; with ``deep`` also those whose digest is wrong."""
        for name in self.store.tree.list_directory(pipeline, STARTUP):
            shown = f"{pipeline}/{STARTUP}/{name}"
            number = generation_number(name)
            problem: str | None = "nothing of this store has that name"
            if number is not None:
                try:
                    record = startupcaches.load(self.store, pipeline, number)
                    problem = startupcaches.problem(self.store, pipeline, record) if self.deep else None
                    if problem is None:
                        self.startup_bytes[pipeline] += startupcaches.taken(record)
                        continue
                except StoreDamaged as error:
                    problem = error.message
            self._orphan((pipeline, STARTUP, name), f"{shown}: {self.fate}, {problem}")

    def _look_at_generation(self, restored: _Restored, manifest: Manifest) -> None:
        where = (manifest.pipeline, str(manifest.generation))
        for name in self.store.tree.list_directory(*where):
            if name not in (MANIFEST_FILE, FILES):
                shown = "/".join((*where, name))
                self._orphan((*where, name), f"{shown}: {self.fate}, nothing of this store has that name")
        entries = {entry.path: entry for entry in manifest.files}
        directories = {""}
        for path in entries:
            while path := path.rpartition("/")[0]:
                directories.add(path)
        seen = 0
        pending = [""]
        while pending:
            directory = pending.pop()
            components = (*where, FILES, *directory.split("/")) if directory else (*where, FILES)
            for name in self.store.tree.list_directory(*components):
                path = f"{directory}/{name}" if directory else name
                if path in directories:
                    pending.append(path)
                elif path in entries:
                    seen += 1
                    self.report(FsckProgress(manifest.pipeline, path, seen, len(entries), self.hashed))
                    state = self._judge(manifest, entries[path])
                    if state is not None:
                        restored.files[entries[path].index] = state
                    else:
                        self.dropped += 1
                        self.remove.append((*components, name))
                else:
                    self._orphan((*components, name), f"{'/'.join(where)}/{path}: {self.fate}, not in the manifest")

    def _judge(self, manifest: Manifest, entry: FileEntry) -> State | None:
        """Return the state that the file is restored in; None if it is dropped. That is a problem, unless the file was
        only partial."""
        shown = f"{manifest.pipeline}/{manifest.generation}/{entry.path}"
        try:
            blob = self.store.existing_blob(manifest.pipeline, manifest.generation, entry.path)
            if blob is None:
                return None
            with blob:
                record = blob.seal_record()
                if record is None:
                    return None
                problem = _disagreement(blob, record.size, record.state, record.digest, entry)
                if problem is None and self.deep:
                    problem = self._rehash(blob, manifest, entry)
                if problem is None:
                    return record.state
        except StoreDamaged as error:
            self.problems.append(f"{shown}: dropped, {error.message}")
            return None
        self.problems.append(f"{shown}: dropped, {problem}")
        return None

    def _rehash(self, blob: BlobFile, manifest: Manifest, entry: FileEntry) -> str | None:
        digest = entry.file.digest
        hasher = new_hasher(digest, entry.file.size)
        reported = self.hashed
        for offset in range(0, blob.size, _BLOCK):
            data = blob.pread(offset, _BLOCK)
            hasher.update(data)
            self.hashed += len(data)
            if self.hashed - reported >= 64 * _BLOCK:
                reported = self.hashed
                self.report(FsckProgress(manifest.pipeline, entry.path, 0, len(manifest.files), self.hashed))
        if digest is not None and hasher.hexdigest() != digest.value:
            return f"its bytes are not those of the manifest ({digest.algorithm})"
        return None

    def write(self, txn: WriteTxn) -> None:
        """The op that replaces the index's contents. Times survive; generations get fresh nodeids."""
        requests, upkeep = txn.last_requests(), dict(txn.upkeep())
        kept = [
            (restored, txn.get_pipeline(restored.spec.id), self._old_accesses(txn, restored))
            for restored in self.restored
        ]
        txn.clear()
        for restored, old, accesses in kept:
            spec, manifest = restored.spec, restored.manifest
            names = ["", *(model.name for model in (manifest.models if manifest else spec.models) if model.name)]
            first = txn.reserve_nodeids(NODEIDS_PER_NODE * len(names))
            txn.put_pipeline(
                PipelineRecord(
                    spec=spec,
                    generation=manifest.generation if manifest else 0,
                    next_generation=max([0, *restored.numbers, old.next_generation - 1 if old else 0]) + 1,
                    pinned=spec.pinned,
                    created_at_ns=restored.created_at_ns,
                    directory_nodeids={name: first + NODEIDS_PER_NODE * at for at, name in enumerate(names)},
                )
            )
            if spec.id in upkeep or self.startup_bytes[spec.id]:
                # What its origin refused stays out of view.
                known = upkeep.get(spec.id, UpkeepRecord())
                txn.put_upkeep(spec.id, msgspec.structs.replace(known, startup_bytes=self.startup_bytes[spec.id]))
            if spec.id in requests:
                txn.put_last_request(spec.id, requests[spec.id])
            if manifest is None:
                continue
            tree = Tree(manifest.files, [model.name for model in manifest.models])
            txn.put_generation(
                GenerationRecord(
                    pipeline=spec.id,
                    number=manifest.generation,
                    nodeid_base=txn.reserve_nodeids(NODEIDS_PER_NODE * len(tree)),
                    file_count=len(manifest.files),
                    chunk_size=manifest.chunk_size,
                )
            )
            for index, state in sorted(restored.files.items()):
                txn.put_file(spec.id, manifest.generation, index, FileRecord(state))
            for index, at_ns in accesses:
                txn.put_last_access(spec.id, manifest.generation, index, at_ns)

    @staticmethod
    def _old_accesses(txn: WriteTxn, restored: _Restored) -> list[tuple[int, int]]:
        manifest = restored.manifest
        return list(txn.accesses(restored.spec.id, manifest.generation)) if manifest is not None else []

    def finish(self) -> FsckReport:
        for components in () if self.keep else self.remove:
            self.store.delete_entry(*components)
        states = [state for restored in self.restored for state in restored.files.values()]
        return FsckReport(
            pipelines=len(self.restored),
            sealed=states.count("sealed"),
            unverified=states.count("unverified"),
            dropped=self.dropped,
            orphans=self.orphans,
            bytes=sum(
                restored.manifest.files[index].file.size
                for restored in self.restored
                if restored.manifest is not None
                for index in restored.files
            ),
            problems=tuple(self.problems),
        )


def _disagreement(blob: BlobFile, size: int, state: str, digest: str | None, entry: FileEntry) -> str | None:
    """Return why a seal record does not belong to this file of this manifest; None if it does."""
    if not size == blob.size == entry.file.size:
        return f"its size is {blob.size}, its seal says {size}, the manifest {entry.file.size}"
    wanted = str(entry.file.digest) if entry.file.digest is not None else None
    if state == "sealed" and (wanted is None or digest != wanted):
        return f"its seal is that of {digest}, the manifest says {wanted}"
    if state == "unverified" and wanted is not None:
        return f"it was kept unverified, but the manifest can prove it by {wanted}"
    return None


def fsck(
    store: BlobStore, index: Index, deep: bool = False, report: Callable[[FsckProgress], None] | None = None
) -> FsckReport:
    """Rebuild ``index`` from ``store``'s slots. Blocks; nothing else may use either.

    Raises StoreUnsupported for what a newer version wrote (nothing is changed then), StoreFull, StoreReadOnly,
    IndexFull; StoreDamaged if the index itself cannot be read (``repair`` makes a new one).
    """
    run = _Run(store, deep, report or (lambda progress: None))
    run.look(index.read(lambda txn: {record.spec.id: record.generation for record in txn.pipelines()}))
    index.write_sync(run.write)
    return run.finish()


def rebuild(
    store: BlobStore, index: Index, report: Callable[[FsckProgress], None] | None = None, *, rest: float
) -> FsckReport:
    """Rebuild an empty index by the seals (upkeep/index_recovery.py). Nothing is removed from slots. Nothing is evicted
    for ``rest`` seconds, since the times of requests are lost."""
    run = _Run(store, False, report or (lambda progress: None), keep=True)
    run.look({})
    clock = ClockState(boot_identity(), time.time(), boottime(), rest)

    def write(txn: WriteTxn) -> None:
        run.write(txn)
        if store.identity:
            txn.put_store_identity(store.identity)
        if rest > 0 and run.restored:
            txn.put_clock(clock)

    index.write_sync(write)
    return run.finish()


def repair(
    root: str,
    deep: bool = False,
    report: Callable[[FsckProgress], None] | None = None,
    *,
    map_size: int = DEFAULT_MAP_SIZE,
) -> FsckReport:
    """Run `instantstart fsck` for a store that no daemon has open and whose index may be unreadable.

    An index that cannot be read is moved aside (``index.damaged-…`` beside it, for a later look) and a new one
    is made. Raises StoreLocked while a daemon runs; else like ``fsck``.
    """
    with BlobStore.open(root) as store:
        problem = _index_problem(store.layout.index, map_size)
        moved = None
        if problem is not None:
            for earlier in glob.glob(glob.escape(store.layout.index) + ".damaged-*"):
                shutil.rmtree(earlier)
            moved = f"{store.layout.index}.damaged-{time.time_ns()}"
            os.rename(store.layout.index, moved)
        with Index.open(store.layout.index, map_size=map_size, nodeids_path=store.layout.nodeids) as index:
            result = fsck(store, index, deep, report)
    if moved is None:
        return result
    line = f"the index could not be read ({problem}); it was moved to {moved} and made anew"
    return msgspec.structs.replace(result, problems=(line, *result.problems))


def _index_problem(path: str, map_size: int) -> str | None:
    """Return why the index at ``path`` cannot be used; None if it can, or is not there. A child process tries it, since
    LMDB answers some damage with a signal. Raises StoreUnsupported if a newer version wrote it."""
    if not os.path.exists(os.path.join(path, "data.mdb")):
        return None
    code = (
        "import sys\nfrom instantstart_fs.index.environment import probe\n"
        "from instantstart_fs.errors import InstantStartError\n"
        "try:\n    probe(sys.argv[1], int(sys.argv[2]))\n"
        "except InstantStartError as error:\n    print(error.code, error.message)\n    sys.exit(3)\n"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, path, str(map_size)],
            capture_output=True,
            text=True,
            timeout=_PROBE_DEADLINE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {_PROBE_DEADLINE:g} s"
    if child.returncode == 0:
        return None
    code_word, _, message = child.stdout.strip().partition(" ")
    if code_word == StoreUnsupported.code:
        raise StoreUnsupported(message)
    if child.returncode < 0:
        return f"reading it ended with signal {-child.returncode}"
    return message or child.stderr.strip().rpartition("\n")[2] or f"exit status {child.returncode}"
