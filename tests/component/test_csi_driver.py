"""The node driver's order of things while calls overlap and fail: over the real control server, without a mount."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instantstart_fs.control.client import Client
from instantstart_fs.core.status import ErrorStatus
from instantstart_fs.csi import driver as driver_module
from instantstart_fs.csi.driver import Driver
from instantstart_fs.csi.patience import Deadline, Patience, closed_after
from instantstart_fs.csi.records import Volume
from instantstart_fs.errors import AccessRefused, InstantStartError, PipelineBusy, ReadDeadline
from tests.component.test_clients import Server
from tests.harness import wait_for

POD = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.namespace": "a", "source": "o/r"}


class Node:
    """A driver whose binds only count, and the daemon's server that it asks."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.server, self.library = server, server.library
        self.library.tokens = {"good", "better"}
        self.kubelet = directory / "kubelet"
        self.kubelet.mkdir()
        self.tokens = directory / "state/tokens"
        self.driver = Driver(server.path, str(directory / "state"), str(self.kubelet))
        self.shown: list[str] = []
        self.driver._show = lambda pipeline, target, deadline: self.shown.append(target)  # type: ignore[method-assign]

    def publish(self, volume: str, token: str = "good", seconds: float = 60.0, **attributes: str) -> None:
        target = f"{self.kubelet}/{volume}/mount"
        secrets = {"token": token}
        self.driver.publish(volume, target, {**POD, "warm": "no", **attributes}, secrets, "", Deadline(seconds))

    def unpublish(self, volume: str) -> None:
        self.driver.unpublish(volume, f"{self.kubelet}/{volume}/mount", Deadline(60))

    def on_disk(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.tokens.iterdir()}

    def volumes(self) -> set[str]:
        return {volume.volume_id for volume in self.driver._records.all()}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Server(str(tmp_path / "run" / "control.sock")) as server:
        made = Node(tmp_path, server)
        try:
            yield made
        finally:
            made.driver.leases.end()


@pytest.fixture
def paused(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(a publish of "later" has its token and is about to write its record, it may go on)."""
    there, on = threading.Event(), threading.Event()
    put = node.driver._records.put

    def slowly(volume: Volume) -> None:
        if volume.volume_id == "later":
            there.set()
            assert on.wait(60)
        put(volume)

    monkeypatch.setattr(node.driver._records, "put", slowly)
    yield there, on
    on.set()


class Call(threading.Thread):
    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def result(self) -> None:
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_a_rolling_update_keeps_token_and_lease(node: Node, paused: tuple[threading.Event, threading.Event]) -> None:
    """The last old pod goes while its successor is being published, and has no record yet."""
    there, on = paused
    node.publish("old")
    [name] = node.on_disk()
    later = Call(lambda: node.publish("later"))
    assert there.wait(60)
    node.unpublish("old")
    on.set()
    later.result()
    assert node.on_disk() == {name: "good"} and node.volumes() == {"later"}
    with Client(node.server.path) as client:
        assert client.ping() and node.library.lease_count == 1
    node.unpublish("later")
    wait_for(lambda: node.library.lease_count == 0, "the end of the lease")
    assert not node.on_disk() and not node.volumes()


def test_what_fails_for_good_after_a_time_out_leaves_nothing(node: Node) -> None:
    """A kubelet that gets such an error for a volume that it does not know as mounted never unpublishes it."""
    with pytest.raises(ReadDeadline):
        node.publish("v", warm="wait", seconds=1.0)
    assert node.volumes() == {"v"} and list(node.on_disk().values()) == ["good"], "the fill goes on"
    [name] = node.on_disk()
    failed = ErrorStatus("access-refused", "the repository is gated", "2026-01-01T00:00:00Z")
    node.library.statuses[name] = msgspec.structs.replace(node.library.statuses[name], state="error", error=failed)
    with pytest.raises(InstantStartError, match="gated"):
        node.publish("v", warm="wait")
    assert not node.volumes() and not node.on_disk()
    wait_for(lambda: node.library.lease_count == 0, "the end of the lease")


def test_unpublish_takes_the_token_of_a_volume_that_has_no_record(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise ReadDeadline("the daemon is slow")

    monkeypatch.setattr(node.driver._records, "put", late)
    with pytest.raises(ReadDeadline):
        node.publish("v")
    assert node.on_disk() and not node.volumes()
    node.unpublish("v")
    assert not node.on_disk()


def test_a_token_that_is_not_proven_is_nobodys(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is asked, and if the driver is killed then, fills of other pods ask with the good one."""
    node.publish("one")
    [name] = node.on_disk()
    seen: list[str] = []
    ask = node.library.check_access

    async def watched(pipeline: str, token_file: str | None = None) -> tuple[str, ...]:
        seen.append((node.tokens / name).read_text())
        return await ask(pipeline, token_file)

    monkeypatch.setattr(node.library, "check_access", watched)
    with pytest.raises(AccessRefused):
        node.publish("two", token="bad")
    assert seen == ["good"] and node.on_disk() == {name: "good"} and node.volumes() == {"one"}
    node.publish("two", token="better")
    assert seen == ["good", "good"] and node.on_disk() == {name: "better"}


def test_pods_of_one_model_need_not_wait_for_its_fill_one_after_another(node: Node) -> None:
    first = Call(lambda: node.publish("one", warm="wait"))
    wait_for(lambda: "one" in node.volumes() and node.library.lease_count, "the fill's begin")
    node.publish("two")
    assert len(node.shown) == 1
    [name] = node.on_disk()
    node.library.statuses[name] = msgspec.structs.replace(node.library.statuses[name], state="warm", cached_bytes=10**9)
    first.result()
    assert len(node.shown) == 2


def test_a_pipeline_that_is_being_added_is_asked_for_again(node: Node) -> None:
    """The daemon knows its name and not yet its status: that is no NOT_FOUND, after which a kubelet forgets it."""
    request = driver_module.volume_request({**POD}, group="", token_file=None)
    node.library.specs[request.spec.id] = request.spec
    with Client(node.server.path) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver_module, "_find", lambda *_: None)
        with pytest.raises(PipelineBusy):
            driver_module._add(client, request.spec)


def test_the_deadlines_own_closing_is_a_deadline(node: Node) -> None:
    """The timer's close may come before the next request, which then finds a client that is closed."""
    with pytest.raises(ReadDeadline), node.driver._client(Deadline(0.3)) as client:
        wait_for(lambda: client._closed, "the timer")
        client.ping()
    with Client(node.server.path) as client, pytest.raises(ReadDeadline), closed_after(client, 0.01):
        wait_for(lambda: client._closed, "the timer")
        client.lease("x")


def test_what_hangs_hangs_once() -> None:
    patience, on, begun, undone = Patience(), threading.Event(), threading.Semaphore(0), threading.Event()

    def hang() -> int:
        begun.release()
        assert on.wait(60)
        return 7

    for _ in range(3):
        with pytest.raises(ReadDeadline):
            patience.run("m", 0.05, hang, lambda result: undone.set() if result == 7 else None)
    assert begun.acquire(timeout=60) and not begun.acquire(blocking=False), "one thread, however often it is tried"
    assert patience.run("other", 60, lambda: 1) == 1
    on.set()
    assert undone.wait(60), "what came too late is given back"
    assert patience.run("m", 60, lambda: 2) == 2
    with pytest.raises(OSError, match="no"):
        patience.run("m", 60, _fail)


def _fail() -> None:
    raise OSError("no")


def test_looks_at_volumes_leave_threads_for_everything_else() -> None:
    pytest.importorskip("grpc")
    from instantstart_fs.csi import server as server_module

    on, left = threading.Event(), []

    class Silent:
        def condition(self, volume_id: str, path: str, deadline: Deadline) -> None:
            left.append(deadline.left())
            assert on.wait(60)
            raise ReadDeadline("silent")

    class Context:
        def time_remaining(self) -> float:
            return 100.0

        def is_active(self) -> bool:
            return True

    service = server_module.Service(Silent(), "n")  # type: ignore[arg-type]
    ask = server_module.messages.message("NodeGetVolumeStatsRequest")(volume_id="v", volume_path="/p")
    calls = [Call(lambda: service.NodeGetVolumeStats(ask, Context())) for _ in range(server_module.STATS)]
    wait_for(lambda: len(left) == server_module.STATS, "all places taken")
    with pytest.raises(PipelineBusy):
        service.NodeGetVolumeStats(ask, Context())
    assert max(left) <= server_module.STATS_SECONDS
    on.set()
    for call in calls:
        with pytest.raises(ReadDeadline):
            call.result()
    with pytest.raises(ReadDeadline):  # the places are free again
        service.NodeGetVolumeStats(ask, Context())
