"""Updates that change a configuration file and no weight: sharing what stays, against copying it and fetching it again.

    scripts/bench update [--size 1GiB] [--shards 4] [--rounds 5]

The source is a plain directory on the same disk, which is kind to the fetch: from a network it takes longer. Each
round, by turns: `update` and `warm --wait` (*share*); the same after an `evict`, so that nothing is there (*fetch*:
what every update did before generations shared files); and a copy of the store's files with cp --reflink=auto and a
sync (*copy*: what giving each generation its own would cost where the filesystem cannot clone). Two starts of the
command line are in the first two, none in the third.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from bench import common, daemon
from bench.common import GIB, run, show_size, summary, table


def measure(work: Path, size: int, shards: int, rounds: int) -> dict[str, list[float]]:
    model = common.make_model(work / "model", size, shards)
    version = 0

    def change() -> None:
        nonlocal version
        version += 1
        (model.directory / "config.json").write_text(json.dumps({"version": version}))

    with daemon.daemon(work) as served:
        served.cli("add", "p", f"file://{model.directory}")
        served.cli("warm", "p", "--wait")

        def updated() -> dict[str, float]:
            change()
            first = served.cli("update", "p")[0]
            return {"seconds": first + served.cli("warm", "p", "--wait")[0], "update": first}

        def fetched() -> dict[str, float]:
            served.cli("evict", "p")
            return updated()

        def copied() -> dict[str, float]:
            (generation,) = [path for path in (served.store / "slots/p").iterdir() if path.is_dir()]
            taken = run(["cp", "-a", "--reflink=auto", generation / "files", work / "copy"])[0]
            taken += run(["sync", "-f", work / "copy"])[0]
            run(["rm", "-r", work / "copy"])
            return {"seconds": taken}

        contenders: dict[str, Callable[[], dict[str, float]]] = {"share": updated, "fetch": fetched, "copy": copied}
        measured = common.Rounds(contenders, rounds)
        measured.run()
    return {name: measured.seconds(name) for name in measured.contenders} | {
        "update alone": measured.seconds("share", "update")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=GIB)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where everything lies (default: the temporary directory)")
    parser.add_argument("--name", default="update", help="of the result file")
    options = parser.parse_args()
    with common.workspace(options.dir) as work:
        samples = measure(work, options.size, options.shards, options.rounds)
    rows = []
    for name, values in samples.items():
        found = summary(values)
        rows.append([name, f"{found['median']:.2f}", f"{found['min']:.2f}–{found['max']:.2f}"])
    print(f"\n{show_size(options.size)} in {options.shards} shards")
    print(table(["", "seconds: median", "range"], rows))
    found = {name: summary(values) for name, values in samples.items()}
    common.write_result(options.name, {"bytes": options.size, "shards": options.shards, "samples": found})


if __name__ == "__main__":
    main()
