"""The bare client: the same kind of fetching as the filler's, and nothing else. No store, no index, no FUSE.

    python -m bench.bare_client JOB.json [--workers N] [--connections C] [--chunk 8MiB] [--no-hash] [--no-fsync]

JOB.json: ``[{"url", "size", "sha256", "path"}, …]``. N processes share C connections; each file belongs to one process,
whose threads take its chunks in order: a ranged GET by urllib3, read into a reused 1 MiB buffer as the filler reads it
(filler/body.py), pwrite. A hashing thread per process follows the contiguous prefix through pread (``--no-hash``: fetch
only), then the file is fsynced (``--no-fsync``: not). Prints one JSON object; a wrong digest or a short body is exit 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

import urllib3

from bench.common import MIB, size
from instantstart_fs.filler.body import reading


class File:
    def __init__(self, job: dict[str, Any], chunk: int) -> None:
        self.url: str = job["url"]
        self.size: int = job["size"]
        self.sha256: str = job["sha256"]
        self.fd = os.open(job["path"], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, self.size)
        self.chunk = chunk
        self.count = -(-self.size // chunk)
        self.done = bytearray(self.count)
        self.prefix = 0


class Process:
    """One worker process: ``connections`` fetching threads over its files in order, one hashing thread."""

    def __init__(self, jobs: list[dict[str, Any]], connections: int, chunk: int, hashing: bool, fsync: bool) -> None:
        self.files = [File(job, chunk) for job in jobs]
        self.todo = iter([(file, number) for file in self.files for number in range(file.count)])
        self.connections, self.hashing, self.fsync = connections, hashing, fsync
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.pool = urllib3.PoolManager(maxsize=connections)

    def run(self) -> None:
        threads = [threading.Thread(target=self._guard, args=(self._fetch_all,)) for _ in range(self.connections)]
        threads.append(threading.Thread(target=self._guard, args=(self._finish_all,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _guard(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def _fetch_all(self) -> None:
        buffer = memoryview(bytearray(MIB))
        while self.failure is None:
            with self.changed:
                item = next(self.todo, None)
            if item is None:
                return
            file, number = item
            self._fetch(file, number, buffer)
            with self.changed:
                file.done[number] = 1
                while file.prefix < file.count and file.done[file.prefix]:
                    file.prefix += 1
                self.changed.notify_all()

    def _fetch(self, file: File, number: int, buffer: memoryview) -> None:
        offset = number * file.chunk
        stop = min(offset + file.chunk, file.size)
        response = self.pool.urlopen(
            "GET",
            file.url,
            headers={"Range": f"bytes={offset}-{stop - 1}", "Accept-Encoding": "identity"},
            preload_content=False,
            decode_content=False,
            retries=False,
        )
        if response.status != 206:
            raise RuntimeError(f"{file.url}: {response.status}")
        connection = response.connection
        with reading(response, getattr(connection, "sock", None), 60.0) as read:
            while offset < stop:
                filled, limit = 0, min(len(buffer), stop - offset)
                while filled < limit:
                    count = read(buffer[filled:limit])
                    if not count:
                        raise RuntimeError(f"{file.url}: the body was cut short")
                    filled += count
                os.pwrite(file.fd, buffer[:filled], offset)
                offset += filled
            read(buffer[:1])
        response.release_conn()

    def _finish_all(self) -> None:
        buffer = memoryview(bytearray(MIB))
        for file in self.files:
            digest = hashlib.sha256()
            offset = 0
            while offset < file.size:
                with self.changed:
                    self.changed.wait_for(lambda: file.prefix * file.chunk > offset or self.failure is not None)  # noqa: B023
                    if self.failure is not None:
                        return
                    limit = min(file.prefix * file.chunk, file.size)
                while self.hashing and offset < limit:
                    count = os.preadv(file.fd, [buffer[: min(MIB, limit - offset)]], offset)
                    digest.update(buffer[:count])
                    offset += count
                offset = limit
            if self.fsync:
                os.fsync(file.fd)
            if self.hashing and digest.hexdigest() != file.sha256:
                raise RuntimeError(f"{file.url}: wrong digest")


def work(jobs: list[dict[str, Any]], connections: int, chunk: int, hashing: bool, fsync: bool) -> None:
    Process(jobs, connections, chunk, hashing, fsync).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--connections", type=int, default=16, help="in total over the workers")
    parser.add_argument("--chunk", type=size, default=8 * MIB)
    parser.add_argument("--no-hash", action="store_true")
    parser.add_argument("--no-fsync", action="store_true")
    options = parser.parse_args()
    # A terminated parent must end its processes, which happens on the way out of Python only.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = time.monotonic()
    with open(options.job) as file:
        jobs: list[dict[str, Any]] = json.load(file)
    workers = min(options.workers, len(jobs))
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=work,
            args=(
                jobs[number::workers],
                max(1, options.connections // workers),
                options.chunk,
                not options.no_hash,
                not options.no_fsync,
            ),
            daemon=True,
        )
        for number in range(workers)
    ]
    for child in processes:
        child.start()
    for child in processes:
        child.join()
    failed = [child.exitcode for child in processes if child.exitcode]
    print(json.dumps({"seconds": time.monotonic() - started, "bytes": sum(job["size"] for job in jobs)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
