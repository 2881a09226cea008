"""What Kubernetes is told: volumes, node labels (by a real HTTP server), the chart and examples by their schemas."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from instantstart_fs.core.nodelabels import changes, label, wanted_labels
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.core.volumes import VolumeRequest, volume_request
from instantstart_fs.csi import leases
from instantstart_fs.csi.node_labels import NodeApi
from instantstart_fs.errors import AccessRefused, OriginUnavailable, PipelineBusy, UsageError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def asked(namespace: str = "a", *, group: str = "", token: bool = False, **attributes: str) -> VolumeRequest:
    pod = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.namespace": namespace}
    return volume_request({**pod, **attributes}, group=group, token_file="/t" if token else None)


def test_pods_share_a_pipeline_within_their_namespace_and_nowhere_else() -> None:
    one = asked(source="Qwen/Qwen3-8B")
    assert one == asked(source="hf://Qwen/Qwen3-8B") and one.spec.id.startswith("a.Qwen3-8B.")
    others = [
        asked("b", source="Qwen/Qwen3-8B"),
        asked(source="Qwen/Qwen3-8B", revision="v1"),
        asked(source="Qwen/Qwen3-8B", include="*.json"),
        asked(source="Qwen/Qwen3-8B", token=True),
        asked(source="Qwen/Qwen3-8B", group="7"),
    ]
    assert len({one.spec.id, *(other.spec.id for other in others)}) == 6
    assert asked("b" * 63, source="o/" + "m" * 90).spec.id


def test_a_volumes_owner_credentials_and_models() -> None:
    found = asked(group="1000", warm="wait", **{"model.asr": "o/a@v1", "model.llm": "o/b"}, include="*.json, *.txt")
    assert (found.spec.gid, found.spec.mode, found.spec.anonymous, found.warm) == (1000, 0o550, True, "wait")
    assert [(model.name, model.source) for model in found.spec.models] == [
        ("asr", "hf://o/a@v1"),
        ("llm", "hf://o/b@main"),
    ]
    assert found.spec.models[0].include == ("*.json", "*.txt")
    held = asked(source="o/a", token=True).spec
    assert held.token_file == f"/t/{held.id}" and not held.anonymous
    with pytest.raises(UsageError, match="s3://"):
        asked(source="s3://bucket/x", token=True)
    with pytest.raises(UsageError, match="podInfoOnMount"):
        volume_request({"csi.storage.k8s.io/ephemeral": "true", "source": "o/a"})
    with pytest.raises(UsageError, match="ephemeral"):
        volume_request({"source": "o/a"})


def status(name: str, *, state: str = "warm", leases: int = 0, at: str | None = None) -> PipelineStatus:
    here = 10 if state == "warm" else 5
    return PipelineStatus(name, state, here, 10, (), 1, "", at, None, False, leases, None, None)  # type: ignore[arg-type]


def test_labels_are_legal_and_bounded() -> None:
    long = label("x" * 128)
    assert label("my-llm") == "instantstart.io/warm.my-llm"
    assert label("x" * 127 + "y") != long
    for key in (long, label("ends-in-dash-"), label("p" * 57 + "."), label("p" * 58)):
        assert re.fullmatch(r"instantstart\.io/[A-Za-z0-9][A-Za-z0-9._-]{0,61}[A-Za-z0-9]", key), key
    many = [
        status("a", at="2026-01-01"),
        status("b", at="2026-01-02"),
        status("c", leases=1),
        status("d", state="filling"),
    ]
    assert set(wanted_labels(many, 2)) == {label("c"), label("b")}
    assert changes({label("a"): "true", "other/x": "1"}, {label("b"): "true"}) == {label("a"): None, label("b"): "true"}
    assert changes({label("b"): "true"}, {label("b"): "true"}) == {}


class Api(BaseHTTPRequestHandler):
    """Of the Kubernetes API: one node, and what a merge patch does to its labels."""

    seen: list[tuple[str, str, str | None, str | None]]
    labels: dict[str, str]
    refuse = 0
    garbage = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, self.headers["Authorization"], self.headers["Content-Type"]))
        for key, value in (json.loads(body)["metadata"]["labels"] if body else {}).items():
            self.labels.pop(key, None)
            if value is not None:
                self.labels[key] = value
        if self.garbage:
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        content = json.dumps({"metadata": {"labels": self.labels}}).encode()
        self.send_response(self.refuse or 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PATCH = answer


@pytest.fixture
def api(tmp_path: Path) -> Iterator[tuple[type[Api], NodeApi]]:
    handler = type("Handler", (Api,), {"seen": [], "labels": {"kubernetes.io/os": "linux", label("old"): "true"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    (tmp_path / "token").write_text("first\n")
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        yield handler, NodeApi("node/1", server=address, account=str(tmp_path))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_nodes_labels_are_patched(api: tuple[Any, NodeApi], tmp_path: Path) -> None:
    handler, node = api
    node.patch(changes(node.labels(), {label("new"): "true"}))
    assert handler.labels == {"kubernetes.io/os": "linux", label("new"): "true"}
    (tmp_path / "token").write_text("rotated")
    node.labels()
    path = "/api/v1/nodes/node%2F1"
    assert handler.seen == [
        ("GET", path, "Bearer first", None),
        ("PATCH", path, "Bearer first", "application/merge-patch+json"),
        ("GET", path, "Bearer rotated", None),
    ]
    handler.refuse = 403
    with pytest.raises(AccessRefused, match="RBAC"):
        node.labels()
    handler.refuse = 500
    with pytest.raises(OriginUnavailable, match="500"):
        node.patch({})
    handler.garbage = True
    with pytest.raises(OriginUnavailable, match="does not answer"):  # an HTTPException, which is no OSError
        node.labels()


def rendered() -> Iterator[tuple[str, dict[str, Any]]]:
    """The chart's objects: its templates hold nothing but {{ .Values.x }} and {{ .Release.Namespace }}."""
    chart = DEPLOY / "helm/instantstart"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    for path in sorted(chart.glob("templates/*.yaml")):
        text = path.read_text().replace("{{ .Release.Namespace }}", "instantstart")
        text = re.sub(r"\{\{ \.Values\.(\w+) \}\}", lambda found: str(values[found[1]]), text)
        assert "{{" not in text, f"{path}: this test renders no other expression"
        yield from ((path.name, thing) for thing in yaml.safe_load_all(text))
    for path in sorted(DEPLOY.glob("examples/*.yaml")):
        yield from ((path.name, thing) for thing in yaml.safe_load_all(path.read_text()))


def test_every_object_of_the_chart_fits_its_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    kinds = set()
    for _, thing in rendered():
        kinds.add(thing["kind"])
        validate.validate(thing, "1.33", strict=True)
    assert kinds >= {"CSIDriver", "DaemonSet", "ClusterRole", "ClusterRoleBinding", "ServiceAccount", "Pod"}


def test_the_driver_is_told_the_namespace_by_the_kubelet() -> None:
    [driver] = [thing["spec"] for _, thing in rendered() if thing["kind"] == "CSIDriver"]
    assert driver["podInfoOnMount"] is True and driver["volumeLifecycleModes"] == ["Ephemeral"]


def test_what_labels_nodes_may_do_little_and_runs_nowhere_by_default() -> None:
    """It has a token that may patch nodes, and the daemon's socket."""
    [pod] = [
        thing["spec"]["template"]["spec"]
        for name, thing in rendered()
        if name == "labels.yaml" and thing["kind"] == "DaemonSet"
    ]
    assert pod["nodeSelector"].keys() == {"instantstart.io/daemon", "instantstart.io/node-labels"}
    [container] = pod["containers"]
    bounds = container["securityContext"]
    assert bounds["capabilities"] == {"drop": ["ALL"]} and "privileged" not in bounds
    assert bounds["allowPrivilegeEscalation"] is False and bounds["readOnlyRootFilesystem"] is True
    assert "ValidatingAdmissionPolicy" in {thing["kind"] for _, thing in rendered()}


def test_a_stop_of_the_service_keeps_the_directory_that_pods_have() -> None:
    unit = (resources.files("instantstart_fs") / "installation/systemd/instantstart.service").read_text()
    assert "\nRuntimeDirectoryPreserve=yes\n" in unit


def test_one_pipeline_without_a_lease_keeps_no_other_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refused(socket: str, pipeline: str, seconds: float) -> None:
        asked.append(pipeline)
        raise PipelineBusy("busy") if pipeline == "a" else OSError("no more threads")

    monkeypatch.setattr(leases, "_leased", refused)
    kept = leases.LeaseKeeper("/nowhere", lambda pipeline: None)
    for name in ("a", "b", "c"):
        kept.want(name)
    assert kept._look() and asked == ["a", "b", "c"]
