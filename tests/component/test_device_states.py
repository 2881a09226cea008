"""What is said of a device with which something is wrong: one that is broken, taken, hidden, or behind an old driver.

On the fake device, which errs in the words of CUDA. The worker and the reading of its answer are the real ones; most
states share one process, since importing torch is what costs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instantstart_fs.prefetch import start
from instantstart_fs.prefetch.device_errors import explained
from tests.harness import REPOSITORY

WORKERS = """
import json, os, socket, sys, threading
import sitecustomize as fake
from instantstart_fs.prefetch import messages
from instantstart_fs.prefetch.messages import Load, Settings
from instantstart_fs.prefetch.worker import Worker

states, path = json.loads(sys.argv[1]), sys.argv[2]
found, before = {}, dict(os.environ)

def worker_in(state):
    os.environ.clear()
    os.environ.update(before)
    os.environ.update({name if name.isupper() and "_" in name else f"INSTANTSTART_FAKE_CUDA_{name}": value
                       for name, value in state.items() if name != "device"})
    fake._sticky.clear()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    settings = Settings(state.get("device", "cuda:0"), ("direct", "mmap"), readers=2)
    threading.Thread(target=Worker(theirs, settings).run, daemon=True).start()
    with ours:
        first = messages.from_worker.decode(ours.recv(1 << 16))
        if isinstance(first, messages.Failed):
            return first.message
        if first.refusals:
            return json.dumps([first.backend, first.refusals])
        fds = [os.open(path, os.O_RDONLY)]
        order = Load(1, "w.bin", os.path.getsize(path), 0, direct=False, memory=False)
        socket.send_fds(ours, [messages.encode(order)], fds)
        os.close(fds[0])
        while True:
            answer = messages.from_worker.decode(ours.recv(1 << 16))
            if isinstance(answer, messages.Failed):
                return answer.message
            if isinstance(answer, messages.Loaded):
                return "loaded"

for name, state in states.items():
    found[name] = worker_in(state)
print(json.dumps(found), flush=True)
os._exit(0)
"""

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading"
)
STATES: dict[str, tuple[dict[str, str], str]] = {
    # These two first: the threads of the others keep their page-locked memory.
    "no page-locked memory at all": (
        {"PINNED": "4096"},
        r'^\["mmap", \[\["direct", "no page-locked memory for the ring: CUDA error: out of memory"\]\]\]$',
    ),
    "page-locked memory for one reader": (
        {"PINNED": str(17 << 20)},
        r'^\["direct", \[\["direct with 2 readers", "no page-locked memory .*: CUDA error: out of memory"\]\]\]',
    ),
    "nothing wrong": ({}, r"^loaded$"),
    "a copy that fails after it was begun": (
        {"FAIL": "copy"},
        r"^CUDA error: an illegal memory access was encountered \(the GPU stopped this process; .*Xid",
    ),
    "memory that ECC cannot correct": (
        {"FAIL": "copy", "ERROR": "uncorrectable ECC error encountered"},
        r"^CUDA error: uncorrectable ECC error encountered \(the GPU's memory is damaged, .*nvidia-smi",
    ),
    "a GPU that is lost": (
        {"FAIL": "init", "ERROR": "GPU has fallen off the bus"},
        r"fallen off the bus \(the GPU is lost until the machine is restarted",
    ),
    "an error that nobody knows": ({"FAIL": "copy", "ERROR": "strange"}, r"^RuntimeError: CUDA error: strange$"),
    "a driver older than torch": (
        {"DRIVER": OLD_DRIVER},
        r"^cuda:0: torch \S+ finds no CUDA device here: The NVIDIA driver .*"
        r"\(the driver is older than this build of torch needs\)$",
    ),
    "a container with fewer devices": ({"GPUS": "2", "device": "cuda:2"}, r"^cuda:2: there are 2 CUDA devices$"),
    "devices that the environment hides": (
        {"GPUS": "2", "CUDA_VISIBLE_DEVICES": "GPU-fake-0001", "device": "cuda:1"},
        r"^cuda:1: there are 1 CUDA devices \(CUDA_VISIBLE_DEVICES is 'GPU-fake-0001'\)$",
    ),
    "a device that the environment names by its UUID": (
        {"GPUS": "2", "CUDA_VISIBLE_DEVICES": "GPU-fake-0001"},
        r"^loaded$",
    ),
    "a UUID that is not there": (
        {"CUDA_VISIBLE_DEVICES": "GPU-1234"},
        r"finds no CUDA device here: No CUDA GPUs are available; CUDA_VISIBLE_DEVICES is 'GPU-1234'$",
    ),
}


def python(program: str, directory: Path, *arguments: str, **state: str) -> str:
    """What a program prints, on the fake device."""
    paths = os.pathsep.join((str(REPOSITORY / "tests/fake_cuda"), str(REPOSITORY)))
    environment = {**os.environ, "PYTHONPATH": paths, "INSTANTSTART_FAKE_CUDA": str(directory / "device")}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment |= {f"INSTANTSTART_FAKE_CUDA_{name}": value for name, value in state.items()}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """State → what a worker in it says."""
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("states")
    weights = directory / "w.bin"
    weights.write_bytes(os.urandom(300_000))
    states = json.dumps({name: state for name, (state, _) in STATES.items()})
    found: dict[str, str] = json.loads(python(WORKERS, directory, states, str(weights)).splitlines()[-1])
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("state", STATES)
def test_what_is_wrong_with_a_device_is_said_with_what_it_means(said: dict[str, str], state: str) -> None:
    assert re.search(STATES[state][1], said[state]), said[state]


TWO = """
import json, os, sys
from instantstart_fs.errors import PrefetchError
from instantstart_fs.prefetch import DirectorySource, Stager, plan
source = DirectorySource(sys.argv[1])
with Stager(source).start(plan(source.weights, None, ["cuda:0"])) as stage:
    stage.wait(60)
    for state in json.loads(sys.argv[2]):
        os.environ.update(state)
        try:
            total = int(stage.bytes_of("w.bin").sum())
            print(json.dumps(total))
        except PrefetchError as error:
            print(json.dumps(error.message))
        for name in state:
            del os.environ[name]
"""


@pytest.mark.timeout(400)
def test_a_second_process_that_may_not_have_the_devices_memory_says_why(tmp_path: Path) -> None:
    """The stage's own process, whose worker has the memory: in compute mode Exclusive_Process, and behind MIG."""
    pytest.importorskip("torch")
    weights = tmp_path / "m" / "w.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"\1" * 300_000)
    prefix = "INSTANTSTART_FAKE_CUDA_"
    states: list[dict[str, Any]] = [{f"{prefix}EXCLUSIVE": "1"}, {f"{prefix}MIG": "another"}, {}]
    lines = python(TWO, tmp_path, str(weights.parent), json.dumps(states)).splitlines()
    exclusive, mig, good = map(json.loads, lines)
    assert "another process has this GPU for itself" in exclusive and "nvidia-smi -c DEFAULT" in exclusive, exclusive
    assert "does not let processes share memory" in mig and "MIG" in mig, mig
    assert good == 300_000


@pytest.mark.timeout(400)
@pytest.mark.parametrize("state", [{}, {"EXPANDABLE": "1"}], ids=["asked for", "by default"])
def test_memory_is_handed_over_though_the_engines_allocator_has_expandable_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, str]
) -> None:
    """They would be handed over by descriptors, which only a process that may trace the worker gets."""
    pytest.importorskip("torch")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if not state else ():
        monkeypatch.setenv(name, "expandable_segments:True")
    weights = tmp_path / "m" / "w.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"\1" * 300_000)
    assert json.loads(python(TWO, tmp_path, str(weights.parent), json.dumps([{}]), **state)) == 300_000


SMALL = """
import json, sys
from instantstart_fs.prefetch import DirectorySource, Stager, load_state_dict, plan
source = DirectorySource(sys.argv[1])
with Stager(source).start(plan(source.weights, None, ["cuda:0"])) as stage:
    stage.wait(60)
    found = {path: len(stage.bytes_of(path)) for path in stage.paths}
    found["tensors"] = sorted(stage.tensors("cuda:0"))
found["loaded"] = sorted(load_state_dict("m", "cuda:0", source=DirectorySource(sys.argv[1])))
print(json.dumps(found))
"""


@pytest.mark.timeout(400)
def test_files_with_no_bytes_or_no_tensors_are_in_the_way_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "m").mkdir()
    files = {"empty.bin": b"", "bare.safetensors": safetensors({}), "w.safetensors": safetensors({"w": 64})}
    for name, data in files.items():
        (tmp_path / "m" / name).write_bytes(data)
    found = json.loads(python(SMALL, tmp_path, str(tmp_path / "m"), MEMFD="1", LATE="abort"))
    assert found == {**{name: len(data) for name, data in files.items()}, "tensors": ["w"], "loaded": ["w"]}


def safetensors(tensors: dict[str, int]) -> bytes:
    """A file with tensors of so many bytes."""
    entries, data = {}, b""
    for name, size in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        data += os.urandom(size)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


LOADS = """
import json, logging, sys
from instantstart_fs.errors import PrefetchError
from instantstart_fs.prefetch import DirectorySource, load_state_dict, state_dict
logging.basicConfig(stream=sys.stdout, format="%(message)s")
state_dict.LeaseSource = lambda *_: DirectorySource(sys.argv[1])
found = load_state_dict("m", "cuda:0")
print(json.dumps({name: [str(tensor.device), tensor.tolist()] for name, tensor in found.items()}))
try:
    load_state_dict("m", "cuda:0", source=DirectorySource(sys.argv[1]))
except PrefetchError as error:
    print(json.dumps(error.message))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("call", ["share", "open"])
def test_where_processes_may_not_share_its_memory_weights_reach_a_gpu_by_way_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "m").mkdir()
    data = safetensors({"w": 64})
    (tmp_path / "m" / "w.safetensors").write_bytes(data)
    monkeypatch.setenv("INSTANTSTART_PREFETCH_DIR", str(tmp_path / "holds"))
    lines = python(LOADS, tmp_path, str(tmp_path / "m"), MEMFD="1", FAIL=call, ERROR="operation not supported")
    said, found, refused = lines.splitlines()
    assert said.startswith("m: staged to the CPU, and copied from there: ") and "operation not supported" in said
    assert json.loads(found) == {"w": ["cuda:0", list(data[-64:])]}
    assert "operation not supported" in json.loads(refused), "a source is used up"


GDS = """
import json, sys
from instantstart_fs.prefetch import DirectorySource, Stager, plan
source = DirectorySource(sys.argv[1])
with Stager(source, backend="gds").start(plan(source.weights, None, ["cuda:0"])) as stage:
    stage.wait(60)
    report = stage.progress()[0]
    equal = all(bytes(stage.bytes_of(path).tolist()) == open(f"{sys.argv[1]}/{path}", "rb").read()
                for path in stage.paths)
    print(json.dumps([report.backend, report.refusals, equal, report.bytes]))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("state", ["works", "fails"])
def test_what_cufile_cannot_read_after_all_is_read_by_another_backend_which_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "m").mkdir()
    for name in ("a.bin", "b.bin"):
        (tmp_path / "m" / name).write_bytes(os.urandom(300_000))
    (tmp_path / "cufile.json").write_text('{"properties": {"use_pci_p2pdma": true}}')
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "cufile.json"))
    backend, refusals, equal, count = json.loads(python(GDS, tmp_path, str(tmp_path / "m"), GDS=state))
    assert equal and count == 600_000
    if state == "works":
        assert (backend, refusals) == ("gds", [])
    else:
        ((name, why),) = refusals
        assert (backend, name) == ("direct", "gds") and why.startswith("cuFile failed at "), refusals
        assert "not supported on current file system" in why


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("CUDA error: invalid device context", "--pid=host"),
        ("CUDA error: invalid resource handle", "has ended, or is in another container"),
        ("CUDA error: mapping of buffer object failed", "does not fit this process"),
        ("pidfd_getfd: Operation not permitted", "expandable segments"),
        ("CUDA error: peer mapping resources exhausted", "as many others as it can be"),
        ("CUDA error: no kernel image is available for execution on the device", "has no code for this GPU"),
        ("Error 304: OS call failed or operation not supported on this OS", "/dev/nvidia-uvm"),
    ],
)
def test_what_keeps_memory_from_being_opened_is_said_with_its_remedy(error: str, says: str) -> None:
    found = explained(RuntimeError(f"{error}\nCompile with TORCH_USE_CUDA_DSA"), opening=not error.startswith("Error"))
    assert found.startswith(f"{error} (") and says in found and "DSA" not in found


def test_weights_that_go_to_the_cpu_though_there_is_a_gpu_are_not_staged_there_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> None:
        raise RuntimeError(f"{OLD_DRIVER}\nmore")

    torch = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 0, init=refuse))
    monkeypatch.setattr(start, "load_torch", lambda: torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(start, "DRIVER", str(tmp_path / "nvidiactl"))
    assert start.every_device() == ("cpu",)
    assert start.why_no_gpu() == "", "a machine without a GPU"
    (tmp_path / "nvidiactl").touch()
    assert "the driver is older than this build of torch needs" in start.why_no_gpu()
