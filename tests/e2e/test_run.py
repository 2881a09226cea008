"""`instantstart run` against a real daemon: the process it stands for, the startup caches that it restores and saves,
and the records of the starts. Every wrong key, every kind of damage, two at once, a full disk, a kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, loop_ext4, model_directory, run, wait_for

STUB = Path(__file__).with_name("engine_stub.py")
RUN = (sys.executable, "-m", "instantstart_fs.cli", "run")


class Site:
    """A daemon with one pipeline, and starts of it."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory
        self.env = {**os.environ, **daemon.env, "INSTANTSTART_STARTUP_DIR": str(directory / "views")}
        self.count = 0
        self.pipeline = "m"

    def command(self, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        return [*RUN, self.pipeline, *options, "--", *words]

    def run(
        self, *words: str, options: tuple[str, ...] = (), timeout: float = 60, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, options=options),
            env=more.pop("env", self.env),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **more,
        )

    def popen(self, *words: str, options: tuple[str, ...] = (), **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*words, options=options), env=self.env, cwd=REPOSITORY, **{"stderr": subprocess.PIPE, **more}
        )

    def compile(self, *more: str, options: tuple[str, ...] = (), status: int = 0) -> dict[str, Any]:
        """One start of the stub that ends by itself; what it found, and what `run` said."""
        self.count += 1
        result = self.directory / f"result-{self.count}.json"
        # Where it says what happened is not part of what it compiles.
        done = self.run(
            *(sys.executable, str(STUB), "x", "--exit", str(status), *more),
            options=options,
            env={**self.env, "STUB_RESULT": str(result)},
        )
        assert done.returncode == status, done.stderr
        found: dict[str, Any] = json.loads(result.read_text())
        return {**found, "said": done.stderr}

    def versions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.daemon.ok("startup-cache", "ls", self.pipeline, "--json"))
        return found

    def pack(self, number: int) -> Path:
        return self.daemon.store / "slots" / "m" / "startup" / str(number) / "pack"

    def records(self) -> list[dict[str, Any]]:
        """Newest first."""
        found: list[dict[str, Any]] = json.loads(self.daemon.ok("explain", "m", "--json", "-n", "100"))
        return found


@pytest.fixture
def site(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Site:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model_directory(tmp_path / 'source', weights=(2 * MIB, MIB))}")
    return Site(daemon, tmp_path)


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
        return number


# ---------------------------------------------------------------- the process


def test_status_input_output_and_signals_are_the_commands(site: Site) -> None:
    assert site.run("sh", "-c", "exit 7").returncode == 7
    assert site.run("sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL
    assert site.run("/nonexistent").returncode == 127
    assert site.run("/etc/passwd").returncode == 126
    done = site.run("sh", "-c", "cat; echo err >&2; trap '' PIPE 2>/dev/null; exit 0", input="through\n")
    assert (done.stdout, done.returncode) == ("through\n", 0)
    assert "err\n" in done.stderr

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
        name = number.name.removeprefix("SIG")
        script = f"trap 'echo got {name}; exit 3' {name}; echo up; while :; do sleep 0.05; done"
        process = site.popen("sh", "-c", script, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
        assert (out, process.returncode) == (f"got {name}\n".encode(), 3)


def test_nothing_of_ours_is_the_commands_business(site: Site) -> None:
    """Signals at their defaults and unblocked, no descriptors but its lock, its environment as it was."""
    script = (
        "import os, signal, json;"
        "print(json.dumps([sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),"
        "[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2 and os.path.exists("
        "f'/proc/self/fd/{n}')],"
        "open('/proc/self/status').read().split('SigIgn:')[1].split()[0], os.environ['HOME']]))"
    )
    done = site.run(sys.executable, "-S", "-E", "-c", script)
    mask, descriptors, ignored, home = json.loads(done.stdout)
    assert mask == []
    assert [name for name in descriptors if not name.endswith((".lock", "/fd"))] == []
    assert (
        int(ignored, 16) & 0x7FFFFFFF & ~(1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0
    )  # the child's own Python
    assert home == os.environ["HOME"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root")
def test_as_pid_1_it_reaps_orphans_and_dies_by_sigterm(site: Site) -> None:
    script = (
        "import os, sys, time\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: time.sleep(0.2); os._exit(0)\n"  # its parent goes first: PID 1 has to reap it
        "        os._exit(0)\n"
        "    os.wait()\n"
        "time.sleep(0.6)\n"
        "def state(p): return open(f'/proc/{p}/stat').read().split(')')[1].split()[0]\n"
        "left = [p for p in os.listdir('/proc') if p.isdigit() and state(p) == 'Z']\n"
        "print('zombies', left, 'parent', os.getppid(), flush=True)\n"
        "time.sleep(60)\n"
    )  # fmt: skip
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *site.command(sys.executable, "-c", script)]
    process = subprocess.Popen(words, env=site.env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"zombies [] parent 1\n"
        inner = wait_for(
            lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(), "PID 1", 5
        )
        os.kill(int(inner[0]), signal.SIGTERM)  # PID 1 has no default for it: it has to be passed on
        process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def test_at_a_terminal_ctrl_c_comes_once_and_the_terminal_is_the_commands(site: Site) -> None:
    script = (
        "import signal, sys, time, os\n"
        "n = 0\n"
        "def got(*_):\n"
        "    global n\n"
        "    n += 1\n"
        "signal.signal(signal.SIGINT, got)\n"
        "print('tty', sys.stdin.isatty(), sys.stdout.isatty(), flush=True)\n"
        "end = time.monotonic() + 20\n"
        "while not n and time.monotonic() < end: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print('interrupts', n, flush=True)\n"
    )
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execve(RUN[0], site.command(sys.executable, "-c", script), site.env)
    try:
        text = _read_until(terminal, b"tty True True")
        assert b"tty True True" in text
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x20\x00\x40\x00\x00\x00\x00\x00")
        os.write(terminal, b"\x03")
        assert b"interrupts 1" in _read_until(terminal, b"interrupts 1")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _read_until(terminal: int, word: bytes) -> bytes:
    text, end = b"", time.monotonic() + 20
    while word not in text and time.monotonic() < end:
        try:
            text += os.read(terminal, 4096)
        except OSError:
            break
    return text


def test_a_pipeline_that_is_not_there_is_said_before_anything_runs(site: Site, tmp_path: Path) -> None:
    words = [*RUN, "nope", "--", "touch", str(tmp_path / "ran")]
    done = subprocess.run(words, env=site.env, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and "there is no pipeline 'nope'" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert "run needs a command" in site.daemon.refused(2, "run", "m", "--")
    assert "none of vllm" in site.daemon.refused(2, "run", "m", "--engine", "vlm", "--", "true")
    assert "regular expression" in site.daemon.refused(2, "run", "m", "--ready-log", "(", "--", "true")


# ---------------------------------------------------------------- restore and save


def test_the_second_start_finds_what_the_first_compiled(site: Site) -> None:
    first = site.compile("--weights", str(site.daemon.path("m", "model-00001-of-00002.safetensors")))
    assert len(first["compiled"]) == 5 and "no startup cache yet" in first["said"]
    second = site.compile("--weights", str(site.daemon.path("m", "model-00001-of-00002.safetensors")))
    assert (second["compiled"], second["wrong"], len(second["used"])) == ([], [], 5)
    assert "startup cache 1 restored" in second["said"]
    assert second["cache"] == first["cache"], "code that has its own path in it finds it again"
    assert [version["number"] for version in site.versions()] == [1], "nothing new was compiled"
    assert not Path(second["cache"]).exists(), "what is not in the store was not kept"
    status = site.daemon.status("m")
    assert status["startup_bytes"] > site.pack(1).stat().st_size
    site.daemon.restart()
    assert site.daemon.status("m")["startup_bytes"] == status["startup_bytes"]
    assert len(site.compile("--weights", str(site.daemon.path("m", "model-00001-of-00002.safetensors")))["used"]) == 5


def test_a_cache_that_crashes_its_engine_does_so_twice(site: Site) -> None:
    """It is whole, and its bytes are those that were saved."""
    script = 'test -e "$TRITON_CACHE_DIR/bad" && exit 3; test -e good || echo x > "$TRITON_CACHE_DIR/bad"; echo cold'
    where = site.directory / "elsewhere"
    where.mkdir()
    command = ("sh", "-c", f"cd {where}; {script}")
    assert site.run(*command).stdout == "cold\n"
    assert [site.run(*command).returncode for _ in range(2)] == [3, 3]
    (where / "good").touch()
    done = site.run(*command)
    assert done.stdout == "cold\n" and "version 1 is left out, since the last 2 starts" in done.stderr


def test_what_a_failing_engine_leaves_is_not_kept(site: Site) -> None:
    site.compile(status=3)
    found = site.compile(status=3, options=("--ready-file", "/nowhere/ready"))
    assert "the command ended with status 3 after" in found["said"] and "not ready" in found["said"]
    assert site.versions() == []


@pytest.mark.parametrize("change", ["arguments", "environment", "generation", "program"])
def test_a_start_whose_key_is_another_compiles_anew_and_says_why(site: Site, change: str, tmp_path: Path) -> None:
    site.compile()
    more: tuple[str, ...] = ()
    if change == "arguments":
        more = ("--max-model-len", "8192")
    elif change == "environment":
        site.env["TORCHINDUCTOR_MAX_AUTOTUNE"] = "1"
    elif change == "generation":
        (tmp_path / "source" / "config.json").write_text('{"model_type": "other"}')
        site.daemon.ok("update", "m")
    else:
        site.env["PYTHONPATH"] = "/elsewhere"
    again = site.compile(*more)
    named = {"program": "PYTHONPATH", "environment": "TORCHINDUCTOR_MAX_AUTOTUNE"}.get(change, change)
    assert len(again["compiled"]) == 5 and again["used"] == []
    assert "no startup cache of this kind" in again["said"] and named in again["said"]
    assert len(site.versions()) == 2


@pytest.mark.parametrize("damage", ["poisoned", "truncated", "swapped", "record"])
def test_a_damaged_cache_is_a_normal_cold_start_and_says_so(site: Site, damage: str) -> None:
    site.compile()
    site.compile("--grow")
    pack, other = site.pack(1), site.pack(2)
    if damage == "poisoned":
        raw = bytearray(pack.read_bytes())
        raw[100] ^= 0xFF
        pack.write_bytes(raw)
    elif damage == "truncated":
        os.truncate(pack, pack.stat().st_size - 1)
    elif damage == "swapped":
        shutil.copyfile(other, pack)
    else:
        (pack.parent / "record.json").write_text("{}")
    site.daemon.restart()
    found = site.compile()
    assert found["wrong"] == [] and len(found["compiled"]) == 5, found
    assert "startup cache 1" in found["said"] or "no startup cache" in found["said"]
    assert 1 not in [version["number"] for version in site.versions()]
    assert site.compile()["used"] != [], "and the next one is quick again"


def test_verify_and_fsck_find_what_is_damaged(site: Site) -> None:
    site.compile()
    site.compile("--grow")
    raw = bytearray(site.pack(1).read_bytes())
    raw[-60] ^= 1
    site.pack(1).write_bytes(raw)
    done = site.daemon.cli("startup-cache", "verify", "m")
    assert done.returncode == 1 and "damaged  1" in done.stdout
    assert [version["number"] for version in site.versions()] == [2]

    site.daemon.stop()
    os.truncate(site.pack(2), 10)
    (site.pack(2).parent.parent / "junk").mkdir()
    report = json.loads(site.daemon.ok("fsck", "--store", site.daemon.store, "--json"))
    assert len([problem for problem in report["problems"] if "m/startup" in problem]) == 2
    assert list((site.daemon.store / "slots" / "m" / "startup").iterdir()) == []
    site.daemon.start()
    assert "startup_bytes" not in site.daemon.status("m")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user_gets_none_even_if_it_is_root(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model_directory(tmp_path / 'source', weights=(MIB,))}", "--owner", "12345:12345")
    site = Site(daemon, tmp_path)
    found = site.compile()
    assert "for the pipeline's owner alone" in found["said"]
    assert found["cache"] == str(tmp_path / "own"), "its own cache may be warm, ours would be empty each time"
    assert site.versions() == [], "and what it compiled is nobody's"


def test_two_starts_at_once_have_two_directories_two_records_and_one_right_cache(site: Site) -> None:
    words = (sys.executable, str(STUB), "x", "--log-ready")
    both = [site.popen(*words, options=("--ready-log", "is up"), stdout=subprocess.DEVNULL) for _ in range(2)]
    wait_for(lambda: len(site.versions()) >= 1, "a saved cache", 30)
    wait_for(lambda: sum(record["ready"] is not None for record in site.records()) == 2, "both ready", 30)
    views = {entry.name for entry in (site.directory / "views" / "m").iterdir() if entry.is_dir()}
    assert views == {"0", "1"}
    for process in both:
        process.terminate()
    for process in both:
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert len({version["digest"] for version in site.versions()}) == len(site.versions())
    records = site.records()
    assert len({record["start"] for record in records}) == 2
    assert all(record["ended_after"] is not None for record in records)
    again = site.popen(*words, options=("--ready-log", "is up"), stdout=subprocess.DEVNULL)
    wait_for(lambda: sum(record["ready"] is not None for record in site.records()) == 3, "the third start", 30)
    again.terminate()
    assert b"restored" in again.communicate(timeout=30)[1]


def test_a_full_disk_during_the_save_costs_the_start_nothing(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    with loop_ext4(tmp_path, 24 * MIB) as disk:
        daemon = make_daemon(store=disk / "store")
        daemon.ok("add", "m", f"file://{model_directory(tmp_path / 'source', weights=(MIB,))}")
        daemon.warm("m")
        site = Site(daemon, tmp_path)
        filler = disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 65536)
                file.flush()
        found = site.compile()
        assert len(found["compiled"]) == 5 and "startup cache not saved" in found["said"]
        filler.unlink()
        assert site.versions() == []
        assert list((disk / "store" / "trash").iterdir()) == []
        site.compile()
        assert len(site.compile()["used"]) == 5
        daemon.close()


def test_a_quota_counts_startup_caches_and_eviction_takes_them(site: Site) -> None:
    site.compile()
    assert site.daemon.status("m")["startup_bytes"] > 0
    site.daemon.ok("evict", "m")
    assert "startup_bytes" not in site.daemon.status("m")
    assert site.versions() == []
    assert not (site.daemon.store / "slots" / "m" / "startup").exists()
    assert len(site.compile()["compiled"]) == 5


@pytest.fixture
def slow_save(site: Site) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A client that has begun to save and sends no more: half a pack has come."""
    from instantstart_fs.startup.wire import Wire

    wire = Wire(str(site.daemon.socket))
    begun = wire.ask("startup-begin", pipeline="m", key={"engine": "x"})
    wire.close()
    wire = Wire(str(site.daemon.socket))
    wire.send(
        "startup-save", pipeline="m", key={"engine": "x"}, generation=begun["generation"], size=100_000,
        digest="0" * 64, files=1, view="/v", layouts=["triton"],
    )  # fmt: skip
    wire.receive()
    pipe = wire.descriptors.pop()
    os.write(pipe, b"x" * 50_000)
    wait_for(lambda: list((site.daemon.store / "trash").glob("*startup/pack")), "half a pack", 10)
    yield wire, pipe  # type: ignore[misc]
    with contextlib.suppress(OSError):
        os.close(pipe)
    wire.close()


def test_kill_9_of_the_daemon_in_the_middle_of_a_save_leaves_nothing(site: Site, slow_save: Any) -> None:
    site.daemon.kill()
    site.daemon.start()
    assert list((site.daemon.store / "trash").iterdir()) == []
    assert site.versions() == [] and "startup_bytes" not in site.daemon.status("m")
    assert len(site.compile()["compiled"]) == 5
    assert len(site.compile()["used"]) == 5


def test_a_client_that_dies_in_the_middle_of_a_save_leaves_nothing(site: Site, slow_save: Any) -> None:
    wire, _ = slow_save
    wire.close()
    wait_for(lambda: not list((site.daemon.store / "trash").iterdir()), "the half pack's end", 10)
    assert site.versions() == []


def test_what_came_in_part_or_differs_from_what_was_announced_is_not_kept(site: Site, slow_save: Any) -> None:
    wire, pipe = slow_save
    os.write(pipe, b"y" * 50_000)
    os.close(pipe)
    from instantstart_fs.errors import InstantStartError

    with pytest.raises(InstantStartError, match="not kept"):
        wire.receive()
    assert site.versions() == []


def test_startup_cache_explains_lists_and_removes(site: Site) -> None:
    site.compile()
    words = (sys.executable, str(STUB), "x", "--exit", "0")
    assert "restores version 1" in site.daemon.ok("startup-cache", "explain", "m", "--", *words)
    other = site.daemon.ok("startup-cache", "explain", "m", "--", *words, "--more")
    assert "restores none" in other and "arguments" in other and "package torch" not in other
    assert "processor flags" in site.daemon.ok("startup-cache", "explain", "m")
    assert "triton" in site.daemon.ok("startup-cache", "ls", "m")
    assert "no startup cache 9" in site.daemon.refused(1, "startup-cache", "rm", "m", "9")
    assert "1 startup cache removed" in site.daemon.ok("startup-cache", "rm", "m")
    assert "no startup cache" in site.daemon.ok("startup-cache", "ls", "m")


def test_a_user_names_directories_of_his_own(site: Site, tmp_path: Path) -> None:
    place = tmp_path / "fixed" / "cache"
    script = f'test -e "$MY_CACHE/a" -a -e {place}/b && echo again; echo x > "$MY_CACHE/a"; echo y > {place}/b'
    options = ("--cache", "MY_CACHE", "--cache", str(place))
    assert site.run("sh", "-c", script, options=options).stdout == ""
    assert site.run("sh", "-c", script, options=options).stdout == "again\n"
    site.env["MY_CACHE"] = str(tmp_path)  # the user's own word counts: it is neither restored nor saved
    assert site.run("sh", "-c", 'echo "$MY_CACHE"', options=options).stdout == f"{tmp_path}\n"


# ---------------------------------------------------------------- readiness, marks, records


@pytest.mark.parametrize("how", ["url", "log", "file", "engine"])
def test_it_sees_the_engine_become_ready_asks_for_a_token_and_says_where_the_time_went(
    site: Site, how: str, tmp_path: Path
) -> None:
    number, report = port(), tmp_path / "report.json"
    words = [sys.executable, str(STUB), "x", "--port", str(number), "--log-ready"]
    words += ["--ready-file", str(tmp_path / "up")]
    words += ["--weights", str(site.daemon.path("m", "model-00001-of-00002.safetensors"))]
    options = ["--report", str(report), "--probe", f"http://127.0.0.1:{number}/v1/completions"]
    if how == "engine":
        options = ["--report", str(report), "--probe", "auto", "--engine", "vllm"]
    else:
        wanted = {"url": f"http://127.0.0.1:{number}/health", "log": "is up$", "file": str(tmp_path / "up")}
        options += [f"--ready-{how}", wanted[how]]
    process = site.popen(*words, options=tuple(options), stdout=subprocess.PIPE)
    wait_for(report.exists, "the report", 30)
    process.terminate()
    out, said = process.communicate(timeout=30)
    assert process.returncode == 0 and b"the engine is up" in out and b"bye" in out, "its output passes through"
    found = json.loads(report.read_text())
    assert {"ready", "first-token"} <= found["seconds"].keys()
    record = site.records()[0]
    assert record["start"] == found["start"] and record["ended_after"] is not None
    names = [phase["name"] for phase in record["phases"]]
    assert names[0] == "restore" and "import" in names and names[-1] == "first-token"
    assert b"first token after" in said and b"of the usual start" in said
    if how in ("engine", "log"):
        expected = {"load": 0.25, "compile": 1.5} if how == "engine" else {}
        assert record["engine_phases"] == expected
    assert json.loads(report.read_text())["record"]["start"] == record["start"]


def test_an_engine_that_ends_before_it_is_ready_has_a_record_and_a_report(site: Site, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    site.run("sh", "-c", "exit 4", options=("--ready-url", f"http://127.0.0.1:{port()}/", "--report", str(report)))
    record = site.records()[0]
    assert (record["ready"], record["exit_status"]) == (None, 4) and record["ended_after"] is not None
    found = json.loads(report.read_text())
    assert (found["status"], found["seconds"], found["record"]["start"]) == (4, {}, record["start"])
    assert found["failed"].startswith("the command ended with status 4 after") and "not ready" in found["failed"]
    site.run("sh", "-c", "exit 0", options=("--report", str(report)))
    found = json.loads(report.read_text())
    assert (found["status"], found["failed"]) == (0, None) and "ready" in found["seconds"]


def test_a_run_that_is_killed_leaves_a_record_that_ends_and_a_directory_that_is_not_reused_while_in_use(
    site: Site,
) -> None:
    process = site.popen("sh", "-c", "echo $$; exec sleep 60", stdout=subprocess.PIPE)
    assert process.stdout is not None
    engine = int(process.stdout.readline())
    process.kill()
    process.wait(10)
    wait_for(lambda: site.records()[0]["ended_after"] is not None, "the record's end", 10)
    try:
        assert site.run("sh", "-c", 'echo "$TRITON_CACHE_DIR"').stdout.endswith("/m/1/triton\n")
    finally:
        os.kill(engine, signal.SIGKILL)
        process.communicate(timeout=10)


def test_a_restart_of_the_daemon_is_not_the_commands_affair(site: Site, tmp_path: Path) -> None:
    end = tmp_path / "end"
    wait = 'echo up; while [ ! -e "$0" ]; do sleep 0.1; done; exit 5'
    process = site.popen("sh", "-c", wait, str(end), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        site.daemon.restart()
        wait_for(lambda: site.daemon.status("m")["leases"] == 1, "the lease's return")
    finally:
        end.touch()
        process.communicate(timeout=20)
    assert process.returncode == 5


def test_percentiles_and_what_to_attack_are_in_explain(site: Site) -> None:
    for _ in range(3):
        site.run("sh", "-c", "sleep 0.2")
    text = site.daemon.ok("explain", "m")
    assert "p50" in text and "p95" in text and "p99" in text and "of the usual start" in text
    assert run("true").returncode == 0
