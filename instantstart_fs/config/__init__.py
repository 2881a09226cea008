"""Configuration: read once by the command line, handed down as frozen values. docs/CONFIGURATION.md is the contract."""

from instantstart_fs.config.loading import load_config
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
