"""The headline, in bench/gpu.py: weights on the mount, into device memory, beside the same from a plain directory.

A daemon is started with no network, no page and no HTTP, on whatever transport this machine has; where that is
passthrough it needs neither pyfuse3 nor a client of any origin. A file:// pipeline is filled from the checkpoint. Then
each loader is a process of its own, from its start to its last byte: stock safetensors, transformers, and prefetch (on
the mount the helper and the engine start at the same moment, as a replica starts them).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench import common, gpu_table
from bench.daemon import Daemon, daemon
from bench.gpu_watch import Pace, Skipped, last_words
from instantstart_fs.mount.kernel import why_no_passthrough

if TYPE_CHECKING:
    from bench.gpu import Run

ROOT = Path(__file__).resolve().parents[1]
NAME = "weights"
NEEDED = ("trio", "lmdb", "urllib3", "typer", "rich")
"""Packages without which a daemon does not serve a file:// pipeline."""
TIMEOUT = 120.0
"""Seconds for one loader."""
END_SECONDS = 4.0
"""That the daemon's end takes of the part's time."""

_BEGIN = """
import importlib.util, json, os, sys, time
from pathlib import Path
began = time.perf_counter()
import torch
place, device = sys.argv[1:]
files = [str(path) for path in sorted(Path(place).glob('*.safetensors'))]
"""
_TIMED = """
torch.empty(1, device=device)
torch.cuda.synchronize()
imported = time.perf_counter()
"""
_END = """
torch.cuda.synchronize()
ended = time.perf_counter()
total = 0
for tensor in kept:
    data = tensor.reshape(-1).view(torch.uint8)
    for at in range(0, len(data), 1 << 24):
        total += int(data[at : at + (1 << 24)].sum(dtype=torch.int64).item())
print(json.dumps({'imports': imported - began, 'load': ended - imported, 'sum': total, 'how': how}), flush=True)
os._exit(0)
"""
LOAD_FILE = f"""{_BEGIN}
from safetensors.torch import load_file
how = 'load_file(device)'
{_TIMED}
kept = [tensor for path in files for tensor in load_file(path, device=device).values()]
{_END}"""
TRANSFORMERS = f"""{_BEGIN}
from transformers import AutoModelForCausalLM
options = {{'device_map': device}} if importlib.util.find_spec('accelerate') else {{}}
how = 'device_map' if options else '.to(device): accelerate is not installed'
{common.DTYPE}
{_TIMED}
model = AutoModelForCausalLM.from_pretrained(place, local_files_only=True, **dtype, **options)
model = model if options else model.to(device)
kept = []
{_END}"""
STAGED = f"""{_BEGIN}
from instantstart_fs.prefetch import DirectorySource, load_state_dict
how = 'load_state_dict, staged by itself'
{_TIMED}
kept = load_state_dict('plain', device, source=DirectorySource(place)).values()
{_END}"""
TAKEN = f"""{_BEGIN}
from instantstart_fs.prefetch import load_state_dict
from instantstart_fs.prefetch.hold_protocol import held_pipelines
how = 'load_state_dict, taken from a hold'
{_TIMED}
name = Path(place).name
while name not in held_pipelines():
    if time.perf_counter() > imported + 60:
        sys.exit('nobody holds it after 60 s')
    time.sleep(0.002)
kept = load_state_dict(name, device).values()
{_END}"""


def measure(run: Run) -> dict[str, Any]:
    """All of it, as far as the time goes. What one loader cannot do is in ``problems``, and fails the part at the end.

    Raises AssertionError; Skipped where no daemon can serve."""
    if missing := [name for name in NEEDED if not installed(name)]:
        raise Skipped(f"the daemon needs {', '.join(missing)}")
    if os.geteuid() != 0:
        raise Skipped("mounting needs root")
    if (why := why_no_passthrough()) and not installed("pyfuse3"):
        raise Skipped(f"the daemon needs pyfuse3 where reads cannot pass through: {why}")
    if (free := shutil.disk_usage(run.directory).free) < run.total * 1.1 + (1 << 28):
        raise Skipped(f"the store needs {run.total} bytes of disk, and {free} are free")
    fuse_device()
    found: dict[str, Any] = {"bytes": run.total, "samples": {}, "problems": {}}
    run.result["parts"]["mount"] = found
    work = run.directory / "mount"
    work.mkdir(exist_ok=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # min_free: the checkpoint lies on the same disk, and nothing else is to be kept there.
    config = '[http]\nlisten = "off"\n\n[store]\nmin_free = "0"\n'
    with (
        short_directory() as sockets,
        daemon(
            work,
            config=config,
            env={"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "INSTANTSTART_SOCKET": f"{sockets}/d.sock"},
        ) as served,
    ):
        log = served.log.read_text().splitlines()
        found["transport"] = next((line.rpartition(" ")[2] for line in log if ", transport " in line), "?")
        found["pyfuse3"] = installed("pyfuse3")
        found["ready_after"] = round(served.ready_after, 3)
        served.cli("add", NAME, f"file://{run.files_at}")
        try:
            seconds, _ = served.cli("warm", NAME, "--wait", timeout=max(5.0, run.part_left - 5))
        except subprocess.TimeoutExpired as late:
            raise Skipped(f"no time left: the fill was not at its end after {late.timeout:.0f} s") from None
        found["fill_gb_s"] = round(run.total / seconds / 1e9, 2)
        run.write()
        Loaders(run, served, found, f"{sockets}/holds").all()
    found["mount_of_plain"] = gpu_table.mount_of_plain(found)
    assert not found["problems"], (
        f"{len(found['problems'])} loaders failed: {': '.join(next(iter(found['problems'].items())))}"
    )
    return found


class NoTime(Exception):
    """The part's time was up before a loader had ended."""


class NoCold(Exception):
    """The page cache cannot be emptied; the text says of what."""


class Loaders:
    def __init__(self, run: Run, served: Daemon, found: dict[str, Any], holds: str) -> None:
        self.run, self.served, self.found = run, served, found
        self.device = os.environ.get("BENCH_DEVICE", "cuda:0")
        self.places = {"plain": run.files_at, "mount": served.mount / NAME}
        self.env = {**served.env, "INSTANTSTART_PREFETCH_DIR": holds}
        self.pace = Pace(lambda: run.part_left - END_SECONDS)
        self.sum: int | None = None
        self.cold = True
        """Whether the page cache can be emptied."""

    def all(self) -> None:
        """Cold first, which is the headline; each once, and again while there is time."""
        for number in range(max(1, self.run.options.rounds - 1)):
            for temperature in ("cold", "warm"):
                loaders = list(self.loaders(temperature))
                for loader, work in loaders[:: -1 if number % 2 else 1]:
                    name = f"{loader}, {temperature}"
                    if name in self.found["problems"] or (temperature == "cold" and not self.cold):
                        continue
                    if not self.pace.allows(name):
                        self.run.not_run += [] if number else [f"mount: {name}: no time left"]
                        continue
                    with self.pace.timed(name):
                        self.one(name, work)

    def loaders(self, temperature: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        def by(code: str, place: str) -> Callable[[], dict[str, Any]]:
            return lambda: self.process(code, place, temperature)

        for place in ("plain", "mount"):
            yield f"load_file, {place}", by(LOAD_FILE, place)
        if installed("transformers"):
            for place in ("plain", "mount"):
                yield f"transformers, {place}", by(TRANSFORMERS, place)
        else:
            self.run.not_run.append(f"mount, {temperature}, transformers: is not installed")
        yield "prefetch, plain", by(STAGED, "plain")
        yield "prefetch, mount", lambda: self.held(temperature)
        if temperature == "warm":
            yield "taken when all was held, mount", lambda: self.held(temperature, before=True)

    def one(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            sample = work()
            self.same_bytes(sample)
        except NoTime:
            self.run.not_run.append(f"mount: {name}: no time left")
        except NoCold as reason:
            self.cold = False
            self.run.not_run.append(f"mount: cold: {reason}")
        except Exception as error:
            self.found["problems"][name] = str(error)[:1500] or type(error).__name__
            print(f"    {name}: {self.found['problems'][name]}", flush=True)
        else:
            self.found["samples"].setdefault(name, []).append(sample)
            rate = self.run.total / sample["load"] / 1e9
            print(f"    {name:<26} load {sample['load']:7.3f} s = {rate:6.2f} GB/s, whole {sample['whole']:.2f} s")
        self.run.write()

    def same_bytes(self, sample: dict[str, Any]) -> None:
        """Every loader that keeps all tensors has the same bytes. Raises AssertionError."""
        if sample["how"].startswith("load"):
            self.sum = sample["sum"] if self.sum is None else self.sum
            assert sample["sum"] == self.sum, f"the sum of its bytes is {sample['sum']}, and others had {self.sum}"

    def prepare(self, temperature: str) -> None:
        """Page cache empty or full for the plain files and for those on the mount, whose pages are the store's where
        reads pass through; of nothing else: the loaders' own libraries stay. Raises NoCold."""
        sizes = {path.stat().st_size for path in self.run.files}
        mounted = sorted((self.served.mount / NAME).glob("*.safetensors"))
        stored = [path for path in self.served.store.rglob("*") if path.is_file() and path.stat().st_size in sizes]
        assert len(stored) >= len(sizes), f"{len(stored)} files of the store have the weights' sizes"
        if temperature == "cold":
            deadline = time.monotonic() + 10
            while True:
                try:
                    common.evict([*self.run.files, *stored, *mounted])
                    return
                except RuntimeError as error:  # the daemon still reads ahead what the last loader opened
                    if time.monotonic() > deadline:
                        raise NoCold(str(error)) from None
                    time.sleep(0.2)
        else:
            from bench.gpu import remember

            remember([*self.run.files, *mounted])

    def process(self, code: str, place: str, temperature: str) -> dict[str, Any]:
        self.prepare(temperature)
        return self.python(code, str(self.places[place]))

    def python(self, code: str, place: str, helper: subprocess.Popen[str] | None = None) -> dict[str, Any]:
        """What it printed, and the ``whole`` of its time. ``helper``: who has to live, or to have ended well, for it to
        get anything. Raises RuntimeError, NoTime."""
        at = time.perf_counter()
        timeout = max(5.0, min(TIMEOUT, self.run.part_left - 3))
        process = subprocess.Popen(
            [sys.executable, "-c", code, place, self.device],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env,
        )  # fmt: skip
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if helper is not None and helper.poll():
                        raise RuntimeError(f"the helper ended with {helper.returncode}") from None
                    if time.perf_counter() > at + timeout:
                        raise (NoTime() if timeout < TIMEOUT else RuntimeError(f"not within {timeout:.0f} s")) from None
        finally:
            process.kill()
            process.communicate()
        whole = time.perf_counter() - at
        if process.returncode or not out.strip():
            raise RuntimeError(f"exit {process.returncode}: {last_words(err)}\n{err[-700:]}")
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return {**found, "whole": round(whole, 3)}

    def held(self, temperature: str, *, before: bool = False) -> dict[str, Any]:
        """The helper and the engine at the same moment, or (``before``) the engine once the helper has all in place;
        the hold must end by itself once all was taken."""
        self.prepare(temperature)
        command = [sys.executable, "-m", "instantstart_fs.cli", "prefetch", NAME, "--devices", self.device, "--hold"]
        with tempfile.TemporaryFile("w+") as said:  # no pipe, which the helper could fill while nobody reads it
            return self.held_by(command, said, before=before)

    def held_by(self, command: list[str], said: IO[str], *, before: bool) -> dict[str, Any]:
        at = time.perf_counter()
        helper = subprocess.Popen(command, env=self.env, stdout=said, stderr=said, text=True, start_new_session=True)

        def words() -> str:
            said.seek(0)
            return said.read()

        try:
            if before:
                self.wait_held(helper)
                at = time.perf_counter()
            sample = self.python(TAKEN, str(self.places["mount"]), helper)
            sample["whole"] = round(time.perf_counter() - at, 3)
            try:
                helper.wait(max(2.0, min(30.0, self.run.part_left)))
            except subprocess.TimeoutExpired:
                raise (NoTime() if self.run.part_left < 2 else RuntimeError("the hold does not end")) from None
            return {**sample, "helper": helper.returncode, "helper_said": words()[-600:]}
        except NoTime:
            raise
        except Exception as error:
            helper.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(10)
            raise RuntimeError(f"{error}; the helper said: {last_words(words())}\n{words()[-600:]}") from error
        finally:
            helper.kill()
            helper.wait()

    def wait_held(self, helper: subprocess.Popen[str]) -> None:
        """Wait until the helper has all in place. Raises RuntimeError, NoTime."""
        from instantstart_fs.errors import PrefetchError
        from instantstart_fs.prefetch.hold_client import HoldClient

        place = os.path.join(self.env["INSTANTSTART_PREFETCH_DIR"], f"{NAME}.sock")
        ends = time.monotonic() + max(1.0, min(TIMEOUT, self.run.part_left - 3))
        while helper.poll() is None:
            with contextlib.suppress(PrefetchError), HoldClient(NAME, place) as held:  # it does not listen yet
                if all(device.done for device in held.status().devices):
                    return
            if time.monotonic() > ends:
                raise NoTime
            time.sleep(0.05)
        raise RuntimeError(f"the helper ended with {helper.returncode}")


def short_directory() -> tempfile.TemporaryDirectory[str]:
    """A place for sockets: the name of one has 107 bytes at most, and the checkpoint may lie deep."""
    return tempfile.TemporaryDirectory(prefix="isfs-", dir="/tmp")


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def fuse_device() -> None:
    """Make /dev/fuse where the kernel has FUSE and nobody made its node."""
    if not os.path.exists("/dev/fuse"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["modprobe", "fuse"], capture_output=True, timeout=10, check=False)
            subprocess.run(["mknod", "/dev/fuse", "c", "10", "229"], capture_output=True, timeout=10, check=False)
