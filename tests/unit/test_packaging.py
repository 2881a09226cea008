"""The unit files and their installation, as far as files go; tests/nspawn boots them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distribution import manual, units
from instantstart_fs import __version__
from instantstart_fs.cli import run
from instantstart_fs.errors import InstantStartError, PermissionRefused, UsageError
from instantstart_fs.installation import plan, service

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


UNITS = ROOT / "instantstart_fs/installation/systemd"


def said(call: Callable[..., object], **options: Any) -> list[str]:
    """The steps that it took."""
    steps: list[str] = []
    call(steps.append, **options)
    return steps


def test_install_is_idempotent_and_uninstall_keeps_the_store(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    conf = 'PRUNEFS = "NFS afs"\nPRUNEPATHS="/tmp /var/spool"\n'
    (tmp_path / "etc/updatedb.conf").write_text(conf)
    where = {"root": str(tmp_path), "prefix": "/opt/elsewhere"}
    planned = said(service.install, **where, dry=True)
    assert set(files_below(tmp_path)) == {"etc/updatedb.conf"}
    assert [step for step in said(service.install, **where) if not step.startswith("mkdir")] == [
        step for step in planned if not step.startswith("mkdir")
    ]
    first = files_below(tmp_path)
    assert first["etc/updatedb.conf"] == (
        b'PRUNEFS = "NFS afs fuse.instantstart"\nPRUNEPATHS="/tmp /var/spool /models /var/lib/instantstart"\n'
    )
    unit = first["etc/systemd/system/instantstart.service"].decode()
    programs = re.findall(r"^Exec(?:Start|StopPost)=-?(\S+)", unit, re.MULTILINE)
    assert programs == ["/opt/elsewhere/bin/instantstart", "/opt/elsewhere/libexec/instantstart-stop-post"]
    assert os.access(tmp_path / programs[1][1:], os.X_OK)
    (tmp_path / "etc/instantstart/config.toml").write_text("# mine\n")
    assert said(service.install, **where) == []
    (tmp_path / "etc/systemd/system/instantstart.service").write_text("[Service]\n")
    assert said(service.install, **where) == ["write   /etc/systemd/system/instantstart.service"]
    again = files_below(tmp_path)
    assert again.pop("etc/instantstart/config.toml") == b"# mine\n"
    first.pop("etc/instantstart/config.toml")
    assert again == first
    (tmp_path / "var/lib/instantstart/slots").mkdir(parents=True)
    (tmp_path / "var/lib/instantstart/slots/x").write_text("bytes")
    before = files_below(tmp_path)
    assert said(service.uninstall, root=str(tmp_path), dry=True)
    assert files_below(tmp_path) == before
    for _ in range(2):
        left = service.uninstall(lambda _: None, root=str(tmp_path))
        assert left == ["/var/lib/instantstart (the cached bytes)", "/etc/instantstart (the configuration)"]
    kept = {"etc/instantstart/config.toml", "etc/updatedb.conf", "var/lib/instantstart/slots/x"}
    assert set(files_below(tmp_path)) == kept
    assert (tmp_path / "etc/updatedb.conf").read_text() == conf
    assert service.uninstall(lambda _: None, root=str(tmp_path), purge=True) == []
    assert set(files_below(tmp_path)) == {"etc/updatedb.conf"}


def test_a_service_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    for prefix in ("relative", "/opt/my env", "/opt/100%", "/"):
        with pytest.raises(UsageError, match="a unit file cannot name"):
            service.install(lambda _: None, root=root, prefix=prefix)
    assert not Path(root).exists()
    packaged = tmp_path / "packaged/usr/lib/systemd/system/instantstart.service"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("")
    for call in (service.install, service.uninstall):
        with pytest.raises(InstantStartError, match="a package brought the service"):
            call(lambda _: None, root=str(tmp_path / "packaged"))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another owner, which needs root")
def test_root_does_not_run_what_others_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SYSTEMD_RUNS", "/")
    with tempfile.TemporaryDirectory(dir="/opt") as directory:
        program = Path(directory, "bin/instantstart")
        program.parent.mkdir()
        for path in (Path(directory), program.parent):
            path.chmod(0o755)
        with pytest.raises(UsageError, match="--prefix names the environment"):
            service.install(lambda _: None, prefix=directory)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        os.chown(program.parent, 1, -1)
        with pytest.raises(PermissionRefused, match=re.escape(f"({program.parent})")):
            service.install(lambda _: None, prefix=directory)
        os.chown(program.parent, 0, -1)
        program.chmod(0o757)
        with pytest.raises(PermissionRefused, match=re.escape(f"({program})")):
            service.install(lambda _: None, prefix=directory)


def test_status_says_that_nothing_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    if service.status().installed:
        pytest.skip("the service is installed on this machine")
    assert run(["service", "status"]) == 1
    assert "instantstart service install" in capsys.readouterr().out
    assert run(["service", "status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["installed"] is False


def test_no_directive_hides_the_mount() -> None:
    """Any of these gives the daemon a mount namespace of its own."""
    keys = re.findall(r"^(\w+)=", (UNITS / "instantstart.service").read_text(), flags=re.MULTILINE)
    assert "ExecStart" in keys
    assert set(keys) & (OWN_NAMESPACE | {"MemoryMax", "MemoryHigh"}) == set()


@NEEDS_ANALYZE
def test_systemd_takes_every_line(tmp_path: Path) -> None:
    """Programs that are not installed here are replaced by one that is; unknown keys and bad values stay errors."""
    for name in ("instantstart.service", "vllm@.service"):
        text = (UNITS / name).read_text()
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
    unit = UNITS / "instantstart.service"
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

    def installed(*arguments: str | Path) -> str:
        return subprocess.run(
            [sys.executable, tmp_path / "site/bin/instantstart", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, capture_output=True, text=True,
            timeout=60, check=True,
        ).stdout  # fmt: skip

    assert "serve" in installed("--help")
    assert (tmp_path / "site/instantstart_fs/web/templates").is_dir()
    assert installed("--version") == f"instantstart {__version__}\n"
    assert [path.name for path in tmp_path.glob("*.whl")] == [f"instantstart_fs-{__version__}-py3-none-any.whl"]
    installed("service", "install", "--root", tmp_path / "machine", "--prefix", "/opt/instantstart")
    assert (tmp_path / "machine/etc/systemd/system/instantstart.service").read_bytes() == (
        UNITS / "instantstart.service"
    ).read_bytes()


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest.split()[0] in ("Unreleased", __version__)


def test_updatedb_is_edited_once_and_restored() -> None:
    for text in ('PRUNEPATHS="/modelsque /tmp"\n', '# PRUNEFS = "x"\nPRUNEFS="a"\n', "other = 1\n", ""):
        once = plan.pruned(text)
        assert plan.pruned(once) == once
        assert plan.unpruned(once) == text


def test_manual_and_completions_are_the_command_line_s_own(tmp_path: Path) -> None:
    manual.write(tmp_path)
    page = (tmp_path / "man/man1/instantstart.1").read_text()
    for words in (
        r"instantstart add\fR",
        r"instantstart service install\fR",
        r"\fB\-\-dry\-run\fR",
        "FILES",
        "EXIT STATUS",
    ):
        assert words in page
    assert not re.search(r"^\.(?!TH |SH |TP$|RS$|RE$)", page, re.MULTILINE), "a help text became a request of roff"
    if shutil.which("man"):
        done = subprocess.run(
            ["man", "--warnings", "-l", tmp_path / "man/man1/instantstart.1"],
            env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stderr == "" and "instantstart service install" in done.stdout
    for _, path in manual.COMPLETIONS:
        assert "_INSTANTSTART_COMPLETE" in (tmp_path / path).read_text()


def test_a_package_has_the_same_service_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units.main("/usr/lib/instantstart", str(tmp_path))
    capsys.readouterr()
    packaged = files_below(tmp_path)
    unit = packaged["lib/systemd/system/instantstart.service"].decode()
    assert unit.replace("/usr/lib/instantstart/", "/opt/instantstart/") == (UNITS / "instantstart.service").read_text()
    assert plan.prefix_of_unit(unit) == "/usr/lib/instantstart"
    assert "usr/lib/instantstart/libexec/instantstart-stop-post" in packaged
    for script in ("postinst", "prerm", "postrm"):
        subprocess.run(["sh", "-n", ROOT / "distribution/debian" / script], check=True, timeout=10)
