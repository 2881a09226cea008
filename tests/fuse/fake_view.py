"""A View made of plain dictionaries, and a daemon that serves it: the mount's tests need no library, store or network.

As a program, ``fake_view.py MOUNTPOINT [WARM_BYTES]`` mounts the tree of ``standard_tree``, prints "ready" and serves
it until SIGTERM. It obeys lines on stdin: "add NAME", "remove NAME", "grow NAME" (in /live, with invalidations), and
answers each with "ok"; "stuck" is answered with the number of reads that wait and of the 4 MiB regions that they touch,
"unstick" lets them go on, "open" tells how many files are open; "false-alarm" see _raise_false_alarm.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import trio

from instantstart_fs.errors import InstantStartError, NoSuchEntry, OriginBroken, ReadDeadline
from instantstart_fs.vfs import ROOT, Attributes, FilesystemStats, Invalidation, OpenFile

BLOCK = bytes((i * 131 + i // 256 * 17 + 7) % 256 for i in range(65521))
"""A prime period, so that no chunk or page looks like its neighbour."""


CTX: Any = SimpleNamespace(uid=0, gid=0, pid=os.getpid())
"""The context of a request of this process."""


async def errno_of(request: Awaitable[object], error: type[Any]) -> int:
    """The errno of the ``error`` in which a request ends; an AssertionError where it ends in another, or well."""
    try:
        await request
    except error as caught:
        return int(caught.errno)
    raise AssertionError(f"no {error.__name__} was raised")


def content(offset: int, length: int) -> bytes:
    """What every fake file holds at ``offset``."""
    start = offset % len(BLOCK)
    return (BLOCK * ((start + length) // len(BLOCK) + 1))[start : start + length]


class Handle:
    def __init__(self, nodeid: int) -> None:
        self.nodeid = nodeid
        self.pipeline = "fake"
        self.sealed = False
        self.keep_cache = True
        self.backing: int | None = None


class FakeView:
    """Files whose name begins with "stuck" never answer a read; "fails-…" raise; "bug" raises what nobody foresaw."""

    def __init__(self) -> None:
        self._send, self.invalidations = trio.open_memory_channel[Invalidation](math.inf)
        self.nodes: dict[int, Attributes] = {}
        self.children: dict[int, dict[str, int]] = {}
        self.links: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.stuck: dict[tuple[int, int], int] = {}
        self.unstuck = trio.Event()
        self.open_files: list[Handle] = []
        self.calls: list[str] = []
        self._next = 1024
        self._put(ROOT, "dir", "", 0, stable=False)

    def _put(self, nodeid: int, kind: str, name: str, size: int, *, stable: bool) -> None:
        mode = {"dir": stat.S_IFDIR | 0o555, "file": stat.S_IFREG | 0o444, "symlink": stat.S_IFLNK | 0o777}[kind]
        self.names[nodeid] = name
        self.nodes[nodeid] = Attributes(
            nodeid=nodeid, kind=kind, mode=mode, uid=os.geteuid(), gid=os.getegid(), size=size,  # type: ignore[arg-type]
            blocks=-(-size // 512), atime_ns=1_700_000_000_000_000_001, mtime_ns=1_600_000_000_123_456_789,
            ctime_ns=1_650_000_000_000_000_000, nlink=2 if kind == "dir" else 1, stable=stable,
        )  # fmt: skip
        if kind == "dir":
            self.children[nodeid] = {}

    def add(
        self, parent: int, name: str, kind: str = "file", size: int = 0, *, stable: bool = True, link: str = ""
    ) -> int:
        nodeid = self._next
        self._next += 1
        self._put(nodeid, kind, name, len(link.encode()) if kind == "symlink" else size, stable=stable)
        self.children[parent][name] = nodeid
        if kind == "symlink":
            self.links[nodeid] = link
        return nodeid

    def remove(self, parent: int, name: str) -> None:
        del self.nodes[self.children[parent].pop(name)]

    def invalidate(self, invalidation: Invalidation) -> None:
        self._send.send_nowait(invalidation)

    # The View

    bindings = None

    async def ensure_loaded(self, pipeline: str) -> None:
        raise AssertionError("everything is in memory")

    def use_passthrough(self, on: bool, closing: Callable[[int], None] | None = None) -> None:
        """Fake files have no bytes on a disk: on every transport they are read through the View."""

    def lookup(self, parent: int, name: str) -> Attributes:
        self.calls.append(f"lookup {name}")
        if name == "bug":
            raise ZeroDivisionError("a bug in lookup")
        try:
            return self.nodes[self.children[parent][name]]
        except KeyError:
            raise NoSuchEntry(f"no {name!r} in node {parent}") from None

    def attributes(self, nodeid: int) -> Attributes:
        self.calls.append(f"attributes {nodeid}")
        try:
            return self.nodes[nodeid]
        except KeyError:
            raise NoSuchEntry(f"node {nodeid} is gone") from None

    def list_directory(self, nodeid: int) -> Sequence[str]:
        self.attributes(nodeid)
        return list(self.children[nodeid])

    def keeps_listing(self, nodeid: int) -> bool:
        return nodeid != ROOT and all(self.nodes[child].stable for child in self.children[nodeid].values())

    def readlink(self, nodeid: int) -> str:
        return self.links[nodeid]

    def xattrs(self, nodeid: int) -> dict[str, bytes]:
        return {"user.instantstart.state": b"warm", "user.instantstart.error": b""} if nodeid != ROOT else {}

    def filesystem(self) -> FilesystemStats:
        return FilesystemStats(total_bytes=1 << 40, available_bytes=1 << 39, files=len(self.nodes))

    def pipeline_of(self, nodeid: int) -> str | None:
        return "fake" if nodeid != ROOT else None

    def open_nowait(self, nodeid: int) -> OpenFile | None:
        """Some opens wait, so that both ways are walked."""
        if self.names.get(nodeid, "").startswith(("slow", "stuck")):
            return None
        return self._open(nodeid)

    async def open(self, nodeid: int) -> OpenFile:
        await trio.lowlevel.checkpoint()
        return self._open(nodeid)

    def _open(self, nodeid: int) -> OpenFile:
        self.attributes(nodeid)
        if self.names[nodeid] == "fails-open":
            raise OriginBroken("the breaker is open")
        handle = Handle(nodeid)
        self.open_files.append(handle)
        return handle

    async def read_into(self, file: OpenFile, offset: int, buffer: memoryview) -> int:
        name = self.names[file.nodeid]
        failure: dict[str, Callable[[str], Exception]] = {
            "fails-read": ReadDeadline, "fails-bug": RuntimeError, "fails-base": InstantStartError,
        }  # fmt: skip
        if name in failure:
            raise failure[name]("as asked")
        if name.startswith("stuck"):
            key = (file.nodeid, offset)
            self.stuck[key] = self.stuck.get(key, 0) + 1
            try:
                await self.unstuck.wait()
            finally:
                self.stuck[key] -= 1
        if name.startswith("slow"):
            await trio.lowlevel.checkpoint()
        length = max(0, min(len(buffer), self.nodes[file.nodeid].size - offset))
        buffer[:length] = content(offset, length)
        return length

    def reopen(self, nodeid: int) -> Handle:
        handle = Handle(nodeid)
        self.open_files.append(handle)
        return handle

    def on_mounted(self, *, resumed: bool) -> None:
        self.calls.append(f"settle {resumed}")

    def release(self, file: OpenFile) -> None:
        assert isinstance(file, Handle)
        self.open_files.remove(file)
        if self.names[file.nodeid] == "fails-release":
            raise RuntimeError("a bug in release")


MIB = 1024 * 1024


def standard_tree(view: FakeView, warm_bytes: int = 8 * MIB + 4321) -> None:
    model = view.add(ROOT, "model", "dir")
    view.add(model, "weights.safetensors", size=warm_bytes)
    view.add(model, "slow.safetensors", size=24 * MIB + 17)
    view.add(model, "empty.json")
    view.add(model, "with space ü 模型.json", size=100)
    view.add(model, "link", "symlink", link="weights.safetensors")
    for name in ("fails-open", "fails-read", "fails-bug", "fails-base", "fails-release"):
        view.add(model, name, size=100)
    for i in range(64):
        view.add(model, f"stuck{i}", size=4 * MIB)
    view.add(model, "stuck", size=256 * MIB)
    live = view.add(ROOT, "live", "dir")
    view.add(live, "first", size=10)
    many = view.add(ROOT, "many", "dir")
    for i in range(10_000):
        view.add(many, f"file-{i:05}", size=i)


async def _obey(view: FakeView) -> None:
    live = view.children[ROOT]["live"]
    buffered = b""
    stdin = trio.lowlevel.FdStream(os.dup(0))
    async for data in stdin:
        buffered += data
        while b"\n" in buffered:
            line, buffered = buffered.split(b"\n", 1)
            answer = _do(view, live, line.decode().split(" "))
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()


def _do(view: FakeView, live: int, words: list[str]) -> str:
    match words:
        case ["add", name]:
            view.add(live, name, size=10)
        case ["remove", name]:
            view.remove(live, name)
        case ["grow", name]:
            view._put(view.children[live][name], "file", name, 20, stable=True)
            view.invalidate(Invalidation(parent=live, name=None, nodeid=view.children[live][name]))
            return "ok"
        case ["stuck"]:
            waiting = [key for key, count in view.stuck.items() if count]
            return f"{len(waiting)} {len({(nodeid, offset // (4 * MIB)) for nodeid, offset in waiting})}"
        case ["unstick"]:
            view.unstuck.set()
            return "ok"
        case ["false-alarm"]:
            return _raise_false_alarm()
        case ["false-alarms"]:
            return str(len(FALSE_ALARMS))
        case ["open"]:
            return str(len(view.open_files))
        case _:
            return "what?"
    view.invalidate(Invalidation(parent=live, name=words[1]))
    return "ok"


FALSE_ALARMS: list[None] = []


def _raise_false_alarm() -> str:
    """The next time that a task of pyfuse3 is about to poll, it believes that a request is there."""
    import pyfuse3

    original = getattr(pyfuse3, "_true_wait", pyfuse3._wait_fuse_readable)  # type: ignore[attr-defined]
    pyfuse3._true_wait = original  # type: ignore[attr-defined]

    async def wait_fuse_readable() -> bool:
        if FALSE_ALARMS:
            FALSE_ALARMS.pop()
            return True
        return bool(await original())

    FALSE_ALARMS.append(None)
    pyfuse3._wait_fuse_readable = wait_fuse_readable  # type: ignore[attr-defined]
    return "ok"


async def _serve(path: str, warm_bytes: int, transport: Any) -> None:
    from instantstart_fs.mount.session import serve
    from instantstart_fs.mount.transport import MountSettings

    view = FakeView()
    standard_tree(view, warm_bytes)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, view, MountSettings(path=path, transport=transport))
            nursery.start_soon(_obey, view)
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            async for _ in signals:
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("FAKE_LOG", "INFO"))
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 8 * MIB + 4321
    trio.run(_serve, sys.argv[1], size, os.environ.get("FAKE_TRANSPORT", "auto"))
