"""The rack's serving process on a real socket: what a ticket opens, what it refuses, and how much at once."""

from __future__ import annotations

import array
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.core.rack import TICKET_SECONDS, Refusal, check_ticket, parse_range, rack_key, ticket
from tests.harness import wait_for

KEY = rack_key(b"k" * 32)
CONTENT = os.urandom(3_000_000)
PATH = "slot/generation/0"


class Neighbour:
    """The process, and a daemon that hands it ``files``: content's path and whether all of it may be served."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.files: dict[str, tuple[Path, bool]] = {}
        self.asked: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.answering = True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "instantstart_fs.regional.rack_server"]
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(self.listener.fileno())],
            pass_fds=(theirs.fileno(), self.listener.fileno()),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.listener.close()
        chosen = {"key": KEY.hex(), "connections": 8, "streams": 4, "rate": 0, **settings}
        self.control.send(json.dumps(chosen).encode())
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.epoch = str(self.clock()["epoch"])

    def _serve(self) -> None:
        while data := self.control.recv(65536):
            message = json.loads(data)
            if "ask" not in message:
                self.told.append(message)
                continue
            self.asked.append(message)
            if not self.answering:
                continue
            found = self.files.get(message["path"])
            if found is None:
                self.control.send(json.dumps({"answer": message["ask"]}).encode())
                continue
            place, whole = found
            with place.open("rb") as file:
                size = place.stat().st_size
                answer = {"answer": message["ask"], "path": message["path"], "size": size, "whole": whole}
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
                self.control.sendmsg([json.dumps(answer).encode()], rights)

    def clock(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/v1/clock", None, None)[1])
        return found

    def ticket(self, path: str = f"/v1/{PATH}", seconds: float = 30.0) -> str:
        return ticket(KEY, path, self.epoch, int(self.clock()["clock"] + seconds))

    def get(self, path: str, shown: str | None, wanted: str | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {}
        if shown is not None:
            headers["Authorization"] = f"Ticket {shown}"
        if wanted is not None:
            headers["Range"] = wanted
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def bytes(self, first: int, stop: int, path: str = PATH) -> tuple[int, bytes]:
        return self.get(f"/v1/{path}", self.ticket(f"/v1/{path}"), f"bytes={first}-{stop - 1}")

    def close(self) -> None:
        self.control.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.control.close()
        assert self.process.wait(10) == 0
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b""
        self.process.stderr.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Neighbour]]:
    with contextlib.ExitStack() as closing:

        def make_one(**settings: Any) -> Neighbour:
            neighbour = Neighbour(tmp_path, **settings)
            closing.callback(neighbour.close)
            place = tmp_path / "blob"
            place.write_bytes(CONTENT)
            neighbour.files[PATH] = (place, True)
            return neighbour

        yield make_one


def test_ranges_come_whole_and_are_asked_for_once(make: Callable[..., Neighbour]) -> None:
    neighbour = make()
    assert neighbour.bytes(0, 1) == (206, CONTENT[:1])
    assert neighbour.bytes(5, 2_500_000) == (206, CONTENT[5:2_500_000])
    assert neighbour.bytes(len(CONTENT) - 7, len(CONTENT)) == (206, CONTENT[-7:])
    assert len(neighbour.asked) == 1, "the daemon is asked once for a whole file"
    assert neighbour.bytes(len(CONTENT) - 7, len(CONTENT) + 1)[0] == 404
    assert neighbour.bytes(0, 1, "slot/generation/1")[0] == 404
    sent = wait_for(lambda: sum(told.get("sent", 0) for told in neighbour.told) >= 2_500_003, "its account", 5)
    assert sent


def test_a_file_that_is_dropped_or_in_parts_is_asked_for_again(make: Callable[..., Neighbour], tmp_path: Path) -> None:
    neighbour = make()
    assert neighbour.bytes(0, 9)[0] == 206
    del neighbour.files[PATH]
    neighbour.control.send(json.dumps({"drop": PATH}).encode())
    wait_for(lambda: neighbour.bytes(0, 9)[0] == 404, "the drop", 5)
    neighbour.files[PATH] = (tmp_path / "blob", False)
    asked = len(neighbour.asked)
    for _ in range(3):
        assert neighbour.bytes(10, 20) == (206, CONTENT[10:20])
    assert len(neighbour.asked) - asked == 3, "of a file that is being filled, each range"
    held = [os.readlink(link) for link in Path(f"/proc/{neighbour.process.pid}/fd").iterdir()]
    assert sum(name.endswith("/blob") for name in held) <= 1


def test_without_a_good_ticket_nothing_is_served(make: Callable[..., Neighbour]) -> None:
    neighbour = make()
    path, wanted = f"/v1/{PATH}", "bytes=0-9"
    clock = neighbour.clock()["clock"]
    wrong = [
        None,
        "x",
        neighbour.ticket("/v1/slot/generation/1"),
        neighbour.ticket(seconds=-2),
        neighbour.ticket(seconds=TICKET_SECONDS + 30),
        ticket(KEY, path, "0" * 32, int(clock + 30)),
        ticket(rack_key(b"another" * 5), path, neighbour.epoch, int(clock + 30)),
    ]
    for shown in wrong:
        assert neighbour.get(path, shown, wanted) == (401, b"")
    assert neighbour.asked == []
    assert neighbour.get(path, neighbour.ticket(), wanted) == (206, CONTENT[:10])
    for bad in (None, "bytes=9-", "bytes=-9", "bytes=9-3", "bytes=0-99999999999", "bytes=0-1,3-4"):
        assert neighbour.get(path, neighbour.ticket(), bad)[0] == 400


def test_what_is_no_request_ends_the_connection(make: Callable[..., Neighbour]) -> None:
    neighbour = make()
    for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET /\r\n\r\n", b"PUT /v1/x HTTP/1.1\r\n\r\n", b"a" * 20_000):
        with socket.create_connection(("127.0.0.1", neighbour.port), timeout=10) as connection:
            answer = b""
            try:
                connection.sendall(nonsense)
                while more := connection.recv(1000):
                    answer += more
            except ConnectionError:
                continue
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert neighbour.bytes(0, 10) == (206, CONTENT[:10])


def test_connections_and_streams_are_bounded(make: Callable[..., Neighbour]) -> None:
    neighbour = make(connections=3, streams=1)
    neighbour.answering = False
    path = f"/v1/{PATH}"
    shown = neighbour.ticket()
    slow = threading.Thread(target=lambda: neighbour.get(path, shown, "bytes=0-9"))
    slow.start()
    wait_for(lambda: neighbour.asked, "the question", 5)
    assert neighbour.get(path, shown, "bytes=0-9")[0] == 503, "one stream at a time"
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", neighbour.port), timeout=10))
        time.sleep(0.05)
        assert neighbour.get("/v1/clock", None, None)[0] == 503, "three connections at a time"
    slow.join(10)
    neighbour.answering = True
    wait_for(lambda: neighbour.get(path, shown, "bytes=0-9")[0] == 206, "its recovery", 10)


def test_all_streams_together_keep_the_rate(make: Callable[..., Neighbour]) -> None:
    neighbour = make(rate=2_000_000)
    started = time.monotonic()
    threads = [threading.Thread(target=neighbour.bytes, args=(0, 2_000_000)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - started > 1.2, "4 MB at 2 MB a second, less the first megabyte"


def test_a_ticket_opens_one_path_in_one_life_for_a_short_time() -> None:
    epoch = "ab" * 16
    good = ticket(KEY, "/v1/a/b/0", epoch, 130)

    def checked(path: str = "/v1/a/b/0", life: str = epoch, now: float = 100.0, shown: str = good) -> Refusal | None:
        return check_ticket(KEY, path, life, now, shown)

    assert checked() is None
    assert checked(path="/v1/a/b/1") is Refusal.WRONG
    assert checked(life="cd" * 16) is Refusal.ANOTHER_LIFE
    assert checked(now=130.0) is Refusal.EXPIRED
    assert checked(now=10.0) is Refusal.TOO_LONG
    assert checked(shown=good.replace("130.", "131.", 1)) is Refusal.WRONG
    assert checked(shown=good[:-1]) is Refusal.MALFORMED
    assert parse_range("bytes=0-0", 1) == (0, 1)
    assert parse_range("bytes=0-1", 1) is None
