"""The same client for trio and for asyncio: `from instantstart_fs import AsyncClient`. It needs msgspec alone.

What may be asked is in ``calls.py``. How one waits is the only thing that the two loops do differently: ``Waits`` is
that, in four calls. A request that is cancelled drops its connection; the others are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar, Unpack

from instantstart_fs.config.places import find_socket
from instantstart_fs.control import calls, lines, protocol
from instantstart_fs.control.calls import ANSWER_DEADLINE, CONNECT_DEADLINE, NAMES_DEADLINE, Call, Finished, Refused
from instantstart_fs.control.specification import Options
from instantstart_fs.core.coldstart import ColdStart, Moment
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.status import OriginCheck, PipelineStatus
from instantstart_fs.errors import ControlError, InstantStartError, PipelineNotFound

_T = TypeVar("_T")
MAX_IDLE = 4
"""Connections that are kept for the next request."""
BACKLOG_PAUSE = 0.02
"""Seconds between two tries while the daemon's backlog is full."""


class Waits(Protocol):
    """The waiting of one event loop. ``seconds``: then TimeoutError."""

    async def sleep(self, seconds: float) -> None: ...
    async def send(self, connection: socket.socket, data: bytes, seconds: float) -> None: ...
    async def receive(self, connection: socket.socket, seconds: float | None) -> bytes: ...


class _Asyncio:
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def send(self, connection: socket.socket, data: bytes, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().sock_sendall(connection, data)

    async def receive(self, connection: socket.socket, seconds: float | None) -> bytes:
        async with asyncio.timeout(seconds):
            return await asyncio.get_running_loop().sock_recv(connection, 256 * 1024)


class _Trio:
    def __init__(self, trio: Any) -> None:
        self._trio = trio

    async def sleep(self, seconds: float) -> None:
        await self._trio.sleep(seconds)

    async def send(self, connection: socket.socket, data: bytes, seconds: float) -> None:
        left = memoryview(data)
        with self._within(seconds):
            while left:
                try:
                    left = left[connection.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    await self._trio.lowlevel.wait_writable(connection)
            await self._trio.lowlevel.checkpoint()

    async def receive(self, connection: socket.socket, seconds: float | None) -> bytes:
        with self._within(seconds):
            while True:
                await self._trio.lowlevel.wait_readable(connection)
                with contextlib.suppress(BlockingIOError):
                    return connection.recv(256 * 1024, socket.MSG_DONTWAIT)
        raise AssertionError

    @contextlib.contextmanager
    def _within(self, seconds: float | None) -> Any:
        try:
            with contextlib.nullcontext() if seconds is None else self._trio.fail_after(seconds):
                yield
        except self._trio.TooSlowError as error:
            raise TimeoutError from error


def _waits() -> Waits:
    """Return the waiting of the loop that runs here. A program without trio never imports trio. Raises RuntimeError
    outside both."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return _Trio(trio)
    asyncio.get_running_loop()
    return _Asyncio()


class Connection:
    """A connection to the daemon; see client.Connection. Raises DaemonUnreachable, ControlProtocolError."""

    def __init__(self, path: str, waits: Waits) -> None:
        self._path = path
        self._waits = waits
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = lines.LineBuffer(lines.MAX_MESSAGE)
        self._waiting = 0
        self._over = False

    async def connect(self, deadline: float) -> None:
        self._socket.setblocking(False)
        end = time.monotonic() + deadline
        while True:
            try:
                self._socket.connect(self._path)
                return
            except BlockingIOError as error:  # a full backlog, which no loop can wait for
                if time.monotonic() >= end:
                    raise calls.unreachable(self._path, TimeoutError(), deadline) from error
            except OSError as error:
                raise calls.unreachable(self._path, error, deadline) from error
            await self._waits.sleep(BACKLOG_PAUSE)

    async def send(self, request: protocol.Request, deadline: float) -> None:
        line = lines.encode_request(request)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError), self._in_use():  # why, is to be read
                await self._waits.send(self._socket, line, deadline)
        except TimeoutError as error:
            raise calls.silent(self._path, deadline) from error
        except OSError as error:
            raise calls.broken(self._path, error) from error

    async def receive(self, deadline: float) -> protocol.Response:
        while True:
            for line in self._buffer.lines():
                return lines.decode_response(line)
            try:
                data = await self._bytes(deadline)
            except TimeoutError as error:
                raise calls.silent(self._path, deadline) from error
            except OSError as error:
                raise calls.broken(self._path, error) from error
            if not data:
                raise calls.ended(self._path)
            self._buffer.feed(data)

    def is_quiet(self) -> bool:
        """Return whether it is open with nothing to be read, so that a request can be sent."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return not len(self._buffer)
        except OSError:
            pass
        return False

    async def wait_ended(self, timeout: float | None) -> bool:
        """Wait by a descriptor of its own: several tasks may wait, and a loop knows one for each descriptor."""
        end = None if timeout is None else time.monotonic() + timeout
        if self._over:
            return True
        try:
            mine = self._socket.dup()
        except OSError as error:
            raise calls.broken(self._path, error) from error
        try:
            with mine:
                while True:
                    left = None if end is None else max(end - time.monotonic(), 0.001)
                    if not await self._waits.receive(mine, left):
                        return True
        except TimeoutError:
            return False
        except OSError:
            return True

    async def _bytes(self, seconds: float | None) -> bytes:
        if self._over:
            return b""
        with self._in_use():
            return await self._waits.receive(self._socket, seconds)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the descriptor open inside the block, also after ``close``: the loop looks at it."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if self.is_over and not self._waiting:
                self._socket.close()

    @property
    def is_over(self) -> bool:
        return self._over

    def close(self) -> None:
        """Close the connection and wake its waiters: no loop notices that a descriptor is closed."""
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._waiting:
            self._socket.close()


class Lease:
    """A lease, taken by ``async with``; see client.Lease."""

    def __init__(self, client: AsyncClient, pipeline: str) -> None:
        self.pipeline = pipeline
        self._client = client
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        self._connection = await self._client._begin(calls.lease(self.pipeline))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def wait_ended(self, timeout: float | None = None) -> bool:
        """Return whether it has ended, or does within ``timeout`` seconds (None: wait as long as that takes)."""
        return self._connection is None or await self._connection.wait_ended(timeout)

    def close(self) -> None:
        if self._connection is not None:
            self._client._drop(self._connection)
            self._connection = None


class AsyncClient:
    """The daemon at ``path`` (default: ``find_socket()``), for the tasks of one loop. An async context manager.

    Methods, errors and values are those of ``Client``; it connects with the first request. It has as many public
    methods as the protocol has requests. What passes descriptors (``open``) is ``Client``'s alone.
    """

    def __init__(self, path: str | None = None, *, deadline: float = CONNECT_DEADLINE) -> None:
        """``deadline``: seconds to be accepted."""
        self.path = find_socket(path)
        self._deadline = deadline
        self._closed = False
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what goes on with ControlError's family, and the leases."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._connections):
            self._drop(connection)

    # -- requests --------------------------------------------------------------------------------------------------

    async def ping(self) -> protocol.DaemonInfo:
        return await self._ask(calls.ping())

    async def add(
        self, pipeline: str | PipelineSpec, source: str | None = None, *, warm: bool = False, **options: Unpack[Options]
    ) -> PipelineStatus:
        return await self._ask(calls.add(pipeline, source, options, warm))

    async def update(self, pipeline: str) -> PipelineStatus:
        return await self._ask(calls.update(pipeline))

    async def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        return await self._ask(calls.remove(pipeline, force))

    async def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        return await self._ask(calls.evict(pipeline, force))

    async def set_pinned(self, pipeline: str, pinned: bool) -> None:
        await self._ask(calls.set_pinned(pipeline, pinned))

    async def touch(self, pipeline: str) -> None:
        await self._ask(calls.touch(pipeline))

    async def mark(self, pipeline: str, moment: Moment, at_ns: int | None = None) -> None:
        await self._ask(calls.mark(pipeline, moment, at_ns))

    async def cold_starts(self, pipeline: str) -> list[ColdStart]:
        return await self._ask(calls.cold_starts(pipeline))

    async def pipelines(self) -> list[PipelineStatus]:
        return await self._ask(calls.pipelines())

    async def region_state(self, pipeline: str, *, check: bool = False) -> protocol.RegionState:
        return await self._ask(calls.region_state(pipeline, check))

    async def names(self, prefix: str = "", *, deadline: float = ANSWER_DEADLINE) -> list[str]:
        return await self._ask(calls.names(prefix, deadline))

    async def specs(self) -> list[PipelineSpec]:
        return await self._ask(calls.specs())

    async def status(self, pipeline: str, *, brief: bool = False) -> PipelineStatus:
        return await self._ask(calls.status(pipeline, brief))

    async def warm(self, pipeline: str, *, everything: bool = False) -> PipelineStatus:
        return await self._ask(calls.warm(pipeline, everything, wait=False))

    async def include(self, pipeline: str, globs: Sequence[str]) -> None:
        await self._ask(calls.include(pipeline, globs))

    async def wait_warm(
        self,
        pipeline: str,
        *,
        everything: bool = False,
        progress: Callable[[PipelineStatus], Awaitable[None] | None] | None = None,
        timeout: float | None = None,
    ) -> PipelineStatus:
        """``progress`` may be a coroutine function; it is awaited before the next message is read."""

        async def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                await _awaited(progress(calls.progress_status(message)))

        return await self._ask(calls.warm(pipeline, everything, wait=True), on_progress, timeout)

    async def check_access(self, pipeline: str, *, token_file: str | None = None) -> list[str]:
        return await self._ask(calls.check_access(pipeline, token_file))

    async def check_origins(self) -> list[OriginCheck]:
        return await self._ask(calls.check_origins())

    async def verify(
        self,
        pipeline: str,
        progress: Callable[[int, int], Awaitable[None] | None] | None = None,
        *,
        rate: float | None = None,
        timeout: float | None = None,
    ) -> protocol.VerifyResult:
        async def on_progress(message: protocol.Progress) -> None:
            if progress is not None:
                await _awaited(progress(message.done_bytes, message.total_bytes))

        return await self._ask(calls.verify(pipeline, rate), on_progress, timeout)

    def lease(self, pipeline: str) -> Lease:
        """Take a lease: ``async with client.lease(…):``; see client.Lease."""
        return Lease(self, pipeline)

    # -- the exchange ----------------------------------------------------------------------------------------------

    async def _ask(
        self,
        call: Call[_T],
        on_progress: Callable[[protocol.Progress], Awaitable[None]] | None = None,
        timeout: float | None = None,
    ) -> _T:
        connection = await self._take()
        try:
            found = await self._exchange(connection, call, on_progress, timeout)
        except BaseException:
            self._drop(connection)
            raise
        self._give_back(connection)
        return await self._result(found, call)

    async def _begin(self, call: Call[Any]) -> Connection:
        """Begin a request that lasts as long as its connection."""
        connection = await self._take()
        try:
            await self._result(await self._exchange(connection, call, None, None), call)
        except BaseException:
            self._drop(connection)
            raise
        return connection

    @staticmethod
    async def _exchange(
        connection: Connection,
        call: Call[_T],
        on_progress: Callable[[protocol.Progress], Awaitable[None]] | None,
        timeout: float | None,
    ) -> Finished[_T] | Refused:
        end = None if timeout is None else time.monotonic() + timeout
        await connection.send(call.request, call.deadline)
        while True:
            wait = calls.silence(call.deadline, end, time.monotonic())
            try:
                found = calls.outcome(call, await connection.receive(wait))
            except InstantStartError:
                if end is not None and time.monotonic() >= end:
                    raise calls.expired() from None
                raise
            if not isinstance(found, protocol.Progress):
                return found
            if on_progress is not None:
                await on_progress(found)

    async def _result(self, found: Finished[_T] | Refused, call: Call[_T]) -> _T:
        if not isinstance(found, Refused):
            return found.value
        pipeline = calls.wanted(call)
        if isinstance(found.error, PipelineNotFound) and pipeline:
            known: list[str] = []
            with contextlib.suppress(InstantStartError, OSError):
                known += await self.names(calls.beginning(pipeline), deadline=NAMES_DEADLINE)
                known += await self.names(deadline=NAMES_DEADLINE)
            raise calls.with_advice(found.error, pipeline, sorted({*known}))
        raise found.error

    async def _take(self) -> Connection:
        while True:
            if self._closed:
                raise ControlError(f"{self.path}: this client is closed")
            if not self._idle:
                break
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            self._drop(connection)
        connection = Connection(self.path, _waits())
        self._connections.add(connection)
        try:
            await connection.connect(self._deadline)
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _give_back(self, connection: Connection) -> None:
        if not self._closed and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        connection.close()


async def _awaited(value: Awaitable[None] | None) -> None:
    if inspect.isawaitable(value):
        await value
