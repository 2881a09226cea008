"""Sources as they are out there: keys that rotate, buckets for everybody, odd names, tokens that may only list."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon
from tests.servers.hub import HubServer
from tests.servers.s3_gate import S3Gate
from tests.servers.seaweed import SeaweedServer

FILES = {"config.json": b'{"hidden": 1}', "model.safetensors": os.urandom(200_000), "more/tokenizer.json": b"{}"}


@pytest.fixture
def gate(seaweed: SeaweedServer) -> Iterator[S3Gate]:
    client = seaweed.client()
    if "sources" not in (bucket["Name"] for bucket in client.list_buckets()["Buckets"]):
        seaweed.new_bucket("sources")
    for path, content in FILES.items():
        client.put_object(Bucket="sources", Key=f"m/{path}", Body=content)
    client.put_object(Bucket="sources", Key="m/odd-name.json", Body=b"odd")
    with S3Gate(seaweed) as gate:
        gate.renamed = (b"odd-name.json", b"/b.json")  # SeaweedFS itself has no such key: its keys are paths
        yield gate


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the daemon's machine has its keys; none yet."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path / "credentials"


def write_keys(path: Path, key: str) -> None:
    path.touch(0o600)
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def test_keys_that_are_replaced_serve_a_pipeline_that_is_open(
    make_daemon: Callable[..., Daemon], gate: S3Gate, keys: Path
) -> None:
    write_keys(keys, "first")
    gate.keys = {"first"}
    daemon = make_daemon(config={"origins": {"s3": {"endpoint_url": gate.url}}}, allow=["."])
    daemon.ok("add", "p", "s3://sources/m")
    assert daemon.path("p", "config.json").read_bytes() == FILES["config.json"]
    gate.keys = {"second"}
    assert "InvalidAccessKeyId" in daemon.refused(1, "verify", "p", "--access")
    write_keys(keys, "second")
    assert daemon.path("p", "model.safetensors").read_bytes() == FILES["model.safetensors"]
    daemon.ok("verify", "p", "--access")


def test_a_public_bucket_with_an_odd_key(make_daemon: Callable[..., Daemon], gate: S3Gate, keys: Path) -> None:
    gate.public = True
    daemon = make_daemon(config={"origins": {"s3": {"endpoint_url": gate.url}}}, allow=["."])
    assert "1 file that cannot be shown: /b.json: " in daemon.ok("add", "p", "s3://sources/m")
    daemon.warm("p")
    for path, content in FILES.items():
        assert daemon.path("p", path).read_bytes() == content
    assert {key for _, key in gate.seen} == {""}
    daemon.restart()
    skipped = daemon.status("p")["skipped"]
    assert skipped["count"] == 1 and skipped["first"][0].startswith("/b.json: ")
    assert "cannot be shown" in daemon.ok("status", "p") and "cannot be shown" in daemon.text()
    write_keys(keys, "unknown-there")
    gate.keys = set()
    assert "InvalidAccessKeyId" in daemon.refused(1, "add", "signed", "s3://sources/m")
    daemon.ok("add", "unsigned", "s3://sources/m", "--anonymous", "--exclude", "/*")
    assert "skipped" not in json.loads(daemon.ok("status", "unsigned", "--json"))
    daemon.refused(2, "add", "both", "s3://sources/m", "--anonymous", "--aws-profile", "x")


def test_access_is_proven_by_a_byte_and_not_by_a_list(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes(b"content of " + name.encode())
    hub.publish("org/lists", tmp_path / "m", private=True, tokens=["hf_reads"])
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("hf_reads")
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}}, allow=["."])
    daemon.ok("add", "p", "hf://org/lists", "--token-file", token)
    daemon.ok("verify", "p", "--access")
    hub.fault("status", port="hub", path="/resolve/", method="GET", status=403)  # HEAD says yes
    try:
        answer = json.loads(daemon.cli("verify", "p", "--access", "--json").stdout)
    finally:
        hub.clear()
    assert answer["error"]["code"] == "access-refused"
    hub.publish("org/lists", tmp_path / "m", private=True, tokens=["hf_reads"], listers=["hf_lists"])
    token.write_text("hf_lists")
    assert "listed, but may not be downloaded" in daemon.refused(1, "verify", "p", "--access")
    assert "listed, but may not be downloaded" in daemon.refused(1, "add", "q", "hf://org/lists", "--token-file", token)


def test_an_etag_that_is_no_md5_can_be_told_to_the_daemon(
    make_daemon: Callable[..., Daemon], gate: S3Gate, keys: Path
) -> None:
    """Small objects of the same bucket have honest ones: only the fetch finds out, says what to set, and that helps."""
    write_keys(keys, "first")
    gate.fake_etags = "model.safetensors"
    s3: dict[str, object] = {"endpoint_url": gate.url}
    daemon = make_daemon(config={"origins": {"s3": s3}}, allow=["."])
    daemon.ok("add", "p", "s3://sources/m")
    told = daemon.cli("warm", "p", "--wait")
    assert told.returncode == 1 and "etags_are_md5" in told.stdout + told.stderr
    assert "etags_are_md5" in daemon.status("p")["error"]["message"]
    daemon.configure({"origins": {"s3": {**s3, "etags_are_md5": False}}})
    daemon.restart()
    daemon.ok("update", "p")
    daemon.warm("p")
    assert daemon.status("p")["state"] == "unverified"
    assert daemon.path("p", "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_the_page_of_one_gguf_file_is_that_file(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "m" / "q").mkdir(parents=True)
    for name in ("README.md", "q/q4.gguf", "q/q8.gguf"):
        (tmp_path / "m" / name).write_bytes(b"content of " + name.encode())
    hub.publish("org/gguf", tmp_path / "m")
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}}, allow=["."])
    daemon.ok("add", "p", "https://huggingface.co/org/gguf/blob/main/q/q4.gguf")
    daemon.ok("add", "whole", "org/gguf")
    assert [file["path"] for file in daemon.status("p")["files"]] == ["q/q4.gguf"]
    assert daemon.path("p", "q/q4.gguf").read_bytes() == b"content of q/q4.gguf"
    assert len(daemon.status("whole")["files"]) == 3
    assert "this is a dataset" in daemon.refused(2, "add", "d", "https://huggingface.co/datasets/org/gguf")
