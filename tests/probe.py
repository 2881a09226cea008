"""What touches a mount, as a process of its own: `python -m tests.probe WHAT ARGUMENTS…` prints JSON.

compare KIND SOURCE MOUNTED [SEED]   the number of bytes compared; exits 1 at the first difference. KIND: read,
                                     pread, mmap-private, mmap-shared, sendfile
tree SOURCE MOUNTED                  every file of two trees: the names, and the bytes by read
write-attempts DIRECTORY FILE        errno name of each way to change something
hold FILE                            opens and maps FILE, then serves commands on stdin (see there)
stuck COUNT FILE…                    COUNT threads fault in COUNT pages each of its own mmap; prints "ready" first
timed-stat SECONDS PATH…             stat them round and round; milliseconds: median, max, count
first-byte FILE OFFSET               read one page at OFFSET through a fresh mmap; seconds
read-error FILE OFFSET               {"errno": …, "seconds": …} of a pread
forked HOW COUNT (SOURCE MOUNTED)…   COUNT forked processes compare every block of the files, each in an order of its
                                     own; HOW: one-map (mapped before the fork), each-maps. COUNT when all were right
advise SOURCE MOUNTED                readahead(2) and WILLNEED on a descriptor, then compare by it; the bytes
listing DIRECTORY                    {name: [inode of the entry, inode by stat]}
patient FILE ABSENT                  opens FILE twice, probes ABSENT, closes once, says "ready"; after a line on stdin
                                     it probes and closes again; milliseconds
bound DIRECTORY TARGET               (in a mount namespace of its own) binds DIRECTORY on TARGET as a slave, says
                                     "ready"; for each line NAME the sha256 of that file there, for "." the names
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BLOCK = 1 << 20


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)


def _same(what: str, one: bytes | memoryview, other: bytes | memoryview, offset: int) -> None:
    if one != other:
        first = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        _fail(f"{what}: lengths {len(one)}, {len(other)}; the first difference is at offset {offset + first}")


def compare(kind: str, source: str, mounted: str, seed: str = "0") -> int:
    size = os.stat(source).st_size
    if os.stat(mounted).st_size != size:
        _fail(f"{mounted}: {os.stat(mounted).st_size} bytes, the source has {size}")
    generator = random.Random(int(seed))
    with open(source, "rb") as want, open(mounted, "rb", buffering=0) as got:
        if kind == "read":
            for offset in range(0, size + 1, BLOCK):
                _same(kind, os.pread(want.fileno(), BLOCK, offset), _read(got.fileno(), BLOCK), offset)
        elif kind == "pread":
            for _ in range(200):
                offset, length = generator.randrange(size + 1), generator.choice((1, 100, 4096, 65536, 300_000))
                wanted = os.pread(want.fileno(), length, offset)
                _same(kind, wanted, os.pread(got.fileno(), length, offset), offset)
            if os.pread(got.fileno(), 10, size) != b"":
                _fail("bytes beyond the end")
            return 200
        elif kind in ("mmap-private", "mmap-shared"):
            flags = mmap.MAP_PRIVATE if kind == "mmap-private" else mmap.MAP_SHARED
            with mmap.mmap(got.fileno(), size, flags=flags, prot=mmap.PROT_READ) as mapped:
                offsets = list(range(0, size, BLOCK))
                generator.shuffle(offsets)
                for offset in offsets:
                    _same(kind, os.pread(want.fileno(), BLOCK, offset), mapped[offset : offset + BLOCK], offset)
        elif kind == "sendfile":
            left, right = socket.socketpair()
            sender = threading.Thread(target=_send, args=(left, got.fileno(), size), daemon=True)
            sender.start()
            offset = 0
            while data := right.recv(BLOCK):
                _same(kind, os.pread(want.fileno(), len(data), offset), data, offset)
                offset += len(data)
            if offset != size:
                _fail(f"sendfile: {offset} of {size} bytes")
            right.close()
        else:
            _fail(f"unknown kind {kind}")
    return size


def _send(out: socket.socket, descriptor: int, size: int) -> None:
    offset = 0
    with out:
        while offset < size:
            sent = os.sendfile(out.fileno(), descriptor, offset, min(BLOCK, size - offset))
            if sent == 0:
                return
            offset += sent


def _read(descriptor: int, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        data = os.read(descriptor, length - len(parts))
        if not data:
            break
        parts += data
    return parts


def tree(source: str, mounted: str) -> dict[str, int]:
    def names(root: str) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(parent, name), root)
            for parent, _, files in os.walk(root, onerror=lambda error: _fail(str(error)))
            for name in files
        )

    if names(source) != names(mounted):
        _fail(f"the names differ: {set(names(source)) ^ set(names(mounted))}")
    total = 0
    for name in names(source):
        total += compare("read", os.path.join(source, name), os.path.join(mounted, name))
    return {"files": len(names(source)), "bytes": total}


def write_attempts(directory: str, file: str) -> dict[str, str]:
    path, new = os.path.join(directory, file), os.path.join(directory, "new")
    attempts: dict[str, Callable[[], Any]] = {
        "open O_WRONLY": lambda: os.open(path, os.O_WRONLY),
        "open O_RDWR": lambda: os.open(path, os.O_RDWR),
        "open O_TRUNC": lambda: os.open(path, os.O_WRONLY | os.O_TRUNC),
        "open O_APPEND": lambda: os.open(path, os.O_WRONLY | os.O_APPEND),
        "create": lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        "O_TMPFILE": lambda: os.open(directory, os.O_TMPFILE | os.O_RDWR),
        "truncate": lambda: os.truncate(path, 0),
        "unlink": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, new),
        "link": lambda: os.link(path, new),
        "symlink": lambda: os.symlink("x", new),
        "mkdir": lambda: os.mkdir(new),
        "rmdir": lambda: os.rmdir(directory),
        "mkfifo": lambda: os.mkfifo(new),
        "chmod": lambda: os.chmod(path, 0o777),
        "chown": lambda: os.chown(path, 1, 1),
        "utime": lambda: os.utime(path, (1, 1)),
        "setxattr": lambda: os.setxattr(path, "user.x", b"1"),
        "removexattr": lambda: os.removexattr(path, "user.instantstart.state"),
        "pipeline mkdir": lambda: os.mkdir(os.path.join(os.path.dirname(directory), "new-pipeline")),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, "?")
    return found


def hold(path: str) -> None:
    """One answer a line: ``hash-fd``, ``hash-map`` (sha256 of all bytes by the open descriptor, by the mmap opened at
    the start), ``hash-new`` (by a new open of the same path); an OSError gives its errno's name; ``end``."""
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        word = line.strip()
        try:
            if word == "end":
                return
            if word == "hash-map":
                answer = hashlib.sha256(mapped).hexdigest()
            else:
                use = os.open(path, os.O_RDONLY) if word == "hash-new" else descriptor
                hasher, offset = hashlib.sha256(), 0
                while data := os.pread(use, BLOCK, offset):
                    hasher.update(data)
                    offset += len(data)
                if use is not descriptor:
                    os.close(use)
                answer = hasher.hexdigest()
        except OSError as error:
            answer = errno.errorcode.get(error.errno or 0, "?")
        print(json.dumps(answer), flush=True)


def stuck(count: str, *paths: str) -> None:
    """Never returns while the origin is silent: kill it."""
    maps = []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        maps.append((mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), size))
    number = int(count)
    memcpy = ctypes.CDLL(None).memcpy  # ctypes gives up the GIL: the faults wait side by side
    base = [ctypes.addressof(_buffer(mapped)) for mapped, _ in maps]
    started = threading.Barrier(number + 1)

    def fault(position: int) -> None:
        which = position % len(maps)
        size = maps[which][1]
        offset = (size // number * position) & ~4095
        target = ctypes.create_string_buffer(64)
        started.wait()
        memcpy(ctypes.c_void_p(ctypes.addressof(target)), ctypes.c_void_p(base[which] + offset), ctypes.c_size_t(64))

    threads = [threading.Thread(target=fault, args=(position,), daemon=True) for position in range(number)]
    for thread in threads:
        thread.start()
    started.wait()
    print(json.dumps("ready"), flush=True)
    for thread in threads:
        thread.join()


def stuck_direct(count: str, path: str) -> None:
    """So many O_DIRECT readers of a file that does not come; never returns while they wait: kill it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size, number = os.fstat(descriptor).st_size, int(count)
    threading.stack_size(64 * 1024)

    def read(position: int) -> None:
        with contextlib.suppress(OSError):
            os.preadv(descriptor, [mmap.mmap(-1, 4096)], (size // number * position) & ~4095)

    threads = [threading.Thread(target=read, args=(position,), daemon=True) for position in range(number)]
    for thread in threads:
        thread.start()
    print(json.dumps("ready"), flush=True)
    for thread in threads:
        thread.join()


def _buffer(mapped: mmap.mmap) -> Any:
    """The mapping as a ctypes object. A read-only mapping gives ctypes no pointer, so ask through the buffer API."""

    class PyBuffer(ctypes.Structure):
        _fields_ = [
            ("buf", ctypes.c_void_p),
            ("obj", ctypes.py_object),
            ("len", ctypes.c_ssize_t),
            ("itemsize", ctypes.c_ssize_t),
            ("readonly", ctypes.c_int),
            ("ndim", ctypes.c_int),
            ("format", ctypes.c_char_p),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("suboffsets", ctypes.c_void_p),
            ("internal", ctypes.c_void_p),
        ]

    view = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(view), 0)
    return (ctypes.c_char * 1).from_address(view.buf)


def timed_stat(seconds: str, *paths: str) -> dict[str, float]:
    taken = []
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline:
        for path in paths:
            before = time.perf_counter()
            os.stat(path)
            taken.append((time.perf_counter() - before) * 1000)
        time.sleep(0.005)  # a pause between measurements, not a synchronisation
    return {"median": statistics.median(taken), "max": max(taken), "count": len(taken)}


def first_byte(path: str, offset: str) -> float:
    before = time.perf_counter()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapped[int(offset)]
    return time.perf_counter() - before


def read_error(path: str, offset: str) -> dict[str, Any]:
    before = time.perf_counter()
    number = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        os.pread(descriptor, 4096, int(offset))
    except OSError as error:
        number = error.errno or 0
    return {"errno": errno.errorcode.get(number, ""), "seconds": time.perf_counter() - before}


def read_errors(offset: str, *paths: str) -> list[dict[str, Any]]:
    """``read_error`` of all of them at once."""
    with concurrent.futures.ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(lambda path: read_error(path, offset), paths))


def forked(how: str, count: str, *pairs: str) -> int:
    files = list(zip(pairs[::2], pairs[1::2], strict=True))
    maps = [_map(mounted) for _, mounted in files] if how == "one-map" else None
    pids = []
    for number in range(int(count)):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 1
        try:
            mine = maps if maps is not None else [_map(mounted) for _, mounted in files]
            generator = random.Random(number)
            for (source, _), mapped in zip(files, mine, strict=True):
                offsets = list(range(0, len(mapped), BLOCK))
                generator.shuffle(offsets)
                with open(source, "rb") as want:
                    for offset in offsets:
                        piece = os.pread(want.fileno(), BLOCK, offset)
                        _same(f"process {number}", piece, mapped[offset : offset + BLOCK], offset)
            status = 0
        finally:
            os._exit(status)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def advise(source: str, mounted: str) -> int:
    size = os.stat(source).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with open(source, "rb") as want, open(mounted, "rb", buffering=0) as got:
        for offset in range(0, size, BLOCK):
            length = min(BLOCK, size - offset)
            if offset // BLOCK % 2:
                os.posix_fadvise(got.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
            elif libc.readahead(got.fileno(), ctypes.c_int64(offset), ctypes.c_size_t(length)) != 0:
                _fail(f"readahead: {os.strerror(ctypes.get_errno())}")
            _same("advise", os.pread(want.fileno(), length, offset), os.pread(got.fileno(), length, offset), offset)
        with mmap.mmap(got.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_WILLNEED)
            for offset in range(0, size, BLOCK):
                _same("mmap", os.pread(want.fileno(), BLOCK, offset), mapped[offset : offset + BLOCK], offset)
    return size


def listing(directory: str) -> dict[str, list[int]]:
    with os.scandir(directory) as entries:
        return {entry.name: [entry.inode(), entry.stat().st_ino] for entry in entries}


def patient(path: str, absent: str) -> float:
    first, second = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    _probe_absent(absent)
    os.close(first)
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    before = time.perf_counter()
    _probe_absent(absent)
    os.close(second)
    return (time.perf_counter() - before) * 1000


def _probe_absent(path: str) -> None:
    if os.path.exists(path):
        _fail(f"{path} exists")


def bound(directory: str, target: str) -> None:
    for options in (["--bind", directory, target], ["--make-rslave", target]):
        subprocess.run(["mount", *options], check=True, timeout=20)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        answer: Any
        if name == ".":
            answer = sorted(os.listdir(target))
        else:
            with open(os.path.join(target, name), "rb") as file:
                answer = hashlib.file_digest(file, "sha256").hexdigest()
        print(json.dumps(answer), flush=True)


def main() -> None:
    what, *arguments = sys.argv[1:]
    found = {
        "compare": compare,
        "tree": tree,
        "write-attempts": write_attempts,
        "hold": hold,
        "stuck": stuck,
        "stuck-direct": stuck_direct,
        "timed-stat": timed_stat,
        "first-byte": first_byte,
        "read-error": read_error,
        "read-errors": read_errors,
        "forked": forked,
        "advise": advise,
        "listing": listing,
        "patient": patient,
        "bound": bound,
    }[what](*arguments)
    if what not in ("hold", "stuck", "stuck-direct", "bound"):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
