"""regional/keys.py and regional/records.py: what one who can write to the bucket cannot make up."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from instantstart_fs.core.manifest import Digest, ManifestFile, ModelSpec, PipelineSpec
from instantstart_fs.errors import ConfigError
from instantstart_fs.regional import records
from instantstart_fs.regional.keys import RegionKey, keyed_digest, new_chunk_hasher, read_key

KEY, OTHER = RegionKey(b"k" * 32), RegionKey(b"o" * 32)
SPEC = PipelineSpec("p", (ModelSpec("hf://org/model"),))
FILE = ManifestFile("a.bin", 100, "address", "v1", Digest("sha256", "ab" * 32))


def test_a_chunks_digest_is_bound_to_pin_index_and_length() -> None:
    data = b"bytes of a chunk"
    keys = [
        key.chunk_key(pin, chunk, length)
        for key, pin, chunk, length in [
            (KEY, "pin", 0, 16),
            (OTHER, "pin", 0, 16),
            (KEY, "other", 0, 16),
            (KEY, "pin", 1, 16),
            (KEY, "pin", 0, 17),
        ]
    ]
    digests = {keyed_digest(key, data) for key in keys}
    assert len(digests) == 5
    hasher = new_chunk_hasher(keys[0])
    hasher.update(data[:5])
    hasher.update(data[5:])
    assert hasher.digest() == keyed_digest(keys[0], data)


def test_hosts_that_pinned_the_same_meet_and_others_do_not() -> None:
    slot = KEY.slot(SPEC)
    pins = [
        KEY.pin(slot, "a.bin", FILE, 8),
        KEY.pin(slot, "b.bin", FILE, 8),
        KEY.pin("other-slot", "a.bin", FILE, 8),
        KEY.pin(slot, "a.bin", FILE, 16),
        KEY.pin(slot, "a.bin", ManifestFile("a.bin", 101, "address", "v1", FILE.digest), 8),
        KEY.pin(slot, "a.bin", ManifestFile("a.bin", 100, "address", "v1", Digest("sha256", "cd" * 32)), 8),
        KEY.pin(slot, "a.bin", ManifestFile("a.bin", 100, "address", "v1"), 8),
        KEY.pin(slot, "a.bin", ManifestFile("a.bin", 100, "address", "v2"), 8),
        OTHER.pin(slot, "a.bin", FILE, 8),
    ]
    assert len(set(pins)) == len(pins)
    # What is proven by a strong digest is the same wherever the origin keeps it.
    assert KEY.pin(slot, "a.bin", ManifestFile("a.bin", 100, "elsewhere", "v9", FILE.digest), 8) == pins[0]


def test_a_slot_is_a_pipelines_with_these_sources() -> None:
    slots = [
        KEY.slot(SPEC),
        KEY.slot(PipelineSpec("q", SPEC.models)),
        KEY.slot(PipelineSpec("p", (ModelSpec("hf://org/other"),))),
        KEY.slot(PipelineSpec("p", (ModelSpec("hf://org/model", include=("*.json",)),))),
        KEY.slot(PipelineSpec("p", (ModelSpec("hf://org/model", exclude=("*.json",)),))),
        OTHER.slot(SPEC),
    ]
    assert len(set(slots)) == len(slots)
    assert "model" not in slots[0]


def _seal(size: int = 100, chunk_size: int = 8) -> records.Seal:
    return records.Seal(size, chunk_size, b"d" * 32 * -(-size // chunk_size), "sha256:ab", "host1", 1.0)


def test_a_seal_counts_under_its_own_name_and_key_alone() -> None:
    name = records.seal_name("slot", "pin")
    data = records.pack(KEY, "seal", name, _seal())
    assert records.unpack_seal(KEY, name, data, 100, 8) == _seal()
    replayed = records.seal_name("slot", "other")
    for key, where, what in [
        (OTHER, name, data),
        (KEY, replayed, data),
        (KEY, name, data[:-1]),
        (KEY, name, data + b"x"),
        (KEY, name, b""),
        (KEY, name, bytes([data[0] ^ 1]) + data[1:]),
    ]:
        with pytest.raises(records.Forged):
            records.unpack_seal(key, where, what, 100, 8)


def test_a_seal_of_another_size_or_of_too_few_digests_is_none() -> None:
    name = records.seal_name("slot", "pin")
    for seal in (_seal(101), _seal(100, 16), records.Seal(100, 8, b"short", "sha256:ab", "h", 1.0)):
        with pytest.raises(records.Forged):
            records.unpack_seal(KEY, name, records.pack(KEY, "seal", name, seal), 100, 8)


def test_a_claim_is_no_seal() -> None:
    name = records.claim_name("slot", "pin", 3, 0)
    data = records.pack(KEY, "claim", name, records.ClaimRecord("h", "life", 1, 2))
    assert records.unpack_claim(KEY, name, data).done == 2
    with pytest.raises(records.Forged):
        records.unpack_seal(KEY, name, data, 100, 8)
    with pytest.raises(records.Forged):
        records.unpack_claim(KEY, records.claim_name("slot", "pin", 4, 0), data)


def test_names_of_a_listing_are_read_or_ignored() -> None:
    assert records.listed("c/0000000a") == (10, None)
    assert records.listed("k/0000000a.0003") == (10, 3)
    for name in ("seal", "c/xyz", "c/0000000A", "c/0000000a/b", "k/0000000a", "../c/0000000a", "c/0000000a\n"):
        assert records.listed(name) is None
    below = records.directory("slot", "pin")
    for name in (records.chunk_name("slot", "pin", 10), records.claim_name("slot", "pin", 10, 3)):
        assert name.startswith(below)
        assert records.listed(name.removeprefix(below)) is not None


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [("ab" * 31, 0o600, "64 hex"), ("zz" * 32, 0o600, "64 hex"), ("", 0o600, "64 hex"), ("ab" * 32, 0o640, "others")],
)
def test_a_key_file_that_is_none_is_refused(tmp_path: Path, text: str, mode: int, reason: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match=reason):
        read_key(str(path))


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert read_key(str(path)) == b"\xab" * 32


def test_derived_keys_differ_from_one_another() -> None:
    made = [KEY._names, KEY._chunks, KEY._records]
    assert all(one != two for one, two in itertools.combinations(made, 2))
