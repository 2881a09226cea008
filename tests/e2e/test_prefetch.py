"""The prefetch helper against a real daemon: descriptors under a lease, a cold fill followed."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.common import evict, resident_bytes
from instantstart_fs import Client
from instantstart_fs.errors import ControlError, OutOfBudget, PipelineNotFound, PrefetchError, UsageError
from instantstart_fs.prefetch import LeaseSource, Stager, load_state_dict, plan, state_dict
from instantstart_fs.prefetch.hold_client import HoldClient
from tests.component.test_prefetch import write_safetensors
from tests.e2e.test_generations import config
from tests.e2e.test_generations import holding as reading
from tests.harness import MIB, REPOSITORY, Daemon, children, model_directory, run, safetensors_file, wait_for
from tests.servers.hub import HubServer


def staged(daemon: Daemon, pipeline: str, tmp_path: Path) -> dict[str, bytes]:
    source = LeaseSource(pipeline, str(daemon.socket))
    with Stager(source, timeout=30).start(plan(source.weights, None, ["cpu"])) as stage:
        stage.wait(60)
        assert daemon.status(pipeline)["leases"] == 1
        found = {}
        for path in stage.paths:
            exported = stage.export(path)
            assert exported.fd is not None
            try:
                found[path] = os.pread(exported.fd, exported.size, 0)
            finally:
                os.close(exported.fd)
    return found


def test_a_cold_pipeline_is_followed_and_a_warm_one_taken_at_once(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    wanted = {path.name: path.read_bytes() for path in model.glob("*.safetensors")}
    assert daemon.status("m")["state"] == "cold"
    assert staged(daemon, "m", tmp_path) == wanted
    assert staged(daemon, "m", tmp_path) == wanted
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")


@pytest.mark.parametrize("unsealed", ["auto", "never"])
def test_the_copy_begins_before_the_fill_is_done_and_nothing_is_used_before_it_is_proven(
    make_daemon: Callable[..., Daemon], hub: HubServer, tmp_path: Path, unsealed: str
) -> None:
    (tmp_path / "origin").mkdir()
    wanted = safetensors_file(tmp_path / "origin" / "model.safetensors", 6 * MIB + 100, 3).read_bytes()
    hub.publish("org/m", tmp_path / "origin")
    settings = config(hub)
    settings["fill"] = {"chunk_size": "1MiB", "serve_unsealed": unsealed}
    daemon = make_daemon(config=settings)
    daemon.ok("add", "m", "hf://org/m")
    # Two of its requests are not answered until the fault is lifted; each is a chunk.
    hub.fault("blackhole", port="cdn", method="GET", count=2)
    source = LeaseSource("m", str(daemon.socket))
    with Stager(source, timeout=60).start(plan(source.weights, None, ["cpu"])) as stage:
        wait_for(lambda: daemon.status("m")["cached_bytes"] >= 3 * MIB, "some of it", 60)
        if unsealed == "auto":
            wait_for(lambda: stage.progress()[0].bytes >= 2 * MIB, "the copy of what is there", 60)
        assert daemon.status("m")["state"] != "warm"
        with pytest.raises(PrefetchError, match="not in place"):
            stage.export("model.safetensors")
        if unsealed == "never":
            assert stage.progress()[0].bytes == 0
        hub.clear()
        stage.wait(120)
        exported = stage.export("model.safetensors")
        assert exported.fd is not None
        with open(exported.fd, "rb") as file:
            assert file.read(len(wanted)) == wanted
        assert stage.progress()[0].bytes == len(wanted), "nothing was read twice"


def test_while_it_is_leased_it_is_neither_evicted_nor_removed(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    source = LeaseSource("m", str(daemon.socket))
    try:
        files = source.files()
        opened = next(files)
        assert "lease" in daemon.refused(1, "evict", "m")
        assert "lease" in daemon.refused(1, "remove", "m")
        assert os.pread(opened.fd, opened.size, 0) == (model / opened.path).read_bytes()
        opened.close()
        for other in files:
            other.close()
        assert not source.wait_ended(0.05)
    finally:
        source.close()
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")
    daemon.ok("evict", "m")


def test_an_update_beneath_a_lease_changes_none_of_its_bytes(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    origin = model_directory(tmp_path / "origin", seed=1, weights=(3_000_000, 2_000_001))
    old = {path.name: path.read_bytes() for path in origin.glob("*.safetensors")}
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{origin}")
    source = LeaseSource("m", str(daemon.socket))
    opened = list(source.files())
    try:
        again = model_directory(tmp_path / "again", seed=2, weights=(3_000_000, 2_000_001))
        for path in again.glob("*.safetensors"):
            os.replace(path, origin / path.name)
        new = {name: (origin / name).read_bytes() for name in old}
        assert all(new[name] != old[name] for name in old)
        daemon.ok("update", "m")
        daemon.warm("m")
        assert {path.name: path.read_bytes() for path in daemon.path("m").glob("*.safetensors")} == new
        assert "lease" in daemon.refused(1, "evict", "m")
        assert {file.path: os.pread(file.fd, file.size, 0) for file in opened} == old
    finally:
        for file in opened:
            file.close()
        source.close()
    assert staged(daemon, "m", tmp_path) == new


def test_the_helper_runs_as_whoever_may_read_and_needs_nothing_of_the_store(
    make_daemon: Callable[..., Daemon], model: Path
) -> None:
    """As the owner, as a member of the group by a supplementary one (SO_PEERGROUPS), and as neither."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}", "--owner", "12345:23456", "--mode", "0550")
    daemon.warm("m")
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    blob = next(daemon.store.glob("slots/m/*/files/*.safetensors"))
    for directory in daemon.socket.parents:
        if directory.stat().st_uid == 0 and str(directory) not in ("/", "/tmp"):
            directory.chmod(directory.stat().st_mode | 0o011)

    environment = {**daemon.env, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), sysconfig.get_path("platlib")])}

    def tenant(uid: int, gid: int, groups: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
        become = ("setpriv", f"--reuid={uid}", f"--regid={gid}", f"--groups={groups}" if groups else "--clear-groups")
        return run(*become, *command, timeout=60, env=environment)

    # An interpreter below somebody's home is not everybody's; the system's may do.
    starts = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import msgspec'], check=True)"
    found = [
        python
        for python in (sys.executable, "/usr/bin/python3")
        if not tenant(1, 1, "", python, "-c", starts).returncode
    ]
    if not found:
        pytest.skip(f"another user may not run {sys.executable}")
    prefetch = (found[0], "-m", "instantstart_fs.cli", "prefetch", "m", "--devices", "cpu", "--json")
    for who in ((12345, 777, ""), (777, 777, "23456,5")):
        done = tenant(*who, *prefetch)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["bytes"] == total
        assert tenant(*who, "cat", blob).returncode != 0
    done = tenant(777, 777, "5", *prefetch)
    assert done.returncode == 1 and "uid 777 may not open m" in done.stderr
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the leases' end")


def test_the_page_cache_is_not_staged_into_while_a_prefetch_holds_its_lease(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Beside a pipeline that nobody prefetches, and whose shards are staged meanwhile."""
    shards = (8 * MIB,) * 3
    daemon = make_daemon()
    last = {}
    for seed, pipeline in enumerate(("leased", "other")):
        origin = model_directory(tmp_path / pipeline, seed=seed, weights=shards)
        daemon.ok("add", pipeline, f"file://{origin}")
        daemon.warm(pipeline)
        files = sorted(daemon.store.glob(f"slots/{pipeline}/*/files/*.safetensors"))
        os.sync()
        evict(files)
        last[pipeline] = files[-1]
    source = LeaseSource("leased", str(daemon.socket))
    first = [sorted(daemon.path(pipeline).glob("*.safetensors"))[0] for pipeline in last]
    with reading(first[0]), reading(first[1]):
        wait_for(lambda: resident_bytes(last["other"]) == 8 * MIB, "the other one's shards", 20)
        assert resident_bytes(last["leased"]) == 0
        source.close()
        wait_for(lambda: resident_bytes(last["leased"]) == 8 * MIB, "its shards, once the lease has ended", 20)


def test_an_unknown_pipeline_is_said(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    with pytest.raises(PipelineNotFound):
        LeaseSource("nothing", str(daemon.socket))


def test_the_command_shows_what_it_did(make_daemon: Callable[..., Daemon], model: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    (cold,) = json.loads(daemon.ok("prefetch", "m", "--devices", "cpu", "--json"))
    assert (cold["device"], cold["backend"], cold["bytes"], cold["total"]) == ("cpu", "direct", total, total)
    shown = daemon.ok("prefetch", "m", "--devices", "cpu,cpu:1", "--backend", "gds")
    assert "page cache" in shown and "cpu:1" in shown and "balanced" in shown
    refused = daemon.cli("prefetch", "m", "--devices", "cpu", "--backend", "gds")
    assert "backend gds refused: only for CUDA devices" in refused.stderr
    assert "tpu" in daemon.refused(2, "prefetch", "m", "--devices", "tpu:0")
    assert "nothing" in daemon.refused(1, "prefetch", "nothing", "--devices", "cpu")


VOICE = {"asr": (7_000_000,), "llm": (12_000_000, 11_000_003), "tts": (2_000_000,)}
"""Bytes of each model's shards: a voice agent in one pipeline."""
VOICE_BYTES = sum(map(sum, VOICE.values()))


@pytest.fixture
def voice(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    daemon = make_daemon()
    models = []
    for seed, (name, weights) in enumerate(VOICE.items()):
        origin = model_directory(tmp_path / "origin" / name, seed=seed, weights=weights)
        models += ["--model", f"{name}=file://{origin}"]
    daemon.ok("add", "voice", *models)
    daemon.warm("voice")
    return daemon


@pytest.mark.parametrize(
    ("deadlines", "order"), [({}, ["tts", "asr", "llm"]), ({"llm": 3.0, "asr": 5.0}, ["llm", "asr", "tts"])]
)
def test_all_models_of_a_pipeline_are_ready_within_reading_their_bytes_once(
    voice: Daemon, tmp_path: Path, deadlines: dict[str, float], order: list[str]
) -> None:
    """By real workers behind a slow disk: 6 MB/s, so 5.3 s for 32 MB in three models, and at most 1.1 times that."""
    rate = 6e6
    source = LeaseSource("voice", str(voice.socket), deadlines=deadlines)
    made = plan(source.weights, None, ["cpu"], deadlines=deadlines)
    with Stager(source, rate=rate).start(made) as stage:
        stage.wait(60)
        (report,) = stage.progress()
        ready = stage.ready_seconds()
        for path in stage.paths:
            exported = stage.export(path)
            assert exported.fd is not None
            assert os.pread(exported.fd, exported.size, 0) == (tmp_path / "origin" / path).read_bytes()
            os.close(exported.fd)
    started = report.seconds - report.loading  # the workers' own start
    assert report.bytes == VOICE_BYTES
    assert sorted(ready, key=lambda model: ready[model]) == order
    assert 0.7 * VOICE_BYTES / rate < max(ready.values()) - started <= 1.1 * VOICE_BYTES / rate
    assert ready[order[0]] - started < max(ready.values()) / 1.2


def test_files_come_in_the_order_of_the_schedule(voice: Daemon) -> None:
    for deadlines, order in (
        ({}, ["tts", "asr", "llm", "llm"]),
        ({"llm": 1.0}, ["llm", "llm", "tts", "asr"]),
        ({"asr": 5.0, "tts": math.inf}, ["asr", "tts", "llm", "llm"]),
    ):
        source = LeaseSource("voice", str(voice.socket), deadlines=deadlines)
        came = []
        for opened in source.files():
            came.append(opened.path.partition("/")[0])
            opened.close()
        source.close()
        assert came == order


def test_models_are_admitted_against_the_budget(voice: Daemon) -> None:
    """Smallest first, or as the deadlines say: what does not fit is refused as a whole, or left out by name."""
    for deadlines, refused in (({}, ("llm",)), ({"llm": 1.0}, ("tts", "asr"))):
        source = LeaseSource("voice", str(voice.socket))
        made = plan(source.weights, None, ["cpu"], deadlines=deadlines)
        with Stager(source, budget={"cpu": 23_500_000}, what_fits=True).start(made) as stage:
            stage.wait(60)
            assert stage.refused_models == refused
            assert set(stage.ready_seconds()) == set(VOICE) - set(refused)
            assert stage.progress()[0].bytes == sum(sum(VOICE[model]) for model in set(VOICE) - set(refused))
    source = LeaseSource("voice", str(voice.socket))
    with pytest.raises(OutOfBudget, match=r"cpu: 32000003 bytes needed, 23500000 may be taken"):
        Stager(source, budget={"cpu": 23_500_000}).start(plan(source.weights, None, ["cpu"]))
    wait_for(lambda: voice.status("voice")["leases"] == 0, "the end of the refused one's lease")
    shown = voice.ok("prefetch", "voice", "--devices", "cpu", "--deadline", "llm=1")
    ready = [line.split()[0] for line in shown.splitlines() if " ready after " in line]
    assert ready == sorted(VOICE)
    voice.ok("prefetch", "voice", "--devices", "cpu", "--deadline", "llm=inf")
    for word in ("llm=nan", "llm=-inf", "llm"):
        refused_ = voice.refused(2, "prefetch", "voice", "--devices", "cpu", "--deadline", word)
        assert f"{word!r} is not MODEL=SECONDS" in refused_
    with pytest.raises(UsageError, match="deadline of 'llm' is nan"):
        LeaseSource("voice", str(voice.socket), deadlines={"llm": math.nan})
    wait_for(lambda: voice.status("voice")["leases"] == 0, "the leases' end")
    assert "no model 'nlu'" in voice.refused(2, "prefetch", "voice", "--devices", "cpu", "--deadline", "nlu=1")


@contextmanager
def holding(daemon: Daemon, tmp_path: Path, *more: str, pipeline: str = "m") -> Iterator[subprocess.Popen[str]]:
    daemon.env["INSTANTSTART_PREFETCH_DIR"] = str(tmp_path / "hold")
    process = subprocess.Popen(
        [sys.executable, "-m", "instantstart_fs.cli", "prefetch", "--devices", "cpu", "--hold", *more, "--", pipeline],
        env={**os.environ, **daemon.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "held" not in (line := process.stdout.readline()):
            assert line, process.communicate(timeout=10)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_hold_is_taken_over_file_by_file(make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    with holding(daemon, tmp_path) as process:
        assert json.loads(daemon.ok("prefetch", "status", "m", "--json"))["files"] == 2
        place = str(tmp_path / "hold" / "m.sock")
        assert os.stat(place).st_mode & 0o777 == 0o600
        with HoldClient("m", place) as client:
            held = client.manifest()
            assert [file.path for file in held.files] == sorted(path.name for path in model.glob("*.safetensors"))
            for file in held.files:
                assert file.ready and file.layout is not None
                taken = client.take(file.path)
                assert taken.fd is not None
                assert os.pread(taken.fd, taken.size, 0) == (model / file.path).read_bytes()
                os.close(taken.fd)
                client.release_file(file.path)
                with pytest.raises(PrefetchError, match=r"released|ended|closed"):
                    client.take(file.path)
        assert process.wait(20) == 0  # all was taken and freed
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")


def test_a_hold_of_an_older_generation_is_not_taken_over(
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From a source without digests, whose next generation differs in its bytes alone."""
    torch = pytest.importorskip("torch")
    origin = tmp_path / "origin"
    safetensors_file(origin / "model.safetensors", 1_000_000, 1)
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{origin}")
    with holding(daemon, tmp_path) as process:
        for name in ("INSTANTSTART_PREFETCH_DIR", "INSTANTSTART_SOCKET"):
            monkeypatch.setenv(name, daemon.env[name])
        again = safetensors_file(tmp_path / "again" / "model.safetensors", 1_000_000, 2)
        new = again.read_bytes()
        os.replace(again, origin / "model.safetensors")
        daemon.ok("update", "m")
        found = load_state_dict("m")
        assert torch.equal(
            found["weight"], torch.frombuffer(bytearray(new[-len(found["weight"]) :]), dtype=torch.uint8)
        )
        assert "generation 1 is held, and 2 is current" in caplog.text
        assert json.loads(daemon.ok("prefetch", "status", "m", "--json"))["files"] == 1  # it was left alone
        assert process.poll() is None


def test_when_a_worker_dies_the_hold_ends_and_an_engine_stages_by_itself(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    path = safetensors_file(tmp_path / "origin" / "model.safetensors", 1_000_000, 1)
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{path.parent}")
    with holding(daemon, tmp_path) as process:
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert err.splitlines()[-1].startswith("instantstart: the worker of cpu was killed by SIGKILL")
        for name in ("INSTANTSTART_PREFETCH_DIR", "INSTANTSTART_SOCKET"):
            monkeypatch.setenv(name, daemon.env[name])
        assert daemon.ok("prefetch", "status") == "nothing is held\n"
        assert load_state_dict("m")["weight"].equal(load_file(path)["weight"])


def test_a_holder_killed_in_the_middle_of_a_hand_over_costs_no_tensor(
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    origin = tmp_path / "origin"
    origin.mkdir()
    wanted = {}
    for number, name in enumerate(("a", "b"), 1):
        path = origin / f"model-0000{number}-of-00002.safetensors"
        write_safetensors(path, {name: ("I32", [1000, 100])}, seed=number)
        wanted |= load_file(path)
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{origin}")
    with holding(daemon, tmp_path) as process:
        for variable in ("INSTANTSTART_PREFETCH_DIR", "INSTANTSTART_SOCKET"):
            monkeypatch.setenv(variable, daemon.env[variable])
        take, taken = state_dict.take, []

        def take_and_kill(held: HoldClient, path: str) -> dict[str, Any]:
            found = take(held, path)
            taken.append(path)
            process.kill()
            process.wait(10)
            return found

        monkeypatch.setattr(state_dict, "take", take_and_kill)
        found = load_state_dict("m")
    assert len(taken) == 1 and "what is held was not taken over" in caplog.text
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)


def test_a_hold_is_released(make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    with holding(daemon, tmp_path) as process:
        assert "held already" in daemon.refused(1, "prefetch", "m", "--devices", "cpu", "--hold")
        assert daemon.status("m")["leases"] == 1
        assert daemon.ok("prefetch", "release", "m") == "m: released\n"
        assert process.wait(20) == 0
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")


@pytest.mark.parametrize("json_", [True, False], ids=["json", "lines"])
@pytest.mark.parametrize("ends", ["release", "time"])
def test_a_hold_ends_while_its_weights_are_still_coming(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, tmp_path: Path, ends: str, json_: bool
) -> None:
    hub.publish("org/model", model)
    hub.fault("bandwidth", port="cdn", rate=32 * 1024)
    daemon = make_daemon(config=config(hub))
    daemon.ok("add", "m", "hf://org/model")
    place = tmp_path / "hold" / "m.sock"
    daemon.env["INSTANTSTART_PREFETCH_DIR"] = str(place.parent)
    options = [*(["--json"] if json_ else []), *(["--timeout", "1s"] if ends == "time" else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "instantstart_fs.cli", "prefetch", "m", "--devices", "cpu", "--hold", *options],
        env={**os.environ, **daemon.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if ends == "release":
            wait_for(place.exists, "the hold", 30)
            assert daemon.ok("prefetch", "release", "m", timeout=20) == "m: released\n"
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert out == ("m: released\n" if ends == "release" else "m: its time is up, released\n")
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")
    assert daemon.status("m")["state"] == "filling"


def test_verbs_speak_of_all_holds_of_one_and_of_a_pipeline_named_like_a_verb(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    for pipeline in ("m", "status"):
        daemon.ok("add", pipeline, f"file://{model}")
    daemon.env["INSTANTSTART_PREFETCH_DIR"] = str(tmp_path / "hold")
    assert daemon.ok("prefetch", "status") == "nothing is held\n"
    assert json.loads(daemon.ok("prefetch", "status", "--json")) == []
    for verb in ("status", "release"):
        assert "m: nobody holds it" in daemon.refused(1, "prefetch", verb, "m")
    refused = daemon.cli("prefetch", "status", "m", "--json")
    assert refused.returncode == 1 and json.loads(refused.stdout)["error"]["code"] == "prefetch"
    with holding(daemon, tmp_path) as first, holding(daemon, tmp_path, pipeline="status") as second:
        every = json.loads(daemon.ok("prefetch", "status", "--json"))
        assert [(held["pipeline"], held["pid"]) for held in every] == [("m", first.pid), ("status", second.pid)]
        shown = daemon.ok("prefetch", "status")
        assert "m: generation 1, 2 files held by pid" in shown and "status: generation 1" in shown
        assert "status: generation 1" in daemon.ok("prefetch", "status", "status")
        assert "m: generation" not in daemon.ok("prefetch", "status", "status")
        daemon.ok("prefetch", "release", "status")
        assert [held["pipeline"] for held in json.loads(daemon.ok("prefetch", "status", "--json"))] == ["m"]
        second.communicate(timeout=10)
        assert second.returncode == 0
        first.kill()
        first.wait(10)
        assert (tmp_path / "hold" / "m.sock").exists()  # what a killed holder leaves is no hold
        assert daemon.ok("prefetch", "status") == "nothing is held\n"
    for wrong in ((), ("release",), ("status", "--hold"), ("m", "status"), ("m", "--release")):
        assert daemon.cli("prefetch", *wrong).returncode == 2


def test_a_holder_that_says_nothing_keeps_the_others_shown(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    with holding(daemon, tmp_path), socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "hold" / "a.sock"))
        mute.listen()
        threading.Thread(target=lambda: [mute.accept()[0].close() for _ in range(2)], daemon=True).start()
        found = daemon.cli("prefetch", "status")
        assert found.returncode == 1 and "m: generation 1" in found.stdout and "the hold has ended" in found.stderr


def test_a_hold_ends_with_its_time(make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}", "--warm")
    with holding(daemon, tmp_path, "--timeout", "2s") as process:
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "time is up" in out


def test_a_hold_ends_with_its_lease(make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}", "--warm")
    with holding(daemon, tmp_path) as process:
        daemon.stop()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "lease has ended" in err
    daemon.start()


def test_the_client_stages_and_says_what_is_wrong(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    with Client(str(daemon.socket)) as client:
        for wrong in ("gpu", "cuda", ["cpu", "cpu"], []):
            with pytest.raises(UsageError, match="device"):
                client.prefetch("m", wrong)
        with pytest.raises(UsageError, match="deadline"):
            client.prefetch("m", "cpu", deadlines={"nobody": 1.0})
        with pytest.raises(UsageError, match="backend"):
            client.prefetch("m", "cpu", backend="magic")
        with pytest.raises(PipelineNotFound, match="did you mean 'm'"):
            client.prefetch("mm", "cpu")
        wait_for(lambda: daemon.status("m")["leases"] == 0, "the end of the refused ones' leases")
        stage = client.prefetch("m", "cpu")
    with stage:  # its client is closed, and it goes on
        stage.wait(60)
        assert daemon.status("m")["leases"] == 1
        assert set(stage.paths) == {path.name for path in model.glob("*.safetensors")}
        for path in stage.paths:
            exported = stage.export(path)
            assert exported.fd is not None
            with open(exported.fd, "rb") as file:
                assert file.read(exported.size) == (model / path).read_bytes()
    wait_for(lambda: daemon.status("m")["leases"] == 0, "the lease's end")
    with pytest.raises(ControlError, match="this client is closed"):
        client.prefetch("m", "cpu")
