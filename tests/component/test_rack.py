"""The rack level's server on a real socket, before hostile callers; the records by which hosts of a rack meet."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio

from instantstart_fs import doctor
from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.core import rack
from instantstart_fs.core.chunks import ByteRange, ChunkMap
from instantstart_fs.core.rack import Asked
from instantstart_fs.errors import InstantStartError, OriginMisbehaved, OriginNotFound, OriginThrottled
from instantstart_fs.filler.fetch import Fetcher, new_buffer
from instantstart_fs.filler.messages import Piece, WorkerSettings
from instantstart_fs.filler.pieces import fetch_piece
from instantstart_fs.filler.region_follow import Line, RegionSettings
from instantstart_fs.filler.region_rack import RackLevel
from instantstart_fs.regional import racks
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.keys import RegionKey, keyed_digest
from instantstart_fs.regional.racks import RackReader, RackRecord, object_of
from instantstart_fs.regional.store import Stored
from instantstart_fs.serving import rack_probe
from instantstart_fs.serving.rack_chunks import NotYet, Part, RackChunks
from instantstart_fs.serving.rack_server import MOST_EACH, RackServer
from instantstart_fs.upkeep import rack_beats

KEY = RegionKey(b"k" * 32)
SLOT, PIN = "ab" * 16, "cd" * 16
MIB = 1 << 20
CHUNK = os.urandom(2 * MIB)
CHUNK_KEY = KEY.chunk_key(PIN, 1, len(CHUNK))
DIGEST = keyed_digest(CHUNK_KEY, CHUNK)
NOW = 1_000_000.0
WANTED = Asked(SLOT, PIN, 1, 0.1, True)


class Chunks:
    """One file of one chunk, the second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(bytes(MIB) + CHUNK)
        self.open: list[int] = []
        self.later = False

    async def find(self, asked: Asked) -> Part | None:
        if self.later:
            raise NotYet
        if asked[:3] != (SLOT, PIN, 1):
            return None
        self.open.append(os.open(self._path, os.O_RDONLY))
        return Part(self.open[-1], MIB, len(CHUNK), b"" if asked.sealed else DIGEST)

    @property
    def leaked(self) -> int:
        """How many descriptors of the file are open."""
        there = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(link) and os.readlink(link) == str(self._path) for link in there)


class Served:
    def __init__(self, chunks: Chunks, level: RackLevel, server: RackServer) -> None:
        self.chunks, self.level, self.server = chunks, level, server

    async def connect(self) -> trio.SocketStream:
        host, _, port = self.server.address.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def say(self, *heads: bytes) -> bytes:
        """All that comes for these requests, until the server hangs up."""
        async with await self.connect() as stream:
            for head in heads:
                await stream.send_all(head)
            found = b""
            with contextlib.suppress(trio.BrokenResourceError):  # it left some of what was said unread
                async for part in stream:
                    found += part
            return found


def request(asked: Asked = WANTED, **changed: Any) -> bytes:
    path = changed.get("path", rack.path_of(asked))
    made = rack.make_ticket(KEY.tickets, "owner", asked, changed.get("at", NOW))
    ticket = changed.get("ticket", made)
    method, last = changed.get("method", "GET"), changed.get("last", "Connection: close\r\n")
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {ticket}\r\n{last}\r\n".encode()


def settings() -> RegionSettings:
    return RegionSettings(host="owner", key=KEY, stores=(), keys=(), rack="r17")


class Plan:
    """What RackLevel says to the fill plan."""

    def __init__(self) -> None:
        self.opened: list[int] = []

    def open(self, key: object, chunk: int) -> None:
        self.opened.append(chunk)

    def shut(self, key: object, chunks: object) -> None: ...


def made_level(plan: Plan | None = None) -> RackLevel:
    table = SimpleNamespace(wakeup=trio.Event())
    return RackLevel(settings(), cast(Any, plan or Plan()), cast(Any, table))


@asynccontextmanager
async def served(tmp_path: Path, rate: int = 1 << 30) -> AsyncIterator[Served]:
    chunks, level = Chunks(tmp_path / "blob"), made_level()
    level.clock = lambda: NOW
    server = RackServer(("127.0.0.1", 0), rate, "owner", KEY.tickets, level, cast(RackChunks, chunks))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        with trio.fail_after(60):
            while not server.address:
                await trio.lowlevel.checkpoint()
            yield Served(chunks, level, server)
        nursery.cancel_scope.cancel()
    assert not chunks.leaked


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.data = bytearray(len(CHUNK))

    def write(self, data: memoryview, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def before_read(self) -> None: ...

    def progress(self, count: int) -> None: ...

    def take_whole(self) -> None: ...


async def fetched(where: Served, *, sealed: bool, digest: bytes = DIGEST, key: bytes = CHUNK_KEY) -> bytes:
    """As a fetch process does it."""
    asked = Asked(SLOT, PIN, 1, 0.1, sealed)
    ticket = rack.make_ticket(KEY.tickets, "owner", asked, NOW)
    url = f"http://{where.server.address}{rack.path_of(asked)}"
    piece = Piece(url, key, digest if sealed else b"", (("Authorization", ticket),), neighbour=True)
    sink = Kept()
    place = ByteRange(0, len(CHUNK))
    await trio.to_thread.run_sync(
        lambda: fetch_piece(Fetcher(WorkerSettings()), piece, place, new_buffer(), sink)  # type: ignore[arg-type]
    )
    return bytes(sink.data)


@pytest.mark.parametrize("sealed", [True, False])
async def test_a_neighbour_gets_the_chunk_and_proves_it(
    tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # neighbours are never asked over a proxy
    monkeypatch.setenv("no_proxy", "")
    async with served(tmp_path) as where:
        assert await fetched(where, sealed=sealed) == CHUNK
        with trio.fail_after(60):
            while not where.level.given_bytes:  # it is counted when the sending thread has ended
                await trio.sleep(0.01)
        assert where.level.given_bytes == len(CHUNK)


async def test_wrong_bytes_are_told_from_right_ones(tmp_path: Path) -> None:
    async with served(tmp_path) as where:
        for sealed, digest, key in ((True, bytes(32), CHUNK_KEY), (False, b"", KEY.chunk_key(PIN, 2, len(CHUNK)))):
            with pytest.raises(OriginMisbehaved, match="digest is wrong"):
                await fetched(where, sealed=sealed, digest=digest, key=key)


async def test_a_connection_serves_one_request_after_another(tmp_path: Path) -> None:
    async with served(tmp_path) as where:
        answers = await where.say(request(last=""), request(Asked(SLOT, PIN, 7, 0.1, True), last=""), request())
        assert answers.count(b"HTTP/1.1 206") == 2 and answers.count(b"HTTP/1.1 404") == 1
        assert answers.count(CHUNK) == 2


HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "no ticket": (request(ticket=""), 403, "ticket"),
    "made up": (request(ticket=f"Rack {int(NOW) + 9}.{'0' * 64}"), 403, "ticket"),
    "expired": (request(at=NOW - 61), 403, "ticket"),
    "for years": (request(at=NOW + 1e6), 403, "ticket"),
    "for another chunk": (request(path=rack.path_of(Asked(SLOT, PIN, 2, 0.1, True))), 403, "ticket"),
    "traversal": (request(path="/rack/v1/../../../etc/passwd"), 400, "malformed"),
    "encoded": (request(path=f"/rack/v1/{SLOT}/%2e%2e%2f/00000001?wait=0&sealed=1"), 400, "malformed"),
    "absolute": (request(path="http://169.254.169.254/rack/v1"), 400, "malformed"),
    "method": (request(method="PUT"), 400, "malformed"),
    "body": (request(last="Content-Length: 4\r\n") + b"body", 400, "malformed"),
    "chunked": (request(last="Transfer-Encoding: chunked\r\n") + b"4\r\nbody\r\n", 400, "malformed"),
    "head": (request(last="X: " + "x" * 8192 + "\r\n"), 431, "malformed"),
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "malformed"),
    "nothing": (request(Asked(PIN, PIN, 1, 0.1, True)), 404, "nothing"),
}


async def test_sends_take_no_thread_of_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    limiter, send = trio.to_thread.current_default_thread_limiter(), os.sendfile

    def sendfile(*arguments: int) -> int:
        taken.append(int(limiter.borrowed_tokens))
        return send(*arguments)

    monkeypatch.setattr(os, "sendfile", sendfile)
    async with served(tmp_path) as site:
        assert (await site.say(request())).endswith(CHUNK)
    assert set(taken) == {0}


async def test_a_send_that_finds_no_thread_sends_nothing_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors are closed then, and their numbers are other connections' and other files'."""
    first, go, wrong, send = trio.Event(), threading.Event(), [], os.sendfile

    def sendfile(peer: int, fd: int, *place: int) -> int:
        if not first.is_set():
            trio.from_thread.run_sync(first.set, trio_token=token)
            go.wait(30)
        if fd != site.chunks.open[0]:
            wrong.append(fd)
        return send(peer, fd, *place)

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def take() -> None:
        answers.append(await site.say(request()))

    monkeypatch.setattr(os, "sendfile", sendfile)
    token, answers = trio.lowlevel.current_trio_token(), list[bytes]()
    async with served(tmp_path) as site, trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await first.wait()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            patched.setattr("trio._threads.start_thread_soon", no_thread)
            assert CHUNK not in await site.say(request())
        go.set()
    assert answers[0].endswith(CHUNK) and not wrong


@pytest.mark.parametrize("what", HOSTILE)
async def test_what_is_no_request_of_a_neighbour_gets_nothing(tmp_path: Path, what: str) -> None:
    said, status, reason = HOSTILE[what]
    async with served(tmp_path) as where:
        answer = await where.say(said)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
        assert len(answer) < 300 and where.level.refused[reason] == 1
        assert not where.chunks.open
        assert (await where.say(request())).endswith(CHUNK), "others are served on"


async def test_an_owner_without_the_storages_clock_or_the_chunk_says_later(tmp_path: Path) -> None:
    async with served(tmp_path) as where:
        where.chunks.later = True
        assert b" 503 " in await where.say(request())
        where.level.clock = lambda: None
        assert b" 503 " in await where.say(request())
        with pytest.raises(OriginThrottled):
            await fetched(where, sealed=True)
        where.level.clock, where.chunks.later = lambda: NOW, False
        with pytest.raises(InstantStartError):
            await fetched(where, sealed=True, key=bytes(32))


async def test_connections_of_one_address_are_bounded(tmp_path: Path) -> None:
    async with served(tmp_path) as where:
        held = [await where.connect() for _ in range(MOST_EACH)]
        for stream in held:
            await stream.send_all(b"GET /")
        while where.server.connections < MOST_EACH:
            await trio.sleep(0.01)
        assert b" 503 " in await where.say(b"")
        assert where.level.refused["busy"] == 1
        for stream in held:
            await stream.aclose()
        while where.server.connections:
            await trio.sleep(0.01)
        assert (await where.say(request())).endswith(CHUNK)


async def test_a_reader_that_stops_reading_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instantstart_fs.serving import rack_server

    monkeypatch.setattr(rack_server, "STALLED_SECONDS", 0.2)
    async with served(tmp_path) as where:
        where.chunks._path.write_bytes(bytes(MIB) + CHUNK)
        stream = await where.connect()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(40):  # more than the sockets' buffers hold
            await stream.send_all(request(last=""))
        while where.server.connections:
            await trio.sleep(0.02)
        await stream.aclose()


# -- who is in the rack ------------------------------------------------------------------------------------------------


def put(store: DirectoryStore, record: RackRecord, at: float, key: RegionKey = KEY) -> str:
    name, data = object_of(key, record)
    store.put(name, data)
    os.utime(Path(store.endpoint) / name, (at, at))
    return name


def test_a_rack_knows_its_living_hosts_and_the_storages_clock(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    own = put(store, RackRecord("me", "r17", "10.0.0.1:9848"), 5000.0)
    put(store, RackRecord("other", "r17", "10.0.0.2:9848"), 4990.0)
    put(store, RackRecord("moved", "r17", "10.0.0.3:1"), 4980.0)
    put(store, RackRecord("moved", "r17", "10.0.0.3:2"), 4990.0)
    put(store, RackRecord("dead", "r17", "10.0.0.4:9848"), 4000.0)
    put(store, RackRecord("elsewhere", "r18", "10.0.0.5:9848"), 5000.0)
    put(store, RackRecord("foreign", "r17", "10.0.0.6:9848"), 5000.0, RegionKey(b"x" * 32))
    forged = f"{racks.DIRECTORY}{KEY.rack('r17')}/{'ab' * 16}.{'cd' * 8}"
    store.put(forged, b"x" * 100)
    os.utime(tmp_path / forged, (5000.0, 5000.0))
    stolen, data = object_of(KEY, RackRecord("other", "r17", "10.0.0.2:9848"))
    renamed = stolen.replace(KEY.host("other"), KEY.host("third"))
    store.put(renamed, data)
    os.utime(tmp_path / renamed, (5000.0, 5000.0))
    reader = RackReader(store, KEY, "r17")
    for _ in range(2):
        found = reader.read(own)
        assert found.hosts == {"me": "10.0.0.1:9848", "other": "10.0.0.2:9848", "moved": "10.0.0.3:2"}
        assert found.clock == 5000.0
    assert RackReader(store, KEY, "r17").read("v1/racks/none").clock is None


@pytest.mark.parametrize("address", ["tier.example:80", "10.0.0.1", "10.0.0.1:99999", "10.0.0.1:8@[::1]:80", ""])
def test_an_address_is_an_address(tmp_path: Path, address: str) -> None:
    store = DirectoryStore(str(tmp_path))
    own = put(store, RackRecord("me", "r17", address), 5000.0)
    assert RackReader(store, KEY, "r17").read(own).hosts == {}


@pytest.mark.parametrize("second", ["10.0.0.1:1", "10.0.0.1:2"])
def test_a_host_that_moves_within_a_second_tells_its_own_records_apart(tmp_path: Path, second: str) -> None:
    store = DirectoryStore(str(tmp_path))
    for port in ("1", "2"):
        put(store, RackRecord("me", "r17", f"10.0.0.1:{port}"), 5000.0)
    found = RackReader(store, KEY, "r17").read(object_of(KEY, RackRecord("me", "r17", second))[0])
    assert found.hosts == {"me": second} and found.clock == 5000.0


class LateListing(DirectoryStore):
    """Lists nothing below the rack at first."""

    looks = 0

    def list(self, prefix: str, most: int) -> Iterator[Stored]:
        self.looks += 1
        return super().list(prefix, most) if self.looks > 8 else iter(())


async def test_a_host_without_the_storages_clock_asks_again_soon_and_counts_no_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rack_beats, "FIRST_SECONDS", 0.01)
    (tmp_path / "tier").mkdir()
    store = LateListing(str(tmp_path / "tier"))
    put(store, RackRecord("a", "r17", "10.0.0.2:2"), time.time())
    level = made_level()
    told = msgspec.structs.replace(settings(), stores=(store,))
    regional = cast(Any, SimpleNamespace(settings=told, answers=True, hosts=1))
    beats = rack_beats.RackBeats(regional, level, lambda: "10.0.0.1:1")
    level.live({"a": "10.0.0.2:2"})  # as a listing that lacks this host's own record would tell
    assert level.clock() is None and level.statistics.neighbours == 0
    assert not level.takes_turns(cast(Any, File()), 1), "nobody is asked, so nobody is waited for"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beats.run)
        with trio.fail_after(60):  # by the period of a host that the others know, it would be 96 s at least
            while level.clock() is None:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert level.statistics.neighbours == 1 and level.takes_turns(cast(Any, File()), 1)


# -- what doctor says --------------------------------------------------------------------------------------------------


async def test_doctor_asks_each_host_of_the_rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rack_probe, "ASK_SECONDS", 60.0)
    (tmp_path / "tier").mkdir()
    key_file = tmp_path / "key"
    key_file.write_text((b"k" * 32).hex())
    key_file.chmod(0o600)
    store = DirectoryStore(str(tmp_path / "tier"))
    listening = ("127.0.0.1", 0)
    config = RegionalConfig(f"file://{store.endpoint}", str(key_file), "owner", rack="r17", rack_listen=listening)

    async def said(running: bool = True, **changed: Any) -> tuple[str, str]:
        told = msgspec.structs.replace(config, **changed)
        with trio.fail_after(60):
            check = await trio.to_thread.run_sync(doctor.check_rack, told, running)
        assert check.name == "rack" and (check.advice or check.outcome == "ok")
        return check.outcome, check.found

    def tell(host: str, address: str, age: float = 0.0) -> None:
        put(store, RackRecord(host, "r17", address), time.time() - age)

    async with served(tmp_path) as where:
        where.level.clock = time.time
        mine = where.server.address
        taken = ("127.0.0.1", int(mine.rpartition(":")[2]))
        assert await said() == ("warn", "r17 as owner: the daemon has not told its neighbours where it answers")
        here = "r17 as owner: no daemon answers here yet, and could; no other host of the rack lives"
        assert await said(False) == ("warn", here)
        in_use = f"r17 as owner: 127.0.0.1 port {taken[1]}: Address already in use"
        assert await said(False, rack_listen=taken) == ("fail", in_use)
        tell("owner", mine)
        tell("long-dead", "127.0.0.1:1", 3600)
        here = f"r17 as owner: answers at {mine}"
        assert await said() == ("warn", f"{here}; no other host of the rack lives")
        tell("other", "127.0.0.1:1")
        dead = "0 of 1 neighbours answer; other at 127.0.0.1:1: Connection refused"
        assert await said() == ("warn", f"{here}; {dead}")
        assert await said(host="other") == ("fail", "r17 as other: at 127.0.0.1:1: Connection refused")
        tell("third", mine)  # whoever answers there is another host
        outcome, found = await said(host="third")
        assert outcome == "fail" and "it refuses this host's ticket: another key, another host's name" in found
        assert "; 1 of 3 neighbours answer; other at" in (await said(False, host="fourth"))[1]
        where.level.clock = lambda: None
        assert "its tier does not tell it the clock" in (await said())[1]
    key_file.write_text("short")
    assert (await said())[0] == "warn"


# -- whom a host asks --------------------------------------------------------------------------------------------------


class Pull:
    groups = 8

    def route(self, chunk: int) -> int:
        return 0

    def demanded(self, chunk: int) -> bool:
        return False


class File:
    """What RackLevel looks at of a Follow."""

    def __init__(self, chunk_size: int = MIB) -> None:
        self.slot, self.pin, self.pull, self.line = SLOT, PIN, Pull(), Line()
        self.target = self
        self.present = ChunkMap(64 * chunk_size, chunk_size)
        self.key = self.tier_key = self
        self.digests: dict[int, bytes] = {}
        self.pipeline = "p"

    def over(self) -> bool:
        return False


def level_of_three(plan: Plan | None = None) -> RackLevel:
    level = made_level(plan)
    level.live({"owner": "10.0.0.1:1", "a": "10.0.0.2:2", "b": "10.0.0.3:3"})
    level.clock = lambda: NOW
    return level


async def test_a_chunk_is_asked_of_its_owner_and_then_of_the_tier() -> None:
    level, file = level_of_three(), cast(Any, File())

    def choose(chunk: int) -> Any:
        return level.choose(file, chunk, CHUNK_KEY, DIGEST, reader=False)

    chunk = next(chunk for chunk in range(64) if choose(chunk) is not None)
    source, piece = choose(chunk)
    assert piece.url.startswith(f"http://{source.address}/rack/v1/{SLOT}/{PIN}/{chunk:08x}?wait=3000&sealed=1")
    asked = rack.asked_by(piece.url.removeprefix(f"http://{source.address}"))
    assert asked is not None and rack.is_ticket(
        KEY.tickets, source.host, asked, dict(piece.headers)["Authorization"], NOW
    )
    level.failed(source, file, chunk, OriginNotFound("it is idle"))
    other = choose(chunk)
    assert other is None or other[0].host != source.host
    if other is not None:
        level.failed(other[0], file, chunk, OriginNotFound("it is idle, too"))
    assert choose(chunk) is None
    level = level_of_three()
    file.line = Line()
    level.failed(source, file, chunk, OriginMisbehaved("the digest is wrong"))
    assert dict(level.fallbacks) == {"wrong": 1}
    assert all((found := choose(one)) is None or found[0].host != source.host for one in range(64))


async def test_what_a_neighbour_waits_for_comes_from_the_tier() -> None:
    level, file = level_of_three(), cast(Any, File())
    chunk = next(one for one in range(64) if level.choose(file, one, CHUNK_KEY, b"", reader=False) is not None)
    file.line.owed.add(chunk)
    assert level.choose(file, chunk, CHUNK_KEY, b"", reader=False) is None, "or two would wait for each other"


async def test_small_chunks_and_hosts_without_a_clock_ask_the_tier() -> None:
    level, file = level_of_three(), cast(Any, File(MIB // 2))
    assert all(level.choose(file, chunk, CHUNK_KEY, DIGEST, reader=False) is None for chunk in range(64))
    level.clock = lambda: None
    assert all(level.choose(cast(Any, File()), chunk, CHUNK_KEY, DIGEST, reader=False) is None for chunk in range(64))


async def test_chunks_are_opened_a_windows_worth_at_a_time_but_for_those_that_somebody_waits_for() -> None:
    plan, file = Plan(), cast(Any, File())
    level = level_of_three(plan)
    level.line_up(file, range(64))
    assert len(plan.opened) == 32
    last = next(chunk for chunk in range(64) if chunk not in plan.opened)
    level.demand(file, [last])
    assert plan.opened[32:] == [last]
    level.enter(file)
    assert level.followed(SLOT, PIN) is file and level.followed(PIN, PIN) is None
    owed = next(chunk for chunk in range(64) if chunk not in plan.opened)
    level.owe(file, owed)
    level.owe(file, owed)
    assert plan.opened[33:] == [owed] and level.choose(file, owed, CHUNK_KEY, b"", reader=False) is None
    for chunk in list(plan.opened):
        level.go_on(file, chunk)
    for chunk in list(plan.opened):
        level.go_on(file, chunk)
    assert set(plan.opened) == set(range(64))
    level.leave(file)
    assert level.followed(SLOT, PIN) is None


async def test_digests_of_a_file_are_kept_when_its_fill_is_over_and_not_into_the_next_one() -> None:
    level, file = level_of_three(), cast(Any, File())
    file.digests = {3: DIGEST}
    level.enter(file)
    assert level.digest(PIN, 3) == b"", "while it is filled, the fill knows"
    level.leave(file)
    assert level.digest(PIN, 3) == DIGEST and level.digest(PIN, 4) == level.digest(SLOT, 3) == b""
    level.enter(file)
    assert level.digest(PIN, 3) == b""
