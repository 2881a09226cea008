"""Counters for the metrics, and records of cold starts. It never affects what is served."""
