"""What a caller sees: the mount's rule, and of what is not known about him the least."""

from __future__ import annotations

import itertools

import pytest

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.sight import ANYBODY, EVERYTHING, Sight
from instantstart_fs.core.weights import may_read

OWNER, MEMBER, OTHER, GROUP = 10, 20, 30, 100


def spec(mode: int) -> PipelineSpec:
    return PipelineSpec("x", (ModelSpec("hf://o/r"),), uid=OWNER, gid=GROUP, mode=mode)


@pytest.mark.parametrize("mode", [0o555, 0o550, 0o500, 0o505, 0o055, 0o005, 0o050, 0o000, 0o444, 0o111])
def test_whoever_is_known_sees_what_the_mount_would_list_and_owners_their_own(mode: int) -> None:
    for uid, groups in itertools.product((MEMBER, OTHER), (frozenset({GROUP}), frozenset({7}))):
        listed = may_read(uid, groups, owner=OWNER, group=GROUP, mode=mode)
        assert Sight(False, uid, groups).sees(spec(mode)) is listed
    assert Sight(False, OWNER, frozenset()).sees(spec(mode))
    assert EVERYTHING.sees(spec(mode))


@pytest.mark.parametrize("mode", [0o555, 0o550, 0o500, 0o505, 0o055, 0o005, 0o050, 0o000])
def test_who_hides_what_he_is_never_sees_more_than_if_he_said_it(mode: int) -> None:
    """A member of a group that may not read, others may (0505), is not told as "one of the others"."""
    for uid in (MEMBER, OTHER):
        for groups in (frozenset({GROUP}), frozenset[int]()):
            if Sight(False, uid, None).sees(spec(mode)) or ANYBODY.sees(spec(mode)):
                assert Sight(False, uid, groups).sees(spec(mode))
    assert Sight(False, OTHER, None).sees(spec(0o555)) and ANYBODY.sees(spec(0o555))
    assert not ANYBODY.sees(spec(0o055)) and not ANYBODY.sees(spec(0o505)) and not ANYBODY.sees(spec(0o550))


def test_a_pipelines_own_group_counts_as_its_owner_only_where_that_is_said() -> None:
    assert not Sight(False, MEMBER, frozenset({GROUP})).sees(spec(0o500))
    assert Sight(False, MEMBER, frozenset({GROUP}), owns_by_group=True).sees(spec(0o500))
    assert not Sight(False, MEMBER, None, owns_by_group=True).sees(spec(0o500))
