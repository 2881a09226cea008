"""Hashers against known values, and against any way of cutting the input."""

from __future__ import annotations

import base64
import hashlib
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core.digests import new_hasher
from instantstart_fs.core.manifest import Algorithm, Digest

ALGORITHMS: tuple[Algorithm, ...] = ("sha256", "sha1", "md5", "crc32", "crc32c", "crc64nvme", "git-sha1")


def digest_of(algorithm: Algorithm, data: bytes, part_size: int = 0) -> str:
    hasher = new_hasher(Digest(algorithm, "", part_size), len(data))
    hasher.update(data)
    return hasher.hexdigest()


@pytest.mark.parametrize(
    ("algorithm", "data", "value"),
    [
        ("sha256", b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("sha1", b"abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
        ("md5", b"abc", "900150983cd24fb0d6963f7d28e17f72"),
        # the check values of the CRC catalogue
        ("crc32", b"123456789", "cbf43926"),
        ("crc32c", b"123456789", "e3069283"),
        ("crc64nvme", b"123456789", "ae8b14860a799888"),
        # git hash-object
        ("git-sha1", b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        ("git-sha1", b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        ("crc32", b"", "00000000"),
        ("crc64nvme", b"", "0000000000000000"),
    ],
)
def test_known_values(algorithm: Algorithm, data: bytes, value: str) -> None:
    assert digest_of(algorithm, data) == value


def test_a_composite_is_the_digest_of_the_parts_digests() -> None:
    data = bytes(range(250))
    parts = [data[:100], data[100:200], data[200:]]
    outer = b"".join(hashlib.md5(part).digest() for part in parts)
    assert digest_of("md5", data, 100) == hashlib.md5(outer).hexdigest()
    outer = b"".join(zlib.crc32(part).to_bytes(4, "big") for part in parts)
    assert digest_of("crc32", data, 100) == f"{zlib.crc32(outer):08x}"


def test_a_composite_that_ends_on_a_boundary_has_no_empty_part() -> None:
    outer = hashlib.sha256(b"a" * 10).digest() + hashlib.sha256(b"b" * 10).digest()
    assert digest_of("sha256", b"a" * 10 + b"b" * 10, 10) == hashlib.sha256(outer).hexdigest()


def test_a_composite_of_one_part_is_not_the_digest_itself() -> None:
    assert digest_of("md5", b"abc", 5) == hashlib.md5(hashlib.md5(b"abc").digest()).hexdigest()


def test_base64_as_s3_writes_it_is_the_same_number() -> None:
    assert base64.b64decode("rosUhgp5mIg=").hex() == digest_of("crc64nvme", b"123456789")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6), part_size=st.integers(0, 40))
def test_any_cutting_and_any_buffer_give_the_same(
    algorithm: Algorithm, data: bytes, cuts: list[int], part_size: int
) -> None:
    whole = digest_of(algorithm, data, part_size)
    hasher = new_hasher(Digest(algorithm, "", part_size), len(data))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        piece = data[start:stop]
        hasher.update((piece, bytearray(piece), memoryview(piece))[number % 3])
        hasher.hexdigest()  # looking does not disturb
    assert hasher.hexdigest() == whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_changed_byte_changes_it(algorithm: Algorithm) -> None:
    assert digest_of(algorithm, b"x" * 99 + b"y") != digest_of(algorithm, b"x" * 100)
    assert digest_of(algorithm, b"x" * 99 + b"y", 30) != digest_of(algorithm, b"x" * 100, 30)


def test_nothing_to_prove_by_equals_no_digest() -> None:
    hasher = new_hasher(None, 3)
    hasher.update(b"abc")
    assert hasher.hexdigest() == ""
