"""The daemon's side of `instantstart run`: what a start is given, and how what it compiled comes in.

Bytes of a cache that is saved come through a pipe, whose writing end the client gets: the client never has a descriptor
of anything in the store that it could write to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol, TypeVar

import trio

from instantstart_fs.control.protocol import (
    Handed,
    HandedFile,
    Progress,
    Response,
    StartupBegin,
    StartupBegun,
    StartupSave,
    StartupVerified,
)
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.errors import ControlError, InstantStartError
from instantstart_fs.serving.startupcaches import Offer, StartupCaches

_T = TypeVar("_T")
PIPE_BYTES = 1024 * 1024
STALL_SECONDS = 60.0
"""Without a byte of a pack that is being saved, after which it is given up."""
SLOWEST = 5_000_000
"""Bytes a second that it comes at, at least, over the whole."""
PROGRESS_SECONDS = 3.0
WARNING_SECONDS = 0.02
"""Seconds that a start waits to hear why its fill cannot begin."""
CACHE = "startup-cache"
"""The path under which a startup cache's descriptor is handed over."""

Send = Callable[[Response, Sequence[int]], Awaitable[None]]


class Change(Protocol):
    """An operation that goes on when its client leaves."""

    @property
    def finished(self) -> trio.Event: ...
    def result(self) -> object: ...


async def begin(
    caches: StartupCaches, request: StartupBegin, uid: int, start: str, mount: str, fill: Change | None, send: Send
) -> StartupBegun:
    """Begin a start. ``fill`` is the fill that was begun for it."""
    offer = await _offered(caches, request, uid, send)
    number = offer.choice.record.number if offer.choice.record is not None else 0
    caches.suspects.given(start, request.pipeline, number, left_out=offer.left_out)
    warning = offer.problem and f"no startup cache: {offer.problem}"
    try:
        if fill is not None:
            with trio.move_on_after(WARNING_SECONDS):
                await fill.finished.wait()
            if fill.finished.is_set():
                try:
                    fill.result()
                except InstantStartError as error:
                    warning = "; ".join(filter(None, (error.message, warning)))
        if offer.pack >= 0:
            await send(Handed((HandedFile(CACHE, 1),)), [offer.pack])
    finally:
        if offer.pack >= 0:
            os.close(offer.pack)
    choice = offer.choice
    return StartupBegun(start, offer.generation, mount, choice.outcome, choice.record, choice.differs, warning)


async def _offered(caches: StartupCaches, request: StartupBegin, uid: int, send: Send) -> Offer:
    """Return the offer, and keep the client informed: a cache from the region may take longer than a client waits in
    silence."""
    offers: list[Offer] = []

    async def offer() -> None:
        offers.append(
            await caches.offer(request.pipeline, request.key, uid, restore=request.restore, without=request.without)
        )

    try:
        await _informed(send, offer)
        return offers.pop()
    finally:
        for left in offers:  # the client has left
            if left.pack >= 0:
                os.close(left.pack)


async def _informed(send: Send, work: Callable[[], Awaitable[_T]]) -> _T:
    """Do ``work``, and say that it goes on; what it returns. Raises what it raises."""

    async def say_that_it_goes_on() -> None:
        with contextlib.suppress(trio.BrokenResourceError, OSError):
            while True:
                await trio.sleep(PROGRESS_SECONDS)
                with trio.CancelScope(shield=True):  # a line that is cut would spoil the next one
                    await send(Progress(), ())

    problem: InstantStartError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(say_that_it_goes_on)
        try:
            found = await work()
        except InstantStartError as error:
            problem = error
        nursery.cancel_scope.cancel()
    if problem is not None:
        raise problem
    return found


async def save(caches: StartupCaches, request: StartupSave, uid: int, send: Send) -> StartupRecord:
    """Receive a pack until it is whole and kept. Raises StoreError, or DigestMismatch where only a part came.

    The client is kept informed while it waits: for its turn, and until all of it is on the disk."""
    async with AsyncExitStack() as stack:
        turn = caches.receiving(
            request.pipeline,
            request.key,
            uid,
            generation=request.generation,
            size=request.size,
            digest=request.digest,
            files=request.files,
            view=request.view,
            layouts=request.layouts,
        )
        receiving = await _informed(send, lambda: stack.enter_async_context(turn))
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        async with trio.lowlevel.FdStream(read) as stream:
            try:
                os.set_blocking(write, True)
                with contextlib.suppress(OSError):  # pipe-user-pages-soft: slower, that is all
                    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                await send(Handed((HandedFile(CACHE, 1),)), [write])
            finally:
                os.close(write)
            end = trio.current_time() + STALL_SECONDS + request.size / SLOWEST
            while True:
                with trio.move_on_at(min(end, trio.current_time() + STALL_SECONDS)) as scope:
                    data = await stream.receive_some(PIPE_BYTES)
                if scope.cancelled_caught:
                    raise ControlError(f"{request.pipeline}: a startup cache comes too slowly, or not at all")
                if not data:
                    break
                await receiving.write(bytes(data))
        return await _informed(send, receiving.keep)


async def verify(caches: StartupCaches, pipeline: str) -> StartupVerified:
    read, damaged = await caches.verify(pipeline)
    return StartupVerified(read, {str(number): problem for number, problem in damaged.items()})
