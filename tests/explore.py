"""Random tests with fresh seeds, round after round: ``scripts/test --explore [--minutes N] [--seed S] [PYTEST ARGS…]``.

A test that fails is left out of the rounds that follow. At the end each finding is printed with its seed and the
``@reproduce_failure`` line that repeats it. Exit 0: nothing found; 1: findings; 2: no round could run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOB = re.compile(r"@reproduce_failure\(.*\)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/test --explore", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round begins after that (10)")
    parser.add_argument("--seed", type=int, help="one round with this seed, instead of many with fresh ones")
    options, rest = parser.parse_known_args(arguments)
    end = time.monotonic() + options.minutes * 60
    found: list[tuple[int, str, str]] = []
    rounds = 0
    with tempfile.TemporaryDirectory(prefix="explore-") as directory:
        findings = Path(directory) / "findings"
        while not rounds or (options.seed is None and time.monotonic() < end):
            seed = secrets.randbits(32) if options.seed is None else options.seed
            findings.write_bytes(b"")
            print(f"explore: round {rounds + 1}, seed {seed}", flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis and not soak", "-n", str(os.cpu_count())]
            command += ["--hypothesis-profile=explore", f"--hypothesis-seed={seed}"]
            command += [f"--deselect={test}" for _, test, _ in found]
            status = subprocess.run(
                [*command, *rest], env={**os.environ, "INSTANTSTART_TEST_FINDINGS": str(findings)}
            ).returncode
            new = [json.loads(line) for line in findings.read_text().splitlines()]
            found += [(seed, finding["test"], finding["text"]) for finding in new]
            if status not in (0, 1) or (status == 1 and not new):
                print(f"explore: pytest ended with {status}", file=sys.stderr)
                return 1 if found else 2
            rounds += 1
    for seed, test, text in found:
        blob = BLOB.search(text)
        print(f"\nexplore: {test} failed\n  again: scripts/test --explore --seed {seed} {shlex.quote(test)}")
        print(
            f"  the example alone: {blob.group()} over the test"
            if blob
            else "  no example is told: see its report above"
        )
    print(f"explore: {rounds} rounds, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
