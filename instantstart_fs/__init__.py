"""Instant Start FS: a read-through mount that keeps model weights staged on NVMe."""

__version__ = "0.2.0"
