"""The NVMe side: sparse files, manifests and seal records. Synchronous and blocking; callers choose the threads."""
