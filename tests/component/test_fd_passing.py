"""Descriptors that come over a unix socket: close-on-exec, bounded, in order."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from instantstart_fs.control import lines, protocol
from instantstart_fs.control.client_connection import Connection
from instantstart_fs.ipc import fd_passing


def test_descriptors_come_in_order_and_no_child_inherits_them() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, open("/dev/null", "rb") as first, open("/dev/zero", "rb") as second:
        socket.send_fds(far, [b"two"], [first.fileno(), second.fileno()])
        data, found, flags = fd_passing.receive(near, 64, 4)
        assert (data, flags & socket.MSG_CTRUNC) == (b"two", 0)
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in found] == ["/dev/null", "/dev/zero"]
        assert not any(os.get_inheritable(fd) for fd in found)
        for fd in found:
            os.close(fd)


def test_what_comes_beyond_the_bound_is_closed_and_said() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far, open("/dev/null", "rb") as file:
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(far, [b"x"], [file.fileno()])
        data, found, flags = fd_passing.receive(near, 64, 0)
        assert (data, found, bool(flags & socket.MSG_CTRUNC)) == (b"x", [], True)
        assert len(os.listdir("/proc/self/fd")) == before
        far.close()
        assert fd_passing.receive(near, 64, 1)[:2] == (b"", [])


def test_no_child_inherits_what_a_client_of_the_control_socket_is_handed(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, open("/dev/null", "rb") as file:
        listener.bind(path)
        listener.listen()
        connection = Connection(path, 30.0)
        daemon, _ = listener.accept()
        with daemon:
            socket.send_fds(daemon, [lines.encode_response(protocol.Done(None))], [file.fileno()])
            assert connection.receive(30.0) == protocol.Done(None)
        (handed,) = connection.descriptors
        assert os.readlink(f"/proc/self/fd/{handed}") == "/dev/null"
        assert not os.get_inheritable(handed)
        os.close(connection.descriptors.popleft())
        connection.close()
