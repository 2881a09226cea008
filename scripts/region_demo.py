"""What `scripts/region-demo` shows: one pull for a region, and a fresh host that asks the origin for nothing.

The region is tests/region.py's, the same that the tests use: a hub behind a slow link, a SeaweedFS with three volume
servers (each object on two of them), N real daemons with a store, an index, a mount and links of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import make_model, show_size, size, table
from instantstart_fs.core.humanize import human_bytes
from tests.region import HOST_RATE, ORIGIN_RATE, Region, RegionHost, why_no_region, why_no_tier

PIPELINE, REPO = "demo", "org/model"


def main() -> int:
    parser = argparse.ArgumentParser(prog="region-demo", description="A region on one machine.")
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--size", type=size, default=size("256MiB"), help="of the model (256MiB)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument(
        "--origin-rate", default=ORIGIN_RATE, help=f"of the origin's link, as tc writes it ({ORIGIN_RATE})"
    )
    parser.add_argument("--host-rate", default=HOST_RATE, help=f"of each other link ({HOST_RATE})")
    parser.add_argument("--without-tier", action="store_true", help="each host for itself, for comparison")
    parser.add_argument("--directory", help="where it all lies (a temporary directory)")
    parser.add_argument("--json", action="store_true", help="one object, for scripts")
    options = parser.parse_args()
    if options.hosts < 1:
        parser.error("--hosts: at least 1")
    if (reason := why_no_region() or (None if options.without_tier else why_no_tier())) is not None:
        print(f"region-demo: {reason}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(
            prefix="region-demo-", dir=options.directory, ignore_cleanup_errors=True
        ) as name:
            found = show(Path(name), options)
    except KeyboardInterrupt:
        print("region-demo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(found, indent=1))
    return 0


def show(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    def say(text: str = "") -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    model = make_model(directory / "model", options.size, options.shards)
    total = sum(path.stat().st_size for path in model.directory.iterdir())
    started = time.monotonic()
    tier = not options.without_tier
    with Region(
        directory / "region",
        options.hosts,
        tier="seaweed" if tier else "",
        origin_rate=options.origin_rate,
        host_rate=options.host_rate,
        config={"fill": {"chunk_size": "8MiB"}},
    ) as region:
        what = "SeaweedFS with 3 volume servers, " if tier else ""
        say(
            f"origin ({options.origin_rate}), {what}{options.hosts} daemons ({options.host_rate} each): up in "
            f"{time.monotonic() - started:.1f} s"
        )
        region.publish(REPO, model.directory)
        region.add(PIPELINE, f"hf://{REPO}")
        region.hub.forget_requests()  # what listing asked for is not what is shown
        say(f"one model of {show_size(total)}, wanted by all {options.hosts} hosts at once")
        say()
        seconds = region.warm(PIPELINE)
        rows = [account(region, host, seconds[host.name]) for host in region.hosts]
        egress = region.origin_egress()
        region.prove(PIPELINE, model.directory)
        fresh: dict[str, Any] | None = None
        if tier:
            host = region.add_host()
            region.add(PIPELINE, f"hf://{REPO}", [host])
            fresh = account(region, host, region.warm(PIPELINE, [host])[host.name])
            fresh["origin_sent"] = region.origin_egress() - egress
            region.prove(PIPELINE, model.directory, [host])
        say(
            table(
                ("HOST", "WARM AFTER", "FROM THE ORIGIN", "FROM THE TIER"),
                [
                    (row["host"], f"{row['seconds']:.2f} s", human_bytes(row["origin"]), human_bytes(row["tier"]))
                    for row in [*rows, *([{**fresh, "host": f"{fresh['host']} (fresh)"}] if fresh else [])]
                ],
            )
        )
        say()
        say(
            f"the origin sent {egress / total:.2f} × the model's size ({human_bytes(egress)}) for {options.hosts} hosts"
        )
        say(
            f"time to warm: {statistics.median(seconds.values()):.2f} s at the median, "
            f"{max(seconds.values()):.2f} s for the last"
        )
        if fresh is not None:
            say(
                f"a fresh host afterwards: {fresh['seconds']:.2f} s, "
                f"{human_bytes(fresh['origin_sent'])} from the origin"
            )
        stored: dict[str, int] = {}
        if region.cluster is not None:
            stored = {host.name: host.sent() for host in region.cluster.volume_hosts}
            say("volume servers sent " + ", ".join(f"{name} {human_bytes(count)}" for name, count in stored.items()))
        say("every host showed the model byte for byte")
        say("(all of this shares one machine's processors: the seconds are ratios at best)")
        return {
            "bytes": total,
            "hosts": rows,
            "fresh": fresh,
            "origin_sent": egress,
            "origin_ratio": egress / total,
            "volume_servers_sent": stored,
        }


def account(region: Region, host: RegionHost, seconds: float) -> dict[str, Any]:
    return {
        "host": host.name,
        "seconds": seconds,
        "origin": region.from_origin(host),
        "tier": region.from_tier(host),
    }


if __name__ == "__main__":
    sys.exit(main())
