"""Bounds the driver's waiting: until a call's deadline, and no longer for a daemon or a mount that never answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from instantstart_fs.control.client import Client
from instantstart_fs.errors import ControlError, ReadDeadline

_T = TypeVar("_T")


class Deadline:
    """A moment until which a call may last. ``alive`` tells whether somebody still waits for its answer."""

    def __init__(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        self._end = time.monotonic() + seconds
        self._alive = alive

    def left(self) -> float:
        """Return the seconds that are left, more than 0.05. Raises ReadDeadline when they are over or nobody waits."""
        left = self._end - time.monotonic()
        if left <= 0.05 or not self._alive():
            raise ReadDeadline("the call's deadline has passed; what it began goes on, ask again")
        return left


@contextlib.contextmanager
def closed_after(client: Client, seconds: float) -> Iterator[None]:
    """Close ``client`` after ``seconds`` if the block still runs, which ends any call that waits on it.

    The ControlError that such a call raises becomes ReadDeadline.
    """
    passed = threading.Event()

    def close() -> None:
        passed.set()
        client.close()

    timer = threading.Timer(seconds, close)
    timer.daemon = True
    timer.start()
    try:
        yield
    except ControlError as error:
        if passed.is_set():
            raise ReadDeadline("the daemon did not answer in time; what was begun goes on, ask again") from error
        raise
    finally:
        timer.cancel()


class Patience:
    """Runs calls that may block for ever in threads, and abandons the threads after a while. Thread-safe.

    Each key has at most one running thread, however often its call is tried again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}

    def run(self, key: str, seconds: float, work: Callable[[], _T], undo: Callable[[_T], object] | None = None) -> _T:
        """Return what ``work`` returns.

        ``undo`` gets the result where nobody waits for it any more. Raises ReadDeadline when the time is over or an
        earlier call of that key still runs, and whatever ``work`` raises.
        """
        end = time.monotonic() + seconds
        ended = self._wait_turn(key, end, seconds)
        future: Future[_T] = Future()

        def attempt() -> None:
            try:
                result = work()
            except BaseException as error:
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(error)
            else:
                try:
                    future.set_result(result)
                except InvalidStateError:
                    if undo is not None:
                        undo(result)
            finally:
                self._release(key, ended)

        try:
            threading.Thread(target=attempt, daemon=True, name="csi-mount").start()
        except BaseException:
            self._release(key, ended)
            raise
        try:
            return future.result(max(end - time.monotonic(), 0.0))
        except TimeoutError:
            if future.cancel():
                raise _unanswered(seconds) from None
            return future.result()

    def _wait_turn(self, key: str, end: float, seconds: float) -> threading.Event:
        while True:
            with self._lock:
                before = self._running.get(key)
                if before is None:
                    self._running[key] = ended = threading.Event()
                    return ended
            if not before.wait(max(end - time.monotonic(), 0.0)):
                raise _unanswered(seconds)

    def _release(self, key: str, ended: threading.Event) -> None:
        with self._lock:
            del self._running[key]
        ended.set()


def _unanswered(seconds: float) -> ReadDeadline:
    return ReadDeadline(f"the mount did not answer within {seconds:.0f} s")
