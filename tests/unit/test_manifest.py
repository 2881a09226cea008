"""When a file of one generation is one of the next as well."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from instantstart_fs.core.manifest import Digest, ManifestFile, same_bytes

PROVEN = ManifestFile("a", 10, "a", "commit-1", Digest("sha256", "ab"), 1)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"version": "commit-2", "address": "moved", "mtime_ns": 2}, True),
        ({"digest": Digest("sha256", "cd")}, False),
        ({"digest": Digest("git-sha1", "ab")}, False),
        ({"digest": Digest("sha256", "ab", part_size=5)}, False),
        ({"digest": None}, False),
        ({"size": 11}, False),
    ],
)
def test_an_equal_proof_is_enough(changes: dict[str, Any], same: bool) -> None:
    new = replace(PROVEN, **changes)
    assert same_bytes(PROVEN, new) is same
    assert same_bytes(new, PROVEN) is same


@pytest.mark.parametrize("digest", [None, Digest("crc32c", "ab"), Digest("crc64nvme", "ab"), Digest("crc32", "ab")])
def test_without_a_proof_it_must_be_the_very_object(digest: Digest | None) -> None:
    old = replace(PROVEN, digest=digest)
    assert same_bytes(old, replace(old, mtime_ns=2))
    assert not same_bytes(old, replace(old, version="commit-2"))
    assert not same_bytes(old, replace(old, address="moved"))
    assert not same_bytes(replace(old, version=""), replace(old, version=""))
