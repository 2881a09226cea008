"""core/rack.py: who owns what in a rack, tickets, requests, and when a neighbour is no longer asked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.core import rack
from instantstart_fs.core.rack import Asked, Neighbours

KEY, OTHER = b"k" * 32, b"o" * 32
SLOT, PIN = "ab" * 16, "cd" * 16
NAMES = st.sets(st.text("abcdefghij0123456789", min_size=1, max_size=6), min_size=1, max_size=16)
ASKED = st.builds(
    Asked,
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 3000).map(lambda wait: wait / 1000),
    st.booleans(),
)


# -- owners ------------------------------------------------------------------------------------------------------------


@given(NAMES, st.integers(0, 1000), st.data())
def test_a_host_that_leaves_moves_only_what_it_owned(names: set[str], group: int, data: st.DataObject) -> None:
    before = rack.owner(PIN, group, names)
    assert before in names and before == rack.owner(PIN, group, sorted(names, reverse=True))
    left = names - {data.draw(st.sampled_from(sorted(names)))}
    if before in left:
        assert rack.owner(PIN, group, left) == before


def test_owners_are_spread_evenly() -> None:
    names = {f"host{number}" for number in range(16)}
    found = Counter(rack.owner(PIN, group, names) for group in range(3200))
    assert set(found) == names and min(found.values()) > 140 and max(found.values()) < 260


@given(NAMES, st.integers(0, 60))
def test_each_host_goes_through_all_groups_its_own_first(names: set[str], count: int) -> None:
    for me in names:
        order = rack.walk(me, PIN, range(count), names)
        assert sorted(order) == list(range(count))
        mine = [group for group in range(count) if rack.owner(PIN, group, names) == me]
        assert order[: len(mine)] == mine


def test_hosts_that_begin_together_ask_different_neighbours() -> None:
    names = {f"host{number}" for number in range(16)}
    orders = {name: rack.walk(name, PIN, range(320), names) for name in names}
    for step in range(0, 300, 20):
        asked = Counter(rack.owner(PIN, order[step], names) for order in orders.values())
        assert max(asked.values()) <= 5, (step, asked)


# -- tickets and requests ----------------------------------------------------------------------------------------------


@given(ASKED, st.floats(0, 2e9))
def test_a_ticket_is_good_for_its_host_and_chunk_for_a_minute(asked: Asked, now: float) -> None:
    ticket = rack.make_ticket(KEY, "owner", asked, now)
    assert rack.is_ticket(KEY, "owner", asked, ticket, now)
    assert rack.is_ticket(KEY, "owner", asked, ticket, now - 30), "a clock that is behind"
    assert not rack.is_ticket(KEY, "owner", asked, ticket, now + rack.TICKET_SECONDS + 1)
    assert not rack.is_ticket(KEY, "owner", asked, ticket, now - rack.MOST_TICKET_SECONDS)
    assert not rack.is_ticket(OTHER, "owner", asked, ticket, now)
    assert not rack.is_ticket(KEY, "another", asked, ticket, now)
    for other in (
        asked._replace(chunk=asked.chunk ^ 1),
        asked._replace(slot=PIN if asked.slot != PIN else SLOT),
        asked._replace(pin=SLOT if asked.pin != SLOT else PIN),
    ):
        assert not rack.is_ticket(KEY, "owner", other, ticket, now)


@given(st.text(max_size=120))
def test_what_is_no_ticket_is_none(ticket: str) -> None:
    assert not rack.is_ticket(KEY, "owner", Asked(SLOT, PIN, 0, 1.0, True), ticket, 1000.0)


@given(ASKED)
def test_a_request_says_what_is_asked(asked: Asked) -> None:
    found = rack.asked_by(rack.path_of(asked))
    assert found is not None and found[:3] == asked[:3] and found.sealed == asked.sealed
    assert found.wait == pytest.approx(asked.wait, abs=0.001)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/rack/v1/../../etc/passwd",
        f"/rack/v1/{SLOT}/{PIN}/../00000000?wait=0&sealed=1",
        f"/rack/v1/{SLOT}/{PIN}/0000000?wait=0&sealed=1",
        f"/rack/v1/{SLOT}/{PIN}/00000000?wait=0&sealed=1\n",
        f"/rack/v1/{SLOT}/{PIN}/00000000?wait=-1&sealed=1",
        f"/rack/v1/{SLOT}/{PIN}/00000000?wait=999999&sealed=1",
        f"/rack/v1/{SLOT.upper()}/{PIN}/00000000?wait=0&sealed=1",
        f"/rack/v1/{SLOT}%2f/{PIN}/00000000?wait=0&sealed=1",
    ],
)
def test_any_other_request_is_none(path: str) -> None:
    assert rack.asked_by(path) is None


@given(st.text(max_size=200))
def test_no_text_raises(path: str) -> None:
    assert rack.asked_by(path) is None


def test_nobody_makes_an_owner_wait_for_long() -> None:
    found = rack.asked_by(f"/rack/v1/{SLOT}/{PIN}/00000000?wait=99999&sealed=0")
    assert found is not None and found.wait == rack.WAIT_SECONDS < rack.SILENT_SECONDS


# -- neighbours --------------------------------------------------------------------------------------------------------


def owned_by(neighbours: Neighbours, host: str, now: float = 0.0) -> int:
    """A group of this host."""
    return next(group for group in range(1000) if neighbours.owner(SLOT, PIN, group, now) == host)


@pytest.fixture
def three() -> Neighbours:
    made = Neighbours("me")
    made.live(["me", "a", "b"])
    return made


def test_alone_or_owner_means_the_tier(three: Neighbours) -> None:
    assert Neighbours("me").owner(SLOT, PIN, 1, 0.0) is None
    found = Counter(three.owner(SLOT, PIN, group, 0.0) for group in range(300))
    assert set(found) == {None, "a", "b"} and min(found.values()) > 60


def test_one_that_has_nothing_is_passed_over_for_that_pipeline_alone(three: Neighbours) -> None:
    group = owned_by(three, "a")
    three.has_nothing("a", SLOT, 0.0)
    assert three.owner(SLOT, PIN, group, 1.0) != "a"
    assert three.owner(PIN, PIN, group, 1.0) == "a"
    assert three.owner(SLOT, PIN, group, rack.IDLE_SECONDS + 1) == "a"


def test_one_that_fails_twice_is_left_alone_then_probed(three: Neighbours) -> None:
    group = owned_by(three, "a")
    assert not three.failed("a", 0.0)
    assert three.owner(SLOT, PIN, group, 0.0) == "a", "one failure may be chance"
    assert three.failed("a", 0.5)
    assert three.owner(SLOT, PIN, group, 1.0) != "a"
    assert three.owner(SLOT, PIN, group, 6.0) == "a", "a probe"
    assert three.owner(SLOT, PIN, group, 6.1) != "a", "one at a time"
    three.failed("a", 7.0)
    assert three.owner(SLOT, PIN, group, 13.0) != "a", "later and later"
    assert three.owner(SLOT, PIN, group, 30.0) == "a"
    three.gave("a")
    assert three.owner(SLOT, PIN, group, 30.1) == "a"


def test_one_that_lies_is_left_alone_at_once_and_for_long(three: Neighbours) -> None:
    group = owned_by(three, "a")
    three.lied("a", 0.0)
    three.gave("a")
    three.live(["a", "b"])
    assert three.owner(SLOT, PIN, group, rack.WRONG_SECONDS - 1) != "a"
    assert three.owner(SLOT, PIN, group, rack.WRONG_SECONDS + 1) == "a"


def test_one_that_is_gone_is_not_asked_and_hurts_nobody(three: Neighbours) -> None:
    three.live(["b"])
    assert {three.owner(SLOT, PIN, group, 0.0) for group in range(100)} == {None, "b"}
    three.lied("a", 0.0)
    three.has_nothing("a", SLOT, 0.0)
    three.gave("a")
    assert not three.failed("a", 0.0)


def test_a_reader_waits_less_than_anybody_else() -> None:
    for began, last in ((0.0, 0.0), (0.0, 2.5), (5.0, 9.0)):
        reader, other = (rack.give_up_at(began, last, demanded=demanded) for demanded in (True, False))
        assert reader < other <= began + rack.SLOWEST_SECONDS
