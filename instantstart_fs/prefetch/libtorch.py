"""Loads torch when it is needed: it is an extra, and no module of the package may need it at import."""

from __future__ import annotations

import importlib
from typing import Any

from instantstart_fs.errors import PrefetchError


def load_torch() -> Any:
    """The torch module. Raises PrefetchError that says what to install."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise PrefetchError(
            f"staging to a GPU, and tensors, need torch: pip install 'instantstart-fs[gpu]' ({error})"
        ) from error
