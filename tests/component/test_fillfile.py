"""A chunk that comes from two sources at once is of one of them (filler/fillfile.py): a server that ignores ranges
streams the file over chunks that a tier is giving, too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.filler.fetch import Abandoned
from instantstart_fs.filler.fillfile import CameOtherwise, FetchSink, FillFile, WholeFileSink
from instantstart_fs.filler.messages import Fetch, OpenFile, Report, Streamed

CHUNK = 4096
pytestmark = pytest.mark.timeout(60)


class Process:
    """Of the worker, what a sink uses."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.hashable: list[int] = []

    def report(self, message: Report) -> None:
        self.reports.append(message)

    def wait_pause(self, work: FetchSink) -> None: ...

    def chunk_written(self, file: FillFile) -> None:
        self.hashable.append(file.present.count)

    def ignores_ranges(self, host: str) -> None: ...


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FillFile]:
    fd = os.open(tmp_path / "blob", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 * CHUNK)
    found = FillFile(OpenFile(1, "blob", 3 * CHUNK, CHUNK, None, b"\0"), fd)
    yield found
    found.close()


def sink(process: Process, file: FillFile, chunk: int) -> FetchSink:
    return FetchSink(process, file, Fetch(10 + chunk, 1, chunk, False))


def stream(process: Process, file: FillFile) -> WholeFileSink:
    return sink(process, file, 0).take_whole()


def text(letter: str, size: int = CHUNK) -> memoryview:
    return memoryview(letter.encode() * size)


def held(file: FillFile, chunk: int) -> bytes:
    return os.pread(file.blob.fd, CHUNK, chunk * CHUNK)


def test_a_stream_leaves_alone_what_another_request_is_writing(process: Process, file: FillFile) -> None:
    piece = sink(process, file, 1)
    piece.write(text("p", 100), CHUNK)
    whole = stream(process, file)
    whole.write(text("s", CHUNK + 10), 0)
    whole.write(text("s", 2 * CHUNK - 10), CHUNK + 10)
    assert process.reports == [Streamed(10, 0), Streamed(10, 2)]
    piece.write(text("p", CHUNK - 100), CHUNK + 100)
    assert [held(file, chunk) for chunk in range(3)] == [text("s"), text("p"), text("s")]
    assert 1 not in file.present, "it is the piece's to prove"


@pytest.mark.parametrize("ends", ["whole", "cut", "stopped"])
def test_who_comes_while_a_stream_is_at_its_chunk_waits_for_that(process: Process, file: FillFile, ends: str) -> None:
    whole, piece, results = stream(process, file), sink(process, file, 1), list[object]()
    whole.write(text("s", CHUNK + 10), 0)

    def write() -> None:
        try:
            piece.write(text("p"), CHUNK)
            results.append("written")
        except (CameOtherwise, Abandoned) as error:
            results.append((type(error), list(process.reports)))

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.05)
    assert not results and held(file, 1)[:11] == b"s" * 10 + b"\0"
    if ends == "whole":
        whole.write(text("s", CHUNK - 10), CHUNK + 10)
    elif ends == "cut":
        assert file.streamer is not None
        file.disown(file.streamer)
    else:
        piece.stop()
    writer.join(30)
    if ends == "whole":
        assert results == [(CameOtherwise, [Streamed(10, 0), Streamed(10, 1)])], "the stream's report is the first one"
        assert held(file, 1) == text("s")
    elif ends == "cut":
        assert results == ["written"] and held(file, 1) == text("p")
        whole.write(text("s", CHUNK - 10), CHUNK + 10)
        assert held(file, 1) == text("p")
    else:
        assert results == [(Abandoned, [Streamed(10, 0)])]


def test_nothing_is_written_over_what_is_present(process: Process, file: FillFile) -> None:
    """It may be hashed already."""
    late = sink(process, file, 2)
    stream(process, file).write(text("s", 3 * CHUNK), 0)
    with pytest.raises(CameOtherwise):
        late.write(text("x"), 2 * CHUNK)
    assert held(file, 2) == text("s")


def test_who_was_stopped_does_not_keep_the_next_from_writing(process: Process, file: FillFile) -> None:
    first, second = sink(process, file, 1), sink(process, file, 1)
    first.write(text("x", 10), CHUNK)
    first.stop()
    with pytest.raises(Abandoned):
        first.write(text("x", 10), CHUNK)
    second.write(text("p"), CHUNK)
    assert held(file, 1) == text("p")


def test_a_stopped_stream_writes_nothing_more(process: Process, file: FillFile) -> None:
    whole = stream(process, file)
    whole.write(text("s", 10), 0)
    assert file.streamer is not None
    file.streamer.stop()
    with pytest.raises(Abandoned):
        whole.write(text("s", CHUNK - 10), 10)
    assert held(file, 0)[:11] == b"s" * 10 + b"\0"
