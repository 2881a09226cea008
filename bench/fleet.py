"""How long a region takes to get warm, one host to ten thousand: a simulation with the daemon's own decisions.

    scripts/bench fleet [--hosts 1,10,100,1000,10000] [--sizes 16GB,140GB] [--draw]

What is real: what each host claims, watches, takes over, takes from where and in which order (core/region.py), and who
owns what in a rack. What is a model: time, the network and the engine (bench/fluid.py): a hub behind 10 Gbit/s, hosts
of 100 Gbit/s with disks of 6 GB/s, sixteen to a rack, uplinks of 400 Gbit/s or without limit, and as the tier (a) eight
servers of their own, 100 Gbit/s each, or (b) a storage server on each host; (c) is either with the rack level. Each
object lies on two servers, spread at random. There is no processor in the model, no latency but that of waiting for
one's turn, and no disk read: what a storage server was given lately is in its memory.

A piece stands for several chunks where hosts × pieces would be too many: time is coarser then, and never shorter.
Finished runs are kept in bench/results/fleet.json and not done again (--again).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy

from bench.common import RESULTS, table, write_result
from bench.curves import Curve, Line, draw
from bench.fluid import UNLIMITED, Fluid
from instantstart_fs.core import patience, region
from instantstart_fs.core.claims import ClaimBudget, ClaimMark, Take, looking_period, starting_delay
from instantstart_fs.core.patience import Patience
from instantstart_fs.core.rack import owner
from instantstart_fs.core.region import PullPlan

GBIT = 1e9 / 8
MIB = 1024 * 1024
PIECE = 64 * MIB
PIN = "pipeline"
LOOK = (0.5, 1.0)
"""Seconds between two looks of a host at the tier."""
GRID = 0.05
PUT_SECONDS = 0.05
"""A claim's conditional put."""
MOST_WATCHED = 4
"""Claims that one look reads."""
SERVING = 16
"""Streams that a rack's owner sends at once."""
CURVES = Path(__file__).parent.parent / "docs" / "figures"
DOCUMENT = CURVES.parent / "REGIONS.md"
BEGIN, END = "<!-- scripts/bench fleet --draw writes this table -->\n", "<!-- end of the table -->\n"


class Setting(msgspec.Struct, frozen=True):
    """One simulation. ``tier``: "none", "servers" or "hosts"; ``cold``: the tier has nothing yet. Bytes and bytes a
    second; ``uplink`` 0: without limit."""

    hosts: int
    size: float
    tier: str = "servers"
    racks: bool = False
    cold: bool = False
    uplink: float = 400 * GBIT
    origin: float = 10 * GBIT
    nic: float = 100 * GBIT
    disk: float = 6e9
    rack_size: int = 16
    servers: int = 8
    server: float = 100 * GBIT
    streams: int = 8
    most: float = 2e5
    spread: bool = False
    seed: int = 1

    @property
    def pieces(self) -> int:
        """Of the pipeline, each fetched as one."""
        wanted = math.ceil(self.size / PIECE)
        most = self.most / 2 if self.cold else self.most
        return max(min(wanted, 96), min(wanted, int(most / self.hosts)))

    @property
    def key(self) -> str:
        """What tells it from others in the results."""
        warmth = "cold" if self.cold else "warm"
        uplink = f"{self.uplink / GBIT:g}" if self.uplink else "unlimited"
        return f"{self.size / 1e9:g}GB {warmth} uplink={uplink} {self.letter} hosts={self.hosts}"

    @property
    def letter(self) -> str:
        return {"none": "n", "servers": "a", "hosts": "b"}[self.tier] + ("r" if self.racks else "")


class Network:
    """Numbers of the resources in a Fluid, and the paths through them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        hosts, racks = setting.hosts, math.ceil(setting.hosts / setting.rack_size)
        uplink = setting.uplink or UNLIMITED
        servers = setting.servers if setting.tier == "servers" else 0
        self.names: list[str] = []
        capacities: list[float] = []

        def take(name: str, count: int, capacity: float) -> int:
            start = len(capacities)
            self.names.extend([name] * count)
            capacities.extend([capacity] * count)
            return start

        self.origin = take("origin", 1, setting.origin)
        self._in = take("NIC in", hosts, setting.nic)
        self._out = take("NIC out", hosts, setting.nic)
        self._disk = take("disk", hosts, setting.disk)
        self._up = take("uplink out", racks, uplink)
        self._down = take("uplink in", racks, uplink)
        self._server_out = take("server out", servers, setting.server)
        self._server_in = take("server in", servers, setting.server)
        self.fluid = Fluid(capacities)

    def rack(self, host: int) -> int:
        return host // self.setting.rack_size

    def from_origin(self, host: int) -> tuple[int, ...]:
        return (self.origin, self._down + self.rack(host), self._in + host, self._disk + host)

    def from_server(self, server: int, host: int) -> tuple[int, ...]:
        into = (self._down + self.rack(host), self._in + host, self._disk + host)
        return (self._server_out + server, *into) if self.setting.tier == "servers" else self.from_host(server, host)

    def from_host(self, other: int, host: int) -> tuple[int, ...]:
        if other == host:
            return (self._disk + host,)
        into = (self._in + host, self._disk + host)
        mine, its = self.rack(host), self.rack(other)
        between = () if mine == its else (self._up + its, self._down + mine)
        return (self._out + other, *between, *into)

    def to_server(self, host: int, server: int) -> tuple[int, ...]:
        if self.setting.tier == "servers":
            return (self._out + host, self._up + self.rack(host), self._server_in + server)
        return self.from_host(host, server)

    def used(self, seconds: float) -> dict[str, float]:
        """How busy the resources of each kind were on average over the first ``seconds``, 1 = always."""
        fluid, found = self.fluid, dict[str, float]()
        for kind in dict.fromkeys(self.names):
            rows = [number for number, name in enumerate(self.names) if name == kind]
            capacity = float(fluid.capacities[rows].sum())
            if capacity < UNLIMITED:
                found[kind] = float(fluid.carried[rows].sum()) / (capacity * seconds)
        return found

    def carried(self, kind: str) -> numpy.typing.NDArray[Any]:
        rows = [number for number, name in enumerate(self.names) if name == kind]
        return self.fluid.carried[rows]


class Host:
    """One of the fleet: a PullPlan, as the daemon has one for each file, and what is under way."""

    __slots__ = ("budget", "looking", "mine", "number", "plan", "pulling", "seen", "streams", "waiting_since")

    def __init__(self, number: int, name: str, pieces: int) -> None:
        self.number = number
        self.plan = PullPlan(name, PIN, [False] * pieces, Patience())
        self.plan.background = True
        self.budget = ClaimBudget(1, 1)
        self.streams = 0
        self.looking = False
        """Whether a look at the tier is due at some time."""
        self.seen = 0
        """How many of the tier's pieces it has heard of."""
        self.pulling: list[int] = []
        """Pieces to take from the origin."""
        self.waiting_since = math.inf


class Fleet:
    """The hosts of one Setting, all of which want the whole pipeline at once."""

    def __init__(self, setting: Setting) -> None:
        region.GROUP_CHUNKS = 1  # a piece is a whole group here
        self.setting = setting
        self.chance = random.Random(setting.seed)
        self.network = Network(setting)
        self.fluid = self.network.fluid
        self.piece = setting.size / setting.pieces
        hosts, pieces = setting.hosts, setting.pieces
        self.hosts = [Host(number, f"host{number}", pieces) for number in range(hosts)]
        self.owner = numpy.zeros((math.ceil(hosts / setting.rack_size), pieces), dtype=numpy.int32)
        """Of a piece in a rack: its owner's number."""
        if setting.racks:
            self._find_owners()
        self.have = numpy.zeros((hosts, pieces), dtype=bool)
        self.wanted = numpy.ones((hosts, pieces), dtype=bool)
        """Neither here nor on its way."""
        self.offered = numpy.zeros((hosts, pieces), dtype=bool)
        """The tier is to be asked for it, as far as this host knows."""
        self.idle = numpy.ones(hosts, dtype=bool)
        """Nothing is on its way to it."""
        self.serving = numpy.zeros(hosts, dtype=numpy.int32)
        self.left = [pieces] * hosts
        self.done_at = [math.inf] * hosts
        self.undone = hosts
        self.stored: list[int] = []
        """The tier's pieces, in the order in which they came."""
        self.held = bytearray(pieces)
        """Whether each piece is in the tier."""
        self.claims: dict[tuple[int, int], ClaimMark] = {}
        """The tier's records, by group and epoch."""
        self.claimed: dict[int, int] = {}
        """The latest epoch of each group that has a record."""
        self.pullers: set[int] = set()
        self.requests = 0
        """Small ones to the tier: listings, claims and looks at claims."""
        self.way_out = 0
        """Pieces that a host of a rack took from the tier since their owner did not give them in time."""
        count = setting.servers if setting.tier == "servers" else hosts
        copies = min(2, count)
        self.places = [tuple(self.chance.sample(range(count), copies)) for _ in range(pieces)]
        self._columns = numpy.arange(pieces)

    def _find_owners(self) -> None:
        names = [host.plan.host for host in self.hosts]
        size = self.setting.rack_size
        for rack in range(len(self.owner)):
            members = names[rack * size : (rack + 1) * size]
            for piece in range(self.setting.pieces):
                self.owner[rack, piece] = rack * size + members.index(owner(PIN, piece, members))

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        for host in self.hosts:
            host.budget = ClaimBudget(1, 2 * self.setting.streams)
            if self.setting.tier == "none":
                host.plan.give_up()
            elif not self.setting.cold:
                host.plan.sealed(0)
            self._look_after(host, 0.05 + starting_delay(self.setting.hosts, self.chance.random()))
        self.fluid.run(done=lambda: not self.undone)
        assert not self.undone, f"{self.undone} hosts never get warm"
        return self._account(time.monotonic() - started)

    # -- what a host hears of the tier -----------------------------------------------------------------------------

    def _look_after(self, host: Host, seconds: float) -> None:
        if not host.looking:
            host.looking = True
            # on a grid: a step for each host's own moment would take longer than all the rest
            when = math.ceil((self.fluid.now + seconds) / GRID) * GRID
            self.fluid.at(when, lambda: self._look(host))

    def _look(self, host: Host) -> None:
        host.looking = False
        if not self.left[host.number]:
            return
        plan, now = host.plan, self.fluid.now
        if self._asks(host):
            self.requests += 1
            plan.listed(self.stored[host.seen :], self.claimed, now)
            host.seen = len(self.stored)
            host.budget.looked(now, others=plan.others(now))
            for watch in plan.watches(MOST_WATCHED, now):
                self.requests += 1
                mark = self.claims.get((watch.group, watch.epoch))
                if mark is None:
                    plan.vanished(watch.group, watch.epoch)
                else:
                    plan.seen(watch.group, watch.epoch, mark, now)
            for renewal in plan.renewals(now):
                self.requests += 1
                self.claims[renewal.group, renewal.epoch] = renewal.mark
            self._claim(host)
        self._begin(host)
        if self.left[host.number] and (self._asks(host) or self.setting.racks):
            self._look_after(host, looking_period(self.setting.hosts, self.chance.uniform(*LOOK)))

    def _asks(self, host: Host) -> bool:
        """Whether it lists the tier and claims: not once it knows that all is there, as a daemon that has a seal."""
        return self.setting.cold and host.seen < self.setting.pieces

    def _claim(self, host: Host) -> None:
        takes = host.plan.next_claims(host.budget.left(host.plan.holding), self.fluid.now)
        if takes:
            host.budget.claimed(self.fluid.now)
        for take in takes:
            self.requests += 1
            self.fluid.after(PUT_SECONDS, lambda take=take: self._put(host, take))  # type: ignore[misc]

    def _put(self, host: Host, take: Take) -> None:
        key = (take.group, take.epoch)
        if key in self.claims:
            host.plan.lost(take.group, self.fluid.now)
        else:
            self.claims[key] = ClaimMark(host.plan.host, 0, 0)
            self.claimed[take.group] = max(take.epoch, self.claimed.get(take.group, 0))
            if self.held[take.group]:  # its claim was removed since this host looked
                host.plan.listed([take.group], {}, self.fluid.now)
            host.plan.won(take.group, self.fluid.now)
            self._begin(host)

    # -- what it fetches -------------------------------------------------------------------------------------------

    def _begin(self, host: Host) -> None:
        """All that it can."""
        number = host.number
        for piece, source in host.plan.take_moves(self.fluid.now):
            if source == 0:
                self.offered[number, piece] = True
            else:
                self.offered[number, piece] = False
                if self.wanted[number, piece]:
                    host.pulling.append(piece)
        begun = 0
        while host.streams < self.setting.streams and self._next(host):
            begun += 1
        if host.streams >= self.setting.streams or begun:
            host.waiting_since = math.inf
        elif host.waiting_since == math.inf:
            host.waiting_since = self.fluid.now

    def _next(self, host: Host) -> bool:
        number = host.number
        while host.pulling:
            piece = host.pulling.pop()
            if self.wanted[number, piece]:
                self._pull(host, piece)
                return True
        offered = self.wanted[number] & self.offered[number]
        if not self.setting.racks:
            return self._from_tier(host, self._first(host, offered))
        owner = self.owner[self.network.rack(number)]
        mine = owner == number
        if self._from_tier(host, self._first(host, offered & mine)):
            return True
        served = self.have[owner, self._columns] & (self.serving[owner] < SERVING)
        piece = self._first(host, self.wanted[number] & ~mine & served)
        if piece is not None:
            self._from_neighbour(host, int(owner[piece]), piece)
            return True
        if self.fluid.now - host.waiting_since >= patience.CHUNK_DEADLINE:
            # Who goes round an owner that works, only slowly, makes a tier that is busy busier, for everybody.
            stuck = offered & self.idle[owner]
            if self._from_tier(host, self._first(host, stuck)):
                self.way_out += 1
                return True
        return False

    def _first(self, host: Host, which: numpy.typing.NDArray[Any]) -> int | None:
        """The next of these for this host: in load order, from a place of its own on where the setting says so."""
        start = host.number * self.setting.pieces // self.setting.hosts if self.setting.spread else 0
        found = int(which[start:].argmax())
        if which[start + found]:
            return start + found
        found = int(which.argmax())
        return found if which[found] else None

    def _from_tier(self, host: Host, piece: int | None) -> bool:
        if piece is None:
            return False
        places = self.places[piece]
        server = host.number if self.setting.tier == "hosts" and host.number in places else self.chance.choice(places)
        if self.setting.tier == "hosts" and self.setting.pieces < self.setting.hosts:
            # A piece stands for many chunks then, which lie on many hosts and not on two.
            server = self.chance.randrange(self.setting.hosts)
        self._fetch(host, piece, self.network.from_server(server, host.number))
        return True

    def _from_neighbour(self, host: Host, owner: int, piece: int) -> None:
        self.serving[owner] += 1

        def told() -> None:
            self.serving[owner] -= 1

        self._fetch(host, piece, self.network.from_host(owner, host.number), told)

    def _pull(self, host: Host, piece: int) -> None:
        self.pullers.add(host.number)
        if self.setting.tier == "none":
            self._fetch(host, piece, self.network.from_origin(host.number))
            return

        def told() -> None:
            waiting = set(self.places[piece])

            def stored(server: int) -> None:
                waiting.discard(server)
                if not waiting:
                    self.stored.append(piece)
                    self.held[piece] = 1
                    host.plan.released(piece)
                    for epoch in range(self.claimed.pop(piece, -1) + 1):
                        self.claims.pop((piece, epoch), None)

            for server in self.places[piece]:
                path = self.network.to_server(host.number, server)
                self.fluid.start(self.piece, path, lambda server=server: stored(server))  # type: ignore[misc]

        self._fetch(host, piece, self.network.from_origin(host.number), told)

    def _fetch(self, host: Host, piece: int, path: Sequence[int], then: Any = None) -> None:
        number = host.number
        self.wanted[number, piece] = False
        host.streams += 1
        self.idle[number] = False

        def told() -> None:
            host.streams -= 1
            self.idle[number] = not host.streams
            self.have[number, piece] = True
            host.plan.came(piece)
            self.left[number] -= 1
            if not self.left[number]:
                self.done_at[number] = self.fluid.now
                self.undone -= 1
            if then is not None:
                then()
            if self.left[number]:
                if self._asks(host) and host.budget.left(host.plan.holding) > 0:
                    self._claim(host)
                self._begin(host)

        self.fluid.start(self.piece, path, told)

    # -- what came of it -------------------------------------------------------------------------------------------

    def _account(self, took: float) -> dict[str, Any]:
        setting, network = self.setting, self.network
        times = numpy.array(self.done_at)
        p50, p99 = (float(numpy.percentile(times, percent)) for percent in (50, 99))
        last = float(times.max())
        used = network.used(last)
        servers = network.carried("server out" if setting.tier == "servers" else "NIC out")
        return {
            "p50": p50,
            "p99": p99,
            "last": last,
            "origin_ratio": float(network.fluid.carried[network.origin]) / setting.size,
            "served_max": float(servers.max()) if len(servers) else 0.0,
            "served_mean": float(servers.mean()) if len(servers) else 0.0,
            "uplinks": float(network.carried("uplink in").sum()) / setting.size,
            "used": {kind: round(value, 3) for kind, value in used.items()},
            "limit": max(used, key=lambda kind: used[kind]),
            "requests_a_second": self.requests / last,
            "pullers": len(self.pullers),
            "way_out": self.way_out,
            "pieces": setting.pieces,
            "steps": self.fluid.steps,
            "took": took,
        }


# -- all of them -------------------------------------------------------------------------------------------------------

TIERS = {"a": ("servers", False), "b": ("hosts", False), "ar": ("servers", True), "br": ("hosts", True)}
NAMES = {
    "n": "no tier",
    "a": "(a) 8 servers",
    "b": "(b) on the hosts",
    "ar": "(c) 8 servers, racks",
    "br": "(c) on the hosts, racks",
}


def settings(hosts: Sequence[int], sizes: Sequence[float]) -> list[Setting]:
    """Every one that docs/REGIONS.md shows; small ones first."""
    found = []
    for count in hosts:
        for size in sizes:
            for tier, racks in TIERS.values():
                found += [Setting(count, size, tier, racks, cold) for cold in (False, True)]
                if not racks and count < 10_000:  # without limits there is nothing to spare
                    found.append(Setting(count, size, tier, uplink=0))
    return found


def simulate(setting: Setting) -> tuple[str, dict[str, Any]]:
    return setting.key, {**msgspec.to_builtins(setting), **Fleet(setting).run()}


def kept(result: str) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        found: dict[str, dict[str, Any]] = json.loads((RESULTS / f"{result}.json").read_text())["runs"]
        return found
    return {}


def curves(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SVGs by file name."""
    drawn: dict[str, str] = {}
    for size in sorted({run["size"] for run in runs.values()}):
        for cold in (False, True):
            for uplink in sorted({run["uplink"] for run in runs.values()}):
                chosen = [
                    run for run in runs.values() if (run["size"], run["cold"], run["uplink"]) == (size, cold, uplink)
                ]
                lines = []
                for letter, (tier, racks) in TIERS.items():
                    mine = sorted(
                        (run for run in chosen if (run["tier"], run["racks"]) == (tier, racks)),
                        key=lambda run: run["hosts"],
                    )
                    if mine:
                        hosts = [run["hosts"] for run in mine]
                        lines.append(
                            Curve(NAMES[letter], hosts, [run["p50"] for run in mine], [run["p99"] for run in mine])
                        )
                if not lines:
                    continue
                bounds = [Line("one host's disk", size / Setting(1, 1).disk)]
                if cold:
                    bounds.append(Line("the origin's link", size / Setting(1, 1).origin))
                    hosts = lines[0].x
                    alone = [max(1, count) * size / Setting(1, 1).origin for count in hosts]
                    lines.append(Curve("each for itself", hosts, alone))
                state = "nothing in the region yet" if cold else "warm in the region"
                over = f"uplinks {uplink / GBIT:g} Gbit/s" if uplink else "uplinks without limit"
                name = f"region-{size / 1e9:g}gb-{'cold' if cold else 'warm'}{'' if uplink else '-flat'}.svg"
                title = f"{size / 1e9:g} GB, {state}, {over}"
                drawn[name] = draw(
                    title, "hosts that start at once", "seconds to warm (p50, band to p99)", lines, bounds
                )
    return drawn


def shown(runs: dict[str, dict[str, Any]]) -> str:
    header = (
        "",
        "hosts",
        "p50 s",
        "p99 s",
        "origin",
        "limit",
        "a server sent, mean / most",
        "uplinks",
        "requests/s",
        "took s",
    )
    rows = []
    for key, run in runs.items():
        rows.append(
            (
                key.rpartition(" hosts=")[0],
                f"{run['hosts']:,}",
                f"{run['p50']:.1f}",
                f"{run['p99']:.1f}",
                f"{run['origin_ratio']:.2f} ×",
                f"{run['limit']} {run['used'][run['limit']]:.0%}",
                f"{run['served_mean'] / 1e9:,.0f} / {run['served_max'] / 1e9:,.0f} GB",
                f"{run['uplinks']:,.0f} ×",
                f"{run['requests_a_second']:,.0f}",
                f"{run['took']:.0f}",
            )
        )
    return table(header, rows)


def markdown(runs: dict[str, dict[str, Any]]) -> str:
    """The table of docs/REGIONS.md."""
    rows = [
        "| size | region | tier | uplink Gbit/s | hosts | p50 s | p99 s | origin | busiest (over the time of the last) "
        "| GB that a server sent: mean / most | into racks |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs.values(), key=lambda run: run["hosts"]):
        if run["hosts"] == 1:
            continue
        tier = {"servers": "a", "hosts": "b"}[run["tier"]]
        cells = (
            f"{run['size'] / 1e9:g} GB",
            "cold" if run["cold"] else "warm",
            f"c over {tier}" if run["racks"] else tier,
            f"{run['uplink'] / GBIT:g}" if run["uplink"] else "∞",
            f"{run['hosts']:,}",
            f"{run['p50']:,.1f}",
            f"{run['p99']:,.1f}",
            f"{run['origin_ratio']:.2f} ×",
            f"{run['limit']} ({run['used'][run['limit']]:.0%})",
            f"{run['served_mean'] / 1e9:,.0f} / {run['served_max'] / 1e9:,.0f}",
            f"{run['uplinks']:,.0f} ×",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def numbers(text: str) -> list[int]:
    return [int(word.replace("_", "")) for word in text.split(",")]


def gigabytes(text: str) -> list[float]:
    return [float(word.lower().removesuffix("gb")) * 1e9 for word in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=numbers, default=[1, 10, 100, 1000, 10_000], metavar="N,N,…")
    parser.add_argument("--sizes", type=gigabytes, default=[16e9, 140e9], metavar="GB,GB")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no run after so many seconds")
    parser.add_argument("--result", default="fleet", help="the name of the file in bench/results")
    parser.add_argument("--again", action="store_true", help="do runs again that are in the results")
    parser.add_argument("--draw", action="store_true", help="write docs/figures/region-*.svg, and their table")
    options = parser.parse_args()
    runs = {} if options.again else kept(options.result)
    wanted = settings(options.hosts, options.sizes)
    missing = [setting for setting in wanted if setting.key not in runs]
    missing.sort(key=lambda setting: (setting.hosts, setting.cold, setting.uplink == 0))
    started = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        waiting = iter(missing)
        going: set[concurrent.futures.Future[tuple[str, dict[str, Any]]]] = set()
        while True:
            while len(going) < options.processes and time.monotonic() - started < options.limit:
                setting = next(waiting, None)
                if setting is None:
                    break
                going.add(pool.submit(simulate, setting))
            if not going:
                break
            ended, going = concurrent.futures.wait(going, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                key, found = future.result()
                runs[key] = found
                print(f"{key}: p50 {found['p50']:.1f} s, p99 {found['p99']:.1f} s ({found['took']:.0f} s)", flush=True)
                write_result(options.result, {"runs": runs})
    order = [setting.key for setting in settings(sorted({run["hosts"] for run in runs.values()}), options.sizes)]
    runs = {key: runs[key] for key in order if key in runs}
    print(shown(runs))
    if left := len([setting for setting in wanted if setting.key not in runs]):
        print(f"{left} of {len(wanted)} are still to be done: the same command goes on with them")
    if options.draw:
        CURVES.mkdir(exist_ok=True)
        for name, text in curves(runs).items():
            (CURVES / name).write_text(text)
            print(f"drawn: docs/figures/{name}")
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}{markdown(runs)}{END}{rest.partition(END)[2]}")
        print("written: the table of docs/REGIONS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
