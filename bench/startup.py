"""What `instantstart run` costs, and what its startup caches save: overhead, copying, torch.compile, vLLM's CPU build.

    scripts/bench startup overhead [--rounds N]        a command started by itself, by `lease`, and by `run`
    scripts/bench startup view [--rounds N]            ways to a private copy of a cache
    scripts/bench startup compile [--rounds N]         torch.compile in transformers: first start against restored cache
    scripts/bench startup vllm --python PYTHON [--rounds N]

Rounds are interleaved. Each part writes bench/results/startup-PART.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import daemon as daemons
from bench.common import ratios, run, summary, table, wait_for, workspace, write_result
from instantstart_fs.core.enginelog import EngineLog
from tests.harness import model_directory
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

CLI = (sys.executable, "-m", "instantstart_fs.cli")
NOW = "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))"


def toy(directory: Path, layers: int = 4, seed: int = 0) -> Path:
    """A generated llama of random weights, with a tokenizer of a word for each id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="3MB")
    words = {"Hello": 0, **{f"w{number}": number for number in range(1, 2048)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w1", eos_token="w2").save_pretrained(directory)
    return directory


# -- what it costs -----------------------------------------------------------------------------------------------------


def installed(directory: Path) -> Path:
    """The command as pip installs it from a wheel: an environment of its own, the package and its bytecode in it, a
    console script. (An editable install looks for its sources at each start.)"""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(directory), "platbase": str(directory)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("__editable__", "instantstart")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    package = Path(__file__).parents[1] / "instantstart_fs"
    shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([directory / "bin" / "python", "-m", "compileall", "-q", site / package.name], check=True)
    script = directory / "bin" / "instantstart"
    script.write_text(
        f"#!{directory}/bin/python\nimport re\nimport sys\nfrom instantstart_fs.cli import main\n"
        "if __name__ == '__main__':\n"
        "    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])\n    sys.exit(main())\n"
    )
    script.chmod(0o755)
    return script


def overhead(rounds: int) -> dict[str, Any]:
    """Seconds from the call to the command's first instruction, and to the end of all."""
    names = ("bare", "bare python", "lease", "run", "bare whole", "run whole")
    times: dict[str, list[float]] = {name: [] for name in names}
    with workspace(None) as work, daemons.daemon(work) as daemon:
        instantstart = installed(work / "venv")
        python = str(instantstart.with_name("python"))
        daemon.cli("add", "p", f"file://{model_directory(work / 'source', weights=(4 << 20,))}")
        daemon.cli("warm", "p", "--wait")
        env = {**daemon.env, "INSTANTSTART_STARTUP_DIR": str(work / "views")}
        env.pop("PYTHONPATH", None)
        # The daemon's own interpreter: what it takes to reach its first instruction is in every figure.
        kernel = 'mkdir -p "$TRITON_CACHE_DIR"; echo kernel > "$TRITON_CACHE_DIR/k"'
        say = ["/bin/sh", "-c", f'{kernel}; exec {sys.executable} -I -S -c "{NOW}"']
        run([instantstart, "run", "p", "-q", "--", *say], env=env)
        second = subprocess.run(
            [instantstart, "run", "p", "--", *say], env=env, capture_output=True, text=True, check=True
        )
        assert "restored" in second.stderr, second.stderr
        bare = [say[0], say[1], say[2].replace("$TRITON_CACHE_DIR", str(work / "k"))]
        for _ in range(rounds):
            for name, words in (
                ("bare", bare),
                ("lease", [instantstart, "lease", "p", "--", *bare]),
                ("run", [instantstart, "run", "p", "-q", "--", *say]),
            ):
                began = time.monotonic()
                _, out = run(words, env=env)
                times[name].append(float(out) - began)
                if name != "lease":
                    times[f"{name} whole"].append(time.monotonic() - began)
            began = time.monotonic()
            run([python, "-c", "pass"], env=env)
            times["bare python"].append(time.monotonic() - began)
    found = {name: summary(values) for name, values in times.items()}
    cost = [ours - bare for ours, bare in zip(times["run"], times["bare"], strict=True)]
    found["run minus bare"] = summary(cost)
    found["run minus bare minus bare python"] = summary(
        [more - python for more, python in zip(cost, times["bare python"], strict=True)]
    )
    print(table(("", "median", "min", "max"), [_row(name, values) for name, values in found.items()]))
    return found


def _row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    return (name, *(f"{values[key] * 1000:.1f} ms" for key in ("median", "min", "max")))


# -- ways to a private copy --------------------------------------------------------------------------------------------


def view(rounds: int) -> dict[str, Any]:
    """A cache of 1,000 small files and 20 larger ones: as a pack with its digest, and as a tree by other means."""
    from instantstart_fs.startup.pack import pack, scan, unpack

    found: dict[str, Any] = {}
    with workspace(None) as work:
        source = work / "tree"
        for number in range(1000):
            path = source / "triton" / f"{number % 50:02}" / f"k{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(4000))
        for number in range(20):
            (source / "triton" / f"big{number}").write_bytes(os.urandom(5 << 20))
        fd = os.open(work / "pack", os.O_RDWR | os.O_CREAT)
        size, digest, _ = pack(str(source), scan(str(source), {"triton": ()}), fd)
        times: dict[str, list[float]] = {"pack, proven": [], "copy of a tree": [], "hard links": []}
        if shutil.which("mount") and os.geteuid() == 0:
            times["overlayfs"] = []
        for _ in range(rounds):
            for name, values in times.items():
                target = work / "target"
                target.mkdir()
                began = time.monotonic()
                if name == "pack, proven":
                    unpack(fd, size, digest, str(target), lambda layout: True)
                elif name == "copy of a tree":
                    shutil.copytree(source, target, dirs_exist_ok=True)
                elif name == "hard links":
                    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=os.link)
                else:
                    (work / "upper").mkdir(exist_ok=True)
                    (work / "work").mkdir(exist_ok=True)
                    options = f"lowerdir={source},upperdir={work / 'upper'},workdir={work / 'work'}"
                    done = subprocess.run(
                        ["mount", "-t", "overlay", "overlay", "-o", options, target], capture_output=True, check=False
                    )
                    if done.returncode:
                        target.rmdir()
                        continue
                values.append(time.monotonic() - began)
                if name == "overlayfs":
                    subprocess.run(["umount", "-l", target], check=True)
                shutil.rmtree(target, ignore_errors=True)
        os.close(fd)
        found["bytes"] = size
    found |= {name: summary(values) for name, values in times.items() if values}
    print(table(("", "median", "min", "max"), [_row(name, it) for name, it in found.items() if name != "bytes"]))
    return found


# -- torch.compile in transformers -------------------------------------------------------------------------------------

COMPILE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
torch.manual_seed(0); torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(1, 33).unsqueeze(0)
with torch.no_grad():
    compiled = torch.compile(model.forward, dynamic=False)
    began = time.perf_counter()
    logits = compiled(input_ids=ids, use_cache=False).logits
    first = time.perf_counter() - began
    began = time.perf_counter()
    compiled(input_ids=ids, use_cache=False)
    second = time.perf_counter() - began
print(json.dumps({"compile": first - second, "tokens": logits.argmax(-1).tolist()}))
"""


def compile_times(rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"first": [], "restored": []}
    tokens = []
    with workspace(None) as work, daemons.daemon(work) as daemon:
        daemon.cli("add", "p", f"file://{toy(work / 'source')}")
        env = {**daemon.env, "INSTANTSTART_STARTUP_DIR": str(work / "views"), "HF_HUB_OFFLINE": "1"}
        program = [sys.executable, "-c", COMPILE, str(daemon.mount / "p")]
        for _ in range(rounds):
            for name in times:
                if name == "first":
                    subprocess.run([*CLI, "startup-cache", "rm", "p"], env=env, capture_output=True, check=False)
                done = subprocess.run(
                    [*CLI, "run", "p", "--", *program], env=env, capture_output=True, text=True, check=True, timeout=600
                )
                assert ("restored" in done.stderr) == (name == "restored"), done.stderr
                result = json.loads(done.stdout.splitlines()[-1])
                times[name].append(result["compile"])
                tokens.append(result["tokens"])
                print(f"{name}: compile {result['compile']:.2f} s", flush=True)
        size = json.loads(daemon.cli("startup-cache", "ls", "p", "--json")[1])[0]
    assert all(found == tokens[0] for found in tokens), "not the same tokens"
    found: dict[str, Any] = {name: summary(values) for name, values in times.items()}
    found["restored of first"] = summary(
        [ours / first for ours, first in zip(times["restored"], times["first"], strict=True)]
    )
    found["cache"] = {"bytes": size["size"], "files": size["files"]}
    print(f"restored ÷ first: {found['restored of first']['median']:.2f}")
    return found


# -- vLLM --------------------------------------------------------------------------------------------------------------

TOKENS = list(range(5, 45))


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
        return number


def _generate(port: int) -> list[int]:
    body = {
        "model": "toy",
        "prompt": TOKENS,
        "max_tokens": 24,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found


@contextlib.contextmanager
def _server(words: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        child = subprocess.Popen(words, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(20)


def _brief(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name != "tokens"}


NOT_OURS = ("HF_", "AWS_", "PYTHONPATH", "TORCHINDUCTOR_", "TRITON_")
"""torch sets variables of its own in the process that imports it, here: an engine's would be taken for the user's."""
STARTS = ("plain", "first", "second", "region")


class _Vllm:
    """Starts of vLLM's server on one machine. ``python``: the interpreter of an environment that has it."""

    def __init__(self, python: str, work: Path, source: Path) -> None:
        self._python, self._work, self._source = python, work, source
        self._number = 0

    def start(self, name: str, daemon: daemons.Daemon | None, kill: bool = False) -> dict[str, Any]:
        """One start until /health says 200 and 24 tokens came; by ``run`` where there is a ``daemon``. ``kill``: the
        daemon is killed (-9) once it has begun to keep what was compiled."""
        self._number += 1
        port = _port()
        log, report = self._work / f"{name}-{self._number}.log", self._work / f"{name}-{self._number}.json"
        directory = self._source if daemon is None else daemon.mount / "p"
        words = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
        words += ["--served-model-name", "toy", "--port", str(port)]
        words += ["--max-model-len", "256", "--gpu-memory-utilization", "0.2"]
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(NOT_OURS)},
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_USE_AOT_COMPILE": "0",
        }
        if daemon is None:
            # Where an engine keeps it by default, and empty: as on a fresh node.
            home = self._work / "home"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            env |= {"HOME": str(home), "VLLM_CACHE_ROOT": str(home / "vllm")}
            env |= {"TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"), "TRITON_CACHE_DIR": str(home / "triton")}
        else:
            for variable in ("PYTHONPATH", "INSTANTSTART_SOCKET"):
                env[variable] = daemon.env[variable]
            # At the same path on each host, as in a fleet.
            env["INSTANTSTART_STARTUP_DIR"] = str(self._work / "views")
            words = [*CLI, "run", "p", "--report", str(report), "--probe", "auto", "--", *words]
        began = time.monotonic()
        with _server(words, env, log) as child:

            def up() -> bool:
                if child.poll() is not None:
                    raise RuntimeError(log.read_text(errors="replace")[-5000:])
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                try:
                    with opener.open(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                        return bool(answer.status == 200)
                except OSError:
                    return False

            wait_for(up, f"vLLM ({name})", 400, 0.1)
            ready = time.monotonic() - began
            tokens = _generate(port)
            if kill:
                assert daemon is not None
                trash = daemon.store / "trash"
                wait_for(lambda: any(trash.glob("*startup/pack")), "the daemon to keep what was compiled", 60, 0.0005)
                daemon.child.kill()
            if daemon is not None:
                wait_for(report.exists, "the report", 120)
        phases = EngineLog("vllm").lines(log.read_text(errors="replace").splitlines())
        one = {"ready": round(ready, 2), "tokens": tokens, "engine": phases}
        if daemon is not None:
            told = json.loads(report.read_text())
            one["startup_cache"] = told["startup_cache"]
            if told.get("record"):
                one["phases"] = {
                    phase["name"]: round(phase["end"] - phase["start"], 2) for phase in told["record"]["phases"]
                }
        shown = (one.get("startup_cache") or {}).get("outcome", "")
        print(f"{name}: ready {ready:.1f} s, engine {phases.get('engine')} s {shown} {one.get('phases')}", flush=True)
        return one


@contextlib.contextmanager
def _hosts(
    work: Path, source: Path
) -> Iterator[Callable[[str, str], contextlib.AbstractContextManager[daemons.Daemon]]]:
    """A hub that has the toy, a SeaweedFS with tiers of regions, and a way to start a host by its name and its
    region's. A name that was used before has its store still."""
    with HubServer() as hub, SeaweedServer() as seaweed:
        hub.publish("org/toy", source)
        bucket = seaweed.new_bucket("tier")
        key = work / "region.key"
        key.write_text(secrets.token_hex(32))
        key.chmod(0o600)
        credentials = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}

        @contextlib.contextmanager
        def host(name: str, region: str) -> Iterator[daemons.Daemon]:
            config = f"""
                [origins.huggingface]
                endpoint = "{hub.endpoint}"
                [regional]
                url = "s3://{bucket}/{region}"
                endpoint_url = "{seaweed.endpoint_url}"
                key_file = "{key}"
                host = "{name}"
                startup_caches = ["{os.getuid()}"]
            """
            with daemons.daemon(work, config=config, env=credentials, name=name, mount=work / "models") as daemon:
                if not (daemon.store / "slots/p").exists():
                    daemon.cli("add", "p", "hf://org/toy")
                yield daemon

        yield host


def vllm(rounds: int, python: str, minutes: float) -> dict[str, Any]:
    """Engine initialisation as vLLM's log says, and seconds until /health says 200: `plain` from a local directory with
    an empty cache; by `run` with no startup cache (`first`), and with the one that the start before it saved
    (`second`); by `run` on a fresh host, whose weights and startup cache come from the region (`region`). After
    ``minutes`` no further round begins. At last a daemon is killed (-9) while it keeps what was compiled; the start
    after that (`killed`) finds no half of it."""
    end = time.monotonic() + minutes * 60
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in STARTS}
    with workspace(None) as work:
        source = toy(work / "source")
        with _hosts(work, source) as host:
            engine = _Vllm(python, work, source)
            for at in range(rounds):
                if time.monotonic() > end:
                    break
                results["plain"].append(engine.start("plain", None))
                with host(f"one{at}", f"region{at}") as one:
                    results["first"].append(engine.start("first", one))
                    results["second"].append(engine.start("second", one))
                    versions = json.loads(one.cli("startup-cache", "ls", "p", "--json")[1])
                with host(f"fresh{at}", f"region{at}") as fresh:
                    results["region"].append(engine.start("region", fresh))
            with host("cut", "cut") as one:
                cut = engine.start("cut", one, kill=True)
            with host("cut", "cut") as one:
                left = json.loads(one.cli("startup-cache", "ls", "p", "--json")[1])
                killed = engine.start("killed", one)
    for name, expected in (("first", "first"), ("second", "restored"), ("region", "restored")):
        outcomes = {each["startup_cache"]["outcome"] for each in results[name]}
        assert outcomes == {expected}, (name, outcomes)
    every = [one["tokens"] for values in [*results.values(), [cut, killed]] for one in values]
    assert all(tokens == every[0] for tokens in every), "not the same token ids"
    init = {name: [one["engine"]["engine"] for one in values] for name, values in results.items()}
    whole = {name: [one["ready"] for one in values] for name, values in results.items()}
    found_all: dict[str, Any] = {
        "engine_initialisation": {name: summary(values) for name, values in init.items()},
        "ready": {name: summary(values) for name, values in whole.items()},
        "second_faster_than_first": ratios(init["second"], init["first"]),
        "second_faster_than_plain": ratios(init["second"], init["plain"]),
        "region_faster_than_plain": ratios(init["region"], init["plain"]),
        "killed": {"kept": left, "then": _brief(killed)},
        "cache": [{"bytes": version["size"], "files": version["files"]} for version in versions],
        "rounds": [{name: _brief(values[at]) for name, values in results.items()} for at in range(len(init["plain"]))],
    }
    print(f"engine initialisation: second start {found_all['second_faster_than_first']['median']:.1f} times faster")
    print(f"on a fresh host of the region {found_all['region_faster_than_plain']['median']:.1f} times")
    return found_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overhead", "view", "compile", "vllm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0, help="after these no further round of vllm begins")
    parser.add_argument("--python", default=os.environ.get("INSTANTSTART_VLLM_PYTHON", ""))
    arguments = parser.parse_args()
    if arguments.part == "vllm":
        if not arguments.python:
            parser.error("--python: the interpreter of an environment with vLLM")
        result = vllm(arguments.rounds, arguments.python, arguments.minutes)
    else:
        parts = {"overhead": overhead, "view": view, "compile": compile_times}
        result = parts[arguments.part](arguments.rounds)
    write_result(f"startup-{arguments.part}", {"rounds_asked": arguments.rounds, **result})


if __name__ == "__main__":
    main()
