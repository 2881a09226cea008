"""``listenfds.py NAME=FD… -- COMMAND…`` becomes the command as systemd would start it: descriptors from 3 on, and
LISTEN_PID its own. Imports nothing of ours: its time is part of every restart that is measured."""

import contextlib
import fcntl
import os
import sys


def main() -> None:
    split = sys.argv.index("--")
    given = [word.rpartition("=") for word in sys.argv[1:split]]
    # Out of the way first: one may lie where another is to go.
    high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for _, _, fd in given]
    for _, _, fd in given:
        os.close(int(fd))
    for position, fd in enumerate(high):
        os.dup2(fd, 3 + position)
        os.close(fd)
    if given:
        os.environ |= {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(given)),
            "LISTEN_FDNAMES": ":".join(name for name, _, _ in given),
        }
    with contextlib.suppress(KeyError):
        if os.environ["WATCHDOG_USEC"]:
            os.environ["WATCHDOG_PID"] = str(os.getpid())
    command = sys.argv[split + 1 :]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
