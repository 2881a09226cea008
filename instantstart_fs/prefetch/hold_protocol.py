"""The protocol of a hold: where its socket lies, what is asked, what is answered. Neither side is here.

JSON lines over a unix socket of mode 0600 in a directory of mode 0700. Requests, each answered by one line:

    {"op": "status"}                                → HoldStatus
    {"op": "manifest"}                              → HoldManifest
    {"op": "take", "path": …, "timeout": 60.0}      → Taken; on the CPU with the file's memfd beside it (SCM_RIGHTS)
    {"op": "release-file", "path": …}               → Ok: the asker is done with it; freed once all ranks are
    {"op": "release"}                               → Ok: the hold ends

What goes wrong is answered by Refused. Nothing is unpickled, and no message is longer than MAX_LINE.
"""

from __future__ import annotations

import os
import socket

import msgspec

from instantstart_fs.config import unixsocket
from instantstart_fs.config.places import run_directory
from instantstart_fs.core.names import validate_pipeline_id
from instantstart_fs.errors import PrefetchError
from instantstart_fs.ipc import fd_passing
from instantstart_fs.prefetch.layout import FileLayout
from instantstart_fs.prefetch.messages import IpcHandle

MAX_LINE = 128 * 1024 * 1024
"""The most bytes of an answer: the layouts of a checkpoint with a million tensors."""
MAX_REQUEST = 64 * 1024
MAX_CONNECTIONS = 64
ANSWER_DEADLINE = 20.0
"""Seconds for an answer beyond what a request itself allows."""
BACKLOG = 128
SUFFIX = ".sock"


class _Request(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    pass


class AskStatus(_Request, frozen=True, tag="status"):
    pass


class AskManifest(_Request, frozen=True, tag="manifest"):
    pass


class Take(_Request, frozen=True, tag="take"):
    """Asks for a file. ``timeout``: seconds to wait for the file to be in place."""

    path: str
    timeout: float = 60.0


class ReleaseFile(_Request, frozen=True, tag="release-file"):
    path: str


class ReleaseAll(_Request, frozen=True, tag="release"):
    pass


class HeldDevice(msgspec.Struct, frozen=True):
    """Bytes and seconds, as stager.DeviceReport."""

    device: str
    backend: str
    bytes: int
    total: int
    cached: int
    disk: int
    seconds: float
    done: bool


class HoldStatus(msgspec.Struct, frozen=True, tag="status"):
    """The state of a hold. ``seconds_left``: until it ends by itself, null for no limit. ``files``: held, or still on
    their way."""

    pipeline: str
    generation: int
    pid: int
    devices: tuple[HeldDevice, ...]
    files: int
    seconds_left: float | None


class HeldFile(msgspec.Struct, frozen=True):
    """``layout`` null: no safetensors file, or not read yet (``ready`` says which). ``digest``: as the mount shows it,
    null where the origin offers none. ``device``: the holder's name for it; ``place``: everybody's (tensors.place_of).
    """

    path: str
    model: str
    size: int
    device: str
    place: str
    rank: int | None
    ready: bool
    layout: FileLayout | None
    digest: str | None = None


class HoldManifest(msgspec.Struct, frozen=True, tag="manifest"):
    """``how``: as plan.Plan. ``files`` that can be taken; ``freed``: how many cannot any more. ``ranks``: as many
    engines are to take them; ``engines``: so many have begun."""

    pipeline: str
    generation: int
    how: str
    files: tuple[HeldFile, ...]
    freed: int = 0
    ranks: int = 1
    engines: int = 0


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """A file is handed over. ``handle``: for CUDA, to be opened once; null on the CPU, where a descriptor is beside the
    message."""

    path: str
    size: int
    device: str
    layout: FileLayout | None
    handle: IpcHandle | None


class Ok(msgspec.Struct, frozen=True, tag="ok"):
    pass


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: str
    message: str


Answer = HoldStatus | HoldManifest | Taken | Ok | Refused
requests = msgspec.json.Decoder(AskStatus | AskManifest | Take | ReleaseFile | ReleaseAll)
answers = msgspec.json.Decoder(HoldStatus | HoldManifest | Taken | Ok | Refused)


def hold_socket(pipeline: str) -> str:
    """The socket of this user's hold of that pipeline: below $INSTANTSTART_PREFETCH_DIR, else the run directory.
    Raises InvalidName."""
    validate_pipeline_id(pipeline)
    return os.path.join(directory(), f"{pipeline}{SUFFIX}")


def held_pipelines() -> list[str]:
    """Ids of what is held there, sorted. What a killed holder left behind is none. Raises PrefetchError when it cannot
    look."""
    try:
        names = sorted(name for name in os.listdir(directory()) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PrefetchError(f"{directory()}: holds cannot be looked for: {error.strerror}") from error
    return [name.removesuffix(SUFFIX) for name in names if unixsocket.answers(os.path.join(directory(), name))]


def directory() -> str:
    return os.environ.get("INSTANTSTART_PREFETCH_DIR") or os.path.join(run_directory(), "prefetch")


class LineReader:
    """Reads lines from a blocking socket, with ``descriptors`` also those that came beside them; else the kernel drops
    those."""

    def __init__(self, connection: socket.socket, limit: int, *, descriptors: bool = False) -> None:
        self._socket = connection
        self._limit = limit
        self._most = int(descriptors)
        self._pending = bytearray()
        self._descriptors: list[int] = []

    def next(self) -> bytes | None:
        """The next line, None at the end. Raises OSError, also for a line beyond the limit."""
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > self._limit:
                raise OSError(f"a message of more than {self._limit} bytes")
            data, descriptors, _ = fd_passing.receive(self._socket, 1 << 20, self._most)
            self._descriptors += descriptors
            if not data:
                self.close()
                return None
            self._pending += data
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def take_descriptor(self) -> int | None:
        return self._descriptors.pop(0) if self._descriptors else None

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def send_answer(connection: socket.socket, answer: Answer, fd: int | None) -> None:
    line = memoryview(msgspec.json.encode(answer) + b"\n")
    sent = socket.send_fds(connection, [line], [fd]) if fd is not None else 0
    connection.sendall(line[sent:])
