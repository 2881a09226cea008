"""The records and keys of the index, and their encoding. Pure: LMDB is used in index/transactions.py.

Values are msgpack arrays (a field can be added at the end with a default). Keys sort so that everything of a pipeline,
and everything of a generation in manifest order, is one range:

    pipelines      <pipeline>                                     PipelineRecord
    generations    <pipeline> NUL <generation:u32>                GenerationRecord
    files          <pipeline> NUL <generation:u32> <index:u32>    FileRecord; none = absent, never filled
    requests       <pipeline>                                     u64, ns: last request
    atimes         <pipeline> NUL <generation:u32> <index:u32>    u64, ns: last access of that file
    coldstarts     <pipeline> NUL <first open:u64, ns>            core.coldstart.ColdStart (a map)
    upkeep         <pipeline>                                     UpkeepRecord
    summaries      <pipeline>                                     SummaryRecord; none = read it whole
    meta           format, nodeids, health                        u64
                   clock                                          core.clockwatch.ClockState
                   store                                          the identity of the store that it belongs to, ASCII

Integers are big-endian. A pipeline id is ASCII without NUL, so that no id's range overlaps another's.
"""

from __future__ import annotations

import struct

import msgspec

from instantstart_fs.core.access import Access
from instantstart_fs.core.clockwatch import ClockState
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.learned import Learned
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.scrub import ScrubProgress
from instantstart_fs.errors import StoreDamaged

FORMAT = 2
"""The format of the whole index. A newer one is refused, an older one is migrated at open. Since 2, every change of a
pipeline's files deletes its summary; a version without summaries would not do so."""

DATABASES = ("meta", "pipelines", "generations", "files", "requests", "atimes", "coldstarts", "upkeep", "summaries")
META_FORMAT = b"format"
META_NODEIDS = b"nodeids"
META_HEALTH = b"health"
META_CLOCK = b"clock"
META_STORE = b"store"
FIRST_NODEID = 1024
"""Lower ones are the mount's own (the root is 1; .warm, .filling, .cold)."""

_GENERATION = struct.Struct(">I")
_FILE = struct.Struct(">II")
_U64 = struct.Struct(">Q")


class PipelineRecord(msgspec.Struct, frozen=True, array_like=True):
    """A pipeline. ``generation``: the current one, 0 = none yet. ``next_generation``: the number that the next resolve
    takes.

    ``created_at_ns``: wall clock. ``directory_nodeids``: "" and each model's name → the nodeid of its directory,
    constant for the pipeline's life.
    """

    spec: PipelineSpec
    generation: int = 0
    next_generation: int = 1
    pinned: bool = False
    created_at_ns: int = 0
    directory_nodeids: dict[str, int] = {}


class GenerationRecord(msgspec.Struct, frozen=True, array_like=True):
    """A generation. ``nodeid_base``: the first of the block of nodeids reserved for its tree. ``chunk_size``: bytes."""

    pipeline: str
    number: int
    nodeid_base: int
    file_count: int
    chunk_size: int


class FileRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The state of a file. ``state``: a ``FileState`` value. ``incarnation`` counts up with every poisoning and
    eviction. ``nodeid``: 0 = what the generation's block gives it. ``bitmap``: durable presence
    (``ChunkMap.to_bytes``), empty when sealed or absent. ``allocated``: bytes of disk that a complete file takes, its
    attributes' block included; 0 = not known."""

    state: str
    incarnation: int = 0
    nodeid: int = 0
    bitmap: bytes = b""
    allocated: int = 0


class FailureRecord(msgspec.Struct, frozen=True, array_like=True):
    """The last error of a pipeline, so that a restart does not hide it. ``file``: index in the manifest, -1 where it is
    no single file's. ``since_ns``: wall clock."""

    code: str
    message: str
    since_ns: int
    final: bool
    generation: int
    file: int = -1


class UpkeepRecord(msgspec.Struct, frozen=True, array_like=True):
    """The state of a pipeline's maintenance, so that a restart continues it. ``learned``: None in a record of an
    earlier version; then it is in the slot. ``startup_bytes``: of disk, that its startup caches take."""

    scrubbed: ScrubProgress = ScrubProgress()
    access: Access = Access()
    failure: FailureRecord | None = None
    learned: Learned | None = None
    startup_bytes: int = 0


class SummaryRecord(msgspec.Struct, frozen=True, array_like=True):
    """Stands for a generation until it is loaded (catalog/unloaded.py). It exists only while

    - the slot holds nothing but that generation, and of its files what their records say: no fill has begun since, no
      update, no eviction;
    - the records are those that it was made from: whatever writes or deletes one deletes the summary in the same
      transaction (index/transactions.py).

    A pipeline without one is loaded whole at the start, and what a crash may have left is removed.

    ``nodes`` of the tree; ``load_files``, ``load_bytes`` of the load set; ``subdirectories``: "" and each model's name
    → how many directories lie in its directory; ``counts``: catalog.unloaded.Counts; ``nodeids`` of files that are not
    in the generation's block. ``rules``: core.loadset.RULES by which the load set was found: by others it is another.
    ``undecided``: how many variants there are of which one must be chosen.
    """

    generation: int
    nodeid_base: int
    nodes: int
    files: int
    load_files: int
    load_bytes: int
    total_bytes: int
    revision: str
    resolved_at_ns: int
    subdirectories: dict[str, int]
    counts: tuple[int, ...]
    nodeids: tuple[int, ...] = ()
    rules: int = 0
    undecided: int = 0


_summary_decoder = msgspec.msgpack.Decoder(SummaryRecord)
_pipeline_decoder = msgspec.msgpack.Decoder(PipelineRecord)
_generation_decoder = msgspec.msgpack.Decoder(GenerationRecord)
_file_decoder = msgspec.msgpack.Decoder(FileRecord)
_upkeep_decoder = msgspec.msgpack.Decoder(UpkeepRecord)
_clock_decoder = msgspec.msgpack.Decoder(ClockState)
_cold_start_decoder = msgspec.msgpack.Decoder(ColdStart)
encode = msgspec.msgpack.Encoder().encode
"""Encodes any of the records."""


def _damaged(what: str, error: Exception) -> StoreDamaged:
    return StoreDamaged(f"{what} in the index cannot be read ({error}); run `instantstart fsck`")


def decode_pipeline(value: bytes) -> PipelineRecord:
    """Decode a pipeline's record. Raises StoreDamaged, as all decoders here."""
    try:
        return _pipeline_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("a pipeline", error) from error


def decode_generation(value: bytes) -> GenerationRecord:
    try:
        return _generation_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("a generation", error) from error


def decode_file(value: bytes) -> FileRecord:
    try:
        return _file_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("a file", error) from error


def decode_summary(value: bytes) -> SummaryRecord:
    try:
        return _summary_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("a summary", error) from error


def decode_cold_start(value: bytes) -> ColdStart:
    try:
        return _cold_start_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("a cold start", error) from error


def decode_upkeep(value: bytes) -> UpkeepRecord:
    try:
        return _upkeep_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("what is known of a pipeline's upkeep", error) from error


def decode_clock(value: bytes) -> ClockState:
    try:
        return _clock_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged("what is known of the clocks", error) from error


def encode_u64(value: int) -> bytes:
    return _U64.pack(value)


def decode_u64(value: bytes) -> int:
    try:
        result: int = _U64.unpack(value)[0]
    except struct.error as error:
        raise _damaged("a number", error) from error
    return result


def pipeline_key(pipeline: str) -> bytes:
    return pipeline.encode("ascii")


def pipeline_prefix(pipeline: str) -> bytes:
    """The common prefix of the keys of all its generations and files."""
    return pipeline.encode("ascii") + b"\0"


def generation_key(pipeline: str, generation: int) -> bytes:
    """Return the key of a generation. It is also the prefix of the keys of its files."""
    return pipeline_prefix(pipeline) + _GENERATION.pack(generation)


def file_key(pipeline: str, generation: int, index: int) -> bytes:
    return pipeline_prefix(pipeline) + _FILE.pack(generation, index)


def cold_start_key(pipeline: str, started_ns: int) -> bytes:
    return pipeline_prefix(pipeline) + _U64.pack(started_ns)


def parse_file_key(key: bytes) -> tuple[str, int, int]:
    """Return (pipeline, generation, index). Raises StoreDamaged."""
    try:
        pipeline, _, rest = key.partition(b"\0")
        generation, index = _FILE.unpack(rest)
        return pipeline.decode("ascii"), generation, index
    except (struct.error, UnicodeDecodeError) as error:
        raise _damaged("a key", error) from error
