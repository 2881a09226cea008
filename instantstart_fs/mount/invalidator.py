"""Tells the kernel which names, attributes and listings have changed. It never drops a file's pages."""

from __future__ import annotations

import logging
from typing import Final

import trio

from instantstart_fs.mount.transport import Transport
from instantstart_fs.vfs import Invalidation, Vfs

log = logging.getLogger(__name__)

INVALIDATIONS_AT_ONCE: Final = 1000


class Invalidator:
    """Sends what the library says has changed to the kernel, in order, from a thread: the kernel may make it wait for a
    directory that has a request in flight. Never a file's pages: only entries, attributes and listings."""

    def __init__(self, view: Vfs, transport: Transport) -> None:
        self._channel = view.invalidations
        self._transport = transport
        self._idle = trio.Event()
        self._idle.set()

    async def run(self) -> None:
        async for first in self._channel:
            batch = [first]
            while len(batch) < INVALIDATIONS_AT_ONCE:
                try:
                    batch.append(self._channel.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            self._idle = trio.Event()
            # The thread tells when it is done even after it was abandoned: until then the session may not be freed.
            token = trio.lowlevel.current_trio_token()
            await trio.to_thread.run_sync(self._send, tuple(dict.fromkeys(batch)), token, abandon_on_cancel=True)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def _send(self, batch: tuple[Invalidation, ...], token: trio.lowlevel.TrioToken) -> None:
        try:
            for invalidation in batch:
                _send_invalidation(self._transport, invalidation)
        finally:
            token.run_sync_soon(self._idle.set)


def _send_invalidation(transport: Transport, invalidation: Invalidation) -> None:
    """Blocking. What the kernel does not hold (ENOENT) needs no forgetting."""
    try:
        transport.send(invalidation)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the kernel refused an invalidation (%s): %s", invalidation, error)
