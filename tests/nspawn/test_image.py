"""The OCI image of scripts/image under podman: the daemon in one container, readers in another and on the host.

scripts/nspawn-test image; INSTANTSTART_PACKAGES=DIR as for test_packages.py. podman has its storage in the test's
directory, and runs in a mount namespace of its own, so that nothing of this machine is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from instantstart_fs import __version__
from tests.harness import REPOSITORY, tree_files
from tests.nspawn.test_packages import PARAMETERS, READS, REASON, built, weights
from tests.nspawn.test_service import sha256
from tests.servers.hub import HubServer

__all__ = ["built", "weights"]

MISSING = [name for name in ("podman", "buildah", "crun") if shutil.which(name) is None]
SKIP = REASON or (f"not installed: {', '.join(MISSING)}" if MISSING else None)
pytestmark = [pytest.mark.skipif(SKIP is not None, reason=str(SKIP)), pytest.mark.timeout(1200)]
LIMITS = "--ulimit nofile=4096:4096 --ulimit nproc=4000:4000"
"""podman's own are higher, and to raise a limit is not allowed everywhere."""
NAMESPACE = r"""
set -eu
# crun does not run where both versions of cgroups have controllers.
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
for directory in "$place" "$work/kubelet"; do
    mount --bind "$directory" "$directory"
    mount --make-shared "$directory"
done
podman() {
    command podman --storage-driver vfs --root "$work/storage" --runroot "$short" --cgroup-manager cgroupfs "$@"
}
podman load -q -i "$image"
finish() {
    podman rm -a -f -t 30 >/dev/null 2>&1 || true
    podman pod rm -a -f >/dev/null 2>&1 || true
    umount -l "$target" 2>/dev/null || true
}
trap finish EXIT
podman run -d --name instantstart --network host $limits --device /dev/fuse --cap-add SYS_ADMIN \
    -v "$place:$place:rshared" -v "$work/store:/var/lib/instantstart" \
    -v "$work/run:/run/instantstart" -v "$work/state:$work/state" \
    -v "$work/config.toml:/etc/instantstart/config.toml:ro" \
    "localhost/instantstart:$version" serve --mount "$place/models"
timeout 60 sh -c 'until mountpoint -q "$place/models"; do sleep 0.1; done' || { podman logs instantstart; exit 1; }
podman exec instantstart instantstart --version
podman exec instantstart instantstart add minilm Qwen/Qwen3-8B
"$python" -c "$reads" "$place/models/minilm"
podman exec instantstart instantstart warm minilm --wait --all
echo "state: $(podman exec instantstart instantstart ls --json)"
podman run --rm --network none $limits -v "$place:$place:rslave" --entrypoint /usr/bin/find \
    "localhost/instantstart:$version" "$place/models/minilm" -type f -exec sha256sum {} +
podman run --rm --network none $limits --entrypoint /bin/ls "localhost/instantstart:$version" \
    /usr/share/man/man1/instantstart.1.gz /usr/share/bash-completion/completions/instantstart
# The node driver, as the chart runs it; a container that has its volume.
podman run -d --name driver --network none $limits --cap-add SYS_ADMIN \
    -v "$work/csi:/csi" -v "$work/run:/run/instantstart" \
    -v "$work/state:$work/state" -v "$work/kubelet:$work/kubelet:rshared" -v "$place:$place:rslave" \
    "localhost/instantstart:$version" csi --endpoint unix:///csi/csi.sock --node-id n \
    --socket /run/instantstart/control.sock --state "$work/state" --kubelet-dir "$work/kubelet"
"$python" -c "$publishes" "$work/csi/csi.sock" "$target" || { podman logs driver; exit 1; }
podman run --rm --network none $limits -v "$target:$target:ro,rslave" --entrypoint /usr/bin/find \
    "localhost/instantstart:$version" "$target" -type f -exec sha256sum {} +
podman stop -t 30 instantstart
echo "exit: $(podman inspect --format '{{.State.ExitCode}}' instantstart)"
! mountpoint -q "$place/models"
"""
PUBLISHES = """
import sys, grpc
from instantstart_fs.csi import messages
asked, answered = messages.METHODS["Node"]["NodePublishVolume"]
pod = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.namespace": "a"}
pod |= {"source": "Qwen/Qwen3-8B", "warm": "wait"}
with grpc.insecure_channel(f"unix:{sys.argv[1]}") as channel:
    channel.unary_unary(
        "/csi.v1.Node/NodePublishVolume",
        request_serializer=messages.message(asked).SerializeToString,
        response_deserializer=messages.message(answered).FromString,
    )(
        messages.message(asked)(
            volume_id="v", target_path=sys.argv[2], readonly=True, volume_context=pod,
            volume_capability={"mount": {}, "access_mode": {"mode": 1}},
        ),
        timeout=100, wait_for_ready=True,
    )
"""


def test_the_image_serves_other_containers_and_the_host(built: Path, weights: Path, tmp_path: Path) -> None:
    image = built / "image.oci.tar"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(REPOSITORY)}
    if not image.exists():
        (package,) = built.glob("instantstart_*.deb")
        options = f"--storage-driver vfs --root {tmp_path}/buildah --runroot {tmp_path}/buildah-run"
        subprocess.run(
            [REPOSITORY / "scripts/image", "--deb", package, "--output", image],
            check=True, timeout=600, env={**environment, "BUILDAH_OPTIONS": options},
        )  # fmt: skip
    for name in ("shared", "store", "run", "state", "csi", "kubelet/pods/p/v"):
        (tmp_path / name).mkdir(parents=True)
    target = tmp_path / "kubelet/pods/p/v/mount"
    with HubServer() as hub, tempfile.TemporaryDirectory(prefix="pod") as short:  # 50 characters are the most for it
        hub.publish("Qwen/Qwen3-8B", weights)
        (tmp_path / "config.toml").write_text(
            f'[origins.huggingface]\nendpoint = "{hub.endpoint}"\n[http]\nlisten = "off"\n'
        )
        values = {"place": tmp_path / "shared", "work": tmp_path, "image": image, "version": __version__}
        values |= {"limits": LIMITS, "python": sys.executable, "reads": READS, "short": short}
        values |= {"publishes": PUBLISHES, "target": target}
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", NAMESPACE],
            env={**environment, **{key: str(value) for key, value in values.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    lines = done.stdout.splitlines()
    assert f"instantstart {__version__}" in lines and PARAMETERS in lines and "exit: 0" in lines
    assert '"state": "warm"' in done.stdout or '"state":"warm"' in done.stdout
    seen = {line[66:]: line[:64] for line in lines if line[64:66] == "  "}
    wanted = {
        f"{where}/{name}": sha256(weights / name)
        for where in (tmp_path / "shared/models/minilm", target)
        for name in tree_files(weights)
    }
    assert seen == wanted


def test_nothing_of_pytorch_is_packaged(built: Path) -> None:
    """It is an extra: the package would be a hundred times as large."""
    (package,) = built.glob("instantstart_*.deb")
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "/site-packages/instantstart_fs/" in listed
    assert "/site-packages/torch" not in listed and "__pycache__" not in listed
