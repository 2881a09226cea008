"""Stages weights into device memory: starts a worker for each device, feeds it files as they come, takes it all down.

    with Stager(source).start(plan) as stage:
        stage.wait()
        state_dict = stage.tensors("cuda:0")

It reads no weights itself; the workers do. One thread feeds (it waits for the source), one thread for each worker
listens; all state is under one lock. Whatever goes wrong, anywhere, fails the whole Stage: its workers end, their
memory is free, and every waiter gets the error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec

from instantstart_fs.config.descriptors import NO_MORE, raise_file_limit
from instantstart_fs.core.weights import WeightSet
from instantstart_fs.errors import InstantStartError, PrefetchError, from_code
from instantstart_fs.prefetch import backends, messages
from instantstart_fs.prefetch.budget import cpu_limits, device_limits, refusals
from instantstart_fs.prefetch.device_worker import STOP_DEADLINE, DeviceWorker, WorkerStuck
from instantstart_fs.prefetch.feeder import Feeder
from instantstart_fs.prefetch.layout import FileLayout
from instantstart_fs.prefetch.messages import Abandoned, Export, IpcHandle, Release, Settings
from instantstart_fs.prefetch.plan import Plan
from instantstart_fs.prefetch.sources import Source, arrivals
from instantstart_fs.prefetch.staged import (
    DeviceReport,
    Exported,
    StagedFile,
    device_reports,
    ready_seconds,
    remove_counters,
)
from instantstart_fs.prefetch.tensors import NotShared, views

START_DEADLINE = 120.0
"""Seconds for a worker to be ready: importing torch and making a CUDA context, on a machine that is busy."""


class Stager:
    """``source``: who opens the files; the Stage closes it. ``backend``: "auto" or a name of backends.NAMES.

    ``readers``: threads of each worker (0: the backend's choice). ``rate``: bytes a second of each worker at most
    (0: no limit). ``budget``: device → bytes, instead of what is free. ``what_fits``: leave out models that do not fit
    rather than refuse all. ``timeout``: seconds without a byte after which a worker that has work counts as stuck.
    """

    def __init__(
        self,
        source: Source,
        *,
        backend: str = "auto",
        readers: int = 0,
        rate: float = 0.0,
        budget: Mapping[str, int] | None = None,
        what_fits: bool = False,
        timeout: float = 120.0,
    ) -> None:
        self.source = source
        self.backends = backends.order(backend)
        self.readers = readers
        self.rate = rate
        self.budget = dict(budget or {})
        self.what_fits = what_fits
        self.timeout = timeout

    def start(self, plan: Plan) -> Stage:
        """Workers started, the budget checked, nothing allocated before that; bytes are on their way when it returns.

        Raises OutOfBudget, PrefetchError (a device that is not there, no torch for CUDA). Closes the source if so."""
        stage = Stage(self, plan)
        try:
            stage._start()
        except BaseException:
            stage.close()
            raise
        return stage


class Stage:
    """Weights on their way to, or in, device memory. Made by Stager.start; a context manager; usable by any thread.

    It has more than 25 methods, 20 of them public, because it is the one object that a caller gets: waiting, account
    and access to the tensors all need the same lock and the same files.

    Every wait has a deadline. After ``close``, or leaving the ``with``, device memory is free (on the CPU: once the
    caller's own tensors are gone too)."""

    def __init__(self, stager: Stager, plan: Plan) -> None:
        self._stager = stager
        self.plan = plan
        self.refused_models: tuple[str, ...] = ()
        self._changed = threading.Condition()
        self._workers = [DeviceWorker(device) for device in plan.devices]
        self._files: dict[str, StagedFile] = {}
        self._numbers: dict[int, StagedFile] = {}
        self._exports: dict[int, messages.Exported | None] = {}
        self._tokens = itertools.count()
        self._counters: set[str] = set()
        """Names of torch's reference counters that workers made, in hexadecimal."""
        self._error: InstantStartError | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._started_at = time.monotonic()
        self._fed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- starting --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        raise_file_limit()  # a memfd of each file here; in the workers, who inherit it, up to four descriptors of each
        self._admit(cpu_limits(self.plan, self._stager.budget, what_fits=self._stager.what_fits))
        numbers = itertools.count()
        for worker in self._workers:
            for planned in worker.plan.files:
                if planned.model in self.refused_models:
                    continue
                file = StagedFile(next(numbers), planned, worker)
                self._files[planned.path] = self._numbers[file.number] = file
        for worker in self._workers:
            # All at once: importing torch and making a context takes seconds, in each of them.
            worker.start(Settings(worker.plan.device, self._stager.backends, self._stager.readers, self._stager.rate))
            self._spawn(self._listen, worker)
        self._wait_for(lambda: all(worker.ready for worker in self._workers), START_DEADLINE, "the workers' start")
        self._admit(device_limits([worker for worker in self._workers if worker.cuda], self._stager.budget))
        self._spawn(self._feed)

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"stage-{target.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _admit(self, limits: Mapping[str, int]) -> None:
        """Refuse the models that do not fit ``limits`` (bytes by device). Raises OutOfBudget."""
        self.refused_models += refusals(
            self.plan.without(self.refused_models), limits, what_fits=self._stager.what_fits
        )
        for path in [path for path, file in self._files.items() if file.planned.model in self.refused_models]:
            del self._numbers[self._files.pop(path).number]

    # -- feeding ---------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        feeder = Feeder(
            self._files,
            self._numbers,
            self._changed,
            lambda: self._closed or self._error is not None,
            lambda: self._wait_quietly(lambda: self._error is not None, STOP_DEADLINE),
        )
        try:
            for arrival in arrivals(self._stager.source):
                feeder.take(arrival)
                if self._closed:
                    return
                with self._changed:
                    for worker in self._workers:
                        self._note_end(worker)
            with self._changed:
                self._fed = True
                missing = [path for path, file in self._files.items() if file.given_at is None]
                if missing:
                    raise PrefetchError(f"{missing[0]}: never came")
                self._changed.notify_all()
        except InstantStartError as error:
            self._fail(error)
        except Exception as error:
            self._fail(PrefetchError(f"{self.plan.pipeline}: {type(error).__name__}: {error}"))
        finally:
            feeder.close()

    # -- listening -------------------------------------------------------------------------------------------------

    def _listen(self, worker: DeviceWorker) -> None:
        try:
            with contextlib.closing(worker.reports(lambda: self._is_stuck(worker))) as reports:
                for message in reports:
                    self._heard(worker, message)
            if not self._closed:
                raise PrefetchError(f"the worker of {worker.plan.device} {worker.how_it_ended()}")
        except WorkerStuck as error:
            self._fail(PrefetchError(f"{error} brought no byte for {self._stager.timeout:g} s and was killed"))
        except InstantStartError as error:
            self._fail(error)
        except (OSError, msgspec.DecodeError) as error:
            if not self._closed:
                self._fail(PrefetchError(f"the worker of {worker.plan.device}: {error}"))

    def _is_stuck(self, worker: DeviceWorker) -> bool:
        with self._changed:
            busy = any(
                file.worker is worker and file.given_at is not None and not file.released and not file.idle
                for file in self._files.values()
            )
            return busy and time.monotonic() > worker.heard_at + self._stager.timeout

    def _heard(self, worker: DeviceWorker, message: messages.FromWorker) -> None:
        with self._changed:
            worker.heard_at = time.monotonic()
            match message:
                case messages.Ready():
                    worker.ready = message
                case messages.Moved(number, cached, disk):
                    if (moved := self._numbers.get(number)) is not None:
                        moved.moved += cached + disk
                        worker.cached += cached
                        worker.disk += disk
                case messages.Loaded(number):
                    if (loaded := self._numbers.get(number)) is not None:
                        loaded.loaded = True
                        loaded.mark_ready()
                        self._note_end(worker)
                case messages.Exported():
                    if message.token in self._exports:
                        self._exports[message.token] = message
                case messages.Collected(releases, lent):
                    worker.releases -= releases
                    worker.lent = lent
                case messages.Failed(number, code, text):
                    file = self._numbers.get(number)
                    raise from_code(code, worker.failure(text, file.path if file is not None else ""))
            self._changed.notify_all()

    def _note_end(self, worker: DeviceWorker) -> None:
        if worker.finished_at is None and all(file.ready_at for file in self._files.values() if file.worker is worker):
            worker.finished_at = time.monotonic()

    def _fail(self, error: InstantStartError) -> None:
        with self._changed:
            if self._error is not None or self._closed:
                return
            self._error = error
            self._changed.notify_all()
        self._take_down()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait_for(self, condition: Callable[[], bool], timeout: float | None, what: str) -> None:
        if not self._wait_quietly(lambda: condition() or self._error is not None or self._closed, timeout):
            raise PrefetchError(f"{self.plan.pipeline}: {what}: not within {timeout:g} s")
        if self._error is not None:
            raise self._error
        if self._closed:
            raise PrefetchError(f"{self.plan.pipeline}: the stage was closed")

    def _wait_quietly(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every file is in place. ``timeout``: seconds in all; without one the wait still ends, since a
        stuck worker and a source without progress each fail the stage. Raises what made it fail, PrefetchError."""
        self._wait_for(lambda: self.done, timeout, "not all is staged")

    def wait_file(self, path: str, timeout: float | None = None) -> None:
        """Wait until this file is in place. Raises as ``wait``, and PrefetchError for a path that is not in the
        plan."""
        file = self._file(path)
        self._wait_for(lambda: file.ready_at is not None or file.released, timeout, f"{path} is not staged")

    def wait_changed(self, timeout: float) -> None:
        """Return at the next progress, at the latest after ``timeout`` seconds. Raises what made the stage fail."""
        with self._changed:
            self._changed.wait(timeout)
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        return self._fed and all(file.ready_at is not None or file.released for file in self._files.values())

    @property
    def error(self) -> InstantStartError | None:
        return self._error

    @property
    def weights(self) -> WeightSet:
        return self._stager.source.weights

    # -- account ---------------------------------------------------------------------------------------------------

    def progress(self) -> tuple[DeviceReport, ...]:
        """Return a report for each device, in the plan's order."""
        with self._changed:
            return device_reports(self._workers, self._files.values(), self._started_at, time.monotonic())

    def ready_seconds(self) -> dict[str, float]:
        """Model → seconds from the start until all of it was in place; models that are not, are left out."""
        with self._changed:
            return ready_seconds(self._files.values(), self._started_at)

    def place(self, device: str) -> str:
        """The place (tensors.place_of) of a device, as its worker names it; "" if it is not known."""
        return next((w.ready.place for w in self._workers if w.plan.device == device and w.ready is not None), "")

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the files that are staged, or will be, and are not released."""
        return tuple(path for path, file in self._files.items() if not file.released)

    def is_ready(self, path: str) -> bool:
        """Whether this file is in place and not released. Raises PrefetchError for an unknown path."""
        file = self._file(path)
        return file.ready_at is not None and not file.released

    def wait_returned(self, timeout: float) -> bool:
        """Wait until no other process has memory of released files open, at most ``timeout`` seconds; whether it is
        so."""
        return self._wait_quietly(
            lambda: self._closed or not any(worker.releases or worker.lent for worker in self._workers), timeout
        )

    def worker_pids(self) -> tuple[int, ...]:
        return tuple(worker.process.pid for worker in self._workers if worker.process is not None)

    # -- what came of it -------------------------------------------------------------------------------------------

    def tensors(self, device: str, *, model: str | None = None) -> dict[str, Any]:
        """name → torch.Tensor of every safetensors file on that device (``model``: of that one alone): views into the
        files' buffers, zero copy. For CUDA the worker's memory is opened in this process.

        Raises PrefetchError when something is not in place yet, was released, or two files have one name in common
        (pass ``model``, or use ``file_tensors``).
        """
        found: dict[str, Any] = {}
        for path in self._paths_of(device, model):
            if self._files[path].layout is None:
                continue
            for name, tensor in self.file_tensors(path).items():
                if name in found:
                    raise PrefetchError(f"{name} is in more than one file on {device}; name the model, or the file")
                found[name] = tensor
        return found

    def file_tensors(self, path: str) -> dict[str, Any]:
        """``tensors`` of one safetensors file."""
        file = self._ready(path)
        if file.layout is None:
            raise PrefetchError(f"{path} is no safetensors file; take its bytes")
        return views(self._tensor(path), file.layout, path)

    def bytes_of(self, path: str) -> Any:
        """The whole file as one uint8 tensor on its device: for *.engine, *.gguf, *.bin. Raises as ``tensors``."""
        return self._tensor(path)

    def layout(self, path: str) -> FileLayout | None:
        """None: not safetensors. Known once the file has come. Raises PrefetchError for an unknown path."""
        return self._file(path).layout

    def export(self, path: str, timeout: float = 30.0) -> Exported:
        """Make a handle to the file's memory for another process. Raises as ``tensors``."""
        file = self._ready(path)
        if file.memory is not None:
            try:
                return Exported(path, file.planned.size, file.layout, os.dup(file.memory), None)
            except OSError as error:
                raise PrefetchError(f"{path} cannot be handed over: {NO_MORE}") from error
        if not file.planned.size:
            raise PrefetchError(f"{path} has no bytes, so there is no device memory to hand over")
        with self._changed:
            token = next(self._tokens)
            self._exports[token] = None
        try:
            file.worker.send(Export(file.number, token), [])
            self._wait_for(lambda: self._exports[token] is not None, timeout, f"{path}: no handle")
            answer = self._exports[token]
        except OSError as error:
            raise PrefetchError(f"{path}: the worker of {file.worker.plan.device} is gone") from error
        finally:
            with self._changed:
                self._exports.pop(token, None)
        if answer is None or answer.handle is None:
            raise NotShared(f"{path} cannot be handed over: {answer.error if answer else 'no answer'}")
        self._counters.add(answer.handle.reference_handle)
        return Exported(path, file.planned.size, file.layout, None, answer.handle)

    def abandoned(self, exported: Exported) -> None:
        """Take back what was exported to a process that has ended: a killed one has counted down nothing, and torch
        would keep the memory for as long as its worker lives. Not for one that lives: its memory would be used anew
        beneath it. Idempotent."""
        if exported.handle is not None:
            order = Abandoned(exported.handle.reference_handle, exported.handle.reference_offset)
            with contextlib.suppress(OSError):  # the worker has ended, and its memory with it
                self._file(exported.path).worker.send(order, [])

    def release(self, path: str) -> None:
        """Free this file's memory; tensors that are still in use keep theirs. Idempotent."""
        file = self._file(path)
        with self._changed:
            if file.released:
                return
            file.released = True
            if file.worker.cuda and file.given_at is not None:
                file.worker.releases += 1
            self._changed.notify_all()
        file.drop_memory()  # not under the lock: the kernel takes a second for a large file's pages
        with contextlib.suppress(OSError):
            file.worker.send(Release(file.number), [])

    def cancel(self) -> None:
        """Close the stage: nothing is kept of a half-staged pipeline."""
        self.close()

    def close(self) -> None:
        """End everything and free its memory. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._take_down()
        current = threading.current_thread()
        for thread in self._threads:
            if thread is not current:
                thread.join(STOP_DEADLINE)

    def _take_down(self) -> None:
        self._stager.source.close()
        with self._changed:
            # Before the workers end: CUDA checks memory of another process when it is closed, inside a destructor,
            # where an error ends this process.
            for file in self._files.values():
                file.drop_memory()
                file.released = True
        for worker in self._workers:
            if worker.socket is not None:
                with contextlib.suppress(OSError):
                    worker.socket.shutdown(socket.SHUT_RDWR)
        for worker in self._workers:
            worker.end()
        remove_counters(self._counters)

    def _paths_of(self, device: str, model: str | None) -> list[str]:
        if device not in [worker.plan.device for worker in self._workers]:
            raise PrefetchError(f"{device}: nothing is staged there")
        return [
            path
            for path, file in self._files.items()
            if file.worker.plan.device == device and model in (None, file.planned.model)
        ]

    def _file(self, path: str) -> StagedFile:
        file = self._files.get(path)
        if file is None:
            raise PrefetchError(f"{path} is not among what is staged")
        return file

    def _ready(self, path: str) -> StagedFile:
        if self._error is not None:
            raise self._error
        file = self._file(path)
        if file.released or self._closed:
            raise PrefetchError(f"{path} was released")
        if file.ready_at is None:
            raise PrefetchError(f"{path} is not in place yet; wait() first")
        return file

    def _tensor(self, path: str) -> Any:
        file = self._ready(path)

        def handle() -> IpcHandle:
            exported = self.export(path).handle
            assert exported is not None
            return exported

        return file.tensor(handle)
