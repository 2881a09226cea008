"""What `run` decides without a daemon: which engine a command starts, what a startup cache depends on, which version a
start gets, what a pack may hold, what an engine's log says."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.cli.app import app
from instantstart_fs.control import lines, protocol
from instantstart_fs.core import enginetable
from instantstart_fs.core.enginelog import EngineLog
from instantstart_fs.core.enginetable import (
    differences,
    engine_of,
    host_of,
    is_key_variable,
    key_arguments,
    port_of,
    ranks_of,
)
from instantstart_fs.core.startupcache import (
    KEPT,
    MOST_GIVEN,
    StartupRecord,
    Suspects,
    check_key,
    choose,
    surplus,
    whole_key,
)
from instantstart_fs.core.startuppack import BadPack, decode_index, encode_index, index_length, is_safe
from instantstart_fs.errors import DaemonUnreachable, UsageError
from instantstart_fs.startup import options, report, surroundings, wire
from instantstart_fs.startup import pack as packs
from instantstart_fs.startup import run as running
from instantstart_fs.startup import save as startup_save
from instantstart_fs.startup.output import Listening
from instantstart_fs.startup.pack import pack, scan, unpack
from instantstart_fs.startup.run import check
from instantstart_fs.startup.start import Start
from instantstart_fs.startup.supervise import Command, Interrupted
from instantstart_fs.startup.views import NoView, sweep, take_view
from instantstart_fs.startup.wire import Wire

KEY = {"engine": "vllm", "package torch": "2.13.0", "arguments": "serve /models/x", "driver": "580.1"}


def record(number: int, uid: int = 7, **changes: str) -> StartupRecord:
    key = {**whole_key(KEY, uid=uid, generation=1, sources=["hf://o/r"], revision="abc"), **changes}
    return StartupRecord(number, number, uid, 100, f"digest {number}", 1, "/v", ("vllm",), key)


def wanted(uid: int = 7, generation: int = 1, revision: str = "abc", **changes: str) -> dict[str, str]:
    return whole_key({**KEY, **changes}, uid=uid, generation=generation, sources=["hf://o/r"], revision=revision)


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("command", "engine"),
    [
        (["vllm", "serve", "m"], "vllm"),
        (["/opt/vllm/bin/vllm", "serve", "m"], "vllm"),
        (["/opt/py/bin/python3.12", "-m", "vllm.entrypoints.openai.api_server"], "vllm"),
        (["python", "-u", "-m", "sglang.launch_server"], "sglang"),
        (["python3", "/opt/bin/vllm", "serve"], "vllm"),
        (["trtllm-serve", "m"], "tensorrt-llm"),
        (["python", "vllm_like.py"], None),
        (["sh", "-c", "vllm serve"], None),
    ],
)
def test_an_engine_is_known_by_its_program_or_module(command: list[str], engine: str | None) -> None:
    found = engine_of(command)
    assert (found.name if found else None) == engine


def test_where_an_engine_answers() -> None:
    command = ["vllm", "serve", "m", "--port=9001", "--host", "0.0.0.0"]
    engine = engine_of(command)
    assert engine is not None
    assert (host_of(command), port_of(command, engine)) == ("127.0.0.1", 9001)
    assert port_of(["vllm", "serve", "m", "--port", "x"], engine) == 8000
    assert host_of(["vllm", "--host", "::1"]) == "[::1]"


def test_ranks_are_those_of_all_kinds_of_parallelism() -> None:
    assert ranks_of(["vllm", "-tp", "4", "--pipeline-parallel-size=2"], "vllm") == 8
    assert ranks_of(["vllm", "serve", "m"], "vllm") == 1
    assert ranks_of(["torchrun", "--nproc-per-node", "8", "x.py"], "") == 8


def test_replicas_that_differ_in_address_and_secrets_share_a_cache_and_no_secret_is_kept() -> None:
    one = ["vllm", "serve", "m", "--port", "8000", "--api-key", "s3cret", "--max-model-len", "4096"]
    two = ["vllm", "serve", "m", "--port=8001", "--api-key=other", "--max-model-len", "4096"]
    assert key_arguments(one, "vllm") == key_arguments(two, "vllm")
    assert "s3cret" not in key_arguments(one, "vllm")
    assert key_arguments(one, "vllm") != key_arguments([*one[:-1], "8192"], "vllm")
    assert key_arguments(["x", "--port", "1"], "") != key_arguments(["x", "--port", "2"], "")
    assert "9" in key_arguments(["vllm", "--max-num-batched-tokens", "9"], "vllm")


def test_variables_that_make_other_code_are_in_the_key_and_secrets_are_not() -> None:
    assert is_key_variable("VLLM_USE_AOT_COMPILE")
    assert is_key_variable("TORCHINDUCTOR_FREEZING")
    assert is_key_variable("LD_LIBRARY_PATH")
    for name in ("VLLM_API_KEY", "HF_TOKEN", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "PATH", "HOME", "VLLM_PORT"):
        assert not is_key_variable(name), name


# ---------------------------------------------------------------- the key


def environment(root: Path, **packages: str) -> Path:
    """An engine's Python environment, as far as its key goes; its program."""
    site = root / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    for name, version in packages.items():
        (site / f"{name}-{version}.dist-info").mkdir()
    (root / "bin").mkdir()
    (root / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (root / "bin" / "python").symlink_to(sys.executable)
    program = root / "bin" / "vllm"
    program.write_text(f"#!{root}/bin/python\n")
    program.chmod(0o755)
    return program


def test_the_key_names_versions_arguments_processor_and_variables(tmp_path: Path) -> None:
    program = environment(tmp_path / "a", vllm="0.32.0", torch="2.13.0", triton="3.9.0", nvidia_cuda_runtime="13.0")
    command = [str(program), "serve", "/models/x", "-tp", "2"]
    key = surroundings.key_of(command, engine_of(command), {"VLLM_X": "1", "HOME": "/"})
    assert key["package vllm"] == "0.32.0"
    assert key["package nvidia-cuda-runtime"] == "13.0"
    assert (key["engine"], key["ranks"]) == ("vllm", "2")
    assert "environment VLLM_X" in key and "environment HOME" not in key
    assert key["processor flags"] and "program" not in key

    other = environment(tmp_path / "b", vllm="0.32.0", torch="2.14.0", triton="3.9.0", nvidia_cuda_runtime="13.0")
    again = surroundings.key_of([str(other), *command[1:]], engine_of([str(other)]), {"VLLM_X": "2", "HOME": "/"})
    assert differences(key, again) == ("environment VLLM_X", "interpreter", "package torch")


@pytest.mark.parametrize("place", ["prefix", "user", "user base", "PYTHONPATH"])
def test_an_upgrade_is_seen_wherever_the_engine_is_installed(place: str, tmp_path: Path) -> None:
    """In each place there is an older Python's directory, too: what it holds hides no upgrade."""
    root = tmp_path / "usr"
    environment(root, torch="2.13.0")
    (root / "pyvenv.cfg").unlink()  # no virtual environment: such a one does not look into the user's directory
    (root / "bin" / "python").unlink()
    (root / "bin" / "python").write_bytes(b"")
    variables = {"HOME": str(tmp_path / "home")}
    if place == "user base":
        variables["PYTHONUSERBASE"] = str(tmp_path / "base")
    if place == "PYTHONPATH":
        variables["PYTHONPATH"] = f"{tmp_path}/nothing::{tmp_path}/target"
    base = {"prefix": root, "user": tmp_path / "home" / ".local", "user base": tmp_path / "base"}.get(place)
    site = base / "lib" / "python3.11" / "site-packages" if base is not None else tmp_path / "target"
    if base is not None:
        (base / "lib" / "python3.9" / "site-packages" / "vllm-0.1.0.dist-info").mkdir(parents=True)
    (site / "vllm-0.32.0.dist-info").mkdir(parents=True)
    command = [str(root / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/x"]

    def key() -> dict[str, str]:
        return surroundings.key_of(command, engine_of(command), variables)

    first = key()
    assert "0.32.0" in first["package vllm"].split() and first["package torch"] == "2.13.0"
    assert key() == first
    (site / "vllm-0.32.0.dist-info").rename(site / "vllm-0.33.0.dist-info")
    assert differences(first, key()) == ("package vllm",)


def test_a_virtual_environment_does_not_see_what_the_user_installed(tmp_path: Path) -> None:
    program = environment(tmp_path / "venv", vllm="0.32.0")
    site = tmp_path / ".local" / "lib" / "python3.11" / "site-packages"
    (site / "vllm-0.33.0.dist-info").mkdir(parents=True)
    command = [str(program), "serve", "/models/x"]
    assert surroundings.key_of(command, engine_of(command), {"HOME": str(tmp_path)})["package vllm"] == "0.32.0"


def test_of_a_program_that_is_no_python_its_own_file_is_in_the_key(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    one = surroundings.key_of([str(program)], None, {})
    program.write_text("#!/bin/sh\n# another build\n")
    assert differences(one, surroundings.key_of([str(program)], None, {})) == ("program",)


def test_another_c_library_or_compiler_is_another_key_though_the_engine_lies_on_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = environment(tmp_path / "share", vllm="0.32.0")
    command = [str(program), "serve", "/models/x"]
    for image in ("a", "b"):
        (tmp_path / image).mkdir()
        (tmp_path / image / "g++").write_text(f"#!{image}")
        (tmp_path / image / "g++").chmod(0o755)

    def key(image: str) -> dict[str, str]:
        return surroundings.key_of(command, engine_of(command), {"PATH": str(tmp_path / image)})

    first = key("a")
    assert key("a") == first and differences(first, key("b")) == ("compiler",)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 9.99")
    assert differences(first, key("a")) == ("libc",)


def test_a_script_that_starts_the_engine_counts_by_the_python_that_it_will_find(tmp_path: Path) -> None:
    environment(tmp_path / "venv", vllm="0.32.0", torch="2.13.0")
    (tmp_path / "venv" / "bin" / "python3").symlink_to("python")
    site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
    (site / "triton-3.9.0-py3.11.egg-info").mkdir()  # by apt or conda
    variables = {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin"}
    first = surroundings.key_of(["sh", "start.sh"], None, variables)
    assert (first["package torch"], first["package triton"]) == ("2.13.0", "3.9.0-py3.11")
    (site / "torch-2.13.0.dist-info").rename(site / "torch-2.14.0.dist-info")
    assert differences(first, surroundings.key_of(["sh", "start.sh"], None, variables)) == ("package torch",)


def test_gpus_that_cannot_be_told_have_no_key_and_a_driver_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over, blocked = threading.Event(), set[int]()

    def hangs() -> list[tuple[str, str, str]]:
        blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        over.wait(50)
        return []

    monkeypatch.setattr(surroundings, "NVML_SECONDS", 0.05)
    monkeypatch.setattr(surroundings, "nvml_devices", hangs)
    monkeypatch.setattr(surroundings, "_models", str)
    with pytest.raises(UsageError, match="which GPUs"):
        surroundings._nvidia({})
    assert not over.is_set()
    assert {signal.SIGTERM, signal.SIGINT} <= blocked, "they are to reach the command"
    monkeypatch.setattr(surroundings, "_models", lambda: "NVIDIA H100")
    assert surroundings._nvidia({})["gpus"] == "NVIDIA H100"
    over.set()


def test_the_drivers_own_files_that_hang_are_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "version", tmp_path / "gpus/0000:01:00.0/information"]
    files[1].parent.mkdir(parents=True)
    for file in files:
        os.mkfifo(file)  # whoever opens it waits for a writer

    def no_answer() -> list[tuple[str, str, str]]:
        raise OSError("NVML does not answer")

    monkeypatch.setattr(surroundings, "NVIDIA", str(tmp_path))
    monkeypatch.setattr(surroundings, "PROC_SECONDS", 0.1)
    monkeypatch.setattr(surroundings, "nvml_devices", no_answer)
    began = time.monotonic()
    with pytest.raises(UsageError, match="which GPUs"):
        surroundings._nvidia({})
    assert time.monotonic() - began < 20
    for file in files:  # lets its thread go
        os.close(os.open(file, os.O_RDWR))
        file.unlink()
    files[0].write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1.2  Tue\n")
    files[1].write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    monkeypatch.setattr(surroundings, "PROC_SECONDS", 20.0)
    assert surroundings._nvidia({}) == {"driver": "580.1.2", "gpus": "NVIDIA H100"}


def test_the_gpus_of_a_key_are_those_that_the_engine_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [("A", "sm_80", "GPU-aaaa"), ("B", "sm_90", "GPU-bbbb")]
    monkeypatch.setattr(surroundings, "nvml_devices", lambda: devices)
    seen = {"0": "A sm_80", "1": "B sm_90", "GPU-bbbb": "B sm_90", "": "", "-1": "", "MIG-x": "A sm_80, B sm_90"}
    assert {name: surroundings._nvidia({"CUDA_VISIBLE_DEVICES": name})["gpus"] for name in seen} == seen
    assert surroundings._nvidia({})["gpus"] == "A sm_80, B sm_90"


def test_everything_is_restored_by_its_own_key_alone() -> None:
    records = [record(1), record(2), record(3, **{"package torch": "2.14.0"})]
    assert choose(records, wanted(), uid=7).record == records[1]
    assert choose(records, wanted(), uid=7, without=[2]).record == records[0]
    assert choose(records, wanted(), uid=7, without=[1, 2]).outcome == "damaged"
    assert choose([], wanted(), uid=7).outcome == "first"


@pytest.mark.parametrize(
    ("key", "differs"),
    [
        (wanted(**{"package torch": "2.12.0"}), ("package torch",)),
        (wanted(arguments="serve /models/y"), ("arguments",)),
        (wanted(driver="570.0"), ("driver",)),
        (wanted(generation=2), ("generation",)),
        (wanted(revision="def"), ("generation",)),
        (wanted(gpus="H100 sm_90"), ("gpus",)),
        (wanted(ranks="2", **{"processor flags": "x"}), ("processor flags", "ranks")),
    ],
)
def test_a_key_of_which_one_field_differs_restores_nothing_and_says_which(
    key: dict[str, str], differs: tuple[str, ...]
) -> None:
    found = choose([record(1)], key, uid=7)
    assert (found.outcome, found.record, found.differs) == ("mismatch", None, differs)


def test_what_another_user_saved_is_not_restored_even_where_the_pipeline_is_his_now() -> None:
    saved = record(1, uid=8)
    assert choose([saved], wanted(uid=7), uid=7).differs == ("owner",)
    forged = msgspec.structs.replace(saved, key=wanted(uid=7))
    assert choose([forged], wanted(uid=7), uid=7).differs == ("owner",)


def test_a_version_with_which_two_starts_failed_is_left_out_until_a_cold_one_fails_or_is_ready() -> None:
    suspects, count = Suspects(), iter(range(100))

    def a_start(number: int, *failed: bool, left_out: int = 0) -> None:
        name = str(next(count))
        suspects.given(name, "p", number, left_out=left_out)
        for each in failed:
            suspects.reported(name, "q", failed=True)  # another owner's word
            suspects.reported(name, "p", failed=each)

    a_start(3, True)
    assert suspects.of("p") == ()
    a_start(3, False, True)
    a_start(3, True)
    assert suspects.of("p") == (), "not in a row"
    a_start(3, True)
    assert suspects.of("p") == (3,) and suspects.of("q") == ()
    a_start(0, True)
    assert suspects.of("p") == (3,), "another command's start, say"
    a_start(0, True, left_out=3)
    assert suspects.of("p") == (), "it was not the cache"
    for _ in range(2):
        a_start(3, True)
    a_start(0, False, left_out=3)
    assert suspects.of("p") == (3,), "it was the cache"
    suspects.forget("p", 3)
    assert suspects.of("p") == () and suspects._given == {}
    for number in range(MOST_GIVEN + 5):
        suspects.given(str(number), "p", 1)
    assert len(suspects._given) == MOST_GIVEN


def test_the_tenants_word_for_what_the_daemon_knows_does_not_count() -> None:
    key = whole_key({**KEY, "owner": "0", "generation": "9"}, uid=7, generation=1, sources=["s"], revision="r")
    assert (key["owner"], key["generation"]) == ("7", "1 r")


def test_of_each_key_the_newest_two_stay_and_of_all_sixteen() -> None:
    assert [gone.number for gone in surplus([record(1), record(2), record(3), record(4, driver="1")])] == [1]
    many = [record(number, driver=str(number)) for number in range(1, KEPT + 4)]
    assert [gone.number for gone in surplus(many)] == [1, 2, 3]


# ---------------------------------------------------------------- packs


def tree(root: Path) -> Path:
    (root / "triton" / "ab").mkdir(parents=True)
    (root / "triton" / "ab" / "k.so").write_bytes(os.urandom(200_000))
    (root / "triton" / "ab" / "k.so").chmod(0o755)
    (root / "triton" / "k.json").write_text("{}")
    os.utime(root / "triton" / "k.json", ns=(1, 1_700_000_000_123_456_789))
    (root / "triton" / "x.lock").write_text("")
    (root / "triton" / "link").symlink_to("/etc/passwd")
    (root / "inductor").mkdir()
    (root / "inductor" / "empty").write_bytes(b"")
    return root


def packed(root: Path, out: Path) -> tuple[int, str, int]:
    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        return pack(str(root), scan(str(root), {"triton": (), "inductor": ()}), fd)
    finally:
        os.close(fd)


def test_a_pack_gives_back_bytes_modes_and_times_to_the_nanosecond(tmp_path: Path) -> None:
    root = tree(tmp_path / "a")
    size, digest, files = packed(root, tmp_path / "pack")
    assert (files, size) == (3, (tmp_path / "pack").stat().st_size)
    target = tmp_path / "b"
    target.mkdir()
    fd = os.open(tmp_path / "pack", os.O_RDONLY)
    try:
        seen = unpack(fd, size, digest, str(target), lambda layout: True)
    finally:
        os.close(fd)
    assert seen == scan(str(root), {"triton": (), "inductor": ()})
    assert (target / "triton/ab/k.so").read_bytes() == (root / "triton/ab/k.so").read_bytes()
    assert (target / "triton/ab/k.so").stat().st_mode & 0o777 == 0o755
    assert (target / "triton/k.json").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert not (target / "triton/link").exists() and not (target / "triton/x.lock").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "grow"])
def test_of_a_pack_that_is_not_what_was_saved_nothing_is_unpacked(tmp_path: Path, damage: str) -> None:
    root = tree(tmp_path / "a")
    size, digest, _ = packed(root, tmp_path / "pack")
    raw = bytearray((tmp_path / "pack").read_bytes())
    if damage == "flip":
        raw[10] ^= 1
    elif damage == "cut":
        del raw[-5:]
    elif damage == "grow":
        raw += b"x"
    else:
        (root / "triton" / "k.json").write_text("[]")
        packed(root, tmp_path / "other")
        raw = bytearray((tmp_path / "other").read_bytes())
    (tmp_path / "pack").write_bytes(raw)
    target = tmp_path / "b"
    target.mkdir()
    fd = os.open(tmp_path / "pack", os.O_RDONLY)
    try:
        with pytest.raises(BadPack):
            unpack(fd, size, digest, str(target), lambda layout: True)
    finally:
        os.close(fd)
    assert list(target.iterdir()) == []


def test_a_file_that_changes_while_it_is_packed_is_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "a")
    seen = scan(str(root), {"triton": ()})
    (root / "triton" / "k.json").write_text("changed")
    fd = os.open(tmp_path / "pack", os.O_RDWR | os.O_CREAT)
    try:
        assert pack(str(root), seen, fd)[2] == len(seen) - 1
    finally:
        os.close(fd)


@given(st.text())
def test_a_safe_path_stays_below_its_root(path: str) -> None:
    if is_safe(path):
        assert os.path.normpath(os.path.join("/root", path)).startswith("/root/")


@given(st.binary(max_size=200))
def test_garbage_is_no_index(body: bytes) -> None:
    try:
        decode_index(body, 10_000)
    except BadPack:
        return
    assert body.strip() == b"[]"


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../b", "a//b", "", "a/./b", "a\0b", "x" * 300]
)  # fmt: skip
def test_paths_that_lead_out_are_refused(path: str) -> None:
    tail = encode_index([])
    body = msgspec.json.encode([[path, 0, 1, 0o644, 0]])
    with pytest.raises(BadPack):
        decode_index(body, 1000)
    assert index_length(tail[-36:]) == 2


# ---------------------------------------------------------------- the view


def test_a_lone_start_always_has_the_same_directory_and_two_at_once_have_two(tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    one = take_view("p", base)
    Path(one.path, "left").write_text("of an earlier start")
    two = take_view("p", base)
    assert one.path != two.path
    os.close(two.descriptor)
    os.close(one.descriptor)
    again = take_view("p", base)
    assert again.path == one.path and os.listdir(again.path) == []
    os.close(again.descriptor)


def test_what_a_killed_start_left_goes_though_no_lone_start_takes_its_number(tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    views = [take_view("p", base) for _ in range(4)]
    for view in views:
        Path(view.path, "compiled").write_text("x")
    (tmp_path / "base" / "p" / "9").mkdir()  # none of ours: it has no lock
    os.close(views[1].descriptor)
    os.close(views[2].descriptor)
    sweep(views[0])
    assert sorted(name for name in os.listdir(f"{base}/p") if "." not in name) == ["0", "3", "9"]
    assert os.listdir(views[3].path) == ["compiled"], "that one still runs"
    for view in (views[0], views[3]):
        os.close(view.descriptor)


def test_a_directory_from_which_nothing_can_be_loaded_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)
    assert not found.f_flag & os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=found.f_flag | os.ST_NOEXEC))
    with pytest.raises(NoView, match="noexec"):
        take_view("p", str(tmp_path / "base"))


def test_what_is_packed_while_its_directory_is_removed_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = a_start(tmp_path)
    start.view = take_view("p", str(tmp_path / "views"))
    start.layouts = {"triton": ()}
    (Path(start.view.path) / "triton").mkdir()
    (Path(start.view.path) / "triton" / "k").write_text("x")
    pack_it = startup_save.pack

    def packs_all(*words: Any) -> Any:
        found = pack_it(*words)
        start.given_up = True  # `run` has waited long enough
        return found

    monkeypatch.setattr(startup_save, "pack", packs_all)
    monkeypatch.setattr(startup_save, "_send", lambda *_: pytest.fail("half of it was saved"))
    assert startup_save.save(start) is None and start.saved == {}
    os.close(start.view.descriptor)


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(NoView, match="alone"):
        take_view("p", str(base))
    shutil.rmtree(base)
    base.symlink_to(tmp_path)
    with pytest.raises(NoView):
        take_view("p", str(base))


# ---------------------------------------------------------------- the command line


def test_run_and_its_quick_parser_know_the_same_options() -> None:
    import typer

    command = typer.main.get_command(app)
    run = command.commands["run"]  # type: ignore[attr-defined]
    known = {name for parameter in run.params for name in parameter.opts if name.startswith("-")}
    assert known - {"--help", "-h"} == {*options.VALUES, *options.LISTS, *options.FLAGS}


def test_the_quick_parser_takes_what_is_right_and_leaves_the_rest_to_the_other() -> None:
    found = options.plain(["run", "p", "--engine=vllm", "--cache", "A", "--cache", "B", "-q", "--", "x", "--port", "1"])
    assert found is not None
    assert (found.pipeline, found.engine, found.caches, found.quiet) == ("p", "vllm", ["A", "B"], True)
    assert found.command == ["x", "--port", "1"]
    plain = options.plain(["run", "p", "sleep", "--", "1"])
    assert plain is not None and plain.command == ["sleep", "--", "1"]
    for line in (["run", "p"], ["run", "--help"], ["run", "p", "--wrong", "--", "x"], ["run", "p", "--engine", "--"]):
        assert options.plain(line) is None, line


def test_the_requests_of_the_quick_client_are_those_of_the_protocol() -> None:
    begin = {"op": "startup-begin", "pipeline": "p", "key": {}, "restore": True, "without": [1], "start": ""}
    line = msgspec.json.encode({"v": 1, "request": {**begin, "requested_ns": None}})
    assert lines.decode_request(line) == protocol.StartupBegin("p", {}, without=(1,))


def test_what_runs_before_the_engine_imports_nothing_that_takes_time() -> None:
    program = "import sys; from instantstart_fs.startup import run, follower, options, wire; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"msgspec", "typer", "rich", "trio", "subprocess", "asyncio", "logging", "urllib.request", "http.client"}
    assert heavy & set(done.stdout.split()) == set()


# ---------------------------------------------------------------- what engines say

VLLM = """\
\x1b[0;36m(EngineCore pid=7)\x1b[0;0m INFO 11-28 13:00:00 [default_loader.py:502] Loading weights took 0.52 seconds
INFO 11-28 13:00:01 [gpu_model_runner.py:5150] Model loading took 14.2 GiB memory and 6.250000 seconds
INFO 11-28 13:00:09 [monitor.py:20] torch.compile took 7.50 s in total
INFO [monitor.py:92] Initial profiling/warmup run took 1.25 s
INFO [gpu_model_runner.py:6582] Graph capturing finished in 17 secs, took 0.55 GiB
INFO [core.py:403] init engine (profile, create kv cache, warmup model) took 32.10 s (compilation: 7.50 s)
INFO [output.py:1] request took 99.0 s
"""
SGLANG = """\
[2026-01-01 00:00:00] Load weight end. elapsed=3.21 s, type=LlamaForCausalLM, avail mem=10.0 GB
[2026-01-01 00:00:09] Capture cuda graph end. Time elapsed: 8.10 s. mem usage=1.0 GB
"""


def test_the_phases_that_vllm_and_sglang_print() -> None:
    found = EngineLog("vllm").lines(VLLM.splitlines())
    assert found == {"load": 6.25, "compile": 7.5, "warm-up": 1.25, "capture": 17.0, "engine": 32.1}
    assert EngineLog("sglang").lines(SGLANG.splitlines()) == {"load": 3.21, "capture": 8.1}
    assert EngineLog("").lines(VLLM.splitlines()) == {}


def test_a_model_with_an_encoder_compiled_as_long_as_both_parts_took() -> None:
    """Each part prints a time of its own, one after the other; vLLM's last line has the sum."""
    said = """\
INFO [monitor.py:20] [encoder] torch.compile took 5.00 s in total
INFO [monitor.py:20] torch.compile took 20.00 s in total
INFO [core.py:386] init engine (profile, create kv cache, warmup model) took 40.50 s (compilation: 25.00 s — \
language_model: 20.00 s, encoder: 5.00 s)
"""
    assert EngineLog("vllm").lines(said.splitlines()) == {"compile": 25.0, "engine": 40.5}


def test_the_table_names_each_variable_once() -> None:
    variables = [layout.variable for layout in enginetable.LAYOUTS]
    names = [layout.name for layout in enginetable.LAYOUTS]
    assert len(set(variables)) == len(variables) and len(set(names)) == len(names)


# ---------------------------------------------------------------- what a review found


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["x", "p q", "r"], ["x", "p", "q r"]),
        (["x", "--key-frame", "--mode", "fast"], ["x", "--key-frame", "--kind", "fast"]),
        (["x", "--key-size", "64"], ["x", "--key-size", "128"]),
        (["vllm", "--kv-key-dtype=fp8"], ["vllm", "--kv-key-dtype=fp16"]),
    ],
)
def test_two_commands_that_differ_have_two_keys(one: list[str], two: list[str]) -> None:
    engine = "vllm" if one[0] == "vllm" else ""
    assert key_arguments(one, engine) != key_arguments(two, engine)


def test_directories_sources_and_variables_are_told_apart() -> None:
    one = surroundings.key_of(["x"], None, {}, ["/a b", "/c"])
    assert differences(one, surroundings.key_of(["x"], None, {}, ["/a", "b /c"])) == ("caches",)
    parts = {"uid": 1, "generation": 1, "revision": "r"}
    assert whole_key({}, sources=["a b"], **parts) != whole_key({}, sources=["a", "b"], **parts)
    assert is_key_variable("VLLM_MAX_TOKENS_PER_STEP") and is_key_variable("TORCH_TOKENIZER_KIND")
    assert not is_key_variable("SGLANG_HF_TOKEN")


@pytest.mark.parametrize("word", ["x" * 9000, "\udcff", "é" * 4000, ""])
def test_a_key_of_any_argument_can_be_sent_and_kept(word: str) -> None:
    engine = engine_of(["vllm"])
    environment = {"VLLM_A": word, f"VLLM_{word}": "1"}
    keys = [surroundings.key_of(["vllm", "serve", word + end], engine, environment) for end in ("", "y")]
    check_key(keys[0])
    request = protocol.StartupBegin("p", keys[0])
    assert lines.decode_request(lines.encode_request(request)[:-1]) == request
    assert differences(*keys) == ("arguments",)


def test_a_key_of_very_many_fields_is_one_field() -> None:
    engine = engine_of(["vllm"])
    many = {f"VLLM_{number}": "1" for number in range(5000)}
    key = surroundings.key_of(["vllm"], engine, many)
    check_key(key)
    assert key != surroundings.key_of(["vllm"], engine, {**many, "VLLM_7": "2"})


def test_what_a_pack_could_not_give_back_is_left_out_of_it(tmp_path: Path) -> None:
    root = tmp_path / "a"
    (root / "triton").mkdir(parents=True)
    old = root / "triton" / "old"
    old.write_text("x")
    os.utime(old, ns=(-1_000_000_000, -1_000_000_000))
    deep = root / "triton"
    try:
        for _ in range(15):
            deep = deep / ("d" * 200)
            deep.mkdir()
        (deep / "f").write_text("too far down")
    except OSError:  # a temporary directory with a long name
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("not the engine's")
    (root / "inductor").symlink_to(tmp_path / "elsewhere")
    seen = scan(str(root), {"triton": (), "inductor": ()})
    assert seen == {"triton/old": (1, 0, old.stat().st_mode & 0o777)}
    fd = os.open(tmp_path / "pack", os.O_RDWR | os.O_CREAT)
    try:
        size, digest, files = pack(str(root), seen, fd)
        (tmp_path / "b").mkdir()
        assert files == 1
        assert unpack(fd, size, digest, str(tmp_path / "b"), lambda layout: True) == seen
    finally:
        os.close(fd)


def test_an_index_larger_than_a_restore_takes_is_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "a")
    monkeypatch.setattr(packs, "MAX_INDEX", 20)
    with pytest.raises(packs.TooMuch), (tmp_path / "pack").open("wb") as out:
        pack(str(root), scan(str(root), {"triton": ()}), out.fileno())


def test_a_path_that_is_a_file_and_a_directory_is_no_index() -> None:
    body = msgspec.json.encode([["a/b", 0, 0, 0o644, 0], ["a/b/c/d", 0, 0, 0o644, 0]])
    with pytest.raises(BadPack, match="directory as well"):
        decode_index(body, 1000)


def test_a_link_from_elsewhere_is_taken_over_only_from_a_start_that_has_ended(tmp_path: Path) -> None:
    base, place = str(tmp_path / "base"), tmp_path / "fixed" / "cache"
    other = take_view("my-llm", base)
    other.link(str(place), "user-1")
    mine = take_view("my", base)
    with pytest.raises(FileExistsError, match="still runs"):
        mine.link(str(place), "user-1")
    second = take_view("my-llm", base)
    with pytest.raises(FileExistsError, match="still runs"):
        second.link(str(place), "user-1")
    assert os.readlink(place) == f"{other.path}/user-1"

    os.close(other.descriptor)  # killed: its link stays, and its directory
    mine.link(str(place), "user-1")
    assert os.readlink(place) == f"{mine.path}/user-1"
    mine.remove()
    assert not os.path.lexists(place), "a link that leads nowhere would keep the engine from making the directory"
    assert not os.path.lexists(f"{mine.path}.links")

    place.write_text("the user's")
    with pytest.raises(FileExistsError, match="something else"):
        second.link(str(place), "user-1")
    assert place.read_text() == "the user's"
    for view in (mine, second):
        os.close(view.descriptor)


def test_links_that_a_killed_start_left_go_before_the_next_one(tmp_path: Path) -> None:
    base, place = str(tmp_path / "base"), tmp_path / "cache"
    killed = take_view("p", base)
    killed.link(str(place), "user-1")
    os.close(killed.descriptor)
    again = take_view("p", base)
    assert again.path == killed.path and not os.path.lexists(place)
    place.symlink_to("/somewhere")
    with pytest.raises(FileExistsError, match="somewhere else"):
        again.link(str(place), "user-1")
    os.close(again.descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_start_that_waits_for_its_daemon_at_once(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys; from instantstart_fs.startup import options, run, wire\n"
        "ask = wire.time.sleep\n"
        "def waits(seconds): print('waits', flush=True); ask(60)\n"
        "wire.time.sleep = waits\n"
        f"sys.exit(run.run(options.plain(['run', 'p', '--socket', {str(tmp_path / 'none.sock')!r}, '--', 'true'])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
        process.communicate()


def refused(tmp_path: Path, *words: str, socket_name: str = "none.sock") -> tuple[dict[str, Any], str]:
    """A start whose command does not run: its report, and what was said."""
    report = tmp_path / "report.json"
    command = ["run", "p", "--socket", str(tmp_path / socket_name), "--no-stage", "--report", str(report), "--", *words]
    program = (
        "import sys; from instantstart_fs.startup import options, run, wire\n"
        "wire.Wire.__init__.__kwdefaults__['patience'] = 1.3\n"
        f"sys.exit(run.run(options.plain({command!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "INSTANTSTART_STARTUP_DIR": str(tmp_path / "views")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode, done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found, done.stderr


def test_a_start_whose_daemon_does_not_come_says_what_it_waits_for_and_has_a_report(tmp_path: Path) -> None:
    found, said = refused(tmp_path, "true")
    waits = [line for line in said.splitlines() if "waits for the daemon" in line]
    assert len(waits) == 1 and "none.sock (No such file or directory), 1.3 s at most" in waits[0]
    assert "start a daemon" in found["failed"] and found["pipeline"] == "p"
    assert (found["seconds"], found["status"], found["record"]) == ({}, None, None)


def test_a_start_that_is_refused_or_whose_command_is_not_there_has_a_report(tmp_path: Path) -> None:
    no_such = {"type": "failed", "code": "pipeline-not-found", "message": "there is no pipeline 'p'"}
    OldDaemon(tmp_path / "refuses", {"startup-begin": no_such}).start()
    assert "there is no pipeline" in refused(tmp_path, "true", socket_name="refuses")[0]["failed"]
    OldDaemon(tmp_path / "gives", {}).start()
    found, said = refused(tmp_path, "/nonexistent/engine", socket_name="gives")
    assert found["status"] == 127 and "/nonexistent/engine" in found["failed"]
    assert "waits for the daemon" not in said


def test_a_report_takes_no_devices_place_and_that_of_an_earlier_start_goes_at_once(tmp_path: Path) -> None:
    start = a_start(tmp_path)
    fifo, real, link = tmp_path / "fifo", tmp_path / "real.json", tmp_path / "link.json"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    report.write(start, {}, {}, None, str(fifo), status=3)
    assert fifo.is_fifo() and json.loads(os.read(reader, 65536))["status"] == 3
    os.close(reader)
    with pytest.raises(OSError):
        report.write(start, {}, {}, None, str(fifo))  # nobody reads it: that is not waited for
    link.symlink_to(real)
    for status in (4, 5):
        report.write(start, {}, {}, None, str(link), status=status)
    assert link.is_symlink() and json.loads(real.read_text())["status"] == 5
    running._remove_old_report(str(fifo))
    running._remove_old_report(str(real))
    assert fifo.is_fifo() and not real.exists()
    real.mkdir()
    with pytest.raises(OSError):
        report.write(start, {}, {}, None, str(real))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link.json", "real.json"], "no half is left"


def test_a_report_that_a_pipe_cannot_hold_comes_whole_or_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, fifo = a_start(tmp_path), tmp_path / "fifo"
    start.differs = tuple(f"field {number} {'x' * 1000}" for number in range(200))
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="nobody reads it"):
        report.write(start, {}, {}, None, str(fifo))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    came = bytearray()

    def read_slowly() -> None:
        assert select.select([reader], [], [], 20)[0]
        while data := os.read(reader, 10_000):
            came.extend(data)
            time.sleep(0.005)

    reading = threading.Thread(target=read_slowly)
    reading.start()
    report.write(start, {}, {}, None, str(fifo))
    reading.join(20)
    assert json.loads(came)["startup_cache"]["differs"] == list(start.differs)
    assert len(came) > 3 * 65536
    monkeypatch.setattr(report, "STREAM_SECONDS", 0.1)
    with pytest.raises(OSError, match=rf"its reader took \d+ of {len(came)} bytes in 0.1 s"):
        report.write(start, {}, {}, None, str(fifo))
    os.close(reader)


def test_a_daemon_that_does_not_answer_at_once_or_still_looks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"startup-begin": {"type": "failed", "code": "usage", "message": "no"}}
    daemon = OldDaemon(tmp_path / "s", answers)
    daemon.start()
    start = a_start(tmp_path)
    start.socket = str(tmp_path / "s")
    running._prepare(start).close()
    assert "waits" not in capsys.readouterr().err, "it answers"
    monkeypatch.setattr(wire, "_is_readable", lambda *_: False)  # a second later
    start = a_start(tmp_path)
    start.socket = str(tmp_path / "s")
    running._prepare(start).close()
    said = capsys.readouterr().err
    assert said.count("which looks for a startup cache, 75 s") == said.count("asked for a lease, 100 s") == 1

    monkeypatch.undo()
    found = Wire(str(tmp_path / "s"))
    found._pending = b'{"type": "progress"}\n' * 3
    found.ask("lease", waits=running._Once(start, "still looks"))
    assert capsys.readouterr().err.count("still looks") == 1
    found.close()


def test_variables_of_the_users_own_are_said_to_be_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in enginetable.LAYOUTS:
        monkeypatch.delenv(layout.variable, raising=False)
    start = a_start(tmp_path)
    running._prepare_view(start)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("MINE", "/too")
    for quiet in ((), ("--quiet",)):
        start = a_start(tmp_path, "--cache", "MINE", *quiet)
        running._prepare_view(start)
        said = capsys.readouterr().err
        assert "triton" not in start.layouts and start.environment["TRITON_CACHE_DIR"] == "/mine"
        told = "set already, and left alone: TRITON_CACHE_DIR, MINE; what lies there is neither restored nor kept."
        assert said == ("" if quiet else f"instantstart: p: {told} Without the variable it is\n")


class OldDaemon(threading.Thread):
    """Answers as a daemon does that knows nothing of startup caches, or that says what ``answers`` has."""

    def __init__(self, path: Path, answers: dict[str, dict[str, object]]) -> None:
        super().__init__(daemon=True)
        self.answers = answers
        self.asked: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()

    def run(self) -> None:
        kept = []
        while True:
            connection, _ = self.listener.accept()
            kept.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        # Who leaves without reading the answer resets the connection: that is no failure of the test that runs then.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError), connection.makefile("rb") as lines:
            for line in lines:
                operation = json.loads(line)["request"]["op"]
                self.asked.append(operation)
                answer = self.answers.get(operation, {"type": "done", "result": None})
                connection.sendall(json.dumps(answer).encode() + b"\n")


@pytest.mark.parametrize("code", ["usage", "pipeline-busy", "store-damaged", "control-protocol"])
def test_whatever_is_wrong_with_caches_the_command_runs(tmp_path: Path, code: str) -> None:
    daemon = OldDaemon(
        tmp_path / "s", {"startup-begin": {"type": "failed", "code": code, "message": "it is not known here"}}
    )
    daemon.start()
    program = (
        "import sys; from instantstart_fs.startup import options, run\n"
        f"sys.exit(run.run(options.plain(['run', 'p', '--socket', {str(tmp_path / 's')!r}, '--no-stage', '--', "
        "'sh', '-c', 'echo ran; exit 5'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "INSTANTSTART_STARTUP_DIR": str(tmp_path / "views")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("ran\n", 5), done.stderr
    assert "no startup cache: it is not known here" in done.stderr
    assert daemon.asked[:2] == ["startup-begin", "lease"] and "startup-save" not in daemon.asked


def test_a_pattern_that_takes_for_ever_holds_no_output_up(tmp_path: Path) -> None:
    daemon = OldDaemon(tmp_path / "s", {"startup-begin": {"type": "failed", "code": "usage", "message": "no"}})
    daemon.start()
    program = (
        "import sys; from instantstart_fs.startup import options, run\n"
        f"sys.exit(run.run(options.plain(['run', 'p', '--socket', {str(tmp_path / 's')!r}, '--no-stage', "
        "'--ready-log', '(a+)+$', '--', sys.executable, '-c', \"print('a' * 60 + 'b'); print('x' * 3_000_000)\"])))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and len(done.stdout) > 3_000_000, done.stderr


def test_a_closed_standard_descriptor_is_nobody_elses() -> None:
    program = (
        "import os; from instantstart_fs.cli import terminal; terminal.prepare()\n"
        "import socket; one, two = socket.socketpair()\n"
        "os.write(2, repr([one.fileno() > 2, two.fileno() > 2, os.get_inheritable(1)]).encode())"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-c", program]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stderr == "[True, True, False]"


@pytest.mark.parametrize("name", ["/srv/mine", "../mine", ".hidden", ""])
def test_a_name_that_is_a_path_makes_and_empties_no_directory(tmp_path: Path, name: str) -> None:
    """The view's directory has the pipeline's name, and what lies in it from an earlier start is deleted."""
    mine = tmp_path / "mine" / "0"
    mine.mkdir(parents=True)
    (mine / "precious").touch()
    with pytest.raises(UsageError, match="cannot be a pipeline's id"):
        check(options.Options(name, ["true"]))
    if name:
        with pytest.raises(NoView):
            take_view(name.replace("/srv", str(tmp_path)), str(tmp_path / "views"))
    assert (mine / "precious").exists()


# ---------------------------------------------------------------- what a second review found


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["--hf-token", "--enforce-eager"], ["--hf-token", "--disable-sliding-window"]),
        (["--api-key", "--enforce-eager"], ["--api-key"]),
        (["--port", "8000", "a"], ["--port", "8000", "b"]),
        (["--api-key", "k1", "model-a"], ["--api-key", "k1", "model-b"]),
    ],
)
def test_an_option_without_a_value_hides_no_other_option(one: list[str], two: list[str]) -> None:
    assert key_arguments(["vllm", "serve", "m", *one], "vllm") != key_arguments(["vllm", "serve", "m", *two], "vllm")


@pytest.mark.parametrize("engine", ["vllm", ""])
@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "k1", "s3cret"],
        ["--api_key", "s3cret", "s3cret"],
        ["--api-key=k1", "s3cret"],
        ["--hf_token=s3cret"],
        ["--kv-transfer-config", '{"api_key": "s3cret"}'],
        ['--additional-config={"auth": {"token":"s3cret"}}'],
        ["-c", "VLLM_API_KEY=s3cret vllm serve m"],
        ["-e", "HF_TOKEN=s3cret"],
        ["-eHF_TOKEN=s3cret"],
        ["--otel", "https://me:s3cret@host/x"],
        ["--header", "Authorization: s3cret"],
        ["--loader.api-key", "s3cret"],
    ],
)
def test_no_secret_is_in_a_key_in_clear(words: list[str], engine: str) -> None:
    assert "s3cret" not in key_arguments(["vllm", "serve", "m", *words, "--seed", "1"], engine)
    assert key_arguments(["vllm", "m", *words], engine).startswith("m")


def test_what_a_file_of_options_says_is_in_the_key(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    keys = []
    for text in ("max-model-len: 1\n", "max-model-len: 2\n"):
        config.write_text(text)
        for words in (["--config", str(config)], [f"--config={config}"]):
            keys.append(surroundings.key_of(["vllm", "serve", "m", *words], engine_of(["vllm"]), {}))
    assert differences(keys[0], keys[2]) == ("config 1",) == differences(keys[1], keys[3])
    config.unlink()
    os.mkfifo(config)  # nobody writes to it: it is not waited for
    with pytest.raises(UsageError, match="no regular file"):
        surroundings.key_of(["vllm", "serve", "m", "--config", str(config)], engine_of(["vllm"]), {})


def test_names_and_values_of_very_many_fields_do_not_run_into_each_other() -> None:
    many = {f"f{number}": "" for number in range(enginetable.MOST_FIELDS)}
    assert enginetable.storable({**many, "a=b": "c"}) != enginetable.storable({**many, "a": "b=c"})


def test_a_surrogate_that_stands_alone_is_no_path_of_a_pack() -> None:
    assert not is_safe("triton/\udcff")
    body = b'[["triton/\\udcff", 0, 0, 420, 0]]'
    with pytest.raises(BadPack):
        decode_index(body, 1000)


def test_a_view_that_is_emptied_keeps_the_links_that_lead_into_it(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    view = take_view("p", str(tmp_path / "base"))
    view.link(str(place), "user-1")
    view.empty()
    assert os.readlink(place) == f"{view.path}/user-1" and os.listdir(view.path) == []
    with pytest.raises(OSError, match="slash"):
        view.link(f"{tmp_path}/other/", "user-2")
    assert not (tmp_path / "other").exists()
    view.remove()
    assert not os.path.lexists(place)
    os.close(view.descriptor)


def a_start(tmp_path: Path, *words: str) -> Start:
    found = options.plain(["run", "p", "--cache-dir", str(tmp_path / "views"), *words, "--", "true"])
    assert found is not None
    return Start(found, None)


def test_a_layout_that_cannot_be_made_is_left_alone_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout in enginetable.LAYOUTS:
        monkeypatch.delenv(layout.variable, raising=False)
    make = os.makedirs

    def full(path: str, *rest: Any, **named: Any) -> None:
        if path.endswith(("/triton", "/user-2")):
            raise OSError(28, "No space left on device")
        make(path, *rest, **named)

    start = a_start(tmp_path, "--cache", str(tmp_path / "one"), "--cache", str(tmp_path / "two"), "--cache", "MINE")
    monkeypatch.setattr(os, "makedirs", full)
    running._prepare_view(start)
    assert start.view is not None
    assert "triton" not in start.layouts and "TRITON_CACHE_DIR" not in start.environment
    assert os.path.lexists(tmp_path / "one") and not os.path.lexists(tmp_path / "two")
    assert start.environment["MINE"] == f"{start.view.path}/user-3"

    # A view that cannot be emptied of what was half put in place is not led to, by any variable or link.
    monkeypatch.setattr(type(start.view), "empty", lambda self: full("/triton"))
    assert not running._start_over(start)
    assert "MINE" not in start.environment and "VLLM_CACHE_ROOT" not in start.environment
    assert not os.path.lexists(tmp_path / "one") and not start.layouts and start.options.no_save
    os.close(start.view.descriptor)


@pytest.mark.parametrize("answer", [None, {}, {"start": "1", "record": 5}, []])
def test_an_answer_of_another_shape_costs_the_start_its_cache_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    daemon = OldDaemon(tmp_path / "s", {"startup-begin": {"type": "done", "result": answer}})
    daemon.start()
    start = a_start(tmp_path)
    start.socket = str(tmp_path / "s")
    running._prepare(start).close()
    assert daemon.asked == ["startup-begin", "lease"]
    assert "no startup cache" in capsys.readouterr().err
    assert "VLLM_CACHE_ROOT" not in start.environment, "its own cache may be warm; ours would be empty at each start"
    assert start.view is not None
    start.view.remove()
    os.close(start.view.descriptor)


def test_a_daemon_that_says_for_ever_that_it_still_looks_is_waited_for_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = OldDaemon(tmp_path / "s", {"startup-begin": {"type": "progress"}})
    daemon.start()
    found = Wire(str(tmp_path / "s"))
    monkeypatch.setattr(wire, "time", SimpleNamespace(monotonic=iter(range(0, 10_000, 50)).__next__))
    found._pending = b'{"type": "progress"}\n' * 100  # more than it may say in that time
    with pytest.raises(DaemonUnreachable, match="within 75 s"):
        found.ask("startup-begin", seconds=15.0, at_most=75.0)
    found.close()


def test_a_pattern_that_no_process_looks_for_and_a_machine_without_threads_hold_no_output_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_process(*_: object, **__: object) -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "get_inheritable", lambda _: True)
    monkeypatch.setattr(os, "posix_spawn", no_process)
    listening = Listening(a_start(tmp_path, "--ready-log", "x"))
    listening.listen()
    copy = os.dup(listening.streams[1])  # the command's own
    listening.begin(())
    with open(copy, "wb") as command:
        command.write(b"y" * 300_000)  # more than a pipe takes
    listening.drain()
    said = capfd.readouterr()
    assert len(said.out) == 300_000 and "is not looked for" in said.err

    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    listening = Listening(a_start(tmp_path, "--ready-log", "x"))
    listening.listen()
    assert listening.streams == {}, "the command has our own output, then"
    listening.begin(())
    assert "is not looked at" in capfd.readouterr().err

    monkeypatch.setattr(os, "pipe2", no_process)
    assert Listening(a_start(tmp_path, "--ready-log", "x")).streams == {}


def test_an_engine_that_outlived_a_signal_and_crashed_later_did_not_end_as_asked() -> None:
    command = object.__new__(Command)
    command.asked_by = {signal.SIGHUP}
    assert command.was_asked_to_end(128 + signal.SIGHUP)
    assert not command.was_asked_to_end(128 + signal.SIGSEGV) and not command.was_asked_to_end(1)


def test_of_two_signals_the_second_does_not_end_what_the_first_began() -> None:
    command = object.__new__(Command)
    command._is_interrupted = False
    with pytest.raises(Interrupted):
        command._interrupted(signal.SIGTERM, None)
    command._interrupted(signal.SIGINT, None)
