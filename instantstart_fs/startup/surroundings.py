"""Makes the key of a startup cache: the engine's versions, the machine's processor and devices, the command.

It does so without running the engine's interpreter: names of installed distributions are names of directories. Nothing
here takes more than a few milliseconds on a machine without NVIDIA's driver; with it, asking NVML takes what loading it
takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from instantstart_fs.core.enginetable import (
    Engine,
    config_files,
    is_key_package,
    is_key_variable,
    key_arguments,
    ranks_of,
    short_digest,
    storable,
)
from instantstart_fs.errors import UsageError

FORMAT = "4"
"""Of the key: raised when what is in it means something else."""
NVML_SECONDS, PROC_SECONDS = 10.0, 3.0
"""Seconds for an answer of NVML, and of each of the driver's own files: a driver that hangs holds who asks for ever."""
NVIDIA = "/proc/driver/nvidia"
MAX_CONFIG = 16 * 1024 * 1024
"""Bytes of a file of options that are looked at, beside its size."""
_T = TypeVar("_T")


def key_of(
    command: Sequence[str], engine: Engine | None, environment: Mapping[str, str], caches: Sequence[str] = ()
) -> dict[str, str]:
    """Field → value, all that makes compiled code another but what the daemon knows (the pipeline's owner and
    generation). Where a version cannot be found, the program's own file stands for it. ``caches``: directories that the
    user named."""
    name = engine.name if engine is not None else ""
    key = {
        "format": FORMAT,
        "engine": name,
        "arguments": key_arguments(command, name),
        "ranks": str(ranks_of(command, name)),
        "machine": os.uname().machine,
        "caches": shlex.join(caches),
    }
    for at, path in enumerate(config_files(command), 1):
        key[f"config {at}"] = _contents(path)
    program = _on_path(command[0], environment)
    interpreter = interpreter_of(command, program)
    if not interpreter:  # a script, say, that starts the engine later: by the Python that it will find
        interpreter = _on_path("python3", environment) or _on_path("python", environment)
    known = packages(interpreter, engine, environment) if interpreter else {}
    for package, version in known.items():
        key[f"package {package}"] = version
    if interpreter:
        key["interpreter"] = _identity(interpreter)
    if program and not (engine is not None and any(package in known for package in engine.packages)):
        key["program"] = _identity(program)
    for variable, value in environment.items():
        if is_key_variable(variable):
            key[f"environment {variable}"] = short_digest(value)  # it may be a secret, whatever its name
    key.update(toolchain(environment))
    key.update(processor())
    key.update(devices(environment))
    return storable(key)


def _contents(path: str) -> str:
    """What the engine reads there, by its digest: secrets may be in it. Raises UsageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO gives nothing, and is not waited for
        with open(fd, "rb") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return hashlib.sha256(file.read(MAX_CONFIG)).hexdigest() + f" {os.fstat(fd).st_size}"
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    raise UsageError(f"{path} is no regular file, and is read by the engine alone")


def _identity(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return path
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def _on_path(word: str, environment: Mapping[str, str]) -> str:
    """The file that a command's first word names, "" where there is none."""
    if "/" in word:
        return os.path.abspath(word)
    for directory in environment.get("PATH", os.defpath).split(":"):
        found = os.path.join(directory, word)
        if os.access(found, os.X_OK) and os.path.isfile(found):
            return found
    return ""


def interpreter_of(command: Sequence[str], program: str) -> str:
    """The Python that runs it: the program itself, or what its first line names; "" where there is none."""
    if not program:
        return ""
    if os.path.basename(program).startswith("python"):
        return program
    try:
        with open(program, "rb") as file:
            lines = file.read(1024).split(b"\n")
    except OSError:
        return ""
    words = lines[0][2:].split() if lines[0].startswith(b"#!") else []
    if not words:
        return ""
    first = os.fsdecode(words[0])
    base = os.path.basename(first)
    if base.startswith("python"):
        return first
    if base == "env" and len(words) > 1 and os.fsdecode(words[1]).startswith("python"):
        return _on_path(os.fsdecode(words[1]), os.environ)
    if base == "sh" and len(lines) > 1 and lines[1].startswith(b"'''exec' "):  # pip's way for long paths
        return os.fsdecode(lines[1][9:].split(b" ")[0].strip(b"\"'"))
    return ""


def packages(interpreter: str, engine: Engine | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Name → version of the installed distributions that matter. Of one that lies in several places, every version, in
    the order of the places: which of them the interpreter takes is not known here, and each may be the one."""
    found: dict[str, list[str]] = {}
    for directory in site_directories(interpreter, environment):
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for entry in names:
            if entry.endswith((".dist-info", ".egg-info")):  # the latter by apt and conda
                name, _, version = entry.rpartition(".")[0].partition("-")
                name = name.lower().replace("_", "-").replace(".", "-")
                if is_key_package(name, engine):
                    found.setdefault(name, []).append(version)
    return {name: " ".join(dict.fromkeys(versions)) for name, versions in found.items()}


def site_directories(interpreter: str, environment: Mapping[str, str]) -> list[str]:
    """Return where that Python's distributions lie, those that come first on its path last: its own prefix, the user's
    directory (`pip install --user`) where it looks there, and PYTHONPATH (`pip install --target`)."""
    prefix = os.path.dirname(os.path.dirname(interpreter))
    found: list[str] = []
    try:
        with open(os.path.join(prefix, "pyvenv.cfg"), encoding="utf-8", errors="replace") as file:
            settings = dict(_setting(line) for line in file if "=" in line)
        system = settings.get("include-system-site-packages", "").lower() == "true"
    except OSError:
        prefix = os.path.dirname(os.path.dirname(os.path.realpath(interpreter)))
        settings, system = {}, True
    if system and settings:
        found += _sites(os.path.dirname(settings.get("home", "/usr/bin")))
    found += _sites(prefix)
    if system and not environment.get("PYTHONNOUSERSITE"):
        home = environment.get("HOME") or os.path.expanduser("~")
        found += _sites(environment.get("PYTHONUSERBASE") or os.path.join(home, ".local"))
    found += [word for word in reversed(environment.get("PYTHONPATH", "").split(":")) if word]
    return found


def _setting(line: str) -> tuple[str, str]:
    name, _, value = line.partition("=")
    return name.strip(), value.strip()


def _sites(prefix: str) -> list[str]:
    roots = [os.path.join(prefix, "lib"), os.path.join(prefix, "lib64")]
    if prefix == "/usr":
        roots += ["/usr/local/lib"]
    found = []
    for root in roots:
        try:
            versions = [name for name in os.listdir(root) if name.startswith("python")]
        except OSError:
            continue
        for version in sorted(versions):
            found += [os.path.join(root, version, name) for name in ("dist-packages", "site-packages")]
    return found


def toolchain(environment: Mapping[str, str]) -> dict[str, str]:
    """What compiled code is linked to, and the compiler of C++ that torch and Triton call: an engine that lies on a
    share is the same in images whose libraries are not."""
    key = {}
    with contextlib.suppress(OSError, ValueError):  # another C library than glibc
        key["libc"] = os.confstr("CS_GNU_LIBC_VERSION") or ""
    for word in (environment.get("CXX", ""), "g++", "c++", "gcc", "cc", "clang"):
        if word and (found := _on_path(word, environment)):
            key["compiler"] = _identity(os.path.realpath(found))
            break
    return key


def processor() -> dict[str, str]:
    """The first core speaks for all: its model, and what it can do, which is what compilers look at."""
    key: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", "rb") as file:
            block = file.read(16384).partition(b"\n\n")[0].decode("ascii", "replace")
    except OSError:
        return key
    for line in block.splitlines():
        name, _, value = line.partition(":")
        name = name.strip()
        if name in ("model name", "CPU part", "CPU implementer"):
            key[f"processor {name}"] = value.strip()
        elif name in ("flags", "Features"):
            key["processor flags"] = hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
    return key


def devices(environment: Mapping[str, str]) -> dict[str, str]:
    """The GPUs that the engine will see, and the driver's version; nothing on a machine without any."""
    if os.path.exists("/dev/nvidiactl"):
        return _nvidia(environment)
    if os.path.exists("/dev/kfd"):
        return _amd()
    return {}


def _nvidia(environment: Mapping[str, str]) -> dict[str, str]:
    """Ask NVML, which may hang with the driver; if it does not answer, the driver's own files. Raises UsageError where
    those name no GPU either: code of one model is not taken for another's."""
    key = {"driver": "unknown"}
    with contextlib.suppress(OSError, RuntimeError):
        key["driver"] = _ask(PROC_SECONDS, _driver)
    found: list[tuple[str, str, str]] = []
    try:
        found = _ask(NVML_SECONDS, nvml_devices)
    except (OSError, AttributeError, RuntimeError):
        key["gpus"] = ""
        with contextlib.suppress(OSError, RuntimeError):
            key["gpus"] = _ask(PROC_SECONDS, _models)
        if not key["gpus"]:
            raise UsageError("NVIDIA's driver does not say which GPUs there are") from None
        return key
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        wanted = [word.strip() for word in seen.split(",") if word.strip()]
        chosen = [
            device
            for at, device in enumerate(found)
            if str(at) in wanted or any(len(word) > 4 and device[2].startswith(word) for word in wanted)
        ]
        found = chosen or (found if wanted and not wanted[0].startswith("-") else [])  # "" and "-1": none of them
    kinds = sorted({f"{model} {capability}" for model, capability, _ in found})
    key["gpus"] = ", ".join(kinds)
    return key


def _ask(seconds: float, work: Callable[[], _T]) -> _T:
    """Return ``work()``, from a thread that may stay with a driver that hangs: it must not take the signals that are to
    reach the command. Raises OSError (late: TimeoutError), RuntimeError where no thread can be started."""
    from instantstart_fs.ipc.attempts import within  # late: most machines that build and test have no GPU

    def in_thread() -> _T:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return work()

    return within(seconds, in_thread)


def _driver() -> str:
    """The driver's version. Raises OSError."""
    with open(f"{NVIDIA}/version", encoding="ascii", errors="replace") as file:
        words = file.readline().split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _models() -> str:
    """The GPUs' models as NVIDIA's driver names them. Raises OSError."""
    kinds = set()
    for device in os.listdir(f"{NVIDIA}/gpus"):
        with open(f"{NVIDIA}/gpus/{device}/information", encoding="ascii", errors="replace") as file:
            kinds |= {line.partition(":")[2].strip() for line in file if line.startswith("Model:")}
    return ", ".join(sorted(kinds - {"", "Unknown"}))


def nvml_devices() -> list[tuple[str, str, str]]:
    """Return (model, compute capability, UUID) of each device. Raises OSError, AttributeError."""
    import ctypes

    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2() != 0:
        raise OSError("NVML does not answer")
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = []
        for at in range(count.value):
            device = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(at, ctypes.byref(device)) != 0:
                continue
            name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
            major, minor = ctypes.c_int(), ctypes.c_int()
            nvml.nvmlDeviceGetName(device, name, 96)
            nvml.nvmlDeviceGetUUID(device, uuid, 96)
            nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
            capability = f"sm_{major.value}{minor.value}"
            found.append((name.value.decode("ascii", "replace"), capability, uuid.value.decode("ascii", "replace")))
        return found
    finally:
        nvml.nvmlShutdown()


def _amd() -> dict[str, str]:
    root = "/sys/class/kfd/kfd/topology/nodes"
    kinds = set()
    try:
        for node in os.listdir(root):
            with open(os.path.join(root, node, "properties"), encoding="ascii") as file:
                values = dict(line.split(" ", 1) for line in file if " " in line)
            if int(values.get("gfx_target_version", "0")):
                kinds.add(f"gfx {values['gfx_target_version'].strip()}")
        with open("/sys/module/amdgpu/version", encoding="ascii") as file:
            driver = file.read().strip()
    except (OSError, ValueError):
        driver = os.uname().release  # the kernel's own driver
    return {"driver": driver, "gpus": ", ".join(sorted(kinds))}


if __name__ == "__main__":
    from instantstart_fs.core.enginetable import engine_of

    for field, value in sorted(key_of(sys.argv[1:], engine_of(sys.argv[1:]), os.environ).items()):
        print(f"{field}: {value}")
