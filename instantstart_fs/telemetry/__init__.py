"""Counters for metrics and records of cold starts. Never affects what is served."""
