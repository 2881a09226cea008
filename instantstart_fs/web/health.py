"""Checks whether the daemon is well: the mount answers, the index takes writes, fetch workers live, the store exists.

An answer is kept for a moment, so that a probe every second costs one durable write in five. A probe that hangs is
reported, and not started again while it hangs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import msgspec
import trio

from instantstart_fs.errors import InstantStartError
from instantstart_fs.filler.events import FillStatistics
from instantstart_fs.ipc.threads import run_abandonable

PROBE_DEADLINE = 3.0
KEEP_SECONDS = 5.0


class Check(msgspec.Struct, frozen=True):
    """A check's result. ``problem``: None while all is well."""

    name: str
    problem: str | None


class Health(msgspec.Struct, frozen=True):
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.problem is None for check in self.checks)


class HealthProbe:
    """Checks the daemon's parts, and keeps the answer for a moment. ``prove_index`` writes to the index; ``statistics``
    gives the filler's."""

    def __init__(
        self,
        mount: str,
        prove_index: Callable[[], Awaitable[None]],
        statistics: Callable[[], FillStatistics],
        look: Callable[[str], str | None] | None = None,
        store_problem: Callable[[], str | None] | None = None,
    ) -> None:
        """``look`` returns what is wrong with a mount; it runs in a thread and can be replaced in tests.
        ``store_problem`` returns what is wrong with the store."""
        self._store_problem = store_problem
        self._mount = mount
        self._prove_index = prove_index
        self._statistics = statistics
        self._look = look or look_at_mount
        self._lock = trio.Lock()
        self._kept: tuple[float, Health] | None = None
        self._stuck = 0
        """Probes of the mount that have not returned."""

    @property
    def last(self) -> Health | None:
        """Return the latest answer, however old it is."""
        return self._kept[1] if self._kept else None

    async def ask(self) -> Health:
        """Return the health, at most a few seconds old. Takes a few seconds at most."""
        async with self._lock:
            if self._kept is None or trio.current_time() - self._kept[0] >= KEEP_SECONDS:
                checks = (
                    Check("mount", await self._probe_mount()),
                    Check("index", await self._probe_index()),
                    Check("workers", self._probe_workers()),
                    *([Check("store", self._store_problem())] if self._store_problem else []),
                )
                self._kept = trio.current_time(), Health(checks)
            return self._kept[1]

    async def _probe_mount(self) -> str | None:
        if self._stuck:
            return "does not answer"
        found: list[str | None] = []
        token = trio.lowlevel.current_trio_token()

        def probe() -> None:
            # In a thread: the answer comes from this process's own loop.
            try:
                found.append(self._look(self._mount))
            finally:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._came_back)

        self._stuck += 1
        with trio.move_on_after(PROBE_DEADLINE) as scope:
            await run_abandonable(probe)
        if scope.cancelled_caught:
            return f"does not answer within {PROBE_DEADLINE:g} s"
        return found[0]

    def _came_back(self) -> None:
        self._stuck -= 1

    async def _probe_index(self) -> str | None:
        if self._statistics().index_stuck:
            return "takes no commits"
        try:
            with trio.move_on_after(PROBE_DEADLINE) as scope:
                await self._prove_index()
        except InstantStartError as error:
            # The code and not the message: callers of /healthz may not learn the store's paths.
            return error.code
        return f"does not take a write within {PROBE_DEADLINE:g} s" if scope.cancelled_caught else None

    def _probe_workers(self) -> str | None:
        return None if self._statistics().workers else "no fetch worker is ready"


def look_at_mount(mount: str) -> str | None:
    """Return what is wrong with the mount, None if nothing is. Blocks as long as the mount: statvfs is never cached."""
    try:
        os.statvfs(mount)
        return None if os.path.ismount(mount) else "nothing is mounted there"
    except OSError as error:
        return error.strerror or str(error)
