"""The CUDA backend's ring of page-locked buffers, without a device: copies that happen as late as CUDA allows them to.

The device is a stand-in. What is real: the backend's threads, its files, and when it touches which memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.prefetch.backends import direct
from instantstart_fs.prefetch.backends.base import Item
from instantstart_fs.prefetch.plan import BLOCK, EXTENT
from tests.harness import random_file, wait_for

SIZE = 9 * EXTENT + 4097


class Tensor:
    """uint8, 1-D; ``memory`` is what it is a view of."""

    def __init__(self, cuda: LateCuda, memory: mmap.mmap, start: int, end: int) -> None:
        self.cuda, self.memory, self.start, self.end = cuda, memory, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> Tensor:
        start, end, _ = part.indices(len(self))
        return Tensor(self.cuda, self.memory, self.start + start, self.start + end)

    def data_ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + self.start

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking and len(self) == len(source)
        memory, start, end = weakref.ref(self), self.start, self.end

        def copy() -> None:
            target = memory()
            assert target is not None, "the target was freed while a copy to it was under way"
            target.memory[start:end] = source.memory[source.start : source.end]

        self.cuda.current.stream.append(copy)


class Event:
    def __init__(self, blocking: bool) -> None:
        assert blocking
        self.before: list[Callable[[], None]] = []

    def record(self, stream: list[Callable[[], None]]) -> None:
        self.before, stream[:] = list(stream), []

    def synchronize(self) -> None:
        for copy in self.before:
            copy()
        self.before = []


class LateCuda:
    """torch and torch.cuda: nothing is copied before somebody waits for it."""

    uint8 = "uint8"

    def __init__(self) -> None:
        self.current = threading.local()
        self.cuda = self
        self.Event = Event

    def empty(self, count: int, dtype: str, pin_memory: bool) -> Tensor:
        assert pin_memory and count & (count - 1) == 0, "torch would round it up"
        return Tensor(self, mmap.mmap(-1, count), 0, count)

    def device(self, _: str) -> Any:
        return contextlib.nullcontext()

    def set_device(self, _: str) -> None:
        pass

    def Stream(self) -> list[Callable[[], None]]:
        return []

    @contextlib.contextmanager
    def stream(self, stream: list[Callable[[], None]]) -> Iterator[None]:
        self.current.stream = stream
        yield
        self.current.stream = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    found = LateCuda()
    monkeypatch.setattr(direct, "load_torch", lambda: found)
    return found


def ring(readers: int) -> direct.DirectCuda:
    made = direct.DirectCuda("cuda:0", readers, 0.0)
    assert made.refusal() is None
    return made


def item_of(path: Path, target: Tensor, ended: Callable[[Item, Exception | None], None]) -> Item:
    fds = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    return Item(1, path.name, len(target), 0, fds, target, lambda *_: None, ended)


@pytest.mark.parametrize("readers", [1, 4])
def test_no_buffer_is_filled_again_before_its_copy_has_ended(cuda: LateCuda, tmp_path: Path, readers: int) -> None:
    backend, ended, errors = ring(readers), threading.Semaphore(0), []

    def on_end(_: Item, error: Exception | None) -> None:
        errors.append(error)
        ended.release()

    files = [random_file(tmp_path / f"{number}.gguf", SIZE, number) for number in range(2)]
    targets = [Tensor(cuda, mmap.mmap(-1, SIZE), 0, SIZE) for _ in files]
    for path, target in zip(files, targets, strict=True):
        backend.submit(item_of(path, target, on_end))
    for _ in files:
        assert ended.acquire(timeout=60)
    assert errors == [None, None]
    for path, target in zip(files, targets, strict=True):
        assert target.memory[:] == path.read_bytes()


def test_memory_that_is_released_lives_until_the_copies_to_it_have_ended(cuda: LateCuda, tmp_path: Path) -> None:
    """Freed earlier, it could be another file's already when the last bytes arrive."""
    backend, waiting, go_on = ring(1), threading.Event(), threading.Event()
    errors: list[Exception | None] = []

    def moved(*_: Any) -> None:  # the reader, with one copy told of, and the next one under way
        waiting.set()
        assert go_on.wait(30)

    path = random_file(tmp_path / "0.gguf", 4 * EXTENT, 1)
    target = Tensor(cuda, mmap.mmap(-1, 4 * EXTENT), 0, 4 * EXTENT)
    memory = weakref.ref(target.memory)
    item = item_of(path, target, lambda _, error: errors.append(error))
    item._on_moved = moved  # type: ignore[method-assign]
    backend.submit(item)
    assert waiting.wait(30)
    item.failed, item.target = True, None  # as Worker._release does
    del target
    gc.collect()
    assert memory() is not None  # of the copy that is still under way
    go_on.set()

    def freed() -> bool:
        gc.collect()
        return memory() is None

    wait_for(freed, "the memory's end", 10)
    assert errors == []


def test_page_locked_memory_that_is_not_aligned_costs_memory_and_not_the_backend(
    cuda: LateCuda, tmp_path: Path
) -> None:
    """O_DIRECT wants memory that begins at a multiple of a block."""
    asked: list[int] = []

    def empty(count: int, dtype: str, pin_memory: bool) -> Tensor:
        asked.append(count)
        return Tensor(cuda, mmap.mmap(-1, count + 64), 64, count + 64)

    cuda.empty = empty  # type: ignore[method-assign]
    made = ring(1)
    assert asked == [2 * EXTENT, 2 * EXTENT + BLOCK]
    assert len(made._ring) == 2
    assert all(slot.tensor.data_ptr() % BLOCK == 0 and len(slot.tensor) == EXTENT for slot in made._ring)


def test_the_end_of_a_file_is_told_after_all_that_was_moved(tmp_path: Path) -> None:
    """The last reader does not overtake one that is about to tell what it has read."""
    path = tmp_path / "f"
    path.write_bytes(b"12")
    told: list[str] = []
    telling, go = threading.Event(), threading.Event()

    def moved(item: Item, cached: int, disk: int) -> None:
        if cached:
            telling.set()
            assert go.wait(20)
        told.append("cached" if cached else "disk")

    target = memoryview(bytearray(2))
    item = Item(1, "f", 2, 0, (os.open(path, os.O_RDONLY), None), target, moved, lambda *_: told.append("end"))
    slow = threading.Thread(target=item.moved, args=(1, 0))
    slow.start()
    assert telling.wait(20)
    item.moved(0, 1)
    go.set()
    slow.join()
    item.close()
    assert told == ["disk", "cached", "end"]
