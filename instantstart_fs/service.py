"""Talks to the service manager: notifications (sd_notify), stored file descriptors, the watchdog, signals to stop.

The protocol is systemd's, over plain sockets and environment variables. Without those nothing is told to anybody.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator

import trio

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START: where descriptors are handed over."""
SEND_DEADLINE = 1.0
STOP_DEADLINE = 25.0
"""Seconds from the signal to the end, whatever hangs; below systemd's TimeoutStopSec (30 s in our unit)."""


class Notifier:
    """systemd's sd_notify; silent where NOTIFY_SOCKET is not set."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")

    def send(self, state: str, fd: int | None = None) -> None:
        """``fd`` goes with it."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(SEND_DEADLINE)
                channel.sendmsg([state.encode()], rights, 0, address)
        except OSError as error:
            log.warning("systemd was not told %r: %s", state.partition("\n")[0], error)


class DescriptorStore:
    """systemd's file descriptor store (mount.handover.FdStore)."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def store(self, name: str, fd: int) -> None:
        # Without FDPOLL=0 systemd would watch the descriptor, and be woken by every request of the kernel.
        self._notifier.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)

    def remove(self, name: str) -> None:
        self._notifier.send(f"FDSTOREREMOVE=1\nFDNAME={name}")


def descriptor_store() -> DescriptorStore | None:
    """Return systemd's descriptor store; None if nobody keeps descriptors. FDSTORE, the number of places, comes from
    systemd since version 254, and from our unit before."""
    places = os.environ.get("FDSTORE", "")
    if not os.environ.get("NOTIFY_SOCKET") or not places.isdigit() or int(places) < 2:
        return None
    return DescriptorStore(Notifier())


def received_descriptors() -> dict[str, int]:
    """Return the descriptors that the service manager kept, by name, close-on-exec. Call it once in a process."""
    count, names = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_FDNAMES", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, int] = {}
    for fd, name in zip(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)), names.split(":"), strict=False):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            if name in found:
                # The same again, from a daemon that was killed while it handed over: the first one counts.
                os.close(fd)
            else:
                found[name] = fd
    return found


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, a third of what systemd waits for one; None if nobody watches."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) <= 0 or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 3e6


def seconds_since_start() -> float:
    """Return the age of this process: from the fork, with the interpreter's start; to a clock tick (10 ms)."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


class Stop:
    """SIGTERM and SIGINT, from the daemon's first moment on. They cancel ``scope``, which its owner may replace."""

    def __init__(self, mount: str) -> None:
        self.scope = trio.CancelScope()
        self._mount = mount

    async def wait(self, signals: AsyncIterator[int]) -> None:
        """Stop at the first signal, within STOP_DEADLINE."""
        async for number in signals:
            log.info("stopping (%s)", signal.Signals(number).name)
            Notifier().send("STOPPING=1")
            threading.Thread(target=self._end_at_deadline, name="stop-deadline", daemon=True).start()
            self.scope.cancel()
            return

    def _end_at_deadline(self) -> None:
        """Exit the process when stopping hangs. The kernel detaches the mount at the exit."""
        time.sleep(STOP_DEADLINE)
        log.error(
            "stopping took longer than %.0f s: ending at once; %s may have to be unmounted", STOP_DEADLINE, self._mount
        )
        logging.shutdown()
        os._exit(1)
