"""The unit files and their installation, as far as files go; tests/nspawn boots them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_ANALYZE = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze (Debian: systemd)"
)
OWN_NAMESPACE = {
    "PrivateMounts",
    "PrivateTmp",
    "PrivateDevices",
    "PrivateIPC",
    "ProtectSystem",
    "ProtectHome",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectProc",
    "ProcSubset",
    "ReadWritePaths",
    "ReadOnlyPaths",
    "InaccessiblePaths",
    "BindPaths",
    "TemporaryFileSystem",
    "MountFlags",
    "MountAPIVFS",
    "RootDirectory",
}


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def script(name: str, *arguments: str | Path) -> None:
    subprocess.run([ROOT / "scripts" / name, *arguments], check=True, timeout=30, capture_output=True)


def test_install_is_idempotent_and_uninstall_keeps_the_store(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    conf = 'PRUNEFS = "NFS afs"\nPRUNEPATHS="/tmp /var/spool"\n'
    (tmp_path / "etc/updatedb.conf").write_text(conf)
    script("install", "--root", tmp_path)
    first = files_below(tmp_path)
    assert first["etc/updatedb.conf"] == (
        b'PRUNEFS = "NFS afs fuse.instantstart"\nPRUNEPATHS="/tmp /var/spool /models /var/lib/instantstart"\n'
    )
    (tmp_path / "etc/instantstart/config.toml").write_text("# mine\n")
    script("install", "--root", tmp_path)
    again = files_below(tmp_path)
    assert again.pop("etc/instantstart/config.toml") == b"# mine\n"
    first.pop("etc/instantstart/config.toml")
    assert again == first
    (tmp_path / "var/lib/instantstart/slots").mkdir(parents=True)
    (tmp_path / "var/lib/instantstart/slots/x").write_text("bytes")
    for _ in range(2):
        script("uninstall", "--root", tmp_path)
    left = {"etc/instantstart/config.toml", "etc/updatedb.conf", "var/lib/instantstart/slots/x"}
    assert set(files_below(tmp_path)) == left
    assert (tmp_path / "etc/updatedb.conf").read_text() == conf
    script("uninstall", "--purge", "--root", tmp_path)
    assert set(files_below(tmp_path)) == {"etc/updatedb.conf"}


def test_no_directive_hides_the_mount() -> None:
    """Any of these gives the daemon a mount namespace of its own."""
    keys = re.findall(r"^(\w+)=", (ROOT / "systemd/instantstart.service").read_text(), flags=re.MULTILINE)
    assert "ExecStart" in keys
    assert set(keys) & (OWN_NAMESPACE | {"MemoryMax", "MemoryHigh"}) == set()


@NEEDS_ANALYZE
def test_systemd_takes_every_line(tmp_path: Path) -> None:
    """Programs that are not installed here are replaced by one that is; unknown keys and bad values stay errors."""
    for name in ("instantstart.service", "vllm@.service"):
        text = (ROOT / "systemd" / name).read_text()
        text = re.sub(r"(?<==)(-?)/opt/instantstart/\S+", r"\1/bin/true", text)
        (tmp_path / name).write_text(text.replace("User=instantstart-engine", "User=root"))
    names = [str(tmp_path / name) for name in ("instantstart.service", "vllm@.service")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", *names],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "instantstart" in line]
    assert ours == []


@NEEDS_ANALYZE
def test_its_exposure_stays_below_what_it_was_hardened_to() -> None:
    unit = ROOT / "systemd/instantstart.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=52", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_wheel_installs_the_command(tmp_path: Path) -> None:
    """Built from a copy of the tree, without the network."""
    pytest.importorskip("setuptools", "77", reason="no setuptools 77 to build with")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "instantstart_fs", tree / "instantstart_fs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    for arguments in (
        ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)],
        ["install", "--no-deps", "--target", str(tmp_path / "site"), "instantstart-fs", "--find-links", str(tmp_path)],
    ):
        done = subprocess.run(
            [*pip, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    shown = subprocess.run(
        [sys.executable, tmp_path / "site/bin/instantstart", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert "serve" in shown.stdout
    assert (tmp_path / "site/instantstart_fs/web/templates").is_dir()
