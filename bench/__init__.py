"""Benches: each measures the other side in the same run. `scripts/bench` lists them; docs/BENCHMARKS.md explains."""
