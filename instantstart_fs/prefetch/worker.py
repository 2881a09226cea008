"""The process of one device: receives files over a socket and loads their bytes into the device's memory.

    python -m instantstart_fs.prefetch.worker FD '{"device": …}'

For CUDA it owns the memory, and lives until the Stage closes the socket. For the CPU the memory is the Stage's own
memfds. It exits, which frees its memory, when the socket ends: no other process has to clean up.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from typing import Any

import msgspec

from instantstart_fs.config.descriptors import NO_MORE
from instantstart_fs.errors import InstantStartError, OutOfBudget, PrefetchError
from instantstart_fs.ipc import fd_passing
from instantstart_fs.prefetch import messages
from instantstart_fs.prefetch.backends import choose
from instantstart_fs.prefetch.backends.base import Backend, Item, Refusals
from instantstart_fs.prefetch.device_errors import first_line, meaning, no_device
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.memory import Memfd, mapped
from instantstart_fs.prefetch.messages import (
    MAX_FDS,
    MAX_PACKET,
    Abandoned,
    Available,
    Collected,
    Export,
    Exported,
    Failed,
    FromWorker,
    IpcHandle,
    Load,
    Loaded,
    Moved,
    Ready,
    Release,
    Settings,
)
from instantstart_fs.prefetch.numa import bind
from instantstart_fs.prefetch.tensors import place_of

REPORT_INTERVAL = 0.05
"""Seconds between two reports of one file's progress, at least."""

COLLECT_INTERVAL = 0.2
"""Seconds between two looks at device memory that was released while an engine had it open."""


class Worker:
    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        self._socket = connection
        self._settings = settings
        self._cuda = settings.device.startswith("cuda")
        self._torch: Any = None
        self._items: dict[int, Item] = {}
        self._streaming: set[int] = set()
        self._send_lock = threading.Lock()
        self._progress: dict[int, list[float]] = {}
        self._progress_lock = threading.Lock()
        self._backend: Backend | None = None
        self._ready: Ready
        self._place = ""
        self._device_bytes: dict[int, int] = {}
        self._still_open = False
        """Whether somebody still has open what was released: then it is collected later."""

    def run(self) -> None:
        """Obey orders until the other end closes."""
        try:
            self._begin()
        except Exception as error:
            self._send(failure(-1, error))
            return
        assert self._backend is not None
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            while True:
                if not poll.poll(COLLECT_INTERVAL * 1000 if self._still_open else None):
                    self._collect()
                    if not self._still_open:
                        self._send(Collected(0, lent=False))
                    continue
                packet, fds, _ = fd_passing.receive(self._socket, MAX_PACKET, MAX_FDS)
                if not packet:
                    return
                match messages.to_worker.decode(packet):
                    case Load() as load:
                        self._load(load, fds)
                    case Available(number, ranges):
                        self._available(number, ranges)
                    case Export(number, token):
                        self._export(number, token)
                    case Release(number):
                        self._release(number)
                    case Abandoned(reference, offset):
                        self._abandon(reference, offset)
        except OSError:
            return

    def _begin(self) -> None:
        settings = self._settings
        free = None
        if self._cuda:
            self._check_device()
        self._backend, refusals = choose(
            settings.backends, settings.device, settings.readers, settings.rate, self._changed
        )
        if self._cuda:
            free = int(self._torch.cuda.mem_get_info(settings.device)[0])
        self._place = place_of(settings.device)
        self._ready = Ready(self._backend.name, refusals, free, self._place, self._backend.streams)
        self._send(self._ready)

    def _changed(self, backend: str, refusals: Refusals) -> None:
        """Tell that another backend goes on. It gets its files from the first one, whole ones where that took such."""
        self._send(msgspec.structs.replace(self._ready, backend=backend, refusals=refusals))

    def _check_device(self) -> None:
        torch, device = load_torch(), self._settings.device
        self._torch = torch
        if not torch.cuda.is_available():
            why = no_device(torch)
            raise PrefetchError(
                f"{device}: torch {torch.__version__} finds no CUDA device here{f': {why}' if why else ''}"
            )
        place_of(device)
        torch.cuda.set_device(device)
        torch.cuda.init()
        bind(torch.cuda.get_device_properties(device))

    def _load(self, load: Load, fds: list[int]) -> None:
        if len(fds) != load.descriptors:  # the kernel drops those that do not fit
            for descriptor in fds:
                os.close(descriptor)
            self._send(Failed(load.number, PrefetchError.code, NO_MORE))
            return
        plain = fds.pop(0)
        direct = fds.pop(0) if load.direct else None
        fd = fds.pop(0) if load.memory else None
        memory = Memfd(fd) if fd is not None else None
        try:
            target: Any
            if fd is not None:
                target = memoryview(mapped(fd))
            else:
                before = self._allocated()
                whole = self._torch.empty(load.lead + load.size, dtype=self._torch.uint8, device=self._settings.device)
                target = whole[load.lead :]
                self._device_bytes[load.number] = self._allocated() - before
        except Exception as error:
            os.close(plain)
            if direct is not None:
                os.close(direct)
            self._send(failure(load.number, error))
            return
        item = Item(
            load.number, load.path, load.size, load.order, (plain, direct), target, self._moved, self._ended, memory
        )
        self._items[load.number] = item
        assert self._backend is not None
        if load.size == 0:
            self._ended(item, None)
        elif load.streaming:
            self._streaming.add(load.number)
        else:
            self._backend.submit(item)

    def _available(self, number: int, ranges: tuple[tuple[int, int], ...]) -> None:
        item = self._items.get(number)
        if item is None or item.failed:
            return
        assert self._backend is not None
        for start, end in ranges:
            self._backend.submit(item, start, end)

    def _moved(self, item: Item, cached: int, disk: int) -> None:
        if item.number in self._streaming:  # what comes next may take its time
            self._send(Moved(item.number, cached, disk))
            return
        with self._progress_lock:
            state = self._progress.setdefault(item.number, [0, 0, time.monotonic()])
            state[0] += cached
            state[1] += disk
            if time.monotonic() < state[2] + REPORT_INTERVAL:
                return
            del self._progress[item.number]
        self._send(Moved(item.number, int(state[0]), int(state[1])))

    def _ended(self, item: Item, error: Exception | None) -> None:
        if error is None:  # otherwise another reader may be inside a call
            item.close()
        with self._progress_lock:
            state = self._progress.pop(item.number, None)
        if state is not None:
            self._send(Moved(item.number, int(state[0]), int(state[1])))
        if isinstance(item.target, memoryview):
            item.target = item.memory = None  # the Stage has a mapping of its own
        self._send(Loaded(item.number) if error is None else failure(item.number, error))

    def _export(self, number: int, token: int) -> None:
        item = self._items.get(number)
        try:
            if item is None or item.target is None:
                raise PrefetchError("was released")
            lead = int(item.target.storage_offset())
            _, handle, size, offset, reference, at, event, sync = item.target.untyped_storage()._share_cuda_()
            # Of the whole allocation; the file alone is handed over.
            size, offset = size - lead, offset + lead
        except Exception as error:
            self._send(Exported(number, token, None, failure(number, error).message))
            return
        self._send(
            Exported(
                number,
                token,
                IpcHandle(
                    self._place,
                    handle.hex(),
                    size,
                    offset,
                    reference.hex(),
                    at,
                    event.hex(),
                    bool(sync),
                    str(self._torch.__version__),
                ),
            )
        )

    def _release(self, number: int) -> None:
        item = self._items.pop(number, None)
        self._streaming.discard(number)
        if item is None:
            return
        item.failed = True  # a reader that is still at it drops what it has, and the last one its descriptors
        item.target = item.memory = None
        if self._cuda:
            del item
            del self._device_bytes[number]
            self._collect()
            self._send(Collected(1, self._still_open))

    def _abandon(self, reference: str, offset: int) -> None:
        """Count down for a process that has ended. Harmless where it had done so: each handle has a count of its own,
        which torch compares with "more than 0" and does not use again."""
        with contextlib.suppress(RuntimeError, ValueError):  # the counter is gone with the file that it counted
            self._torch.UntypedStorage._release_ipc_counter_cuda(bytes.fromhex(reference), offset)
        self._collect()
        self._send(Collected(0, self._still_open))

    def _collect(self) -> None:
        """Return unused memory to the device: first what others had open of what was released, then all of it. An
        engine's own reference may outlive its release by a moment, so this is asked again."""
        self._torch.cuda.ipc_collect()
        self._torch.cuda.empty_cache()  # waits for copies that are under way
        self._still_open = self._allocated() > sum(self._device_bytes.values())

    def _allocated(self) -> int:
        """Bytes of the device that are this process's, what others still have open of it among them."""
        return int(self._torch.cuda.memory_allocated(self._settings.device))

    def _send(self, message: FromWorker) -> None:
        with self._send_lock, contextlib.suppress(OSError):  # the Stage is gone: run() sees it too
            self._socket.send(messages.encode(message))


def failure(number: int, error: Exception) -> Failed:
    if isinstance(error, InstantStartError):
        return Failed(number, error.code, error.message)
    line = first_line(error)
    if type(error).__name__ == "OutOfMemoryError":
        return Failed(number, OutOfBudget.code, f"the device has no memory left: {line}"[:2000])
    means = meaning(line)
    return Failed(
        number, PrefetchError.code, (f"{line} ({means})" if means else f"{type(error).__name__}: {line}")[:2000]
    )


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    Worker(connection, messages.settings.decode(sys.argv[2].encode())).run()
    # A thread may sit in a read that no longer ends; the memory goes with the process.
    os._exit(0)


if __name__ == "__main__":
    main()
