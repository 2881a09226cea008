"""What a reader of a warm pipeline waits at a restart, by `systemctl restart`'s way and by kill -9, round by round.

    scripts/bench restart [--rounds N] [--against DIRECTORY]

tests/supervisor.py stands in for systemd, at once and without its own delays; one more start of a bare interpreter
is part of every figure. One thread lists, stats and asks the mount without a break; its longest step is the pause.
--against: a checkout of another version, measured in turn with this one, each with a store of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.common import Rounds, summary, workspace, write_result
from tests.harness import REPOSITORY, model_directory
from tests.supervisor import Supervised

STEP = 0.002
"""Seconds between two looks."""


class Watcher:
    """Looks at a warm pipeline without a break."""

    def __init__(self, mount: Path) -> None:
        self.longest = 0.0
        self._mount = mount
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(STEP):
            began = time.monotonic()
            os.listdir(self._mount / "p")
            os.stat(self._mount / "p/config.json")
            os.statvfs(self._mount)
            self.longest = max(self.longest, time.monotonic() - began)

    def end(self) -> float:
        self._over.set()
        self._thread.join(30)
        return self.longest


def restart(daemon: Supervised, *, kill: bool) -> dict[str, float]:
    watcher = Watcher(daemon.mount)
    try:
        began = time.monotonic()
        daemon.leave(kill=kill)
        left = time.monotonic() - began
        daemon.start()
        ready = time.monotonic() - began
    finally:
        pause = watcher.end()
    return {"seconds": pause, "end": left, "ready": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    options = parser.parse_args()
    trees = {"this": REPOSITORY, **({"other": options.against.resolve()} if options.against else {})}
    for tree in trees.values():
        # As an installer does: a start that compiles its modules is another start.
        subprocess.run([sys.executable, "-m", "compileall", "-q", tree / "instantstart_fs"], check=True, timeout=120)
    with workspace(options.dir) as directory, contextlib.ExitStack() as stack:
        contenders = {}
        for name, tree in trees.items():
            model_directory(directory / name / "source", seed=1)
            daemon = Supervised(directory / name / "d")
            daemon.program = tree
            stack.enter_context(daemon)
            daemon.ok("add", "p", f"file://{directory / name / 'source'}")
            daemon.ok("warm", "p", "--wait")
            for kill in (False, True):
                what = f"{name}, {'kill -9' if kill else 'SIGTERM'}"
                contenders[what] = lambda daemon=daemon, kill=kill: restart(daemon, kill=kill)
        rounds = Rounds(contenders, options.rounds)
        rounds.run()
    result = {
        what: {key: summary(rounds.seconds(what, key)) for key in ("seconds", "end", "ready")} for what in contenders
    }
    for what, found in result.items():
        pause = found["seconds"]
        print(f"{what}: pause {pause['median']:.2f} s ({pause['min']:.2f} to {pause['max']:.2f})")
    write_result("restart", result)


if __name__ == "__main__":
    main()
