"""Gives workers the files of a Stage's source as they come: whole ones, or parts of one that is still being fetched.

Of a file that streams, a worker reads what there is, while the rest is fetched; the file counts as in place only when
the source says that all of it is proven, too. What of it proves void is thrown away, and loaded anew.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping

from instantstart_fs.errors import BadWeights, PrefetchError
from instantstart_fs.prefetch.layout import PREFIX, header_length, read_layout
from instantstart_fs.prefetch.memory import allocate
from instantstart_fs.prefetch.messages import MAX_RANGES, Available, Load, Release
from instantstart_fs.prefetch.plan import BLOCK
from instantstart_fs.prefetch.sources import Arrival, OpenedFile
from instantstart_fs.prefetch.staged import StagedFile, lead_of


class Feeder:
    """In the Stage's feeding thread.

    Args:
        files: Of the Stage, by path.
        numbers: The same by number; guarded by ``changed``.
        changed: The Stage's lock.
        over: Whether the Stage has ended, or failed.
        fails: Wait a while for the Stage's failure: whether it came. The listener knows better why a worker is gone.
    """

    def __init__(
        self,
        files: Mapping[str, StagedFile],
        numbers: MutableMapping[int, StagedFile],
        changed: threading.Condition,
        over: Callable[[], bool],
        fails: Callable[[], bool],
    ) -> None:
        self._files = files
        self._numbers = numbers
        self._changed = changed
        self._over = over
        self._fails = fails
        self._fresh = itertools.count(max(numbers, default=0) + 1)

    def take(self, arrival: Arrival) -> None:
        """Take what has arrived. Raises BadWeights, PrefetchError."""
        file = self._files.get(arrival.path)
        if file is None or self._over():
            if arrival.opened is not None:
                arrival.opened.close()
            return
        try:
            if arrival.again:
                self._start_again(file)
            if arrival.opened is not None:
                file.open(arrival.opened)
            file.offered.extend(arrival.ranges)
            if arrival.complete:
                file.complete = True
            if file.given_at is None:
                self._give(file)
            else:
                self._offer(file)
            if arrival.complete:
                self._complete(file)
        except OSError as error:
            if not self._fails():
                raise PrefetchError(f"{arrival.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Note that nothing more comes."""
        for file in self._files.values():
            file.open(None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _give(self, file: StagedFile) -> None:
        """Order its worker to load it, if enough of it is there."""
        opened, planned, worker = file.opened, file.planned, file.worker
        if opened is None:
            return
        assert worker.ready is not None
        if opened.size != planned.size:
            raise BadWeights(f"{planned.path} has {opened.size} bytes and {planned.size} were planned for")
        if not file.complete and not (worker.ready.streams and self._may_begin(file, opened)):
            return
        lead = 0
        if file.complete or worker.cuda:
            # Before anything is allocated: a file that lies is refused for the price of its header.
            self._read_layout(file)
            if file.layout is not None and worker.cuda and worker.backend != "gds":
                lead = lead_of(file.layout)
        fds = [opened.fd]
        if opened.direct is not None:
            fds.append(opened.direct)
        if not worker.cuda:
            file.memory = allocate(os.path.basename(planned.path), planned.size)
            fds.append(file.memory)
        with self._changed:
            if self._over():
                # The take-down may not have seen this memory.
                file.drop_memory()
                return
            file.given_at = worker.heard_at = time.monotonic()
            worker.first_given_at = worker.first_given_at or file.given_at
        try:
            order = Load(
                file.number,
                planned.path,
                planned.size,
                planned.order,
                opened.direct is not None,
                file.memory is not None,
                lead,
                streaming=not file.complete,
            )
            file.streaming = order.streaming
            if not order.streaming:
                file.told = planned.size
                file.offered.clear()
            worker.send(order, fds)
        finally:
            if file.complete:
                file.open(None)
        self._offer(file)

    def _read_layout(self, file: StagedFile) -> None:
        if file.path.endswith(".safetensors") and file.layout is None and file.opened is not None:
            file.layout = read_layout(file.opened.fd, file.path)

    def _may_begin(self, file: StagedFile, opened: OpenedFile) -> bool:
        """Whether enough of a file that is not complete is there. A GPU's memory is laid out by its header; what is not
        proven may be anything."""
        if not file.offered or file.offered[0][0] % BLOCK:
            return False
        if not (file.worker.cuda and file.path.endswith(".safetensors")):
            return True
        start = file.offered_from_start()
        try:
            if start < PREFIX or start < PREFIX + header_length(os.pread(opened.fd, PREFIX, 0), opened.size):
                return False
            read_layout(opened.fd, file.path)
        except BadWeights:
            return False
        return True

    def _offer(self, file: StagedFile) -> None:
        """Tell the worker what can be read now."""
        while file.offered and file.streaming:
            ranges, file.offered = tuple(file.offered[:MAX_RANGES]), file.offered[MAX_RANGES:]
            with self._changed:
                if file.told == file.moved:
                    file.worker.heard_at = time.monotonic()
                file.told += sum(end - start for start, end in ranges)
            file.worker.send(Available(file.number, ranges), [])

    def _complete(self, file: StagedFile) -> None:
        self._read_layout(file)
        file.open(None)
        with self._changed:
            file.mark_ready()
            self._changed.notify_all()

    def _start_again(self, file: StagedFile) -> None:
        """Forget what was read of the file: it is void."""
        file.open(None)
        with self._changed:
            old, given = file.number, file.given_at is not None
            file.forget()
            file.layout = file.planned.layout
            if given:
                self._numbers.pop(old, None)
                file.number = next(self._fresh)
                self._numbers[file.number] = file
                if file.worker.cuda:
                    file.worker.releases += 1
        if given:
            file.drop_memory()
            file.worker.send(Release(old), [])
