"""Starts, addresses and ends the process that serves one device. It keeps no account of files."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator

from instantstart_fs.errors import PrefetchError
from instantstart_fs.ipc.children import spawn_module
from instantstart_fs.prefetch import messages
from instantstart_fs.prefetch.messages import MAX_PACKET, FromWorker, Settings, ToWorker
from instantstart_fs.prefetch.plan import DevicePlan

STOP_DEADLINE = 5.0
"""Seconds for a worker to end by itself before it is killed."""

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
"""Meant for the engine: memory that another allocator than torch's own has made cannot be handed over."""
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
"""The worker's own, also where a release of torch makes them the default: expandable segments hand memory over by
descriptors, which needs the right to trace the owner. Older releases know neither this name nor that default."""


class WorkerStuck(Exception):
    """A worker made no progress and was killed; the text names it."""


class DeviceWorker:
    """The process of one device and what is known of it. Its user guards all but ``send``."""

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.ready: messages.Ready | None = None
        self.cached = 0
        self.disk = 0
        self.first_given_at: float | None = None
        self.finished_at: float | None = None
        self.releases = 0
        """Orders to release a file that it has not answered."""
        self.lent = False
        """Whether another process has memory of released files open."""
        self.heard_at = time.monotonic()
        self.send_lock = threading.Lock()

    @property
    def cuda(self) -> bool:
        return self.plan.device.startswith("cuda")

    @property
    def backend(self) -> str:
        """The name of its backend; "" until it is ready."""
        return self.ready.backend if self.ready is not None else ""

    def start(self, settings: Settings) -> None:
        """Start the process. Raises PrefetchError."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise PrefetchError(f"the worker of {self.plan.device} cannot be started: {error.strerror}") from error
        with theirs:
            try:
                self.process = spawn_module(
                    "instantstart_fs.prefetch.worker",
                    str(theirs.fileno()),
                    messages.encode(settings).decode(),
                    pass_fds=[theirs.fileno()],
                    without=ALLOCATOR_SETTINGS,
                    settings=ALLOCATOR,
                )
            except OSError as error:
                ours.close()
                raise PrefetchError(
                    f"the worker of {self.plan.device} cannot be started: {sys.executable}: {error.strerror}"
                ) from error
        self.socket = ours

    def send(self, message: ToWorker, fds: list[int]) -> None:
        """Send an order, from any thread. Raises OSError when the worker is gone."""
        assert self.socket is not None
        with self.send_lock:
            socket.send_fds(self.socket, [messages.encode(message)], fds)

    def reports(self, stuck: Callable[[], bool]) -> Generator[FromWorker, None, None]:
        """Yield the worker's reports until its socket ends, and close that.

        Args:
            stuck: asked every second in which nothing comes.

        Raises:
            WorkerStuck: it was stuck, and was killed.
            OSError, msgspec.DecodeError: the socket, or what came, cannot be read.
        """
        assert self.socket is not None
        connection = self.socket
        # The socket stays blocking (orders are written to it); poll has the deadline.
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        try:
            while True:
                if not poll.poll(1000):
                    if stuck():
                        assert self.process is not None
                        self.process.kill()
                        raise WorkerStuck(f"the worker of {self.plan.device}")
                    continue
                try:
                    packet = connection.recv(MAX_PACKET)
                except ConnectionResetError:  # it died with orders unread
                    packet = b""
                if not packet:
                    return
                yield messages.from_worker.decode(packet)
        finally:
            with self.send_lock:
                connection.close()

    def end(self) -> None:
        """Tell it to end, wait, kill it after STOP_DEADLINE. The socket itself is closed by its listener."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        if self.process is None:
            return
        try:
            self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # inside a read that no signal ends
                self.process.wait(STOP_DEADLINE)

    def failure(self, text: str, path: str) -> str:
        """The text of a failure that the worker told of, with the device and the file where they are not in it."""
        device = self.plan.device
        prefix = f"{path}: " if path and path not in text else ""
        return f"{'' if text.startswith(f'{device}: ') else f'{device}: '}{prefix}{text}"

    def how_it_ended(self) -> str:
        """Return what became of a process whose socket has ended, as words after "the worker of cuda:0"."""
        assert self.process is not None
        try:
            status = self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        if status < 0:
            memory = " (by hand, or because memory ran out)" if status == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{memory}"
        return f"ended with {status}; what it said is on stderr"
