"""The Python client, blocking and on both loops, against the real server over a real socket."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from instantstart_fs import AsyncClient, Client, InstantStartError
from instantstart_fs.control import async_client, protocol
from instantstart_fs.control.async_client import Lease as AsyncLease
from instantstart_fs.control.server import serving
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.status import FillStatus
from instantstart_fs.errors import (
    ControlError,
    DaemonUnreachable,
    InvalidSource,
    PipelineBusy,
    PipelineExists,
    PipelineNotFound,
    UsageError,
    WaitDeadline,
)
from tests.component.test_control import COLD, INFO, FakeLibrary, run

LOOPS = pytest.mark.parametrize("loop", ["trio", "asyncio"])


class Server:
    """A server in a thread of its own, for clients on any loop."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.library: FakeLibrary
        self._ready = threading.Event()
        self._stop: Callable[[], object]
        self._thread = threading.Thread(target=trio.run, args=(self._run,))

    async def _run(self) -> None:
        self.library = FakeLibrary()
        token = trio.lowlevel.current_trio_token()
        over = trio.Event()
        self._stop = lambda: token.run_sync_soon(over.set)
        self.token = token
        async with serving(self.library, lambda: INFO, self.path):
            self._ready.set()
            await over.wait()

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._thread.join(60)

    def change(self, **changes: object) -> None:
        self.token.run_sync_soon(lambda: self.library.change(**changes))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(str(tmp_path / "run" / "control.sock")) as running:
        yield running


def on(loop: str, work: Callable[[], Awaitable[None]]) -> None:
    """``work`` on that loop, within a minute."""

    async def bounded() -> None:
        if loop == "trio":
            with trio.fail_after(60):
                await work()
        else:
            await asyncio.wait_for(work(), 60)  # type: ignore[arg-type]

    trio.run(bounded) if loop == "trio" else asyncio.run(bounded())


@contextmanager
def silent(path: Path) -> Iterator[str]:
    """A daemon that accepts and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield str(path)


# -- blocking ----------------------------------------------------------------------------------------------------------


def test_add_takes_what_the_command_takes(server: Server) -> None:
    with Client(server.path) as client:
        client.add("y", "https://huggingface.co/Org/Repo/tree/main", include=["*.json"], quota="5GB", warm=True)
        spec = server.library.specs["y"]
        assert spec.models == (ModelSpec("hf://Org/Repo@main", "", ("*.json",)),)
        assert (spec.quota, spec.uid) == (5_000_000_000, os.geteuid())
        client.add("z", models={"asr": "org/asr", "tts": "s3://bucket/tts"}, owner="7:8")
        assert [model.name for model in server.library.specs["z"].models] == ["asr", "tts"]
        with pytest.raises(PipelineExists):
            client.add("y", "org/repo")
        with pytest.raises(InvalidSource):
            client.add("w", "ftp://nowhere")
        # What a message names is what Python calls it.
        with pytest.raises(UsageError, match=r"^endpoint_url: "):
            client.add("w", "s3://bucket/k", endpoint_url="nonsense")
        with pytest.raises(UsageError, match="give a list"):
            client.add("w", "org/repo", include="*.json")  # type: ignore[arg-type]


def test_a_lease_is_a_block_and_the_client_goes_on_meanwhile(server: Server) -> None:
    with Client(server.path) as client:
        with client.lease("x") as lease:
            assert server.library.lease_count == 1
            assert client.status("x") == COLD
            with pytest.raises(PipelineBusy):
                client.remove("x")
            assert not lease.wait_ended(0.001)
        with pytest.raises(PipelineNotFound):
            client.lease("nothing")
        for _ in range(1000):
            if not server.library.lease_count:
                break
            client.ping()
        assert server.library.lease_count == 0
        kept = client.lease("x")
    assert kept.wait_ended(30)


def test_a_wait_ends_at_its_own_deadline_and_the_client_stays_fit(server: Server) -> None:
    server.change(state="filling", fill=FillStatus(10, 9))
    seen: list[int] = []
    with Client(server.path) as client:
        with pytest.raises(WaitDeadline, match="goes on"):
            client.wait_warm("x", progress=lambda status: seen.append(status.cached_bytes), timeout=0.6)
        assert seen
        assert client.status("x").state == "filling"

        class Enough(Exception):
            pass

        def stop(_: object) -> None:
            raise Enough

        # An answer that comes after a wait was given up is nobody else's.
        with pytest.raises(Enough):
            client.wait_warm("x", progress=stop)
        assert client.names() == ["x"]


def test_threads_share_a_client(server: Server) -> None:
    server.change(state="filling", fill=FillStatus(10, 9))
    with Client(server.path) as client:
        found: list[object] = []
        waiting = threading.Thread(target=lambda: found.append(client.wait_warm("x")))
        waiting.start()
        assert client.status("x").pipeline == "x"
        server.change(state="warm", fill=None, cached_bytes=100)
        waiting.join(60)
        assert len(found) == 1


def test_a_restarted_daemon_is_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "control.sock")
    with Server(path):
        client = Client(path)
        assert client.names() == ["x"]
    with pytest.raises(DaemonUnreachable):
        client.names()
    with Server(path):
        assert client.names() == ["x"]
        client.close()
        with pytest.raises(ControlError, match="closed"):
            client.names()


def test_closing_wakes_whoever_waits(tmp_path: Path) -> None:
    with silent(tmp_path / "s") as path:
        client = Client(path)
        failed: list[InstantStartError] = []

        def wait() -> None:
            try:
                client.ping()
            except InstantStartError as error:
                failed.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while client._idle:
            pass
        client.close()
        thread.join(30)
        assert len(failed) == 1 and isinstance(failed[0], ControlError)


# -- the loops ---------------------------------------------------------------------------------------------------------


@LOOPS
def test_both_loops_speak_with_the_daemon(server: Server, loop: str) -> None:
    async def work() -> None:
        async with AsyncClient(server.path) as client:
            assert await client.ping() == INFO
            assert await client.status("x") == COLD
            added = await client.add(f"{loop}-1", "org/repo", warm=True)
            assert added.pipeline == f"{loop}-1"
            with pytest.raises(PipelineNotFound, match="did you mean"):
                await client.status(f"{loop}-2")
            async with client.lease("x") as lease:
                assert server.library.lease_count == 1
                assert not await lease.wait_ended(0.001)
                with pytest.raises(PipelineBusy):
                    await client.remove("x")
                await client.remove("x", force=True)
                assert await lease.wait_ended(30)
            async with client.lease("x"):
                client.close()
        with pytest.raises(ControlError, match="closed"):
            await client.ping()

    on(loop, work)


@LOOPS
def test_a_warm_reports_to_functions_and_to_coroutines(server: Server, loop: str) -> None:
    server.change(state="filling", fill=FillStatus(10, 9))
    seen: list[int] = []

    async def progress(status: Any) -> None:
        seen.append(status.cached_bytes)
        await (trio.sleep(0) if loop == "trio" else asyncio.sleep(0))
        server.change(state="warm", fill=None, cached_bytes=100)

    async def work() -> None:
        async with AsyncClient(server.path) as client:
            with pytest.raises(WaitDeadline):
                await client.wait_warm("x", progress=lambda status: seen.append(1), timeout=0.5)
            assert (await client.wait_warm("x", progress=progress)).state == "warm"

    on(loop, work)
    assert 1 in seen and 0 in seen


@LOOPS
def test_a_cancelled_request_leaves_the_client_fit(server: Server, loop: str) -> None:
    server.change(state="filling", fill=FillStatus(10, 9))

    async def work() -> None:
        async with AsyncClient(server.path) as client:
            if loop == "trio":
                with trio.move_on_after(0.3):
                    await client.wait_warm("x")
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.wait_warm("x"), 0.3)
            assert await client.names() == ["x"]

    on(loop, work)


@LOOPS
def test_closing_ends_a_wait_on_a_loop(tmp_path: Path, loop: str) -> None:
    async def work() -> None:
        async with AsyncClient(path) as client:

            async def ask() -> None:
                with pytest.raises(ControlError):
                    await client.ping()

            if loop == "trio":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask)
                    await trio.testing.wait_all_tasks_blocked()
                    client.close()
            else:
                task = asyncio.create_task(ask())
                while not client._connections or not next(iter(client._connections))._waiting:
                    await asyncio.sleep(0.001)
                client.close()
                await task

    with silent(tmp_path / "s") as path:
        on(loop, work)


@LOOPS
def test_no_daemon_is_said_on_a_loop(tmp_path: Path, loop: str) -> None:
    async def work() -> None:
        async with AsyncClient(str(tmp_path / "none.sock")) as client:
            with pytest.raises(DaemonUnreachable, match="no daemon listens there"):
                await client.ping()

    on(loop, work)


# -- both --------------------------------------------------------------------------------------------------------------


def test_the_clients_have_the_same_verbs() -> None:
    def verbs(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(value) for name, value in found if not name.startswith("_")}

    blocking, loops = verbs(Client), verbs(AsyncClient)
    only_blocking = {"open", "prefetch", "peer_pid", "wait_ended", "startup_caches", "startup_verify", "startup_remove"}
    assert set(blocking) - set(loops) == only_blocking
    assert set(loops) <= set(blocking)
    for name, signature in loops.items():
        assert list(signature.parameters) == list(blocking[name].parameters), name
    assert verbs(AsyncLease).keys() >= {"wait_ended", "close"}


def test_the_client_needs_msgspec_alone_and_the_package_nothing() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import instantstart_fs\n"
        "assert not {'instantstart_fs.control', 'msgspec', 'socket'} & (set(sys.modules) - before)\n"
        "import sysconfig, os\n"
        "from instantstart_fs import AsyncClient, Client, InstantStartError\n"
        "site = os.path.realpath(sysconfig.get_paths()['purelib']) + os.sep\n"
        "print(*sorted({os.path.realpath(module.__file__)[len(site):].split(os.sep)[0]\n"
        "    for module in list(sys.modules.values()) if getattr(module, '__file__', None)\n"
        "    and os.path.realpath(module.__file__).startswith(site)}))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", SITE + program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"msgspec", "instantstart_fs"}


SITE = f"import sys; sys.path[:] = {sys.path!r}\n"


async def test_the_packages_own_name_is_typed_and_lazy(tmp_path: Path) -> None:
    import instantstart_fs

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        instantstart_fs.Nothing  # noqa: B018
    library = FakeLibrary()
    async with run(library, str(tmp_path / "run" / "s")), AsyncClient(str(tmp_path / "run" / "s")) as client:
        assert await client.names() == ["x"]


# -- a process that forks ----------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys
from instantstart_fs import Client
client = Client(sys.argv[1])
lease = client.lease("x")
client.ping()
client._lock.acquire()  # as another thread may, at the moment of the fork
child = os.fork()
if not child:
    signal.alarm(30)
    client.ping()
    lease.close()
    with client:
        pass
    os._exit(0)
client._lock.release()
assert os.waitpid(child, 0)[1] == 0, "the child hung or failed"
client.ping()
assert not lease.wait_ended(0.05), "the child's close ended the parent's lease"
"""


def test_a_forked_child_ends_nothing_of_its_parents(server: Server) -> None:
    done = subprocess.run([sys.executable, "-c", FORKS, server.path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# -- tasks that share a connection -------------------------------------------------------------------------------------


@LOOPS
def test_several_tasks_wait_for_the_end_of_a_lease(server: Server, loop: str) -> None:
    async def work() -> None:
        async with AsyncClient(server.path) as client, client.lease("x") as lease:
            seen: list[bool] = []

            async def wait() -> None:
                seen.append(await lease.wait_ended(50))

            async def end() -> None:
                await pause(loop)
                lease.close()

            await together(loop, wait, wait, end)
            assert seen == [True, True]

    on(loop, work)


@LOOPS
def test_close_ends_a_send_that_the_daemon_does_not_read(tmp_path: Path, loop: str) -> None:
    async def work() -> None:
        with silent(tmp_path / "s") as path:
            connection = async_client.Connection(path, async_client._waits())
            await connection.connect(10)

            async def send() -> None:
                with pytest.raises(DaemonUnreachable):
                    await connection.send(protocol.Include("x", ("a" * 4096,) * 250), 600)
                    await connection.receive(600)

            async def end() -> None:
                await pause(loop)
                connection.close()

            await together(loop, send, end)
            assert connection._socket.fileno() == -1

    on(loop, work)


async def pause(loop: str) -> None:
    """Until the other tasks wait."""
    if loop == "trio":
        await trio.testing.wait_all_tasks_blocked()
    else:
        await asyncio.sleep(0.05)


async def together(loop: str, *works: Callable[[], Awaitable[None]]) -> None:
    if loop == "trio":
        async with trio.open_nursery() as nursery:
            for work in works:
                nursery.start_soon(work)
    else:
        await asyncio.gather(*(work() for work in works))
