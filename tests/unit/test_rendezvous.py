"""Who owns what: alike everywhere, spread evenly, and as little moved as can be when a host comes or goes."""

from __future__ import annotations

from collections import Counter

from instantstart_fs.core.rendezvous import order, ranked, score

HOSTS = [f"gpu{number}" for number in range(16)]
THINGS = [f"0/{number}" for number in range(2000)]


def owners(hosts: list[str]) -> dict[str, str]:
    return {thing: ranked(thing, hosts, 1)[0] for thing in THINGS}


def test_scores_never_change() -> None:
    assert score("gpu0", "0/0") == 12314013130164690940, "another value moves every chunk of every region"
    assert score("gpu0", "0/0") != score("gpu", "00/0"), "names and things do not run into each other"


def test_things_are_spread_evenly() -> None:
    counted = Counter(owners(HOSTS).values())
    mean = len(THINGS) / len(HOSTS)
    assert all(0.6 * mean < counted[host] < 1.4 * mean for host in HOSTS)


def test_a_host_that_goes_moves_only_what_it_owned() -> None:
    before, after = owners(HOSTS), owners(HOSTS[1:])
    assert {thing for thing in THINGS if before[thing] != after[thing]} == {
        thing for thing in THINGS if before[thing] == HOSTS[0]
    }
    for thing in THINGS[:50]:
        whole = ranked(thing, HOSTS)
        assert ranked(thing, list(reversed(HOSTS))) == whole
        assert ranked(thing, HOSTS[1:]) == [host for host in whole if host != HOSTS[0]]


def test_each_host_begins_with_others_than_its_neighbours() -> None:
    first = [order(host, THINGS)[0] for host in HOSTS]
    assert len(set(first)) >= len(HOSTS) - 1
    assert sorted(order(HOSTS[0], THINGS)) == sorted(THINGS)
