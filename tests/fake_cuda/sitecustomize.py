"""A CUDA device for torch's CPU build, so that what is written for a GPU runs from end to end where none is.

    PYTHONPATH=tests/fake_cuda INSTANTSTART_FAKE_CUDA=DIR python bench/gpu.py --size 0.125GiB --shards 4

Python imports this module by its name in every process, so the workers have the device, too. Device memory is a memfd
for each allocation of MEMFD bytes and more, which another process opens through /proc, as CUDA's IPC opens memory. DIR
holds what the processes must know of each other: how much each has, and which memory is open elsewhere.

What it is like: memory goes with the process that owns it; what was handed out stays counted after its release until
the one that has it counts down, for ever if that one was killed; a full device refuses; each process that works on a
device has a context of CONTEXT bytes there; a copy that need not be waited for happens when somebody waits for its
stream, and not before; an error of such a copy comes then, and every call of that process fails after it.
CUDA_VISIBLE_DEVICES is obeyed as CUDA does: by number or (the beginning of a) UUID, up to the first that is none. What
it is not like: nothing is fast, and "page-locked" memory is memory.

What can be wrong with a device, each by a variable that begins with INSTANTSTART_FAKE_CUDA_:

    GPUS=2          the number of devices
    BYTES, CONTEXT  of one device, and of a process's context on it
    MEMFD=1         the fewest bytes of an allocation that can be handed over (others are not counted, and quick)
    FAIL=point      this call raises (POINTS)
    ERROR=text      what the error of FAIL says, in the place of its own words
    PINNED=bytes    so much memory can be page-locked by one process, and no more
    EXCLUSIVE=1     compute mode Exclusive_Process: the first process has the device for itself
    MIG=1           every process sees one instance of its own of the first GPU, under that GPU's UUID
    PEERS=0         no device can reach another one's memory
    GDS=works       torch.cuda.gds reads files; GDS=fails: cuFile does not know their filesystem
    DRIVER=text     there is no device, and torch.cuda.init says this
    FORMAT=2        the version of the handles that this torch makes, and the newest that it understands (3)
    TORCH=2.11.0    the release that torch says it is
    LATE=abort      closing another process's memory after that has ended ends this one
    EXPANDABLE=1    a torch whose allocator makes expandable segments unless PYTORCH_ALLOC_CONF says otherwise

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


def setting(name: str, otherwise: str = "") -> str:
    return os.environ.get(f"INSTANTSTART_FAKE_CUDA_{name}", otherwise)


TOTAL = int(setting("BYTES", str(1 << 30)))
CONTEXT = int(setting("CONTEXT", str(4 << 20)))
FORMAT = int(setting("FORMAT", "3"))
MEMFD = int(setting("MEMFD", str(64 * 1024)))
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
    "copy",
)
"""Where FAIL lets it fail: in which call; "copy": in a copy that nobody waits for, later."""

_sticky: list[str] = []
"""The error after which nothing works in this process any more."""


def fail_at(point: str) -> None:
    if _sticky:
        raise RuntimeError(_sticky[0])
    if setting("FAIL") == point:
        raise RuntimeError(f"CUDA error: {setting('ERROR') or f'{point} failed, as it was told to'}")


def uuids() -> list[str]:
    """Of the visible devices, in their order."""
    if setting("DRIVER"):
        return []
    found = [f"fake-{number:04d}" for number in range(int(setting("GPUS", "1")))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen: list[str] = []
        for name in visible.split(","):
            number = int(name) if name.strip().isdecimal() else None
            if number is not None:
                these = found[number : number + 1]
            else:
                these = [uuid for uuid in found if name and f"GPU-{uuid}".startswith(name.strip())]
            if len(these) != 1 or these[0] in chosen:
                break
            chosen += these
        found = chosen
    return found[:1] if setting("MIG") else found


class Ledger:
    """What the processes know of each other, as files: ``own.PID.BLOCK`` with a size and the device's UUID,
    ``context.PID.UUID``, and ``open.BLOCK.SERIAL`` for each handle that was handed out, and not counted down."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def own(self, block: str, size: int, uuid: str) -> None:
        (self._directory / f"own.{os.getpid()}.{block}").write_text(f"{size} {uuid}")

    def disown(self, block: str) -> None:
        (self._directory / f"own.{os.getpid()}.{block}").unlink(missing_ok=True)

    def handed_out(self, reference: str) -> None:
        (self._directory / f"open.{reference}").touch()

    def count_down(self, reference: str) -> None:
        (self._directory / f"open.{reference}").unlink(missing_ok=True)

    def is_open(self, block: str) -> bool:
        return any(self._directory.glob(f"open.{block}.*"))

    def owned(self, uuid: str | None, pid: int | None = None) -> int:
        """Bytes of all living processes, or of this one, without contexts; on this device, or (None) on all."""
        total = 0
        for file in self._directory.glob(f"own.{pid or '*'}.*"):
            if Path("/proc", file.name.split(".")[1]).exists():
                with contextlib.suppress(OSError, ValueError):
                    size, at = file.read_text().split()
                    total += int(size) if uuid in (None, at) else 0
        return total

    def contexts(self, uuid: str) -> list[int]:
        """The living processes that have a context on this device."""
        pids = [int(file.name.split(".")[1]) for file in self._directory.glob(f"context.*.{uuid}")]
        return [pid for pid in pids if Path("/proc", str(pid)).exists()]

    def context(self, uuid: str) -> None:
        """Make one of this process, unless it has one."""
        mine = self._directory / f"context.{os.getpid()}.{uuid}"
        if mine.exists():
            return
        if setting("EXCLUSIVE") and self.contexts(uuid):
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
        mine.touch()


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
        self._copy = torch.Tensor.copy_
        self.current = 0
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.on = threading.local()
        """``stream``: the one that this thread works on; None, or no such thing: the default one, which is waited for
        at once."""
        self.pinned = 0

    def context(self, number: int) -> str:
        """The UUID of a device that this process is about to use; it has a context there from now on."""
        if setting("DRIVER"):
            raise RuntimeError(setting("DRIVER"))
        if number >= len(uuids()):
            raise RuntimeError("CUDA error: invalid device ordinal" if uuids() else "No CUDA GPUs are available")
        uuid = uuids()[number]
        self.ledger.context(uuid)
        return uuid

    def used(self, number: int) -> int:
        uuid = self.context(number)
        return self.ledger.owned(uuid) + CONTEXT * len(self.ledger.contexts(uuid))

    def pin(self, tensor: Any) -> Any:
        fail_at("pinned")
        limit = setting("PINNED")
        if limit and self.pinned + tensor.nbytes > int(limit):
            raise RuntimeError("CUDA error: out of memory")
        self.pinned += tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), self._unpinned, tensor.nbytes).atexit = False
        return tensor

    def _unpinned(self, size: int) -> None:
        self.pinned -= size

    def copy(self, target: Any, source: Any, non_blocking: bool = False) -> Any:
        stream = getattr(self.on, "stream", None)
        if stream is None or not non_blocking or not (target.is_cuda or source.is_cuda):
            return self._copy(target, source)
        if _sticky:
            raise RuntimeError(_sticky[0])
        stream.pending.append(lambda: self._copy(target, source))
        return target

    def synchronize(self) -> None:
        """Wait for all streams of this process, as freeing memory does, too."""
        for stream in list(self.streams):
            perform(stream.pending)

    def allocate(self, size: int, number: int) -> Any:
        """``size`` bytes as a uint8 tensor."""
        fail_at("empty")
        if self.used(number) + size > TOTAL:
            raise self.torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        if size < MEMFD:
            return self._empty(size, dtype=self.torch.uint8)
        with self._lock:
            self._count += 1
            block = f"{os.getpid()}-{self._count}"
        fd = os.memfd_create(block, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self.ledger.own(block, size, uuids()[number])
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
                if setting("LATE") and not Path("/proc", block.partition("-")[0]).exists():
                    os.abort()
                self.ledger.count_down(block)
            elif self.ledger.is_open(block):
                self._released[block] = fd
            else:
                os.close(fd)
                self.ledger.disown(block)

    def collect(self) -> None:
        fail_at("collect")
        self.synchronize()
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
        said = [f"/proc/{os.getpid()}/fd/{fd}", instance(), uuids()[number]]
        handle = bytes([FORMAT]) + (b"e" if expandable() else b"c") + json.dumps(said).encode()
        with self._lock:
            self._count += 1
            reference = f"{block}.{self._count}"
        self.ledger.handed_out(reference)
        return number, handle, size, 0, reference.encode(), 0, b"event", False

    def open(self, number: int, handle: bytes, size: int, offset: int, reference: bytes) -> Any:
        fail_at("open")
        if handle[0] > FORMAT:
            raise RuntimeError(
                "received sharable handle from a future version of torch that this version does not know"
            )
        if handle[1:2] == b"e":
            raise RuntimeError("pidfd_getfd: Operation not permitted")
        path, owner, uuid = json.loads(handle[2:])
        if owner != instance():
            raise RuntimeError("CUDA error: operation not supported")
        if self.context(number) != uuid and setting("PEERS") == "0":
            raise RuntimeError("CUDA error: peer access is not supported between these two devices")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"CUDA error: invalid resource handle ({error.strerror})") from error
        try:
            memory = mmap.mmap(fd, offset + size)
        finally:
            os.close(fd)
        return self._tensor(memory, reference.decode(), offset, size, -1, number).untyped_storage()


def instance() -> str:
    """The instance of MIG that this process has: each process tree begun with a variable of another value another."""
    return setting("MIG")


def expandable() -> bool:
    """Whether memory is made so that it is handed over by descriptors."""
    said = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    return "expandable_segments:True" in said or bool(setting("EXPANDABLE") and "expandable_segments" not in said)


def perform(copies: list[Any]) -> None:
    """Do what was left for later. An error of it is the process's last."""
    while copies:
        work = copies.pop(0)
        if setting("FAIL") == "copy":
            _sticky.append(f"CUDA error: {setting('ERROR', 'an illegal memory access was encountered')}")
        fail_at("copy")
        work()


class Stream:
    def __init__(self, *_: object, **__: object) -> None:
        fail_at("stream")
        self.pending: list[Any] = []
        """Copies that nobody has waited for."""
        made.streams.add(self)

    def synchronize(self) -> None:
        perform(self.pending)


class Event:
    def __init__(self, **_: object) -> None:
        fail_at("event")
        self.before: list[Any] = []

    def record(self, stream: Stream | None = None) -> None:
        fail_at("record")
        if stream is not None:
            self.before = stream.pending  # and what the stream did before that

    def synchronize(self) -> None:
        fail_at("synchronize")
        perform(self.before)

    def query(self) -> bool:
        return not self.before


@contextlib.contextmanager
def working_on(stream: Stream | None) -> Any:
    before = getattr(made.on, "stream", None)
    made.on.stream = stream
    try:
        yield
    finally:
        made.on.stream = before


def number_of(device: Any) -> int | None:
    """0 of "cuda:0", "cuda" and torch's own; None of the CPU."""
    text = str(device)
    return int(text.partition(":")[2] or 0) if text.startswith("cuda") else None


made: Device
"""This process's, once torch has been imported."""


def install(torch: Any) -> None:
    global made
    device = made = Device(torch, Path(os.environ["INSTANTSTART_FAKE_CUDA"]))
    plain_empty, plain_to, plain_like = torch.empty, torch.Tensor.to, torch.empty_like
    plain_device = torch._C.TensorBase.device

    def empty(*size: Any, **options: Any) -> Any:
        if options.pop("pin_memory", False):
            return device.pin(plain_empty(*size, **options))
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
        where = options.get("device") or tensor.device
        if number_of(where) is not None:
            return empty(tensor.shape, dtype=options.get("dtype") or tensor.dtype, device=where)
        return plain_like(tensor, **options)

    def device_of(self: Any) -> Any:
        found = device.of(self.data_ptr()) if plain_device.__get__(self).type == "cpu" else None
        return plain_device.__get__(self) if found is None else torch.device("cuda", found[1][3])

    def mem_get_info(_: Any = None) -> tuple[int, int]:
        fail_at("mem_get_info")
        return TOTAL - device.used(index(_)), TOTAL

    def index(which: Any) -> int:
        return device.current if which is None else which if isinstance(which, int) else number_of(which) or 0

    def properties(which: Any = 0) -> SimpleNamespace:
        if setting("DRIVER"):
            raise RuntimeError(setting("DRIVER"))
        return SimpleNamespace(
            uuid=uuids()[index(which)],
            total_memory=TOTAL,
            name="fake device (no GPU: its rates say nothing)",
            major=9,
            minor=0,
        )

    def init() -> None:
        fail_at("init")
        device.context(device.current)

    class Runtime:
        """torch.cuda.cudart(): page-locks what exists already."""

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            if setting("PINNED") and device.pinned + size > int(setting("PINNED")):
                return 2  # cudaErrorMemoryAllocation
            if address in registered:
                return 712  # cudaErrorHostMemoryAlreadyRegistered
            registered[address] = size
            device.pinned += size
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            if address not in registered:
                return 713  # cudaErrorHostMemoryNotRegistered
            device.pinned -= registered.pop(address)
            return 0

    registered: dict[int, int] = {}

    def synchronize(_: Any = None) -> None:
        fail_at("synchronize")
        device.synchronize()

    def set_device(which: Any) -> None:
        device.current = which if isinstance(which, int) else number_of(which) or 0

    def load_storage(fd: int, storage: Any, offset: int) -> None:
        if setting("GDS") == "fails":
            raise RuntimeError("cuFileHandleRegister failed: GPUDirect Storage not supported on current file system")
        buffer = mmap.mmap(-1, -(-storage.nbytes() // mmap.PAGESIZE) * mmap.PAGESIZE)  # O_DIRECT wants whole pages
        count = os.preadv(fd, [buffer], offset)
        into = plain_empty(0, dtype=torch.uint8).set_(storage)
        into.copy_(torch.frombuffer(bytearray(buffer[:count]), dtype=torch.uint8))

    def nothing(*_: object) -> None: ...

    torch.empty, torch.Tensor.to, torch.empty_like = empty, to, empty_like
    torch.Tensor.copy_ = lambda self, source, non_blocking=False: device.copy(self, source, non_blocking)
    if setting("TORCH"):
        torch.__version__ = setting("TORCH")
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
        "is_available": lambda: bool(uuids()), "device_count": lambda: len(uuids()), "init": init, "cudart": Runtime,
        "set_device": set_device, "current_device": lambda: device.current, "get_device_properties": properties,
        "get_device_name": lambda which=0: properties(which).name, "mem_get_info": mem_get_info,
        "memory_allocated": lambda _=None: device.ledger.owned(None, os.getpid()), "empty_cache": nothing,
        "ipc_collect": device.collect, "synchronize": synchronize, "Stream": Stream, "Event": Event,
        "can_device_access_peer": lambda *_: setting("PEERS") != "0", "stream": working_on,
        "device": lambda _: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    if setting("GDS"):
        torch._C._gds_register_handle, torch._C._gds_deregister_handle = lambda fd: fd, nothing
        torch._C._gds_load_storage = load_storage


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


def without(names: list[str]) -> None:
    """Let these packages be missing: for who imports them, and for who only asks whether they are there."""
    sys.meta_path.insert(0, Missing(names))
    plain = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in names else plain(name, package)

    importlib.util.find_spec = find_spec


if os.environ.get("INSTANTSTART_FAKE_MISSING"):
    without(os.environ["INSTANTSTART_FAKE_MISSING"].split(","))
if os.environ.get("INSTANTSTART_FAKE_CUDA"):
    sys.meta_path.insert(0, AfterTorch())
