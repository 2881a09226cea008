"""One connection of the blocking client: lines out, messages and descriptors in."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import struct
import time

from instantstart_fs.config import unixsocket
from instantstart_fs.control import calls, lines, protocol
from instantstart_fs.ipc import fd_passing


class Connection:
    """A connection to the daemon. Raises DaemonUnreachable, ControlProtocolError."""

    def __init__(self, path: str, deadline: float) -> None:
        self._path = path
        self._process = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = lines.LineBuffer(lines.MAX_MESSAGE)
        self.descriptors: collections.deque[int] = collections.deque()
        try:
            unixsocket.connect(self._socket, path, deadline)
        except OSError as error:
            self._socket.close()
            raise calls.unreachable(path, error, deadline) from error

    def send(self, request: protocol.Request, deadline: float) -> None:
        line = lines.encode_request(request)
        try:
            self._socket.settimeout(deadline)
            # A daemon that refuses the connection may have closed it before the request was out: its reason is to be
            # read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(line)
        except TimeoutError as error:
            raise calls.silent(self._path, deadline) from error
        except OSError as error:
            raise calls.broken(self._path, error) from error

    def receive(self, deadline: float) -> protocol.Response:
        """Return the next message. Raises after ``deadline`` seconds of silence."""
        while True:
            for line in self._buffer.lines():
                return lines.decode_response(line)
            try:
                self._socket.settimeout(deadline)
                # The kernel never joins bytes across descriptors: those that came belong to the lines that follow.
                data, descriptors, _ = fd_passing.receive(self._socket, 256 * 1024, 2 * protocol.MAX_HANDED_FILES)
                self.descriptors.extend(descriptors)
            except TimeoutError as error:
                raise calls.silent(self._path, deadline) from error
            except OSError as error:
                raise calls.broken(self._path, error) from error
            if not data:
                raise calls.ended(self._path)
            self._buffer.feed(data)

    def is_quiet(self) -> bool:
        """Return whether it is open with nothing to be read, so that a request can be sent."""
        try:
            self._socket.setblocking(False)  # with a time-out Python waits, whatever the flags say
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not len(self._buffer)
        except OSError:
            pass
        return False

    def wait_ended(self, timeout: float | None) -> bool:
        """Whether the daemon ended it within ``timeout`` seconds (None: wait as long as that takes)."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                self._socket.settimeout(None if end is None else max(end - time.monotonic(), 0.001))
                if not self._socket.recv(lines.MAX_MESSAGE):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True

    def peer_pid(self) -> int:
        size = struct.calcsize("3i")
        return int(struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])

    def shut(self) -> None:
        """Shut the connection down; a thread that waits for a message gets DaemonUnreachable. Any thread may call it.
        In a forked child it does nothing: a shutdown would end the parent's connection."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._socket.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())
