"""What processes see of a mount of the fake View: bytes, names, errors, and that one stuck file holds up nobody."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time

import pytest

from tests.fuse.conftest import FakeDaemon, Readers, StartDaemon, command, python, read_line, wait_for

CONTENT = """
import mmap, os, sys, threading, random
sys.path.insert(0, sys.argv[2])
from tests.fuse.fake_view import content
path = sys.argv[1]
size = os.stat(path).st_size
"""
ROOT_DIR = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

WAYS = {
    "read": "with open(path, 'rb') as f: assert f.read() == content(0, size)",
    "pread": """
fd = os.open(path, os.O_RDONLY)
rng = random.Random(7)
for _ in range(500):
    offset, length = rng.randrange(size + 10), rng.choice([1, 4095, 65536, 300_000])
    assert os.pread(fd, length, offset) == content(offset, max(0, min(length, size - offset))), offset
""",
    "mmap-shared": """
fd = os.open(path, os.O_RDONLY)
with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as m: assert m[:] == content(0, size)
""",
    "mmap-private": """
fd = os.open(path, os.O_RDONLY)
with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
    m[5] = 1
    assert m[6:] == content(6, size - 6)
assert os.pread(fd, 10, 0) == content(0, 10)
""",
    "mmap-random": """
fd = os.open(path, os.O_RDONLY)
with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as m:
    m.madvise(mmap.MADV_RANDOM)
    rng = random.Random(7)
    for _ in range(300):
        offset = rng.randrange(size)
        assert m[offset:offset + 50] == content(offset, min(50, size - offset))
""",
    "sendfile": """
import socket
a, b = socket.socketpair()
def send():
    fd, sent = os.open(path, os.O_RDONLY), 0
    while n := os.sendfile(a.fileno(), fd, sent, 1 << 20): sent += n
    a.close()
threading.Thread(target=send).start()
got = bytearray()
while data := b.recv(1 << 20): got += data
assert got == content(0, size)
""",
    "direct": """
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
offset = 0
while n := os.preadv(fd, [buffer], offset):
    assert buffer[:n] == content(offset, n), offset
    offset += n
assert offset == size
""",
    "threads": """
fd, wrong = os.open(path, os.O_RDONLY), []
def reader(seed):
    rng = random.Random(seed)
    for _ in range(150):
        offset = rng.randrange(size)
        length = rng.choice([4096, 131072, 1 << 20])
        if os.pread(fd, length, offset) != content(offset, min(length, size - offset)): wrong.append(offset)
threads = [threading.Thread(target=reader, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong, wrong
""",
}


@pytest.mark.parametrize("name", ["weights.safetensors", "slow.safetensors"])
@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_the_same_in_every_way(daemon: FakeDaemon, way: str, name: str) -> None:
    python(CONTENT + WAYS[way], str(daemon.path / "model" / name), ROOT_DIR)
    wait_for(lambda: daemon.ask("open") == "0", 10)


def test_names_and_attributes(shared_daemon: FakeDaemon) -> None:
    model = shared_daemon.path / "model"
    shown = python("import os, sys; print(sorted(os.listdir(sys.argv[1])) )", str(model))
    assert "with space ü 模型.json" in shown
    fields = python(
        "import os, sys; s = os.stat(sys.argv[1]);"
        "print(s.st_size, s.st_blocks, oct(s.st_mode), s.st_mtime_ns, s.st_atime_ns, s.st_blksize)",
        str(model / "weights.safetensors"),
    )
    size = 8 * 1024 * 1024 + 4321
    assert fields == f"{size} {-(-size // 512)} 0o100444 1600000000123456789 1700000000000000001 131072"
    assert python("import os, sys; print(os.readlink(sys.argv[1]))", str(model / "link")) == "weights.safetensors"
    assert command("cat", str(model / "empty.json")).stdout == ""
    assert command("stat", "-f", "-c", "%T %l %S", str(model)).stdout.split()[1:] == ["255", "4096"]


def test_xattrs_as_getfattr_asks(shared_daemon: FakeDaemon) -> None:
    shown = python(
        "import os, sys\nfor n in os.listxattr(sys.argv[1]): print(n, os.getxattr(sys.argv[1], n))",
        str(shared_daemon.path / "model" / "empty.json"),
    )
    assert shown.splitlines() == ["user.instantstart.state b'warm'", "user.instantstart.error b''"]


@pytest.mark.alone
def test_ten_thousand_files(shared_daemon: FakeDaemon) -> None:
    many = str(shared_daemon.path / "many")
    started = time.monotonic()
    shown = command("ls", "-l", many).stdout.splitlines()[1:]
    took = time.monotonic() - started
    assert [line.split()[-1] for line in shown] == [f"file-{i:05}" for i in range(10_000)]
    assert [int(line.split()[4]) for line in shown] == list(range(10_000))
    assert took < 5.0


@pytest.mark.parametrize(
    "attempt",
    [
        "open(p + '/new', 'w')", "open(p + '/empty.json', 'a')", "os.mkdir(p + '/d')", "os.unlink(p + '/empty.json')",
        "os.rename(p + '/empty.json', p + '/other')", "os.symlink('x', p + '/s')", "os.truncate(p + '/empty.json', 5)",
        "os.link(p + '/empty.json', p + '/l')", "os.chmod(p + '/empty.json', 0o600)", "os.utime(p + '/empty.json')",
        "os.setxattr(p + '/empty.json', 'user.x', b'')", "os.removexattr(p + '/empty.json', 'user.instantstart.state')",
        "os.mkfifo(p + '/f')", "os.rmdir(p)",
    ],
)  # fmt: skip
def test_every_write_is_erofs(shared_daemon: FakeDaemon, attempt: str) -> None:
    code = f"import os, sys\np = sys.argv[1]\ntry:\n  {attempt}\nexcept OSError as e: print(e.errno)"
    assert python(code, str(shared_daemon.path / "model")) == str(errno.EROFS)


@pytest.mark.parametrize(
    ("name", "number"),
    [("fails-open", "EIO"), ("fails-read", "EIO"), ("fails-bug", "EIO"), ("fails-base", "EIO"), ("bug", "EIO"),
     ("absent", "ENOENT"), ("n" * 256, "ENAMETOOLONG"), ("fails-release", None)],
)  # fmt: skip
def test_errors_reach_their_caller_and_nobody_else(shared_daemon: FakeDaemon, name: str, number: str | None) -> None:
    code = (
        "import sys, errno\ntry: open(sys.argv[1], 'rb').read()\nexcept OSError as e: print(errno.errorcode[e.errno])"
    )
    assert python(code, str(shared_daemon.path / "model" / name)) == (number or "")
    assert command("ls", str(shared_daemon.path)).stdout.split() == ["live", "many", "model"]
    assert shared_daemon.process.poll() is None


@pytest.mark.alone
def test_a_new_name_shows_at_once_though_its_absence_was_cached(daemon: FakeDaemon) -> None:
    """The parent is stable: without the invalidation its absence would be remembered for 10 s."""
    path = str(daemon.path / "live" / "later")
    code = """
import os, sys, time
path = sys.argv[1]
assert not os.path.exists(path)
print("absent", flush=True)
sys.stdin.readline()
start = time.monotonic()
while not os.path.exists(path):
    assert time.monotonic() - start < 5
print(time.monotonic() - start)
"""
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert read_line(process, 10) == "absent"
        assert daemon.ask("add later") == "ok"
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert float(read_line(process, 10)) < 1.0


def test_removed_and_grown_files_show_at_once(daemon: FakeDaemon) -> None:
    live = daemon.path / "live"
    size = "import os, sys; print(os.stat(sys.argv[1]).st_size)"
    assert python(size, str(live / "first")) == "10"
    assert daemon.ask("grow first") == "ok"
    wait_for(lambda: python(size, str(live / "first")) == "20", 5)
    assert daemon.ask("remove first") == "ok"
    wait_for(lambda: python("import os, sys; print(os.path.exists(sys.argv[1]))", str(live / "first")) == "False", 5)


STUCK = {
    "read": "os.read(fd, 4096)",
    "mmap": "mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)[0]",
}


@pytest.mark.parametrize("way", STUCK)
@pytest.mark.alone
def test_a_killed_reader_exits_at_once(daemon: FakeDaemon, readers: Readers, way: str) -> None:
    reader = readers.start(
        f"import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); {STUCK[way]}", str(daemon.path / "model/stuck")
    )
    daemon.wait_stuck(1)
    started = time.monotonic()
    reader.kill()
    reader.wait(10)
    assert time.monotonic() - started < 1.0
    assert command("ls", str(daemon.path)).returncode == 0


FAULT_ONE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
m[4 * 1024 * 1024]
"""
PROBE = """
import mmap, os, sys, time
model = sys.argv[1]
worst = 0.0
for i in range(200):
    start = time.monotonic()
    os.stat(f"{model}/../many/file-{i:05}")
    worst = max(worst, time.monotonic() - start)
fd = os.open(model + "/weights.safetensors", os.O_RDONLY)
m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
start = time.monotonic()
m[1 << 20]
print(worst, time.monotonic() - start)
"""


@pytest.mark.parametrize("shape", ["one file", "64 files"])
@pytest.mark.alone
def test_64_stuck_faults_delay_nobody_else(daemon: FakeDaemon, readers: Readers, shape: str) -> None:
    """The readers are processes: a thread that faults keeps its interpreter's lock. In the one file each faults in the
    middle of a region of its own, since the kernel reads around a fault."""
    model = daemon.path / "model"
    for i in range(64):
        code = FAULT_ONE.replace("4 * 1024 * 1024", f"(4 * {i} + 2) * 1024 * 1024" if shape == "one file" else "0")
        readers.start(code, str(model / ("stuck" if shape == "one file" else f"stuck{i}")))
    daemon.wait_stuck(64, timeout=60)
    stat_worst, fault = (float(word) for word in python(PROBE, str(model)).split())
    assert stat_worst <= 0.050
    assert fault <= 1.0
    started = time.monotonic()
    for reader in readers.processes:
        reader.kill()
    for reader in readers.processes:
        reader.wait(10)
    assert time.monotonic() - started < 3.0


def test_reads_beyond_the_background_queue_leave_room_for_others(daemon: FakeDaemon, readers: Readers) -> None:
    """A thousand stuck requests, each with a buffer, stay within the daemon's memory budget."""
    code = """
import os, sys, threading
def read(i):
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 4096, i * 65536)
threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(1000)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    readers.start(code, str(daemon.path / "model" / "stuck"))
    daemon.wait_stuck(1, reads=1000, timeout=60)
    stat_worst, fault = (float(word) for word in python(PROBE, str(daemon.path / "model")).split())
    assert stat_worst <= 0.050
    assert fault <= 1.0
    with open(f"/proc/{daemon.process.pid}/status") as lines:
        match = re.search(r"VmRSS:\s+(\d+) kB", lines.read())
    assert match is not None
    print("RSS with 1000 waiting reads, kB:", match[1])
    assert int(match[1]) < 200 * 1024


def test_handles_do_not_leak(start_daemon: StartDaemon, readers: Readers) -> None:
    daemon = start_daemon()
    for _ in range(5):
        python("import sys; open(sys.argv[1], 'rb').read(10)", str(daemon.path / "model/weights.safetensors"))
    reader = readers.start("import sys; open(sys.argv[1], 'rb').read(10)", str(daemon.path / "model/stuck"))
    daemon.wait_stuck(1)
    assert daemon.ask("open") == "1"
    reader.kill()
    reader.wait(10)
    # Its readahead is still out, and holds the file until it is answered.
    assert daemon.ask("unstick") == "ok"
    wait_for(lambda: daemon.ask("open") == "0", 10)
