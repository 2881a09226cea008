"""The messages of CSI 1.x that a node driver needs, as protobuf classes made at import.

A table in place of generated code: generated modules are bound to the protobuf release that made them, and would be
4,000 lines for the 14 messages here. The numbers are the specification's; a field that is not here is skipped, as
protobuf does with unknown ones. See docs/decisions/csi.md.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "csi.v1"

# message → field → (number, type); "map" is map<string, string>, "*" before a type: repeated, "+": part of the oneof.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "BoolValue": {"value": (1, "bool")},  # as google.protobuf.BoolValue on the wire
    "Empty": {},
    "GetPluginInfoResponse": {"name": (1, "string"), "vendor_version": (2, "string"), "manifest": (3, "map")},
    "PluginService": {"type": (1, "int32")},
    "PluginCapability": {"service": (1, "PluginService")},
    "GetPluginCapabilitiesResponse": {"capabilities": (1, "*PluginCapability")},
    "ProbeResponse": {"ready": (1, "BoolValue")},
    "MountVolume": {"fs_type": (1, "string"), "mount_flags": (2, "*string"), "volume_mount_group": (3, "string")},
    "AccessMode": {"mode": (1, "int32")},
    "VolumeCapability": {"block": (1, "+Empty"), "mount": (2, "+MountVolume"), "access_mode": (3, "AccessMode")},
    "NodePublishVolumeRequest": {
        "volume_id": (1, "string"),
        "publish_context": (2, "map"),
        "staging_target_path": (3, "string"),
        "target_path": (4, "string"),
        "volume_capability": (5, "VolumeCapability"),
        "readonly": (6, "bool"),
        "secrets": (7, "map"),
        "volume_context": (8, "map"),
    },
    "NodeUnpublishVolumeRequest": {"volume_id": (1, "string"), "target_path": (2, "string")},
    "NodeGetVolumeStatsRequest": {
        "volume_id": (1, "string"),
        "volume_path": (2, "string"),
        "staging_target_path": (3, "string"),
    },
    "VolumeUsage": {"available": (1, "int64"), "total": (2, "int64"), "used": (3, "int64"), "unit": (4, "int32")},
    "VolumeCondition": {"abnormal": (1, "bool"), "message": (2, "string")},
    "NodeGetVolumeStatsResponse": {"usage": (1, "*VolumeUsage"), "volume_condition": (2, "VolumeCondition")},
    "NodeRpc": {"type": (1, "int32")},
    "NodeServiceCapability": {"rpc": (1, "NodeRpc")},
    "NodeGetCapabilitiesResponse": {"capabilities": (1, "*NodeServiceCapability")},
    "NodeGetInfoResponse": {"node_id": (1, "string"), "max_volumes_per_node": (2, "int64")},
}
METHODS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Identity": {
        "GetPluginInfo": ("Empty", "GetPluginInfoResponse"),
        "GetPluginCapabilities": ("Empty", "GetPluginCapabilitiesResponse"),
        "Probe": ("Empty", "ProbeResponse"),
    },
    "Node": {
        "NodePublishVolume": ("NodePublishVolumeRequest", "Empty"),
        "NodeUnpublishVolume": ("NodeUnpublishVolumeRequest", "Empty"),
        "NodeGetVolumeStats": ("NodeGetVolumeStatsRequest", "NodeGetVolumeStatsResponse"),
        "NodeGetCapabilities": ("Empty", "NodeGetCapabilitiesResponse"),
        "NodeGetInfo": ("Empty", "NodeGetInfoResponse"),
    },
}
"""Service → method → (request, response). "Empty" stands for a message whose fields do not matter here."""
GET_VOLUME_STATS, VOLUME_CONDITION, VOLUME_MOUNT_GROUP = 2, 4, 6
"""NodeServiceCapability.RPC.Type."""
BYTES, INODES = 1, 2
"""VolumeUsage.Unit."""

_SCALARS: Final = {"string": 9, "bool": 8, "int32": 5, "int64": 3}


def _file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="instantstart/csi.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if any(kind.startswith("+") for _, kind in fields.values()):
            message.oneof_decl.add(name="access_type")
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number, label=3 if kind[0] == "*" or kind == "map" else 1)
            bare = kind.lstrip("*+")
            if kind.startswith("+"):
                field.oneof_index = 0
            if bare == "map":
                entry = "".join(word.capitalize() for word in field_name.split("_")) + "Entry"
                nested = message.nested_type.add(name=entry)
                nested.options.map_entry = True
                for position, part in enumerate(("key", "value"), 1):
                    nested.field.add(name=part, number=position, label=1, type=_SCALARS["string"])
                field.type, field.type_name = 11, f".{PACKAGE}.{name}.{entry}"
            elif bare in _SCALARS:
                field.type = _SCALARS[bare]
            else:
                field.type, field.type_name = 11, f".{PACKAGE}.{bare}"
    return file


_pool = descriptor_pool.DescriptorPool()  # its own: a program may hold the real csi.proto beside it
_pool.Add(_file())


def message(name: str) -> Any:
    """Return the protobuf class of the message ``name``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
