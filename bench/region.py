"""A fresh host of a warm region: how fast is its fill, against a bare client of the same server, and what does it cost?

    scripts/bench region [--sizes 512MiB 2GiB] [--links 2gbit 20gbit] [--shards 4] [--rounds 3] [--files 3000]

Real daemons in network namespaces and a SeaweedFS with three volume servers (tests/region.py). ``--links``: the rate of
each host's link and of the hub's. Two processors do not fill one of 20gbit: then the processor time of the server and
of the host together is the limit, as in no region, where they are different machines. They do fill one of 2gbit: that
is what a fresh host meets.

`origin` fills from the hub on a host without a region, `empty tier` on the first host of one (once). `tier` is a fresh
host of a region in which one host has put all of it; no byte comes from the hub. `bare client` fetches the same objects
from the same server (bench/bare_client.py: two processes, 16 connections, no hashing, no fsync, no store). Processor
seconds are of the daemon and its fetch processes, from before the fill to its end. Ratios count. Two sizes tell what a
fill costs by itself from what each byte costs. Memory is written to and freed before each fill (common.back_memory): in
a virtual machine its first touch may cost more than the fill. That is good for sizes up to 700 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import common
from bench.common import MIB
from bench.daemon import children, cpu_seconds
from instantstart_fs.regional.stores import open_store
from tests.region import BUCKET, PREFIX, Region, RegionHost

CHUNK = 8 * MIB


def processes(host: RegionHost) -> list[int]:
    assert host._process is not None
    return [host._process.pid, *children(host._process.pid)]


def fill(region: Region, host: RegionHost, name: str) -> dict[str, float]:
    common.back_memory(region.directory)
    before = {pid: cpu_seconds(pid) for pid in processes(host)}
    seconds = host.wait_warm(name)
    spent = sum(cpu_seconds(pid) - before.get(pid, 0.0) for pid in processes(host))
    return {"seconds": seconds, "cpu": spent, "from_tier": region.from_tier(host)}


def wait_sealed(region: Region, files: int) -> None:
    assert region.cluster is not None
    deadline = time.monotonic() + 120
    while sum(name.endswith("/seal") for name in region.cluster.objects(BUCKET)) < files:
        assert time.monotonic() < deadline, "the tier is not filled"
        time.sleep(0.5)


def bare(region: Region, work: Path, link: str) -> dict[str, float]:
    """The chunk objects by their signed addresses, on a host of its own."""
    assert region.cluster is not None
    os.environ.update(AWS_ACCESS_KEY_ID=region.cluster.access_key, AWS_SECRET_ACCESS_KEY=region.cluster.secret_key)
    store = open_store(f"s3://{BUCKET}/{PREFIX}", endpoint_url=region.cluster.endpoint_url, region_name="us-east-1")
    out = work / "bare"
    out.mkdir(exist_ok=True)
    jobs: list[dict[str, Any]] = []
    for number, (name, length) in enumerate(sorted(region.cluster.objects(BUCKET).items())):
        if "/c/" in name and length > 32:
            url = store.address(name.removeprefix(f"{PREFIX}/")).url
            jobs.append({"url": url, "size": length, "sha256": "", "path": str(out / str(number))})
    job = work / "job.json"
    job.write_text(json.dumps(jobs))
    place = region.network.host(f"bare{time.monotonic_ns() % 10_000}", link)
    common.back_memory(work)
    command = [*place.prefix, sys.executable, "-m", "bench.bare_client", str(job), "--no-hash", "--no-fsync"]
    _, said = common.run([*command, "--chunk", str(2 * CHUNK)])
    for path in out.iterdir():
        path.unlink()
    return {"seconds": float(json.loads(said)["seconds"])}


def measure(options: argparse.Namespace, size: int, link: str) -> dict[str, Any]:
    """Print the rows of one size and link, and return their result. ``options.files``: small files instead, of ``size``
    in all."""
    config = {"fill": {"chunk_size": "8MiB"}}
    samples: dict[str, list[dict[str, float]]] = {"origin": [], "empty tier": [], "tier": [], "bare client": []}
    with tempfile.TemporaryDirectory(prefix="isfs-bench-") as name:
        work = Path(name)
        directory = work / "model"
        if options.files:
            directory.mkdir()
            for number in range(options.files):
                (directory / f"voice-{number:06d}.bin").write_bytes(os.urandom(2000))
        else:
            common.make_model(directory, size, options.shards)
        files = len(list(directory.iterdir()))
        with Region(work / "plain", 0, tier="", origin_rate=link, host_rate=link, config=config) as region:
            region.publish("org/m", directory)
            for _ in range(options.rounds):
                host = region.add_host()
                region.add("m", "hf://org/m", [host])
                samples["origin"].append(fill(region, host, "m"))
                host.stop()
        with Region(work / "tiered", 1, origin_rate=link, host_rate=link, config=config) as region:
            region.publish("org/m", directory)
            region.add("m", "hf://org/m")
            samples["empty tier"] = [fill(region, region.hosts[0], "m")]
            wait_sealed(region, files)
            for _ in range(options.rounds):
                host = region.add_host()
                region.add("m", "hf://org/m", [host])
                region.hub.forget_requests()
                samples["tier"].append(fill(region, host, "m"))
                assert region.origin_egress() == 0, region.origin_egress()
                host.stop()
                samples["bare client"].append(bare(region, work, link))
    rows = []
    median = {way: common.summary([each["seconds"] for each in found])["median"] for way, found in samples.items()}
    cpu = {
        way: common.summary([each["cpu"] for each in found])["median"]
        for way, found in samples.items()
        if "cpu" in found[0]
    }
    for way, seconds in median.items():
        spent = f"{cpu[way] / size * 1e9:.2f}" if way in cpu else "-"
        rows.append((way, f"{seconds:.2f} s", f"{size / seconds / 1e9:.2f} GB/s", spent))
    print(f"{size / MIB:,.0f} MiB, links of {link}")
    print(common.table(["way", "median", "rate", "daemon's CPU s/GB"], rows))
    best = min(each["seconds"] for each in samples["bare client"])
    print(f"the fresh host's rate is {best / median['tier']:.2f} of the fastest bare client's (wanted: 0.85)")
    print(
        f"its processor time is {cpu['tier'] / cpu['origin']:.2f} of a fill from the origin (wanted: 0.7 at most)",
        flush=True,
    )
    return {
        "bytes": size,
        "link": link,
        "samples": samples,
        "of_fastest_bare": best / median["tier"],
        "cpu_of_origin": cpu["tier"] / cpu["origin"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=common.size, nargs="+", default=[512 * MIB, 2048 * MIB])
    parser.add_argument("--links", nargs="+", default=["2gbit", "20gbit"], help="tc's words, such as 500mbit")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=0, help="so many files of 2 kB in the place of shards")
    options = parser.parse_args()
    sizes = [2000 * options.files] if options.files else options.sizes
    common.write_result("region", {"sizes": [measure(options, size, link) for link in options.links for size in sizes]})


if __name__ == "__main__":
    main()
