from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from instantstart_fs.core.access import Access
from instantstart_fs.core.manifest import Digest, Manifest, ManifestFile, ModelManifest, ModelSpec, PipelineSpec
from instantstart_fs.errors import StoreDamaged, StoreLocked, StoreUnsupported
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord, UpkeepRecord
from instantstart_fs.index.transactions import WriteTxn
from instantstart_fs.store.blobfile import SealRecord
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.upkeep.fsck import FsckProgress, FsckReport, fsck, repair

CONTENTS = {
    "a.safetensors": b"weights" * 1000,
    "empty.txt": b"",
    "sub/config.json": b"{}",
    "unproven.bin": b"who knows",
}
UNPROVEN = "unproven.bin"


def digest_of(path: str) -> Digest | None:
    return None if path == UNPROVEN else Digest("sha256", hashlib.sha256(CONTENTS[path]).hexdigest())


def manifest_of(pipeline: str, generation: int) -> Manifest:
    files = tuple(
        ManifestFile(path, len(data), path, digest=digest_of(path)) for path, data in sorted(CONTENTS.items())
    )
    return Manifest(pipeline, generation, 4096, (ModelManifest("m", "hf://org/repo", "abc", files),), 7)


def seal(store: BlobStore, pipeline: str, generation: int, path: str, data: bytes | None = None) -> None:
    data = CONTENTS[path] if data is None else data
    digest = digest_of(path)
    with store.blob(pipeline, generation, f"m/{path}", len(data)) as blob:
        blob.pwrite(0, data)
        blob.seal(SealRecord(len(data), "sealed" if digest else "unverified", str(digest) if digest else None, 1))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A store of two pipelines without an index: "full" (all sealed) and "part" (one sealed, one partial file)."""
    root = str(tmp_path / "store")
    with BlobStore.open(root) as store:
        for pipeline in ("full", "part"):
            spec = PipelineSpec(pipeline, (ModelSpec("hf://org/repo", "m"),), uid=7, pinned=pipeline == "full")
            store.metadata.write_pipeline(spec, created_at_ns=1000)
            store.metadata.write_manifest(manifest_of(pipeline, 3))
        for path in CONTENTS:
            seal(store, "full", 3, path)
        seal(store, "part", 3, "a.safetensors")
        with store.blob("part", 3, "m/sub/config.json", 2) as blob:
            blob.pwrite(0, b"{}")
            blob.datasync()
    return root


@pytest.fixture
def opened(root: str) -> Iterator[tuple[BlobStore, Index]]:
    with BlobStore.open(root) as store, Index.open(store.layout.index) as index:
        yield store, index


def states(index: Index, pipeline: str, generation: int = 3) -> dict[str, str]:
    paths = [entry.path.removeprefix("m/") for entry in manifest_of(pipeline, generation).files]
    return index.read(lambda txn: {paths[at]: record.state for at, record in txn.files(pipeline, generation)})


ALL_SEALED = {path: "unverified" if path == UNPROVEN else "sealed" for path in CONTENTS}


def check(root: str) -> None:
    """What every rebuilt index of ``root`` must say."""
    with BlobStore.open(root) as store, Index.open(store.layout.index) as index:
        assert states(index, "full") == ALL_SEALED
        assert states(index, "part") == {"a.safetensors": "sealed"}
        with index.reading() as txn:
            records = list(txn.pipelines())
            generations = {record.spec.id: txn.get_generation(record.spec.id, 3) for record in records}
        assert [(record.spec.id, record.pinned, record.created_at_ns) for record in records] == [
            ("full", True, 1000),
            ("part", False, 1000),
        ]
        blocks: list[range] = []
        for record in records:
            assert (record.generation, record.next_generation, record.spec.uid) == (3, 4, 7)
            assert record.spec == store.metadata.load_pipeline(record.spec.id)
            assert set(record.directory_nodeids) == {"", "m"}
            generation = generations[record.spec.id]
            assert generation is not None
            assert (generation.file_count, generation.chunk_size) == (4, 4096)
            # The root, m, m/sub and four files, two nodeids each; a directory's odd neighbour is its symlink's.
            blocks.append(range(generation.nodeid_base, generation.nodeid_base + 2 * 7))
            blocks.extend(range(nodeid, nodeid + 2) for nodeid in record.directory_nodeids.values())
        given = [nodeid for block in blocks for nodeid in block]
        assert len(set(given)) == len(given)
        assert index.write_sync(lambda txn: txn.reserve_nodeids(1)) > max(given)
        assert store.existing_blob("part", 3, "m/sub/config.json") is None


def test_a_lost_index_is_rebuilt(root: str) -> None:
    seen: list[FsckProgress] = []
    report = repair(root, report=seen.append)
    assert report == FsckReport(
        pipelines=2, sealed=4, unverified=1, dropped=1, orphans=0,
        bytes=sum(map(len, CONTENTS.values())) + 7000, problems=(),
    )  # fmt: skip
    assert {(progress.pipeline, progress.path) for progress in seen} == {
        *(("full", f"m/{path}") for path in CONTENTS),
        ("part", "m/a.safetensors"),
        ("part", "m/sub/config.json"),
    }
    check(root)
    assert repair(root) == msgspec.structs.replace(report, dropped=0)
    check(root)


@pytest.mark.parametrize("damage", ["garbage", "cut", "pages", "record"])
def test_a_damaged_index_is_moved_aside(root: str, damage: str) -> None:
    repair(root)
    data = Path(root) / "index/data.mdb"
    with Index.open(str(data.parent)) as index:
        nodeids = index.write_sync(lambda txn: txn.reserve_nodeids(1))

        def fill(txn: WriteTxn) -> None:
            txn.put_generation(GenerationRecord("part", 9, 1, 1, 1))
            for at in range(20_000):
                txn.put_file("part", 9, at, FileRecord("filling", 0, 0, bytes(50)))
            if damage == "record":
                txn._put("pipelines", b"part", b"\xc1")

        index.write_sync(fill)
        used = (index._environment.info()["last_pgno"] + 1) * 4096
    if damage == "garbage":
        with data.open("r+b") as file:
            file.write(os.urandom(8192))
    elif damage == "cut":
        os.truncate(data, 32768)
    elif damage == "pages":
        with data.open("r+b") as file:
            file.seek(2 * 4096)
            file.write(bytes(used - 2 * 4096))
    report = repair(root)
    assert "could not be read" in report.problems[0]
    assert report.sealed == 4
    check(root)
    (moved,) = [name for name in os.listdir(root) if name.startswith("index.damaged-")]
    assert (Path(root) / moved / "data.mdb").exists()
    with Index.open(str(data.parent)) as index:
        assert index.write_sync(lambda txn: txn.reserve_nodeids(1)) > nodeids


def test_a_healthy_index_keeps_times_and_its_generation(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    spec = store.metadata.load_pipeline("full")
    store.metadata.write_manifest(manifest_of("full", 4))  # an update that died before its index record

    refused = UpkeepRecord(access=Access(checked_at_ns=5, refusals=2, code="access-refused"))

    def op(txn: WriteTxn) -> None:
        txn.put_pipeline(PipelineRecord(spec, 3, 8, True, 1000, {"": 9000}))
        txn.put_generation(GenerationRecord("full", 3, 9100, 4, 4096))
        txn.put_last_request("full", 55)
        txn.put_upkeep("full", refused)
        txn.put_upkeep("gone", refused)
        txn.put_last_access("full", 3, 1, 56)
        txn.put_file("full", 3, 2, FileRecord("filling", 0, 0, b"\1"))  # it is sealed
        txn.put_pipeline(PipelineRecord(PipelineSpec("gone", spec.models), 1, 2))
        txn.put_last_request("gone", 57)
        txn.put_file("part", 3, 3, FileRecord("sealed"))  # it is not there

    index.write_sync(op)
    report = fsck(store, index)
    assert report.problems == ()
    assert states(index, "full") == ALL_SEALED
    assert states(index, "part") == {"a.safetensors": "sealed"}
    assert store.metadata.generations("full") == [3]
    with index.reading() as txn:
        record = txn.get_pipeline("full")
        assert record is not None
        assert (record.generation, record.next_generation) == (3, 8)
        assert txn.last_requests() == {"full": 55}
        assert dict(txn.upkeep()) == {"full": refused}
        assert list(txn.accesses("full", 3)) == [(1, 56)]
        assert [record.spec.id for record in txn.pipelines()] == ["full", "part"]


def test_without_an_index_the_newest_readable_generation_wins(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    for number in (4, 10, 11):
        store.metadata.write_manifest(manifest_of("full", number))
    seal(store, "full", 10, "a.safetensors")
    (Path(root) / "slots/full/11/manifest.json").write_bytes(b"{")
    (Path(root) / "slots/full/12/files").mkdir(parents=True)
    report = fsck(store, index)
    assert store.tree.list_directory("full") == ["10", "pipeline.json"]
    assert states(index, "full", 10) == {"a.safetensors": "sealed"}
    assert len(report.problems) == 1
    assert "full/11" in report.problems[0]
    assert report.orphans == 2
    with index.reading() as txn:
        record = txn.get_pipeline("full")
        assert record is not None
        assert (record.generation, record.next_generation) == (10, 13)


def test_only_a_deep_look_finds_changed_bytes(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    victim = Path(root) / "slots/full/3/files/m/a.safetensors"
    with victim.open("r+b") as file:
        file.seek(3000)
        file.write(b"!")
    assert fsck(store, index).problems == ()
    assert states(index, "full") == ALL_SEALED
    report = fsck(store, index, deep=True)
    assert len(report.problems) == 1
    assert "full/3/m/a.safetensors" in report.problems[0]
    assert states(index, "full") == {path: state for path, state in ALL_SEALED.items() if path != "a.safetensors"}
    assert not victim.exists()
    assert states(index, "part") == {"a.safetensors": "sealed"}


@pytest.mark.parametrize(
    "record",
    [
        b"nonsense",
        msgspec.json.encode(SealRecord(7000, "sealed", "sha256:00")),
        msgspec.json.encode(SealRecord(7001, "sealed", str(digest_of("a.safetensors")))),
        msgspec.json.encode(SealRecord(7000, "unverified")),
        msgspec.json.encode(SealRecord(7000, "sealed")),
    ],
)
def test_a_seal_that_does_not_agree_with_the_manifest_is_worth_nothing(
    opened: tuple[BlobStore, Index], root: str, record: bytes
) -> None:
    store, index = opened
    victim = Path(root) / "slots/full/3/files/m/a.safetensors"
    os.setxattr(victim, "user.instantstart.seal", record)
    report = fsck(store, index)
    assert len(report.problems) == report.dropped - 1 == 1
    assert "a.safetensors" not in states(index, "full")
    assert not victim.exists()


def test_a_file_of_another_size_than_sealed_is_dropped(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    os.truncate(Path(root) / "slots/full/3/files/m/a.safetensors", 6999)
    assert "6999" in fsck(store, index).problems[0]
    assert "a.safetensors" not in states(index, "full")


def test_what_nobody_speaks_of_is_removed_and_nothing_outside_is_touched(
    opened: tuple[BlobStore, Index], root: str, tmp_path: Path
) -> None:
    store, index = opened
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    slots = Path(root) / "slots"
    (slots / "nobody/1/files").mkdir(parents=True)
    (slots / ".hidden").write_bytes(b"x")
    (slots / "link").symlink_to(outside)
    (slots / "full/notes").write_bytes(b"x")
    (slots / "full/3/core").write_bytes(b"x")
    (slots / "full/3/files/m/extra/deep").mkdir(parents=True)
    (slots / "full/3/files/m/link").symlink_to(outside)
    os.unlink(slots / "full/3/files/m/empty.txt")
    (slots / "full/3/files/m/empty.txt").symlink_to(outside / "precious")
    report = fsck(store, index)
    assert sorted(os.listdir(slots)) == ["full", "part"]
    assert sorted(os.listdir(slots / "full")) == ["3", "pipeline.json"]
    assert sorted(os.listdir(slots / "full/3")) == ["files", "manifest.json"]
    assert sorted(os.listdir(slots / "full/3/files/m")) == ["a.safetensors", "sub", "unproven.bin"]
    assert (outside / "precious").read_bytes() == b"x"
    assert report.orphans == 7
    assert len(report.problems) == 8
    assert fsck(store, index).problems == ()


def test_what_a_newer_version_wrote_is_left_alone(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    fsck(store, index)
    before = index.read(lambda txn: txn.dump())
    (Path(root) / "slots/part/3/manifest.json").write_bytes(b'{"format":2}')
    with pytest.raises(StoreUnsupported, match="newer"):
        fsck(store, index)
    assert index.read(lambda txn: txn.dump()) == before
    assert (Path(root) / "slots/part/3/files/m/a.safetensors").exists()


def test_hostile_names_in_a_manifest_are_not_believed(opened: tuple[BlobStore, Index], root: str) -> None:
    store, index = opened
    file = ManifestFile("../../../../escape", 1, "x")
    store.metadata.write_manifest(Manifest("part", 4, 4096, (ModelManifest("m", "hf://org/repo", "abc", (file,)),), 7))
    report = fsck(store, index)
    assert "escape" in report.problems[0]
    assert states(index, "part") == {"a.safetensors": "sealed"}


def test_it_refuses_while_a_daemon_has_the_store(opened: tuple[BlobStore, Index], root: str) -> None:
    with pytest.raises(StoreLocked, match=f"pid {os.getpid()}"):
        repair(root)


def test_an_unreadable_index_given_open_is_an_error(opened: tuple[BlobStore, Index]) -> None:
    store, index = opened
    index.write_sync(lambda txn: txn._put("pipelines", b"x", b"\xc1"))
    with pytest.raises(StoreDamaged, match="instantstart fsck"):
        fsck(store, index)


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_it_works_it_can_be_run_again(root: str, moment: int) -> None:
    """Killed at each kind of step: before the index is written, after, and at each removal."""
    code = f"""
import os, signal, sys
from instantstart_fs.upkeep import fsck
from instantstart_fs.store.blobstore import BlobStore
from instantstart_fs.store.tree import StoreTree
steps = 0
def step(real):
    def wrapped(*args, **kwargs):
        global steps
        if steps == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return real(*args, **kwargs)
    return wrapped
fsck._Run.write = step(fsck._Run.write)
fsck._Run.finish = step(fsck._Run.finish)
for kind, name in ((BlobStore, "delete_entry"), (StoreTree, "_remove_trashed"), (BlobStore, "close")):
    setattr(kind, name, step(getattr(kind, name)))
fsck.repair(sys.argv[1])
"""
    with BlobStore.open(root) as store:
        store.metadata.write_manifest(manifest_of("part", 2))
    child = subprocess.run([sys.executable, "-c", code, root], timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    repair(root)
    check(root)
    with BlobStore.open(root) as store:
        assert store.metadata.generations("part") == [3]
