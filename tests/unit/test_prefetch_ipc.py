"""Device memory between processes: what is taken off the owner's count, and when a worker looks again."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from instantstart_fs.errors import PrefetchError
from instantstart_fs.prefetch import tensors
from instantstart_fs.prefetch.messages import IpcHandle, Settings
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
    torch = SimpleNamespace(cuda=cuda, UntypedStorage=storage)
    monkeypatch.setattr(tensors, "load_torch", lambda: torch)
    return found


def test_memory_that_cannot_be_opened_is_let_go(counted: list[tuple[bytes, int]]) -> None:
    with pytest.raises(PrefetchError, match=r"cannot be opened: CUDA error: invalid device context$"):
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
        allocated[0] = 512
        worker._collect()
        assert not worker._still_open
