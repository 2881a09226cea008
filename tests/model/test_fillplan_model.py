"""FillPlan against generated histories: its invariants after every step, and that everything asked for comes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from instantstart_fs.core.chunks import ChunkMap
from instantstart_fs.core.fillplan import FillPlan
from instantstart_fs.core.fillqueue import SLOW_RATE, SLOW_SECONDS

# Small alphabets, so that things collide.
FILES = ("a", "b", "c", "d")
PIPELINE = {"a": "p", "b": "p", "c": "q", "d": "q"}
ORIGINS = ("o", "x")
CHUNKS = 5
CONNECTIONS = 3
HEADROOM = 2
CEILING = CONNECTIONS + HEADROOM
LANE = CEILING - HEADROOM // 2
"""What one pipeline may have in flight at one origin."""


class PlanMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.plan: FillPlan[str] = FillPlan(CONNECTIONS, HEADROOM)
        self.now = 0.0
        self.present: dict[str, ChunkMap] = {}
        self.origin: dict[str, str] = {}
        self.flying: dict[tuple[str, int], str] = {}
        self.demands: set[tuple[str, int]] = set()
        """Those in flight that were sent as demands."""
        self.since: dict[tuple[str, int], float] = {}
        """From when on it brings too little."""
        self.suspect: set[str] = set()
        self.wanted: set[tuple[str, int]] = set()
        """Each chunk that somebody waits for, whatever became of the requests for it."""
        self.whole: set[str] = set()
        self.background: dict[str, list[str]] = {"p": [], "q": []}
        self.held: dict[str, float] = {}
        self.origin_held = dict.fromkeys(ORIGINS, 0.0)
        self.limit: dict[str, int | None] = dict.fromkeys(ORIGINS)
        self.lane_limit: dict[tuple[str, str], int | None] = {}

    # -- what the reference derives --------------------------------------------------------------------------------

    def in_lane(self, origin: str, pipeline: str) -> list[tuple[str, int]]:
        return [item for item, sent in self.flying.items() if sent == origin and PIPELINE[item[0]] == pipeline]

    def of_file(self, file: str) -> list[tuple[str, int]]:
        return [item for item in self.flying if item[0] == file]

    def lane_room(self, origin: str, pipeline: str) -> bool:
        limit = self.lane_limit.get((origin, pipeline))
        return len(self.in_lane(origin, pipeline)) < (LANE if limit is None else min(LANE, limit))

    def free(self, file: str) -> bool:
        """Whether nothing about this file keeps it from being asked for."""
        return self.held.get(file, 0.0) <= self.now and not (file in self.suspect and self.of_file(file))

    def waiting(self, origin: str) -> list[tuple[str, int]]:
        """Demands of this origin that could be sent if there were room."""
        missing = self.wanted - self.flying.keys()
        return [item for item in missing if self.origin[item[0]] == origin and self.free(item[0])]

    @initialize()
    def first(self) -> None:
        self.add("a", "o")

    @rule(file=st.sampled_from(FILES), origin=st.sampled_from(ORIGINS))
    def add(self, file: str, origin: str) -> None:
        if file not in self.present:
            self.present[file] = ChunkMap(CHUNKS, 1)
            self.origin[file] = origin
        self.plan.add(file, PIPELINE[file], origin, self.present[file])

    @rule(file=st.sampled_from(FILES), chunk=st.integers(0, CHUNKS - 1))
    def demand(self, file: str, chunk: int) -> None:
        if file in self.present:
            self.plan.demand(file, [chunk])
            if chunk not in self.present[file]:
                self.wanted.add((file, chunk))

    @rule(file=st.sampled_from(FILES))
    def rush(self, file: str) -> None:
        """Everybody at once: what comes of it is beyond all limits but for those that the plan keeps."""
        if file in self.present:
            for chunk in range(CHUNKS):
                self.demand(file, chunk)
            self.step(True)

    @rule(file=st.sampled_from(FILES), chunk=st.integers(0, CHUNKS - 1))
    def undemand(self, file: str, chunk: int) -> None:
        self.plan.undemand(file, [chunk])
        self.wanted.discard((file, chunk))

    @rule(file=st.sampled_from(FILES))
    def demand_whole(self, file: str) -> None:
        if file in self.present:
            self.plan.demand_whole(file)
            self.whole.add(file)
            if file not in self.background[PIPELINE[file]]:
                self.background[PIPELINE[file]].append(file)

    @rule(file=st.sampled_from(FILES))
    def undemand_whole(self, file: str) -> None:
        self.plan.undemand_whole(file)
        self.whole.discard(file)

    @rule(pipeline=st.sampled_from(("p", "q")), files=st.permutations(FILES), count=st.integers(0, 4))
    def fill_more(self, pipeline: str, files: list[str], count: int) -> None:
        chosen = [file for file in files[:count] if PIPELINE[file] == pipeline and file in self.present]
        self.background[pipeline] += [file for file in chosen if file not in self.background[pipeline]]
        self.plan.append_background(pipeline, chosen)

    @rule(pipeline=st.sampled_from(("p", "q")), files=st.permutations(FILES), count=st.integers(0, 4))
    def fill(self, pipeline: str, files: list[str], count: int) -> None:
        chosen = [file for file in files[:count] if PIPELINE[file] == pipeline and file in self.present]
        kept = [file for file in sorted(self.whole) if PIPELINE[file] == pipeline and file not in chosen]
        self.background[pipeline] = chosen + kept
        self.plan.set_background(pipeline, chosen)

    @rule(file=st.sampled_from(FILES))
    def fill_one(self, file: str) -> None:
        if file in self.present:
            self.plan.add_background(file)
            if file not in self.background[PIPELINE[file]]:
                self.background[PIPELINE[file]].append(file)

    @rule(file=st.sampled_from(FILES), origin=st.sampled_from(ORIGINS))
    def move(self, file: str, origin: str) -> None:
        if file in self.present:
            self.origin[file] = origin
            self.suspect.discard(file)
            self.plan.move(file, origin)

    @rule(file=st.sampled_from(FILES))
    def remove(self, file: str) -> None:
        self.plan.remove(file)
        self.present.pop(file, None)
        self.held.pop(file, None)
        self.whole.discard(file)
        self.suspect.discard(file)
        self.wanted = {item for item in self.wanted if item[0] != file}
        self.flying = {item: origin for item, origin in self.flying.items() if item[0] != file}
        for files in self.background.values():
            if file in files:
                files.remove(file)

    @rule(origin=st.sampled_from(ORIGINS), limit=st.sampled_from((None, 0, 1)))
    def breaker(self, origin: str, limit: int | None) -> None:
        self.limit[origin] = limit
        self.plan.set_limit(origin, limit)

    @rule(origin=st.sampled_from(ORIGINS), pipeline=st.sampled_from(("p", "q")), limit=st.sampled_from((None, 0, 1)))
    def breaker_of_one(self, origin: str, pipeline: str, limit: int | None) -> None:
        self.lane_limit[origin, pipeline] = limit
        self.plan.set_limit(origin, limit, pipeline)

    @rule(origin=st.sampled_from(ORIGINS), seconds=st.integers(0, 3))
    def throttle(self, origin: str, seconds: int) -> None:
        self.origin_held[origin] = max(self.origin_held[origin], self.now + seconds)
        self.plan.hold_origin(origin, self.now + seconds)

    @rule(seconds=st.sampled_from((0, 1, 2, 4, 50)))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule(background=st.booleans())
    def step(self, background: bool) -> None:
        requests = self.plan.next_requests(self.now, background=background)
        for request in requests:
            item = (request.key, request.chunk)
            origin = self.origin[request.key]
            assert item not in self.flying, "single-flight"
            assert request.chunk not in self.present[request.key], "never what is present"
            assert self.free(request.key), "never while held, and one at a time of what is suspect"
            assert self.origin_held[origin] <= self.now
            in_use = sum(1 for other in self.flying.values() if other == origin)
            pipeline = PIPELINE[request.key]
            assert in_use < CEILING and self.lane_room(origin, pipeline)
            if request.demand:
                assert item in self.wanted, "only what somebody asked for"
            else:
                assert item not in self.wanted, "what somebody waits for is asked for as a demand"
                assert background and request.key in self.background[pipeline]
                others = [other for other, sent in self.flying.items() if sent == origin and other not in self.demands]
                assert len(others) < CONNECTIONS
                first = not self.in_lane(origin, pipeline)
                assert first or in_use < CONNECTIONS
                for waiting in self.waiting(origin):
                    lane = PIPELINE[waiting[0]]
                    served = [other for other in self.in_lane(origin, lane) if other in self.demands]
                    assert not self.lane_room(origin, lane) or (first and served), "demand goes ahead"
            limit = self.limit[origin]
            assert limit is None or in_use < limit
            self.flying[item] = origin
            self.since[item] = self.now
            if request.demand:
                self.demands.add(item)
        self.check_nothing_left(background)

    def check_nothing_left(self, background: bool) -> None:
        """Whatever may be sent was sent: no lost wakeup."""
        for origin in ORIGINS:
            if self.origin_held[origin] > self.now:
                continue
            in_use = sum(1 for other in self.flying.values() if other == origin)
            limit = self.limit[origin]
            room = limit is None or in_use < limit
            if room and in_use < CEILING:
                assert not [item for item in self.waiting(origin) if self.lane_room(origin, PIPELINE[item[0]])]
            if room and background and in_use < CONNECTIONS:
                for file in self.present:
                    pipeline = PIPELINE[file]
                    if self.origin[file] == origin and self.free(file) and file in self.background[pipeline]:
                        for chunk in self.present[file].missing():
                            assert (file, chunk) in self.flying or not self.lane_room(origin, pipeline)

    @rule(data=st.data(), count=st.sampled_from((1, 1 << 20)))
    @precondition(lambda self: self.flying)
    def progress(self, data: st.DataObject, count: int) -> None:
        item = data.draw(st.sampled_from(sorted(self.flying)))
        self.plan.progressed(*item, count, self.now)
        if count >= SLOW_RATE * (self.now - self.since[item]):
            self.since[item] = self.now

    @rule()
    def give_way(self) -> None:
        """Slow requests make room, and exactly where they have to."""
        self.step(True)
        lanes = {(origin, pipeline): self.in_lane(origin, pipeline) for origin in ORIGINS for pipeline in ("p", "q")}
        starving = {
            (origin, pipeline)
            for origin, pipeline in lanes
            if self.origin_held[origin] <= self.now
            and self.limit[origin] is None
            and self.lane_limit.get((origin, pipeline)) is None
            and not lanes[origin, pipeline]
            and (
                any(PIPELINE[file] == pipeline for file, _ in self.waiting(origin))
                or any(
                    self.origin[file] == origin and self.free(file) and not self.present[file].complete
                    for file in self.background[pipeline]
                )
            )
        }
        share = CEILING // 2
        stopped = self.plan.preempt(self.now)
        for request in stopped:
            item = (request.key, request.chunk)
            origin, pipeline = self.flying.pop(item), PIPELINE[request.key]
            assert self.now - self.since[item] >= SLOW_SECONDS, "only what is slow"
            other = "q" if pipeline == "p" else "p"
            among = [file for file in self.present if PIPELINE[file] == pipeline and file != request.key]
            hungry = any(not self.of_file(file) and file in {key for key, _ in self.waiting(origin)} for file in among)
            assert (origin, other) in starving or self.waiting(origin) or hungry, "only where somebody waits"
            self.suspect.add(request.key)
            self.demands.discard(item)
        self.step(True)
        for origin, pipeline in starving:
            other = "q" if pipeline == "p" else "p"
            if self.in_lane(origin, pipeline):
                continue
            patient = [
                item
                for item in self.in_lane(origin, other)
                if self.now - self.since[item] >= 40.0  # longer than anybody's patience
            ]
            assert len(self.in_lane(origin, other)) <= share or not patient, "a fair share"

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.flying)))
        del self.flying[item]
        self.demands.discard(item)
        self.suspect.discard(item[0])
        self.wanted.discard(item)
        self.present[item[0]].add(item[1])
        self.plan.arrived(*item)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), seconds=st.integers(0, 3), suspect=st.booleans())
    def fail(self, data: st.DataObject, seconds: int, suspect: bool) -> None:
        item = data.draw(st.sampled_from(sorted(self.flying)))
        del self.flying[item]
        self.demands.discard(item)
        if suspect:
            self.suspect.add(item[0])
        until = self.now + seconds if seconds else 0.0
        self.plan.failed(*item, held_until=until, suspect=suspect)
        self.held[item[0]] = max(self.held.get(item[0], 0.0), until)

    @rule(file=st.sampled_from(FILES))
    def release(self, file: str) -> None:
        self.plan.release(file)
        self.held.pop(file, None)

    @rule(file=st.sampled_from(FILES), chunk=st.integers(0, CHUNKS - 1))
    def lose(self, file: str, chunk: int) -> None:
        if file in self.present:
            self.present[file].discard(chunk)
            self.plan.refill(file)

    @invariant()
    def counts_agree(self) -> None:
        for origin in ORIGINS:
            assert self.plan.in_flight(origin) == sum(1 for other in self.flying.values() if other == origin)

    def teardown(self) -> None:
        """With nothing in the way, everything wanted comes in the end."""
        for origin in ORIGINS:
            self.plan.set_limit(origin, None)
            for pipeline in ("p", "q"):
                self.plan.set_limit(origin, None, pipeline)
        for item in list(self.flying):
            self.plan.failed(*item)
        self.flying.clear()
        self.now += 1000.0
        for _ in range(200):
            requests = self.plan.next_requests(self.now)
            if not requests:
                break
            for request in requests:
                self.present[request.key].add(request.chunk)
                self.plan.arrived(request.key, request.chunk)
                self.wanted.discard((request.key, request.chunk))
        assert not self.wanted
        for files in self.background.values():
            assert all(self.present[file].complete for file in files)
        assert self.plan.next_time(self.now) is None


TestFillPlan = PlanMachine.TestCase
TestFillPlan.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
