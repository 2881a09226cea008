"""A CUDA device for torch's CPU build, so that what is written for a GPU runs from end to end where none is.

    PYTHONPATH=tests/fake_cuda INSTANTSTART_FAKE_CUDA=DIR python bench/gpu.py --size 0.125GiB --shards 4

Python imports this module by its name in every process, so the workers have the device, too. Device memory is a memfd
for each allocation of MEMFD bytes and more, which another process opens through /proc, as CUDA's IPC opens memory. DIR
holds what the processes must know of each other: how much each has, and which memory is open elsewhere.

What it is like: memory goes with the process that owns it; what was handed out stays counted after its release until
the one that has it counts down, for ever if that one was killed; a full device refuses. What it is not like: nothing is
asynchronous, nothing is fast, and "page-locked" memory is memory. INSTANTSTART_FAKE_CUDA_FAIL names a call that raises
(POINTS); INSTANTSTART_FAKE_CUDA_GPUS is the number of devices; CUDA_VISIBLE_DEVICES is obeyed.

INSTANTSTART_FAKE_MISSING names packages that cannot be imported, with or without the device: as on a bare machine.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import mmap
import os
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MEMFD = 64 * 1024
TOTAL = int(os.environ.get("INSTANTSTART_FAKE_CUDA_BYTES", str(1 << 30)))
POINTS = (
    "init",
    "empty",
    "pinned",
    "mem_get_info",
    "stream",
    "record",
    "event",
    "synchronize",
    "share",
    "open",
    "collect",
)
"""Where INSTANTSTART_FAKE_CUDA_FAIL lets it fail: in which call."""


def fail_at(point: str) -> None:
    if os.environ.get("INSTANTSTART_FAKE_CUDA_FAIL") == point:
        raise RuntimeError(f"CUDA error: {point} failed, as it was told to")


def uuids() -> list[str]:
    """Of the visible devices, in their order."""
    found = [f"fake-{number:04d}" for number in range(int(os.environ.get("INSTANTSTART_FAKE_CUDA_GPUS", "1")))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    names = [name.removeprefix("GPU-") for name in visible.split(",") if name]
    return [found[int(name)] if name.isdecimal() else name for name in names]


class Ledger:
    """What the processes know of each other, as files: ``own.PID.BLOCK`` with a size, ``open.BLOCK.SERIAL`` for
    each handle that was handed out, and not counted down."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def own(self, block: str, size: int) -> None:
        (self._directory / f"own.{os.getpid()}.{block}").write_text(str(size))

    def disown(self, block: str) -> None:
        (self._directory / f"own.{os.getpid()}.{block}").unlink(missing_ok=True)

    def handed_out(self, reference: str) -> None:
        (self._directory / f"open.{reference}").touch()

    def count_down(self, reference: str) -> None:
        (self._directory / f"open.{reference}").unlink(missing_ok=True)

    def is_open(self, block: str) -> bool:
        return any(self._directory.glob(f"open.{block}.*"))

    def owned(self, pid: int | None = None) -> int:
        """Bytes of all living processes, or of this one."""
        total = 0
        for file in self._directory.glob(f"own.{pid or '*'}.*"):
            if Path("/proc", file.name.split(".")[1]).exists():
                with contextlib.suppress(OSError, ValueError):
                    total += int(file.read_text())
        return total


class Device:
    """The allocations of this process."""

    def __init__(self, torch: Any, directory: Path) -> None:
        self.torch = torch
        self.ledger = Ledger(directory)
        self._lock = threading.RLock()
        self._blocks: dict[int, tuple[str, int, int, int]] = {}
        """address → (block, size, descriptor, device); of another process's memory (reference, size, -1, device)."""
        self._released: dict[str, int] = {}
        """Blocks that were released while another process has them open → descriptors."""
        self._count = 0
        self._empty = torch.empty
        self.current = 0

    def allocate(self, size: int, number: int) -> Any:
        """``size`` bytes as a uint8 tensor."""
        fail_at("empty")
        if self.ledger.owned() + size > TOTAL:
            raise self.torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        if size < MEMFD:
            return self._empty(size, dtype=self.torch.uint8)
        with self._lock:
            self._count += 1
            block = f"{os.getpid()}-{self._count}"
        fd = os.memfd_create(block, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self.ledger.own(block, size)
        return self._tensor(mmap.mmap(fd, size), block, 0, size, fd, number)

    def _tensor(self, memory: mmap.mmap, block: str, offset: int, size: int, fd: int, number: int) -> Any:
        tensor = self.torch.frombuffer(memory, dtype=self.torch.uint8, offset=offset, count=size)
        address = tensor.data_ptr()
        with self._lock:
            self._blocks[address] = (block, size, fd, number)
        # A view keeps the storage, and the storage this object's buffer: it goes with the last of them.
        weakref.finalize(memory, self._freed, address).atexit = False
        return tensor

    def _freed(self, address: int) -> None:
        with self._lock:
            block, _, fd, _ = self._blocks.pop(address)
            if fd < 0:
                self.ledger.count_down(block)
            elif self.ledger.is_open(block):
                self._released[block] = fd
            else:
                os.close(fd)
                self.ledger.disown(block)

    def collect(self) -> None:
        fail_at("collect")
        with self._lock:
            for block in [block for block in self._released if not self.ledger.is_open(block)]:
                os.close(self._released.pop(block))
                self.ledger.disown(block)

    def of(self, address: int) -> tuple[int, tuple[str, int, int, int]] | None:
        """The block in which an address lies, and where that begins."""
        with self._lock:
            for start, found in self._blocks.items():
                if start <= address < start + found[1]:
                    return start, found
        return None

    def share(self, address: int) -> tuple[Any, ...]:
        fail_at("share")
        found = self.of(address)
        if found is None:
            raise RuntimeError("CUDA error: invalid argument (no memory of the device)")
        _, (block, size, fd, number) = found
        handle = b"\x03c" + json.dumps(f"/proc/{os.getpid()}/fd/{fd}").encode()
        with self._lock:
            self._count += 1
            reference = f"{block}.{self._count}"
        self.ledger.handed_out(reference)
        return number, handle, size, 0, reference.encode(), 0, b"event", False

    def open(self, number: int, handle: bytes, size: int, offset: int, reference: bytes) -> Any:
        fail_at("open")
        path = json.loads(handle[2:])
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"CUDA error: invalid resource handle ({error.strerror})") from error
        try:
            memory = mmap.mmap(fd, offset + size)
        finally:
            os.close(fd)
        return self._tensor(memory, reference.decode(), offset, size, -1, number).untyped_storage()


class Stream:
    def __init__(self, *_: object, **__: object) -> None:
        fail_at("stream")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Event:
    def __init__(self, **_: object) -> None:
        fail_at("event")

    def record(self, *_: object) -> None:
        fail_at("record")

    def synchronize(self) -> None:
        fail_at("synchronize")

    def query(self) -> bool:
        return True


def number_of(device: Any) -> int | None:
    """0 of "cuda:0", "cuda" and torch's own; None of the CPU."""
    text = str(device)
    return int(text.partition(":")[2] or 0) if text.startswith("cuda") else None


def install(torch: Any) -> None:
    device = Device(torch, Path(os.environ["INSTANTSTART_FAKE_CUDA"]))
    plain_empty, plain_to, plain_like = torch.empty, torch.Tensor.to, torch.empty_like
    plain_device = torch._C.TensorBase.device

    def empty(*size: Any, **options: Any) -> Any:
        if options.pop("pin_memory", False):
            fail_at("pinned")
        number = number_of(options.get("device"))
        if number is None:
            return plain_empty(*size, **options)
        options.pop("device")
        shape = plain_empty(*size, **options, device="meta")
        raw = device.allocate(shape.nbytes, number)
        return raw.view(shape.dtype).view(shape.shape) if shape.nbytes else plain_empty(shape.shape, dtype=shape.dtype)

    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        target = options.get("device", arguments[0] if arguments else None)
        if number_of(target) is None:
            return plain_to(self, *arguments, **options)
        return empty(self.shape, dtype=self.dtype, device=target).copy_(self)

    def empty_like(tensor: Any, **options: Any) -> Any:
        if tensor.is_cuda:
            return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return plain_like(tensor, **options)

    def device_of(self: Any) -> Any:
        found = device.of(self.data_ptr()) if plain_device.__get__(self).type == "cpu" else None
        return plain_device.__get__(self) if found is None else torch.device("cuda", found[1][3])

    def mem_get_info(_: Any = None) -> tuple[int, int]:
        fail_at("mem_get_info")
        return TOTAL - device.ledger.owned(), TOTAL

    def properties(which: Any = 0) -> SimpleNamespace:
        number = which if isinstance(which, int) else number_of(which) or 0
        return SimpleNamespace(uuid=uuids()[number], total_memory=TOTAL, name="fake device", major=9, minor=0)

    def set_device(which: Any) -> None:
        device.current = which if isinstance(which, int) else number_of(which) or 0

    def nothing(*_: object) -> None: ...

    torch.empty, torch.Tensor.to, torch.empty_like = empty, to, empty_like
    torch.Tensor.device = property(device_of)
    torch.Tensor.is_cuda = property(lambda self: device_of(self).type == "cuda")
    torch.UntypedStorage._share_cuda_ = lambda self: device.share(self.data_ptr())
    torch.UntypedStorage._new_shared_cuda = staticmethod(
        lambda number, handle, size, offset, reference, *_: device.open(number, handle, size, offset, reference)
    )
    torch.UntypedStorage._release_ipc_counter_cuda = staticmethod(
        lambda reference, _: device.ledger.count_down(reference.decode())
    )
    fakes = {
        "is_available": lambda: bool(uuids()), "device_count": lambda: len(uuids()), "init": lambda: fail_at("init"),
        "set_device": set_device, "current_device": lambda: device.current, "get_device_properties": properties,
        "get_device_name": lambda which=0: properties(which).name, "mem_get_info": mem_get_info,
        "memory_allocated": lambda _=None: device.ledger.owned(os.getpid()), "empty_cache": nothing,
        "ipc_collect": device.collect, "synchronize": nothing, "Stream": Stream, "Event": Event,
        "can_device_access_peer": lambda *_: True, "stream": lambda stream: stream,
        "device": lambda _: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)


class AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as the others do, and installs the device once it has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is None or found.loader is None:
            return None
        self._real = found.loader
        found.loader = self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        install(module)


class Missing(importlib.abc.MetaPathFinder):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if os.environ.get("INSTANTSTART_FAKE_MISSING"):
    sys.meta_path.insert(0, Missing(os.environ["INSTANTSTART_FAKE_MISSING"].split(",")))
if os.environ.get("INSTANTSTART_FAKE_CUDA"):
    sys.meta_path.insert(0, AfterTorch())
