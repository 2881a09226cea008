"""From an empty store to device memory: do network, disk and copy overlap, or follow one another?

    scripts/bench streaming [--size 256MiB] [--shards 1] [--origin 60] [--copy 60] [--rounds 3] [--device cpu]

The parts alone: `fill` (warm --wait into an empty store) and `copy` (prefetch of a warm store). Then both at once:
`streaming` (chunks are loaded as they come) and `by files` (each file is loaded when it is sealed, as before). The best
that can be is the slower of the parts, the worst their sum. ``--origin`` and ``--copy`` limit both in MB/s, so that
they are of one size on a machine whose memory is much faster than its network; 0 = no limit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench import common, daemon
from instantstart_fs.prefetch import LeaseSource, Stager, plan
from tests.servers.hub import HubServer

CONNECTIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=256 * common.MIB)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--origin", type=float, default=60.0, help="MB/s")
    parser.add_argument("--copy", type=float, default=60.0, help="MB/s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="streaming", help="of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isfs-bench-") as name, HubServer() as hub:
        work = Path(name)
        model = common.make_model(work / "model", options.size, options.shards)
        hub.publish("org/m", model.directory)
        if options.origin:
            hub.fault("bandwidth", port="cdn", rate=int(options.origin * 1e6 / CONNECTIONS))
        config = f'[fill]\nconnections = {CONNECTIONS}\n[origins.huggingface]\nendpoint = "{hub.endpoint}"\n'
        with daemon.daemon(work, config=config) as served:
            served.cli("add", "m", "hf://org/m")

            def emptied() -> None:
                served.cli("evict", "m", "--force")
                common.drop_caches()

            def fill() -> dict[str, float]:
                emptied()
                return {"seconds": served.cli("warm", "m", "--wait")[0]}

            def copy() -> dict[str, float]:
                served.cli("warm", "m", "--wait")
                common.drop_caches()
                return stage(stream=True)

            def stage(*, stream: bool) -> dict[str, float]:
                began = time.monotonic()
                source = LeaseSource("m", served.env["INSTANTSTART_SOCKET"], stream=stream)
                stager = Stager(source, rate=options.copy * 1e6)
                with stager.start(plan(source.weights, None, [options.device])) as staged:
                    staged.wait(600)
                    return {"seconds": time.monotonic() - began}

            def streaming() -> dict[str, float]:
                emptied()
                return stage(stream=True)

            def by_files() -> dict[str, float]:
                emptied()
                return stage(stream=False)

            ways = {"fill": fill, "copy": copy, "streaming": streaming, "by files": by_files}
            rounds = common.Rounds(ways, options.rounds)
            rounds.run()
    median = {way: common.summary(rounds.seconds(way))["median"] for way in ways}
    most, total = max(median["fill"], median["copy"]), median["fill"] + median["copy"]
    rows = [
        (way, f"{seconds:.2f} s", f"{seconds / most:.2f}", f"{seconds / total:.2f}") for way, seconds in median.items()
    ]
    print(common.table(["way", "median", "of the slower part", "of the sum"], rows))
    common.write_result(
        options.name,
        {
            "bytes": options.size,
            "origin": options.origin,
            "copy": options.copy,
            "device": options.device,
            "samples": rounds.samples,
            "median": median,
            "of_the_slower_part": median["streaming"] / most,
        },
    )


if __name__ == "__main__":
    main()
