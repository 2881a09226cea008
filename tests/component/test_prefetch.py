"""Stager and Stage on CPU devices, with real workers and real files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.common import evict, resident_bytes
from instantstart_fs.errors import BadWeights, InstantStartError, OutOfBudget, PrefetchError, UsageError
from instantstart_fs.prefetch import DirectorySource, Stage, Stager, backends, plan
from instantstart_fs.prefetch.layout import BITS
from instantstart_fs.prefetch.plan import BLOCK, EXTENT
from instantstart_fs.prefetch.reader import CACHE_STEP, read_extent
from instantstart_fs.prefetch.sources import Arrival, OpenedFile, open_file
from tests.harness import alive, children, memory_cgroup, random_file, wait_for

MIB = 1024 * 1024


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]], *, seed: int = 1, pad: int = 8) -> None:
    """Of random bytes; ``pad`` 1 gives data that starts anywhere, which the format allows."""
    import random

    entries, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        count = BITS[dtype]
        for dimension in shape:
            count *= dimension
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count // 8]}
        position += count // 8
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % pad)
    if pad == 1 and len(header) % 2 == 0:
        header += b" "
    data = bytearray(random.Random(seed).randbytes(position))
    for name, (dtype, _) in tensors.items():
        if dtype == "BOOL":
            start, end = entries[name]["data_offsets"]
            data[start:end] = bytes(byte & 1 for byte in data[start:end])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


EVERY_DTYPE = {
    f"{dtype}{suffix}": (dtype, shape)
    for dtype in sorted(BITS)
    if not dtype.startswith("F6")  # torch has none
    for suffix, shape in (("", [3, 4]), (".empty", [0, 2]), *([] if dtype == "F4" else [(".scalar", [])]))
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Three shards, the second larger than an extent with a tail that no block ends at, and files of other formats."""
    root = tmp_path / "checkpoint"
    root.mkdir()
    write_safetensors(root / "model-00001-of-00003.safetensors", EVERY_DTYPE)
    big = {"big.bias": ("F32", [7]), "big.weight": ("BF16", [1001, 9001])}
    write_safetensors(root / "model-00002-of-00003.safetensors", big, seed=2)
    write_safetensors(root / "model-00003-of-00003.safetensors", {"odd": ("F32", [50]), "b": ("U8", [3])}, pad=1)
    random_file(root / "rank0.engine", 3 * MIB + 17, 5)
    random_file(root / "small.gguf", 100, 6)
    (root / "config.json").write_text("{}")
    return root


def start(root: Path, devices: list[str] | None = None, **options: Any) -> Stage:
    source = DirectorySource(str(root))
    return Stager(source, **options).start(plan(source.weights, None, devices or ["cpu"]))


def test_tensors_equal_those_of_load_file(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    with start(checkpoint) as stage:
        stage.wait(60)
        tensors = stage.tensors("cpu")
        for path in sorted(checkpoint.glob("*.safetensors")):
            for name, wanted in load_file(str(path)).items():
                mine = tensors.pop(name)
                assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, name
                same = mine.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
                assert torch.equal(*same), name
        assert tensors == {}
        for name in ("rank0.engine", "small.gguf"):
            assert stage.bytes_of(name).numpy().tobytes() == (checkpoint / name).read_bytes()
        with pytest.raises(PrefetchError, match="no safetensors"):
            stage.file_tensors("small.gguf")


def test_tensors_are_views_of_one_buffer_and_outlive_the_stage(checkpoint: Path) -> None:
    pytest.importorskip("torch")
    with start(checkpoint) as stage:
        stage.wait(60)
        tensors = stage.file_tensors("model-00002-of-00003.safetensors")
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        assert len(storages) == 1
        before = tensors["big.bias"].clone()
    assert (tensors["big.bias"].view(dtype=before.dtype) == before).logical_or(before.isnan()).all()


@pytest.mark.parametrize("backend", ["direct", "mmap", "gds"])
@pytest.mark.parametrize("cached", [True, False])
def test_every_backend_brings_every_byte(checkpoint: Path, backend: str, cached: bool) -> None:
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        if not cached:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert data
    with start(checkpoint, ["cpu", "cpu:1"], backend=backend) as stage:
        stage.wait(60)
        for report in stage.progress():
            assert report.bytes == report.total == report.cached + report.disk
            if backend == "gds":
                assert report.backend == "direct" and report.refusals == (("gds", "only for CUDA devices"),)
            else:
                assert report.backend == backend and report.refusals == ()
            if backend == "direct" and cached:
                assert report.disk == 0
        for path in stage.paths:
            exported = stage.export(path)
            assert exported.fd is not None
            assert os.pread(exported.fd, exported.size, 0) == (checkpoint / path).read_bytes()
            os.close(exported.fd)


def test_what_the_page_cache_has_is_taken_from_there_and_the_rest_from_the_disk(tmp_path: Path) -> None:
    path = random_file(tmp_path / "half.gguf", 4 * EXTENT, 1)
    os.sync()
    evict([path])
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(file.read(EXTENT + EXTENT // 2)) == EXTENT + EXTENT // 2
    there = resident_bytes(path)
    with start(tmp_path) as stage:
        stage.wait(60)
        (report,) = stage.progress()
        # Asking whether a page is there may bring it in, where the disk is quick: a page of each extent.
        assert there <= report.cached <= there + 4 * BLOCK and report.cached + report.disk == 4 * EXTENT
        # What came from the disk left nothing there but what asking brought in: a step, and a page of each extent.
        assert resident_bytes(path) <= there + CACHE_STEP + 4 * BLOCK
        exported = stage.export("half.gguf")
        assert exported.fd is not None
        assert os.pread(exported.fd, exported.size, 0) == path.read_bytes()
        os.close(exported.fd)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="none of auto"):
        backends.order("warp")


@pytest.mark.parametrize("cut", [1, 5000, 9_000_000])
def test_a_truncated_file_is_a_clear_error(checkpoint: Path, cut: int) -> None:
    path = checkpoint / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    with start(checkpoint) as stage, pytest.raises(BadWeights, match=r"model-00002.*cut short"):
        stage.wait(60)


def test_a_lying_header_costs_no_memory(checkpoint: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}).encode()
    (checkpoint / "model-00000-of-00003.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with start(checkpoint) as stage, pytest.raises(BadWeights, match="cut short, or"):
        stage.wait(60)


def test_what_does_not_fit_is_refused_before_anything_starts(checkpoint: Path) -> None:
    source = DirectorySource(str(checkpoint))
    made = plan(source.weights, None, ["cpu"])
    with pytest.raises(OutOfBudget, match=r"cpu: \d+ bytes needed, 1000000 may be taken"):
        Stager(source, budget={"cpu": 1_000_000}).start(made)


def end_of(stage: Stage, before: int) -> InstantStartError:
    """What made it fail; everything is freed by then, and every worker is gone."""
    wait_for(lambda: stage.error is not None, "the error", 30)
    wait_for(lambda: memfds() == before, "the memory", 10)
    wait_for(lambda: not any(alive(pid) for pid in stage.worker_pids()), "the workers' end", 15)
    assert stage.error is not None
    return stage.error


def test_memory_that_cannot_be_made_is_a_clear_error(checkpoint: Path) -> None:
    before, (soft, hard) = memfds(), resource.getrlimit(resource.RLIMIT_FSIZE)
    source = Dripping(DirectorySource(str(checkpoint)))
    with Stager(source).start(plan(source.weights, None, ["cpu", "cpu:1"])) as stage:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))  # the second shard is larger
        try:
            for _ in source.weights.files:
                source.let.release()
            error = end_of(stage, before)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, OutOfBudget)
    assert "model-00002-of-00003.safetensors: no memory for 18" in error.message


def test_a_worker_that_cannot_map_the_memory_is_a_clear_error(checkpoint: Path) -> None:
    before = memfds()
    source = Dripping(DirectorySource(str(checkpoint)))
    with Stager(source).start(plan(source.weights, None, ["cpu", "cpu:1"])) as stage:
        for pid in stage.worker_pids():
            resource.prlimit(pid, resource.RLIMIT_AS, (1 * MIB, 1 * MIB))
        for _ in source.weights.files:
            source.let.release()
        error = end_of(stage, before)
    assert isinstance(error, OutOfBudget) and "in this process: Cannot allocate memory" in error.message


def many(root: Path) -> Path:
    """300 files: the worker has three or four descriptors of each that waits its turn, the Stage one."""
    root.mkdir()
    for number in range(300):
        (root / f"{number:03}.gguf").write_bytes(number.to_bytes(2, "little"))
    return root


def test_a_worker_that_may_not_open_more_files_is_a_clear_error(tmp_path: Path) -> None:
    before = memfds()
    source = Dripping(DirectorySource(str(many(tmp_path / "many"))))
    with Stager(source, rate=1.0).start(plan(source.weights, None, ["cpu"])) as stage:
        (worker,) = stage.worker_pids()
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (64, 64))
        for _ in source.weights.files:
            source.let.release()
        error = end_of(stage, before)
    assert type(error) is PrefetchError
    assert error.message.endswith(".gguf: this process may not open more files (ulimit -n)"), error.message


def test_a_low_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    root, before = many(tmp_path / "many"), memfds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"the hard limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with start(root, rate=1e3) as stage:  # as slow as lets all of them wait
            wait_for(lambda: memfds() == before + 300 or stage.error, "all files", 30)
            stage.wait(60)
            for number, path in enumerate(sorted(stage.paths)):
                exported = stage.export(path)
                assert exported.fd is not None
                assert os.pread(exported.fd, 2, 0) == number.to_bytes(2, "little")
                os.close(exported.fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_whose_memory_runs_out_is_a_clear_error(checkpoint: Path) -> None:
    """By the kernel's own hand: in a memory cgroup with room for the worker, but not for the weights."""
    before = memfds()
    random_file(checkpoint / "big.gguf", 64 * MIB, 7)
    source = Dripping(DirectorySource(str(checkpoint)))
    with memory_cgroup(f"isfs-oom-{os.getpid()}", 32 * MIB) as place:
        with Stager(source).start(plan(source.weights, None, ["cpu"])) as stage:
            (worker,) = stage.worker_pids()
            (place / "cgroup.procs").write_text(str(worker))
            for _ in source.weights.files:
                source.let.release()
            error = end_of(stage, before)
        killed = (place / "memory.oom_control").read_text()
    assert "oom_kill 1" in killed
    assert error.message == "the worker of cpu was killed by SIGKILL (by hand, or because memory ran out)"


def test_memory_that_runs_out_in_a_read_is_not_taken_for_a_damaged_file(checkpoint: Path) -> None:
    path = checkpoint / "model-00002-of-00003.safetensors"
    with open(path, "rb") as file, mmap.mmap(-1, EXTENT) as memory:
        # Pages that cannot be written are to a read what pages that cannot be had are.
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address_of(memory)), EXTENT, 1) == 0
        view = memoryview(memory)
        with pytest.raises(OutOfBudget, match=r"model-00002.*no memory left at byte 0"):
            read_extent(file.fileno(), None, 0, EXTENT, view, path.name)
        view.release()


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_of_several_models_those_that_fit_are_staged(tmp_path: Path) -> None:
    for model, count in (("asr", 1000), ("llm", 100_000), ("tts", 10)):
        (tmp_path / model).mkdir()
        write_safetensors(tmp_path / model / "model.safetensors", {"w": ("F32", [count])})
    source = DirectorySource(str(tmp_path), models=True)
    made = plan(source.weights, None, ["cpu"])
    with Stager(source, budget={"cpu": 50_000}, what_fits=True).start(made) as stage:
        stage.wait(60)
        assert stage.refused_models == ("llm",)
        assert set(stage.ready_seconds()) == {"asr", "tts"}
        if pytest.importorskip("torch"):
            assert set(stage.tensors("cpu", model="asr")) == {"w"}
            with pytest.raises(PrefetchError, match="more than one file"):
                stage.tensors("cpu")


class Dripping:
    """A source whose files come when they are let."""

    def __init__(self, inner: DirectorySource) -> None:
        self.inner = inner
        self.let = threading.Semaphore(0)
        self.closed = threading.Event()

    @property
    def weights(self) -> Any:
        return self.inner.weights

    def files(self) -> Iterator[OpenedFile]:
        for opened in self.inner.files():
            while not self.let.acquire(timeout=0.01):
                if self.closed.is_set():
                    opened.close()
                    raise PrefetchError("the lease was given up")
            yield opened

    def close(self) -> None:
        self.closed.set()


class Streaming(Dripping):
    """Tells what the test gives it. ``parts``: what is told; None ends it."""

    def __init__(self, inner: DirectorySource) -> None:
        super().__init__(inner)
        self.parts: queue.Queue[Arrival | None] = queue.Queue()

    def arrivals(self) -> Iterator[Arrival]:
        while (arrival := self.parts.get(timeout=60)) is not None:
            yield arrival


def test_parts_of_a_file_are_loaded_as_they_come_and_used_when_all_is_proven(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "whole.safetensors", {"w": ("U8", [3 << 20])}, seed=5)
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "m.safetensors"
    path.write_bytes(bytes(len(content)))  # as the store's: all zeros where nothing came yet
    source = Streaming(DirectorySource(str(tmp_path / "d")))

    def fill(start: int, end: int, data: bytes = content) -> tuple[int, int]:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data[start:end])
        return start, end

    def opened() -> OpenedFile:
        return open_file(str(path), "m.safetensors", len(content))

    def tell(*ranges: tuple[int, int], **more: Any) -> None:
        source.parts.put(Arrival("m.safetensors", more.pop("opened", None), ranges, **{"complete": False, **more}))

    mib = 1 << 20
    with Stager(source).start(plan(source.weights, None, ["cpu"])) as stage:
        tell(fill(mib, 2 * mib), opened=opened())
        wait_moved(stage, mib)
        tell(fill(0, mib))
        wait_moved(stage, 2 * mib)
        with pytest.raises(PrefetchError, match="not in place"):
            stage.export("m.safetensors")
        # It proves to be another: what was read is void.
        tell(again=True)
        other = content[:-5] + b"other"
        path.unlink()
        path.write_bytes(bytes(len(content)))
        tell(fill(0, mib, other), fill(2 * mib, len(other), other), opened=opened())
        wait_moved(stage, len(other) - mib)
        tell(fill(mib, 2 * mib, other), complete=True)
        source.parts.put(None)
        stage.wait(30)
        exported = stage.export("m.safetensors")
        assert exported.fd is not None
        with open(exported.fd, "rb") as file:
            assert file.read(len(other)) == other
        assert stage.progress()[0].bytes == len(other)


def wait_moved(stage: Stage, count: int) -> None:
    deadline = time.monotonic() + 30
    while stage.progress()[0].bytes != count:
        assert time.monotonic() < deadline, stage.progress()
        stage.wait_changed(0.05)


def test_all_that_is_loaded_is_not_in_place_before_it_is_proven(checkpoint: Path) -> None:
    source = Streaming(DirectorySource(str(checkpoint)))
    files = {file.path: file.size for file in source.weights.files}
    with Stager(source).start(plan(source.weights, None, ["cpu"])) as stage:
        for path, size in files.items():
            source.parts.put(Arrival(path, open_file(str(checkpoint / path), path, size), ((0, size),), complete=False))
        wait_moved(stage, sum(files.values()))
        assert not any(stage.is_ready(path) for path in files)
        for path in files:
            source.parts.put(Arrival(path, None))
            stage.wait_file(path, 30)
        source.parts.put(None)
        stage.wait(30)


def test_files_are_staged_as_they_come(checkpoint: Path) -> None:
    source = Dripping(DirectorySource(str(checkpoint)))
    paths = [file.path for file in source.weights.files]
    with Stager(source).start(plan(source.weights, None, ["cpu"])) as stage:
        for position, path in enumerate(paths):
            assert not stage.done
            source.let.release()
            stage.wait_file(path, 30)
            if position + 1 < len(paths):
                with pytest.raises(PrefetchError, match="not within"):
                    stage.wait_file(paths[position + 1], 0.01)
        stage.wait(10)
    assert source.closed.is_set()


@pytest.mark.parametrize("when", ["idle", "loading", "done"])
def test_a_killed_worker_is_a_clear_error_and_frees_the_memory(checkpoint: Path, when: str) -> None:
    before = memfds()
    source = Dripping(DirectorySource(str(checkpoint)))
    rate = 12e6 if when == "loading" else 0.0
    with Stager(source, rate=rate).start(plan(source.weights, None, ["cpu", "cpu:1"])) as stage:
        if when != "idle":
            for _ in source.weights.files:
                source.let.release()
            wait_for(lambda: stage.progress()[0].bytes > 0, "the first bytes")
        if when == "done":
            stage.wait(60)
        victims = stage.worker_pids()
        os.kill(victims[0], signal.SIGKILL)
        wait_for(lambda: stage.error is not None, "the error", 10)
        with pytest.raises(PrefetchError, match=r"worker of cpu was killed by SIGKILL"):
            stage.wait(10)
        wait_for(lambda: not any(alive(pid) for pid in victims), "the other worker's end", 15)
        wait_for(lambda: memfds() == before, "the memory", 10)
        with pytest.raises(PrefetchError):
            stage.bytes_of("small.gguf")


def held_by(pid: int) -> str:
    """What this process maps, and which memfds it has open."""
    return Path(f"/proc/{pid}/maps").read_text() + "".join(opened(pid, "/memfd:"))


def opened(pid: int | str, prefix: str) -> list[str]:
    """What this process has open whose name begins so."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return [target for target in found if target.startswith(prefix)]


def memfds() -> int:
    return len(opened("self", "/memfd:instantstart"))


def test_a_worker_that_cannot_be_started_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(checkpoint / "config.json"))
    with pytest.raises(PrefetchError, match=r"worker of cpu cannot be started: .*config.json: Permission denied"):
        start(checkpoint)


def test_a_worker_without_a_socket_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two: the first one ends."""
    made: list[int] = []
    before = set(children(os.getpid()))
    socketpair = socket.socketpair

    def one(*arguments: Any) -> tuple[socket.socket, socket.socket]:
        if made:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(1)
        return socketpair(*arguments)

    monkeypatch.setattr(socket, "socketpair", one)
    with pytest.raises(PrefetchError, match=r"worker of cpu:1 cannot be started: Too many open files"):
        start(checkpoint, ["cpu", "cpu:1"])
    assert not set(children(os.getpid())) - before


def test_a_stuck_worker_is_killed_at_its_deadline(checkpoint: Path) -> None:
    with (
        start(checkpoint, timeout=1.0, rate=1.0) as stage,
        pytest.raises(PrefetchError, match="no byte for 1 s and was killed"),
    ):
        stage.wait(30)


def test_workers_end_with_the_process_that_started_them(checkpoint: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys, time\n"
        "from instantstart_fs.prefetch import DirectorySource, Stager, plan\n"
        "source = DirectorySource(sys.argv[1])\n"
        "stage = Stager(source).start(plan(source.weights, None, ['cpu']))\n"
        "stage.wait(60)\n"
        "print(stage.worker_pids()[0], flush=True)\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(checkpoint)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        worker = int(process.stdout.readline())
        process.kill()
        process.wait(10)
    wait_for(lambda: not alive(worker), "the worker's end", 10)


def test_closing_in_the_middle_ends_everything(checkpoint: Path) -> None:
    stage = start(checkpoint, rate=12e6)
    wait_for(lambda: stage.progress()[0].bytes > 0 or stage.error, "the first bytes")
    pids = stage.worker_pids()
    stage.cancel()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(PrefetchError, match="closed"):
        stage.wait(1)


def test_release_frees_a_file_and_no_other(checkpoint: Path) -> None:
    before = memfds()
    with start(checkpoint) as stage:
        stage.wait(60)
        assert memfds() == before + 5
        stage.release("small.gguf")
        stage.release("small.gguf")
        assert memfds() == before + 4
        (worker,) = stage.worker_pids()
        wait_for(lambda: "memfd" not in held_by(worker), "the worker's last hold of what is whole", 10)
        assert "small.gguf" not in stage.paths
        with pytest.raises(PrefetchError, match="released"):
            stage.export("small.gguf")
        exported = stage.export("rank0.engine")
        assert exported.fd is not None and exported.layout is None
        os.close(exported.fd)
    assert memfds() == before


@pytest.mark.parametrize("backend", ["direct", "mmap"])
def test_a_file_that_is_released_on_its_way_is_not_waited_for(checkpoint: Path, backend: str) -> None:
    with start(checkpoint, rate=12e6, backend=backend) as stage:
        wait_for(lambda: stage.progress()[0].bytes > 0, "the first bytes")
        stage.release("model-00002-of-00003.safetensors")
        (worker,) = stage.worker_pids()
        wait_for(lambda: "model-00002" not in held_by(worker), "its memory's end in the worker", 20)
        stage.wait(60)
        wait_for(lambda: not opened(worker, f"{checkpoint}/"), "the end of its descriptors", 10)
        assert stage.is_ready("small.gguf") and not stage.is_ready("model-00002-of-00003.safetensors")


def test_devices_are_loaded_at_the_same_time(tmp_path: Path) -> None:
    """Throttled to 16 MB/s each, four devices of 8 MB take as long as one, not four times as long."""
    for number in range(4):
        random_file(tmp_path / f"{number}.gguf", 8_000_000, number)
    with start(tmp_path, [f"cpu:{number}" for number in range(4)], rate=16e6) as stage:
        stage.wait(60)
        reports = stage.progress()
    assert [report.total for report in reports] == [8_000_000] * 4
    assert min(report.loading for report in reports) >= 0.45  # each was throttled …
    assert (
        max(report.loading for report in reports) < sum(report.loading for report in reports) / 2
    )  # … beside the others


def test_a_file_that_changes_its_size_is_refused(checkpoint: Path) -> None:
    source = DirectorySource(str(checkpoint))
    made = plan(source.weights, None, ["cpu"])
    random_file(checkpoint / "small.gguf", 101, 1)
    with Stager(source).start(made) as stage, pytest.raises(BadWeights, match="has 101 bytes and should have 100"):
        stage.wait(60)


def test_a_device_that_is_not_there_is_said(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    source = DirectorySource(str(checkpoint))
    with pytest.raises(PrefetchError, match=r"^cuda:\d+: torch \S+ finds no CUDA device"):
        Stager(source).start(plan(source.weights, None, ["cuda:0"]))
