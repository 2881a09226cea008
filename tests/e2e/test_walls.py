"""Walls between tenants, with two real uids on a real mount and a real control socket; and where secrets never are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.harness import MIB, REPOSITORY, Daemon, must, run, wait_for
from tests.servers.hub import HubServer

ALICE, BOB = (12345, 23456), (12346, 23457)
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def open_directory() -> Iterator[Path]:
    """Where other users may come near the mount and the socket: pytest's own directories are 0700."""
    with tempfile.TemporaryDirectory(prefix="walls-") as directory:
        os.chmod(directory, 0o711)
        yield Path(directory)


def owner(who: tuple[int, int]) -> str:
    return f"{who[0]}:{who[1]}"


@pytest.fixture(scope="module")
def daemon(open_directory: Path, model: Path) -> Iterator[Daemon]:
    with Daemon(open_directory / "d", config={"fill": {"chunk_size": "1MiB"}}) as running:
        running.ok("add", "alices", f"file://{model}", "--owner", owner(ALICE), "--mode", "0550")
        running.ok("add", "bobs", f"file://{model}", "--owner", owner(BOB), "--mode", "0500")
        running.ok("add", "everybodys", f"file://{model}")
        running.warm("bobs")
        yield running


def as_user(
    who: tuple[int, int], *command: str | Path, groups: str = "", env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    supplementary = f"--groups={groups}" if groups else "--clear-groups"
    done = run("setpriv", f"--reuid={who[0]}", f"--regid={who[1]}", supplementary, *command, timeout=30, env=env)
    return done.returncode, done.stdout, done.stderr


def python_as(who: tuple[int, int], code: str, *arguments: str | Path, groups: str = "") -> object:
    """What ``code`` (an expression over ``a``, the arguments) is to that user; an OSError gives its errno's name."""
    script = (
        "import errno, json, os, sys\na = sys.argv[1:]\n"
        f"try:\n    found = {code}\nexcept OSError as error:\n    found = errno.errorcode[error.errno]\n"
        "print(json.dumps(found))"
    )
    status, out, err = as_user(who, sys.executable, "-c", script, *arguments, groups=groups)
    assert status == 0, err
    return json.loads(out)


READS = {
    "open": "os.close(os.open(a[1], os.O_RDONLY))",
    "listing": "sorted(os.listdir(a[0]))",
    "getxattr of the directory": "os.getxattr(a[0], 'user.instantstart.state').decode()",
    "listxattr of the directory": "os.listxattr(a[0])",
    "getxattr of a file": "os.getxattr(a[1], 'user.instantstart.state').decode()",
    "listxattr of a file": "os.listxattr(a[1])",
    "stat of a file": "os.stat(a[1]).st_size",
    "chdir": "os.chdir(a[0])",
}


@pytest.mark.parametrize("what", READS)
def test_the_others_pipeline_is_eacces(daemon: Daemon, what: str) -> None:
    """Owner: all of it; the other uid, of whatever group it is: EACCES, each way."""
    bobs = daemon.path("bobs")
    arguments = (bobs, bobs / FIRST)
    for groups in ("", str(BOB[1])):
        assert python_as(ALICE, READS[what], *arguments, groups=groups) == "EACCES"
    assert python_as(BOB, READS[what], *arguments) != "EACCES"


def test_the_group_may_read_where_the_mode_says_so(daemon: Daemon) -> None:
    alices = daemon.path("alices")
    for what in ("open", "listing", "getxattr of the directory", "listxattr of the directory", "listxattr of a file"):
        arguments = (alices, alices / FIRST)
        assert python_as(BOB, READS[what], *arguments) == "EACCES", what
        assert python_as(BOB, READS[what], *arguments, groups=str(ALICE[1])) != "EACCES", what
        assert python_as(ALICE, READS[what], *arguments) != "EACCES", what


def test_of_the_others_pipeline_the_name_is_visible_and_nothing_else(daemon: Daemon) -> None:
    """Not its state (.warm lists it to those who may read it), nor when it was resolved, nor what it holds."""
    assert python_as(ALICE, "sorted(os.listdir(a[0]))", daemon.mount) == sorted(os.listdir(daemon.mount))
    for state in (".warm", ".filling", ".cold"):
        directory = daemon.mount / state
        everybody = sorted(os.listdir(directory))
        assert "bobs" in everybody or state != ".warm"
        seen = python_as(ALICE, "sorted(os.listdir(a[0]))", directory)
        assert seen == [name for name in everybody if name != "bobs"]
    link = daemon.mount / ".warm" / "bobs"
    # whichever of them asks first: what one may see is never kept for the other
    for _ in range(2):
        assert python_as(BOB, "os.readlink(a[0])", link) == "../bobs"
        assert python_as(ALICE, "os.readlink(a[0])", link) == "ENOENT"
        assert python_as(ALICE, "os.lstat(a[0]).st_size", link) == "ENOENT"
    before = os.stat(daemon.path("bobs"))
    time_and_links = (before.st_mtime_ns, before.st_nlink)
    daemon.ok("update", "bobs")
    after = os.stat(daemon.path("bobs"))
    assert time_and_links == (after.st_mtime_ns, after.st_nlink)
    assert after.st_nlink == 1, "the number of its directories"
    assert python_as(ALICE, "os.statvfs(a[0]).f_files", daemon.mount) == len(json.loads(daemon.ok("ls", "--json")))


def cli_as(daemon: Daemon, who: tuple[int, int], *arguments: str, groups: str = "") -> tuple[int, str, str]:
    environment = {"INSTANTSTART_SOCKET": str(daemon.socket), "PYTHONPATH": str(REPOSITORY)}
    command = (sys.executable, "-m", "instantstart_fs.cli", *arguments)
    return as_user(who, *command, groups=groups, env=environment)


def test_the_control_socket_knows_its_caller(daemon: Daemon) -> None:
    """An owner sees, touches, leases and warms what it owns; nothing of another's is told, and nothing else allowed."""
    status, out, err = cli_as(daemon, BOB, "ls", "--json")
    assert status == 0, err
    assert [entry["pipeline"] for entry in json.loads(out)] == ["bobs"]
    for arguments in (("status", "bobs"), ("touch", "bobs"), ("warm", "bobs"), ("lease", "bobs", "--", "true")):
        status, _, err = cli_as(daemon, BOB, *arguments)
        assert status == 0, (arguments, err)
    for verb in ("status", "touch", "warm", "verify", "evict", "pin", "unpin", "update", "remove"):
        status, out, err = cli_as(daemon, ALICE, verb, "bobs")
        assert (status, out) == (1, ""), (verb, out)
        assert re.match(r"instantstart: uid 12345 may not \w+ here", err), err
    for verb in ("evict", "pin", "unpin", "update", "remove", "verify"):
        assert cli_as(daemon, BOB, verb, "bobs")[0] == 1, verb
    assert cli_as(daemon, BOB, "add", "new", "file:///etc")[0] == 1
    assert daemon.status("bobs")["state"] == "unverified"


def test_a_group_that_administers(open_directory: Path, model: Path) -> None:
    with Daemon(open_directory / "g", config={"control": {"group": 34567}}) as daemon:
        _ask_as_a_member(daemon, model)


def _ask_as_a_member(daemon: Daemon, model: Path) -> None:
    daemon.ok("add", "p", f"file://{model}", "--owner", owner(BOB))
    assert cli_as(daemon, ALICE, "pin", "p")[0] == 1
    status, _, err = cli_as(daemon, ALICE, "pin", "p", groups="34567")
    assert status == 0, err
    assert daemon.status("p")["pinned"]


def test_a_flood_of_an_unprivileged_user_is_slowed_and_stat_is_not(daemon: Daemon) -> None:
    """A stranger who asks as fast as it can gets its allowance, whatever the number of its connections."""
    from instantstart_fs.control.callers import REQUEST_BURST, REQUEST_RATE

    flood = (
        "import socket, sys, threading, time\n"
        "count, end = [0], time.monotonic() + 2.0\n"
        "def shout():\n"
        "    with socket.socket(socket.AF_UNIX) as s:\n"
        "        s.settimeout(5)\n"
        "        s.connect(sys.argv[1])\n"
        "        while time.monotonic() < end:\n"
        '            s.sendall(b\'{"v":1,"request":{"op":"ls"}}\\n\')\n'
        "            if b'done' not in s.recv(4096): return\n"
        "            count[0] += 1\n"
        "threads = [threading.Thread(target=shout) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(count[0])"
    )
    before = time.monotonic()
    status, out, err = as_user((54321, 54321), sys.executable, "-c", flood, daemon.socket)
    taken = time.monotonic() - before
    assert status == 0, err
    assert 8 <= int(out) <= REQUEST_BURST + REQUEST_RATE * taken + 1


def written_parts(file: BinaryIO) -> Iterator[bytes]:
    """What is not a hole: the index is a sparse file of 64 GiB."""
    offset, end = 0, os.fstat(file.fileno()).st_size
    while offset < end:
        try:
            start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
        except OSError:
            return
        offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield os.pread(file.fileno(), offset - start, start)


SECRET = "hf_KnownSecret0123456789abcdef"


def test_a_known_token_is_nowhere(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, tmp_path: Path
) -> None:
    """Through success and every kind of failure: not in the log (at debug), in status, xattrs, argv, environment of
    the workers, index, slots, the command line's own words, nor in a traceback."""
    hub.publish("org/gated", model, gated=True, tokens=[SECRET])
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(SECRET + "\n")
    daemon = make_daemon(
        config={
            "fill": {"chunk_size": "1MiB", "read_deadline": "2s"},
            "origins": {"huggingface": {"endpoint": hub.endpoint}},
        },
        log_level="debug",
        allow=["."],
    )
    words: list[str] = []

    def said(*arguments: str | Path) -> int:
        done = daemon.cli(*arguments)
        words.extend((done.stdout, done.stderr))
        return int(done.returncode)

    assert said("add", "good", "hf://org/gated", "--token-file", token) == 0
    assert said("warm", "good", "--wait") == 0
    assert said("status", "good") == said("status", "good", "--json") == said("ls") == 0
    words.append(must("getfattr", "-d", "-m-", "--absolute-names", daemon.path("good"), daemon.path("good", FIRST)))
    # failures: refused, throttled, broken, silent, nonsense; a hub that is gone; wrong bytes; a token that is none
    assert said("add", "again", "hf://org/gated", "--token-file", token) == 0
    for status in (401, 403, 404, 429, 500, 302):
        hub.fault("status", port="hub", status=status, count=4)
        said("update", "good")
        said("add", f"bad{status}", "hf://org/gated", "--token-file", token)
        hub.clear()
    hub.fault("corrupt", port="cdn", count=3)
    said("warm", "again", "--wait")
    hub.clear()
    for bad in (SECRET + "\x01", SECRET + "\nX-Injected: 1", SECRET + "é", "Bearer " + SECRET):
        token.write_text(bad)
        assert said("add", "malformed", "hf://org/gated", "--token-file", token) == 1
    token.write_text(SECRET + "\n")
    os.chmod(token, 0o644)
    assert said("add", "open", "hf://org/gated", "--token-file", token) == 1
    assert "chmod 600" in words[-1]
    os.chmod(token, 0o600)
    assert any(SECRET in (request.token or "") for request in hub.requests("hub")), "it was never used"
    hub.kill()
    said("add", "gone", "hf://org/gated", "--token-file", token)
    hub.restart()

    assert not any(SECRET in text for text in words)
    assert SECRET not in daemon.text()
    for pid in (daemon.pid, *daemon.workers()):
        for name in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes(), (pid, name)
    looked = 0
    for parent, directories, names in os.walk(daemon.directory):
        directories[:] = [name for name in directories if name != daemon.mount.name]
        for name in names:
            path = Path(parent, name)
            if not path.is_file():
                continue
            with path.open("rb") as file:
                for data in written_parts(file):
                    looked += len(data)
                    assert SECRET.encode() not in data, name
    assert looked > 40 * MIB, "the slots and the index"


def test_reading_a_pipeline_needs_no_token_but_its_own(daemon: Daemon, tmp_path: Path) -> None:
    """A token file in the way of a FIFO, a directory, or nobody's: an error, never a hang."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    before = time.monotonic()
    assert "no file" in daemon.refused(2, "add", "fifo", "hf://org/model", "--token-file", fifo)
    assert time.monotonic() - before < 20


# ---------------------------------------------------------------- what is a request, and when it is durable


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError, match="Read-only"):
        call(*arguments)


LOOKS = {
    "ls -l": lambda root: must("ls", "-lsR", root),
    "ls -lu": lambda root: must("ls", "-luR", root),
    "find": lambda root: must("find", root, "-size", "+1", "-ls"),
    "du": lambda root: must("du", "-s", root),
    "stat": lambda root: must("stat", root / FIRST),
    "stat -f": lambda root: must("stat", "-f", root),
    "getfattr": lambda root: must("getfattr", "-d", "-m-", "--absolute-names", root, root / FIRST),
    "access(2)": lambda root: os.access(root / FIRST, os.R_OK),
    "O_PATH": lambda root: os.close(os.open(root / FIRST, os.O_PATH)),
    "config": lambda root: (root / "config.json").read_bytes(),
    "tokenizer": lambda root: (root / "tokenizer.json").read_bytes(),
    "weight index": lambda root: (root / "model.safetensors.index.json").read_bytes(),
    "readme": lambda root: (root / "README.md").read_bytes(),
    "state directories": lambda root: [os.listdir(root.parent / name) for name in (".warm", ".filling", ".cold")],
    "open for writing": lambda root: refused(os.open, root / FIRST, os.O_WRONLY),
    "utime": lambda root: refused(os.utime, root / FIRST),
}


@pytest.fixture(scope="module")
def looked_at(daemon: Daemon, model: Path) -> Path:
    daemon.ok("add", "looked", f"file://{model}")
    return daemon.path("looked")


@pytest.mark.parametrize("how", LOOKS)
def test_looking_is_no_request(daemon: Daemon, looked_at: Path, how: str) -> None:
    LOOKS[how](looked_at)
    status = daemon.status("looked")
    assert (status["last_request"], status["hot_until"], status["fill"]) == (None, None, None)
    files = {file["path"]: file["cached_bytes"] for file in status["files"]}
    assert files[FIRST] == 0, "it made a weight file be fetched"


@pytest.mark.parametrize("how", ["open", "touch", "lease"])
def test_opening_weights_touching_and_leasing_are_requests(daemon: Daemon, model: Path, how: str) -> None:
    name = f"asked-{how}"
    daemon.ok("add", name, f"file://{model}")
    if how == "open":
        os.close(os.open(daemon.path(name, FIRST), os.O_RDONLY))
    else:
        daemon.ok(how, name, *(("--", "true") if how == "lease" else ()))
    status = daemon.status(name)
    assert status["last_request"] is not None and status["hot_until"] is not None
    assert status["fill"] is None and status["cached_bytes"] == 0


def test_last_access_is_durable_within_seconds(make_daemon: Callable[..., Daemon], model: Path) -> None:
    """kill -9 loses at most the last few seconds: what was recorded 5 s ago, at the latest, is there."""
    import lmdb

    daemon = make_daemon()
    daemon.ok("add", "kept", f"file://{model}")
    with open(daemon.path("kept", FIRST), "rb", buffering=0) as file:
        file.read(10)
    asked = time.monotonic()
    before = daemon.status("kept")

    def durable() -> bool:
        with lmdb.open(str(daemon.store / "index"), readonly=True, max_dbs=16) as index:
            requests = index.open_db(b"requests", create=False)
            with index.begin(db=requests) as transaction:
                return transaction.get(b"kept") is not None

    wait_for(durable, "the request in the index", 5)
    assert time.monotonic() - asked < 5
    daemon.kill()
    daemon.start()
    assert daemon.status("kept")["last_request"] == before["last_request"]


# ---------------------------------------------------------------- verify --access; one tenant cannot poison another


def test_verify_access_asks_with_the_pipelines_own_credentials(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.publish("org/gated", model, gated=True, tokens=["hf_first"])
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("hf_first\n")
    daemon = make_daemon(config={"origins": {"huggingface": {"endpoint": hub.endpoint}}}, allow=["origin"])
    daemon.ok("add", "p", "hf://org/gated", "--token-file", token)
    assert json.loads(daemon.ok("verify", "p", "--access", "--json")) == {"sources": ["hf://org/gated"]}
    hub.publish("org/gated", model, gated=True, tokens=["hf_second"])  # the account lost its access
    assert "org/gated" in daemon.refused(1, "verify", "p", "--access")
    done = json.loads(daemon.cli("verify", "p", "--access", "--json").stdout)
    assert done["error"]["code"] == "access-refused"
    token.write_text("hf_second\n")
    daemon.ok("verify", "p", "--access")
    hub.kill()
    try:
        done = json.loads(daemon.cli("verify", "p", "--access", "--json").stdout)
    finally:
        hub.restart()
    assert done["error"]["code"] == "origin-unavailable", "an outage is no refusal"


def test_a_bad_origin_harms_its_own_pipeline_only(
    make_daemon: Callable[..., Daemon], hub: HubServer, model: Path
) -> None:
    """Two pipelines of the same source: while its bytes come corrupted, the warm one keeps its own, and of the other
    one nothing is ever sealed, nor shown, that is not the source's."""
    hub.publish("org/model", model)
    daemon = make_daemon(
        config={"fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}}, allow=["."]
    )
    daemon.ok("add", "good", "hf://org/model")
    daemon.warm("good")
    before = os.stat(daemon.path("good", FIRST)).st_ino
    hub.fault("corrupt", port="cdn")
    daemon.ok("add", "poisoned", "hf://org/model")
    daemon.cli("warm", "poisoned", "--wait")
    assert daemon.status("poisoned")["state"] != "warm"
    states = {file["path"]: file["state"] for file in daemon.status("poisoned")["files"]}
    assert states[FIRST] != "sealed"
    assert daemon.status("good")["state"] == "warm"
    assert daemon.path("good", FIRST).read_bytes() == (model / FIRST).read_bytes()
    assert os.stat(daemon.path("good", FIRST)).st_ino == before
    slots = [daemon.store / "slots" / name for name in ("good", "poisoned")]
    inodes = [{path.stat().st_ino for path in slot.rglob("*") if path.is_file()} for slot in slots]
    assert not inodes[0] & inodes[1], "the slots share a file"
    hub.clear()
    daemon.warm("poisoned")
    assert daemon.path("poisoned", FIRST).read_bytes() == (model / FIRST).read_bytes()


@pytest.mark.parametrize("name", ["../good", ".warm", "a/b", "", "-x", "a\nb", "x" * 129, "ünï"])
def test_ids_that_collide_or_escape_are_refused(daemon: Daemon, model: Path, name: str) -> None:
    before = sorted(os.listdir(daemon.mount))
    done = daemon.cli("add", "--", name, f"file://{model}")
    assert done.returncode == 2, done.stderr
    assert sorted(os.listdir(daemon.mount)) == before


# ---------------------------------------------------------------- the way to the control socket


@pytest.mark.parametrize("before", [None, 0o755, 0o700], ids=["made by serve", "there", "there, and private"])
def test_owners_reach_the_socket_of_a_daemon_that_made_its_directory(
    open_directory: Path, model: Path, before: int | None
) -> None:
    """`serve` by hand under a umask of 077. Where somebody made the directory private, that is said and left."""
    directory = open_directory / f"run-{before}" / "deep"
    running = Daemon(open_directory / f"s-{before}", prefix=("sh", "-c", 'umask 077; exec "$0" "$@"'))
    running.socket = directory / "control.sock"
    running.env["INSTANTSTART_SOCKET"] = str(running.socket)
    if before is not None:
        directory.mkdir(parents=True)
        directory.parent.chmod(0o755)
        directory.chmod(before)
    with running:
        running.ok("add", "bobs", f"file://{model}", "--owner", owner(BOB), "--mode", "0500")
        if before == 0o700:
            assert f"not everybody may pass {directory}" in running.text()
            directory.chmod(0o711)
        for arguments in (("status", "bobs"), ("lease", "bobs", "--", "true")):
            status, _, err = cli_as(running, BOB, *arguments)
            assert status == 0, (arguments, err)
        assert python_as(BOB, READS["open"], running.path("bobs"), running.path("bobs", FIRST)) is None


# ---------------------------------------------------------------- a stranger's open, and root who wants the disk

STRANGER = (54321, 54321)
HOLD = (
    "import hashlib, mmap, os, sys\n"
    "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
    "mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ) if sys.argv[2] == 'mapped' else None\n"
    "print('held', flush=True)\n"
    "sys.stdin.readline()\n"
    "data = mapped[:] if mapped else open(fd, 'rb').read()\n"
    "print(hashlib.sha256(data).hexdigest(), flush=True)\n"
    "sys.stdin.readline()\n"
)


@contextlib.contextmanager
def held_by_a_stranger(path: Path, how: str = "open") -> Iterator[subprocess.Popen[str]]:
    user = [f"--reuid={STRANGER[0]}", f"--regid={STRANGER[1]}", "--clear-groups"]
    command = ["setpriv", *user, sys.executable, "-c", HOLD, str(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def hash_seen_by(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    print(file=process.stdin, flush=True)
    return process.stdout.readline().strip()


@pytest.mark.parametrize("how", ["open", "mapped"])
@pytest.mark.parametrize("transport", ["auto", "pyfuse3", "bind"])
def test_a_strangers_open_keeps_root_from_nothing_for_long(
    open_directory: Path, model: Path, transport: str, how: str
) -> None:
    """Root is told whose it is. By force the pipeline goes; whoever holds a complete file reads it to the end, and its
    space is free with the last close."""
    expected = hashlib.sha256((model / FIRST).read_bytes()).hexdigest()
    directory = open_directory / f"force-{transport}-{how}"
    with Daemon(directory, config={"mount": {"transport": transport}}) as running:
        slots = running.store / "slots"

        def used() -> int:
            return int(must("du", "-sB1", slots).split()[0])

        for verb in ("evict", "remove"):
            running.ok("add", "p", f"file://{model}")
            running.warm("p")
            with held_by_a_stranger(running.path("p", FIRST), how) as stranger:
                if verb == "evict":
                    refused = running.refused(1, verb, "p")
                    assert f"pid {stranger.pid} (python" in refused and f"uid {STRANGER[0]}" in refused, refused
                    assert "evict --force p" in refused
                done = running.ok(verb, "--force", "p")
                assert f"pid {stranger.pid} (python" in done and "space is free once" in done, done
                assert used() < 64 * 1024, "names of deleted files"
                if verb == "evict":
                    assert running.status("p")["cached_bytes"] == 0
                    running.warm("p")  # another generation of the same files, beside the one that is held
                    assert running.path("p", FIRST).read_bytes() == (model / FIRST).read_bytes()
                assert hash_seen_by(stranger) == expected
            if verb == "evict":
                wait_for(lambda: running.cli("evict", "p").returncode == 0, "the kernel's release of the file")
                running.ok("remove", "p")

        def released() -> bool:
            names = [os.readlink(fd) for fd in Path(f"/proc/{running.pid}/fd").iterdir() if fd.is_symlink()]
            return not any(name.endswith(".safetensors (deleted)") for name in names)

        wait_for(released, "the daemon's last descriptor of what was deleted")


def test_of_a_partial_file_that_was_taken_away_nobody_reads_anything_wrong(
    open_directory: Path, hub: HubServer, model: Path
) -> None:
    """What was not here yet is an error to whoever holds it, and the next fill begins anew."""
    hub.publish("org/model", model)
    config = {"fill": {"chunk_size": "1MiB"}, "origins": {"huggingface": {"endpoint": hub.endpoint}}}
    with Daemon(open_directory / "partial", config=config, allow=["."]) as running:
        running.ok("add", "p", "hf://org/model")
        with open(running.path("p", FIRST), "rb", buffering=0) as file:
            assert file.read(4096) == (model / FIRST).read_bytes()[:4096]
            running.ok("evict", "--force", "p")
            size = os.path.getsize(model / FIRST)
            with pytest.raises(OSError):
                os.pread(file.fileno(), 65536, size - 65536)
            running.warm("p")
            assert running.path("p", FIRST).read_bytes() == (model / FIRST).read_bytes()


def test_a_strangers_lease_is_named_and_ends_by_force(open_directory: Path, model: Path) -> None:
    with Daemon(open_directory / "leases") as running:
        running.ok("add", "bobs", f"file://{model}", "--owner", owner(BOB), "--mode", "0500")
        running.warm("bobs")
        environment = {**os.environ, "INSTANTSTART_SOCKET": str(running.socket), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "instantstart_fs.cli", "lease", "bobs", "--", "sleep", "60"]
        user = [f"--reuid={BOB[0]}", f"--regid={BOB[1]}", "--clear-groups"]
        with subprocess.Popen(["setpriv", *user, *command], env=environment, start_new_session=True) as holder:
            try:
                wait_for(lambda: running.status("bobs")["leases"] == 1, "the lease", 20)
                for verb in ("evict", "remove"):
                    refused = running.refused(1, verb, "bobs")
                    assert f"1 lease(s) hold it: pid {holder.pid} (" in refused and f"uid {BOB[0]}" in refused, refused
                running.ok("evict", "--force", "bobs")
                assert running.status("bobs")["cached_bytes"] == 0
                running.ok("remove", "--force", "bobs")
                assert json.loads(running.ok("ls", "--json")) == []
            finally:
                os.killpg(holder.pid, signal.SIGKILL)


# ---------------------------------------------------------------- the page and the metrics

ASK = (
    "import http.client, socket, sys\n"
    "class Unix(http.client.HTTPConnection):\n"
    "    def connect(self):\n"
    "        self.sock = socket.socket(socket.AF_UNIX)\n"
    "        self.sock.settimeout(20)\n"
    "        self.sock.connect(self.path)\n"
    "where, path = sys.argv[1:3]\n"
    "c = Unix('localhost') if where.startswith('/') else http.client.HTTPConnection(where, timeout=20)\n"
    "c.path = where\n"
    "c.request('GET', path, headers=dict(h.split(': ', 1) for h in sys.argv[3:]))\n"
    "a = c.getresponse()\n"
    "print(a.status)\n"
    "print(a.read().decode())"
)


def asked_as(who: tuple[int, int], where: str, path: str, *headers: str, groups: str = "") -> tuple[int, str]:
    status, out, err = as_user(who, sys.executable, "-c", ASK, where, path, *headers, groups=groups)
    assert status == 0, err
    code, _, text = out.partition("\n")
    return int(code), text


@pytest.fixture(scope="module")
def open_page(open_directory: Path, model: Path) -> Iterator[tuple[Daemon, str, str]]:
    """A daemon, its page's address, and its page's unix socket."""
    unix, token = open_directory / "page.sock", open_directory / "page-token"
    token.touch(0o600)
    token.write_text(PAGE_TOKEN)
    http = {"listen": "127.0.0.1:0", "socket": str(unix), "token_file": str(token)}
    with Daemon(open_directory / "page", config={"http": http}) as running:
        running.ok("add", "alices", f"file://{model}", "--owner", owner(ALICE), "--mode", "0550")
        running.ok("add", "bobs", f"file://{model}", "--owner", owner(BOB), "--mode", "0500")
        running.ok("add", "everybodys", f"file://{model}")
        running.warm("bobs")
        must("cksum", running.path("bobs", FIRST))
        yield running, re.findall(r"page http://([^/\s]+)", running.text())[-1], str(unix)


PAGE_TOKEN = "a-token-of-the-walls-0123456789"
EVERY_WAY = ("/", "/?q=bobs", "/?state=unverified", "/api/pipelines", "/metrics", "/healthz")


def test_the_page_and_the_metrics_tell_each_user_what_the_mount_would(open_page: tuple[Daemon, str, str]) -> None:
    """By the uid of who is connected; what is hidden and what is not there are answered alike."""
    running, tcp, unix = open_page
    for where in (tcp, unix):
        for who, sees in ((STRANGER, set()), (ALICE, {"alices"}), (BOB, {"bobs"}), ((0, 0), {"alices", "bobs"})):
            for path in EVERY_WAY if where == tcp else ("/", "/metrics"):
                status, text = asked_as(who, where, path)
                assert status == 200
                for name in {"alices", "bobs"} - sees:
                    assert name not in re.sub('(value="|q=)bobs', "", text), (where, who, path)
            pipelines = json.loads(asked_as(who, where, "/api/pipelines")[1])
            assert {row["pipeline"] for row in pipelines["rows"]} == {"everybodys", *sees}
            # What the mount says.
            listed = python_as(
                who, "[n for n in os.listdir(a[0]) if n[0] != '.' and os.access(a[0] + '/' + n, 5)]", running.mount
            )
            assert set(listed) == {"everybodys", *sees}  # type: ignore[call-overload]
            metrics = asked_as(who, where, "/metrics")[1]
            assert set(re.findall(r'pipeline="([^"]+)"', metrics)) == {"everybodys", *sees}
        for path in ("/badge/{}.svg", "/api/cold-starts/{}"):
            assert asked_as(ALICE, where, path.format("bobs")) == asked_as(ALICE, where, path.format("nobodys"))
            assert asked_as(BOB, where, path.format("bobs"))[0] == 200
    # A group is known where the kernel says it: on the unix socket.
    for where, seen in ((unix, True), (tcp, False)):
        assert ("alices" in asked_as(BOB, where, "/api/pipelines", groups=str(ALICE[1]))[1]) is seen


def test_the_control_socket_knows_who_asks_it_over_http(open_page: tuple[Daemon, str, str]) -> None:
    running, _, page = open_page
    control = str(running.socket)
    for who, bobs in ((ALICE, 403), (BOB, 200), (STRANGER, 403), ((0, 0), 200)):
        assert asked_as(who, control, "/v1/pipelines/bobs?brief=true")[0] == bobs
    assert asked_as(BOB, control, "/v1/specs")[0] == 403
    assert "bobs" not in asked_as(ALICE, control, "/v1/pipelines")[1]
    # On the page's own socket nobody, root either: its verbs are for the bearer of a token.
    assert asked_as((0, 0), page, "/v1/pipelines")[0] == 403


def test_a_scraper_without_rights_needs_the_token(open_page: tuple[Daemon, str, str]) -> None:
    _, tcp, _ = open_page
    bearer = f"Authorization: Bearer {PAGE_TOKEN}"
    status, text = asked_as(STRANGER, tcp, "/metrics", bearer)
    assert status == 200 and 'pipeline="bobs"' in text and "instantstart_store_used_bytes" in text
    assert asked_as(STRANGER, tcp, "/metrics", bearer + "x")[0] == 401
    assert "instantstart_store_used_bytes" not in asked_as(STRANGER, tcp, "/metrics")[1]


def test_whoever_idles_on_the_pages_connections_keeps_nobody_out(open_page: tuple[Daemon, str, str]) -> None:
    """Connections without a request, and half requests, of one user, as many as he gets."""
    _, tcp, _ = open_page
    idle = (
        "import socket, sys, time\nhost, port = sys.argv[1].rsplit(':', 1)\nheld = []\n"
        "for n in range(300):\n"
        "    held.append(socket.create_connection((host, int(port)), 20))\n"
        "    held[-1].sendall(b'GET / HTTP/1.1\\r\\nHost: x' if n % 2 else b'')\n"
        "print('idle', flush=True)\nsys.stdin.readline()"
    )
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable, "-c", idle, tcp]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        try:
            assert stranger.stdout is not None and stranger.stdout.readline() == "idle\n"
            for who in ((0, 0), ALICE, STRANGER):
                assert asked_as(who, tcp, "/healthz")[0] == 200
        finally:
            stranger.kill()
