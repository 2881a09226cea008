"""The listing process: lists and pins one source, reports it file by file, and exits, which frees its memory.

    python -m instantstart_fs.origins.lister < order > frames

For sources that are too large for the daemon (origins/bounds.py): decoding a hundred megabytes would stop all its
threads, and a process seldom gives memory back. ``run`` is the daemon's side. The process exits when its standard input
ends (its caller is not there any more), after its time, and beyond its memory. The OOM killer takes it before the
daemon.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import IO, Literal

import msgspec

from instantstart_fs.core.manifest import ManifestFile, ModelManifest, ModelSpec, PipelineSpec, Skipped
from instantstart_fs.errors import (
    InstantStartError,
    OriginMisbehaved,
    OriginUnavailable,
    OriginUnsupported,
    from_code,
)
from instantstart_fs.ipc.children import spawn_module
from instantstart_fs.origins.settings import OriginSettings
from instantstart_fs.system.threads import start_thread

log = logging.getLogger(__name__)

SLICE = 1000
"""Files of a frame: decoding it holds up the others for under a millisecond."""
MEMORY = 4 << 30
"""The most bytes that the process may take."""


What = Literal["resolve", "check"]


class Order(msgspec.Struct, frozen=True):
    """``seconds`` after which the process ends."""

    what: What
    spec: PipelineSpec
    model: ModelSpec
    settings: OriginSettings
    seconds: float


class Files(msgspec.Struct, tag=True, frozen=True):
    files: list[ManifestFile]


class Said(msgspec.Struct, tag=True, frozen=True):
    """A line for the daemon's log."""

    level: int
    logger: str
    text: str


class Done(msgspec.Struct, tag=True, frozen=True):
    name: str = ""
    source: str = ""
    revision: str = ""
    skipped: Skipped | None = None


class Failed(msgspec.Struct, tag=True, frozen=True):
    code: str
    message: str
    retry_after: float | None = None


Frame = Files | Said | Done | Failed
_frames = msgspec.msgpack.Decoder(Frame)


class Lister:
    """A process that lists. Call ``run`` in a thread; ``end`` from any thread, any number of times."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def run(self) -> ModelManifest | None:
        """The manifest, None of a check. Raises what an origin raises."""
        source = self._order.model.source
        try:
            process = spawn_module(
                "instantstart_fs.origins.lister", stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
            )
        except OSError as error:
            raise OriginUnavailable(f"{source}: no process to list it: {os.strerror(error.errno or 0)}") from error
        self._process = process
        if self._ended:
            self.end()
        assert process.stdin is not None and process.stdout is not None
        files: list[ManifestFile] = []
        try:
            with contextlib.suppress(BrokenPipeError):
                _write(process.stdin, msgspec.msgpack.encode(self._order))
            while (raw := _read(process.stdout)) is not None:
                frame = _frames.decode(raw)
                match frame:
                    case Files():
                        files += frame.files
                    case Said():
                        logging.getLogger(frame.logger).log(frame.level, "%s", frame.text)
                    case Failed():
                        raise from_code(frame.code, frame.message, retry_after=frame.retry_after)
                    case Done():
                        if self._order.what == "check":
                            return None
                        return ModelManifest(frame.name, frame.source, frame.revision, tuple(files), frame.skipped)
        except msgspec.MsgspecError as error:
            raise OriginMisbehaved(f"{source}: its listing process says what cannot be read ({error})") from None
        finally:
            self.end()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()
        if process.returncode == -signal.SIGALRM:
            raise OriginUnavailable(f"{source}: its listing is not whole after {self._order.seconds:g} s")
        raise OriginUnavailable(
            f"{source}: its listing process ended (status {process.returncode}); was it killed for want of memory?"
        )

    def end(self) -> None:
        self._ended = True
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def _write(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(4, "big") + frame)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the end, also in the midst of one."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    body = stream.read(length)
    return body if len(body) == length else None


# -- in the process ----------------------------------------------------------------------------------------------------


class _Telling(logging.Handler):
    def __init__(self, out: IO[bytes], lock: threading.Lock) -> None:
        super().__init__(logging.WARNING)
        self._out = out
        self._write_lock = lock

    def emit(self, record: logging.LogRecord) -> None:
        said = Said(record.levelno, record.name, record.getMessage())
        with self._write_lock:
            _write(self._out, msgspec.msgpack.encode(said))


def _end_with_the_daemon() -> None:
    def wait() -> None:
        sys.stdin.buffer.read(1)
        os._exit(1)

    start_thread(wait)


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not come in between
    raw = _read(sys.stdin.buffer)
    if raw is None:
        return
    order = msgspec.msgpack.decode(raw, type=Order)
    signal.setitimer(signal.ITIMER_REAL, order.seconds)
    with contextlib.suppress(OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")
    lock = threading.Lock()
    logging.getLogger().addHandler(_Telling(out, lock))
    last: Done | Failed
    try:
        _end_with_the_daemon()
        last = _carry_out(order, out, lock)
    except InstantStartError as error:
        last = Failed(error.code, error.message, error.retry_after)
    except MemoryError:
        last = Failed(
            OriginUnsupported.code,
            f"{order.model.source}: its listing takes more than {MEMORY >> 30} GiB of memory, which is the limit; "
            "choose a narrower prefix, or another repository",
        )
    except Exception as error:
        logging.getLogger(__name__).exception("%s cannot be read", order.model.source)
        last = Failed(
            OriginMisbehaved.code,
            f"{order.model.source}: {type(error).__name__} while reading what it answered; see the log",
        )
    with lock:
        _write(out, msgspec.msgpack.encode(last))
    os._exit(0)  # a million objects are not taken apart one by one


def _carry_out(order: Order, out: IO[bytes], lock: threading.Lock) -> Done:
    from instantstart_fs.origins.registry import open_origin

    origin = open_origin(order.spec, order.model, order.settings)
    if order.what == "check":
        origin.check()
        return Done()
    found = origin.resolve()
    for start in range(0, len(found.files), SLICE):
        frame = msgspec.msgpack.encode(Files(list(found.files[start : start + SLICE])))
        with lock:
            _write(out, frame)
    return Done(found.name, found.source, found.revision, found.skipped)


if __name__ == "__main__":
    main()
