"""What is a directory's own: links, owners, special files, identity."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from instantstart_fs.errors import AccessRefused, OriginChanged, OriginNotFound, OriginUnsupported
from instantstart_fs.origins.directory import identity_of
from tests.contract.worlds import DirectoryWorld, fetch

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the owners of files, which only root may")


@pytest.fixture
def world(tmp_path: Path) -> DirectoryWorld:
    found = DirectoryWorld(tmp_path)
    found.put({"config.json": b"{}", "sub/model.bin": b"weights"})
    return found


def paths(world: DirectoryWorld, **globs: tuple[str, ...]) -> list[str]:
    return [file.path for file in world.origin(**globs).resolve().files]


def test_links_to_files_of_the_same_owner_are_followed(world: DirectoryWorld, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/abc").write_bytes(b"blob")
    (world.directory / "model.safetensors").symlink_to("../blobs/abc")
    origin = world.origin()
    file = next(file for file in origin.resolve().files if file.path == "model.safetensors")
    assert (file.size, fetch(origin.locate(file), 0, 4)) == (4, b"blob")


@as_root
def test_a_tenants_link_to_somebody_elses_file_is_refused(world: DirectoryWorld, tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("secret")
    link = world.directory / "config2.json"
    link.symlink_to(secret)
    os.chown(link, 12345, 12345, follow_symlinks=False)
    with pytest.raises(OriginUnsupported, match="another owner"):
        world.origin().resolve()
    assert paths(world, exclude=("config2.json",)) == ["config.json", "sub/model.bin"]
    os.chown(secret, 12345, 12345)
    assert "config2.json" in paths(world)


@as_root
def test_a_chain_of_links_is_judged_by_its_first(world: DirectoryWorld, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("secret")
    (tmp_path / "middle").symlink_to(tmp_path / "shadow")
    link = world.directory / "config2.json"
    link.symlink_to(tmp_path / "middle")
    os.chown(link, 12345, 12345, follow_symlinks=False)
    with pytest.raises(OriginUnsupported, match="another owner"):
        world.origin().resolve()


def test_links_to_directories_are_refused_by_name(world: DirectoryWorld, tmp_path: Path) -> None:
    link = world.directory / "unet"
    link.symlink_to(world.directory / "sub")
    with pytest.raises(OriginUnsupported, match="unet: a link to a directory"):
        world.origin().resolve()
    with pytest.raises(OriginUnsupported, match="unet"):
        world.origin(include=("unet/*.bin",)).resolve()
    assert paths(world, exclude=("unet/",)) == ["config.json", "sub/model.bin"]
    assert paths(world, include=("*.json",)) == ["config.json"]


def test_what_nobody_can_be_shown_is_left_out_and_told_of(world: DirectoryWorld) -> None:
    (world.directory / "gone.bin").symlink_to("nowhere")
    (world.directory / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(world.directory / "pipe.json")
    with open(os.fsencode(world.directory) + b"/caf\xe9.bin", "wb"):
        pass
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(world.directory / "socket"))
        manifest = world.origin().resolve()
    assert [file.path for file in manifest.files] == ["config.json", "sub/model.bin"]
    assert manifest.skipped is not None
    assert manifest.skipped.count == 5
    assert set(manifest.skipped.first) == {
        "gone.bin: a link that leads nowhere",
        "loop.bin: a link that leads nowhere",
        "pipe.json: a named pipe",
        "socket: a socket",
        "caf\\udce9.bin: is not valid UTF-8",
    }
    assert world.origin(include=("*.json",), exclude=("pipe*",)).resolve().skipped is None


def test_the_root_may_be_a_link_since_the_administrator_named_it(world: DirectoryWorld, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(world.directory)
    origin = world.origin(f"file://{tmp_path}/current")
    assert [file.path for file in origin.resolve().files] == ["config.json", "sub/model.bin"]
    assert fetch(origin.locate(origin.resolve().files[1]), 0, 7) == b"weights"


def test_a_file_and_an_empty_directory_are_no_models(world: DirectoryWorld, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("the model/config.json", "empty"):
        for call in ("resolve", "check"):
            with pytest.raises(OriginNotFound):
                getattr(world.origin(f"file://{tmp_path}/{name}"), call)()


def test_what_the_daemon_may_not_read_is_refused_at_once(
    world: DirectoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)  # root may read everything
    with pytest.raises(AccessRefused, match="may not read"):
        world.origin().resolve()


@pytest.mark.parametrize("change", ["rewritten", "grown", "replaced", "touched", "deleted"])
def test_every_change_is_noticed(world: DirectoryWorld, change: str) -> None:
    path = world.directory / "sub/model.bin"
    os.utime(path, ns=(10**18, 10**18))
    origin = world.origin()
    file = origin.resolve().files[1]
    assert origin.locate(file).identity == identity_of(os.stat(path)) == file.version
    match change:
        case "rewritten":
            path.write_bytes(b"WEIGHTS")
        case "grown":
            with path.open("ab") as out:
                out.write(b"more")
            os.utime(path, ns=(10**18, 10**18))
        case "replaced":
            world.replace("sub/model.bin", b"WEIGHTS")
            os.utime(path, ns=(10**18, 10**18))
        case "touched":
            path.touch()
        case "deleted":
            path.unlink()
    with pytest.raises(OriginChanged, match="run update"):
        origin.locate(file)
