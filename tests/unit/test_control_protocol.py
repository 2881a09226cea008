"""The control protocol's messages and framing; garbage of any kind is a ControlProtocolError and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.control import lines, protocol
from instantstart_fs.control.lines import LineBuffer, decode_request, decode_response, encode_request, encode_response
from instantstart_fs.control.protocol import (
    Add,
    Done,
    Evict,
    Failed,
    Include,
    Lease,
    Ls,
    Pin,
    Ping,
    Progress,
    Remove,
    Specs,
    Status,
    Touch,
    Update,
    Verify,
    Warm,
)
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import ControlProtocolError, PipelineNotFound

SPEC = PipelineSpec("x", (ModelSpec("hf://o/r", "", ("*.json",)),), uid=5)
REQUESTS = [
    Ping(),
    Add(SPEC, True),
    Update("x"),
    Remove("x"),
    Evict("x"),
    Pin("x", False),
    Touch("x"),
    Warm("x", True, True),
    Verify("x"),
    Lease("x"),
    Ls(),
    Specs(),
    Status("x"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request_: type(request_).__name__)
def test_requests_survive_the_way(request_: protocol.Request) -> None:
    line = encode_request(request_)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_request(line[:-1]) == request_


@pytest.mark.parametrize(
    "response", [Progress(status={"a": 1}), Progress(None, 1, 2), Done([1]), Failed("x", "y", 2.0)]
)
def test_responses_survive_the_way(response: protocol.Response) -> None:
    assert decode_response(encode_response(response)[:-1]) == response


def test_the_documented_wire_format() -> None:
    assert encode_request(Status("my-llm")) == b'{"v":1,"request":{"op":"status","pipeline":"my-llm"}}\n'
    assert decode_response(b'{"type":"done","result":null}') == Done(None)


def test_errors_arrive_as_what_they_were() -> None:
    failed = Failed(PipelineNotFound.code, "no x")
    assert type(failed.error()) is PipelineNotFound
    assert failed.error().message == "no x"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"v":1}',
        b'{"v":"1","request":{"op":"ls"}}',
        b'{"v":1,"request":{"op":"format-disk"}}',
        b'{"v":1,"request":{"op":"status"}}',
        b'{"v":1,"request":{"op":"status","pipeline":7}}',
        b'{"v":1,"request":{"op":"ls","extra":1}}',
        b'{"v":1,"request":{"op":"status","pipeline":"\xff"}}',
        b'{"v":1,"request":' + b"[" * 100_000,
    ],
)
def test_garbage_is_refused(line: bytes) -> None:
    with pytest.raises(ControlProtocolError):
        decode_request(line)


def test_another_version_says_so() -> None:
    with pytest.raises(ControlProtocolError, match="version 2"):
        decode_request(b'{"v":2,"request":{"op":"brand-new","with":"fields"}}')


@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: msgspec.json.encode({"v": 1, "request": text})))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (decode_request, decode_response):
        with contextlib.suppress(ControlProtocolError):
            decode(data)


@given(st.lists(st.binary(max_size=20).map(lambda part: part.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_do_not_depend_on_how_the_stream_was_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    buffer, found = LineBuffer(100), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer.feed(stream[start:stop])
        found.extend(buffer.lines())
    assert found == lines
    assert len(buffer) == 0


def test_a_line_without_end_is_refused_before_it_is_stored() -> None:
    buffer = LineBuffer(10)
    buffer.feed(b"x" * 10)
    assert list(buffer.lines()) == []
    buffer.feed(b"x")
    with pytest.raises(ControlProtocolError):
        list(buffer.lines())


def test_messages_too_long_are_not_sent() -> None:
    with pytest.raises(ControlProtocolError, match="longer"):
        encode_request(Status("x" * lines.MAX_REQUEST))


@pytest.mark.parametrize("at", ["1" + "0" * 400, "-1", str(1 << 63)])
def test_a_moment_beyond_all_clocks_is_refused(at: str) -> None:
    line = '{"v": 1, "request": {"op": "mark", "pipeline": "p", "moment": "ready", "at_ns": ' + at + "}}"
    with pytest.raises(ControlProtocolError):
        decode_request(line.encode())


@pytest.mark.parametrize("rate", ["1e-300", "0", "-1", "1e999", "NaN", "Infinity", "999999", "9" * 400, '"1MB"'])
def test_a_rate_that_would_never_end_is_refused_by_the_daemon_too(rate: str) -> None:
    line = b'{"v":1,"request":{"op":"verify","pipeline":"x","rate":%b}}' % rate.encode()
    with pytest.raises(ControlProtocolError):
        decode_request(line)
    assert decode_request(line.replace(rate.encode(), b"1e6")) == Verify("x", 1e6)


def test_an_owner_cannot_keep_the_loop_busy_with_globs() -> None:
    """A request has room for 100,000 of them, and each is compared with every file of the pipeline."""
    for globs in (("*",) * 33, ("*" * 5000,)):
        with pytest.raises(ControlProtocolError):
            decode_request(encode_request(Include("x", globs)))
    assert decode_request(encode_request(Include("x", ("*",) * 32))) == Include("x", ("*",) * 32)
