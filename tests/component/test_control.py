"""The control server and its client over a real socket, with a library that is scripted."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import trio
import trio.testing

from instantstart_fs.catalog.model import Lessee
from instantstart_fs.config import unixsocket
from instantstart_fs.config.unixsocket import Peer, peer_of
from instantstart_fs.control import callers as callers_module
from instantstart_fs.control import connection as connection_module
from instantstart_fs.control import dispatcher as dispatcher_module
from instantstart_fs.control.client import Client
from instantstart_fs.control.lines import MAX_REQUEST
from instantstart_fs.control.listener import listen
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.control.server import ControlServer, serving
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.sight import Sight
from instantstart_fs.core.status import ErrorStatus, FileStatus, FillStatus, PipelineStatus
from instantstart_fs.core.weights import WeightFile, WeightSet
from instantstart_fs.errors import (
    AccessRefused,
    ControlError,
    ControlProtocolError,
    DaemonUnreachable,
    PermissionRefused,
    PipelineBusy,
    PipelineExists,
    PipelineNotFound,
)
from tests.statuses import pipeline_status

INFO = DaemonInfo("0", os.getpid(), "/models", "/store", 1.0, 1, True)
COLD = pipeline_status(files=(FileStatus("a", "absent", 100, 0, None),))


class Report(NamedTuple):
    files: int
    bytes: int
    healed: tuple[str, ...]
    unproven: tuple[str, ...]


class FakeHandover:
    """``files``: (path, content) in the order in which they become complete, a list for each time it is asked."""

    def __init__(self, *turns: list[tuple[str, bytes]] | Exception) -> None:
        self.turns = list(turns)
        names = [(path, content) for turn in turns if isinstance(turn, list) for path, content in turn]
        self.weights = WeightSet("x", 1, tuple(WeightFile(path, "", len(content)) for path, content in names))

    @property
    def finished(self) -> bool:
        return not self.turns

    async def next_files(self, limit: int, timeout: float) -> list[tuple[str, list[int]]]:
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        return [(path, [_memory(content), _memory(content)]) for path, content in turn]


def _memory(content: bytes) -> int:
    fd = os.memfd_create("x")
    os.write(fd, content)
    return fd


class FakeLibrary:
    """Pipelines by id; each call is noted; ``hold`` keeps changes waiting."""

    def __init__(self) -> None:
        self.specs = {"x": PipelineSpec("x", (ModelSpec("hf://o/r"),), uid=1234)}
        self.statuses = {"x": COLD}
        self.calls: list[str] = []
        self.hold: trio.Event | None = None
        self.entered = trio.Event()
        self.done = trio.Event()
        self.lease_count = 0
        self.tokens: set[str] = set()
        self.admin = self.lifecycle = self.verifier = self.origin_checks = self.cold_starts = self
        self.warming = self.pipelines = self.leases = self
        self.handover = FakeHandover([("a", b"one")])
        self.lease_changed = trio.Event()
        self.changed = trio.Event()

    def change(self, **changes: object) -> None:
        self.statuses["x"] = msgspec.structs.replace(self.statuses["x"], **changes)
        self.changed.set()
        self.changed = trio.Event()

    async def _held(self, call: str) -> None:
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        self.calls.append(call)
        self.done.set()

    async def ensure_loaded(self, pipeline: str) -> None:
        pass

    async def add(self, spec: PipelineSpec) -> PipelineStatus:
        await self._held("add")
        if spec.id in self.specs:
            raise PipelineExists("taken")
        self.specs[spec.id] = spec
        self.statuses[spec.id] = msgspec.structs.replace(COLD, pipeline=spec.id)
        return self.statuses[spec.id]

    async def update(self, pipeline: str) -> PipelineStatus:
        await self._held("update")
        return self.status(pipeline)

    async def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        await self._held("remove")
        self.spec(pipeline)
        if self.lease_count and not force:
            raise PipelineBusy("leased")
        return ["pid 7 (engine, uid 1)"] if force else []

    async def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        raise ZeroDivisionError("a defect")

    async def set_pinned(self, pipeline: str, pinned: bool) -> None:
        self.calls.append(f"pin {pinned}")

    def touch(self, pipeline: str) -> None:
        self.spec(pipeline)
        self.calls.append("touch")

    async def warm(self, pipeline: str, *, everything: bool = False) -> None:
        self.spec(pipeline)
        self.calls.append(f"warm {everything}")
        self.entered.set()

    def status(self, pipeline: str, *, with_files: bool = True) -> PipelineStatus:
        self.spec(pipeline)
        found = self.statuses[pipeline]
        return found if with_files else msgspec.structs.replace(found, files=None)

    def list(self) -> list[PipelineStatus]:
        return [msgspec.structs.replace(status, files=None) for status in self.statuses.values()]

    def names_where(self, prefix: str, shown: Callable[[PipelineSpec], bool]) -> list[str]:
        return [name for name, spec in self.specs.items() if name.startswith(prefix) and shown(spec)]

    def shown_to(self, pipeline: str, sight: Sight) -> bool:
        return pipeline in self.specs and sight.sees(self.specs[pipeline])

    def list_where(self, shown: Callable[[PipelineSpec], bool]) -> list[PipelineStatus]:
        return [status for status in self.list() if shown(self.specs[status.pipeline])]

    def owners(self) -> frozenset[tuple[int, int]]:
        return frozenset((spec.uid, spec.gid) for spec in self.specs.values())

    def spec(self, pipeline: str) -> PipelineSpec:
        if pipeline not in self.specs:
            raise PipelineNotFound(f"no {pipeline}")
        return self.specs[pipeline]

    async def wait_changed(self, pipeline: str, timeout: float) -> None:
        with trio.move_on_after(timeout):
            await self.changed.wait()

    async def check_access(self, pipeline: str, token_file: str | None = None) -> tuple[str, ...]:
        self.spec(pipeline)
        if token_file is not None and Path(token_file).read_text() not in self.tokens:
            raise AccessRefused("that token opens nothing")
        return ("hf://o/r",)

    async def verify(self, pipeline: str, progress: Callable[[int, int], None], rate: float | None = None) -> Report:
        progress(50, 100)
        await self._held("verify")
        return Report(1, 100, ("a",), ())

    @contextmanager
    def lease(self, pipeline: str, lessee: Lessee | None = None) -> Iterator[None]:
        self.spec(pipeline)
        self._leased(1)
        try:
            yield
        finally:
            self._leased(-1)

    @asynccontextmanager
    async def opening(
        self, pipeline: str, deadlines: Mapping[str, float], lessee: Lessee | None = None
    ) -> AsyncIterator[FakeHandover]:
        with self.lease(pipeline, lessee):
            yield self.handover

    def _leased(self, change: int) -> None:
        self.lease_count += change
        self.lease_changed.set()
        self.lease_changed = trio.Event()

    async def wait_leases(self, count: int) -> None:
        with trio.fail_after(10):
            while self.lease_count != count:
                await self.lease_changed.wait()


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "control.sock")


def run(library: FakeLibrary, path: str, **options: object):
    return serving(library, lambda: INFO, path, **options)


async def ask(path: str, work: Callable[[Client], object]) -> object:
    """``work`` with a fresh client, in a thread."""

    def call() -> object:
        with Client(path) as client:
            return work(client)

    with trio.fail_after(20):
        return await trio.to_thread.run_sync(call)


async def test_a_missing_pipeline_is_said_with_the_one_that_was_meant(library: FakeLibrary, path: str) -> None:
    library.specs["my-llm"] = library.specs["x"]
    library.statuses["my-llm"] = msgspec.structs.replace(COLD, pipeline="my-llm")
    async with run(library, path):
        for work in (lambda client: client.status("my-lm"), lambda client: client.lease("MY-LLM")):
            with pytest.raises(PipelineNotFound, match="did you mean 'my-llm'"):
                await ask(path, work)
        with pytest.raises(PipelineNotFound) as refused:
            await ask(path, lambda client: client.status("quite-another"))
        assert "did you mean" not in refused.value.message


async def test_every_request_reaches_the_library(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        assert await ask(path, lambda client: client.ping()) == INFO
        assert await ask(path, lambda client: client.status("x")) == COLD
        (listed,) = await ask(path, lambda client: client.pipelines())
        assert (listed.pipeline, listed.files) == ("x", None)
        assert await ask(path, lambda client: client.specs()) == [library.specs["x"]]
        spec = PipelineSpec("y", (ModelSpec("s3://bucket"),))
        added = await ask(path, lambda client: client.add(spec, warm=True))
        assert added.pipeline == "y"
        assert library.specs["y"] == spec

        def several(client: Client) -> None:
            client.update("x")
            client.set_pinned("x", True)
            client.set_pinned("x", False)
            client.touch("x")
            client.warm("x", everything=True)
            client.remove("x")

        await ask(path, several)
    wanted = ["add", "warm False", "update", "pin True", "pin False", "touch", "warm True", "remove"]
    assert library.calls == wanted


async def test_errors_arrive_as_what_they_were(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        with pytest.raises(PipelineNotFound, match="no z"):
            await ask(path, lambda client: client.status("z"))
        with pytest.raises(PipelineExists):
            await ask(path, lambda client: client.add(library.specs["x"]))


async def test_a_defect_is_an_answer_and_a_logged_traceback(
    library: FakeLibrary, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with run(library, path):
        with pytest.raises(Exception, match="ZeroDivisionError in the daemon"):
            await ask(path, lambda client: client.evict("x"))
        assert "a defect" in caplog.text
        assert await ask(path, lambda client: client.ping()) == INFO


async def test_warm_waits_with_progress_until_all_is_there(library: FakeLibrary, path: str) -> None:
    seen: list[int] = []
    library.change(state="filling", fill=FillStatus(10, 9))

    def advance(cached: int) -> None:
        seen.append(cached)
        if cached == 0:
            library.change(cached_bytes=60)
        else:
            library.change(state="warm", cached_bytes=100, fill=None)

    def progress(status: PipelineStatus) -> None:
        trio.from_thread.run_sync(advance, status.cached_bytes)

    async with run(library, path):
        status = await ask(path, lambda client: client.wait_warm("x", progress=progress))
    assert (status.state, status.cached_bytes, status.files) == ("warm", 100, None)
    assert seen == sorted(seen)
    assert {0, 60} <= set(seen)


async def test_waiting_for_all_files_looks_at_the_files(library: FakeLibrary, path: str) -> None:
    library.change(state="warm", fill=FillStatus(1, None))
    async with run(library, path), trio.open_nursery() as nursery:

        async def finish(_: PipelineStatus | None = None) -> None:
            await library.entered.wait()
            library.change(files=(FileStatus("a", "sealed", 100, 100, None),), cached_bytes=100)

        nursery.start_soon(finish)
        status = await ask(path, lambda client: client.wait_warm("x", everything=True))
    assert status.cached_bytes == 100


async def test_a_failed_fill_ends_the_wait_with_its_reason(library: FakeLibrary, path: str) -> None:
    library.change(state="error", error=ErrorStatus("access-refused", "401 from the hub", "2026-01-01T00:00:00Z"))
    async with run(library, path):
        with pytest.raises(AccessRefused, match="401 from the hub"):
            await ask(path, lambda client: client.wait_warm("x"))


async def test_a_wait_that_nothing_would_end_is_given_up(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "IDLE_LIMIT", 0.2)
    library.change(state="partial")
    async with run(library, path):
        with pytest.raises(Exception, match="the fill has stopped"):
            await ask(path, lambda client: client.wait_warm("x"))
        library.change(uncached="store full")
        with pytest.raises(Exception, match="store full"):
            await ask(path, lambda client: client.wait_warm("x"))


async def test_a_wait_for_an_origin_that_stays_away_ends_with_its_reason(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "WAIT_PATIENCE", 0.3)
    error = ErrorStatus("origin-unavailable", "http://hub: connection refused", "2026-01-01T00:00:00Z")
    library.change(state="filling", fill=FillStatus(0, None), error=error)
    async with run(library, path):
        with pytest.raises(Exception, match=r"nothing came for .* connection refused"):
            await ask(path, lambda client: client.wait_warm("x"))


async def test_verify_reports_progress(library: FakeLibrary, path: str) -> None:
    library.hold = trio.Event()

    def progress(done: int, total: int) -> None:
        if (done, total) == (50, 100):
            trio.from_thread.run_sync(library.hold.set)

    async with run(library, path):
        found = await ask(path, lambda client: client.verify("x", progress))
    assert (found.files, found.healed) == (1, ("a",))


async def test_a_lease_ends_with_its_connection(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        with await trio.to_thread.run_sync(Client, path) as client:
            await trio.to_thread.run_sync(client.lease, "x")
            assert library.lease_count == 1
        await library.wait_leases(0)
        with pytest.raises(PipelineNotFound):
            await ask(path, lambda client: client.lease("z"))


async def test_a_change_outlives_its_client(library: FakeLibrary, path: str) -> None:
    library.hold = trio.Event()
    async with run(library, path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b'{"v":1,"request":{"op":"remove","pipeline":"x"}}\n')
            with trio.fail_after(10):
                await library.entered.wait()
        library.hold.set()
        with trio.fail_after(10):
            await library.done.wait()
    assert library.calls == ["remove"]


async def test_a_client_is_not_kept_waiting_for_ever(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "CHANGE_DEADLINE", 0.1)
    library.hold = trio.Event()
    async with run(library, path):
        with pytest.raises(PipelineBusy, match="still under way"):
            await ask(path, lambda client: client.update("x"))
        library.hold.set()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100 + b"\n", b"x" * (MAX_REQUEST + 70_000)])
async def test_garbage_is_answered_and_hurts_nobody(library: FakeLibrary, path: str, garbage: bytes) -> None:
    def shout() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            with contextlib.suppress(BrokenPipeError):  # it has had enough before all was sent
                client.sendall(garbage)
            received = b""
            with contextlib.suppress(ConnectionResetError):  # it closed with the rest of the garbage unread
                while chunk := client.recv(65536):
                    received += chunk
            return received

    async with run(library, path):
        with trio.fail_after(20):
            answer = await trio.to_thread.run_sync(shout)
        assert b'"code":"control-protocol"' in answer
        assert await ask(path, lambda client: client.ping()) == INFO


async def test_half_a_request_has_a_deadline(library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "REQUEST_DEADLINE", 0.1)

    def half() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            client.sendall(b'{"v":1,')
            return client.recv(65536)

    async with run(library, path):
        with trio.fail_after(10):
            assert b"half a request" in await trio.to_thread.run_sync(half)


async def test_owners_see_and_warm_their_own_and_nothing_else(library: FakeLibrary, path: str) -> None:
    library.specs["other"] = PipelineSpec("other", (ModelSpec("hf://o/r"),), uid=99)
    library.statuses["other"] = msgspec.structs.replace(COLD, pipeline="other")
    async with run(library, path, peer=lambda _: Peer(1, 1234, frozenset({1234}))):
        assert [status.pipeline for status in await ask(path, lambda client: client.pipelines())] == ["x"]
        await ask(path, lambda client: client.touch("x"))
        await ask(path, lambda client: client.warm("x"))
        await ask(path, lambda client: client.lease("x"))
        assert (await ask(path, lambda client: client.status("x"))).pipeline == "x"
        for forbidden in (
            lambda client: client.status("other"),
            lambda client: client.lease("other"),
            lambda client: client.remove("x"),
            lambda client: client.evict("x"),
            lambda client: client.set_pinned("x", True),
            lambda client: client.update("x"),
            lambda client: client.verify("x"),
            lambda client: client.specs(),
            lambda client: client.add(library.specs["x"]),
        ):
            with pytest.raises(PermissionRefused):
                await ask(path, forbidden)


async def test_members_of_the_group_administer(library: FakeLibrary, path: str) -> None:
    async with run(library, path, group=77, peer=lambda _: Peer(1, 1234, frozenset({5, 77}))):
        await ask(path, lambda client: client.set_pinned("x", True))


async def test_a_pipelines_group_may_do_what_its_owner_may_where_that_is_configured(
    library: FakeLibrary, path: str
) -> None:
    library.specs["x"] = msgspec.structs.replace(library.specs["x"], gid=500)
    member = {"peer": lambda _: Peer(1, 77, frozenset({77, 500}))}
    async with run(library, path, **member):
        with pytest.raises(PermissionRefused):
            await ask(path, lambda client: client.touch("x"))
        assert await ask(path, lambda client: client.pipelines()) == []
    async with run(library, path, group_access=True, **member):
        await ask(path, lambda client: client.touch("x"))
        assert [status.pipeline for status in await ask(path, lambda client: client.pipelines())] == ["x"]
        with pytest.raises(PermissionRefused):
            await ask(path, lambda client: client.evict("x"))


async def test_a_shell_completes_ids_of_what_its_user_owns_or_may_read(library: FakeLibrary, path: str) -> None:
    library.specs = {
        name: PipelineSpec(name, (ModelSpec("hf://o/r"),), uid=uid, gid=500, mode=mode)
        for name, uid, mode in (("a-mine", 77, 0o550), ("a-public", 1, 0o555), ("a-walled", 1, 0o550), ("b", 77, 0o555))
    }
    async with run(library, path, peer=lambda _: Peer(1, 77, frozenset({77}))):
        assert await ask(path, lambda client: client.names("a-")) == ["a-mine", "a-public"]
    async with run(library, path):
        assert await ask(path, lambda client: client.names("a-")) == ["a-mine", "a-public", "a-walled"]


async def test_a_stranger_learns_that_there_is_a_daemon_and_no_more(library: FakeLibrary, path: str) -> None:
    asked: list[str] = []
    real = library.list

    def watched() -> list[PipelineStatus]:
        asked.append("all")
        return real()

    async with run(library, path, peer=lambda _: Peer(1, 77, frozenset({77}))):
        library.list = watched  # type: ignore[method-assign]
        library.list_where = lambda shown: [s for s in real() if shown(library.specs[s.pipeline])]  # type: ignore[method-assign]
        assert await ask(path, lambda client: client.pipelines()) == []
        info = await ask(path, lambda client: client.ping())
        assert (info.mount, info.store, info.pipelines, info.requests) == (INFO.mount, "", 0, {})
    assert asked == [], "a stranger's ls built the statuses of all pipelines"


async def test_strangers_share_one_allowance_and_owners_have_their_own(
    library: FakeLibrary, path: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Over real sockets it would take seconds: what the server would wait is asked for directly, on a fake clock."""
    server = ControlServer(library, lambda: INFO, path)
    root, owner = Peer(1, 0, frozenset()), Peer(1, 1234, frozenset())
    waited: dict[str, list[float]] = {}

    async def ask_often(name: str, peers: list[Peer]) -> None:
        for peer in peers:
            began = trio.current_time()
            await server.callers.wait_turn(peer)
            waited.setdefault(name, []).append(trio.current_time() - began)

    burst, rate = int(callers_module.REQUEST_BURST), callers_module.REQUEST_RATE
    began = trio.current_time()
    await ask_often("strangers", [Peer(1, 5000 + number, frozenset()) for number in range(burst + 20)])
    assert trio.current_time() - began == pytest.approx(20 / rate)
    await ask_often("owner", [owner] * burst)
    await ask_often("root", [root] * 1000)
    assert max(waited["owner"]) == max(waited["root"]) == 0.0


async def connected(path: str) -> Client:
    return await trio.to_thread.run_sync(Client, path)


async def test_strangers_who_only_sit_there_give_way(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one uid with many connections nor many uids with one each keep anybody out by being idle."""
    monkeypatch.setattr(callers_module, "MAX_STRANGERS", 3)
    monkeypatch.setattr(callers_module, "MAX_CONNECTIONS_PER_OWNER", 2)
    uid = 5000
    async with run(library, path, peer=lambda _: Peer(1, uid, frozenset())):
        clients = [await connected(path) for _ in range(4)]
        for uid in range(6000, 6010):  # noqa: B007
            clients.append(await connected(path))
            await trio.to_thread.run_sync(clients[-1].ping)
        assert await trio.to_thread.run_sync(clients[0].wait_ended, 20.0)  # it gave way
        await trio.to_thread.run_sync(clients[-1].ping)
        for client in clients:
            client.close()


async def test_strangers_at_work_fill_their_own_places_and_are_named_by_their_uid(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody may open what everybody may read, for as long as they like; owners and root have other places."""
    monkeypatch.setattr(callers_module, "MAX_STRANGERS", 3)
    monkeypatch.setattr(callers_module, "MAX_CONNECTIONS_PER_OWNER", 2)
    uid = 5000
    async with run(library, path, peer=lambda _: Peer(1, uid, frozenset())):
        clients = [await connected(path) for _ in range(2)]
        for client in clients:
            await trio.to_thread.run_sync(client.open, "x")
        with pytest.raises(PipelineBusy, match="uid 5000 has 2 control connections open already"):
            await ask(path, lambda client: client.ping())
        uid = 6000
        clients.append(await connected(path))
        await trio.to_thread.run_sync(clients[-1].open, "x")
        uid = 7000
        with pytest.raises(PipelineBusy, match="3 control connections of other users"):
            await ask(path, lambda client: client.ping())
        for uid in (1234, 0):  # noqa: B007
            await ask(path, lambda client: client.touch("x"))
        for client in clients:
            client.close()


async def test_who_says_nothing_for_long_is_sent_away(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers_module, "IDLE_SECONDS", 0.1)
    uid = 1234
    async with run(library, path, peer=lambda _: Peer(1, uid, frozenset())):
        holding, idle = await connected(path), await connected(path)
        await trio.to_thread.run_sync(holding.lease, "x")
        assert await trio.to_thread.run_sync(idle.wait_ended, 20.0)
        await trio.to_thread.run_sync(idle.ping)  # which connects anew
        assert library.lease_count == 1, "a lease is no silence"
        uid = 0
        patient = await connected(path)
        assert not await trio.to_thread.run_sync(patient.wait_ended, 0.3)
        for client in (holding, idle, patient):
            client.close()


async def test_one_user_cannot_use_up_all_connections(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers_module, "MAX_CONNECTIONS_PER_OWNER", 2)
    async with run(library, path, peer=lambda _: Peer(1, 1234, frozenset())):
        clients = [await trio.to_thread.run_sync(Client, path) for _ in range(2)]
        for client in clients:
            await trio.to_thread.run_sync(client.lease, "x")
        with pytest.raises(PipelineBusy, match="2 control connections"):
            await ask(path, lambda client: client.touch("x"))
        for client in clients:
            client.close()
        await library.wait_leases(0)
        await ask(path, lambda client: client.touch("x"))


async def test_administrators_wait_for_room_and_are_told_when_there_is_none(
    library: FakeLibrary, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers_module, "MAX_CONNECTIONS", 2)
    async with run(library, path):
        async with trio.open_nursery() as nursery:  # many at once, each of which is soon done
            for _ in range(20):
                nursery.start_soon(ask, path, lambda client: client.ping())
        monkeypatch.setattr(callers_module, "SEAT_DEADLINE", 0.05)
        clients = [await trio.to_thread.run_sync(Client, path) for _ in range(2)]
        for client in clients:
            await trio.to_thread.run_sync(client.lease, "x")
        with pytest.raises(PipelineBusy, match="2 control connections"):
            await ask(path, lambda client: client.touch("x"))
        for client in clients:
            client.close()


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    listener = unixsocket.listen(str(tmp_path / "s"), mode=0o600, directory_mode=0o700, backlog=0)
    with listener, Client(str(tmp_path / "s")):
        with pytest.raises(DaemonUnreachable, match=r"is busy.*within 0.1 s; try again") as caught:
            Client(str(tmp_path / "s"), deadline=0.1)
        assert "start one" not in str(caught.value)
        threading.Timer(0.1, lambda: listener.accept()[0].close()).start()
        Client(str(tmp_path / "s"), deadline=10).close()


async def test_configured_pipelines_that_could_not_be_added_are_shown(library: FakeLibrary, path: str) -> None:
    waiting = msgspec.structs.replace(COLD, pipeline="w", state="error", files=None)
    async with run(library, path, pending=lambda: {"w": waiting}):
        assert [status.pipeline for status in await ask(path, lambda client: client.pipelines())] == ["w", "x"]
        assert await ask(path, lambda client: client.status("w")) == waiting


async def test_the_socket_is_for_all_and_its_directory_passable(library: FakeLibrary, path: str) -> None:
    before = os.umask(0o077)
    try:
        async with run(library, path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
            assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o755
    finally:
        os.umask(before)
    with pytest.raises(FileNotFoundError):
        os.stat(path)


async def test_the_kernel_says_who_connects(path: str) -> None:
    listener = listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        accepted, _ = await listener.accept()
        peer = peer_of(accepted)
        accepted.close()
    listener.close()
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert os.getegid() in peer.groups


async def test_a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not(library: FakeLibrary, path: str) -> None:
    os.makedirs(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with run(library, path):
        assert await ask(path, lambda client: client.ping()) == INFO
        with pytest.raises(ControlError, match="another daemon answers"):
            await ControlServer(library, lambda: INFO, path).run()
        assert await ask(path, lambda client: client.ping()) == INFO


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "control.sock"
    file.write_text("mine")
    with pytest.raises(ControlError, match="left alone"):
        listen(str(file))
    assert file.read_text() == "mine"
    with pytest.raises(ControlError, match="107 bytes"):
        listen(str(tmp_path / ("x" * 120)))


def test_no_daemon_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match=r"no daemon listens there.*instantstart start"):
        Client(str(tmp_path / "none.sock"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(DaemonUnreachable, match="is gone"):
        Client(str(tmp_path / "dead.sock"))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", DaemonUnreachable),
        (b"hello\n", ControlProtocolError),
        (b'{"type":"done","result":7}\n', ControlProtocolError),
    ],
)
def test_a_stranger_on_the_socket(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    path = str(tmp_path / "strange.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with Client(path) as client, pytest.raises(error):
            client.status("x")
        thread.join(10)


def opened(client: Client) -> dict[str, list[bytes]]:
    handed = client.open("x")
    found: dict[str, list[bytes]] = {}
    for path, fds in handed.files():
        found[path] = [os.pread(fd, 100, 0) for fd in fds]
        for fd in fds:
            os.close(fd)
    assert sorted(file.path for file in handed.weights.files) == sorted(found)
    return found


async def test_open_hands_descriptors_to_whoever_may_read_and_to_nobody_else(library: FakeLibrary, path: str) -> None:
    library.specs["x"] = PipelineSpec("x", (ModelSpec("hf://o/r"),), uid=1234, gid=50, mode=0o550)
    for uid, groups, may in ((1234, {9}, True), (77, {9, 50}, True), (77, {9}, False), (0, {0}, True)):
        library.handover = FakeHandover([("a", b"one"), ("b", b"two")], [], [("c", b"")])
        peer = Peer(1, uid, frozenset(groups))
        async with run(library, path, peer=lambda _, peer=peer: peer):
            if may:
                found = await ask(path, opened)
                assert found == {"a": [b"one"] * 2, "b": [b"two"] * 2, "c": [b""] * 2}
            else:
                with pytest.raises(PermissionRefused, match="belong to 1234:50 with mode 0550"):
                    await ask(path, opened)
                assert library.lease_count == 0


async def test_the_lease_of_an_open_lasts_as_long_as_its_connection(library: FakeLibrary, path: str) -> None:
    async with run(library, path):
        client = Client(path)
        held = await trio.to_thread.run_sync(client.open, "x")
        assert len([os.close(fd) for _, fds in await trio.to_thread.run_sync(lambda: list(held.files())) for fd in fds])
        assert library.lease_count == 1
        assert not await trio.to_thread.run_sync(held.wait_ended, 0.01)
        client.close()
        await library.wait_leases(0)


async def test_a_fill_that_fails_ends_an_open(library: FakeLibrary, path: str) -> None:
    library.handover = FakeHandover([("a", b"one")], AccessRefused("the token is bad"))
    async with run(library, path):
        with pytest.raises(AccessRefused, match="token is bad"):
            await ask(path, opened)
        await library.wait_leases(0)


async def test_more_files_than_fit_in_one_message(library: FakeLibrary, path: str) -> None:
    turns = [[(f"{turn}-{number}", b"%d" % number) for number in range(32)] for turn in range(5)]
    library.handover = FakeHandover(*turns)
    async with run(library, path):
        found = await ask(path, opened)
    assert isinstance(found, dict) and len(found) == 160
    assert all(contents == [path.partition("-")[2].encode()] * 2 for path, contents in found.items())


@pytest.mark.parametrize("how", ["lease", "open"])
async def test_by_force_the_leases_end_and_whoever_held_them_is_told(library: FakeLibrary, path: str, how: str) -> None:
    library.handover = FakeHandover([("a", b"one")])
    async with run(library, path):
        holder, other = await connected(path), await connected(path)
        held = await trio.to_thread.run_sync(getattr(holder, how), "x")
        with pytest.raises(PipelineBusy):
            await trio.to_thread.run_sync(other.remove, "x")
        assert library.lease_count == 1
        assert await trio.to_thread.run_sync(lambda: other.remove("x", force=True)) == ["pid 7 (engine, uid 1)"]
        await library.wait_leases(0)
        with trio.fail_after(10):
            while not await trio.to_thread.run_sync(held.wait_ended, 1.0):
                pass
        holder.close()
        other.close()
