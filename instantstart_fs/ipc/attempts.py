"""Runs blocking calls with a deadline where there is no trio loop: each in a daemon thread, abandoned when late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Attempt(Generic[_T]):
    """A call in a thread of its own, which is abandoned when it takes too long."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._values: list[_T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._values.append(self._work())
        except Exception as error:
            self._errors.append(error)

    def result(self, seconds: float) -> _T:
        """Return its result within ``seconds``. Raises TimeoutError, or what the call raised."""
        self._thread.join(max(seconds, 0.0))
        if self._errors:
            raise self._errors[0]
        if not self._values:
            raise TimeoutError
        return self._values[0]


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """Return ``work()`` from a thread that is abandoned after ``seconds``. Raises TimeoutError, or what it raised."""
    return Attempt(work).result(seconds)
