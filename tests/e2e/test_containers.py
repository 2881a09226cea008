"""What a container sees of a mount that is made anew: a private mount namespace stands in for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, must, wait_for

CONTAINER = """
set -e
mount --make-rslave /
mount --bind "$1/models" "$2/by-itself"
mount --rbind "$1" "$2/by-parent"
mount --make-rslave "$2/by-parent"
echo ready
read -r _
cat "$2/by-itself/p/config.json" >/dev/null 2>&1 && echo follows || echo dead
cat "$2/by-parent/models/p/config.json" >/dev/null 2>&1 && echo follows || echo dead
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Path]:
    """A shared mount, as / is under systemd."""
    parent = tmp_path / "srv"
    parent.mkdir()
    must("mount", "--bind", parent, parent)
    must("mount", "--make-shared", parent)
    yield parent
    must("umount", "-l", parent)


def test_only_a_bind_of_the_parent_follows_a_remount(parent: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    for name in ("by-itself", "by-parent"):
        (tmp_path / "container" / name).mkdir(parents=True)
    with Daemon(tmp_path / "d", mount=parent / "models") as daemon:
        daemon.ok("add", "p", f"file://{source}")
        command = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", CONTAINER, "sh"]
        container = subprocess.Popen(
            [*command, str(parent), str(tmp_path / "container")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert container.stdout is not None
            assert container.stdout.readline() == "ready\n"
            daemon.restart()
            wait_for(lambda: (parent / "models/p/config.json").exists(), "the new mount", 10)
            out, _ = container.communicate("go\n", timeout=20)
        finally:
            container.kill()
    assert out.split() == ["dead", "follows"]
