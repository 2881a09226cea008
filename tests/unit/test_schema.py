from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.errors import StoreDamaged
from instantstart_fs.index import schema
from instantstart_fs.index.schema import FileRecord, GenerationRecord, PipelineRecord

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
u32 = st.integers(0, 2**32 - 1)


@given(st.lists(st.tuples(ids, u32, u32), max_size=8))
def test_keys_sort_like_what_they_stand_for_and_come_back(keys: list[tuple[str, int, int]]) -> None:
    encoded = sorted(schema.file_key(*key) for key in keys)
    # By pipeline (as bytes, NUL-terminated: "a" before "a-b"), generation, index.
    assert [schema.parse_file_key(key) for key in encoded] == sorted(keys)


@given(ids, u32, u32, ids, u32)
def test_a_prefix_holds_its_own_keys_only(pipeline: str, generation: int, index: int, other: str, number: int) -> None:
    key = schema.file_key(pipeline, generation, index)
    assert key.startswith(schema.pipeline_prefix(other)) == (pipeline == other)
    assert key.startswith(schema.generation_key(other, number)) == ((pipeline, generation) == (other, number))


def test_records_come_back() -> None:
    pipeline = PipelineRecord(
        PipelineSpec("p", (ModelSpec("hf://a/b", "m", ("*.x",)),), token_file="/t"),
        3,
        4,
        True,
        5,
        {"": 1024, "m": 1026},
    )
    generation = GenerationRecord("p", 3, 2048, 7, 8 << 20)
    file = FileRecord("filling", 2, 99, b"\x01\x80")
    assert schema.decode_pipeline(schema.encode(pipeline)) == pipeline
    assert schema.decode_generation(schema.encode(generation)) == generation
    assert schema.decode_file(schema.encode(file)) == file


def test_a_record_with_a_field_more_than_known_is_read_and_one_with_fewer_gets_defaults() -> None:
    assert schema.decode_file(msgspec.msgpack.encode(["sealed"])) == FileRecord("sealed")
    assert schema.decode_file(msgspec.msgpack.encode(["sealed", 1, 0, b"", 0, "later"])) == FileRecord("sealed", 1)


def test_a_million_sealed_files_stay_small() -> None:
    record = schema.encode(FileRecord("sealed"))
    assert len(record) + len(schema.file_key("my-pipeline", 1, 999_999)) < 64


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x93\x01", b"nonsense", b"\x91\xa2\xff\xff"])
def test_garbage_is_damage_and_says_what_to_do(garbage: bytes) -> None:
    for decode in (
        schema.decode_pipeline,
        schema.decode_generation,
        schema.decode_file,
        schema.decode_u64,
        schema.parse_file_key,
    ):
        if decode is schema.decode_u64 and len(garbage) == 8:
            continue
        with pytest.raises(StoreDamaged, match="instantstart fsck"):
            decode(garbage)


def test_what_troubles_a_pipeline_is_none_in_records_of_earlier_versions() -> None:
    record = schema.UpkeepRecord(failure=schema.FailureRecord("access-refused", "no", 5, True, 1, 2))
    assert schema.decode_upkeep(schema.encode(record)) == record
    earlier = msgspec.msgpack.encode(msgspec.msgpack.decode(schema.encode(record))[:2])
    assert schema.decode_upkeep(earlier) == schema.UpkeepRecord()
    later = msgspec.msgpack.encode([*msgspec.msgpack.decode(schema.encode(record)), "more"])
    assert schema.decode_upkeep(later) == record
