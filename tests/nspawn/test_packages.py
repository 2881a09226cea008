"""What a new user does with what is built: a fresh Debian or Ubuntu, nothing of this checkout installed in it.

scripts/nspawn-test packages makes the root (mmdebstrap) and the package (scripts/package), which takes minutes;
INSTANTSTART_PACKAGES=DIR keeps both there for the next run, and INSTANTSTART_SUITE=noble takes Ubuntu 24.04.
The readers are transformers and torch of the environment that the tests run in, bound read-only: neither the wheel nor
the package brings them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs import __version__
from tests.harness import REPOSITORY
from tests.nspawn.machine import Machine, why_no_machine
from tests.nspawn.test_operations import hub
from tests.nspawn.test_service import GOES_ON, UNIT, mounts

KEPT_IN = "INSTANTSTART_PACKAGES"
SUITE = os.environ.get("INSTANTSTART_SUITE", "bookworm")
"""The distribution's release: Debian's bookworm or Ubuntu's noble (24.04)."""
KEYRING = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"
MIRRORS = {
    "bookworm": (),
    "noble": (f"deb [signed-by={KEYRING}] http://archive.ubuntu.com/ubuntu noble main universe",),
}
TOOLS = "build-essential,ca-certificates,debhelper,git,libfuse3-dev,lintian,pkg-config,python3-dev,python3-venv"
"""What scripts/package needs, in the root that it runs in where the release is not this system's."""
PASSED_ON = ("PIP_INDEX_URL", "PIP_CERT", "PIP_DEFAULT_TIMEOUT", "https_proxy", "http_proxy", "no_proxy")
BUILD = "set -e; cp -r /checkout /build; cd /build; exec scripts/package --output /built --keep-wheels /built/wheels"
SYSTEM = "apt,systemd,systemd-sysv,dbus,fuse3,python3,python3-venv,ca-certificates,man-db"
"""What a server has, and what pip and apt would bring from the network, which the machine has not."""
READS = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], local_files_only=True)
print(sum(parameter.numel() for parameter in model.parameters()))
"""
PARAMETERS = "22713216"
"""Of all-MiniLM-L6-v2."""
PATHS_OF_MACHINES = re.compile(
    r"/(?:proc|sys|dev|run|tmp|work|root/\.pyenv)(?:/|$)|/var/(?:log|tmp|cache|lib/(?:systemd|dpkg|apt))(?:/|$)|/etc/(?:.*-|mtab|machine-id|resolv\.conf)$"
)
"""Where a running system writes whoever is installed."""


def why_not() -> str | None:
    missing = [name for name in ("mmdebstrap", "dpkg-deb") if shutil.which(name) is None]
    missing += ["ubuntu-keyring"] if SUITE == "noble" and not os.path.exists(KEYRING) else []
    missing += [
        name for name in ("torch", "transformers", "all_minilm_l6_v2") if importlib.util.find_spec(name) is None
    ]
    return why_no_machine() or (f"not installed: {', '.join(missing)}" if missing else None)


REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with root.tar, the .deb, the wheel, and wheels/ with all that the wheel needs."""
    given = os.environ.get(KEPT_IN)
    directory = Path(given).absolute() / SUITE if given else tmp_path_factory.mktemp("packages")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)  # not for root alone
    if not (directory / "root.tar").exists():
        bootstrap(SYSTEM, directory / "root.tar")
    if not list(directory.glob("instantstart_*.deb")):
        if f"VERSION_CODENAME={SUITE}" in Path("/etc/os-release").read_text():
            command = [REPOSITORY / "scripts/package", "--output", directory, "--keep-wheels", directory / "wheels"]
            subprocess.run(command, check=True, timeout=900)
        else:
            build_elsewhere(directory, tmp_path_factory.mktemp("builder"))
    return directory


def bootstrap(packages: str, target: Path) -> None:
    """Make a root of the release in ``target``, a directory or a tar file."""
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", SUITE, str(target)]
    command += MIRRORS[SUITE]
    subprocess.run(command, check=True, timeout=900)


def build_elsewhere(directory: Path, work: Path) -> None:
    """Run scripts/package on this checkout's last commit, in a root of the release, with pip configured as here."""
    bootstrap(TOOLS, work / "root")
    subprocess.run(["git", "clone", "-q", REPOSITORY, work / "checkout"], check=True, timeout=120)
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "debug"], check=True, timeout=60, text=True,
                            capture_output=True).stdout  # fmt: skip
    system_wide = re.findall(r"(/etc/\S+), exists: True", listed)
    certificates = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", f"--directory={work / 'root'}"]
    command += [f"--bind-ro={work / 'checkout'}:/checkout", f"--bind={directory}:/built"]
    command += [f"--bind-ro={path}" for path in (*map(os.path.dirname, system_wide), *certificates, "/etc/resolv.conf")
                if os.path.exists(path) and path != "/etc"]  # fmt: skip
    command += [f"--setenv={name}={value}" for name, value in os.environ.items() if name in PASSED_ON]
    subprocess.run([*command, "sh", "-c", BUILD], check=True, timeout=900)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real small model."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    directory = tmp_path_factory.mktemp("minilm")
    archive = next(Path(spec.submodule_search_locations[0]).rglob("*.zip"), None)
    if archive is None:
        return next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent
    zipfile.ZipFile(archive).extractall(directory)
    return next(directory.rglob("model.safetensors")).parent


@pytest.fixture
def fresh(tmp_path: Path, built: Path, weights: Path) -> Iterator[Machine]:
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["tar", "-xf", built / "root.tar", "-C", root, "--numeric-owner"], check=True, timeout=120)
    (root / "root").chmod(0o755)  # this host's Python may lie below its /root
    with Machine(tmp_path / "machine", binds=[built, weights], root=root) as machine:
        yield machine


class Person:
    """Somebody at the machine's shell."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.home = "/root" if name == "root" else f"/home/{name}"

    def types(self, command: str, *, timeout: float = 200, check: bool = True) -> str:
        """What it says, on stdout and stderr."""
        login = ["env", "-i", f"HOME={self.home}", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8"]
        if self.name != "root":
            login += ["runuser", "-u", self.name, "--"]
        shell = ["sh", "-c", f"exec 2>&1; cd {self.home}; {command}"]
        return self.machine.run(*login, *shell, timeout=timeout, check=check)

    def reads(self, directory: str) -> None:
        """With transformers."""
        script = f"HF_HOME={self.home}/.hf {sys.executable} -c '{READS}' {directory}"
        assert self.types(script).split()[-1] == PARAMETERS
        self.types(f"rm -rf {self.home}/.hf")


def files(machine: Machine) -> set[str]:
    """All paths of the machine but those that a running system writes anyway."""
    listed = machine.run("find", "/", "-xdev", timeout=60).splitlines()
    return {path for path in listed if PATHS_OF_MACHINES.match(path) is None}


def test_the_debian_package_comes_upgrades_and_goes(fresh: Machine, built: Path, weights: Path, tmp_path: Path) -> None:
    root = Person(fresh, "root")
    (package,) = built.glob("instantstart_*.deb")
    before = files(fresh)
    said = root.types(f"apt-get install -y --no-install-recommends {package}")
    assert fresh.property("ActiveState") == "active", said
    assert root.types("instantstart --version").split()[-1] == __version__
    assert "/models" in root.types("instantstart service status")
    assert root.types("man -w instantstart").strip().endswith("/instantstart.1.gz")
    assert "a package brought the service" in root.types("instantstart service install", check=False)
    assert root.types("ls /usr/share/bash-completion/completions/instantstart")
    assert json.loads(root.types("cat /usr/share/doc/instantstart/sbom.cdx.json"))["bomFormat"] == "CycloneDX"

    with hub(fresh, weights) as endpoint:
        root.types(f"printf '[origins.huggingface]\\nendpoint = \"{endpoint}\"\\n' > /etc/instantstart/config.toml")
        root.types("systemctl restart instantstart")
        root.types("instantstart add minilm Qwen/Qwen3-8B && instantstart warm minilm --wait --all")
    root.reads("/models/minilm")
    fresh.run("systemd-run", "--unit=reader", "sh", "-c", "exec 3< /models/minilm/model.safetensors; exec sleep 1000")
    device, pid = fresh.run("mountpoint", "-d", "/models"), fresh.main_pid()
    continued = fresh.journal().count(GOES_ON)

    unpacked, newer = tmp_path / "unpacked", tmp_path / "root/newer.deb"
    subprocess.run(["dpkg-deb", "-R", package, unpacked], check=True, timeout=120)
    control = unpacked / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", r"\g<0>+1", control.read_text(), flags=re.MULTILINE))
    subprocess.run(["dpkg-deb", "-Zgzip", "-b", unpacked, newer], check=True, timeout=120, stdout=subprocess.DEVNULL)
    root.types("DEBIAN_FRONTEND=noninteractive apt-get install -y /newer.deb; rm /newer.deb")
    assert fresh.main_pid() not in (0, pid)
    assert fresh.journal().count(GOES_ON) == continued + 1
    assert fresh.run("mountpoint", "-d", "/models") == device
    assert "endpoint" in root.types("cat /etc/instantstart/config.toml")
    root.reads("/models/minilm")
    assert fresh.property("ActiveState", "reader") == "active"
    fresh.run("systemctl", "stop", "reader")

    root.types("apt-get remove -y instantstart")
    assert mounts(fresh) == "" and fresh.run("pgrep", "-f", "instantstart_fs", check=False) == ""
    # What Debian leaves of every service until purge, so that it comes back as enabled as it was: the link.
    allowed = ("/var/lib/instantstart", "/etc/instantstart", f"/etc/systemd/system/multi-user.target.wants/{UNIT}")
    left = files(fresh) - before
    assert left and {path for path in left if not path.startswith(allowed)} == set()
    root.types(f"apt-get install -y {package}")
    root.reads("/models/minilm")  # from the store, with no hub
    root.types("apt-get purge -y instantstart")
    assert files(fresh) - before == set()


def test_a_stranger_with_a_wheel(fresh: Machine, built: Path, weights: Path) -> None:
    """As root: `mount`, then as a service; both taken away again."""
    root = Person(fresh, "root")
    before = files(fresh)
    bin_ = "/opt/instantstart/bin"
    install = f"pip install -q --no-index --find-links {built}/wheels instantstart-fs"
    root.types(f"python3 -m venv /opt/instantstart && {bin_}/{install}")
    with hub(fresh, weights) as endpoint:
        root.types(f"printf '[origins.huggingface]\\nendpoint = \"{endpoint}\"\\n' > /root/hub.toml")
        root.types(f"{bin_}/instantstart mount Qwen/Qwen3-8B /root/model --config /root/hub.toml")
        root.reads("/root/model")
        root.types(f"{bin_}/instantstart unmount /root/model && {bin_}/instantstart stop && rm /root/hub.toml")
    assert mounts(fresh) == ""
    assert "write" in root.types(f"{bin_}/instantstart service install --dry-run")
    assert fresh.property("LoadState") == "not-found"
    root.types(f"{bin_}/instantstart service install")
    assert fresh.property("ActiveState") == "active" and mounts(fresh) == "/models"
    root.types(f"{bin_}/instantstart service install")  # again: nothing is lost by it
    assert fresh.journal().count(GOES_ON) == 1
    assert "/opt/instantstart" in root.types("instantstart service status")
    (pipeline,) = json.loads(root.types("instantstart ls --json"))
    root.reads(f"/models/{pipeline['pipeline']}")
    said = root.types(f"{bin_}/instantstart service uninstall && rm -rf /opt/instantstart")
    assert "kept    /var/lib/instantstart (the cached bytes)" in said
    assert fresh.property("LoadState") == "not-found" and mounts(fresh) == ""
    left = files(fresh) - before
    assert {path for path in left if not path.startswith(("/var/lib/instantstart", "/etc/instantstart"))} == set()


def test_a_stranger_who_is_not_root(fresh: Machine, built: Path, weights: Path) -> None:
    """`mount` in his own directories, with fusermount3; root's service may not run from there."""
    fresh.run("useradd", "-m", "-s", "/bin/sh", "alice")
    alice = Person(fresh, "alice")
    before = files(fresh)
    alice.types(f"python3 -m venv env && env/bin/pip install -q --no-index --find-links {built}/wheels instantstart-fs")
    assert "sudo" in alice.types("env/bin/instantstart service install", check=False)
    refused = Person(fresh, "root").types(f"{alice.home}/env/bin/instantstart service install", check=False)
    assert "root would run what others may change" in refused
    with hub(fresh, weights) as endpoint:
        alice.types(f"printf '[origins.huggingface]\\nendpoint = \"{endpoint}\"\\n' > hub.toml")
        alice.types("env/bin/instantstart mount Qwen/Qwen3-8B model --config hub.toml")
        alice.reads("model")
        alice.types("env/bin/instantstart unmount model && env/bin/instantstart stop && rm -rf env hub.toml")
    assert mounts(fresh) == "" and not fresh.run("pgrep", "-u", "alice", check=False)
    left = {path for path in files(fresh) - before if not re.match(r"/home/alice/\.(cache|local)(/|$)", path)}
    assert left <= {"/home/alice/models"}
    assert UNIT not in fresh.run("ls", "/etc/systemd/system")
