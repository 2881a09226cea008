"""stop-post: whether the mount stays for the next daemon or goes, for each way in which one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own, which needs root")

NAMESPACE = """
import os, subprocess, sys
from instantstart_fs.mount import kernel
script, runtime, mountpoint, shims = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
os.makedirs("/run/systemd/system")
fuse = os.open("/dev/fuse", os.O_RDWR)
kernel.mount_fuse(mountpoint, fuse, fsname="instantstart", subtype="instantstart", allow_other=False)
os.environ.update(PATH=f"{shims}:{os.environ['PATH']}", INVOCATION_ID="1")
subprocess.run([script, runtime], check=True, timeout=20)
print("stays" if f" {mountpoint} " in open("/proc/self/mountinfo").read() else "goes")
"""
"""In a mount namespace of its own, since stop-post looks for systemd in /run and for its mount everywhere."""


@pytest.mark.parametrize(
    ("job", "result", "status", "expected"),
    [
        ("stop", "success", "0", "goes"),
        ("stop", "signal", "KILL", "goes"),
        ("restart", "success", "0", "stays"),
        ("restart", "timeout", "KILL", "stays"),
        ("", "success", "0", "goes"),
        ("", "signal", "KILL", "stays"),
        ("", "watchdog", "ABRT", "stays"),
        ("", "oom-kill", "KILL", "stays"),
        ("", "exit-code", "1", "stays"),
        ("", "exit-code", "2", "goes"),
        ("start", "exit-code", "1", "stays"),
        ("start", "timeout", "KILL", "stays"),
        ("start", "exit-code", "2", "goes"),
        ("reload", "signal", "KILL", "stays"),
    ],
)
def test_the_mount_stays_exactly_where_another_daemon_follows(
    tmp_path: Path, job: str, result: str, status: str, expected: str
) -> None:
    runtime, mountpoint, shims = tmp_path / "run", tmp_path / "models", tmp_path / "bin"
    for directory in (runtime, mountpoint, shims):
        directory.mkdir()
    (runtime / "mountpoint").write_text(f"{mountpoint}\n")
    systemctl = shims / "systemctl"
    line = f"1234 instantstart.service {job} running" if job else ""
    systemctl.write_text(f"#!/bin/sh\necho '{line}'\n")
    systemctl.chmod(0o755)
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", sys.executable, "-c", NAMESPACE),
            *(
                str(REPOSITORY / "instantstart_fs/installation/systemd/stop-post"),
                str(runtime),
                str(mountpoint),
                str(shims),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "SERVICE_RESULT": result, "EXIT_STATUS": status},
    )
    assert done.stdout.strip() == expected, done.stderr
