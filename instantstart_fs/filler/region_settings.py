"""Builds the filler's side of a region from its configuration. Reads the key's file; asks nobody."""

from __future__ import annotations

from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.filler.region_follow import RegionSettings, WriteRate
from instantstart_fs.regional.keys import RegionKey, read_key
from instantstart_fs.regional.stores import open_store


def region_settings(config: RegionalConfig, recheck: float | None = None) -> RegionSettings:
    """Build the settings. ``recheck`` is [origins] recheck_access in seconds. Raises ConfigError."""
    own = open_store(
        config.url, endpoint_url=config.endpoint_url, region_name=config.region_name, profile=config.profile
    )
    key = RegionKey(read_key(config.key_file))
    others = [
        open_store(one.url, endpoint_url=one.endpoint_url, region_name=one.region_name, profile=one.profile)
        for one in config.upstream
    ]
    keys = [RegionKey(read_key(one.key_file)) if one.key_file is not None else key for one in config.upstream]
    return RegionSettings(
        host=config.host,
        key=key,
        stores=(own, *others),
        keys=(key, *keys),
        trust_seals=config.verify == "chunks",
        write_back=config.write_back,
        rate=WriteRate(config.rate),
        recheck=recheck,
        rack=config.rack or "",
    )
