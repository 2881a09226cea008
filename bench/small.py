"""Many small files: how long until a repository of hundreds of files of a few bytes is here.

    scripts/bench small [--files 800,2600] [--bytes 40] [--rounds 5]

`instantstart warm --wait` against `hf download`, by turns, from the project's test hub, which serves such files itself
(they are no LFS files). A time is that of whole processes. Listing is part of `hf download`, and of `add` with us:
`add + warm` is both, `warm` the second alone. Nothing is at the destination before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common, daemon
from bench.common import Rounds, ratios, run, summary, table
from tests.servers.hub import HubServer

TARGET = 1.5
"""`warm` is to be so many times as fast as `hf download`."""


def make_files(directory: Path, count: int, size: int) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        path = directory / f"voices/{number % 40:02}/voice-{number:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"voice": number}).ljust(size))


def contenders(
    served: daemon.Daemon, hub: HubServer, repo: str, files: int, work: Path
) -> dict[str, Callable[[], dict[str, float]]]:
    def ours() -> dict[str, float]:
        hub.forget_requests()
        clock = daemon.Clock([served.child.pid, *served.workers(), hub.pid])
        added = served.cli("add", "small", f"hf://{repo}")[0]
        listing = len(hub.requests())
        warm = served.cli("warm", "small", "--wait")[0]
        spent = clock.spent()
        asked = len(hub.requests()) - listing
        state = served.status("small")
        assert state["state"] == "warm" and len(state["files"]) == files, state["state"]
        served.cli("remove", "small")
        main, servers = spent.pop(served.child.pid), spent.pop(hub.pid)
        return {
            "seconds": warm, "with_listing": added + warm, "requests": asked / files, "daemon_cpu": main,
            "workers_cpu": sum(spent.values()), "hub_cpu": servers,
        }  # fmt: skip

    def hf_download() -> dict[str, float]:
        hub.forget_requests()
        clock = daemon.Clock([hub.pid])
        home = work / "hf-home"
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        started = time.monotonic()
        run([common.tool("hf") or "hf", "download", repo], env=env)
        seconds = time.monotonic() - started
        spent = clock.spent()[hub.pid]
        found = sum(1 for path in home.rglob("voice-*.json") if path.is_file())
        assert found == files, found
        shutil.rmtree(home)
        return {
            "seconds": seconds, "with_listing": seconds, "requests": len(hub.requests()) / files, "hub_cpu": spent
        }  # fmt: skip

    return {"ours": ours, "hf download": hf_download}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default="800,2600")
    parser.add_argument("--bytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where store and destination lie (default: the temporary directory)")
    parser.add_argument("--name", default="small", help="of the result file")
    options = parser.parse_args()
    result: dict[str, Any] = {"bytes": options.bytes, "rounds": options.rounds, "target": TARGET, "files": {}}
    rows = []
    with (
        common.workspace(options.dir) as work,
        HubServer() as hub,
        daemon.daemon(work, env={"HF_ENDPOINT": hub.endpoint}) as served,
    ):
        for files in (int(word) for word in options.files.split(",")):
            repo = f"bench/small-{files}"
            make_files(work / f"model-{files}", files, options.bytes)
            hub.publish(repo, work / f"model-{files}")
            print(f"{files} files of {options.bytes} bytes, {options.rounds} rounds", flush=True)
            rounds = Rounds(contenders(served, hub, repo, files, work), options.rounds)
            rounds.run()
            theirs = rounds.seconds("hf download")
            found: dict[str, Any] = {
                name: {key: summary([sample[key] for sample in samples]) for key in samples[0]}
                for name, samples in rounds.samples.items()
            }
            for name, key in (("warm", "seconds"), ("add + warm", "with_listing")):
                ours = rounds.seconds("ours", key)
                speedup = ratios(ours, theirs)
                found[f"{name}_is_times_as_fast"] = speedup
                met = "met" if speedup["median"] >= TARGET else "MISSED"
                rows.append(
                    [
                        str(files),
                        name,
                        f"{summary(ours)['median']:.2f} ({min(ours):.2f}–{max(ours):.2f})",
                        f"{summary(theirs)['median']:.2f} ({min(theirs):.2f}–{max(theirs):.2f})",
                        f"{speedup['median']:.2f} ({speedup['min']:.2f}–{speedup['max']:.2f})",
                        f"≥ {TARGET:g}: {met}" if name == "warm" else "",
                    ]
                )
            result["files"][str(files)] = found
    print("\n" + table(["files", "ours", "seconds: median (range)", "hf download", "× as fast", "target"], rows))
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
