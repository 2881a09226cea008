"""Every metric is documented, rendered, bounded, and used rightly by the alerts and the dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from instantstart_fs import metrics
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.eviction import Budget
from instantstart_fs.core.histogram import Histogram
from instantstart_fs.core.status import FillStatus, PipelineStatus, TierStatus
from instantstart_fs.filler.events import BreakerState, FillStatistics, RackStatistics, RegionStatistics
from instantstart_fs.filler.tally import ANSWER_BUCKETS
from instantstart_fs.telemetry.telemetry import Totals
from instantstart_fs.views.store_summary import RegionSummary, ScrubSummary, StoreSummary

DOCS = Path(__file__).resolve().parents[2] / "docs"


def status(number: int, **changes: Any) -> PipelineStatus:
    given: dict[str, Any] = {
        "pipeline": f"p{number:05}",
        "state": "filling",
        "cached_bytes": number,
        "total_bytes": 100_000,
        "source": ("hf://o/r",),
        "generation": 1,
        "revision": "",
        "last_request": f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}Z",
        "hot_until": None,
        "pinned": False,
        "leases": 0,
        "fill": FillStatus(7, None),
        "error": None,
    }
    return PipelineStatus(**{**given, **changes})


def answered(seconds: float) -> Histogram:
    found = Histogram(ANSWER_BUCKETS)
    found.observe(seconds)
    return found


def source(*, pipelines: int = 3, origins: int = 2, per_pipeline: int = 200) -> metrics.Source:
    totals = Totals()
    totals.opens["passthrough"] = 2
    totals.reads, totals.read_bytes = 5, 4096
    totals.waits.observe(0.2)
    totals.waits.observe(70)
    last = f"p{max(pipelines - 1, 0):05}"
    totals.cold_start_ended(ColdStart(pipeline=last, started_ns=1, state="cold", opened_after=3.0, ended_after=3.0))
    totals.errors["read", "read-deadline"] = 1
    totals.files_completed["sealed"] = 4
    totals.fill_failures["access-refused"] = 1
    totals.cold_starts["cold"] = 1
    totals.damaged["scrub"] = 2
    totals.weight_opens["hit"] = 3
    totals.served["passed"] = 100
    fills = FillStatistics(
        workers=2,
        worker_deaths=0,
        files=1,
        in_flight=3,
        queued=4,
        retries=5,
        fetched_bytes=6,
        commits=7,
        poisoned=1,
        index_stuck=False,
        region=RegionStatistics(
            taken_bytes=8,
            put_bytes=9,
            claims_won=1,
            fallbacks=(("wrong", 1),),
            left_alone=(("weights", False), ("weights-far", True)),
            rack=RackStatistics("r17", 2, 5, 6, (("busy", 1),), (("ticket", 2),)),
        ),
        fetched_from=tuple((f"s3://h{number:03}", 1) for number in range(origins)),
        retried=tuple(((f"s3://h{number:03}", "origin-throttled"), 2) for number in range(origins)),
        answers=tuple((f"s3://h{number:03}", answered(0.3)) for number in range(origins)),
        origins=(BreakerState("s3://h000 as a1b2", "closed", 0), BreakerState("s3://h000 as c3d4", "open", 0)),
    )
    found = tuple(status(number) for number in range(pipelines))
    store_summary = StoreSummary(
        at_ns=1,
        budget=Budget(1000, 0.85, 0.95),
        used_bytes=10,
        evictable_bytes=5,
        states={"filling": pipelines},
        silent=1,
        nodes=9,
        pipelines=found,
        scrub=ScrubSummary(overdue=5.0, resting=True),
        access={"allowed": 3, "refused": 1, "unknown": 0},
        region=RegionSummary("s3://weights", TierStatus("ok", None), 3, RegionStatistics()),
        cold_starts=(ColdStart(pipeline="p00000", started_ns=1, state="cold", opened_after=2.5, ended_after=3.0),),
    )
    return metrics.Source("1", 2.0, totals, fills, store_summary, True, per_pipeline, {"read": 5})


def samples(given: metrics.Source) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render(given).decode())
        for sample in family.samples
    }


def test_the_document_says_what_the_code_says() -> None:
    assert metrics.table() in (DOCS / "METRICS.md").read_text(), "run python -m instantstart_fs.metrics"


def test_every_metric_is_rendered_with_its_help_and_its_labels() -> None:
    text = metrics.render(source()).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    families = {name: family for name, family in found.items() if not name.startswith("process_")}
    for name in ("cpu_seconds", "resident_memory_bytes", "open_fds", "max_fds", "start_time_seconds"):
        assert found[f"process_{name}"].samples
    assert len(families) == len(metrics.DEFINITIONS)
    for definition in metrics.DEFINITIONS:
        family = families[definition.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (definition.kind, definition.help)
        assert family.samples, definition.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(definition.labels)


def test_names_follow_prometheus_rules() -> None:
    for definition in metrics.DEFINITIONS:
        assert re.fullmatch(r"instantstart_[a-z_]+", definition.name)
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        if definition.unit == "bytes":
            assert "_bytes" in definition.name
        if definition.unit.startswith("seconds"):
            assert "_seconds" in definition.name
    assert len({definition.name for definition in metrics.DEFINITIONS}) == len(metrics.DEFINITIONS)


def test_values() -> None:
    found = samples(source())
    assert found["instantstart_opens_total", (("mode", "passthrough"),)] == 2
    assert found["instantstart_read_wait_seconds_bucket", (("le", "0.5"),)] == 1
    assert found["instantstart_read_wait_seconds_bucket", (("le", "60"),)] == 1
    assert found["instantstart_read_wait_seconds_bucket", (("le", "+Inf"),)] == 2
    assert found["instantstart_read_wait_seconds_sum", ()] == pytest.approx(70.2)
    assert found["instantstart_store_high_watermark_bytes", ()] == 950
    assert found["instantstart_damaged_files_total", (("found_by", "scrub"),)] == 2
    assert found["instantstart_damaged_files_total", (("found_by", "open"),)] == 0
    assert found["instantstart_scrub_overdue_seconds", ()] == 5
    assert found["instantstart_pipelines_access", (("verdict", "refused"),)] == 1
    assert found["instantstart_access_checks_total", (("outcome", "unknown"),)] == 0
    assert found["instantstart_pipelines", (("state", "warm"),)] == 0
    assert found["instantstart_pipeline_last_cold_start_seconds", (("pipeline", "p00000"),)] == 2.5
    assert found["instantstart_weight_opens_total", (("result", "miss"),)] == 0
    assert found["instantstart_served_bytes_total", (("source", "passed"),)] == 100
    throttled = (("code", "origin-throttled"), ("origin", "s3://h000"))
    assert found["instantstart_fetch_retries_total", throttled] == 2
    assert found["instantstart_origin_answer_seconds_bucket", (("le", "0.5"), ("origin", "s3://h000"))] == 1
    # Two credentials at one endpoint are one origin here, the worse one shown, and no fingerprint leaves.
    assert found["instantstart_origin_breaker_state", (("origin", "s3://h000"),)] == 2


def test_labels_are_bounded() -> None:
    found = samples(source(pipelines=3000, origins=100, per_pipeline=50))
    shown = {dict(labels)["pipeline"] for _, labels in found if "pipeline" in dict(labels)}
    assert shown == {f"p{number:05}" for number in range(2950, 3000)}, "not the 50 that were requested last"
    fetched = {dict(labels)["origin"]: value for (name, labels), value in found.items() if "fetched" in name}
    assert len(fetched) == metrics.ORIGINS + 1
    assert fetched["other"] == 100 - metrics.ORIGINS
    for name in ("instantstart_fetch_retries_total", "instantstart_origin_answer_seconds_count"):
        counts = {dict(labels)["origin"]: value for (found_name, labels), value in found.items() if found_name == name}
        assert len(counts) == metrics.ORIGINS + 1
        assert sum(counts.values()) == (200 if "retries" in name else 100)


def test_who_does_not_see_everything_is_told_of_the_daemon_and_of_what_he_sees() -> None:
    """No count over all pipelines, from which one could subtract those that one knows; no origin's name."""
    told = samples(msgspec.structs.replace(source(pipelines=1), everything=False))
    names = {re.sub("_(total|bucket|count|sum)$", "", name) for name, _ in told if not name.startswith("process_")}
    by_pipeline = {it.name for it in metrics.DEFINITIONS if "pipeline" in it.labels}
    mine = {f"instantstart_{name}" for name in ("info", "uptime_seconds", "healthy", "pipelines")}
    assert names == by_pipeline | mine
    assert not any("origin" in dict(labels) for _, labels in told)


def test_hostile_names_stay_inside_their_label() -> None:
    hostile = status(1, pipeline='a"} 1\nevil{x="')
    given = source()

    store_summary = msgspec.structs.replace(given.store_summary, pipelines=(hostile,))
    found = samples(msgspec.structs.replace(given, store_summary=store_summary))
    assert ("instantstart_pipeline_cached_bytes", (("pipeline", 'a"} 1\nevil{x="'),)) in found
    assert not any(name == "evil" for name, _ in found)


# -- what the documents do with them -----------------------------------------------------------------------------------


def known_names() -> set[str]:
    names = {"process_cpu_seconds_total", "process_open_fds", "process_max_fds"}
    for definition in metrics.DEFINITIONS:
        names.add(definition.name)
        if definition.kind == "histogram":
            names |= {f"{definition.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return names


def used_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:instantstart|process)_\w+", expression))


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((DOCS / "alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_alerts_use_known_metrics_and_are_explained() -> None:
    operations = (DOCS / "OPERATIONS.md").read_text()
    found = rules()
    assert len(found) >= 6
    for rule in found:
        assert used_names(rule["expr"]), rule
        assert used_names(rule["expr"]) <= known_names(), rule["alert"]
        assert {"summary", "description"} <= set(rule["annotations"])
        assert rule["labels"]["severity"] in ("page", "ticket")
    alerts = [rule["alert"] for rule in found]
    assert re.findall("^### (InstantStart.*)$", operations, re.MULTILINE) == alerts, (
        "one section for each, in that order"
    )
    tried = (DOCS / "alerts.test.yml").read_text()
    assert [alert for alert in alerts if not re.search(rf"\b{alert}\b", tried)] == []


def test_the_dashboard_uses_known_metrics() -> None:
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 10
    for expression in expressions:
        assert used_names(expression), expression
        assert used_names(expression) <= known_names(), expression


def test_promtool_takes_the_alerts(tmp_path: Path) -> None:
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: prometheus)")
    done = subprocess.run(
        [promtool, "check", "rules", str(DOCS / "alerts.yml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scraped = subprocess.run(
        [promtool, "check", "metrics"],
        input=metrics.render(source()).decode(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert scraped.returncode == 0, scraped.stdout + scraped.stderr
    tests = subprocess.run(
        [promtool, "test", "rules", str(DOCS / "alerts.test.yml")], capture_output=True, text=True, timeout=60
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
