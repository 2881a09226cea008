"""What the daemon imports before its mount answers: readers wait for it at each restart."""

from __future__ import annotations

import subprocess
import sys

LATER = {
    "asyncio", "boto3", "botocore", "h11", "httpx2", "huggingface_hub", "hypercorn", "jinja2", "prometheus_client",
    "rich", "starlette", "torch", "typer", "urllib3",
}  # fmt: skip
"""Each costs 30 ms and more, and is for origins, the page or a terminal."""
NOT_AT_A_START = {"email.utils", "html", "json", "pyfuse3", "instantstart_fs.regional", "instantstart_fs.csi"}
"""pyfuse3 with libfuse costs 11 ms, the rest 1 ms each, and none is needed where reads are passed through."""


def test_a_start_imports_nothing_that_the_mount_does_not_need() -> None:
    # Refused after the imports, by the way that a unit's command takes.
    program = (
        "import sys; from instantstart_fs.cli import run; run(['serve', '--log-level', 'loud']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    imported = set(done.stdout.split())
    assert "instantstart_fs.daemon" in imported
    assert (LATER | NOT_AT_A_START) & imported == set()
    assert not [name for name in imported if "instantstart_fs" in name and "rack" in name.replace("track", "")]


def test_the_page_of_a_host_without_a_region_imports_nothing_of_it() -> None:
    program = "import sys, instantstart_fs.web.app, instantstart_fs.web.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    imported = set(done.stdout.split())
    assert "instantstart_fs.web.openapi" in imported
    region = (
        "instantstart_fs.regional",
        "instantstart_fs.filler.region",
        "instantstart_fs.upkeep.heartbeats",
        "blake3",
    )
    assert not [name for name in imported if name.startswith(region)]


def test_version_is_told_without_the_imports_of_the_commands() -> None:
    program = "import sys; from instantstart_fs.cli import run; run(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    told, imported = done.stdout.splitlines()
    assert told.startswith("instantstart ")
    # As the commands say it, who understand it beside other words.
    assert printed_by(["--version", "ls"]) == told
    assert not LATER & set(imported.split())
    assert "msgspec" not in imported.split()


def printed_by(words: list[str]) -> str:
    """What the command with these words prints."""
    done = subprocess.run(
        [sys.executable, "-m", "instantstart_fs.cli", *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_a_daemon_whose_output_is_closed_ends_as_well_as_any() -> None:
    program = (
        "import sys; from instantstart_fs import daemon; from instantstart_fs.cli import serve\n"
        "daemon.run = lambda *_, **__: None\n"
        "serve.run()\n"
    )
    done = subprocess.run(
        f"{sys.executable} -c '{program}' >&-", shell=True, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
