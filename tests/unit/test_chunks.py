"""ChunkMap against a set of ints, the obvious model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.chunks import ByteRange, ChunkMap

sizes = st.tuples(st.integers(0, 500), st.integers(1, 64))


@given(sizes, st.lists(st.tuples(st.booleans(), st.integers(0, 600))))
def test_agrees_with_a_set(shape: tuple[int, int], operations: list[tuple[bool, int]]) -> None:
    size, chunk_size = shape
    chunks = ChunkMap(size, chunk_size)
    model: set[int] = set()
    for adding, raw in operations:
        if chunks.chunks == 0:
            break
        chunk = raw % chunks.chunks
        if adding:
            assert chunks.add(chunk) == (chunk not in model)
            model.add(chunk)
        else:
            chunks.discard(chunk)
            model.discard(chunk)
        prefix = 0
        while prefix in model:
            prefix += 1
        assert chunks.prefix_bytes == min(prefix * chunk_size, size)
    assert chunks.count == len(model)
    assert chunks.complete == (len(model) == chunks.chunks)
    assert chunks.present_bytes == sum(chunks.byte_range(chunk).length for chunk in model)
    assert list(chunks.missing()) == [chunk for chunk in range(chunks.chunks) if chunk not in model]
    again = ChunkMap(size, chunk_size, chunks.to_bytes())
    assert again == chunks
    assert again.count == chunks.count


@given(sizes, st.integers(0, 600), st.integers(0, 600))
def test_chunks_of_covers_exactly_the_bytes(shape: tuple[int, int], start: int, length: int) -> None:
    size, chunk_size = shape
    chunks = ChunkMap(size, chunk_size)
    wanted = ByteRange(start, start + length)
    expected = {byte // chunk_size for byte in range(wanted.start, min(wanted.stop, size))}
    assert set(chunks.chunks_of(wanted)) == expected
    assert chunks.holds(wanted) == (not expected)


def test_an_empty_file_is_complete() -> None:
    assert ChunkMap(0, 8).complete
    assert ChunkMap(0, 8).prefix_bytes == 0


def test_stray_bits_of_a_damaged_bitmap_are_not_counted() -> None:
    assert ChunkMap(9 * 8, 8, b"\xff\xff").count == 9


def test_refuses_a_bitmap_of_another_length_and_a_chunk_beyond_the_end() -> None:
    with pytest.raises(ValueError, match="cannot describe"):
        ChunkMap(100, 8, b"\0")
    with pytest.raises(IndexError):
        ChunkMap(100, 8).add(13)
