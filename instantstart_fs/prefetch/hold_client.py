"""Asks a hold for its weights: the engine's side. Making tensors of what it gets is for others."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import NamedTuple, Self, TypeVar

import msgspec

from instantstart_fs.config import unixsocket
from instantstart_fs.config.unixsocket import peer_of
from instantstart_fs.errors import PermissionRefused, PrefetchError, from_code
from instantstart_fs.prefetch.hold_protocol import (
    ANSWER_DEADLINE,
    MAX_LINE,
    AskManifest,
    AskStatus,
    HoldManifest,
    HoldStatus,
    LineReader,
    Ok,
    Refused,
    ReleaseAll,
    ReleaseFile,
    Take,
    Taken,
    answers,
    hold_socket,
)
from instantstart_fs.prefetch.layout import FileLayout
from instantstart_fs.prefetch.messages import IpcHandle

_T = TypeVar("_T")


class TakenFile(NamedTuple):
    """A file of a hold. ``fd``: the memfd of a CPU device, which the caller closes (tensors.from_memory of its
    mapping); ``handle``: for tensors.from_ipc."""

    path: str
    size: int
    device: str
    layout: FileLayout | None
    fd: int | None
    handle: IpcHandle | None


class HoldClient:
    """A connection to the hold of ``pipeline`` (or at ``path``); a context manager; not for several threads.

    Raises PrefetchError when nobody holds it, or the hold ends, and what the other side refused."""

    def __init__(self, pipeline: str, path: str | None = None) -> None:
        self._path = path or hold_socket(pipeline)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            unixsocket.connect(self._socket, self._path, ANSWER_DEADLINE)
            self._socket.settimeout(ANSWER_DEADLINE)
            owner = peer_of(self._socket).uid
        except TimeoutError as error:
            self._socket.close()
            raise PrefetchError(
                f"{pipeline}: its holder is busy, it accepted nobody else within {ANSWER_DEADLINE:g} s; try again"
            ) from error
        except OSError as error:
            self._socket.close()
            raise PrefetchError(
                f"{pipeline}: nobody holds it here ({self._path}: {error.strerror or error})"
            ) from error
        if owner not in (0, os.geteuid()):
            # Weights from somebody else's memory could be anything.
            self._socket.close()
            raise PermissionRefused(f"{pipeline} is held by uid {owner}")
        self._reader = LineReader(self._socket, MAX_LINE, descriptors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._reader.close()

    def status(self) -> HoldStatus:
        return self._ask(AskStatus(), HoldStatus)

    def manifest(self) -> HoldManifest:
        return self._ask(AskManifest(), HoldManifest)

    def take(self, path: str, timeout: float = 60.0) -> TakenFile:
        """Wait until the file is in place, at most ``timeout`` seconds, and open it."""
        taken = self._ask(Take(path, timeout), Taken, timeout)
        fd = self._reader.take_descriptor() if taken.handle is None else None
        if taken.handle is None and fd is None:
            raise PrefetchError(f"{path} came without its memory: this process may not open more files (ulimit -n)")
        return TakenFile(taken.path, taken.size, taken.device, taken.layout, fd, taken.handle)

    def release_file(self, path: str) -> None:
        """Tell the holder that this engine is done with the file."""
        self._ask(ReleaseFile(path), Ok)

    def release(self) -> None:
        """End the hold."""
        self._ask(ReleaseAll(), Ok)

    def wait_ended(self, timeout: float) -> None:
        """Wait until the holder has ended, at most ``timeout`` seconds. Raises PrefetchError."""
        self._socket.settimeout(timeout)
        try:
            while self._socket.recv(4096):
                pass
        except TimeoutError as error:
            raise PrefetchError(f"{self._path} was released and is still there after {timeout:.0f} s") from error
        except OSError:
            return  # reset: it has ended

    def _ask(self, request: msgspec.Struct, kind: type[_T], more: float = 0.0) -> _T:
        self._socket.settimeout(ANSWER_DEADLINE + more)
        try:
            with contextlib.suppress(BrokenPipeError):  # refused and closed already: why is there to be read
                self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._reader.next()
            if line is None:
                raise PrefetchError(f"{self._path}: the hold has ended")
            answer = answers.decode(line)
        except ConnectionResetError as error:
            raise PrefetchError(f"{self._path}: the hold has ended") from error
        except TimeoutError as error:
            raise PrefetchError(f"{self._path}: no answer within {ANSWER_DEADLINE + more:g} s") from error
        except (OSError, msgspec.DecodeError) as error:
            raise PrefetchError(f"{self._path}: {error}") from error
        if isinstance(answer, Refused):
            raise from_code(answer.code, answer.message)
        if not isinstance(answer, kind):
            raise PrefetchError(f"{self._path}: the holder answered something else; use the same release of both")
        return answer
