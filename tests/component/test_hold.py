"""Holder and HoldClient over a real socket, between processes; load_state_dict on top of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs import cli
from instantstart_fs.cli import prefetch_run
from instantstart_fs.errors import PermissionRefused, PrefetchError, UsageError
from instantstart_fs.prefetch import DirectorySource, Stage, Stager, load_state_dict, plan
from instantstart_fs.prefetch.hold_client import HoldClient
from instantstart_fs.prefetch.hold_protocol import held_pipelines
from instantstart_fs.prefetch.holder import Holder
from instantstart_fs.prefetch.messages import IpcHandle
from instantstart_fs.prefetch.staged import Exported
from tests.harness import REPOSITORY

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

NAME = "held"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / NAME
    root.mkdir()
    generator = torch.Generator().manual_seed(7)
    for part in (1, 2, 3):
        tensors = {f"layer{part}.{name}": torch.randn(64, 33, generator=generator) for name in ("a", "b")}
        save_file(tensors, root / f"model-0000{part}-of-00003.safetensors")
    return root


@pytest.fixture(params=[("cpu",)], ids=",".join)
def stage(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    source = DirectorySource(str(checkpoint))
    with Stager(source).start(plan(source.weights, None, request.param)) as staged:
        staged.wait(60)
        yield staged


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("INSTANTSTART_PREFETCH_DIR", str(tmp_path / "holds"))
    return str(tmp_path / "holds" / f"{NAME}.sock")


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [("cpu",), ("cpu", "cpu:1")], ids=",".join, indirect=True)
def test_another_process_takes_the_weights_and_the_hold_ends(checkpoint: Path, stage: Stage, place: str) -> None:
    """What that process writes into its tensors changes nobody else's."""
    program = f"""
import sys, torch
from instantstart_fs.prefetch import load_state_dict
from safetensors.torch import save_file
found = load_state_dict({NAME!r}, "cpu")
save_file(dict(found), sys.argv[1])
for tensor in found.values():
    tensor.zero_()
"""
    ours = {path: stage.file_tensors(path) for path in stage.paths}
    with Holder(stage, place) as holder:
        out = checkpoint.parent / "taken.safetensors"
        subprocess.run([sys.executable, "-c", program, out], cwd=REPOSITORY, check=True, timeout=60)
        assert equal(load_file(out), state_of(checkpoint))
        assert holder.wait_released(10) and stage.paths == ()
    assert equal({name: t for tensors in ours.values() for name, t in tensors.items()}, state_of(checkpoint))


def test_without_a_hold_the_weights_are_staged(checkpoint: Path, place: str) -> None:
    expected = state_of(checkpoint)
    assert equal(load_state_dict(NAME, source=DirectorySource(str(checkpoint))), expected)
    with pytest.raises(UsageError, match="no model"):
        load_state_dict(NAME, source=DirectorySource(str(checkpoint)), model="asr")


def test_a_second_engine_is_refused_and_a_dead_one_makes_room(stage: Stage, place: str) -> None:
    path = stage.paths[0]
    with Holder(stage, place):
        with HoldClient(NAME) as first:
            os.close(first.take(path).fd or -1)
            with HoldClient(NAME) as second, pytest.raises(PrefetchError, match="took these weights already"):
                second.take(path)
        with HoldClient(NAME) as third:
            deadline = 100
            while third.manifest().engines and deadline:
                deadline -= 1
            os.close(third.take(path).fd or -1)
            assert third.manifest().engines == 1


def test_what_a_killed_engine_had_open_is_taken_back_and_a_living_ones_is_not(
    stage: Stage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process counts none of its handles of device memory down."""
    path = stage.paths[0]
    handle = IpcHandle("GPU-1", "aa", 4096, 0, "bb", 7, "cc", event_sync=False)
    given = Exported(path, 4096, None, None, handle)
    monkeypatch.setattr(stage, "export", lambda _: given)
    back: list[Exported] = []
    taken_back = threading.Event()
    monkeypatch.setattr(stage, "abandoned", lambda exported: (back.append(exported), taken_back.set()))
    program = (
        "import sys; from instantstart_fs.prefetch.hold_client import HoldClient\n"
        "with HoldClient(sys.argv[1]) as held: held.take(sys.argv[2])\n"
        "print('closed', flush=True); sys.stdin.read()\n"
    )
    with Holder(stage, place) as holder:
        engine = subprocess.Popen(
            [sys.executable, "-c", program, NAME, path],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert engine.stdout is not None and engine.stdout.readline() == b"closed\n"
            with HoldClient(NAME) as other:
                while other.manifest().engines:  # until the holder has seen the end of the connection
                    pass
            assert not back and not taken_back.is_set()
        finally:
            engine.kill()
            engine.communicate()
        assert taken_back.wait(30) and back == [given]
        assert not holder.over


def test_every_rank_is_waited_for(stage: Stage, place: str) -> None:
    path = stage.paths[0]
    with Holder(stage, place, ranks=2), HoldClient(NAME) as one, HoldClient(NAME) as two:
        for engine in (one, two):
            os.close(engine.take(path).fd or -1)
        one.release_file(path)
        one.release_file(path)
        assert path in stage.paths and one.manifest().freed == 0
        two.release_file(path)
        assert path not in stage.paths and two.manifest().freed == 1


@pytest.mark.parametrize("device", ["mps", "cuda", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_none_is_refused_before_anything_is_taken(stage: Stage, place: str, device: str) -> None:
    with Holder(stage, place), HoldClient(NAME) as client:
        with pytest.raises(UsageError, match="is neither cpu nor cuda:N"):
            load_state_dict(NAME, device)
        assert client.manifest().engines == 0 and client.manifest().freed == 0


def test_freeing_much_memory_may_take_longer(stage: Stage, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(HoldClient, "wait_ended", lambda _, timeout: waits.append(timeout))
    monkeypatch.setattr(prefetch_run, "FREEING_RATE", 1000.0)
    with Holder(stage, place) as holder:
        prefetch_run.release(NAME)
        assert holder.over == "released"
    assert waits == [20.0 + stage.plan.total_bytes / 1000]


def test_only_its_own_user_is_answered(stage: Stage, place: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    with Holder(stage, place):
        # As if somebody had opened the way to it: the credentials still decide.
        os.chmod(place, 0o666)
        for directory in Path(place).parents:
            if directory.stat().st_uid == 0 and str(directory) not in ("/", "/tmp"):
                directory.chmod(directory.stat().st_mode | 0o055)
        # Who connects is answered before he asks.
        program = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1]); "
            "print(s.recv(4096).decode())"
        )
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", program, place],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert PermissionRefused.code in done.stdout and "65534" in done.stdout, done.stderr


def test_weights_held_by_another_user_are_not_taken(place: str, tmp_path: Path) -> None:
    """They could be anything: who owns the other end decides, not what it says."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    directory = tmp_path / "holds"
    directory.mkdir()
    os.chmod(directory, 0o777)
    program = (
        f"import os, socket; os.chdir({str(directory)!r}); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"s = socket.socket(socket.AF_UNIX); s.bind({os.path.basename(place)!r}); s.listen()\n"
        "print('ready', flush=True); s.accept()[0].recv(1)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            with pytest.raises(PermissionRefused, match="is held by uid 65534"):
                HoldClient(NAME)
        finally:
            other.kill()


def test_a_place_that_cannot_be_looked_at_is_not_taken_for_an_empty_one(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert held_pipelines() == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("INSTANTSTART_PREFETCH_DIR", str(tmp_path / "file"))
    assert cli.run(["prefetch", "status"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"instantstart: {tmp_path}/file: holds cannot be looked for: Not a directory\n")


def test_nobody_holds_it(place: str) -> None:
    with pytest.raises(PrefetchError, match="nobody holds"):
        HoldClient(NAME)


def test_a_hold_ends_when_its_memory_has_come_back_and_not_before(
    stage: Stage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that has freed the last file still refers to its tensors for a moment."""
    asked, back = threading.Event(), threading.Event()

    def wait_returned(timeout: float) -> bool:
        asked.set()
        return back.wait(timeout)

    monkeypatch.setattr(stage, "wait_returned", wait_returned)
    stage.wait(60)
    with Holder(stage, place) as holder, HoldClient("m", place) as client:
        for file in client.manifest().files:
            taken = client.take(file.path)
            if taken.fd is not None:
                os.close(taken.fd)
            client.release_file(file.path)  # the last one is answered, too
        assert asked.wait(10) and not holder.wait_released(0)
        back.set()
        assert holder.wait_released(10)
