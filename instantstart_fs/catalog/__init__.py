"""The pipelines in memory: their generations and files, the nodeids that name them, and when metadata is loaded and
unloaded. This package serves no bytes and asks no origin."""
