"""`mount`, `unmount`, `stop`: one command from a source to files, a daemon of its own, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.cli import own_daemon
from instantstart_fs.control.client import Client
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.readable import readable_id
from tests.harness import REPOSITORY, alive, command, mounted, must, succeeded, to_toml, unmount, wait_for
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

CONTENT = b"weights" * 1000


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where a daemon would be; it is stopped in the end."""
    source = tmp_path / "tiny"
    source.mkdir()
    (source / "model.safetensors").write_bytes(CONTENT)
    places = {"store": {"path": str(tmp_path / "store")}, "http": {"listen": "off"}}
    (tmp_path / "config.toml").write_text(to_toml({**places, "mount": {"path": str(tmp_path / "models")}}))
    env = {"INSTANTSTART_SOCKET": str(tmp_path / "run" / "control.sock")}
    yield env
    command("stop", env=env)
    unmount(tmp_path / "models")


def test_from_a_source_to_files_and_back(tmp_path: Path, env: dict[str, str]) -> None:
    here, again = tmp_path / "here", tmp_path / "again"
    config = ("--config", tmp_path / "config.toml")
    told = json.loads(succeeded(command("mount", tmp_path / "tiny", here, *config, "--json", env=env)))
    assert (told["pipeline"], told["started"]) == ("tiny", True)
    assert (here / "model.safetensors").read_bytes() == CONTENT
    again.mkdir()
    told = json.loads(succeeded(command("mount", tmp_path / "tiny", again, *config, "--json", env=env)))
    assert (told["pipeline"], told["started"]) == ("tiny", False)
    succeeded(command("warm", "tiny", "--wait", env=env))
    succeeded(command("mount", tmp_path / "tiny", again, "--offline", env=env))
    refused = command("mount", "org/never-seen", tmp_path / "no", "--offline", env=env)
    assert refused.returncode == 1 and "never added" in refused.stderr and not (tmp_path / "no").exists()
    full = command("mount", tmp_path / "tiny", tmp_path / "tiny", env=env)
    assert full.returncode == 2 and "not empty" in full.stderr
    told = json.loads(succeeded(command("unmount", again, "--json", env=env)))
    assert told == {"pipeline": "tiny", "path": str(again), "removed": False, "open_by": []}
    assert not os.path.lexists(again) and here.exists()
    assert command("unmount", tmp_path / "tiny", env=env).returncode == 2
    (tmp_path / "other").symlink_to("/models/tiny")  # the machine's of that name
    refused = command("unmount", tmp_path / "other", "--forget", env=env)
    assert refused.returncode == 2 and "not the one that shows this" in refused.stderr
    with Client(env["INSTANTSTART_SOCKET"]) as client, client.lease("tiny"):
        assert command("unmount", here, "--forget", env=env).returncode == 1
        assert here.exists() and client.status("tiny").cached_bytes, "nothing is done by halves"
    assert "it runs already" in succeeded(command("start", env=env))
    told = json.loads(succeeded(command("start", "--json", env=env)))
    assert (told["started"], told["mount"]) == (False, str(tmp_path / "models"))
    told = json.loads(succeeded(command("unmount", here, "--forget", "--json", env=env)))
    assert (told["pipeline"], told["removed"], told["open_by"]) == ("tiny", True, [])
    assert "ready: " in succeeded(command("logs", env=env))
    with Client(env["INSTANTSTART_SOCKET"]) as client:
        pid = client.peer_pid()
    stopped = command("--socket", env["INSTANTSTART_SOCKET"], "stop", "--json")
    assert json.loads(succeeded(stopped)) == {"stopped": True}
    assert not alive(pid) and not mounted(tmp_path / "models")


@pytest.mark.parametrize("shared", [False, True])
def test_in_the_foreground_it_undoes_all_at_its_end(tmp_path: Path, env: dict[str, str], shared: bool) -> None:
    """But for the daemon, where another `mount` uses it since."""
    words = ["mount", str(tmp_path / "tiny"), str(tmp_path / "here"), "--config", str(tmp_path / "config.toml")]
    process = subprocess.Popen(
        [sys.executable, "-m", "instantstart_fs.cli", *words, "--foreground"],
        env={**os.environ, **env},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and "tiny, cold" in process.stdout.readline()
        with Client(env["INSTANTSTART_SOCKET"]) as client:
            pid = client.peer_pid()
            wait_for(lambda: client.status("tiny").leases, "the lease")
        if shared:
            succeeded(command("mount", tmp_path / "tiny", tmp_path / "there", env=env))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    assert not os.path.lexists(tmp_path / "here")
    assert (alive(pid), mounted(tmp_path / "models")) == (shared, shared)
    assert not shared or (tmp_path / "there" / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.skipif(os.geteuid() == 0, reason="test_ordinary_user.py runs it: root's default places are the machine's")
def test_an_ordinary_user_needs_no_configuration(tmp_path: Path, hub: HubServer) -> None:
    """From a hub, with default places; after a crash; with ~/models in use."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(CONTENT)
    hub.publish("org/tiny", tmp_path / "m")
    env = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "XDG_RUNTIME_DIR": "", "XDG_CACHE_HOME": ""}
    cache, here = tmp_path / ".cache" / "instantstart", tmp_path / "here"
    try:
        done = command("mount", "org/tiny", here, env=env)
        assert "tiny, cold" in succeeded(done) and "as an ordinary user" in done.stderr
        assert (here / "model.safetensors").read_bytes() == CONTENT
        assert (cache / "store" / "slots" / "tiny").is_dir() and os.readlink(here) == str(tmp_path / "models" / "tiny")
        succeeded(command("warm", "tiny", "--wait", env=env))
        with Client(str(cache / "control.sock")) as client:
            os.kill(client.peer_pid(), signal.SIGKILL)
            assert client.wait_ended(10)
        hub.fault("status", status=503)
        succeeded(command("mount", "org/tiny", here, "--offline", env=env))
        assert (here / "model.safetensors").read_bytes() == CONTENT
        succeeded(command("stop", env=env))
        assert not mounted(tmp_path / "models")
        (tmp_path / "models" / "mine").touch()
        done = command("mount", "org/tiny", here, env=env)
        assert "the default place is in use" in done.stderr and os.readlink(here) == str(cache / "models" / "tiny")
        assert (here / "model.safetensors").read_bytes() == CONTENT
        succeeded(command("stop", env=env))
        succeeded(command("unmount", here, env=env))  # a link that points nowhere now
        assert not os.path.lexists(here)
    finally:
        command("stop", env=env)
        unmount(tmp_path / "models")
        unmount(cache / "models")


def test_from_a_bucket_that_everybody_may_read(tmp_path: Path, env: dict[str, str], seaweed: SeaweedServer) -> None:
    """There are no credentials; SeaweedFS' own policy lets everybody list and read."""
    client = seaweed.client()
    for bucket in ("public", "private"):
        seaweed.new_bucket(bucket)
        client.put_object(Bucket=bucket, Key="a/tiny/model.safetensors", Body=CONTENT)
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    policy = {
        "Version": "2012-10-17",
        "Statement": [{**allowed, "Resource": ["arn:aws:s3:::public", "arn:aws:s3:::public/*"]}],
    }
    client.put_bucket_policy(Bucket="public", Policy=json.dumps(policy))
    env["AWS_ENDPOINT_URL"] = seaweed.endpoint_url
    succeeded(command("mount", "s3://public/a/tiny", tmp_path / "m", "--config", tmp_path / "config.toml", env=env))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == CONTENT
    if os.geteuid() == 0:  # as a container runtime binds a directory: it follows the link
        (tmp_path / "inside").mkdir()
        must("mount", "--bind", tmp_path / "m", tmp_path / "inside")
        try:
            assert (tmp_path / "inside" / "model.safetensors").read_bytes() == CONTENT
        finally:
            unmount(tmp_path / "inside")
    succeeded(command("add", "asked", "s3://public/a/tiny", "--anonymous", env=env))
    refused = command("add", "no", "s3://private/a/tiny", env=env)
    assert refused.returncode == 1 and "there are no usable credentials" in refused.stderr
    refused = command("add", "no", "s3://private/a/tiny", "--anonymous", env=env)
    assert refused.returncode == 1 and "not open to everybody" in refused.stderr


def test_what_is_in_the_way_is_told(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "elsewhere").symlink_to("/nowhere")
    for place, words in (
        ("file", "is a file"),
        ("elsewhere", "a link to somewhere else"),
        ("tiny", "is not empty"),
        ("no/such", "there is no directory"),
    ):
        done = command("mount", "org/tiny", tmp_path / place, env=env)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    for place, words in (("file", "is no link"), ("elsewhere", "`rm` removes the link"), ("absent", "is not there")):
        done = command("unmount", tmp_path / place, env=env)
        assert done.returncode == 2 and words in done.stderr
    assert "no daemon to stop" in succeeded(command("stop", env=env))
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_a_service_is_known_by_its_cgroup() -> None:
    assert own_daemon.is_service("0::/system.slice/instantstart.service\n")
    assert not own_daemon.is_service("0::/system.slice/ssh.service\n12:devices:/user.slice\n")


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "config.toml").write_text("nonsense = 1")
    done = command("mount", tmp_path / "tiny", tmp_path / "x", "--config", tmp_path / "config.toml", env=env)
    assert done.returncode == 1 and "nonsense" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "taken", "name"),
    [
        (ModelSpec("hf://Qwen/Qwen3-8B"), (), "Qwen3-8B"),
        (ModelSpec("hf://Qwen/Qwen3-8B@refs/pr/1"), (), "Qwen3-8B-refs-pr-1"),
        (ModelSpec("hf://o/r", "", ("d/q4.gguf",)), (), "r-q4"),
        (ModelSpec("s3://bucket"), (), "bucket"),
        (ModelSpec("s3://bucket/a/b c"), (), "b-c"),
        (ModelSpec("file:///"), (), "model"),
        (ModelSpec("s3://bucket"), ("bucket",), "bucket-eb0375"),
    ],
)
def test_ids_are_readable(model: ModelSpec, taken: tuple[str, ...], name: str) -> None:
    assert readable_id(model, taken) == name
