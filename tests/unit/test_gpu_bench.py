"""bench/gpu.py when things go wrong: whatever fails, and wherever it is cut off, it says what it has."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench import gpu, gpu_mount, gpu_probe, staging
from bench.gpu import PARTS, CutOff, Late, Part, Run
from bench.gpu_mount import Loaders, NoTime
from bench.gpu_table import HELD
from bench.gpu_watch import Skipped
from tests.fake_cuda.sitecustomize import POINTS
from tests.harness import REPOSITORY
from tests.unit.test_gpu_table import FOUND

UNHEEDED = ("event",)
"""Where another backend goes on, and says why."""


def run(tmp_path: Path, **options: Any) -> Run:
    given = {"limit": 460.0, "out": str(tmp_path), "only": "", "contenders": "", **options}
    return Run(argparse.Namespace(**given), tmp_path)


def parts_where(bad: str, error: BaseException) -> list[Part]:
    """The bench's own, by name and in order; each measures one figure, and ``bad`` fails after that."""

    def work(name: str) -> Any:
        def measure(made: Run) -> dict[str, Any]:
            made.result["parts"][name] = {**FOUND[name], "figure": 1}
            if name == bad:
                raise error
            return {**FOUND[name], "figure": 1}

        return measure

    return [Part(part.name, work(part.name), part.needs) for part in PARTS]


@pytest.mark.parametrize("bad", [part.name for part in PARTS])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no\nmore"), AssertionError(), SystemExit(3)], ids=repr)
def test_a_part_that_fails_keeps_what_it_measured_and_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, error: BaseException
) -> None:
    made = run(tmp_path)
    made.all_parts(parts_where(bad, error))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["parts"]) == [part.name for part in PARTS]
    assert all(found["figure"] == 1 for found in written["parts"].values())
    assert [name for name, found in written["parts"].items() if "failed" in found] == [bad]
    assert len(written["failed"]) == 1 and not written["not_run"]
    shown = capsys.readouterr().out.splitlines()
    assert {part.name for part in PARTS} <= set(shown), "each has its rows in the table"


@pytest.mark.parametrize("bad", [part.name for part in PARTS])
@pytest.mark.parametrize("error", [CutOff(), KeyboardInterrupt()], ids=repr)
def test_cut_off_anywhere_it_prints_its_table_and_what_was_not_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, error: BaseException
) -> None:
    made = run(tmp_path)
    made.all_parts(parts_where(bad, error))
    names = [part.name for part in PARTS]
    after = names[names.index(bad) :]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [line.split(":")[0] for line in written["not_run"]] == after
    shown = capsys.readouterr().out.splitlines()
    assert [name for name in names if name in shown] == [name for name in names if name not in after[1:]]


def test_what_has_no_time_left_or_cannot_be_run_here_is_listed(tmp_path: Path) -> None:
    made = run(tmp_path, limit=16.0)
    made.all_parts(parts_where("environment", Skipped("there is none")))
    assert made.not_run[0] == "environment: there is none"
    assert {line.split(":")[0] for line in made.not_run[1:]} == {part.name for part in PARTS if part.needs > 16} - {
        "environment"
    }


def test_single_parts_can_be_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, only="equality, rivals")
    made.all_parts(parts_where("", RuntimeError()))
    assert list(made.result["parts"]) == ["environment", "checkpoint", "equality", "rivals"]
    assert not [part.name for part in PARTS if "," in part.name], "it could not be asked for"
    with pytest.raises(SystemExit, match="no part is named 'warp'"):
        run(tmp_path, only="warp").all_parts(PARTS)


def test_checkpoints_do_not_lie_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual place for temporary files is one, on many machines: it has no cold reads."""
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path))
    kinds = {tmp_path: "tmpfs", gpu.ROOT: "ext4"}
    monkeypatch.setattr(gpu, "filesystem", lambda path: kinds.get(path, "tmpfs"))
    assert gpu.roomy(1) == str(gpu.ROOT)
    kinds[tmp_path] = "ext4"
    assert gpu.roomy(1) == str(tmp_path)
    assert gpu.roomy(1 << 60) == str(tmp_path), "there is no better one"


def test_what_must_be_known_first_is_run_first() -> None:
    names = [part.name for part in PARTS]
    order = ["environment", "equality", "speed", "hand-over by share", "killed while loading", "rivals"]
    assert [name for name in names if name in order] == order


def test_the_gpu_tests_start_with_nothing_but_pytest() -> None:
    """On a bare machine there is no pytest-trio: an unknown ini key, and warnings as errors, ended the run there."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-c", "tests/gpu/bare.ini", "tests/gpu", "-q",
            "-p", "no:trio", "-p", "no:timeout", "-p", "no:xdist", "-p", "no:hypothesispytest",
            "-W", "error::pytest.PytestConfigWarning",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_would_not_end_in_a_parts_time_is_not_begun_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine: what was measured before would be a failed part's."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model.safetensors").write_bytes(bytes(1000))
    made = run(tmp_path, rounds=3)
    cuda = SimpleNamespace(mem_get_info=lambda _: (1 << 30, 1 << 30), empty_cache=lambda: None)
    made.__dict__["torch"] = SimpleNamespace(empty=lambda size, **_: b"", uint8=None, cuda=cuda)
    for name in ("forget", "remember"):
        monkeypatch.setattr(gpu, name, lambda _: None)
    monkeypatch.setattr(gpu, "h2d_ceiling", lambda *_: 1.0)

    def takes(seconds: float) -> gpu.Contender:
        def load(*_: object) -> tuple[float, float, str]:
            if made.part_left < seconds:
                raise Late
            made.part_ends -= seconds
            return seconds, seconds, ""

        return load

    contenders = {"direct": takes(10), "load_file": takes(20), "mmap": takes(20)}
    monkeypatch.setattr(made, "contenders", lambda **_: contenders)
    made.all_parts([Part("speed", lambda made: made.speed(), 10, 70)])
    found = made.result["parts"]["speed"]
    assert not made.failed and made.not_run == ["speed: cold mmap: no time left", "speed: warm mmap: no time left"]
    assert {name: len(values) for name, values in found["samples"]["cold"].items()} == {"direct": 1, "load_file": 1}
    assert found["medians"]["warm"].keys() == {"direct", "load_file"}
    made.not_run.clear()
    made.all_parts([Part("speed", lambda made: made.speed(), 10, 170)])  # a round takes 100 s
    found = made.result["parts"]["speed"]
    assert not made.failed and not made.not_run and found["rounds"] == 1
    assert {len(values) for values in found["samples"]["cold"].values()} == {1}


def test_a_loader_of_the_mount_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    made = SimpleNamespace(
        part_left=65.0, files_at=tmp_path, directory=tmp_path, not_run=[], options=SimpleNamespace(rounds=3)
    )
    found: dict[str, Any] = {"problems": {}}
    loaders = Loaders(cast(Any, made), cast(Any, SimpleNamespace(env={}, mount=tmp_path)), found, str(tmp_path))
    begun: list[str] = []

    def one(name: str, work: object) -> None:
        begun.append(name)
        made.part_left -= 20

    loaders.loaders = lambda temperature: iter([("a", dict), ("b", dict)])  # type: ignore[method-assign]
    loaders.one = one  # type: ignore[method-assign]
    loaders.all()
    assert begun == ["a, cold", "b, cold"] and made.part_left > 0
    assert made.not_run == ["mount: a, warm: no time left", "mount: b, warm: no time left"]


@pytest.mark.timeout(60)
def test_a_process_that_says_much_on_stderr_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds: it waited for a reader until the part's time was up."""
    program = tmp_path / "program.py"
    much = "import sys\nsys.stderr.write('a line\\n' * 50_000)\nprint('{\"figure\": 1}', flush=True)\n"
    monkeypatch.setattr(gpu_probe, "__file__", str(program))
    made = cast(Any, SimpleNamespace(part_left=22.0, not_run=[], options=SimpleNamespace(rounds=1)))
    program.write_text(much)
    assert list(gpu_probe.lines(made, "ring")) == [{"figure": 1}] and not made.not_run
    program.write_text(much + "sys.exit('its last words')\n")
    with pytest.raises(AssertionError, match="ring: exit 1: its last words"):
        list(gpu_probe.lines(made, "ring"))


@pytest.mark.timeout(60)
def test_a_helper_that_says_much_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(part_left=40.0, files_at=tmp_path, directory=tmp_path)
    loaders = Loaders(cast(Any, made), cast(Any, SimpleNamespace(env=dict(os.environ), mount=tmp_path)), {}, "")
    there = tmp_path / "there"
    helper = f"print('a line\\n' * 50_000, flush=True)\nopen({str(there)!r}, 'w').close()"
    waits = f"import os, time\nwhile not os.path.exists({str(there)!r}): time.sleep(0.01)\nprint('{{}}')"
    monkeypatch.setattr(gpu_mount, "TAKEN", waits)
    with tempfile.TemporaryFile("w+") as said:
        sample = loaders.held_by([sys.executable, "-c", helper], said, before=False)
    assert sample["helper"] == 0 and sample["helper_said"].endswith("a line\n\n")


def test_the_filesystem_of_a_path_is_that_of_the_mount_over_it(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        "2 1 0:9 / /mnt/a rw shared:1 - tmpfs tmpfs rw\n"
        "3 1 0:8 / /mnt/with\\040space rw - xfs /dev/b rw\n"
        "4 1 0:7 / /mnt/with\\040space rw - btrfs /dev/c rw\n"
    )
    places = ("/mnt/ab", "/mnt/a", "/mnt/a/b", "/", "/mnt/with space/x")
    assert [gpu.filesystem(Path(place), str(table)) for place in places] == ["ext4", "tmpfs", "tmpfs", "ext4", "btrfs"]
    assert gpu.filesystem(tmp_path) != "?"


@pytest.mark.parametrize(("release", "word"), [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.0.0rc1", "dtype")])
@pytest.mark.parametrize("program", [gpu_mount.TRANSFORMERS, staging.FROM_PRETRAINED], ids=["mount", "staging"])
def test_every_release_of_transformers_is_told_the_type_by_its_own_word(
    tmp_path: Path, program: str, release: str, word: str
) -> None:
    """What an older one does not know it hands to the model, which refuses it; it would load float32 without."""
    (tmp_path / "torch.py").write_text(
        "bfloat16, int64, uint8 = 'bfloat16', 0, 0\ndef empty(*_, **__): pass\n"
        "class cuda:\n    synchronize = staticmethod(empty)\n"
    )
    (tmp_path / "transformers.py").write_text(
        f"__version__ = {release!r}\nclass AutoModelForCausalLM:\n    @classmethod\n"
        f"    def from_pretrained(cls, place, *, {word}, **options):\n        assert {word} == 'bfloat16'\n"
        "        return cls()\n    def to(self, _): return self\n    def parameters(self): return []\n"
        "LlamaForCausalLM = AutoModelForCausalLM\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "cuda:0"][: 5 if "device" in program else 4],
        input="\n", capture_output=True, text=True, timeout=50, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


LIMIT = 1500
"""Seconds for one run of the whole bench on the fake device: 15 times what it takes on two quiet cores."""


def on_the_fake_device(
    directory: Path, *arguments: str, files: Path | None = None, **env: str
) -> tuple[int, str, dict[str, Any]]:
    """bench/gpu.py as a process, on tests/fake_cuda: its exit status, what it printed, and gpu.json."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "tests/fake_cuda"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "bench/gpu.py", "--size", "0.0625GiB", "--shards", "2", "--rounds", "1"]
    # A part's deadline is one for a machine with a GPU; here others use the processors, too.
    command += ["--patience", "20", "--limit", str(LIMIT)]
    done = subprocess.run(
        [*command, "--dir", files or directory, "--out", directory, *arguments],
        capture_output=True, text=True, timeout=LIMIT + 60, check=False, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "INSTANTSTART_FAKE_CUDA": str(directory / "device"), **env},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads((directory / "gpu.json").read_text())


def test_one_command_runs_it_and_tells_what_a_machine_without_a_gpu_leaves_out(tmp_path: Path) -> None:
    done = subprocess.run(
        ["scripts/gpu", "--limit", "60"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False,
        env={
            **os.environ, "INSTANTSTART_PYTHON": sys.executable, "OUT": str(tmp_path / "out"),
            "INSTANTSTART_GPU_WHEELS": str(tmp_path / "none"),
        },
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert {line.partition(":")[0] for line in json.loads((tmp_path / "out/gpu.json").read_text())["not_run"]} == {
        part.name for part in PARTS
    }
    assert done.stdout.startswith("no GPU: torch")
    assert [line.strip() for line in done.stdout.splitlines()[1:]] == [part.name for part in PARTS]


def test_a_wheel_of_another_python_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The one command is run where the wheels were not chosen for."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/instanttensor-0.2.2-cp27-cp27m-linux_x86_64.whl").touch()
    done = subprocess.run(
        ["scripts/gpu", "--limit", "60"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False,
        env={
            **os.environ, "INSTANTSTART_PYTHON": sys.executable, "OUT": str(tmp_path / "out"),
            "INSTANTSTART_GPU_WHEELS": str(tmp_path / "wheels"),
        },
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert re.search(r"^gpu: left out: .*instanttensor-0\.2\.2-cp27.* not a supported wheel", done.stdout), done.stdout


def test_every_byte_is_equal_on_a_fake_device(tmp_path: Path) -> None:
    """The stage, its worker's page-locked ring, and CUDA's IPC: from files to tensors of this process, which lets go of
    them before the worker ends."""
    status, text, found = on_the_fake_device(
        tmp_path, "--only", "equality,peers,two releases of torch", INSTANTSTART_FAKE_CUDA_LATE="abort"
    )
    assert status == 0, text
    assert [line.partition(":")[0] for line in found["not_run"]] == ["peers", "two releases of torch"], "of one device"
    assert found["parts"]["equality"]["backend"] == "direct"
    assert found["parts"]["equality"]["equal_bytes"] >= 2**26, found


def test_a_second_environment_that_is_of_no_use_is_told(tmp_path: Path) -> None:
    """One of another Python, which finds the wheels of this one, say."""
    from bench.gpu_probe import unusable

    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho Traceback >&2\necho \"ImportError: no module named 'msgspec'\" >&2\nexit 1\n")
    program.chmod(0o755)
    assert unusable(str(program)) == "ImportError: no module named 'msgspec'"
    assert "No such file" in unusable(str(tmp_path / "none"))
    assert unusable(sys.executable) == ""


@pytest.mark.timeout(40)
def test_an_engine_does_not_wait_for_a_helper_that_has_ended(tmp_path: Path) -> None:
    served = SimpleNamespace(env=dict(os.environ), mount=tmp_path)
    made = SimpleNamespace(part_left=100.0, files_at=tmp_path, directory=tmp_path)
    loaders = Loaders(cast(Any, made), cast(Any, served), {}, str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True) as helper:
        held = "import time\nwhile True: time.sleep(1)"
        with pytest.raises(RuntimeError, match="the helper ended with 3"):
            loaders.python(held, "m", helper)
    assert loaders.python("print('{}')", "m", helper=None)["whole"] >= 0
    made.part_left = 0.0
    with pytest.raises(NoTime):
        loaders.python(held, "m")


@pytest.fixture
def older_torch(tmp_path: Path) -> str:
    """An interpreter whose torch says that it is 2.11, and knows no newer format of handles than that one did."""
    path = tmp_path / "python-of-2.11"
    state = "INSTANTSTART_FAKE_CUDA_FORMAT=2 INSTANTSTART_FAKE_CUDA_TORCH=2.11.0"
    path.write_text(f'#!/bin/sh\n{state} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def driver(tmp_path: Path) -> str:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, REPOSITORY / "tests/fake_cuda/libcuda.c"], check=True)
    return str(library)


@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 100)
def test_the_whole_bench_runs_on_fake_devices(tmp_path: Path, older_torch: str, driver: str) -> None:
    status, text, found = on_the_fake_device(
        tmp_path,
        *("--other-python", older_torch),
        INSTANTSTART_FAKE_CUDA_GPUS="2",
        INSTANTSTART_LIBCUDA=driver,
    )
    assert status == 0, text
    parts = found["parts"]
    assert not found["failed"], found["failed"]
    lacking = [line for line in found["not_run"] if "is not installed" not in line]
    assert [line.partition(": ")[0] for line in lacking] == ["speed"] and "without cuFile" in lacking[0], lacking
    assert parts["hand-over by share"]["ratio"] <= 1.05
    releases = parts["two releases of torch"]
    assert (releases["there"], releases["given"], releases["taken"]) == ("2.11.0", "opened, equal", "opened, equal")
    assert parts["peers"]["reaches"] == {"0→1": True, "1→0": True} and parts["peers"]["opened_on"] == 0
    assert parts["peers"]["taken_on_the_owner"] == 0, "a context was made there"
    assert len(parts["page-locking"]) == 3 + 1 and len(parts["sweep"]["warm"]) == 9, parts
    assert parts["startup"]["driver"]["context"] >= 0
    assert parts["killed while another has it open"]["late_close"] == "harmless"


@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.parametrize(
    ("part", "state", "says"),
    [
        ("peers", {"GPUS": "2", "PEERS": "0"}, ""),
        ("page-locking", {"PINNED": str(48 << 20)}, ""),
        ("two releases of torch", {"MIG": "1"}, "does not let processes share memory"),
        ("equality", {"EXCLUSIVE": "1"}, "another process has this GPU for itself"),
    ],
    ids=str,
)
def test_a_part_on_a_device_with_a_limit(
    tmp_path: Path, older_torch: str, part: str, state: dict[str, str], says: str
) -> None:
    env = {f"INSTANTSTART_FAKE_CUDA_{name}": value for name, value in state.items()}
    if part == "two releases of torch":
        program = Path(older_torch)
        program.write_text(program.read_text().replace(" exec", " INSTANTSTART_FAKE_CUDA_MIG=2 exec"))
    status, text, found = on_the_fake_device(tmp_path, "--only", part, "--other-python", older_torch, **env)
    assert status == (1 if says == "another process has this GPU for itself" else 0), text
    assert says in text, text
    if part == "peers":
        assert found["parts"]["peers"]["opened_on"] == 1 and found["parts"]["peers"]["reaches"]["0→1"] is False
    if part == "page-locking":
        measured = found["parts"]["page-locking"]["memfd"]
        assert "lock_gb_s" in measured[0] and measured[-1]["refused"] == 2, measured


@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 100)
def test_where_the_page_cache_cannot_be_emptied_what_is_warm_is_measured(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        arguments = ("--only", "speed", "--contenders", "direct,load_file")
        status, text, found = on_the_fake_device(tmp_path, *arguments, files=Path(memory))
    assert status == 0, text
    samples = found["parts"]["speed"]["samples"]
    assert set(samples["warm"]) == {"direct", "load_file"} and not samples["cold"]
    (line,) = found["not_run"]
    assert line.startswith("speed: cold: ") and "stay in the page cache" in line


BARE = "pyfuse3,boto3,botocore,awscrt,blake3,hypercorn,starlette,h2,wsproto"


@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 100)
def test_weights_on_the_mount_reach_the_device_on_a_machine_without_pyfuse3(tmp_path: Path) -> None:
    """By each loader, cold and warm, the same bytes as from a plain directory; in one whose name is too long for a
    socket's."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    status, text, found = on_the_fake_device(tmp_path, "--only", "mount", files=deep, INSTANTSTART_FAKE_MISSING=BARE)
    assert status == 0, text
    mount = found["parts"]["mount"]
    assert (mount["transport"], mount["problems"], mount["pyfuse3"]) == ("passthrough", {}, False)
    loaders, places = ("load_file", "transformers", "prefetch"), ("plain", "mount")
    every = {f"{loader}, {place}, {how}" for loader in loaders for place in places for how in ("cold", "warm")}
    every.add(HELD)
    assert {name for name in mount["samples"] if "transformers" not in name} == {
        name for name in every if "transformers" not in name
    }
    assert len({sample["sum"] for taken in mount["samples"].values() for sample in taken if sample["sum"]}) == 1


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_sigterm_to_the_one_command_leaves_a_table_and_a_file(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "tests/fake_cuda"), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        ["scripts/gpu", "--size", "0.0625GiB", "--shards", "2", "--dir", str(tmp_path)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "INSTANTSTART_PYTHON": sys.executable, "OUT": str(tmp_path), "PYTHONPATH": path,
            "INSTANTSTART_FAKE_CUDA": str(tmp_path / "device"), "INSTANTSTART_GPU_WHEELS": str(tmp_path / "none"),
        },
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("--- speed"):
                process.terminate()
    assert "speed: SIGTERM came first" in said and "rivals: SIGTERM came first" in said, said
    assert "equality" in json.loads((tmp_path / "gpu.json").read_text())["parts"]


@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.parametrize("point", POINTS)
def test_wherever_the_device_fails_the_others_parts_are_run_and_the_table_is_printed(
    tmp_path: Path, point: str
) -> None:
    # transformers has no part of ours, and takes a quarter of the time.
    state = {"INSTANTSTART_FAKE_CUDA_FAIL": point, "INSTANTSTART_FAKE_MISSING": "transformers"}
    status, text, found = on_the_fake_device(tmp_path, **state)
    assert status == (0 if point in UNHEEDED else 1), text
    assert {*found["parts"], *(line.partition(": ")[0] for line in found["not_run"])} >= {part.name for part in PARTS}
    assert not [line for line in found["not_run"] if "no time left" in line or "came first" in line], found
    # A copy that fails late is told in CUDA's own words, as is all that the process does afterwards.
    says = "an illegal memory access was encountered" if point == "copy" else f"{point} failed, as it was told to"
    assert says in text, text
