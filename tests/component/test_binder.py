"""The binder over a made-up kernel and library: what is opened at the wrong moment, and what goes wrong with it."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from instantstart_fs.errors import PipelineBusy
from instantstart_fs.mount import bind_mounts, kernel
from instantstart_fs.mount.bind_mounts import Binder
from instantstart_fs.mount.kernel import FanEvent
from instantstart_fs.serving.bindings import BindableFile, Bindings, Withdraw
from instantstart_fs.store.layout import BIND
from instantstart_fs.system import mountinfo

pytestmark = pytest.mark.timeout(60)
ELSEWHERE = 7
"""The id of some mount that is not the store's."""


class FakeKernel:
    """Mounts are symbolic links; what fanotify tells is what tests say."""

    def __init__(self, store: Path) -> None:
        self.stage, self.slots = f"{store}/{BIND}", f"{store}/slots"
        self.mounted: dict[str, list[str]] = {}
        """Where → what lies there, the topmost last."""
        self.after_bind: Callable[[str], None] = lambda target: None
        """In the binder's thread, as all of these."""
        self.before_umount: Callable[[str], None] = lambda target: None
        self.told: list[FanEvent | OSError] = []
        self.heard = threading.Event()
        self._readable = -1

    def fanotify(self) -> int:
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._readable

    def fan_mark(self, fd: int, path: str, *, add: bool) -> None:
        pass

    def fan_events(self, fd: int) -> list[FanEvent]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        self.heard.set()
        told, self.told = self.told, []
        for one in told:
            if isinstance(one, OSError):
                raise one
        return [one for one in told if isinstance(one, FanEvent)]

    def tell(self, *told: FanEvent | OSError) -> None:
        self.heard.clear()
        self.told += told
        os.eventfd_write(self._readable, 1)

    def opens(self, path: Path, *, unheard: bool = False) -> None:
        """Somebody opens that file of the store through a bind. ``unheard``: while the binder waits for the next look
        at the events."""
        found = path.stat()
        event = FanEvent((found.st_dev, found.st_ino), ELSEWHERE, opened=True, closed=False)
        if unheard:
            self.told.append(event)
        else:
            self.tell(event)

    def bind(self, source: str, target: str) -> None:
        self.mounted.setdefault(target, []).append(source.replace(self.stage, self.slots))
        if target != self.stage:
            self._show(target)
            self.after_bind(target)

    def make_bind_readonly(self, path: str) -> None:
        pass

    def umount(self, path: str, *, lazily: bool = False) -> None:
        if path != self.stage:
            self.before_umount(path)
        if not self.mounted.get(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.mounted[path].pop()
        if path != self.stage:
            self._show(path)

    def _show(self, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        if self.mounted[target]:
            os.symlink(self.mounted[target][-1], target)

    def find_mount(self, path: str) -> mountinfo.Mount | None:
        return next((mount for mount in self.mounts() if mount.path == path), None)

    def mounts(self) -> tuple[mountinfo.Mount, ...]:
        return tuple(
            mountinfo.Mount(0, "", path, "", source, "") for path, stack in self.mounted.items() for source in stack
        )


class FakeBlob:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> FakeBlob:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


class FakeBindings:
    """One pipeline, whose files may be bound. ``in_memory``: what needs its files need not read them on the loop."""

    def __init__(self, files: dict[str, BindableFile], slots: Path) -> None:
        self._files, self._slots = files, slots
        self.in_memory = False
        self.opens: list[str] = []
        self.opened_one = trio.Event()
        self.shown_again = trio.Event()
        self.requests = 0
        self.withdraw: Withdraw | None = None
        self._changed: set[str] = {"p"}
        self._wake = trio.Event()

    def attach(self, withdraw: Withdraw | None) -> None:
        self.withdraw = withdraw

    def wake(self) -> None:
        self._changed.add("p")
        self._wake.set()

    async def wait_changed(self, timeout: float) -> set[str]:
        with trio.move_on_after(timeout):
            await self._wake.wait()
        self._wake = trio.Event()
        changed, self._changed = self._changed, set()
        return changed

    async def ensure_loaded(self, pipeline: str) -> None:
        if not self.in_memory:
            await trio.lowlevel.checkpoint()
        self.in_memory = True

    def _reads(self) -> None:
        assert self.in_memory, "read on the loop"

    def files(self, pipeline: str) -> dict[str, BindableFile]:
        self._reads()
        return dict(self._files)

    def descriptor(self, wanted: BindableFile) -> FakeBlob:
        return FakeBlob(self._slots / "p" / "1" / "files" / wanted.path)

    def attributes(self, bound: BindableFile) -> tuple[int, dict[str, str]]:
        self._reads()
        if self.requests:
            self.shown_again.set()
        return bound.mtime_ns, {}

    def opened(self, bound: BindableFile) -> None:
        self._reads()
        self.opens.append(bound.path)
        self.opened_one.set()

    def in_use(self, bound: BindableFile) -> bool:
        self._reads()
        return False

    def is_open(self, bound: BindableFile) -> bool:
        return False

    def poll_releases(self) -> set[str]:
        return set()

    def last_request(self, pipeline: str) -> int:
        return self.requests


class World:
    def __init__(self, root: Path) -> None:
        self.store, self.mount = root / "store", root / "mnt"
        self.files = self.store / "slots" / "p" / "1" / "files"
        self.files.mkdir(parents=True)
        (self.mount / "p").mkdir(parents=True)
        wanted = {}
        for index, path in enumerate(("a", "b")):
            (self.files / path).write_bytes(path.encode())
            (self.files / path).chmod(0o444)
            wanted[path] = BindableFile("p", 1, index, 0, path, 0o444, os.geteuid(), os.getegid(), 0)
        self.kernel = FakeKernel(self.store)
        self.bindings = FakeBindings(wanted, self.store / "slots")
        self.binder = Binder(cast(Bindings, self.bindings), str(self.store))

    def target(self, path: str) -> str:
        return str(self.mount / "p" / path)

    def bound(self, path: str) -> int:
        """How many lie over each other there."""
        return len(self.kernel.mounted.get(self.target(path), []))

    async def withdraw(self, *, idle_only: bool) -> None:
        assert self.bindings.withdraw is not None
        await self.bindings.withdraw("p", idle_only)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)
    for name in ("fanotify", "fan_mark", "fan_events", "bind", "make_bind_readonly", "umount"):
        monkeypatch.setattr(kernel, name, getattr(world.kernel, name))
    for name in ("find_mount", "mounts"):
        monkeypatch.setattr(mountinfo, name, getattr(world.kernel, name))
    monkeypatch.setattr(bind_mounts, "RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(bind_mounts, "CHECK_INTERVAL", 0.05)
    yield world


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(world.binder.run, str(world.mount))
            yield
            nursery.cancel_scope.cancel()


async def test_what_is_opened_while_the_rest_of_its_batch_is_bound_counts(world: World) -> None:
    def after_bind(target: str) -> None:
        if target == world.target("b"):
            world.kernel.opens(world.files / "a")
            assert world.kernel.heard.wait(10)

    async with running(world):
        await world.withdraw(idle_only=False)
        assert (world.bound("a"), world.bound("b")) == (0, 0)
        world.kernel.after_bind = after_bind
        world.bindings.wake()
        await world.bindings.opened_one.wait()
        assert world.bindings.opens == ["a"]


@pytest.mark.parametrize("idle_only", [True, False])
async def test_what_is_opened_just_before_its_bind_is_taken_away_counts(world: World, idle_only: bool) -> None:
    def before_umount(target: str) -> None:
        if target == world.target("b"):
            world.kernel.opens(world.files / "b", unheard=True)
            if not idle_only:
                return
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    async with running(world):
        world.kernel.before_umount = before_umount
        with pytest.raises(PipelineBusy) if idle_only else contextlib.nullcontext():
            await world.withdraw(idle_only=idle_only)
        assert world.bindings.opens == ["b"]


async def test_events_that_cannot_be_told_of_end_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with running(world):
        for _ in range(2):
            world.kernel.tell(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            await trio.to_thread.run_sync(world.kernel.heard.wait, 10)
        world.kernel.opens(world.files / "a")
        await world.bindings.opened_one.wait()
        world.kernel.told = [OSError(errno.ENFILE, os.strerror(errno.ENFILE))]
        await world.withdraw(idle_only=True)
        assert (world.bound("a"), world.bound("b")) == (0, 0)
    assert world.bindings.opens == ["a"]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "opens of bound files are not seen, trying on: Too many open files",
        "opens of bound files are not seen, trying on: Too many open files in system",
    ]


async def test_a_mount_table_that_cannot_be_read_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = threading.Event()

    def no_descriptor() -> None:
        asked.set()
        refuse()

    async with running(world):
        with monkeypatch.context() as without:
            without.setattr(mountinfo, "mounts", no_descriptor)
            assert await trio.to_thread.run_sync(asked.wait, 10)
            while "the mount table cannot be read" not in caplog.text:
                await trio.sleep(0.01)
        world.kernel.opens(world.files / "a")
        await world.bindings.opened_one.wait()


async def test_an_unloaded_pipeline_is_loaded_before_an_open_is_recorded_and_shown(world: World) -> None:
    async with running(world):
        world.bindings.in_memory = False
        world.kernel.opens(world.files / "a")
        await world.bindings.opened_one.wait()
        world.bindings.in_memory = False
        world.bindings.requests += 1  # a lease, say
        await world.bindings.shown_again.wait()
        world.bindings.in_memory = False
        await world.withdraw(idle_only=True)


@pytest.mark.parametrize("undone", [True, False])
async def test_a_bind_that_cannot_be_looked_at_does_not_stay(
    world: World, undone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another would be bound over it, and it would come to light when that one is taken away."""
    failures = iter([True])

    def after_bind(target: str) -> None:
        if target == world.target("a") and next(failures, False):
            os.unlink(target)  # so that stat fails
            if not undone:
                world.kernel.before_umount = not_now

    def not_now(target: str) -> None:
        world.kernel.before_umount = lambda target: None
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    world.kernel.after_bind = after_bind
    async with running(world):
        assert world.bound("b") == 1
        assert world.bound("a") == (0 if undone else 1)
        while "a" not in world.binder._bound["p"]:
            await trio.sleep(0.01)
        await world.withdraw(idle_only=False)
        assert (world.bound("a"), world.bound("b")) == (0, 0)


@pytest.mark.skipif(not kernel.has_sys_admin(), reason="fanotify needs CAP_SYS_ADMIN")
def test_no_descriptor_of_an_event_is_left_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fan = kernel.fanotify()
    try:
        paths = [tmp_path / name for name in "abc"]
        for path in paths:
            path.touch()
            kernel.fan_mark(fan, str(path), add=True)
        before = descriptors()

        def touch_all() -> None:
            for path in paths:
                path.open().close()

        touch_all()
        with monkeypatch.context() as failing:
            failing.setattr(kernel, "mount_id", refuse)
            assert {event.mount_id for event in kernel.fan_events(fan)} == {kernel.UNKNOWN_MOUNT}
        assert descriptors() == before
        touch_all()
        with monkeypatch.context() as failing:
            failing.setattr(kernel.os, "fstat", refuse)  # type: ignore[attr-defined]
            with pytest.raises(OSError, match="Too many"):
                kernel.fan_events(fan)
        assert descriptors() == before
        touch_all()
        assert len(kernel.fan_events(fan)) >= len(paths)
        assert descriptors() == before
    finally:
        os.close(fan)


def refuse(*given: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))
