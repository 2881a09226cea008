"""What the tree looks like and who may see it: read-only, owners, names, many files, several models."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, Daemon, must, probe, random_file, run, safetensors_file, tree_files, wait_for


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("namespace"), config={"fill": {"chunk_size": "1MiB"}}) as running:
        # pytest's own directories are 0700; other users must be able to come near the mount
        for parent in daemon_parents(running.mount):
            os.chmod(parent, stat.S_IMODE(os.stat(parent).st_mode) | 0o011)
        yield running


def daemon_parents(path: Path) -> list[Path]:
    return [parent for parent in path.parents if parent.stat().st_uid == os.geteuid() and "pytest" in str(parent)]


def test_every_write_is_erofs(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "ro", f"file://{model}")
    found = probe("write-attempts", daemon.path("ro"), "config.json")
    # link(2) to another directory entry of the same mount, and all the others, meet the read-only mount first
    assert set(found.values()) == {"EROFS"}, found
    assert probe("compare", "read", model / "config.json", daemon.path("ro", "config.json")) > 0


def test_owner_and_mode(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "owned", f"file://{model}", "--owner", "12345:23456", "--mode", "0550")
    for parent, directories, files in os.walk(daemon.path("owned")):
        for name in [".", *directories, *files]:
            found = os.lstat(os.path.join(parent, name))
            assert (found.st_uid, found.st_gid) == (12345, 23456), name
            wanted = 0o440 if name in files else 0o550
            assert stat.S_IMODE(found.st_mode) == wanted, name


def as_user(uid: int, gid: int, *command: str | Path) -> tuple[int, str]:
    done = run("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *command, timeout=20)
    return done.returncode, done.stderr


def test_another_user_is_denied(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "private", f"file://{model}", "--owner", "12345:23456", "--mode", "0500")
    file = daemon.path("private", "config.json")
    assert as_user(12345, 23456, "cat", file)[0] == 0, "its owner may read it"
    for uid, gid in ((12346, 12346), (12346, 23456)):
        status, message = as_user(uid, gid, "cat", file)
        assert status != 0 and "Permission denied" in message, (uid, gid)
        status, message = as_user(uid, gid, "ls", daemon.path("private"))
        assert status != 0 and "Permission denied" in message, (uid, gid)
    daemon.ok("add", "group", f"file://{model}", "--owner", "12345:23456", "--mode", "0550")
    assert as_user(12346, 23456, "cat", daemon.path("group", "config.json"))[0] == 0, "its group may read it"
    assert as_user(12346, 12346, "cat", daemon.path("group", "config.json"))[0] != 0


def test_the_store_is_nobody_elses(daemon: Daemon, model: Path) -> None:
    """What the mount denies cannot be had from the store either."""
    daemon.ok("add", "walls", f"file://{model}", "--owner", "12345:23456", "--mode", "0500")
    daemon.warm("walls")
    blob = daemon.store / "slots/walls/1/files/config.json"
    assert blob.read_bytes() == (model / "config.json").read_bytes()
    status, message = as_user(12346, 12346, "cat", blob)
    assert status != 0 and "Permission denied" in message


NAMES = (
    "with space.json",
    "größe – 模型 🤖.json",
    "-leading-dash.json",
    "quote'\"`$(x).json",
    "new\nline.json",
    "back\\slash.json",
    "tab\t.json",
    ".hidden.json",
    "x" * 250 + ".json",
    "empty",
    "deep/er/and er/file.json",
    "e\u0301 decomposed.json",
    "\u00e9 composed.json",
)


def test_names_and_empty_files(daemon: Daemon, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for position, name in enumerate(NAMES):
        random_file(source / name, 0 if name == "empty" else 100 + position, position)
    daemon.ok("add", "names", f"file://{source}")
    found = probe("tree", source, daemon.path("names"))
    assert found["files"] == len(NAMES)
    assert os.stat(daemon.path("names", "empty")).st_size == 0
    assert os.stat(daemon.path("names", "empty")).st_blocks == 0
    daemon.warm("names", "--all")
    probe("tree", source, daemon.path("names"))
    assert {file["path"] for file in daemon.status("names")["files"]} == set(NAMES)


def test_ten_thousand_files_in_one_directory(daemon: Daemon, tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(10_000):
        (source / f"part-{number:05}.json").write_bytes(b"%d" % number)
    daemon.ok("add", "many", f"file://{source}", timeout=60)
    before = time.monotonic()
    out = must("ls", "-lR", daemon.path("many"), timeout=60)
    taken = time.monotonic() - before
    print(f"ls -lR of 10,000 files: {taken:.2f} s")
    assert len(out.splitlines()) == 10_002
    assert taken < 10
    names = os.listdir(daemon.path("many"))
    assert len(names) == len(set(names)) == 10_000
    for number in (0, 4999, 9999):
        assert daemon.path("many", f"part-{number:05}.json").read_bytes() == b"%d" % number
    assert daemon.status("many")["state"] in ("partial", "cold")
    daemon.ok("remove", "many")


def test_two_named_models(daemon: Daemon, tmp_path: Path) -> None:
    """One slot, one warm state, a directory for each model; the other model's safetensors hide no .bin."""
    asr, llm = tmp_path / "asr", tmp_path / "llm"
    random_file(asr / "pytorch_model.bin", 2 * MIB, 1)
    (asr / "config.json").write_text("{}")
    safetensors_file(llm / "model.safetensors", 3 * MIB, 2)
    random_file(llm / "pytorch_model.bin", MIB, 3)
    daemon.ok("add", "agent", "--model", f"asr=file://{asr}", "--model", f"llm=file://{llm}")
    root = daemon.path("agent")
    assert sorted(os.listdir(root)) == ["asr", "llm"]
    daemon.warm("agent")
    status = daemon.status("agent")
    states = {file["path"]: file["state"] for file in status["files"]}
    assert status["state"] == "unverified"
    assert states["asr/pytorch_model.bin"] == "unverified"
    assert states["llm/model.safetensors"] == "unverified"
    assert states["llm/pytorch_model.bin"] == "absent"
    assert status["source"] == [f"file://{asr}", f"file://{llm}"]
    for name, source in (("asr", asr), ("llm", llm)):
        assert probe("tree", source, root / name)["files"] == len(tree_files(source))


def test_include_and_exclude(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "globs", f"file://{model}", "--include", "*.json", "--include", "*.md", "--exclude", "README*")
    names = tree_files(daemon.path("globs"))
    assert names == [name for name in tree_files(model) if name.endswith(".json")]


def test_an_unknown_name_is_enoent(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "enoent", f"file://{model}")
    for path in (daemon.mount / "nobody", daemon.path("enoent", "no.json"), daemon.path("enoent", "onnx", "no")):
        with pytest.raises(FileNotFoundError):
            os.stat(path)
    with pytest.raises(NotADirectoryError):
        os.stat(daemon.path("enoent", "config.json", "x"))


def test_configured_pipelines_appear(make_daemon: Callable[..., Daemon], model: Path) -> None:
    daemon = make_daemon(config={"pipelines": {"from-file": {"source": f"file://{model}", "mode": "0500"}}})
    wait_for(lambda: daemon.path("from-file").exists(), "its place in the mount", 20)
    daemon.ok("warm", "from-file", "--wait")
    assert stat.S_IMODE(os.stat(daemon.path("from-file")).st_mode) == 0o500
