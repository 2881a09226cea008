"""The node driver by its own gRPC calls, in the order of a kubelet: a real driver process, a real daemon, a real mount
and the test hub. No cluster."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.control.client import Client
from tests.harness import REPOSITORY, Daemon, mounted, must, unmount, wait_for
from tests.servers.hub import HubServer

grpc = pytest.importorskip("grpc")
messages = pytest.importorskip("instantstart_fs.csi.messages")

TOKEN = "hf_kubernetes_test_token"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bind mounts need root")


class Kubelet:
    """Starts the driver, and asks it as a kubelet does."""

    def __init__(self, directory: Path, daemon: Daemon) -> None:
        self.directory, self.pods, self.state = directory, directory / "kubelet/pods", directory / "state"
        self.pods.mkdir(parents=True)
        self.socket = directory / "csi.sock"
        self.log = directory / "driver.log"
        self._daemon = daemon
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "instantstart_fs.cli", "csi", "--endpoint", f"unix://{self.socket}"]
        command += ["--node-id", "node-1", "--state", str(self.state), "--kubelet-dir", str(self.directory / "kubelet")]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [*command, "--socket", str(self._daemon.socket)], stdout=out, stderr=out, cwd=REPOSITORY
            )
        wait_for(self.socket.exists, "the driver's socket")
        self.call("Identity", "GetPluginInfo")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(20) == 0, self.log.read_text()[-3000:]
        for target in self.pods.glob("*/volumes/kubernetes.io~csi/*/mount"):
            unmount(target)

    def call(self, service: str, method: str, timeout: float = 60.0, **fields: Any) -> Any:
        asked, answered = messages.METHODS[service][method]
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            return channel.unary_unary(
                f"/csi.v1.{service}/{method}",
                request_serializer=messages.message(asked).SerializeToString,
                response_deserializer=messages.message(answered).FromString,
            )(messages.message(asked)(**fields), timeout=timeout, wait_for_ready=True)

    def target(self, volume: str) -> Path:
        parent = self.pods / f"pod-{volume}/volumes/kubernetes.io~csi/weights"
        parent.mkdir(parents=True, exist_ok=True)
        return parent / "mount"

    def publish(self, volume: str, *, namespace: str = "team-a", token: str = "", target: str = "", group: str = "",
                timeout: float = 60.0, **attributes: str) -> Path:  # fmt: skip
        where = target or str(self.target(volume))
        capability = {"mount": {"volume_mount_group": group}, "access_mode": {"mode": 1}}
        context = {
            "csi.storage.k8s.io/ephemeral": "true",
            "csi.storage.k8s.io/pod.namespace": namespace,
            "csi.storage.k8s.io/pod.name": f"pod-{volume}",
            **attributes,
        }
        self.call(
            "Node", "NodePublishVolume", timeout, volume_id=volume, target_path=where, readonly=True,
            volume_capability=capability, volume_context=context, secrets={"token": token} if token else {},
        )  # fmt: skip
        return Path(where)

    def unpublish(self, volume: str) -> None:
        self.call("Node", "NodeUnpublishVolume", volume_id=volume, target_path=str(self.target(volume)))

    def condition(self, volume: str) -> Any:
        path = str(self.target(volume))
        return self.call("Node", "NodeGetVolumeStats", volume_id=volume, volume_path=path)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub_server: HubServer) -> Iterator[Daemon]:
    config = {"origins": {"huggingface": {"endpoint": hub_server.endpoint}}}
    directory = tmp_path_factory.mktemp("csi")
    files = {"config.json": b"{}", "model.safetensors": os.urandom(300_000)}
    source = directory / "repo"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    hub_server.publish("team/csi-open", source)
    hub_server.publish("team/csi-closed", source, private=True, tokens=[TOKEN])
    with Daemon(directory / "d", config=config, env={"HF_TOKEN": TOKEN}, allow=[".*"]) as running:
        yield running


@pytest.fixture(scope="module")
def kubelet(tmp_path_factory: pytest.TempPathFactory, daemon: Daemon) -> Iterator[Kubelet]:
    made = Kubelet(tmp_path_factory.mktemp("k"), daemon)
    made.start()
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def refused(code: str) -> Iterator[list[str]]:
    said: list[str] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield said
    assert caught.value.code().name == code, caught.value.details()
    said.append(caught.value.details())


@contextlib.contextmanager
def _blackhole(hub: HubServer) -> Iterator[None]:
    hub.fault("blackhole", path="csi-open")
    try:
        yield
    finally:
        hub.clear()


def leases(daemon: Daemon) -> dict[str, int]:
    with Client(str(daemon.socket)) as client:
        return {status.pipeline: status.leases for status in client.pipelines()}


def bytes_at(path: Path) -> int:
    return int(must("stat", "-c", "%s", path / "model.safetensors", timeout=30))


def test_a_kubelet_learns_who_the_driver_is(kubelet: Kubelet) -> None:
    assert kubelet.call("Identity", "GetPluginInfo").name == "csi.instantstart.io"
    assert kubelet.call("Identity", "Probe").ready.value
    assert not kubelet.call("Identity", "GetPluginCapabilities").capabilities
    assert kubelet.call("Node", "NodeGetInfo").node_id == "node-1"
    found = kubelet.call("Node", "NodeGetCapabilities").capabilities
    assert {capability.rpc.type for capability in found} == {2, 4, 6}
    assert stat.S_IMODE(kubelet.socket.stat().st_mode) == 0o600


def test_a_volumes_life_with_restarts_of_driver_and_daemon(kubelet: Kubelet, daemon: Daemon) -> None:
    attributes = {"source": "team/csi-open", "warm": "wait"}
    for _ in range(2):
        target = kubelet.publish("v1", **attributes)
        assert bytes_at(target) == 300_000
        assert Path("/proc/self/mountinfo").read_text().count(f" {target} ") == 1
    assert must("sh", "-c", f"touch {target}/x 2>&1 || true").find("Read-only") > 0
    [pipeline] = leases(daemon)
    assert pipeline.startswith("team-a.csi-open.") and leases(daemon) == {pipeline: 1}
    found = kubelet.condition("v1")
    assert not found.volume_condition.abnormal, found.volume_condition.message
    assert found.usage[0].used == found.usage[0].total > 300_000 - 1

    kubelet.kill()
    wait_for(lambda: leases(daemon) == {pipeline: 0}, "the end of the dead driver's lease")
    kubelet.start()
    wait_for(lambda: leases(daemon) == {pipeline: 1}, "the lease of the new driver")
    kubelet.publish("v1", **attributes)
    assert kubelet.publish("v2", **attributes) != target
    assert leases(daemon) == {pipeline: 1}, "one for each pipeline"

    daemon.restart()
    wait_for(lambda: leases(daemon) == {pipeline: 1}, "the lease at the new daemon")
    assert bytes_at(target) == 300_000, "what the daemon mounts anew is shown again"
    assert not kubelet.condition("v1").volume_condition.abnormal

    kubelet.unpublish("v1")
    assert not target.exists() and leases(daemon) == {pipeline: 1}
    for _ in range(2):
        kubelet.unpublish("v2")
    wait_for(lambda: leases(daemon) == {pipeline: 0}, "the lease's end")
    with refused("NOT_FOUND"):
        kubelet.condition("v2")
    kubelet.unpublish("never-heard-of")


def test_secrets_and_caches_stay_in_their_namespace(kubelet: Kubelet, daemon: Daemon) -> None:
    closed = {"source": "team/csi-closed", "warm": "wait"}
    with refused("PERMISSION_DENIED"):  # the daemon's own HF_TOKEN would open it
        kubelet.publish("s0", **closed)
    kubelet.publish("s1", token=TOKEN, **closed)
    assert len(list((kubelet.state / "tokens").iterdir())) == 1
    with refused("PERMISSION_DENIED"):
        kubelet.publish("s2", token="hf_wrong", **closed)
    with refused("PERMISSION_DENIED"):
        kubelet.publish("s3", namespace="team-b", **closed)
    with refused("PERMISSION_DENIED"):
        kubelet.publish("s4", namespace="team-b", token="hf_wrong", **closed)
    kubelet.publish("s1", token=TOKEN, **closed)  # the wrong ones have put nothing in its place
    kubelet.unpublish("s1")
    assert not list((kubelet.state / "tokens").iterdir())
    with refused("PERMISSION_DENIED"):
        kubelet.publish("s5", token="hf_wrong", **closed)
    for path in (kubelet.log, daemon.log, *(kubelet.state.rglob("*.json"))):
        assert TOKEN not in path.read_text()


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"source": "file:///etc"}, "directory of the node"),
        ({"source": "/etc"}, "directory of the node"),
        ({"source": "team/csi-open", "token_file": "/etc/shadow"}, "unknown volume attribute"),
        ({"source": "team/csi-open", "revision": "../x"}, "revision"),
        ({"model.../x": "team/csi-open"}, "model name"),
        ({"source": "x" * 5000}, "longer than"),
        ({"source": "team/csi-open", "uid": "-1"}, "uid"),
        ({}, "either"),
        ({"source": "team/csi-open", "namespace": "Other/../x"}, "namespace"),
        ({"source": "team/csi-open", "target": "/etc/x"}, "below"),
        ({"source": "team/csi-open", "target": "{pods}/../../x"}, "'..'"),
    ],
)
def test_hostile_attributes_are_refused(kubelet: Kubelet, attributes: dict[str, str], word: str) -> None:
    attributes = {name: value.format(pods=kubelet.pods) for name, value in attributes.items()}
    with refused("INVALID_ARGUMENT") as said:
        kubelet.publish("h", **attributes)
    assert word in said[0]
    assert not list((kubelet.state / "volumes").glob("*")), "nothing is left of it"


def test_a_link_in_the_way_is_not_followed(kubelet: Kubelet, tmp_path: Path) -> None:
    target = kubelet.target("link")
    target.symlink_to(tmp_path)
    with refused("INTERNAL"):
        kubelet.publish("link", source="team/csi-open", warm="no")
    assert not mounted(tmp_path) and not list((kubelet.state / "volumes").glob("*"))
    target.unlink()
    target.parent.rmdir()
    target.parent.symlink_to(tmp_path)
    with refused("INTERNAL"):
        kubelet.publish("link", source="team/csi-open", warm="no")
    assert not list(tmp_path.iterdir())


def test_a_wait_ends_at_the_callers_deadline(kubelet: Kubelet, daemon: Daemon, hub_server: HubServer) -> None:
    with _blackhole(hub_server), refused("DEADLINE_EXCEEDED"):
        kubelet.publish("slow", namespace="team-slow", source="team/csi-open", warm="wait", timeout=3.0)
    kubelet.unpublish("slow")


@pytest.mark.soak
def test_a_hundred_volumes(kubelet: Kubelet, daemon: Daemon) -> None:
    volumes = [f"many-{number}" for number in range(100)]
    for number, volume in enumerate(volumes):
        kubelet.publish(volume, namespace=f"ns-{number % 20}", source="team/csi-open", group=str(number % 5), warm="no")
    assert sum(leases(daemon).values()) == 20
    kubelet.kill()
    kubelet.start()
    wait_for(lambda: sum(leases(daemon).values()) == 20, "all leases again", 60)
    for volume in volumes:
        kubelet.unpublish(volume)
    assert not list((kubelet.state / "volumes").glob("*")) and "csi~" not in Path("/proc/self/mountinfo").read_text()
