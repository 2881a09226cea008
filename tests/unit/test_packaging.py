"""The unit files and their installation, as far as files go; tests/nspawn boots them."""

from __future__ import annotations

import re
import shutil
import subprocess
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
