from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from instantstart_fs.core.manifest import Digest, Manifest, ManifestFile, ModelManifest, ModelSpec, PipelineSpec
from instantstart_fs.errors import (
    InvalidName,
    NoSuchEntry,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreLost,
    StoreReadOnly,
    StoreUnsupported,
)
from instantstart_fs.store import filesystem
from instantstart_fs.store.blobfile import SealRecord
from instantstart_fs.store.blobstore import BlobStore, Proof
from instantstart_fs.store.layout import generation_number
from instantstart_fs.store.tree import StoreTree

SPEC = PipelineSpec("p", (ModelSpec("hf://org/repo"),), uid=5, mode=0o550, pinned=True)


def manifest_of(pipeline: str, generation: int, *paths: str) -> Manifest:
    files = tuple(ManifestFile(path, 3, path, digest=Digest("sha256", "00")) for path in paths)
    return Manifest(pipeline, generation, 1 << 20, (ModelManifest("", "hf://org/repo", "abc", files),), 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[BlobStore]:
    with BlobStore.open(str(root)) as store:
        yield store


def test_everything_is_private_to_the_daemon(store: BlobStore, root: Path) -> None:
    store.metadata.write_pipeline(SPEC)
    store.metadata.write_manifest(manifest_of("p", 1, "a"))
    store.blob("p", 1, "sub/a", 3).close()
    for directory, _, files in os.walk(root):
        assert os.stat(directory).st_mode & 0o777 == 0o700
        for name in files:
            assert os.stat(os.path.join(directory, name)).st_mode & 0o777 == 0o600


def test_pipelines_and_manifests_come_back_as_written(store: BlobStore, root: Path) -> None:
    store.metadata.write_pipeline(SPEC, created_at_ns=11)
    first, second = manifest_of("p", 1, "a", "b/ü x"), manifest_of("p", 10, "c")
    store.metadata.write_manifest(first)
    store.metadata.write_manifest(second)
    (root / "slots/p/11").mkdir()
    assert store.metadata.pipelines() == ["p"]
    assert store.metadata.load_pipeline("p") == SPEC
    assert store.metadata.generations("p") == [1, 10]
    assert store.metadata.load_manifest("p", 1) == first
    assert store.metadata.load_manifest("p", 10) == second
    assert os.listdir(root / "trash") == []
    store.metadata.write_pipeline(msgspec.structs.replace(SPEC, pinned=False))
    assert store.metadata.pipeline_created_at("p") == 11
    assert not store.metadata.load_pipeline("p").pinned
    with pytest.raises(NoSuchEntry):
        store.metadata.load_manifest("p", 2)
    with pytest.raises(NoSuchEntry):
        store.metadata.load_pipeline("q")


def test_a_pipeline_is_written_so_that_an_earlier_daemon_can_read_it(store: BlobStore, root: Path) -> None:
    """Which refuses keys that it does not know: they are there for who uses them only."""
    spec = PipelineSpec(id="plain", models=(ModelSpec(source="hf://o/r"),), uid=7, mode=0o500)
    store.metadata.write_pipeline(spec)
    written = json.loads((root / "slots" / "plain" / "pipeline.json").read_bytes())["pipeline"]
    assert {"quota", "anonymous", "requester_pays"}.isdisjoint(written)
    assert store.metadata.load_pipeline("plain") == spec
    paid = msgspec.structs.replace(spec, requester_pays=True)
    store.metadata.write_pipeline(paid)
    assert store.metadata.load_pipeline("plain") == paid


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", StoreDamaged),
        (b"{", StoreDamaged),
        (b'{"format":1}', StoreDamaged),
        (b'{"format":2,"manifest":"of the future"}', StoreUnsupported),
        (b"\xff\x00", StoreDamaged),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(
    store: BlobStore, root: Path, raw: bytes, error: type[Exception]
) -> None:
    store.metadata.write_manifest(manifest_of("p", 1, "a"))
    (root / "slots/p/1/manifest.json").write_bytes(raw)
    with pytest.raises(error, match=re.escape("p/1/manifest.json")):
        store.metadata.load_manifest("p", 1)


def test_a_manifest_of_another_generation_is_damage(store: BlobStore, root: Path) -> None:
    store.metadata.write_manifest(manifest_of("p", 1, "a"))
    os.rename(root / "slots/p/1", root / "slots/p/2")
    with pytest.raises(StoreDamaged, match="is that of p/1"):
        store.metadata.load_manifest("p", 2)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//b", "", "a\0b", "."])
def test_hostile_names_do_not_touch_the_filesystem(store: BlobStore, path: str) -> None:
    for call in (lambda: store.blob("p", 1, path, 3), lambda: store.existing_blob("p", 1, path)):
        with pytest.raises(InvalidName):
            call()
    with pytest.raises(InvalidName):
        store.delete_blob("p", 1, path)
    for pipeline in ("..", ".", "a/b", ""):
        with pytest.raises(InvalidName):
            store.delete_pipeline(pipeline)
        with pytest.raises(InvalidName):
            store.blob(pipeline, 1, "a", 3)
    assert store.tree.list_directory() == []


@pytest.mark.parametrize("where", ["slots/p", "slots/p/1", "slots/p/1/files", "slots/p/1/files/sub"])
def test_a_symlink_on_the_way_is_never_followed(store: BlobStore, root: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    store.blob("p", 1, "sub/a", 3).close()
    os.rename(root / where, outside)
    (root / where).symlink_to(outside)
    for call in (
        lambda: store.blob("p", 1, "sub/a", 3),
        lambda: store.existing_blob("p", 1, "sub/a"),
        lambda: store.blob("p", 1, "sub/new", 3),
    ):
        with pytest.raises(StoreDamaged):
            call()
    store.delete_blob("p", 1, "sub/a")  # nothing of the store's is there
    assert [path.name for path in outside.rglob("*") if path.is_file()] == ["a"]


def test_what_is_planted_in_place_of_a_file_is_refused(store: BlobStore, root: Path, tmp_path: Path) -> None:
    files = root / "slots/p/1/files"
    store.blob("p", 1, "real", 6).close()
    (tmp_path / "secret").write_bytes(b"secret")
    (files / "symlink").symlink_to(tmp_path / "secret")
    os.link(tmp_path / "secret", files / "hardlink")
    os.mkfifo(files / "fifo")
    (files / "directory").mkdir()
    for name in ("symlink", "hardlink", "fifo", "directory"):
        with pytest.raises(StoreDamaged):
            store.blob("p", 1, name, 6)
        with pytest.raises(StoreDamaged):
            store.existing_blob("p", 1, name)
    with pytest.raises(StoreDamaged, match="has 6 bytes"):
        store.blob("p", 1, "real", 7)
    for name in ("symlink", "hardlink", "fifo", "directory", "real"):
        with store.fresh_blob("p", 1, name, 7) as blob:
            assert blob.created
    assert (tmp_path / "secret").read_bytes() == b"secret"
    with store.fresh_blob("p", 1, "real", 7) as blob:
        assert not blob.created
    store.fresh_blob("p", 1, "real/below", 7).close()
    assert (files / "real/below").is_file()


@pytest.mark.parametrize("where", ["slots/p", "slots/p/1", "slots/p/1/files", "slots/p/1/files/sub"])
@pytest.mark.parametrize("instead", ["nothing", "file", "symlink", "fifo"])
def test_what_was_removed_under_the_daemon_is_made_again(
    store: BlobStore, root: Path, tmp_path: Path, where: str, instead: str
) -> None:
    manifest = Manifest("p", 1, 1024, (), 0)
    spec = SPEC
    store.metadata.write_pipeline(spec, created_at_ns=5)
    store.metadata.write_manifest(manifest)
    store.blob("p", 1, "sub/a", 3).close()
    shutil.rmtree(root / where)
    if instead == "file":
        (root / where).write_bytes(b"x")
    elif instead == "symlink":
        (tmp_path / "outside").mkdir()
        (root / where).symlink_to(tmp_path / "outside")
    elif instead == "fifo":
        os.mkfifo(root / where)
    slot = where in ("slots/p", "slots/p/1")
    assert store.metadata.restore_slot(spec, 5, manifest) is slot
    with store.fresh_blob("p", 1, "sub/a", 3) as blob:
        assert blob.created
        blob.datasync()
    assert not store.metadata.restore_slot(spec, 5, manifest)
    assert (store.metadata.load_pipeline("p"), store.metadata.pipeline_created_at("p")) == (spec, 5)
    assert store.metadata.load_manifest("p", 1) == manifest
    assert store.survey("p", 1) == {"sub/a": 3}


def test_sealed_means_size_seal_and_digest(store: BlobStore) -> None:
    for name, record in (
        ("good", SealRecord(3, "sealed", "sha256:aa")),
        ("other", SealRecord(3, "sealed", "sha256:bb")),
        ("unproven", SealRecord(3, "unverified")),
        ("unsealed", None),
    ):
        with store.blob("p", 1, name, 3) as blob:
            if record is not None:
                blob.seal(record)
    store.open_sealed("p", 1, "good", Proof(3, "sha256:aa")).close()
    for name in ("other", "unproven", "unsealed", "nowhere"):
        with pytest.raises(StoreLost):
            store.open_sealed("p", 1, name, Proof(3, "sha256:aa"))
    with pytest.raises(StoreLost, match="3 bytes and should have 4"):
        store.open_sealed("p", 1, "good", Proof(4, "sha256:aa"))


def sealed(store: BlobStore, generation: int, path: str, data: bytes) -> None:
    with store.blob("p", generation, path, len(data)) as blob:
        blob.pwrite(0, data)
        blob.seal(SealRecord(len(data), "unverified"))


def allocated(root: Path) -> int:
    """Bytes of disk below ``root``, each file once whatever its names."""
    found = {(status.st_dev, status.st_ino): status.st_blocks for path in root.rglob("*") if (status := path.lstat())}
    return 512 * sum(found.values())


def proofs(*paths: str) -> dict[str, Proof]:
    return dict.fromkeys(paths, Proof(3, None))


def test_generations_share_a_complete_file_and_each_may_go_first(store: BlobStore, root: Path) -> None:
    for path in ("a", "sub/b"):
        sealed(store, 1, path, b"abc")
    store.blob("p", 1, "partial", 3).close()
    before = allocated(root)
    given = store.share("p", 1, 2, proofs("a", "sub/b", "partial", "nowhere"))
    assert given.keys() == {"a", "sub/b"}
    assert store.shared("p", 1, 2, "sub/b") and not store.shared("p", 1, 2, "partial")
    directories = 2 * 4096 * 2  # generation and files of 2, and its sub/
    assert allocated(root) <= before + directories, "the bytes are there twice"
    for generation in (1, 2):
        blob = store.existing_blob("p", generation, "sub/b")
        assert blob is not None
        with blob:
            assert blob.pread(0, 3) == b"abc" and blob.seal_record() is not None
    with pytest.raises(StoreDamaged, match="2 names"):
        store.blob("p", 2, "a", 3)  # filling one would write into the other
    store.delete_blob("p", 2, "a")
    assert store.existing_blob("p", 2, "a") is None
    store.blob("p", 1, "a", 3).close()
    store.delete_generation("p", 1)
    assert store.existing_blob("p", 1, "sub/b") is None
    store.blob("p", 2, "sub/b", 3).close()


def test_what_is_dropped_while_it_is_shared_is_left_out(
    store: BlobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("a", "b"):
        sealed(store, 1, path, b"abc")
    link = os.link

    def late(source: str, *arguments: object, **keywords: object) -> None:
        if source == "a":
            os.unlink(root / "slots/p/1/files/a")
        link(source, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", late)
    assert store.share("p", 1, 2, proofs("a", "b")).keys() == {"b"}
    assert store.existing_blob("p", 2, "a") is None


def test_a_shared_file_is_its_slots_own_while_a_generation_is_deleted(
    store: BlobStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the renaming of the old generation into the trash and its end, the file has a name there."""
    sealed(store, 1, "sub/b", b"abc")
    store.share("p", 1, 2, proofs("sub/b"))
    seen = []
    remove = StoreTree._remove_trashed

    def watched(self: StoreTree, name: str) -> None:
        blob = store.existing_blob("p", 2, "sub/b")
        assert blob is not None
        with blob:
            seen.append(os.fstat(blob.fd).st_nlink)
        remove(self, name)

    monkeypatch.setattr(StoreTree, "_remove_trashed", watched)
    store.delete_generation("p", 1)
    assert seen == [2]


def test_a_name_elsewhere_is_refused_beside_one_in_another_generation(
    store: BlobStore, root: Path, tmp_path: Path
) -> None:
    sealed(store, 1, "a", b"abc")
    store.share("p", 1, 2, proofs("a"))
    os.link(root / "slots/p/1/files/a", tmp_path / "outside")
    for generation in (1, 2):
        with pytest.raises(StoreDamaged, match="3 names"):
            store.existing_blob("p", generation, "a")
    os.unlink(tmp_path / "outside")
    (root / "slots/q/1/files").mkdir(parents=True)
    os.link(root / "slots/p/1/files/a", root / "slots/q/1/files/a")
    with pytest.raises(StoreDamaged, match="3 names"):
        store.existing_blob("p", 2, "a")  # another pipeline's slot is elsewhere, too
    with pytest.raises(StoreDamaged, match="3 names"):
        store.existing_blob("q", 1, "a")


def test_deleting_keeps_what_is_open_and_leaves_nothing(store: BlobStore, root: Path) -> None:
    store.metadata.write_pipeline(SPEC)
    store.metadata.write_manifest(manifest_of("p", 1, "sub/a", "b"))
    with store.blob("p", 1, "sub/a", 3) as blob:
        blob.pwrite(0, b"abc")
        store.blob("p", 1, "b", 3).close()
        store.delete_blob("p", 1, "b")
        store.delete_blob("p", 1, "b")
        assert store.existing_blob("p", 1, "b") is None
        store.empty_generation("p", 1)
        assert store.existing_blob("p", 1, "sub/a") is None
        assert store.metadata.generations("p") == [1]
        assert blob.pread(0, 3) == b"abc"
    with store.blob("p", 1, "sub/a", 3) as again:
        assert again.created
        assert again.pread(0, 3) == b"\0\0\0"
        again.datasync()
    store.delete_generation("p", 1)
    store.delete_generation("p", 1)
    assert store.metadata.generations("p") == []
    assert store.metadata.pipelines() == ["p"]
    store.delete_pipeline("p")
    store.delete_pipeline("p")
    assert store.metadata.pipelines() == []
    assert os.listdir(root / "trash") == []


def test_trash_is_emptied_at_open(root: Path) -> None:
    BlobStore.open(str(root)).close()
    (root / "trash/tree/deep").mkdir(parents=True)
    (root / "trash/tree/deep/file").write_bytes(b"x")
    (root / "trash/half-written").write_bytes(b"x")
    (root / "trash/link").symlink_to(root)
    with BlobStore.open(str(root)):
        assert os.listdir(root / "trash") == []
        assert (root / "slots").is_dir()


def test_one_daemon_per_store_and_the_other_one_is_named(store: BlobStore, root: Path) -> None:
    code = (
        "import sys\nfrom instantstart_fs.store.blobstore import BlobStore\n"
        "from instantstart_fs.errors import StoreLocked\n"
        "try:\n    BlobStore.open(sys.argv[1])\nexcept StoreLocked as error:\n    print(error.message)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=30, check=True
    )
    assert f"in use by pid {os.getpid()}" in told.stdout
    store.close()
    BlobStore.open(str(root)).close()


def test_open_waits_for_the_workers_of_a_dead_daemon(root: Path) -> None:
    store = BlobStore.open(str(root))
    worker = store.worker_lock_fd()
    assert not os.get_inheritable(worker)
    second = store.worker_lock_fd()
    os.close(second)
    store.close()
    with pytest.raises(StoreLocked, match="fetch workers"):
        BlobStore.open(str(root), lock_deadline=0.05)
    opened: list[BlobStore] = []
    thread = threading.Thread(target=lambda: opened.append(BlobStore.open(str(root), lock_deadline=30)))
    thread.start()
    os.close(worker)
    thread.join(30)
    assert len(opened) == 1
    opened[0].close()


def test_filesystems_are_judged(tmp_path: Path) -> None:
    assert filesystem.judge(0xEF53, "/s") is None
    for refused in (0x794C7630, 0x65735546, 0x6969, 0x9FA0):
        with pytest.raises(StoreUnsupported, match="ext4 or xfs"):
            filesystem.judge(refused, "/s")
    for warned in (0x9123683E, 0x2FC12FC1, 0x01021994, 0x12345):
        assert filesystem.judge(warned, "/s")
    with pytest.raises(StoreUnsupported, match="proc"):
        BlobStore.open("/proc")


def test_a_read_only_filesystem_is_said_so(small_ext4: Path) -> None:
    root = small_ext4 / "store"
    BlobStore.open(str(root)).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_ext4)], check=True, timeout=30)
    with pytest.raises(StoreReadOnly, match="read-only"):
        BlobStore.open(str(root))
    with pytest.raises(StoreReadOnly, match="read-only"):
        BlobStore.open(str(small_ext4 / "new"))


def test_a_full_disk_leaves_the_old_manifest(small_ext4: Path) -> None:
    with BlobStore.open(str(small_ext4 / "store")) as store:
        old = manifest_of("p", 1, "a")
        store.metadata.write_manifest(old)
        with store.blob("p", 1, "ballast", 64 << 20) as blob, pytest.raises(StoreFull):
            for offset in range(0, 64 << 20, 4096):
                blob.pwrite(offset, bytes(4096))
        with pytest.raises(StoreFull):
            store.metadata.write_manifest(manifest_of("p", 1, *(f"{'x' * 200}{number}" for number in range(20_000))))
        assert store.metadata.load_manifest("p", 1) == old
        assert os.listdir(small_ext4 / "store/trash") == []
        store.empty_generation("p", 1)
        store.metadata.write_manifest(manifest_of("p", 1, "b"))


def test_generation_names() -> None:
    assert generation_number("12") == 12
    for name in ("", "012", "-1", "1a", "¹", "files"):
        assert generation_number(name) is None


CHILD = """
import hashlib, random, sys
from instantstart_fs.core.manifest import *
from instantstart_fs.store.blobfile import SealRecord
from instantstart_fs.store.blobstore import BlobStore, Proof
store = BlobStore.open(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    pipeline, generation = rng.choice("abc"), rng.randint(1, 3)
    verb = rng.choice(["pipeline", "manifest", "seal", "seal", "seal", "blob", "empty", "generation", "remove"])
    path = rng.choice(["x", "sub/y", "sub/deep/z"])
    if verb == "pipeline":
        store.metadata.write_pipeline(PipelineSpec(pipeline, (ModelSpec("file:///" + "s" * rng.randint(1, 5000)),)))
    elif verb == "manifest":
        files = tuple(ManifestFile(f"f{n}", n, f"f{n}") for n in range(rng.randint(0, 500)))
        model = ModelManifest("", "file:///", str(len(files)), files)
        store.metadata.write_manifest(Manifest(pipeline, generation, 8, (model,), 0))
    elif verb == "seal":
        with store.blob(pipeline, generation, path, 200_000) as blob:
            data = rng.randbytes(200_000)
            for offset in range(0, len(data), 50_000):
                blob.pwrite(offset, data[offset : offset + 50_000])
            blob.seal(SealRecord(len(data), "sealed", hashlib.sha256(data).hexdigest()))
    elif verb == "blob":
        store.delete_blob(pipeline, generation, path)
    elif verb == "empty":
        store.empty_generation(pipeline, generation)
    elif verb == "generation":
        store.delete_generation(pipeline, generation)
    else:
        store.delete_pipeline(pipeline)
"""


def test_killed_at_any_moment_nothing_is_half_there(root: Path) -> None:
    """SIGKILL at random moments (a fixed seed): what can be read is whole, what is sealed is true, trash is emptied."""
    rng = random.Random(20_261)
    sealed_seen = manifests_seen = 0
    for round_number in range(25):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), str(round_number)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.001, 0.12))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(30)
            assert child.stdout is not None
            child.stdout.close()
        with BlobStore.open(str(root)) as store:
            assert os.listdir(root / "trash") == []
            for pipeline in store.tree.list_directory():
                if pipeline in store.metadata.pipelines():
                    assert store.metadata.load_pipeline(pipeline).id == pipeline
                for generation in store.metadata.generations(pipeline):
                    manifest = store.metadata.load_manifest(pipeline, generation)
                    assert len(manifest.files) == int(manifest.models[0].revision)
                    manifests_seen += 1
                for generation in (1, 2, 3):
                    for path in ("x", "sub/y", "sub/deep/z"):
                        blob = store.existing_blob(pipeline, generation, path)
                        if blob is None:
                            continue
                        with blob:
                            record = blob.seal_record()
                            if record is not None:
                                data = blob.pread(0, record.size)
                                assert hashlib.sha256(data).hexdigest() == record.digest
                                sealed_seen += 1
    assert sealed_seen > 20
    assert manifests_seen > 20


def test_a_record_says_what_it_seals() -> None:
    """The format on disk: changing it needs a new version number."""
    assert msgspec.json.encode(SealRecord(3, "sealed", "sha256:00", 5)) == (
        b'{"size":3,"state":"sealed","digest":"sha256:00","sealed_at_ns":5,"v":1}'
    )
