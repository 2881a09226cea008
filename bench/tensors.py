"""Processor time of what the stager does for each shard and each tensor: reading headers, and making tensors of bytes.

    python -m bench.tensors [--tensors 16384] [--rounds 9]

No weights are read: the files are sparse. Interleaved rounds of 1, 4 and 16 shards; microseconds of processor time for
each tensor, medians. "slices" makes the same tensors by a slice and two views each, which is the plain way.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common
from instantstart_fs.prefetch.layout import FileLayout, read_layout, torch_dtypes
from instantstart_fs.prefetch.tensors import views

SHARDS = (1, 4, 16)


def make(path: Path, tensors: int) -> None:
    """A sparse safetensors file of matrices of 8 KiB."""
    entries = {
        f"model.layers.{number // 256}.mlp.experts.{number}.down_proj.weight": {
            "dtype": "BF16", "shape": [16, 256], "data_offsets": [number * 8192, (number + 1) * 8192],
        }
        for number in range(tensors)
    }  # fmt: skip
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + tensors * 8192)


def slices(base: Any, layout: FileLayout) -> dict[str, Any]:
    import torch

    dtypes = torch_dtypes(torch)
    found = {}
    for tensor in layout.tensors:
        raw = base[tensor.start : tensor.end]
        assert not (base.storage_offset() + tensor.start) % 2 and not base.data_ptr() % 2
        found[tensor.name] = raw.view(dtypes[tensor.dtype]).view(list(tensor.shape))
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isfs-bench-") as work:
        ways: dict[str, Callable[[], Any]] = {}
        for shards in SHARDS:
            paths = [Path(work, f"{shards}-{number}.safetensors") for number in range(shards)]
            for path in paths:
                make(path, options.tensors // shards)
            fds = [os.open(path, os.O_RDONLY) for path in paths]
            layouts = [read_layout(fd) for fd in fds]
            maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) for fd in fds]
            pairs = [
                (torch.frombuffer(memory, dtype=torch.uint8), layout)
                for memory, layout in zip(maps, layouts, strict=True)
            ]
            ways[f"headers, {shards} shards"] = lambda fds=fds: [read_layout(fd) for fd in fds]
            ways[f"views, {shards} shards"] = lambda pairs=pairs: [views(*pair) for pair in pairs]
            ways[f"slices, {shards} shards"] = lambda pairs=pairs: [slices(*pair) for pair in pairs]
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.process_time()
                kept = way()
                samples[name].append((time.process_time() - began) / options.tensors * 1e6)
                del kept
    rows = [
        [name, f"{statistics.median(taken):.2f} ({min(taken):.2f}–{max(taken):.2f})"] for name, taken in samples.items()
    ]
    print(common.table(["way", "µs of processor time for each tensor (range)"], rows))
    for shards in SHARDS:
        times = common.ratios(samples[f"views, {shards} shards"], samples[f"slices, {shards} shards"])
        print(f"{shards} shards: slices ÷ views {times['median']:.2f} ({times['min']:.2f}–{times['max']:.2f})")


if __name__ == "__main__":
    main()
