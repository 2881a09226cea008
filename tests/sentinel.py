"""The last resort against a test that hangs: a process beside the one that runs tests. See tests/timeouts.py.

It uses the standard library only, and nothing of the process that it watches: that one may be stuck in the kernel, or
in C code that keeps the interpreter's lock, where no signal handler and no thread of it can run.

Lines on stdin: ``start SECONDS`` (a test begins; it is given up after that long), ``end``, ``bye``. When the time has
passed, the FUSE connections below the directory are aborted, which frees whoever waits for their mounts; GRACE seconds
later the process is killed, with its descendants, and what it had mounted is unmounted. The end of stdin without a
``bye`` means that it died: then what it left is cleared away in the same manner.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time


def fuse_mounts(below: str) -> list[tuple[str, str]]:
    """Minor device number and mountpoint of each FUSE mount below a directory, the newest first."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            place = fields[4].replace(r"\040", " ")
            kind = fields[fields.index("-") + 1]
            if place.startswith(below + "/") and kind.startswith("fuse"):
                found.append((fields[2].split(":")[1], place))
    return found[::-1]


def abort_connections(below: str) -> None:
    for minor, _ in fuse_mounts(below):
        with contextlib.suppress(OSError), open(f"/sys/fs/fuse/connections/{minor}/abort", "w") as file:
            file.write("1")


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{task}/children") as file:
                    born = [int(word) for word in file.read().split()]
                    found += born
                    waiting += born
    return found


def clear_away(pids: list[int], below: str) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    abort_connections(below)
    for _, place in fuse_mounts(below):
        command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run([*command, place], timeout=20, capture_output=True)


def main(pid: int, below: str, grace: float) -> None:
    buffer = b""
    deadline: float | None = None
    aborted = False
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([0], [], [], wait)[0]:
            if not aborted:
                aborted, deadline = True, time.monotonic() + grace
                abort_connections(below)
            else:
                print(f"\ntests: a test that nothing can interrupt; process {pid} is killed", file=sys.stderr)
                clear_away([pid, *descendants(pid)], below)
                return
            continue
        data = os.read(0, 4096)
        if not data:
            clear_away([], below)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            if line == b"bye":
                return
            word, _, seconds = line.partition(b" ")
            deadline = time.monotonic() + float(seconds) if word == b"start" else None
            aborted = False


if __name__ == "__main__":
    if os.fork():  # nobody's child: tests look for what theirs left behind
        os._exit(0)
    os.setsid()
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
