"""Who gives way when there is no room: never who is at work, never another's share for one's own."""

from __future__ import annotations

from instantstart_fs.core.seats import Seat, Seats

EACH, TOTAL = 3, 5


def enter(seats: Seats, share: str, now: float) -> Seat:
    seat, _ = seats.enter(share, now, each=EACH, total=TOTAL)
    assert isinstance(seat, Seat)
    return seat


def test_the_longest_idle_of_ones_own_gives_way() -> None:
    seats = Seats()
    first, second, third = (enter(seats, "a", now) for now in (1, 2, 3))
    first.at_work()
    third.idle(1.5)
    assert seats.enter("a", 9, each=EACH, total=TOTAL)[1] is third
    assert seats.enter("a", 9, each=EACH, total=TOTAL)[1] is second
    assert third.given_up and second.given_up and not first.given_up
    assert seats.taken("a") == EACH


def test_who_is_at_work_keeps_its_seat() -> None:
    seats = Seats()
    for now in range(EACH):
        enter(seats, "a", now).at_work()
    assert seats.enter("a", 9, each=EACH, total=TOTAL) == ("share", None)
    for now in range(TOTAL - EACH):
        enter(seats, "b", now).at_work()
    assert seats.enter("c", 9, each=EACH, total=TOTAL) == ("all", None)
    assert len(seats) == TOTAL


def test_when_all_are_taken_the_greediest_gives_way_and_newcomers_come_in() -> None:
    seats = Seats()
    lonely = enter(seats, "lonely", 0)
    greedy = [enter(seats, "greedy", now) for now in range(1, 4)]
    enter(seats, "other", 0.5)
    seat, leaves = seats.enter("new", 9, each=EACH, total=TOTAL)
    assert isinstance(seat, Seat) and leaves is greedy[0]
    for one in greedy[1:]:
        one.at_work()
    assert seats.enter("another", 10, each=EACH, total=TOTAL)[1] is lonely


def test_a_thousand_shares_cannot_fill_it() -> None:
    """A user may have 65,536 subordinate uids."""
    seats = Seats()
    for number in range(1000):
        enter(seats, f"uid {number}", number)
    assert len(seats) == TOTAL
    victim = enter(seats, "honest", 2000)
    assert not victim.given_up and len(seats) == TOTAL


def test_a_seat_is_left_once() -> None:
    seats = Seats()
    given_up, *_ = (enter(seats, "a", now) for now in range(EACH + 1))
    assert given_up.given_up and seats.taken("a") == EACH
    seats.leave(given_up)
    assert seats.taken("a") == EACH
    seats.leave(enter(seats, "b", 9))
    assert len(seats) == EACH
