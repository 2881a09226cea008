"""How a message of the control protocol is one line. Pure: bytes in, values out; no IO, no clock.

A line is one JSON object; a request has at most MAX_REQUEST bytes, an answer MAX_MESSAGE. Garbage raises
ControlProtocolError, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from instantstart_fs.control.protocol import Done, Failed, Handed, Opening, Parts, Progress, Request, Response
from instantstart_fs.errors import ControlProtocolError, UsageError

VERSION = 1
MAX_MESSAGE = 16 * 1024 * 1024
"""The most bytes of one line; neither side buffers more. The status of 100,000 files stays below it."""
MAX_REQUEST = 1024 * 1024
"""The most bytes of one request. A specification with thousands of globs fits."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    v: int
    request: Request


class _Version(msgspec.Struct, frozen=True):
    v: int


_encoder = msgspec.json.Encoder()
_envelopes = msgspec.json.Decoder(_Envelope)
_versions = msgspec.json.Decoder(_Version)
_responses = msgspec.json.Decoder(Progress | Opening | Handed | Parts | Done | Failed)


def encode_request(request: Request) -> bytes:
    """Encode a request as one line. Raises ControlProtocolError beyond MAX_REQUEST, and UsageError for text that is no
    Unicode: an argument of the command line, as this process's locale made it."""
    try:
        return _line(_encoder.encode(_Envelope(VERSION, request)), MAX_REQUEST)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{error.object!r} is not UTF-8 in this locale: use ASCII, or a UTF-8 locale (LC_ALL=C.UTF-8)"
        ) from error


def encode_response(response: Response) -> bytes:
    """Encode a response as one line. Raises ControlProtocolError beyond MAX_MESSAGE and for text that is no Unicode."""
    try:
        return _line(_encoder.encode(response), MAX_MESSAGE)
    except UnicodeEncodeError as error:
        raise ControlProtocolError(f"the answer holds a name that is not UTF-8: {error.object!r}") from error


def _line(message: bytes, limit: int) -> bytes:
    if len(message) >= limit:
        raise ControlProtocolError(f"a message of {len(message)} bytes is longer than the protocol allows ({limit})")
    return message + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises ControlProtocolError."""
    try:
        version = _versions.decode(line).v
        if version != VERSION:
            raise ControlProtocolError(
                f"the client speaks version {version} of the control protocol and this daemon version {VERSION}: "
                "use the same release of both"
            )
        return _envelopes.decode(line).request
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ControlProtocolError(f"not a request: {error}") from error


def decode_response(line: bytes) -> Response:
    """Raises ControlProtocolError."""
    try:
        response: Response = _responses.decode(line)
        return response
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ControlProtocolError(f"not an answer of an instantstart daemon: {error}") from error


class LineBuffer:
    """Cuts a stream into lines and refuses to hold more than ``limit`` bytes of an unfinished one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()
        self._scanned = 0

    def feed(self, data: bytes) -> None:
        self._pending += data

    def lines(self) -> Iterator[bytes]:
        """The whole lines so far, without their ends. Raises ControlProtocolError for one beyond the limit."""
        while True:
            end = self._pending.find(b"\n", self._scanned)
            if end < 0:
                self._scanned = len(self._pending)
            if (end if end >= 0 else len(self._pending)) > self._limit:
                raise ControlProtocolError(f"a message longer than {self._limit} bytes")
            if end < 0:
                return
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            self._scanned = 0
            yield line

    def __len__(self) -> int:
        return len(self._pending)
