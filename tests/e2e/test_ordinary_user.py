"""The same suite with daemon, readers and command line as an ordinary user: pyfuse3, mounted by fusermount3.

It runs in a mount namespace of its own, where /dev/fuse may be opened by everybody (as on most systems; some machines
keep it to root) and where the interpreter can be reached."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.mount import kernel
from tests.harness import REPOSITORY, run

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not kernel.has_sys_admin() or os.geteuid() != 0, reason="another user is made by root"),
    pytest.mark.skipif(shutil.which("fusermount3") is None, reason="an ordinary user mounts by fusermount3"),
]

USER = 65534
SETUP = """
set -e
place=$1; shift
mount -t tmpfs -o mode=0755,dev tmpfs "$place/dev"
mknod -m 0666 "$place/dev/fuse" c 10 229
mount --bind "$place/dev/fuse" /dev/fuse
# Private homes: what the interpreter needs of them is shown beside, and they are replaced by empty ones.
for hidden in "$@"; do
    mkdir -p "$place/kept"
    mount --rbind "$hidden" "$place/kept"
    top=$(echo "$hidden" | cut -d/ -f1-2)
    mount -t tmpfs -o mode=0755 tmpfs "$top"
    mkdir -p "$hidden"
    mount --rbind "$place/kept" "$hidden"
done
cd "$REPOSITORY"
exec setpriv --reuid=$UID_WANTED --regid=$UID_WANTED --clear-groups --inh-caps=-all \
    "$PYTHON" -m pytest -q -p no:cacheprovider --basetemp="$place/home/tmp" --timeout 120 $TESTS
"""
CONTRACT = (
    "tests/e2e/test_generations.py::test_update_under_open_files[pyfuse3]",
    "tests/e2e/test_generations.py::test_evicted_pipelines_come_back[pyfuse3]",
    "tests/e2e/test_bytes.py::test_equal_during_the_fill_and_after[auto-mmap-shared]",
    "tests/e2e/test_state.py::test_xattrs[auto]",
    "tests/e2e/test_mount_command.py::test_an_ordinary_user_needs_no_configuration",
)


@pytest.fixture
def place() -> Iterator[Path]:
    """pytest's own directories are private to root."""
    with tempfile.TemporaryDirectory(prefix="instantstart-user-") as name:
        path = Path(name)
        path.chmod(0o755)
        for below in ("dev", "home"):
            (path / below).mkdir()
        os.chown(path / "home", USER, USER)
        yield path


def hidden_homes() -> list[str]:
    """The directory below a private one, like /root/.pyenv, that the interpreter lies in; [] where all may pass."""
    program = Path(os.path.realpath(sys.executable))
    top = Path("/", *program.parts[1:2])
    if top.stat().st_mode & 0o001:
        return []
    return [str(Path("/", *program.parts[1:3]))]


def test_the_contract_as_an_ordinary_user(place: Path) -> None:
    env = {
        "REPOSITORY": str(REPOSITORY),
        "UID_WANTED": str(USER),
        "PYTHON": sys.executable,
        "TESTS": " ".join(CONTRACT),
        "HOME": str(place / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "INSTANTSTART_TEST_TRANSPORT": "pyfuse3",
        "TMPDIR": str(place / "home"),
    }
    done = run(
        *("unshare", "-m", "--propagation", "private", "sh", "-c", SETUP, "sh", place, *hidden_homes()),
        timeout=160,
        env=env,
    )
    said = done.stdout + done.stderr
    if "Permission denied" in said and "pytest" not in said:
        pytest.skip(f"an ordinary user cannot run this interpreter: {said.strip()[-200:]}")
    assert done.returncode == 0, said[-6000:]
    assert f"{len(CONTRACT)} passed" in said, said[-2000:]
