"""The page over a made-up library, on a real socket: for its tests, and to look at it.

python -m tests.component.site 9850     serves it until it is ended
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import trio

from instantstart_fs.config import HttpConfig
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.eviction import Budget, Candidate
from instantstart_fs.core.sight import EVERYTHING, Sight
from instantstart_fs.core.status import ErrorStatus, FileStatus, FillStatus, ListedStatus, PipelineState, PipelineStatus
from instantstart_fs.errors import PipelineNotFound
from instantstart_fs.filler.events import FillStatistics
from instantstart_fs.library import Library
from instantstart_fs.telemetry.telemetry import Totals
from instantstart_fs.views.store_summary import RegionSummary, StoreSummary, StoreSummaryBuilder
from instantstart_fs.web.app import Site
from instantstart_fs.web.health import HealthProbe
from instantstart_fs.web.listener import address, bind
from instantstart_fs.web.server import serve
from instantstart_fs.web.visitors import Visitors

GB = 1_000_000_000


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def pipeline(name: str, state: PipelineState = "cold", **changes: Any) -> PipelineStatus:
    now = time.time()
    given: dict[str, Any] = {
        "pipeline": name,
        "state": state,
        "cached_bytes": 0,
        "total_bytes": 16 * GB,
        "source": (f"hf://org/{name}@main",),
        "generation": 1,
        "revision": "8b3219a",
        "last_request": rfc3339(now - 600),
        "hot_until": rfc3339(now + 47 * 3600),
        "pinned": False,
        "leases": 0,
        "fill": None,
        "error": None,
    }
    return PipelineStatus(**{**given, **changes})


class FakeTelemetry:
    def __init__(self) -> None:
        self.totals = Totals()
        self.records: list[ColdStart] = []

    def cold_starts(self, name: str) -> list[ColdStart]:
        return [record for record in self.records if record.pipeline == name]


class FakePipelines(dict[str, PipelineStatus]):
    """``hidden``: which of them only administrators see."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[str] = set()

    def shown_to(self, name: str, sight: Sight) -> bool:
        return name in self and (sight.everything or name not in self.hidden)

    def status(self, name: str, *, with_files: bool = True) -> PipelineStatus:
        files = (
            FileStatus("config.json", "sealed", 700, 700, None),
            FileStatus("model-00001-of-00002.safetensors", "filling", 5 * GB, 3 * GB, "sha256:ab"),
            FileStatus("onnx/model.onnx", "absent", 9 * GB, 0, None, left_out="for another runtime"),
        )
        if name not in self:
            raise PipelineNotFound(name)
        return msgspec.structs.replace(self[name], files=files if with_files else None, listed=ListedStatus(3, 14 * GB))

    async def ensure_loaded(self, name: str) -> None:
        pass


class FakeAdministration:
    async def used_by(self, name: str) -> list[str]:
        return ["lease: pid 7 (vllm, uid 1000)"]


class FakeFiller:
    def statistics(self) -> FillStatistics:
        return FillStatistics(2, 0, 0, 0, 0, 0, 0, 0, 0, False, (), ())


class FakeLibrary:
    """What the site asks of a Library. Change ``pipelines`` without a lock: one thread looks at a time."""

    def __init__(self) -> None:
        self.pipelines = FakePipelines()
        self.telemetry = FakeTelemetry()
        self.filler = FakeFiller()
        self.snapshots = self
        self.admin = FakeAdministration()
        self.heartbeats: Any = None
        self.region: RegionSummary | None = None
        self.looks = 0

    async def store_summary(self) -> StoreSummary:
        self.looks += 1
        builder = StoreSummaryBuilder(Budget(400 * GB, 0.85, 0.95), time.time_ns())
        for found in list(self.pipelines.values()):
            builder.add(found, Candidate(found.pipeline, found.cached_bytes, 0.0, hot=found.state == "warm"))
            if builder.wants_a_pause:
                await trio.lowlevel.checkpoint()
        return builder.build(self.telemetry.records, region=self.region)

    async def prove_index_writable(self) -> None:
        pass


class Served:
    def __init__(self, library: FakeLibrary, url: str) -> None:
        self.library = library
        self.url = url
        self.longest_gap = 0.0
        """Seconds for which the loop did not turn, at most: what a mount would have noticed."""


@contextlib.contextmanager
def serving(
    config: HttpConfig | None = None, *, mount: str = "/", sight: Sight = EVERYTHING, uids: bool = False
) -> Iterator[Served]:
    """A site on a loop of its own. ``sight``: of every caller, but for root's where ``uids`` are looked at."""
    config = config or HttpConfig(port=0)
    library = FakeLibrary()
    listener = bind(config.host, config.port or 0)
    served = Served(library, address(listener))
    token: list[trio.lowlevel.TrioToken] = []
    scope = trio.CancelScope()
    started = threading.Event()

    async def watch_the_loop() -> None:
        while True:
            before = trio.current_time()
            await trio.sleep(0.005)
            served.longest_gap = max(served.longest_gap, trio.current_time() - before - 0.005)

    async def main() -> None:
        info = DaemonInfo("0", 1, "/models", "/store", 1.0, 1, True)
        health = HealthProbe(mount, library.prove_index_writable, library.filler.statistics)
        known = {0: EVERYTHING} if uids else {}
        visitors = Visitors(config, lambda uid, _: known.get(uid, sight) if uid is not None else sight)
        site = Site(cast(Library, library), lambda: info, config, health, visitors)
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_the_loop)
                nursery.start_soon(serve, site.app(), [listener], visitors.identify)
                started.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(20)
    try:
        yield served
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join(10)
        assert not thread.is_alive(), "the server does not end"


def fill_with_examples(library: FakeLibrary) -> None:
    now = time.time()
    for found in (
        pipeline("llama-3.1-8b-instruct", "warm", cached_bytes=16 * GB, leases=2, last_request=rfc3339(now - 20)),
        pipeline(
            "voice-agent", "filling", cached_bytes=int(6.2 * GB), total_bytes=10 * GB, fill=FillStatus(840_000_000, 5)
        ),
        pipeline("qwen3-30b-a3b", "warm", cached_bytes=61 * GB, total_bytes=61 * GB, pinned=True),
        pipeline(
            "whisper-large-v3", "unverified", cached_bytes=3 * GB, total_bytes=3 * GB, last_request=rfc3339(now - 9000)
        ),
        pipeline(
            "mixtral-8x22b-v0.1",
            "partial",
            cached_bytes=100 * GB,
            total_bytes=281 * GB,
            last_request=None,
            hot_until=None,
        ),
        pipeline("gated-model", "error", error=ErrorStatus("access-refused", "401 for org/gated", rfc3339(now - 60))),
        pipeline("flux-dev", "cold", total_bytes=24 * GB, last_request=None, hot_until=None),
    ):
        library.pipelines[found.pipeline] = found
    second = 1_000_000_000
    at = time.time_ns()
    library.telemetry.records = [
        ColdStart(
            pipeline="voice-agent", started_ns=at - 8 * second, state="cold", fetched_bytes=int(6.2 * GB), opened_files=3,
            weight_files=4, opened_after=4.0, sealed_after=5.5, read_after=7.9, requested_ns=at - 12 * second, waits=400,
            slowest_wait=0.9,
        ),
        ColdStart(
            pipeline="llama-3.1-8b-instruct", started_ns=at - 300 * second, state="warm", staged_bytes=16 * GB,
            passthrough_bytes=16 * GB, opened_after=4.1, staged_after=5.6, read_after=1.0, ended_after=6.0,
            requested_ns=at - 303 * second, ready_ns=at - 288 * second, first_token_ns=at - 287 * second,
        ),
        ColdStart(
            pipeline="qwen3-30b-a3b", started_ns=at - 4000 * second, state="cold", fetched_bytes=61 * GB, opened_after=49.0,
            sealed_after=52.0, read_after=58.0, ended_after=60.0, requested_ns=at - 4009 * second,
            ready_ns=at - 3925 * second, first_token_ns=at - 3923 * second, waits=7000, slowest_wait=2.25,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    with serving(HttpConfig(port=int(sys.argv[1]))) as example:
        fill_with_examples(example.library)
        print(example.url, flush=True)
        while True:
            time.sleep(1)
