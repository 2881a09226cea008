"""Configuration: read once by the command line, handed down as frozen values. docs/CONFIGURATION.md is the contract.

What is imported from here is loaded when it is named: who only looks for the daemon's socket (config/places.py) does
not wait for the sections' types.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import Any

    from instantstart_fs.config.loader import load_config
    from instantstart_fs.config.places import default_mount, default_socket, default_store, run_directory
    from instantstart_fs.config.sections import (
        Capacity,
        Config,
        ControlConfig,
        EvictionConfig,
        FillConfig,
        HttpConfig,
        HuggingFaceConfig,
        MountConfig,
        OriginsConfig,
        S3Config,
        ServeUnsealed,
        StagingConfig,
        StoreConfig,
    )

__all__ = [
    "Capacity",
    "Config",
    "ControlConfig",
    "EvictionConfig",
    "FillConfig",
    "HttpConfig",
    "HuggingFaceConfig",
    "MountConfig",
    "OriginsConfig",
    "S3Config",
    "ServeUnsealed",
    "StagingConfig",
    "StoreConfig",
    "default_mount",
    "default_socket",
    "default_store",
    "load_config",
    "run_directory",
]
_ELSEWHERE = {
    "load_config": "loader",
    "default_mount": "places",
    "default_socket": "places",
    "default_store": "places",
    "run_directory": "places",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'sections')}")
    found = globals()[name] = getattr(module, name)
    return found
