"""Bad input and lying servers: one clear line, the right exit status, and nothing lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, loop_ext4, model_directory, must, run, wait_for
from tests.servers.blackhole import BlackHole
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
pytestmark = pytest.mark.timeout(180)


def config(hub: HubServer, **fill: object) -> dict[str, object]:
    return {"fill": {"chunk_size": "1MiB", **fill}, "origins": {"huggingface": {"endpoint": hub.endpoint}}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub_server: HubServer) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("bad"), config=config(hub_server)) as running:
        yield running


def digest(path: Path) -> str:
    """By a process of its own, so that a hang fails the test and not the run."""
    return must("sha256sum", path, timeout=60).split()[0]


def same_everywhere(daemon: Daemon, pipeline: str, source: Path) -> None:
    for name in (FIRST, SECOND, "config.json"):
        assert digest(daemon.path(pipeline, name)) == hashlib.sha256((source / name).read_bytes()).hexdigest()


# -- what add refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "arguments", "says"),
    [
        (2, ("p", "ftp://host/x"), "ftp"),
        (2, ("p", "org model"), "hf://"),
        (2, ("../p", "hf://org/model"), "pipeline id"),
        (2, (".warm", "hf://org/model"), "pipeline id"),
        (2, ("p", "s3://"), "s3://"),
        (2, ("p", "file://relative"), "file://"),
        (1, ("p", "hf://org/nowhere"), "org/nowhere"),
        (1, ("p", "hf://org/model@no-such-revision"), "no-such-revision"),
        (1, ("p", "file:///does/not/exist"), "/does/not/exist"),
        (2, ("p", "hf://org/model", "--model", "a=hf://org/model"), "--model"),
        (2, ("p", "hf://org/model", "--token-file", "/does/not/exist"), "/does/not/exist"),
    ],
)
def test_add_refuses(
    daemon: Daemon, hub: HubServer, model: Path, status: int, arguments: tuple[str, ...], says: str
) -> None:
    hub.publish("org/model", model)
    assert says in daemon.refused(status, "add", *arguments)
    assert daemon.cli("status", "p").returncode == 1
    assert not (daemon.mount / "p").exists()


def test_a_gated_repository_needs_the_pipelines_own_token(
    daemon: Daemon, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.publish("org/gated", model, gated=True, tokens=["hf_good"])
    assert "org/gated" in daemon.refused(1, "add", "gated", "hf://org/gated")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("hf_wrong\n")
    message = daemon.refused(1, "add", "gated", "hf://org/gated", "--token-file", token)
    assert "hf_wrong" not in message
    token.write_text("hf_good\n")
    daemon.ok("add", "gated", "hf://org/gated", "--token-file", token)
    same_everywhere(daemon, "gated", model)
    for text in (daemon.text(), daemon.ok("status", "gated", "--json")):
        assert "hf_good" not in text
    daemon.ok("remove", "gated")


def test_commands_for_what_is_not_there(daemon: Daemon) -> None:
    for verb in ("update", "remove", "evict", "pin", "unpin", "touch", "warm", "verify", "status"):
        assert "nobody" in daemon.refused(1, verb, "nobody")
    assert "nobody" in daemon.refused(1, "lease", "nobody", "--", "true")


def test_the_same_id_twice(daemon: Daemon, hub: HubServer, model: Path) -> None:
    hub.publish("org/model", model)
    daemon.ok("add", "twice", "hf://org/model")
    assert "update" in daemon.refused(1, "add", "twice", "hf://org/model")
    daemon.ok("remove", "twice")


def test_hostile_names_are_left_out_and_told_of(daemon: Daemon, hub: HubServer, model: Path) -> None:
    for position, name in enumerate(("../../etc/cron.d/x", "/etc/passwd", "a/../../b", "a//b", "x/" + "y" * 300)):
        hub.publish_names(f"org/hostile{position}", ["config.json", name], model / "config.json")
        said = daemon.ok("add", f"hostile{position}", f"hf://org/hostile{position}")
        assert name[:100] in said and "1 file that cannot be shown" in said
        assert os.listdir(daemon.mount / f"hostile{position}") == ["config.json"]
        daemon.ok("remove", f"hostile{position}")


def test_no_daemon_is_said_with_what_to_do(tmp_path: Path) -> None:
    nowhere = tmp_path / "no.sock"
    daemon = Daemon(tmp_path / "d", env={"INSTANTSTART_SOCKET": str(nowhere)})
    message = daemon.refused(1, "ls")
    assert "instantstart start" in message


def test_s3_without_bucket_key_or_credentials(
    make_daemon: Callable[..., Daemon], seaweed: SeaweedServer, model: Path
) -> None:
    bucket = seaweed.new_bucket("bad-input")
    seaweed.upload(model, bucket, "model")
    s3 = {"fill": {"chunk_size": "1MiB"}, "origins": {"s3": {"endpoint_url": seaweed.endpoint_url}}}
    daemon = make_daemon("s3", config=s3, env=seaweed.environment)
    assert "no-such-bucket" in daemon.refused(1, "add", "p", "s3://no-such-bucket/model")
    assert "nothing-here" in daemon.refused(1, "add", "p", f"s3://{bucket}/nothing-here")
    wrong = {**seaweed.environment, "AWS_SECRET_ACCESS_KEY": "wrong-secret"}
    for name, environment in (("wrong", wrong), ("none", {})):
        other = make_daemon(name, config=s3, env=environment)
        message = other.refused(1, "add", "p", f"s3://{bucket}/model", timeout=90)
        assert "credential" in message.lower() or "access" in message.lower()
        assert "wrong-secret" not in message
    daemon.ok("add", "p", f"s3://{bucket}/model")
    same_everywhere(daemon, "p", model)


# -- servers that lie or fail in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("cut", {"after": 100_000, "count": 6}),
        ("range", {"count": 6}),
        ("whole", {"count": 6}),
        ("reset", {"count": 6}),
        ("status", {"status": 500, "count": 6}),
        ("status", {"status": 503, "headers": {"Retry-After": "1"}, "count": 6}),
        ("status", {"status": 429, "headers": {"Retry-After": "1"}, "count": 6}),
    ],
)
def test_passing_faults_end_in_right_bytes(
    daemon: Daemon, hub: HubServer, model: Path, kind: str, arguments: dict[str, object]
) -> None:
    hub.publish("org/model", model)
    daemon.ok("add", "faulty", "hf://org/model")
    try:
        hub.fault(kind, port="cdn", **arguments)  # type: ignore[arg-type]
        daemon.warm("faulty", timeout=90)
        same_everywhere(daemon, "faulty", model)
        assert daemon.status("faulty")["state"] == "warm"
    finally:
        hub.clear()
        daemon.ok("remove", "faulty")


def test_a_fifth_of_all_responses_corrupted_seals_nothing_wrong(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("corrupt", config=config(hub), allow=["wrong bytes", "the bytes that came have"])
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("corrupt", port="cdn", probability=0.2, seed=7)
    daemon.cli("warm", "p", "--wait", timeout=60)
    for file in daemon.status("p")["files"]:
        if file["state"] == "sealed":
            stored = daemon.store / "slots/p/1/files" / file["path"]
            assert stored.read_bytes() == (model / file["path"]).read_bytes()
    hub.clear()
    daemon.warm("p")
    same_everywhere(daemon, "p", model)


def test_an_object_replaced_in_the_middle_of_a_fill(
    make_daemon: Callable[..., Daemon], seaweed: SeaweedServer, tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "old", seed=5)
    newer = model_directory(tmp_path / "new", seed=6)
    bucket = seaweed.new_bucket("replaced")
    seaweed.upload(source, bucket, "m")
    s3 = {"fill": {"chunk_size": "1MiB"}, "origins": {"s3": {"endpoint_url": seaweed.endpoint_url}}}
    daemon = make_daemon("replaced", config=s3, env=seaweed.environment)
    daemon.ok("add", "p", f"s3://{bucket}/m")
    digest_of_the_beginning = must("sh", "-c", 'head -c 100000 "$0" | sha256sum', daemon.path("p", FIRST))
    assert digest_of_the_beginning.split()[0] == hashlib.sha256((source / FIRST).read_bytes()[:100_000]).hexdigest()
    seaweed.upload(newer, bucket, "m")
    done = daemon.cli("warm", "p", "--wait", timeout=90)
    assert done.returncode == 1
    status = daemon.status("p")
    assert (status["state"], status["error"]["code"]) == ("error", "origin-changed")
    assert "update" in status["error"]["message"]
    assert run("sha256sum", daemon.path("p", FIRST), timeout=60).returncode == 1
    daemon.ok("update", "p")
    daemon.warm("p")
    same_everywhere(daemon, "p", newer)


def test_an_origin_that_accepts_and_never_answers(
    make_daemon: Callable[..., Daemon], hub: HubServer, black_hole: BlackHole, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("hole", config=config(hub, read_deadline="3s"))
    daemon.ok("add", "p", "hf://org/model")
    hub.fault("blackhole", port="any")
    done = run("cat", daemon.path("p", "config.json"), timeout=30)
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    must("ls", "-lR", daemon.mount, timeout=5)
    hub.clear()
    wait_for(lambda: run("cat", daemon.path("p", "config.json"), timeout=30).returncode == 0, "the origin's return", 60)


# -- the machine's own trouble -------------------------------------------------------------------------------------


@pytest.fixture
def tight_ext4(tmp_path: Path) -> Iterator[Path]:
    """Room for the index and about one shard and a half."""
    with loop_ext4(tmp_path, 64 * MIB) as mountpoint:
        yield mountpoint


def test_a_full_disk_is_said_and_breaks_no_warm_pipeline(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, tight_ext4: Path
) -> None:
    small = model_directory(tmp_path / "small", seed=8, weights=(6 * MIB, 5 * MIB))
    large = model_directory(tmp_path / "large", seed=9, weights=(60 * MIB, 40 * MIB))
    hub.publish("org/small", small)
    hub.publish("org/large", large)
    daemon = make_daemon("full", config=config(hub), store=tight_ext4 / "store", allow=["full", "space"])
    daemon.ok("add", "small", "hf://org/small", "--warm")
    daemon.warm("small")
    digest(daemon.path("small", FIRST))  # a request: hot, so it may not go
    daemon.ok("add", "large", "hf://org/large")
    assert "store full: needs" in daemon.refused(1, "warm", "large", "--wait", timeout=120)
    same_everywhere(daemon, "large", large)  # served through
    status = daemon.status("large")
    assert status["uncached"].startswith("store full: ") and "hot: small" in status["uncached"]
    assert (status["state"] in ("cold", "partial"), status["error"]) == (True, None)
    same_everywhere(daemon, "small", small)
    daemon.ok("remove", "large")
    daemon.restart()
    same_everywhere(daemon, "small", small)
    assert daemon.status("small")["state"] == "warm"


def serve(*arguments: str | Path) -> str:
    """`instantstart serve` that must refuse to start: its one line."""
    import sys

    done = run(sys.executable, "-m", "instantstart_fs.cli", "serve", *arguments, timeout=40)
    assert done.returncode in (1, 2), f"exit {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("instantstart: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_store_that_is_read_only(tmp_path: Path, tight_ext4: Path) -> None:
    must("mount", "-o", "remount,ro", tight_ext4)
    message = serve("--store", tight_ext4 / "store", "--mount", tmp_path / "m", "--socket", tmp_path / "s")
    assert "read-only" in message.lower()


def test_one_daemon_per_store_and_per_mount(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("first")
    message = serve("--store", daemon.store, "--mount", tmp_path / "m", "--socket", tmp_path / "s")
    assert str(daemon.pid) in message
    message = serve("--store", tmp_path / "other", "--mount", daemon.mount, "--socket", tmp_path / "s")
    assert str(daemon.mount) in message
    assert daemon.ok("ls", "--json").strip() == "[]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[fill]\nworkrs = 2\n", "workrs"),
        ("[fill]\nchunk_size = '8 elephants'\n", "chunk_size"),
        ("[store]\nlow_watermark = 0.99\nhigh_watermark = 0.5\n", "watermark"),
        ("[mount\n", "config.toml"),
        ("[mount]\ntransport = 'nfs'\n", "nfs"),
        ("[pipelines.p]\nsource = 'gopher://x'\n", "gopher"),
    ],
)
def test_configuration_errors_name_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    message = serve("--config", file, "--store", tmp_path / "store", "--mount", tmp_path / "m")
    assert says in message
    assert "config.toml" in message
    assert not os.path.exists(tmp_path / "store")


def test_a_killed_daemon_leaves_nothing_in_the_way(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    hub.publish("org/model", model)
    daemon = make_daemon("killed", config=config(hub))
    daemon.ok("add", "p", "hf://org/model")
    daemon.warm("p")
    daemon.kill()
    assert run("ls", daemon.mount, timeout=10).returncode != 0  # the dead mount is still there
    assert "instantstart start" in daemon.refused(1, "ls")  # and so is its socket
    daemon.start()
    assert daemon.status("p")["state"] == "warm"
    same_everywhere(daemon, "p", model)


def test_the_repository_stays_clean() -> None:
    """Nothing above wrote beside its own directories."""
    assert not (REPOSITORY / "store").exists()
