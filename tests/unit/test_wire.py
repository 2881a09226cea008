"""The kernel protocol's layouts, and what becomes of messages that no kernel would send."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantstart_fs.mount import wire
from instantstart_fs.mount.backing_ids import BackingIds
from instantstart_fs.mount.devfuse import HANDLERS, DevFuse
from instantstart_fs.mount.operations import entry_attributes
from instantstart_fs.vfs import ROOT, Attributes, NotLoaded
from tests.fuse.fake_view import FakeView, content, standard_tree
from tests.harness import REPOSITORY

SIZES = {
    "IN_HEADER": 40, "OUT_HEADER": 16, "INIT_IN": 16, "INIT_OUT": 64, "ATTR": 88, "ENTRY": 40, "ATTR_OUT": 16,
    "OPEN_IN": 8, "OPEN_OUT": 16, "RELEASE_IN": 24, "READ_IN": 40, "KSTATFS": 80, "XATTR_SIZE": 8, "DIRENT": 24,
    "INVAL_ENTRY": 16, "INVAL_INODE": 24, "BACKING_MAP": 16,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_the_sizes_are_those_of_the_kernels_header(name: str, size: int) -> None:
    assert getattr(wire, name).size == size


def message(opcode: int, body: bytes = b"", *, unique: int = 7, nodeid: int = 1, extra: int = 0) -> bytes:
    return wire.IN_HEADER.pack(40 + len(body) + extra, opcode, unique, nodeid, 0, 0, 0, 0, 0) + body


def test_a_request_is_its_header_and_its_body() -> None:
    request = wire.parse(memoryview(message(wire.LOOKUP, b"name\0", nodeid=5)))
    assert (request.opcode, request.unique, request.nodeid, bytes(request.body)) == (wire.LOOKUP, 7, 5, b"name\0")
    assert wire.name(request.body) == b"name"


@pytest.mark.parametrize("raw", [b"", bytes(39), message(1, extra=1), message(1, b"abc", extra=-1)])
def test_lengths_that_lie_are_refused(raw: bytes) -> None:
    with pytest.raises(wire.BadMessage):
        wire.parse(memoryview(raw))


@pytest.mark.parametrize("raw", [b"", b"no end", b"\0"])
def test_names_that_are_none_are_refused(raw: bytes) -> None:
    with pytest.raises(wire.BadMessage):
        wire.name(memoryview(raw))


def test_init_takes_what_is_offered_and_wanted() -> None:
    offered = wire.INIT_IN.pack(7, 45, 131072, wire.INIT_EXT | wire.ASYNC_READ | 1 << 3) + struct.pack("=I", 1 << 5)
    offer = wire.init_in(memoryview(offered + bytes(44)))
    assert offer.flags & wire.PASSTHROUGH
    reply = wire.INIT_OUT.unpack(wire.init_out(offer, readahead=1 << 20, background=1024, max_pages=256))
    assert reply[:4] == (7, 40, 1 << 20, wire.INIT_EXT | wire.ASYNC_READ)
    assert (reply[8], reply[10], reply[11]) == (256, 1 << 5, 1)


def test_an_entry_shows_one_inode_under_another_nodeid() -> None:
    view = FakeView()
    entry = entry_attributes(view.nodes[view.add(ROOT, "f", size=1000)])
    raw = wire.entry_out(4711, entry)
    assert wire.ENTRY.unpack_from(raw)[0] == 4711
    fields = wire.ATTR.unpack_from(raw, 40)
    assert fields[:6] == (entry.st_ino, 1000, 2, 1_700_000_000, 1_600_000_000, 1_650_000_000)
    assert fields[6:10] == (1, 123_456_789, 0, entry.st_mode)


def test_a_listing_stops_where_the_kernels_buffer_ends() -> None:
    view = FakeView()
    entry = entry_attributes(view.nodes[view.add(ROOT, "f")])
    listing = wire.Listing(70, plus=False)
    assert listing.add(b"12345678", 9, entry, 1)
    assert listing.add(b"123456789", 9, entry, 2) is False
    (record,) = listing.parts
    assert len(record) == 32
    assert wire.DIRENT.unpack_from(record) == (entry.st_ino, 1, 8, 8)
    assert not wire.Listing(150, plus=True).add(b"1", 9, entry, 1)
    assert wire.Listing(160, plus=True).add(b"1", 9, entry, 1)


class Kernel:
    """The other end of a connection: a socket pair in the place of /dev/fuse. ``ask`` gives (errno, payload) of the
    reply, None where none came."""

    def __init__(self) -> None:
        self.view = FakeView()
        standard_tree(self.view)
        self.served = DevFuse(self.view, store=None, max_tasks=64, max_background=64, readahead=1 << 20)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.served._fd = theirs.detach()

    async def ask(self, raw: bytes) -> tuple[int, bytes] | None:
        async with trio.open_nursery() as nursery:
            await self.served.handle(wire.parse(memoryview(bytearray(raw))), nursery)
            with trio.move_on_after(1):
                while self.served._in_flight:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        try:
            reply = self._ours.recv(1 << 22)
        except BlockingIOError:
            return None
        length, error, unique = wire.OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), 7)
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(f"two replies: {self._ours.recv(1 << 22)!r}")
        return -error, reply[16:]

    def receive(self) -> bytes:
        return self._ours.recv(1 << 22)

    def close(self) -> None:
        self._ours.close()
        self.served.close()


async def test_a_file_is_found_opened_read_and_released() -> None:
    kernel = Kernel()
    found = await kernel.ask(message(wire.LOOKUP, b"model\0"))
    assert found is not None
    directory = wire.ENTRY.unpack_from(found[1])[0]
    found = await kernel.ask(message(wire.LOOKUP, b"weights.safetensors\0", nodeid=directory))
    assert found is not None
    nodeid = wire.ENTRY.unpack_from(found[1])[0]
    opened = await kernel.ask(message(wire.OPEN, wire.OPEN_IN.pack(os.O_RDONLY, 0), nodeid=nodeid))
    assert opened is not None
    fh, flags, backing = wire.OPEN_OUT.unpack(opened[1])
    assert (flags, backing) == (wire.FOPEN_KEEP_CACHE, 0)
    read = wire.READ_IN.pack(fh, 4096, 8192, 0, 0, 0, 0)
    assert await kernel.ask(message(wire.READ, read, nodeid=nodeid)) == (0, content(4096, 8192))
    assert await kernel.ask(message(wire.RELEASE, wire.RELEASE_IN.pack(fh, 0, 0, 0))) == (0, b"")
    assert kernel.view.open_files == []
    kernel.close()


async def test_what_is_not_in_memory_keeps_nobody_waiting_but_who_asked_for_it() -> None:
    kernel = Kernel()
    view, real, ready = kernel.view, kernel.view.lookup, trio.Event()

    def lookup(parent: int, name: str) -> Attributes:
        if parent != ROOT and not ready.is_set():
            raise NotLoaded("model")
        return real(parent, name)

    async def ensure_loaded(pipeline: str) -> None:
        assert pipeline == "model"
        await ready.wait()

    view.lookup, view.ensure_loaded = lookup, ensure_loaded  # type: ignore[method-assign]
    directory = view.children[ROOT]["model"]
    asked = message(wire.LOOKUP, b"weights.safetensors\0", nodeid=directory)
    buffer = bytearray(asked)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await kernel.served.handle(wire.parse(memoryview(buffer)), nursery)
            buffer[40:] = bytes(len(buffer) - 40)  # the next message
            assert list(kernel.served._in_flight) == [7]
            other = message(wire.GETATTR, bytes(16), unique=9, nodeid=directory)
            await kernel.served.handle(wire.parse(memoryview(bytearray(other))), nursery)
            assert wire.OUT_HEADER.unpack_from(kernel.receive())[1:] == (0, 9)
            ready.set()
    length, error, unique = wire.OUT_HEADER.unpack_from(reply := kernel.receive())
    assert (length, error, unique) == (len(reply), 0, 7)
    assert wire.ENTRY.unpack_from(reply[16:])[0] == real(directory, "weights.safetensors").nodeid
    assert kernel.served._operations.requests["lookup"] == 1
    kernel.close()


async def test_xattrs_tell_their_size_and_refuse_too_small_a_buffer() -> None:
    kernel = Kernel()
    nodeid = kernel.view.children[ROOT]["model"]
    for size, answer in ((0, (0, wire.XATTR_SIZE.pack(4, 0))), (3, (errno.ERANGE, b"")), (4, (0, b"warm"))):
        body = wire.XATTR_SIZE.pack(size, 0) + b"user.instantstart.state\0"
        assert await kernel.ask(message(wire.GETXATTR, body, nodeid=nodeid)) == answer
    names = b"user.instantstart.state\0user.instantstart.error\0"
    assert await kernel.ask(message(wire.LISTXATTR, wire.XATTR_SIZE.pack(100, 0), nodeid=nodeid)) == (0, names)
    kernel.close()


@pytest.mark.parametrize("opcode", sorted(wire.WRITES))
async def test_writes_are_erofs(opcode: int) -> None:
    kernel = Kernel()
    assert await kernel.ask(message(opcode, bytes(100))) == (errno.EROFS, b"")
    kernel.close()


@pytest.mark.parametrize("opcode", [20, 25, 30, 34, 40, 46, 52, 60, 4096])
async def test_what_is_not_served_is_enosys(opcode: int) -> None:
    kernel = Kernel()
    assert await kernel.ask(message(opcode, bytes(100))) == (errno.ENOSYS, b"")
    kernel.close()


FIXED = {
    wire.LOOKUP: b"model\0",
    wire.OPEN: wire.OPEN_IN.pack(os.O_RDONLY, 0),
    wire.READ: wire.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0),
    wire.RELEASE: wire.RELEASE_IN.pack(1, 0, 0, 0),
    wire.READDIR: wire.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0),
    wire.READDIRPLUS: wire.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0),
    wire.RELEASEDIR: wire.RELEASE_IN.pack(1, 0, 0, 0),
    wire.GETXATTR: wire.XATTR_SIZE.pack(0, 0) + b"user.instantstart.state\0",
    wire.LISTXATTR: wire.XATTR_SIZE.pack(0, 0),
    wire.INTERRUPT: wire.INTERRUPT_IN.pack(7),
    wire.INIT: wire.INIT_IN.pack(7, 31, 0, 0),
}
"""Of each message whose body is read: one that is whole."""
BODILESS = {wire.GETATTR, wire.READLINK, wire.STATFS, wire.OPENDIR, wire.DESTROY, wire.FORGET, wire.BATCH_FORGET}


def test_every_message_that_is_served_is_cut_short_below() -> None:
    served = set(HANDLERS)
    assert served == {*FIXED, *BODILESS}


@pytest.mark.parametrize("opcode", sorted(FIXED))
async def test_a_message_cut_short_anywhere_is_einval(opcode: int, caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    caplog.set_level(logging.CRITICAL)
    for length in range(len(FIXED[opcode])):
        refused = None if opcode in wire.SILENT else (errno.EINVAL, b"")
        assert await kernel.ask(message(opcode, FIXED[opcode][:length])) == refused, length
    assert kernel.view.open_files == []
    kernel.close()


@pytest.mark.parametrize("opcode", sorted(BODILESS))
async def test_a_message_without_a_body_takes_any(opcode: int) -> None:
    kernel = Kernel()
    answers = [await kernel.ask(message(opcode, body)) for body in (b"", b"x", bytes(200))]
    assert answers == answers[:1] * 3 or opcode == wire.OPENDIR
    assert all((answer is None) == (opcode in wire.SILENT) for answer in answers)
    kernel.close()


OPCODES = st.one_of(
    st.sampled_from(sorted({*FIXED, *BODILESS} - {wire.INIT})),
    st.integers(1, 53).filter(lambda code: code != wire.INIT),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(opcode=OPCODES, nodeid=st.one_of(st.integers(0, 1200), st.integers(0, 2**64 - 1)), body=st.binary(max_size=120))
def test_garbage_gets_one_reply_and_harms_nobody(opcode: int, nodeid: int, body: bytes) -> None:
    async def ask() -> Any:
        kernel = Kernel()
        try:
            return await kernel.ask(message(opcode, body, nodeid=nodeid))
        finally:
            kernel.close()

    logging.disable(logging.CRITICAL)
    try:
        reply = trio.run(ask)
    finally:
        logging.disable(logging.NOTSET)
    assert (reply is None) == (opcode in wire.SILENT)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_bad_message_or_a_request(raw: bytes) -> None:
    with contextlib.suppress(wire.BadMessage):
        request = wire.parse(memoryview(raw))
        assert len(request.body) <= len(raw) - 40
        wire.name(request.body)
    with contextlib.suppress(wire.BadMessage):
        wire.init_in(memoryview(raw))


class CountingBackings(BackingIds):
    """Backing ids without a kernel; ``open`` are those that are registered."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.open: set[int] = set()
        self.registered = 0

    def register(self, backing: int) -> int:
        self.registered += 1
        self.open.add(self.registered)
        return self.registered

    def unregister(self, identifier: int) -> None:
        self.open.remove(identifier)


def test_a_backing_id_is_kept_until_its_descriptor_is_closed() -> None:
    backings = CountingBackings()
    first = backings.acquire(7, 3)
    assert backings.acquire(7, 3) == first
    backings.release(7)
    backings.release(7)
    assert backings.acquire(7, 3) == first
    assert (backings.registered, backings.open) == (1, {first})
    backings.release(7)
    backings.forget(7)
    assert (len(backings), backings.open) == (0, set())
    backings.forget(7)
    assert backings.acquire(7, 4) != first


def test_a_backing_id_in_use_is_never_closed(caplog: pytest.LogCaptureFixture) -> None:
    backings = CountingBackings()
    first = backings.acquire(7, 3)
    backings.forget(7)
    assert "has open 1 times" in caplog.text
    assert backings.open == {first}


async def test_an_open_that_has_to_wait_gets_a_task_and_both_are_counted() -> None:
    kernel = Kernel()
    children = kernel.view.children[kernel.view.children[ROOT]["model"]]
    for name in ("weights.safetensors", "slow.safetensors"):
        opened = await kernel.ask(message(wire.OPEN, wire.OPEN_IN.pack(os.O_RDONLY, 0), nodeid=children[name]))
        assert opened is not None
        assert opened[0] == 0
    assert kernel.served.requests["open"] == 2
    for number, nodeid, flags in (
        (errno.EROFS, children["slow.safetensors"], os.O_RDWR),
        (errno.EIO, children["fails-open"], 0),
    ):
        assert await kernel.ask(message(wire.OPEN, wire.OPEN_IN.pack(flags, 0), nodeid=nodeid)) == (number, b"")
    kernel.close()


async def test_only_settled_directories_may_be_kept_by_the_kernel() -> None:
    kernel = Kernel()
    for nodeid, kept in (
        (ROOT, 0),
        (kernel.view.children[ROOT]["model"], wire.FOPEN_CACHE_DIR | wire.FOPEN_KEEP_CACHE),
    ):
        opened = await kernel.ask(message(wire.OPENDIR, wire.OPEN_IN.pack(0, 0), nodeid=nodeid))
        assert opened is not None
        assert wire.OPEN_OUT.unpack(opened[1])[1:] == (kept, 0)
    kernel.close()


def test_a_listing_is_dropped_whole_and_a_files_pages_never() -> None:
    at = wire.OUT_HEADER.size
    assert wire.INVAL_INODE.unpack_from(wire.inval_inode(9, listing=True), at) == (9, 0, 0)
    assert wire.INVAL_INODE.unpack_from(wire.inval_inode(9), at) == (9, -1, 0)


WITHOUT_PYFUSE3 = """
import sys
sys.modules["pyfuse3"] = None  # not installed
import errno, trio
from instantstart_fs.errors import MountFailed
from instantstart_fs.vfs import ROOT
from instantstart_fs.mount import session, wire
from instantstart_fs.mount.transport import MountSettings
from tests.unit.test_wire import Kernel, message, content

async def main():
    kernel = Kernel()
    nodeid = next(i for i, n in kernel.view.names.items() if n == "weights.safetensors")
    assert (await kernel.ask(message(wire.OPENDIR, bytes(8), nodeid=1)))[0] == 0
    assert (await kernel.ask(message(wire.STATFS)))[0] == 0
    assert (await kernel.ask(message(wire.GETATTR, bytes(16), nodeid=nodeid)))[0] == 0
    assert (await kernel.ask(message(wire.LOOKUP, b"nothing\\0")))[0] in (0, errno.ENOENT)
    absent = wire.XATTR_SIZE.pack(0, 0) + b"user.x\\0"
    assert (await kernel.ask(message(wire.GETXATTR, absent, nodeid=nodeid)))[0] == errno.ENODATA
    assert (await kernel.ask(message(wire.WRITE, bytes(40), nodeid=nodeid)))[0] == errno.EROFS
    error, reply = await kernel.ask(message(wire.OPEN, bytes(8), nodeid=nodeid))
    fh = wire.OPEN_OUT.unpack(reply)[0]
    read = wire.READ_IN.pack(fh, 100, 50, 0, 0, 0, 0)
    assert await kernel.ask(message(wire.READ, read, nodeid=nodeid)) == (0, content(100, 50))
    try:
        session._pyfuse3(kernel.view, MountSettings("/x"), "Linux 5.4 is older than 6.9")
    except MountFailed as failed:
        assert failed.message.startswith("pyfuse3 cannot be loaded") and failed.message.endswith("older than 6.9")
    else:
        raise AssertionError

trio.run(main)
"""


def test_passthrough_serves_where_pyfuse3_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYFUSE3], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
