"""Device memory between processes: what is taken off the owner's count, and when a worker looks again."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from instantstart_fs.errors import OutOfBudget, PrefetchError
from instantstart_fs.prefetch import DirectorySource, Stage, Stager, messages, plan, tensors
from instantstart_fs.prefetch.backends.base import Item
from instantstart_fs.prefetch.budget import CUDA_UNIT, DEVICE_RESERVE, device_limits, refusals
from instantstart_fs.prefetch.device_worker import DeviceWorker
from instantstart_fs.prefetch.layout import FileLayout, TensorLayout
from instantstart_fs.prefetch.messages import IpcHandle, Load, Settings
from instantstart_fs.prefetch.staged import StagedFile, lead_of
from instantstart_fs.prefetch.tensors import RAW
from instantstart_fs.prefetch.worker import Worker

HANDLE = IpcHandle("GPU-1", "aa", 4096, 0, "bb", 7, "cc", False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, int]]:
    """What was taken off the owner's count by hand; one GPU is here, GPU-1, whose memory CUDA does not open."""
    found: list[tuple[bytes, int]] = []

    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA error: invalid device context\nmore")

    storage = SimpleNamespace(_new_shared_cuda=refuse, _release_ipc_counter_cuda=lambda *given: found.append(given))
    cuda = SimpleNamespace(
        device_count=lambda: 1, init=lambda: None, get_device_properties=lambda _: SimpleNamespace(uuid="GPU-1")
    )
    torch = SimpleNamespace(cuda=cuda, UntypedStorage=storage, __version__="2.11.0")
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    return found


def test_memory_that_cannot_be_opened_is_let_go(counted: list[tuple[bytes, int]]) -> None:
    with pytest.raises(
        PrefetchError, match=r"CUDA error: invalid device context \(the process that owns it has ended, or .*\)$"
    ):
        tensors.from_ipc(HANDLE, 4096)
    assert counted == [(b"\xbb", 7)]


def test_memory_of_a_gpu_that_is_not_visible_is_let_go(counted: list[tuple[bytes, int]]) -> None:
    elsewhere = IpcHandle("GPU-2", *(getattr(HANDLE, name) for name in HANDLE.__struct_fields__[1:]))
    with pytest.raises(PrefetchError, match="GPU-2 is not visible to this process"):
        tensors.from_ipc(elsewhere, 4096)
    assert counted == [(b"\xbb", 7)]


def test_a_worker_looks_again_only_while_somebody_has_open_what_was_released() -> None:
    allocated = [0]
    cuda = SimpleNamespace(memory_allocated=lambda _: allocated[0], ipc_collect=lambda: None, empty_cache=lambda: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = Worker(theirs, Settings("cuda:0", ("direct",)))
        worker._torch = SimpleNamespace(cuda=cuda)
        for number in (1, 2):
            worker._items[number] = SimpleNamespace()  # type: ignore[assignment]
            worker._device_bytes[number] = 512
        allocated[0] = 1024
        worker._release(1)
        assert worker._still_open
        assert messages.from_worker.decode(ours.recv(4096)) == messages.Collected(1, lent=True)
        allocated[0] = 512
        worker._collect()
        assert not worker._still_open


def test_a_handle_of_a_newer_torch_is_opened_by_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of cudaMalloc: nothing but the version in front differs."""
    tried: list[bytes] = []

    def open_old(number: int, handle: bytes, *_: Any) -> str:
        tried.append(handle)
        if handle[0] > 2:
            raise RuntimeError(
                "received sharable handle from a future version of torch that this version does not know"
            )
        return "storage"

    released: list[Any] = []
    storage = SimpleNamespace(
        _new_shared_cuda=open_old, _release_ipc_counter_cuda=lambda *given: released.append(given)
    )
    cuda = SimpleNamespace(
        device_count=lambda: 1, init=lambda: None, get_device_properties=lambda _: SimpleNamespace(uuid="GPU-1")
    )
    torch = SimpleNamespace(cuda=cuda, UntypedStorage=storage, __version__="2.11.0")
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    handle = msgspec.structs.replace(HANDLE, handle=b"\x03cIPC".hex())
    assert tensors._opened(torch, handle) == (0, "storage")
    assert tried == [b"\x03cIPC", b"\x02cIPC"] and not released
    tried.clear()
    with pytest.raises(RuntimeError, match="future version"):  # another kind of memory: the rest differs, too
        tensors._opened(torch, msgspec.structs.replace(HANDLE, handle=b"\x03eIPC".hex()))
    assert tried == [b"\x03eIPC"] and released == [(b"\xbb", 7)]


@pytest.mark.parametrize(
    ("made", "takes", "says"),
    [
        (b"\x03c" + b"C" * RAW, b"C" * RAW, "incorrect handle size"),
        (b"C" * RAW, b"\x01c" + b"C" * RAW, "Unexpected or illegal type of shareable handle"),
    ],
    ids=["to a torch without versions", "of a torch without versions"],
)
def test_a_handle_is_opened_across_the_change_of_its_format(
    monkeypatch: pytest.MonkeyPatch, made: bytes, takes: bytes, says: str
) -> None:
    def open_one(number: int, handle: bytes, *_: Any) -> str:
        if handle != takes:
            raise RuntimeError(says)
        return "storage"

    torch = one_gpu_each("GPU-1", opens=open_one)
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    assert tensors._opened(torch, msgspec.structs.replace(HANDLE, handle=made.hex())) == (0, "storage")


def test_where_releases_of_torch_do_not_understand_each_other_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("received sharable handle from a future version of torch")

    torch = one_gpu_each("GPU-1", opens=refuse)
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    other = msgspec.structs.replace(HANDLE, handle=b"\x04eIPC".hex(), torch="2.14.0")
    with pytest.raises(
        PrefetchError, match=r"future version of torch \(made by torch 2\.14\.0, and this is 2\.11\.0\)"
    ):
        tensors.from_ipc(other, 4096)


@pytest.mark.parametrize(
    "error", [TypeError("expected tuple of 9 items"), AttributeError("type object has no attribute '_new_shared_cuda'")]
)
def test_a_torch_whose_private_calls_are_others_is_an_error_that_engines_survive(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def other(*_: Any) -> None:
        raise error

    torch = one_gpu_each("GPU-1", opens=other)
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    with pytest.raises(PrefetchError, match=r"cannot be opened: .* this is 2\.11\.0"):
        tensors.from_ipc(msgspec.structs.replace(HANDLE, torch="2.20.0"), 4096)


def test_a_torch_that_does_not_tell_uuids_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda _: SimpleNamespace(), init=lambda: None)
    torch = SimpleNamespace(cuda=cuda, UntypedStorage=SimpleNamespace(), __version__="2.3.0")
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    with pytest.raises(PrefetchError, match=r"torch 2\.3\.0 does not tell a GPU's UUID"):
        tensors.from_ipc(HANDLE, 4096)


def one_gpu_each(*uuids: str, opens: Any, peers: bool = True) -> SimpleNamespace:
    """torch, of a machine with these GPUs."""
    cuda = SimpleNamespace(
        device_count=lambda: len(uuids),
        init=lambda: None,
        get_device_properties=lambda number: SimpleNamespace(uuid=uuids[number]),
        can_device_access_peer=lambda *_: peers,
    )
    storage = SimpleNamespace(_new_shared_cuda=opens, _release_ipc_counter_cuda=lambda *_: None)
    return SimpleNamespace(cuda=cuda, UntypedStorage=storage, __version__="2.11.0")


@pytest.mark.parametrize(("peers", "device", "where"), [(True, 0, 0), (False, 0, 1), (True, 1, 1), (True, None, 1)])
def test_another_gpus_memory_is_opened_without_a_context_there(
    monkeypatch: pytest.MonkeyPatch, peers: bool, device: int | None, where: int
) -> None:
    opened: list[int] = []

    def open_one(number: int, *_: Any) -> str:
        opened.append(number)
        return "storage"

    torch = one_gpu_each("GPU-0", "GPU-1", opens=open_one, peers=peers)
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    assert tensors._opened(torch, HANDLE, device) == (where, "storage") and opened == [where]


def test_a_worker_counts_down_for_a_process_that_has_ended_and_tells_what_came_back() -> None:
    allocated, counted = [512], list[tuple[bytes, int]]()

    def count_down(reference: bytes, offset: int) -> None:
        counted.append((reference, offset))
        allocated[0] = 0  # it was released before, and this was its last user

    cuda = SimpleNamespace(memory_allocated=lambda _: allocated[0], ipc_collect=lambda: None, empty_cache=lambda: None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = Worker(theirs, Settings("cuda:0", ("direct",)))
        worker._torch = SimpleNamespace(cuda=cuda, UntypedStorage=SimpleNamespace(_release_ipc_counter_cuda=count_down))
        worker._collect()
        assert worker._still_open
        worker._abandon("bb", 7)
        assert counted == [(b"\xbb", 7)]
        assert messages.from_worker.decode(ours.recv(4096)) == messages.Collected(0, lent=False)


class Allocated:
    """A tensor over an allocation of ``size`` bytes, as ``_export`` sees it."""

    def __init__(self, size: int, lead: int = 0) -> None:
        self.size, self.lead = size, lead

    def __getitem__(self, part: slice) -> Allocated:
        return Allocated(self.size, part.start)

    def storage_offset(self) -> int:
        return self.lead

    def untyped_storage(self) -> Allocated:
        return self

    def _share_cuda_(self) -> tuple[Any, ...]:
        return 0, b"\x02c", self.size, 1 << 20, b"/torch_1_2_3", 5, b"", False


def test_a_file_lies_so_that_its_tensors_are_aligned_and_is_handed_over_without_what_is_before_it() -> None:
    layout = FileLayout(5_000, 1_208, (TensorLayout("w", "F32", (948,), 1_208, 5_000),))
    lead = lead_of(layout)
    assert (lead + layout.data_start) % 512 == 0 and 0 <= lead < 512
    made: list[int] = []

    def empty(size: int, **_: Any) -> Allocated:
        made.append(size)
        return Allocated(size)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = Worker(theirs, Settings("cuda:0", ("direct",)))
        worker._torch = SimpleNamespace(
            __version__="2.11.0", empty=empty, uint8="uint8", cuda=SimpleNamespace(memory_allocated=lambda _: sum(made))
        )
        submitted: list[Item] = []
        worker._backend = cast(Any, SimpleNamespace(submit=submitted.append))
        fd = os.open("/dev/null", os.O_RDONLY)
        worker._load(Load(4, "a.safetensors", 5_000, 0, direct=False, memory=False, lead=lead), [fd])
        assert made == [lead + 5_000] and submitted[0].target.lead == lead
        worker._export(4, 9)
        answer = messages.from_worker.decode(ours.recv(messages.MAX_PACKET))
        assert isinstance(answer, messages.Exported) and answer.handle is not None
        assert (answer.handle.size, answer.handle.offset) == (5_000, (1 << 20) + lead)


def test_opened_memory_is_closed_before_its_owner_ends_and_counters_are_unlinked(tmp_path: Path) -> None:
    counter = Path(f"/dev/shm/torch_{os.getpid()}_1_0")
    counter.write_bytes(b"")
    foreign = tmp_path / "torch_x"
    foreign.write_bytes(b"")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w.bin").write_bytes(b"x" * 64)
    source = DirectorySource(str(tmp_path / "m"))
    stage = Stage(Stager(source), plan(source.weights, None, ["cuda:0"]))
    (worker,) = stage._workers
    file = StagedFile(0, worker.plan.files[0], worker)
    stage._files["w.bin"] = file
    file.base = object()
    seen: list[Any] = []
    worker.end = lambda: seen.append(file.base)  # type: ignore[method-assign]
    stage._counters = {name.encode().hex() for name in (f"/{counter.name}", f"../..{foreign}", "../torch_1")}
    stage.close()
    assert seen == [None]
    assert not counter.exists() and foreign.exists()


def test_a_file_without_bytes_is_not_handed_over(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "empty.bin").write_bytes(b"")
    (tmp_path / "m" / "w.bin").write_bytes(b"x")
    source = DirectorySource(str(tmp_path / "m"))
    stage = Stage(Stager(source), plan(source.weights, None, ["cuda:0"]))
    (worker,) = stage._workers
    planned = next(file for file in worker.plan.files if file.path == "empty.bin")
    file = stage._files["empty.bin"] = StagedFile(0, planned, worker)
    file.ready_at = 1.0
    with pytest.raises(PrefetchError, match=r"empty\.bin has no bytes"):
        stage.export("empty.bin", timeout=1)


def test_the_budget_counts_whole_pages_of_the_device(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(b"x" * 4096)
    source = DirectorySource(str(tmp_path))
    made = plan(source.weights, None, ["cuda:0"])
    assert refusals(made, {"cuda:0": 3 * CUDA_UNIT}, what_fits=False) == ()
    with pytest.raises(OutOfBudget):
        refusals(made, {"cuda:0": 3 * CUDA_UNIT - 1}, what_fits=False)
    assert refusals(plan(source.weights, None, ["cpu"]), {"cpu": 3 * 4096}, what_fits=False) == ()


def test_of_a_gpu_what_a_context_takes_is_left_alone(tmp_path: Path) -> None:
    """An engine that starts beside it needs one, too."""
    (tmp_path / "w.bin").write_bytes(b"x")
    (worker,) = (DeviceWorker(part) for part in plan(DirectorySource(str(tmp_path)).weights, None, ["cuda:0"]).devices)
    for free, left in ((3 << 30, (3 << 30) - DEVICE_RESERVE), (100 << 20, 0)):
        worker.ready = messages.Ready("direct", (), free)
        assert device_limits([worker], {}) == {"cuda:0": left}
        assert device_limits([worker], {"cuda:0": 7}) == {"cuda:0": min(7, left)}
    assert DEVICE_RESERVE >= 500 << 20


def test_a_stage_knows_when_what_was_released_has_come_back(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"x")
    source = DirectorySource(str(tmp_path))
    stage = Stage(Stager(source), plan(source.weights, None, ["cuda:0"]))
    (worker,) = stage._workers
    worker.send = lambda *_: None  # type: ignore[method-assign]
    file = stage._files["w.bin"] = StagedFile(0, worker.plan.files[0], worker)
    file.given_at = file.ready_at = 1.0
    assert stage.wait_returned(0)
    stage.release("w.bin")
    assert not stage.wait_returned(0), "the worker has not answered"
    stage._heard(worker, messages.Collected(1, lent=True))
    assert not stage.wait_returned(0), "an engine has it open"
    stage._heard(worker, messages.Collected(0, lent=False))
    assert stage.wait_returned(0)
