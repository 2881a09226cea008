"""The index against dicts: generated operations, compared after every one, through crashes of ops and reopenings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TypeVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.index.environment import Index
from instantstart_fs.index.schema import FIRST_NODEID, FileRecord, GenerationRecord, PipelineRecord
from instantstart_fs.index.transactions import WriteTxn

# Small alphabets, so that ids, generations and files collide; ids that are prefixes of each other.
ids = st.sampled_from(["a", "a-b", "ab", "a.b"])
numbers = st.sampled_from([0, 1, 256])
indices = st.sampled_from([0, 1, 255, 256, 65536])
times = st.integers(0, 2**63)
bitmaps = st.sampled_from([b"", b"\x00", b"\xff" * 3000])


class Model:
    def __init__(self) -> None:
        self.pipelines: dict[str, PipelineRecord] = {}
        self.generations: dict[tuple[str, int], GenerationRecord] = {}
        self.files: dict[tuple[str, int, int], FileRecord] = {}
        self.requests: dict[str, int] = {}
        self.atimes: dict[tuple[str, int, int], int] = {}


T = TypeVar("T")
Change = tuple[Callable[[WriteTxn], object], Callable[[Model], object]]


def put_pipeline(pipeline: str, generation: int, pinned: bool) -> Change:
    record = PipelineRecord(PipelineSpec(pipeline, (ModelSpec("file:///x"),)), generation, generation + 1, pinned)
    return lambda txn: txn.put_pipeline(record), lambda model: model.pipelines.update({pipeline: record})


def put_generation(pipeline: str, number: int, base: int) -> Change:
    record = GenerationRecord(pipeline, number, base, 3, 1 << 20)
    return lambda txn: txn.put_generation(record), lambda model: model.generations.update({(pipeline, number): record})


def put_file(pipeline: str, number: int, index: int, bitmap: bytes) -> Change:
    record = FileRecord("filling", 1, 2, bitmap)
    return (
        lambda txn: txn.put_file(pipeline, number, index, record),
        lambda model: model.files.update({(pipeline, number, index): record}),
    )


def put_request(pipeline: str, at: int) -> Change:
    return lambda txn: txn.put_last_request(pipeline, at), lambda model: model.requests.update({pipeline: at})


def put_access(pipeline: str, number: int, index: int, at: int) -> Change:
    return (
        lambda txn: txn.put_last_access(pipeline, number, index, at),
        lambda model: model.atimes.update({(pipeline, number, index): at}),
    )


def delete_file(pipeline: str, number: int, index: int) -> Change:
    return (
        lambda txn: txn.delete_file(pipeline, number, index),
        lambda model: model.files.pop((pipeline, number, index), None),
    )


def delete_files(pipeline: str, number: int) -> Change:
    def change(model: Model) -> None:
        model.files = {key: value for key, value in model.files.items() if key[:2] != (pipeline, number)}

    return lambda txn: txn.delete_files(pipeline, number), change


def delete_generation(pipeline: str, number: int) -> Change:
    def change(model: Model) -> None:
        model.generations.pop((pipeline, number), None)
        model.files = {key: value for key, value in model.files.items() if key[:2] != (pipeline, number)}
        model.atimes = {key: value for key, value in model.atimes.items() if key[:2] != (pipeline, number)}

    return lambda txn: txn.delete_generation(pipeline, number), change


def delete_pipeline(pipeline: str) -> Change:
    def change(model: Model) -> None:
        model.pipelines.pop(pipeline, None)
        model.requests.pop(pipeline, None)
        model.generations = {key: value for key, value in model.generations.items() if key[0] != pipeline}
        model.files = {key: value for key, value in model.files.items() if key[0] != pipeline}
        model.atimes = {key: value for key, value in model.atimes.items() if key[0] != pipeline}

    return lambda txn: txn.delete_pipeline(pipeline), change


changes = st.one_of(
    st.builds(put_pipeline, ids, numbers, st.booleans()),
    st.builds(put_generation, ids, numbers, times),
    st.builds(put_file, ids, numbers, indices, bitmaps),
    st.builds(put_request, ids, times),
    st.builds(put_access, ids, numbers, indices, times),
    st.builds(delete_file, ids, numbers, indices),
    st.builds(delete_files, ids, numbers),
    st.builds(delete_generation, ids, numbers),
    st.builds(delete_pipeline, ids),
)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = self.directory.name + "/index"
        self.index = Index.open(self.path)
        self.model = Model()
        self.next_nodeid = FIRST_NODEID

    def teardown(self) -> None:
        self.index.close()
        self.directory.cleanup()

    @initialize(change=changes)
    def start(self, change: Change) -> None:
        self.write([change])

    @rule(batch=st.lists(changes, min_size=1, max_size=5))
    def write(self, batch: list[Change]) -> None:
        self.index.write_sync(lambda txn: [op(txn) for op, _ in batch])
        for _, change in batch:
            change(self.model)

    @rule(batch=st.lists(changes, min_size=1, max_size=5))
    def write_and_fail(self, batch: list[Change]) -> None:
        def op(txn: WriteTxn) -> None:
            for change, _ in batch:
                change(txn)
            raise LookupError

        try:
            self.index.write_sync(op)
        except LookupError:
            return
        raise AssertionError("the op's error was lost")

    @rule(count=st.sampled_from([1, 3, 1 << 21]))
    def reserve(self, count: int) -> None:
        first = self.index.write_sync(lambda txn: txn.reserve_nodeids(count))
        assert first >= self.next_nodeid
        self.next_nodeid = first + count

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = Index.open(self.path)

    @invariant()
    def same(self) -> None:
        model = self.model
        with self.index.reading() as txn:
            assert {record.spec.id: record for record in txn.pipelines()} == model.pipelines
            assert txn.last_requests() == model.requests
            for pipeline in ("a", "a-b", "ab", "a.b"):
                assert txn.get_pipeline(pipeline) == model.pipelines.get(pipeline)
                assert txn.last_request(pipeline) == model.requests.get(pipeline)
                expected = [record for key, record in sorted(model.generations.items()) if key[0] == pipeline]
                assert list(txn.generations(pipeline)) == expected
                for number in (0, 1, 256):
                    where = (pipeline, number)
                    assert txn.get_generation(*where) == model.generations.get(where)
                    assert list(txn.files(*where)) == sorted_of(model.files, where)
                    assert list(txn.accesses(*where)) == sorted_of(model.atimes, where)


def sorted_of(values: dict[tuple[str, int, int], T], where: tuple[str, int]) -> list[tuple[int, T]]:
    return sorted(((key[2], value) for key, value in values.items() if key[:2] == where), key=lambda pair: pair[0])


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
