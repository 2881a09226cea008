"""Byte equality through the mount: every way of reading, during the fill and after it, and of cold files by the tools
that look for holes."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_generations import sha256
from tests.harness import MIB, REPOSITORY, Daemon, model_directory, must, probe, run, tree_files, wait_for
from tests.servers.hub import HubServer

KINDS = ("read", "pread", "mmap-private", "mmap-shared", "sendfile")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub_server: HubServer, shared_transport: str) -> Iterator[Daemon]:
    config = {
        "mount": {"transport": shared_transport},
        "fill": {"chunk_size": "1MiB"},
        "origins": {"huggingface": {"endpoint": hub_server.endpoint}},
    }
    with Daemon(tmp_path_factory.mktemp("bytes"), config=config) as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_equal_during_the_fill_and_after(daemon: Daemon, hub: HubServer, model: Path, kind: str) -> None:
    """Read from the first moment, while a slowed origin fills and one file waits; then again when all is sealed."""
    hub.publish("org/model", model)
    names = [name for name in tree_files(model) if name.endswith(".safetensors")]
    hub.fault("bandwidth", port="cdn", rate=4 * MIB)
    hub.fault("stall", port="cdn", path=sha256(model / names[-1]), after=MIB // 2)
    pipeline = f"during-{kind}"
    daemon.ok("add", pipeline, "hf://org/model")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.probe", "compare", kind, model / name, daemon.path(pipeline, name), "7"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    try:
        wait_for(lambda: daemon.status(pipeline)["cached_bytes"] > 0, "the first chunk", 20)
        wait_for(lambda: daemon.status(pipeline)["state"] == "filling", "the fill", 20)
        hub.clear()
        for process in running:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err.decode()
    finally:
        for process in running:
            process.kill()
            process.communicate(timeout=10)
    daemon.warm(pipeline)
    for name in names:
        assert probe("compare", kind, model / name, daemon.path(pipeline, name), 8) > 0
    states = {file["path"]: file["state"] for file in daemon.status(pipeline)["files"]}
    assert all(states[name] == "sealed" for name in names)


@pytest.fixture(scope="module")
def fio_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in which every block carries fio's own checksum of itself and its offset."""
    directory = tmp_path_factory.mktemp("fio")
    must(
        *(
            "fio",
            "--name=write",
            "--verify_state_save=0",
            f"--filename={directory}/model.safetensors",
            "--rw=write",
            "--bs=64k",
        ),
        *("--size=64m", "--verify=crc32c", "--do_verify=0", "--ioengine=psync", "--randseed=42"),
        timeout=60,
    )
    return directory


def fio_verify(path: Path, engine: str) -> subprocess.CompletedProcess[str]:
    depth = ("--iodepth=16",) if engine == "io_uring" else ()
    return run(
        *(
            "fio",
            "--name=verify",
            "--verify_state_save=0",
            f"--filename={path}",
            "--rw=read",
            "--bs=64k",
            "--size=64m",
            "--readonly",
        ),
        *("--verify=crc32c", "--verify_fatal=1", f"--ioengine={engine}", "--randseed=42", *depth),
        timeout=90,
    )


@pytest.mark.parametrize("engine", ["psync", "mmap", "io_uring"])
def test_fio_verifies_a_cold_file(daemon: Daemon, fio_directory: Path, engine: str) -> None:
    daemon.ok("add", f"fio-{engine}", f"file://{fio_directory}")
    path = daemon.path(f"fio-{engine}", "model.safetensors")
    assert os.stat(path).st_blocks == 1, "it is not cold"
    done = fio_verify(path, engine)
    if done.returncode != 0 and "io_uring" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("this machine forbids io_uring")
    assert done.returncode == 0, done.stdout + done.stderr
    daemon.warm(f"fio-{engine}")
    done = fio_verify(path, engine)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fio_would_see_one_wrong_byte(fio_directory: Path, tmp_path: Path) -> None:
    """The control: the same command fails when one byte of 64 MiB is another."""
    copy = tmp_path / "copy"
    copy.write_bytes((fio_directory / "model.safetensors").read_bytes())
    with copy.open("r+b") as file:
        file.seek(33 * MIB + 777)
        byte = file.read(1)
        file.seek(33 * MIB + 777)
        file.write(bytes([byte[0] ^ 1]))
    assert fio_verify(copy, "psync").returncode != 0


@pytest.fixture(scope="module")
def holey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with runs of zeros of its own, so that a tool's guess about holes matters in both directions."""
    root = model_directory(tmp_path_factory.mktemp("holey") / "model", seed=5, weights=(9 * MIB + 1, 5 * MIB))
    with (root / "zeros.bin").open("wb") as file:
        file.write(b"\1" * 4096)
        file.truncate(6 * MIB)
    (root / "all-zeros.pt").write_bytes(bytes(2 * MIB))
    return root


def cold(daemon: Daemon, pipeline: str, source: Path) -> Path:
    """Added, and cold by every sign."""
    daemon.ok("add", pipeline, f"file://{source}")
    root = daemon.path(pipeline)
    for name in tree_files(source):
        size = (source / name).stat().st_size
        assert os.stat(root / name).st_blocks == (1 if size else 0), name
    assert daemon.status(pipeline)["state"] == "cold"
    return root


def assert_same_tree(one: Path, other: Path) -> None:
    assert tree_files(one) == tree_files(other)
    for name in tree_files(one):
        assert filecmp.cmp(one / name, other / name, shallow=False), name


@pytest.mark.parametrize(
    "command",
    [
        ("rsync", "-r", "--checksum"),
        ("rsync", "-r", "--sparse"),
        ("cp", "-r"),
        ("cp", "-r", "--sparse=always"),
        ("cp", "-r", "--sparse=auto"),
        ("cp", "-r", "--sparse=never", "--reflink=auto"),
    ],
    ids=" ".join,
)
def test_copies_of_cold_files(daemon: Daemon, holey: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    root = cold(daemon, f"copy-{'-'.join(command).replace('=', '').replace('--', '')}", holey)
    must(*command, f"{root}/." if command[0] == "cp" else f"{root}/", tmp_path / "copy", timeout=60)
    assert_same_tree(holey, tmp_path / "copy")


def test_rsync_checksum_finds_no_difference_in_cold_files(daemon: Daemon, holey: Path) -> None:
    root = cold(daemon, "rsync-dry", holey)
    out = must("rsync", "-r", "-n", "--checksum", "--itemize-changes", f"{holey}/", f"{root}/", timeout=60)
    assert [line for line in out.splitlines() if line.startswith(">f")] == []


def test_diff_of_cold_files(daemon: Daemon, holey: Path) -> None:
    root = cold(daemon, "diff", holey)
    assert must("diff", "-r", holey, root, timeout=60) == ""


@pytest.mark.parametrize("method", ["raw", "seek"])
def test_tar_sparse_of_cold_files(daemon: Daemon, holey: Path, tmp_path: Path, method: str) -> None:
    """GNU tar -S takes 0 blocks, and what SEEK_HOLE says, for holes: neither may show what the store lacks."""
    root = cold(daemon, f"tar-{method}", holey)
    must("tar", "-S", f"--hole-detection={method}", "-cf", tmp_path / "t.tar", "-C", root, ".", timeout=60)
    (tmp_path / "out").mkdir()
    must("tar", "-xf", tmp_path / "t.tar", "-C", tmp_path / "out", timeout=60)
    assert_same_tree(holey, tmp_path / "out")


def test_a_cold_file_is_all_data_to_seek(daemon: Daemon, holey: Path) -> None:
    root = cold(daemon, "seek", holey)
    path = root / "model-00001-of-00002.safetensors"
    script = (
        "import os,sys,json; f=os.open(sys.argv[1],os.O_RDONLY); "
        "print(json.dumps([os.lseek(f,0,os.SEEK_DATA),os.lseek(f,0,os.SEEK_HOLE)]))"
    )
    out = must(sys.executable, "-c", script, path, timeout=20)
    assert out.strip() == f"[0, {9 * MIB + 1}]"
    assert os.stat(path).st_blocks == 1
