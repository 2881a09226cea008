"""Cold read-through: how long until 2 GiB that were never here have been read.

    scripts/bench cold [--size 2GiB] [--shards 4] [--rounds 5] [--origins hub,s3] [--only NAME,NAME] [--name cold]

Against nginx behind the test hub (``hub``): `dd` on the mount, `instantstart warm --wait`, the bare client that
fetches, hashes and fsyncs (bench/bare_client.py), the same without hashing and fsync, curl, `hf download`, and
`rclone mount --vfs-cache-mode full` on the same nginx. Against SeaweedFS (``s3``): ours again, the bare client with
presigned addresses, rclone, s3fs. Every contender runs once a round, in a turning order; a time is that of whole
processes (`add`, `rclone mount` and `s3fs` mounting are left out for all alike). Nothing of the file is at the
destination before; the origin's files are in its page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import common, daemon, origins
from bench.common import GIB, MIB, Model, Rounds, ratios, run, show_size, summary, table

Contender = Callable[[], dict[str, float]]

TARGETS = {  # from the issue: ours is at least so many times as fast
    "bare client": 0.85,
    "hf download": 3.0,
    "rclone vfs-full": 2.0,
    "s3fs": 2.0,
}


def dd(paths: Sequence[Path]) -> float:
    """Seconds to read the files one after the other, as an engine that loads shards does."""
    started = time.monotonic()
    for path in paths:
        run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"])
    return time.monotonic() - started


class Ours:
    """One pipeline per measurement: added before the clock starts, removed after it stopped."""

    def __init__(self, served: daemon.Daemon, source: str, model: Model) -> None:
        self.served, self.source, self.model, self.number = served, source, model, 0

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[str]:
        self.number += 1
        name = f"bench-{self.number}"
        self.served.cli("add", name, self.source)
        try:
            yield name
        finally:
            self.served.cli("remove", name)

    def _sealed_after(self, name: str, started: float) -> float:
        path = self.served.mount / name
        common.wait_for(
            lambda: os.getxattr(path, "user.instantstart.state") == b"warm", f"{name} being warm", 300.0, 0.005
        )
        return time.monotonic() - started

    def _figures(self, seconds: float, sealed: float, clock: daemon.Clock) -> dict[str, float]:
        spent = clock.spent()
        main = spent.pop(self.served.child.pid)
        return {"seconds": seconds, "sealed": sealed, "daemon_cpu": main, "workers_cpu": sum(spent.values())}

    def _clock(self) -> daemon.Clock:
        return daemon.Clock([self.served.child.pid, *self.served.workers()])

    def read(self) -> dict[str, float]:
        with self.pipeline() as name:
            clock, started = self._clock(), time.monotonic()
            seconds = dd([self.served.mount / name / path.name for path in self.model.shards])
            return self._figures(seconds, self._sealed_after(name, started), clock)

    def warm(self) -> dict[str, float]:
        with self.pipeline() as name:
            clock, started = self._clock(), time.monotonic()
            seconds, _ = self.served.cli("warm", name, "--wait")
            return self._figures(seconds, self._sealed_after(name, started), clock)

    def check(self) -> None:
        """Once, outside the clock: what dd read is what the origin has."""
        with self.pipeline() as name:
            for path in self.model.shards:
                digest = hashlib.sha256()
                with open(self.served.mount / name / path.name, "rb", buffering=0) as file:
                    while block := file.read(MIB):
                        digest.update(block)
                if digest.hexdigest() != self.model.digests[path.name]:
                    raise SystemExit(f"WRONG BYTES: {path.name}")


def bare(work: Path, urls: dict[str, str], model: Model, *options: str) -> Contender:
    def measure() -> dict[str, float]:
        target = work / "bare"
        target.mkdir()
        job = [
            {
                "url": urls[path.name],
                "size": path.stat().st_size,
                "sha256": model.digests[path.name],
                "path": str(target / path.name),
            }
            for path in model.shards
        ]
        (work / "job.json").write_text(json.dumps(job))
        seconds, text = run([sys.executable, "-m", "bench.bare_client", str(work / "job.json"), *options])
        shutil.rmtree(target)
        return {"seconds": seconds, "inner": json.loads(text)["seconds"]}

    return measure


def curl(work: Path, urls: dict[str, str]) -> Contender:
    def measure() -> dict[str, float]:
        target = work / "curl"
        target.mkdir()
        wanted = [word for name, url in urls.items() for word in ("-o", str(target / name), url)]
        seconds, _ = run(["curl", "-s", "-f", "--parallel", *wanted])
        shutil.rmtree(target)
        return {"seconds": seconds}

    return measure


def hf_download(work: Path, endpoint: str, repo: str) -> Contender:
    program = common.tool("hf")
    assert program is not None

    def measure() -> dict[str, float]:
        home = work / "hf-home"
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        seconds, _ = run([program, "download", repo], env=env)
        shutil.rmtree(home)
        return {"seconds": seconds}

    return measure


def _mounted(work: Path, name: str, start: Callable[[Path, Path], Sequence[str]], env: dict[str, str]) -> Any:
    @contextlib.contextmanager
    def mounted() -> Iterator[Path]:
        mount, cache = work / f"{name}-mount", work / f"{name}-cache"
        mount.mkdir()
        cache.mkdir()
        with common.process(start(mount, cache), env=env, log=work / f"{name}.log") as child:
            try:
                common.wait_for(lambda: os.path.ismount(mount) or child.poll() is not None, name, 30.0)
                if child.poll() is not None:
                    raise RuntimeError(f"{name} ended: {(work / f'{name}.log').read_text()[-2000:]}")
                yield mount
            finally:
                subprocess.run(["fusermount3", "-u", str(mount)], check=False, capture_output=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)
        shutil.rmtree(cache)
        mount.rmdir()

    return mounted


def mounted_dd(
    work: Path, name: str, start: Callable[[Path, Path], Sequence[str]], inside: str, model: Model, env: dict[str, str]
) -> Contender:
    mounted = _mounted(work, name, start, env)

    def measure() -> dict[str, float]:
        with mounted() as mount:
            return {"seconds": dd([mount / inside / path.name for path in model.shards])}

    return measure


def rclone(
    work: Path, name: str, remote: str, inside: str, model: Model, env: dict[str, str], *options: str
) -> Contender:
    program = common.tool("rclone")
    assert program is not None

    def start(mount: Path, cache: Path) -> list[str]:
        return [
            program,
            "mount",
            remote,
            str(mount),
            "--read-only",
            "--vfs-cache-mode",
            "full",
            *("--cache-dir", str(cache), "--config", "/dev/null", *options),
        ]

    return mounted_dd(work, name, start, inside, model, {**os.environ, **env})


TUNED = ("--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "8M", "--buffer-size", "0", "--transfers", "16")


def hub_contenders(stack: contextlib.ExitStack, work: Path, model: Model) -> tuple[dict[str, Contender], Ours]:
    repo = "bench/model"
    server, cdn = stack.enter_context(origins.hub(work / "hub", {repo: model}))
    env = {"HF_ENDPOINT": server.endpoint}
    served = stack.enter_context(daemon.daemon(work, env=env, name="hub-daemon"))
    ours = Ours(served, f"hf://{repo}", model)
    urls = {path.name: f"{cdn}/{repo}/{path.name}" for path in model.shards}
    contenders: dict[str, Contender] = {
        "ours: dd on the mount": ours.read,
        "ours: warm --wait": ours.warm,
        "bare client": bare(work, urls, model),
        "bare, fetch only": bare(work, urls, model, "--no-hash", "--no-fsync"),
    }
    if common.tool("curl"):
        contenders["curl, fetch only"] = curl(work, urls)
    contenders["hf download"] = hf_download(work, server.endpoint, repo)
    if common.tool("rclone"):
        web = {"RCLONE_HTTP_URL": cdn}
        contenders["rclone vfs-full"] = rclone(work, "rclone", ":http:", repo, model, web)
        contenders["rclone vfs-full, 16 streams"] = rclone(work, "rclone-tuned", ":http:", repo, model, web, *TUNED)
    return contenders, ours


def s3_contenders(stack: contextlib.ExitStack, work: Path, model: Model) -> tuple[dict[str, Contender], Ours]:
    from tests.servers.seaweed import SeaweedServer

    weed = stack.enter_context(SeaweedServer(work / "weed"))
    bucket = weed.new_bucket("models")
    weed.upload(model.directory, bucket, "bench")
    client = weed.client()
    urls = {
        path.name: client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": f"bench/{path.name}"}, ExpiresIn=86400
        )
        for path in model.shards
    }
    config = f'[origins.s3]\nendpoint_url = "{weed.endpoint_url}"\nregion_name = "us-east-1"\n'
    served = stack.enter_context(daemon.daemon(work, env=weed.environment, config=config, name="s3-daemon"))
    ours = Ours(served, f"s3://{bucket}/bench", model)
    contenders: dict[str, Contender] = {
        "ours: dd on the mount": ours.read,
        "ours: warm --wait": ours.warm,
        "bare client": bare(work, urls, model),
        "bare, fetch only": bare(work, urls, model, "--no-hash", "--no-fsync"),
    }
    if common.tool("rclone"):
        env = {
            "RCLONE_S3_PROVIDER": "SeaweedFS",
            "RCLONE_S3_ENDPOINT": weed.endpoint_url,
            "RCLONE_S3_ACCESS_KEY_ID": weed.access_key,
            "RCLONE_S3_SECRET_ACCESS_KEY": weed.secret_key,
        }
        remote = f":s3:{bucket}"
        contenders["rclone vfs-full"] = rclone(work, "rclone", remote, "bench", model, env)
        contenders["rclone vfs-full, 16 streams"] = rclone(work, "rclone-tuned", remote, "bench", model, env, *TUNED)
    if common.tool("s3fs"):
        passwd = work / "s3fs-passwd"
        passwd.write_text(f"{weed.access_key}:{weed.secret_key}")
        passwd.chmod(0o600)

        def s3fs(mount: Path, cache: Path) -> list[str]:
            return [
                "s3fs",
                bucket,
                str(mount),
                "-f",
                "-o",
                f"url={weed.endpoint_url},use_path_request_style,ro",
                "-o",
                f"passwd_file={passwd},tmpdir={cache}",
            ]

        contenders["s3fs"] = mounted_dd(work, "s3fs", s3fs, "bench", model, dict(os.environ))
    return contenders, ours


def report(rounds: Rounds, total: int) -> tuple[dict[str, Any], str]:
    results: dict[str, Any] = {}
    rows = []
    mount, warm = (rounds.seconds(name) for name in ("ours: dd on the mount", "ours: warm --wait"))
    for name, samples in rounds.samples.items():
        seconds = rounds.seconds(name)
        figures: dict[str, Any] = {key: summary([sample[key] for sample in samples]) for key in samples[0]}
        figures["gb_per_second"] = summary([total / second / 1e9 for second in seconds])
        row = [
            name,
            f"{figures['seconds']['median']:.2f} ({min(seconds):.2f}–{max(seconds):.2f})",
            f"{figures['gb_per_second']['median']:.2f}",
            f"{figures['cores_busy']['median']:.2f}",
        ]
        for ours in (mount, warm):
            speedup = ratios(ours, seconds)
            figures["mount_is_times_as_fast" if ours is mount else "warm_is_times_as_fast"] = speedup
            row.append(f"{speedup['median']:.2f} ({speedup['min']:.2f}–{speedup['max']:.2f})")
        target = TARGETS.get(name)
        met = (
            ""
            if target is None
            else f"≥ {target:g}: "
            + ", ".join(
                "met" if figures[key]["median"] >= target else "MISSED"
                for key in ("mount_is_times_as_fast", "warm_is_times_as_fast")
            )
        )
        figures["target"] = target
        rows.append([*row, met])
        results[name] = figures
    header = ["", "seconds: median (range)", "GB/s", "cores busy", "mount is × as fast", "warm is × as fast", "target"]
    return results, table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=common.size, default=2 * GIB)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--origins", default="hub,s3")
    parser.add_argument("--only", help="comma-separated contenders; ours always run")
    parser.add_argument("--dir", help="where stores and destinations lie (default: the temporary directory)")
    parser.add_argument("--name", default="cold", help="of the result file")
    options = parser.parse_args()
    builders = {"hub": hub_contenders, "s3": s3_contenders}
    result: dict[str, Any] = {"bytes": options.size, "shards": options.shards, "rounds": options.rounds, "origins": {}}
    for origin in options.origins.split(","):
        with contextlib.ExitStack() as stack:
            work = stack.enter_context(common.workspace(options.dir))
            model = common.make_model(work / "model", options.size, options.shards)
            total = model.weight_bytes
            print(f"{origin}: {show_size(total)} in {options.shards} file(s), {options.rounds} rounds", flush=True)
            contenders, ours = builders[origin](stack, work, model)
            if options.only:
                wanted = options.only.split(",")
                contenders = {
                    name: found for name, found in contenders.items() if name.startswith("ours") or name in wanted
                }
            ours.check()
            rounds = Rounds(contenders, options.rounds)
            rounds.run()
            figures, text = report(rounds, total)
            print(f"\n{text}\n", flush=True)
            result["origins"][origin] = figures
    common.write_result(options.name, result)


if __name__ == "__main__":
    main()
