"""bench/gpu_table.py: the table shows what gpu.json holds, also of a part that was cut off, and what was missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_table
from bench.gpu import PARTS
from bench.gpu_probe import COLD, WARM
from instantstart_fs.prefetch.backends.direct import CUDA_READERS, SLOTS
from instantstart_fs.prefetch.plan import EXTENT
from tests.harness import REPOSITORY

SPEED: dict[str, Any] = {
    "h2d_ceiling": 50.0,
    "samples": {
        "cold": {"ceiling disk ×8": [4.0, 5.0, 4.5], "direct": [4.4, 4.5, 4.6], "load_file": [1.0]},
        "warm": {"ceiling copy ×8": [40.0], "direct": [30.0], "mmap": [8.0]},
    },
    "problems": {"gds": "was refused: no nvidia-fs", "mmap": "RuntimeError: no memory"},
}
FOUND: dict[str, dict[str, Any]] = {
    "environment": {
        "device": "H", "memory_gib": 139.8, "torch": "2.11.0", "cuda": "13.0", "python": "3.12.3", "kernel": "6.18",
        "cores": 16, "filesystem": "ext4", "disk_free_gib": 60, "driver": "580.1", "link": "PCIe 5 ×16",
        "mig": "Enabled",
    },
    "checkpoint": {"bytes": 8_000_000_000, "shards": 32, "write_gb_s": 1.5},
    "gds probe": {"usable": True, "native": False, "reason": "no nvidia-fs"},
    "equality": {"equal_bytes": 8_000_000_000, "backend": "direct"},
    "speed": SPEED,
    "sweep": {"warm": {gpu_table.BUILT_IN: [10.0], "16 readers": [12.0]}, "cold": {},
              "refused": {"32 readers": "no memory", "64 readers": "no memory"}},
    "page-locking": {
        "memfd": [{"mib": 2, "lock_gb_s": 3.0, "h2d_gb_s": 50.0}, {"mib": 32, "refused": 2}], "part_seconds": 1.0,
    },
    "startup": {"torch": 2.0, "torch, context": 2.5, "torch, context, ring": 2.8, "driver, whole process": 0.4},
    "hand-over by share": {"peak_above_contexts": 8_100_000_000, "weights": 8_000_000_000},
    "hand-over by copy": {"peak_above_contexts": 8_400_000_000, "weights": 8_000_000_000},
    "hand-over to another numbering of devices": {"visible": "GPU-1", "number_there": 0},
    "mount": {
        "bytes": 8_000_000_000, "transport": "passthrough", "fill_gb_s": 2.0,
        "problems": {"prefetch, mount, cold": "it"},
        "samples": {"load_file, plain, cold": [{"load": 4.0, "whole": 6.0}],
                    "load_file, mount, cold": [{"load": 5.0, "whole": 7.0}],
                    gpu_table.HELD: [{"load": 0.2, "whole": 3.0}]},
    },
    "killed while loading": {"said_after": 0.1, "freed_after": 0.2},
    "killed when loaded": {"said_after": 0.1, "freed_after": 0.2},
    "killed while another has it open": {"said_after": 0.1, "freed_after": 0.2, "late_close": "harmless"},
    "receiver killed": {"file_freed_after": 0.1, "freed_after": 0.2},
    "owner killed": {"freed_after": 0.2},
    "too big": {"said": ["a budget", "a full device"]},
    "lying header": {"said": "cut short"},
    "several devices": {"loading": {"cuda:0": 1.0, "cuda:1": 2.0}, "bytes": {"cuda:0": 4e9, "cuda:1": 4e9}},
    "peers": {"copies_gb_s": {"0→1": 100.0}, "taken_on_the_owner": 0, "opened_on": 0},
    "two releases of torch": {"here": "2.11.0", "there": "2.13.0", "given": "opened, equal", "taken": "opened, equal"},
    "rivals": {"samples": {"cold": {"direct": [4.0], "instanttensor": [4.5], "runai streamer": [0.002]},
                           "warm": {"direct": [9.0]}}},
}  # fmt: skip


@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_every_part_of_the_bench_has_rows_and_half_of_it_never_ends_the_table(part: str) -> None:
    whole = gpu_table.rows(part, FOUND[part])
    assert whole and all(name and value for name, value in whole), whole
    for count in range(len(FOUND[part])):
        half = {**dict(list(FOUND[part].items())[:count]), "failed": "it was late"}
        assert len(gpu_table.rows(part, half)) <= len(whole)


def test_speed_is_judged_against_what_bounds_it() -> None:
    found = dict(gpu_table.rows("speed", SPEED))
    assert found["cold direct"] == "4.50 GB/s (4.40–4.60, 3 rounds)"
    assert found["cold direct ÷ min(disk, host to device)"] == "1.00, the target of 0.9 is met"
    assert found["warm direct ÷ min(copy in memory, host to device)"] == "0.75, the target of 0.9 is MISSED"
    assert found["not measured: mmap"] == "RuntimeError: no memory" and "not measured: gds" not in found


def test_the_fastest_setting_is_beside_the_one_that_is_built_in() -> None:
    (warm, refused) = gpu_table.rows("sweep", FOUND["sweep"])
    assert warm == (
        "fastest of 2 settings, warm",
        f"12.00 GB/s: 16 readers; built in ({gpu_table.BUILT_IN}): 10.00 GB/s",
    )
    assert refused == ("refused: 2 settings", "32 readers, …: no memory")
    settings = [
        f"{readers} readers, {extent} MiB, {slots} buffers each" for readers, extent, slots in (WARM[0], COLD[0])
    ]
    built_in = f"{CUDA_READERS} readers, {EXTENT >> 20} MiB, {SLOTS} buffers each"
    assert {gpu_table.BUILT_IN} == {*settings, built_in}


def test_a_rival_that_hardly_moves_is_compared_all_the_same() -> None:
    assert dict(gpu_table.rows("rivals", FOUND["rivals"]))["cold direct ÷ runai streamer"].startswith("2000.00")


def test_what_was_missed_is_listed_again_with_its_part() -> None:
    text = "\n".join(gpu_table.lines({"parts": FOUND, "not_run": ["peers: there is one GPU"], "failed": []}))
    missed = text.partition("targets missed:\n")[2].partition("not run:")[0]
    assert [line.split(": ")[0].strip() for line in missed.splitlines()] == ["speed", "mount", "rivals"], missed
    assert text.endswith("not run:\n  peers: there is one GPU\nfailed: nothing")


@pytest.mark.parametrize(("seconds", "word"), [(0.27, "met"), (0.29, "MISSED")])
def test_taking_over_what_is_held_is_judged_by_its_bytes(seconds: float, word: str) -> None:
    part = {**FOUND["mount"], "samples": {gpu_table.HELD: [{"load": seconds, "whole": 3.0}]}}
    assert dict(gpu_table.rows("mount", part))[f"{gpu_table.HELD}: seconds"].endswith(f"is {word}")


def test_the_table_of_a_run_that_was_killed_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": FOUND}))
    done = subprocess.run(
        [sys.executable, "bench/gpu_table.py", tmp_path / "gpu.json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == gpu_table.lines({"parts": FOUND})


def test_a_part_that_was_cut_off_shows_its_figures() -> None:
    half = {"samples": {"cold": {"direct": [4.0]}, "warm": {}}, "failed": "speed: not within 55 s"}
    assert gpu_table.rows("speed", half) == [("cold direct", "4.00 GB/s (4.00–4.00, 1 round)")]
