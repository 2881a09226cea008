"""Odd names of files, from a real bucket and from a hub: each is served byte for byte, and named, by every door."""

from __future__ import annotations

import html
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs import Client
from tests.component.test_http_api import Unix
from tests.e2e.test_page import PORT_0, get
from tests.harness import Daemon
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

ODD = (
    "a b.json",
    " lead.json",
    "trail ",
    "a%20b.json",
    "a%b.json",
    "a%2Fb.json",
    "a+b.json",
    "a%2Bb.json",
    unicodedata.normalize("NFC", "é.json"),
    unicodedata.normalize("NFD", "é.json"),
    "~",
    "~root/x.json",
    "dot.",
    "...",
    "dir./x.json",
    "Case.json",
    "case.json",
    "CASE.json/x",
    "l" * 255,
    "é" * 127,
    "q?a=b.json",
    "h#ash.json",
    "amp&lt;.json",
    "st*r.json",
    "[b]{c}.json",
    "quo\"te'.json",
    "new\nline.json",
    "tab\t.json",
    "esc\x1b[31mred.json",
    "bidi\u202e.json",
    "emoji😀.json",
    "日本語/😀.json",
    "colon:a.json",
    "lt<gt>|;,=@$!.json",
    "-dash.json",
    "--opt",
    "CON",
    "zero\u200bwidth.json",
    "pipeline.json",
    "manifest.json/learned.json",
    ".warm/files/0",
    "/".join("d" * 64),
    "model 1%+é.safetensors",
    "Ünder/-model;2#?.safetensors",
)
"""Names that a filesystem can hold."""
TENSOR = b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'.ljust(64)
"""The head of a safetensors file of 64 bytes."""
ALONE = ("a%20b.json", "q?a=b.json", "[b]{c}.json", "日本語/😀.json")
"""Of ODD: names that are added each as a source of its own."""


def content(name: str, version: int) -> bytes:
    if name.endswith(".safetensors"):
        return TENSOR + f"{version} {name}".encode().ljust(64)[:64]
    return f"version {version} of {name!r}\n".encode() * 3


def shown(daemon: Daemon) -> dict[str, bytes]:
    """Path → bytes of all files of the pipeline, through the mount."""
    root = daemon.path("p")
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def walk_through(daemon: Daemon, source: str, replace: Callable[[dict[str, bytes]], None]) -> None:
    """Every door, for ODD as ``replace`` puts them at ``source``."""
    wanted = {name: content(name, 1) for name in ODD}
    newer = {name: content(name, 2) for name in ODD}
    replace(wanted)
    daemon.ok("add", "p", source)
    assert shown(daemon) == wanted
    printed = daemon.ok("status", "p")
    assert "\x1b" not in printed and "\u202e" not in printed, "a name writes on the user's terminal"
    page = get(daemon, "/pipelines/p")
    assert page.status == 200
    for name in ODD:
        if "<" in name or "&" in name:
            assert name not in page.text and html.escape(name) in page.text
    over_http = Unix(str(daemon.socket))
    over_http.request("GET", "/v1/pipelines/p")
    assert {file["path"] for file in json.loads(over_http.getresponse().read())["files"]} == set(wanted)
    over_http.close()
    with Client(str(daemon.socket)) as client:
        assert {file.path for file in client.status("p").files or ()} == set(wanted)
        with client.prefetch("p", "cpu") as stage:
            stage.wait(120)
            assert set(stage.paths) == {name for name in ODD if name.endswith(".safetensors")}
            for path in stage.paths:
                exported = stage.export(path)
                assert exported.fd is not None
                with open(exported.fd, "rb") as file:
                    assert file.read(exported.size) == wanted[path]
        for name in ALONE:
            client.add("alone", f"{source}/{name}")
            (only,) = client.status("alone").files or ()
            assert daemon.path("alone", only.path).read_bytes() == wanted[name]
            client.remove("alone")
        # A new version of each, under the same names.
        replace(newer)
        client.update("p")
        assert shown(daemon) == newer
        client.wait_warm("p", everything=True, timeout=120)
        assert client.verify("p", timeout=120).healed == ()
        client.evict("p")
    daemon.restart()
    assert shown(daemon) == newer
    daemon.ok("remove", "p")


@pytest.mark.timeout(300)
def test_names_of_a_bucket(make_daemon: Callable[..., Daemon], seaweed: SeaweedServer) -> None:
    bucket = seaweed.new_bucket("odd-names")
    client = seaweed.client()
    daemon = make_daemon(
        config={**PORT_0, "origins": {"s3": {"endpoint_url": seaweed.endpoint_url}}}, env=seaweed.environment
    )

    def put(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=f"m +%/{name}", Body=data)

    walk_through(daemon, f"s3://{bucket}/m +%", put)
    # What no directory can show is left out, and said.
    for key in ("n/both.json", "n/both.json/x.json", f"n/{'d/' * 70}deep.json"):
        client.put_object(Bucket=bucket, Key=key, Body=b"{}")
    said = daemon.ok("add", "p", f"s3://{bucket}/n")
    assert "2 files that cannot be shown" in said and "is the name of a directory, too" in said and "deeper" in said
    assert shown(daemon) == {"both.json/x.json": b"{}"}


@pytest.mark.timeout(300)
def test_names_of_a_repository(make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path) -> None:
    daemon = make_daemon(config={**PORT_0, "origins": {"huggingface": {"endpoint": hub.endpoint}}})
    versions: list[Any] = []

    def publish(files: dict[str, bytes]) -> None:
        root = tmp_path / f"version-{len(versions)}"
        versions.append(root)
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        hub.publish("org/odd", root)

    walk_through(daemon, "hf://org/odd", publish)
