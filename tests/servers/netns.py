"""A network on one machine: hosts in network namespaces of their own, joined by a bridge, each link with its rate.

    with Network() as network:
        origin = network.host("origin", rate="200mbit")
        subprocess.run([*origin.prefix, "curl", …])            # a command on that host
        origin.call(lambda: socket.create_connection(…))       # the same for this process: sockets keep their namespace

Namespaces have no names and no processes: descriptors of this process hold them. When it ends, however, they go, and
the bridge and the links with them; nothing of it is ever seen in the machine's own network. Needs root.
"""

from __future__ import annotations

import ctypes
import functools
import http.client
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_NETWORK = "10.98"
_T = TypeVar("_T")


@functools.cache
def why_no_network() -> str | None:
    """Why no such network can be made here; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (Debian: iproute2, util-linux)"
    try:
        with Network() as network:
            network.host("probe", rate="1gbit")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespace with a rated link can be made: {error}"
    return None


def _in_thread(work: Callable[[], _T]) -> _T:
    """A namespace is a thread's: change it in one that ends."""
    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _new_namespace() -> int:
    def make() -> int:
        _checked(_LIBC.unshare(_CLONE_NEWNET))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


class Namespace:
    """``prefix``: what runs a command in it. Loopback is up."""

    def __init__(self) -> None:
        self.descriptor = _new_namespace()
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        self.prefix = ("nsenter", f"--net={self.path}", "--")
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command: str) -> str:
        """Its stdout. Raises CalledProcessError."""
        done = subprocess.run([*self.prefix, *command], check=True, capture_output=True, text=True, timeout=30)
        return done.stdout

    def call(self, work: Callable[[], _T]) -> _T:
        """``work()`` with its sockets in this namespace."""

        def inside() -> _T:
            _checked(_LIBC.setns(self.descriptor, _CLONE_NEWNET))
            return work()

        return _in_thread(inside)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Host(Namespace):
    """One host: ``eth0`` with ``address``, each way at ``rate`` (as tc writes it; None: without limit)."""

    def __init__(self, switch: Namespace, bridge: str, name: str, address: str, port: str, rate: str | None) -> None:
        super().__init__()
        self.name, self.address = name, address
        self._switch, self._port = switch, port
        switch.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.path)
        switch.run("ip", "link", "set", port, "master", bridge, "up")
        self.run("ip", "address", "add", f"{address}/16", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        if rate is not None:
            self.limit(rate)

    def limit(self, rate: str) -> None:
        """From now on ``rate`` each way."""
        for space, device in ((self, "eth0"), (self._switch, self._port)):
            _shape(space, device, rate)

    def unplug(self) -> None:
        """Its link is down: what others send, and it sends, is lost without an answer."""
        self._switch.run("ip", "link", "set", self._port, "down")

    def plug_in(self) -> None:
        self._switch.run("ip", "link", "set", self._port, "up")

    def received(self) -> int:
        """Bytes that came in over ``eth0``, headers included."""
        return self._counter("rx_bytes")

    def sent(self) -> int:
        return self._counter("tx_bytes")

    def _counter(self, name: str) -> int:
        side = "rx" if name == "rx_bytes" else "tx"
        lines = self.run("ip", "-s", "link", "show", "eth0").splitlines()
        for number, line in enumerate(lines):
            if line.strip().startswith(f"{side.upper()}:"):
                return int(lines[number + 1].split()[0])
        raise AssertionError(lines)

    def get(self, port: int, path: str, *, host: str = "127.0.0.1", timeout: float = 20.0) -> bytes:
        """The body of ``http://host:port/path`` as this host gets it; it must be 200."""

        def ask() -> bytes:
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                connection.close()
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status} {body[:200]!r}")
            return body

        return self.call(ask)


def _shape(space: Namespace, device: str, rate: str) -> None:
    # Large enough a bucket for a timer of 4 ms at 10 Gbit/s, and a queue that TCP fills without loss on loopback.
    space.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "2mb", "limit", "16mb")


class Network:
    """A bridge; ``host`` adds one to it, ``rack`` a bridge of its own behind a limited uplink."""

    def __init__(self) -> None:
        self._hosts: list[Host] = []
        self._racks: dict[str, str] = {}
        self._switch = Namespace()
        try:
            self._switch.run("ip", "link", "add", "core", "type", "bridge")
            self._switch.run("ip", "link", "set", "core", "up")
        except BaseException:
            self.close()
            raise

    def rack(self, name: str, uplink: str) -> None:
        """Hosts of that rack reach all others over one link, each way at ``uplink``."""
        number = len(self._racks)
        bridge, up, down = f"rack{number}", f"up{number}", f"down{number}"
        run = self._switch.run
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "add", up, "type", "veth", "peer", "name", down)
        run("ip", "link", "set", up, "master", bridge, "up")
        run("ip", "link", "set", down, "master", "core", "up")
        run("ip", "link", "set", bridge, "up")
        for device in (up, down):
            _shape(self._switch, device, uplink)
        self._racks[name] = bridge

    def host(self, name: str, rate: str | None = None, rack: str | None = None) -> Host:
        number = len(self._hosts) + 1
        address = f"{_NETWORK}.{number // 250}.{number % 250 + 1}"
        bridge = "core" if rack is None else self._racks[rack]
        host = Host(self._switch, bridge, name, address, f"port{number}", rate)
        self._hosts.append(host)
        return host

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        self._switch.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
